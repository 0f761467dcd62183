// What becomes of a tile's similarities: masks, the online softmax, weights by row and column, and where
// results go.
#pragma once

#include "similarity_kernel.cuh"
#include "similarity_mainloop.cuh"

namespace wscl::cuda {

template <class T>
__device__ __forceinline__ void mask(const WarpRows<T>& rows, int column0, uint64_t valid, Logits<T>& s,
                                     float masked = -INFINITY) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t bits = rows.template pairs<false>(rows.row(rt, h), column0, valid);
#pragma unroll
      for (int i = 0; i < T::kColumns / 4; ++i)
        if (!((bits >> i) & 1)) s[rt][i / 2][h * 2 + i % 2] = masked;
    }
}

// Excluded pairs get a weight of their own.
template <class T>
__device__ __forceinline__ void weigh_excluded(const SimilarityParams& p, const WarpRows<T>& rows, int column0,
                                               uint64_t valid, Logits<T>& w) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t bits = rows.template pairs<true>(rows.row(rt, h), column0, valid);
      if (bits == 0) continue;
#pragma unroll
      for (int i = 0; i < T::kColumns / 4; ++i)
        if ((bits >> i) & 1)
          w[rt][i / 2][h * 2 + i % 2] = p.excluded_weight[column0 + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2];
    }
}

__device__ __forceinline__ float load(uint32_t address) {
  float number;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(number) : "r"(address) : "memory");
  return number;
}

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

__device__ __forceinline__ void store_pair(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// What 2 is raised to for a weight; kFar: some shift may be far. What is as close to a far shift as sums in
// another order are to each other weighs 1, so that a weight is 1 at the most in every pass.
template <bool kFar>
__device__ __forceinline__ float exponent_of(float similarity, float scale, float shift) {
  const bool far = kFar && is_far(shift);
  const float exponent = fmaf(similarity, scale, far ? fabsf(shift) * 0x1p-20f - shift : -shift);
  return far && exponent > 0 ? 0.f : exponent;  // NaN stays
}

// Where two numbers of this lane's own wait that belong to its row `row` of 2 kRowTiles: registers are dear.
template <class T>
__device__ __forceinline__ uint32_t waiting_at(uint32_t row_vectors, int row) {
  return row_vectors + T::kRows * 8 + (row * T::kThreads + threadIdx.x) * 8;
}

// Online softmax with a lazy shift. A warp with a far shift never settles, so that others need not know of any.
template <class T>
struct RowSoftmax {
  float shift[T::kRowTiles][2];
  float sum[T::kRowTiles][2];  // of this lane's columns
  bool unsettled = true;       // a row has no shift yet, a far or a too low one; the same for all lanes

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shift[rt][h] = -INFINITY;
        sum[rt][h] = 0;
      }
  }

  __device__ __forceinline__ void put_away(uint32_t row_vectors) const {
#pragma unroll
    for (int row = 0; row < 2 * T::kRowTiles; ++row)
      store_pair(waiting_at<T>(row_vectors, row), shift[row / 2][row % 2], sum[row / 2][row % 2]);
  }
  __device__ __forceinline__ void take_up(uint32_t row_vectors) {
#pragma unroll
    for (int row = 0; row < 2 * T::kRowTiles; ++row) {
      const float2 pair = load_pair(waiting_at<T>(row_vectors, row));
      shift[row / 2][row % 2] = pair.x;
      sum[row / 2][row % 2] = pair.y;
    }
  }

  // Raises the shifts to what this tile's logits need, then logits to weights.
  template <bool kOutput>
  __device__ __forceinline__ void settle(Logits<T>& s, float scale, Output<T>& o) {
    bool far = false, set = true;
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) top = fmaxf(top, fmaxf(s[rt][n][2 * h], s[rt][n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float bound = ceilf(top * scale);
        const float raised = fmaxf(shift[rt][h], is_far(bound) ? bound : bound - T::Mma::kHeadroom);
        const float shrink = raised == shift[rt][h] ? 1.f : power_of_two(shift[rt][h] - raised);
        shift[rt][h] = raised;
        sum[rt][h] *= shrink;
        if constexpr (kOutput)
#pragma unroll
          for (int n = 0; n < T::kDim / 8; ++n) {
            o[rt][n][2 * h] *= shrink;
            o[rt][n][2 * h + 1] *= shrink;
          }
        far = far || (is_far(raised) && raised != -INFINITY);
        set = set && raised != -INFINITY;
      }
    far = __any_sync(kAllLanes, far);
    unsettled = far || !__all_sync(kAllLanes, set);
    if (far)
      add<true>(s, scale);
    else
      add<false>(s, scale);
  }

  // Logits to weights. False: a weight is too large (or a NaN), do it again with the logits as they were.
  __device__ __forceinline__ bool weigh(Logits<T>& s, float scale) {
    float part[T::kRowTiles][2];
    bool fine = true;
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        part[rt][h] = weigh_row<false>(s, scale, rt, h, shift[rt][h]);
        fine = fine && part[rt][h] <= T::Mma::kLimit;
      }
    if (!__all_sync(kAllLanes, fine)) {
      unsettled = true;
      return false;
    }
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[rt][h] += part[rt][h];
    return true;
  }

 private:
  template <bool kFar>
  __device__ __forceinline__ void add(Logits<T>& s, float scale) {
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        sum[rt][h] += weigh_row<kFar>(s, scale, rt, h, shift[rt][h] == -INFINITY ? 0.f : shift[rt][h]);
  }

  // The sum of this lane's weights.
  template <bool kFar>
  static __device__ __forceinline__ float weigh_row(Logits<T>& s, float scale, int rt, int h, float shift) {
    float even = 0, odd = 0;
#pragma unroll
    for (int n = 0; n < T::kColumns / 8; ++n) {
      s[rt][n][2 * h] = exp2_approx(exponent_of<kFar>(s[rt][n][2 * h], scale, shift));
      s[rt][n][2 * h + 1] = exp2_approx(exponent_of<kFar>(s[rt][n][2 * h + 1], scale, shift));
      even += s[rt][n][2 * h];
      odd += s[rt][n][2 * h + 1];
    }
    return even + odd;
  }
};

