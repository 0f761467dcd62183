// Tensors in which a forward pass leaves logits for its backward pass.
#pragma once

#include "../core/reserve.h"
#include "../core/similarity.h"
#include "tensors.h"

namespace wscl::binding {

inline Tensor new_room(const Tensor& like, int64_t numbers) {
  STD_TORCH_CHECK(numbers >= 0, "room: expected a number of numbers, got ", numbers);
  const ScalarType dtype = compute_dtype(like.scalar_type());
  const int64_t size = dtype == ScalarType::Double ? sizeof(double) : sizeof(float), stride = 1;
  return torch::stable::from_blob(take_from_reserve(numbers * size), {&numbers, 1}, {&stride, 1}, like.device(),
                                  dtype, give_back_to_reserve);
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
