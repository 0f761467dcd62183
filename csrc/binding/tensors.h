// What every operator's binding needs: checks with messages, typed pointers, torch's threads.
//
// What a user can get wrong is checked in wscl_fast.functional, with an error that names the argument; the
// checks here guard those who call the operators themselves.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/dtypes.h"
#include "../core/threads.h"

namespace wscl::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline wscl::Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i, context);
            });
          }};
}

// A matrix whose rows are contiguous: as it is where it can be, else a copy.
inline Tensor with_unit_columns(const Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

inline Tensor check_matrix(const char* name, const Tensor& matrix, ScalarType dtype) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected a matrix [rows, d], got ", matrix.dim(), " dimensions");
  STD_TORCH_CHECK(matrix.scalar_type() == dtype, name, ": expected the dtype of queries");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, ": expected float32, float64, bfloat16 or float16");
  return with_unit_columns(matrix);
}

inline Tensor check_vector(const char* name, const Tensor& vector, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == length, name, ": expected a vector of length ",
                  length);
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, ": wrong dtype");
  return vector.is_contiguous() ? vector : torch::stable::contiguous(vector);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// What rows of a dtype are computed with: halves with float.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

// 1 / temperature, above 0 unless it may have either sign
inline double check_scale(const Tensor& scale, ScalarType dtype, bool either_sign = false) {
  STD_TORCH_CHECK(scale.dim() == 0 && scale.scalar_type() == compute_dtype(dtype),
                  "scale: expected a 0-dim tensor, float64 for float64 queries, else float32");
  const double value = dtype == ScalarType::Double ? *data<double>(scale) : *data<float>(scale);
  STD_TORCH_CHECK(value > 0 || (either_sign && value < 0), "scale: expected a number ",
                  either_sign ? "other than" : "above", " 0, got ", value);
  return value;
}

template <class F>
void dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float)
    f(float());
  else
    f(double());
}

// Over the dtypes that rows may have.
template <class F>
void dispatch_rows(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16)
    f(wscl::BFloat16());
  else if (dtype == ScalarType::Half)
    f(wscl::Float16());
  else
    dispatch(dtype, f);
}

}  // namespace wscl::binding
