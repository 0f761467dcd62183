// Where the passes' parts become gradients of keys, row by row; shared by the losses.
#pragma once

#include "gradient_vectors_cuda.cuh"

namespace wscl::cuda {

// Of `count` rows as many as are done at a time: their gradient in float32 takes 64 MiB at most. Chunks are as
// long as each other, but for whole blocks.
inline int64_t row_chunk(int64_t count, int64_t d) {
  constexpr int64_t kBlockRows = 128;
  const int64_t most = std::max<int64_t>(4096, (64 << 20) / (4 * std::max<int64_t>(1, padded_width(d))));
  const int64_t chunks = std::max<int64_t>(1, (count + most - 1) / most);
  return std::min(count, (count + chunks * kBlockRows - 1) / (chunks * kBlockRows) * kBlockRows);
}

struct FinishBackward {
  Upstream up;
  SoftmaxParts all, positives;  // outputs only
  int64_t width;
  const float *sums, *pull;  // by segment: Σ x_j, Σ share_i q_i
  double* row_dot;           // [n] ⟨q_i, ∂L/∂q_i⟩ / scale
  int64_t first;             // position of the first row
};

__device__ __forceinline__ float4 total(const SoftmaxParts& parts, int64_t row, int64_t width, int64_t column) {
  return add_parts_of_row(parts, row, width, column, [](int) { return 1.f; });
}

// grad_keys_j = scale · (Σ_i g_i p_ij q_i − Σ_{i: j ∈ P(i)} share_i q_i), or − Σ_i g_i r_ij q_i for "in".
template <class In>
__global__ void finish_keys(const FinishBackward f) {
  const InfoNCEProblem& p = f.up.problem;
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= f.all.rows) return;
  const int64_t j = p.inner ? p.key_order[f.first + row] : f.first + row;
  const bool valid = !p.key_clusters || p.key_clusters[j] != p.ignore_index;
  const int32_t segment = f.up.clusters.key_segment[j];
  const float scale = *p.scale, alpha = scale / f.up.scalars->boost;
  for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
    const float4 all = total(f.all, row, f.width, c0), positives = total(f.positives, row, f.width, c0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t c = c0 + e;
      if (c >= p.d) break;
      float x = alpha * (at(all, e) - at(positives, e));
      if (!p.inner && f.pull && segment >= 0) x -= scale * f.pull[segment * f.width + c];
      store_float(static_cast<In*>(f.up.given.grad_keys) + j * p.d + c, valid ? x : 0.f);
    }
  }
}

// Launches a row-by-row kernel for the problem's dtype.
#define WSCL_LAUNCH_ROWS(kernel, rows, params)                          \
  with_element(p.precision, [&](auto* element) {                        \
    kernel<std::remove_pointer_t<decltype(element)>>                    \
        <<<blocks_for(rows, kBlock / 32), kBlock, 0, stream>>>(params); \
  })

// `count` of a pass's rows, from `first` on.
inline SimilarityParams rows_from(SimilarityParams pass, int64_t first, int64_t count) {
  if (pass.x.index)
    pass.x.index += first;
  else
    pass.x.data = static_cast<const char*>(pass.x.data) + first * pass.x.stride * element_size(pass.precision);
  pass.x.count = count;
  pass.whole_rows = std::min(pass.whole_rows, count);
  pass.x_origin += first;
  const auto skip = [first](auto& rows) { rows = rows ? rows + first : rows; };
  skip(pass.row_excluded);
  skip(pass.begin);
  skip(pass.end);
  skip(pass.row_shift);
  skip(pass.row_weight);
  return pass;
}

// The gradient of keys from one pass over queries, so many keys at a time.
struct KeyPass {
  SimilarityParams pass;
  SoftmaxParts parts;
  int64_t chunk;

  KeyPass(const SimilarityParams& by_keys, const InfoNCEProblem& p, Workspace& space)
      : pass(by_keys), chunk(row_chunk(p.m, p.d)) {
    pass.x.count = chunk;
    parts = take_parts(pass, true, space);
  }
  cudaError_t run(const Upstream& up, cudaStream_t stream) const {
    const InfoNCEProblem& p = up.problem;
    cudaError_t error = cudaSuccess;
    for (int64_t first = 0; first < p.m && !error; first += chunk) {
      const SoftmaxParts all = parts.first(std::min(chunk, p.m - first));
      error = run_similarity(rows_from(pass, first, all.rows), stream);
      if (error) break;
      const FinishBackward finish = {up, all, {}, pass.output_stride, nullptr, nullptr, nullptr, first};
      WSCL_LAUNCH_ROWS(finish_keys, all.rows, finish);
      error = cudaGetLastError();
    }
    return error;
  }
};

}  // namespace wscl::cuda