// Shifts and weights of rows wait in shared memory: registers are dear.
template <class T>
__device__ __forceinline__ void store_row_vectors(const SimilarityParams& p, int row0, uint32_t to) {
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    const int r = row0 + i;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + i * 8),
                 "f"(r < p.x.count ? p.row_shift[r] : 0.f),
                 "f"(r < p.x.count && p.row_weight ? p.row_weight[r] : 0.f)
                 : "memory");
  }
}

// Where those of this lane's first row lie; the next are 64 bytes on.
template <class T>
__device__ __forceinline__ uint32_t rows_vectors_at(uint32_t row_vectors) {
  return row_vectors + (threadIdx.x / 32 * T::kRowTiles * 16 + threadIdx.x % 32 / 4) * 8;
}

template <class T, bool kFar>
__device__ __forceinline__ void weigh_by_columns(Logits<T>& s, float scale, uint32_t vectors) {
  const uint32_t at = vectors + threadIdx.x % 4 * 8;
#pragma unroll
  for (int n = 0; n < T::kColumns / 8; ++n) {
    const float2 shifts = load_pair(at + n * 32), weights = load_pair(at + T::kColumns * 4 + n * 32);
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][n][i % 2 * 2 + e];
        x = (e ? weights.y : weights.x) * exp2_approx(exponent_of<kFar>(x, scale, e ? shifts.y : shifts.x));
      }
  }
}

template <class T>
__device__ __forceinline__ void weigh_by_columns(Logits<T>& s, float scale, uint32_t vectors, bool far) {
  if (far)
    weigh_by_columns<T, true>(s, scale, vectors);
  else
    weigh_by_columns<T, false>(s, scale, vectors);
}

