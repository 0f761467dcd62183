// The arguments that the operators of csrc/core/infonce_cuda.h and pairs_cuda.h share: checked, and as the
// kernels want them.
#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "../core/infonce_cuda.h"
#include "../core/sort_ids_cuda.h"
#include "device.h"

#ifndef WSCL_SIMULATED
#define WSCL_LIBRARY wscl_fast
#define WSCL_DISPATCH_KEY CUDA
#else
#define WSCL_LIBRARY wscl_fast_simulated
#define WSCL_DISPATCH_KEY CPU
#endif

namespace wscl::binding {

using wscl::cuda::Precision;

inline constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;

inline Precision precision_of(const Tensor& queries, bool allow_tf32) {
  const ScalarType dtype = queries.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "queries: expected float32, bfloat16 or float16 on CUDA; impl='chunked' takes float64");
  if (dtype == ScalarType::Float) return allow_tf32 ? Precision::kFloat32Fast : Precision::kFloat32;
  return dtype == ScalarType::BFloat16 ? Precision::kBFloat16 : Precision::kFloat16;
}

inline void check_number(const char* name, const Tensor& number) {
  STD_TORCH_CHECK(number.dim() == 0 && number.scalar_type() == ScalarType::Float, name,
                  ": expected a 0-dim float32 tensor");
}

inline Tensor check_rows(const char* name, const Tensor& matrix, const Tensor& queries) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected a matrix [rows, d], got ", matrix.dim(), " dimensions");
  STD_TORCH_CHECK(matrix.scalar_type() == queries.scalar_type(), name, ": expected the dtype of queries");
  STD_TORCH_CHECK(matrix.size(1) == queries.size(1), name, ": expected ", queries.size(1), " columns, got ",
                  matrix.size(1));
  STD_TORCH_CHECK(matrix.size(0) < kMostRows, name, ": expected fewer than 2^31 rows, got ", matrix.size(0));
  return with_unit_columns(matrix);
}

// Ids in ascending order, ties as they come, and where each comes from.
struct SortedIds {
  Tensor ids, order;
  std::optional<Tensor> spare;  // what the sort needed besides
};

inline SortedIds sort_many(const Tensor& ids) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(ids), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]), {}};
}

// Whether so many ids are for the core to sort, all lists in one launch.
inline bool few(int64_t count) {
  return count <= cuda::kMostSortedAtOnce;
}

// Of each list; those that are short enough in one launch.
inline std::vector<SortedIds> sort_ids(const std::vector<Tensor>& lists, cudaStream_t stream) {
  std::vector<SortedIds> sorted;
  std::vector<cuda::IdList> short_lists;
  for (const Tensor& ids : lists) {
    const int64_t count = ids.numel();
    if (!few(count)) {
      sorted.push_back(sort_many(ids));
      continue;
    }
    sorted.push_back({torch::stable::empty_like(ids), torch::stable::empty_like(ids),
                      torch::stable::new_empty(ids, {2 * count})});
    const SortedIds& to = sorted.back();
    short_lists.push_back({device_data<const int64_t>(ids), count, device_data<int64_t>(to.ids),
                           device_data<int64_t>(to.order), device_data<int64_t>(*to.spare)});
  }
  check_launch(cuda::sort_ids(short_lists.data(), static_cast<int>(short_lists.size()), stream));
  return sorted;
}

// The arguments, checked and made contiguous where the kernels need it; holds what the problem points to.
struct CudaArguments {
  Tensor queries;
  std::optional<Tensor> keys;
  std::optional<Tensor> query_clusters, key_clusters, own;
  std::optional<Tensor> scale;
  std::vector<SortedIds> sorted;  // of the queries' ids and, where there are keys, of theirs
  cuda::InfoNCEProblem problem;

  CudaArguments(const Tensor& queries_, const std::optional<Tensor>& keys_,
                const std::optional<Tensor>& query_clusters_, const std::optional<Tensor>& key_clusters_,
                const std::optional<Tensor>& own_, const std::optional<Tensor>& scale_, bool exclude_self,
                bool inner, int64_t ignore_index, bool allow_tf32)
      : queries(check_rows("queries", queries_, queries_)), scale(scale_) {
    STD_TORCH_CHECK(keys_.has_value() || !own_.has_value(), "own: expected none where keys is none");
    if (scale) {
      check_number("scale", *scale);
      problem.scale = device_data<float>(*scale);
    }
    problem.precision = precision_of(queries, allow_tf32);
    const int64_t size = cuda::element_size(problem.precision);
    problem.n = problem.m = queries.size(0);
    problem.d = queries.size(1);
    problem.self = !keys_;
    problem.queries = problem.keys = device_data<void>(queries, size);
    problem.query_stride = problem.key_stride = queries.stride(0);
    if (query_clusters_) {
      query_clusters = check_vector("query_clusters", *query_clusters_, queries.size(0), ScalarType::Long);
      problem.query_clusters = problem.key_clusters = device_data<int64_t>(*query_clusters);
    }
    if (keys_) {
      keys = check_rows("keys", *keys_, queries);
      problem.keys = device_data<void>(*keys, size);
      problem.key_stride = keys->stride(0);
      problem.m = keys->size(0);
      problem.key_clusters = nullptr;
    }
    if (key_clusters_) {
      key_clusters = check_vector("key_clusters", *key_clusters_, problem.m, ScalarType::Long);
      problem.key_clusters = device_data<int64_t>(*key_clusters);
    }
    if (own_) {
      own = check_vector("own", *own_, queries.size(0), ScalarType::Long);
      problem.own = device_data<int64_t>(*own);
    }
    problem.exclude_self = exclude_self;
    problem.inner = inner;
    problem.ignore_index = ignore_index;
  }

  void sort(cudaStream_t stream) {
    sorted = keys ? sort_ids({*query_clusters, *key_clusters}, stream) : sort_ids({*query_clusters}, stream);
    problem.sorted_queries = device_data<int64_t>(sorted.front().ids);
    problem.query_order = device_data<int64_t>(sorted.front().order);
    problem.sorted_keys = device_data<int64_t>(sorted.back().ids);
    problem.key_order = device_data<int64_t>(sorted.back().order);
  }

  // The lists alone that are too long for the core.
  void sort_long() {
    const auto sort_one = [&](const Tensor& ids, const int64_t*& to_sorted, const int64_t*& to_order) {
      if (few(ids.numel())) return;
      sorted.push_back(sort_many(ids));
      to_sorted = device_data<int64_t>(sorted.back().ids);
      to_order = device_data<int64_t>(sorted.back().order);
    };
    sort_one(*query_clusters, problem.sorted_queries, problem.query_order);
    if (keys) sort_one(*key_clusters, problem.sorted_keys, problem.key_order);
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return torch::stable::new_empty(queries, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
  }

  // Calls a pass twice: for the bytes of workspace that it needs, and to enqueue it.
  template <class Problem, class Outputs, class Pass>
  void run(const Problem& problem, Outputs& outputs, const Pass& pass, cudaStream_t stream) const {
    check_launch(pass(problem, outputs, stream));
    const Tensor workspace = empty({outputs.workspace_bytes + 1}, ScalarType::Byte);
    outputs.workspace = device_data<void>(workspace, 1);
    check_launch(pass(problem, outputs, stream));
  }
};

}  // namespace wscl::binding
