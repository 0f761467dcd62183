// tag_weighted_sum on CUDA tensors: checks, allocation; enqueued on the current stream, as in infonce_cuda.cpp.

#include "../core/tags_cuda.h"

#include <tuple>

#include "arguments_cuda.h"

namespace {

using namespace wscl::binding;

Tensor check_tags(const char* name, const Tensor& tags) {
  STD_TORCH_CHECK(tags.dim() == 2 && tags.size(1) > 0 && tags.scalar_type() == ScalarType::Long, name,
                  ": expected an int64 matrix [rows, words]");
  STD_TORCH_CHECK(tags.size(0) < kMostRows, name, ": expected fewer than 2^31 rows, got ", tags.size(0));
  return torch::stable::contiguous(tags);
}

std::tuple<Tensor, Tensor> tag_weighted_sum(const Tensor& row_tags_, const Tensor& column_tags_,
                                            const Tensor& values_, bool jaccard) {
  const DeviceScope scope(values_);
  const Tensor row_tags = check_tags("row_tags", row_tags_),
               column_tags = check_tags("column_tags", column_tags_);
  STD_TORCH_CHECK(values_.scalar_type() == ScalarType::Float,
                  "values: expected float32 on CUDA; impl='chunked' takes float64");
  const Tensor values = check_matrix("values", values_, ScalarType::Float);
  STD_TORCH_CHECK(column_tags.size(1) == row_tags.size(1), "column_tags: expected ", row_tags.size(1),
                  " words");
  STD_TORCH_CHECK(values.size(0) == column_tags.size(0), "values: expected ", column_tags.size(0), " rows");
  wscl::cuda::TagProblem problem;
  problem.row_tags = device_data<int64_t>(row_tags);
  problem.column_tags = device_data<int64_t>(column_tags);
  problem.values = device_data<float>(values);
  problem.n = row_tags.size(0);
  problem.m = values.size(0);
  problem.words = row_tags.size(1);
  problem.value_stride = values.stride(0);
  problem.d = values.size(1);
  problem.jaccard = jaccard;
  Tensor sums = torch::stable::new_empty(values, {problem.n, problem.d});
  Tensor totals = torch::stable::new_empty(values, {problem.n}, ScalarType::Double);
  wscl::cuda::TagSums outputs;
  outputs.sums = device_data<float>(sums);
  outputs.totals = device_data<double>(totals);
  check_launch(wscl::cuda::tag_weighted_sum(problem, outputs, scope.stream));
  const Tensor workspace = torch::stable::new_empty(values, {outputs.workspace_bytes + 1}, ScalarType::Byte);
  outputs.workspace = device_data<void>(workspace, 1);
  check_launch(wscl::cuda::tag_weighted_sum(problem, outputs, scope.stream));
  return {sums, totals};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("tag_weighted_sum", TORCH_BOX(&tag_weighted_sum));
}