// kTogether groups of eight columns at a time: their vectors stay in registers while the rows' go by.
// kOneShift: every row's and column's shift is the same.
template <class T, bool kOneShift, int kTogether>
__device__ __forceinline__ void weigh_by_both(Logits<T>& s, float scale, uint32_t vectors,
                                              uint32_t row_vectors) {
  const uint32_t at = vectors + threadIdx.x % 4 * 8, rows_at = rows_vectors_at<T>(row_vectors);
#pragma unroll
  for (int n0 = 0; n0 < T::kColumns / 8; n0 += kTogether) {
    float2 shifts[kTogether], weights[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (!kOneShift) shifts[n] = load_pair(at + (n0 + n) * 32);
      weights[n] = load_pair(at + T::kColumns * 4 + (n0 + n) * 32);
    }
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i) {
      const float2 row = load_pair(rows_at + i * 64);  // shift and weight
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = e ? weights[n].y : weights[n].x;
          float& x = s[i / 2][n0 + n][i % 2 * 2 + e];
          const float of_row = exp2_approx(fmaf(x, scale, -row.x));
          if constexpr (kOneShift)
            x = (row.y + weight) * of_row;
          else
            x = row.y * of_row + weight * exp2_approx(fmaf(x, scale, -(e ? shifts[n].y : shifts[n].x)));
        }
    }
  }
}

// Where some are far: seldom, so that registers count and nothing else. The scale is read again for their sake.
template <class T>
__device__ __forceinline__ void weigh_far_by_both(Logits<T>& s, float scale, uint32_t vectors,
                                                  uint32_t row_vectors) {
  const uint32_t at = vectors + threadIdx.x % 4 * 8, rows_at = rows_vectors_at<T>(row_vectors);
#pragma unroll
  for (int n = 0; n < T::kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = load(at + n * 32 + e * 4), weight = load(at + T::kColumns * 4 + n * 32 + e * 4);
#pragma unroll
      for (int i = 0; i < 2 * T::kRowTiles; ++i) {
        float& x = s[i / 2][n][i % 2 * 2 + e];
        const float2 row = load_pair(rows_at + i * 64);
        const float of_row = exponent_of<true>(x, scale, row.x);
        x = weight * exp2_approx(exponent_of<true>(x, scale, shift));
        x = fmaf(row.y, exp2_approx(of_row), x);
      }
    }
}

template <class T>
__device__ __forceinline__ void weigh_by_both(Logits<T>& s, float scale, uint32_t vectors, uint32_t row_vectors,
                                              const SimilarityParams& p, bool one_shift) {
  if (one_shift)
    weigh_by_both<T, true, T::kRowTiles == 2 ? T::kColumns / 8 : 2>(s, scale, vectors, row_vectors);
  else if (*p.shifts != Shifts::kFar)
    weigh_by_both<T, false, 1>(s, scale, vectors, row_vectors);
  else
    weigh_far_by_both<T>(s, *p.scale * kLog2E, vectors, row_vectors);
}

// This part's results.
template <class T>
__device__ __forceinline__ void store_output(const SimilarityParams& p, const WarpRows<T>& rows, int split,
                                             const Output<T>& o, int column0 = 0) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = rows.row(rt, h);
      if (r >= p.x.count) continue;
      float* row = p.output + part_place(p, split, r) * p.output_stride + column0 + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < T::kDim / 8; ++n)
        if (column0 + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 < p.output_stride)
          *reinterpret_cast<float2*>(row + n * 8) = make_float2(o[rt][n][2 * h], o[rt][n][2 * h + 1]);
    }
}

template <class T>
__device__ __forceinline__ void store_softmax(const SimilarityParams& p, const WarpRows<T>& rows, int split,
                                              const RowSoftmax<T>& softmax) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_row(softmax.sum[rt][h]);
      const int r = rows.row(rt, h);
      if (threadIdx.x % 4 || r >= p.x.count) continue;
      const int64_t to = part_place(p, split, r);
      p.shift[to] = softmax.shift[rt][h];
      p.sum[to] = sum;
    }
}

}  // namespace wscl::cuda
