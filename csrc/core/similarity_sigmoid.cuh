// The epilogues of kSigmoid and kSigmoidColumns: logits to sigmoids, and their softplus added up by row.
//
// With e = 2^−|t| both come from one exponential and one reciprocal: σ(t) = (t ≥ 0 ? 1 : e) / (1 + e) and
// log(1 + 2^t) = max(t, 0) log 2 + log(1 + e), the latter by a polynomial on [0, 1] (relative error 1.5e-7: a
// logarithm of 1 + e would lose what is small).
#pragma once

#include "similarity_epilogue.cuh"

namespace wscl::cuda {

struct Sigmoid {
  float value, e;

  __device__ __forceinline__ explicit Sigmoid(float t) {
    e = exp2_approx(-fabsf(t));
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + e));
    value = (t >= 0 ? 1.f : e) * inverse;
  }
  // The value alone: 1 / (1 + 2^−t), which is 0 where 2^−t overflows.
  static __device__ __forceinline__ float of(float t) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + exp2_approx(-t)));
    return inverse;
  }
  __device__ __forceinline__ float log_one_plus() const {
    float p = 0.005253457929939032f;
    p = fmaf(p, e, -0.02958850748836994f);
    p = fmaf(p, e, 0.07836166769266129f);
    p = fmaf(p, e, -0.13674770295619965f);
    p = fmaf(p, e, 0.19111430644989014f);
    p = fmaf(p, e, -0.24844369292259216f);
    p = fmaf(p, e, 0.33319270610809326f);
    p = fmaf(p, e, -0.49999502301216125f);
    return fmaf(p, e, 1.f) * e;
  }
};

// The scale may have either sign; a masked pair has to end at −∞ all the same.
__device__ __forceinline__ float masked_logit(float scale) {
  return scale < 0 ? INFINITY : -INFINITY;
}
__device__ __forceinline__ float nonzero(float scale) {
  return scale == 0 ? 1e-37f : scale;
}

// Sums of this lane's columns by row: of softplus, and of sigmoids ("slope"). They wait in shared memory: with
// O there is no register left for them.
template <class T>
struct SoftplusSums {
  uint32_t row_vectors;

  __device__ __forceinline__ uint32_t sums_at(int row) const {
    return waiting_at<T>(row_vectors, row);
  }

  __device__ __forceinline__ explicit SoftplusSums(uint32_t row_vectors) : row_vectors(row_vectors) {}
  __device__ __forceinline__ void start() const {
#pragma unroll
    for (int row = 0; row < 2 * T::kRowTiles; ++row) store_pair(sums_at(row), 0, 0);
  }

  // Logits of a tile to sigmoids, times what keeps small ones normal.
  __device__ __forceinline__ void weigh(Logits<T>& s, float scale) const {
    const uint32_t rows_at = rows_vectors_at<T>(row_vectors);
#pragma unroll
    for (int row = 0; row < 2 * T::kRowTiles; ++row) {
      const float offset = load_pair(rows_at + row * 64).x;
      float total = 0, slopes = 0;
#pragma unroll
      for (int n = 0; n < T::kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[row / 2][n][row % 2 * 2 + e];
          const float t = fmaf(x, scale, offset);
          const Sigmoid sigmoid(t);
          total += fmaf(fmaxf(t, 0.f), 0.6931471805599453f, sigmoid.log_one_plus());
          slopes += sigmoid.value;
          x = sigmoid.value * T::Mma::kSigmoidBoost;
        }
      const float2 sums = load_pair(sums_at(row));
      store_pair(sums_at(row), sums.x + total, sums.y + slopes);
    }
  }

  __device__ __forceinline__ void store(const SimilarityParams& p, const WarpRows<T>& rows, int split) const {
#pragma unroll
    for (int row = 0; row < 2 * T::kRowTiles; ++row) {
      float2 sums = load_pair(sums_at(row));
      sums.x = sum_of_row(sums.x);
      sums.y = sum_of_row(sums.y);
      const int r = rows.row(row / 2, row % 2);
      if (threadIdx.x % 4 || r >= p.x.count) continue;
      const int64_t to = part_place(p, split, r);
      p.sum[to] = sums.x;
      p.slope[to] = sums.y;
    }
  }
};

template <class T>
__device__ __forceinline__ void weigh_by_sigmoid(Logits<T>& s, float scale, uint32_t vectors) {
  const uint32_t at = vectors + threadIdx.x % 4 * 8;
#pragma unroll
  for (int n = 0; n < T::kColumns / 8; ++n) {
    const float2 shifts = load_pair(at + n * 32), weights = load_pair(at + T::kColumns * 4 + n * 32);
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][n][i % 2 * 2 + e];
        x = (e ? weights.y : weights.x) * Sigmoid::of(fmaf(x, scale, e ? shifts.y : shifts.x));
      }
  }
}

}  // namespace wscl::cuda
