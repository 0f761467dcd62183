// tag_weighted_sum on CPU tensors: checks, allocation, dispatch on dtype.

#include "../core/tags.h"

#include <tuple>

#include "tensors.h"

namespace {

using namespace wscl::binding;

Tensor check_tags(const char* name, const Tensor& tags) {
  STD_TORCH_CHECK(tags.dim() == 2 && tags.size(1) > 0 && tags.scalar_type() == ScalarType::Long, name,
                  ": expected an int64 matrix [rows, words]");
  return torch::stable::contiguous(tags);
}

std::tuple<Tensor, Tensor> tag_weighted_sum(const Tensor& row_tags_, const Tensor& column_tags_,
                                            const Tensor& values_, bool jaccard) {
  const Tensor row_tags = check_tags("row_tags", row_tags_),
               column_tags = check_tags("column_tags", column_tags_);
  const ScalarType dtype = values_.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "values: expected float32 or float64");
  const Tensor values = check_matrix("values", values_, dtype);
  STD_TORCH_CHECK(column_tags.size(1) == row_tags.size(1), "column_tags: expected ", row_tags.size(1),
                  " words");
  STD_TORCH_CHECK(values.size(0) == column_tags.size(0), "values: expected ", column_tags.size(0), " rows");
  const int64_t n = row_tags.size(0), d = values.size(1);
  Tensor sums = torch::stable::new_empty(values, {n, d});
  Tensor totals = torch::stable::new_empty(values, {n}, ScalarType::Double);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    wscl::TagProblem<T> p;
    p.row_tags = data<int64_t>(row_tags);
    p.n = n;
    p.column_tags = data<int64_t>(column_tags);
    p.m = values.size(0);
    p.words = row_tags.size(1);
    p.values = data<T>(values);
    p.value_stride = values.stride(0);
    p.d = d;
    p.weight = jaccard ? wscl::TagWeight::kJaccard : wscl::TagWeight::kShared;
    wscl::tag_weighted_sum<T>(p, data<T>(sums), data<double>(totals), torch_threads());
  });
  return {sums, totals};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("tag_weighted_sum", TORCH_BOX(&tag_weighted_sum));
}
