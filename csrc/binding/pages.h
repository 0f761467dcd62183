// Large pages for large results.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../core/pages.h"

namespace wscl::binding {

inline void ask_for_large_pages(const torch::stable::Tensor& fresh) {
  wscl::ask_for_large_pages(fresh.data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

}  // namespace wscl::binding
