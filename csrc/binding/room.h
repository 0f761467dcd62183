// Tensors in which a forward pass leaves logits for its backward pass.
#pragma once

#include "../core/similarity.h"
#include "pages.h"
#include "tensors.h"

namespace wscl::binding {

inline Tensor new_room(const Tensor& like, int64_t numbers) {
  STD_TORCH_CHECK(numbers >= 0, "room: expected a number of numbers, got ", numbers);
  Tensor logits = torch::stable::new_empty(like, {numbers}, compute_dtype(like.scalar_type()));
  ask_for_large_pages(logits);
  return logits;
}

inline void check_room(const Tensor& logits, const Tensor& like) {
  STD_TORCH_CHECK(
      logits.dim() == 1 && logits.stride(0) == 1 && logits.scalar_type() == compute_dtype(like.scalar_type()),
      "logits: expected the forward pass's");
}

// Written by the forward pass alone.
template <class T>
KeptLogits<T> kept(const Tensor& logits) {
  return {static_cast<T*>(logits.data_ptr()), logits.size(0)};
}

}  // namespace wscl::binding
