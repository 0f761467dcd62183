// The kernel itself: the loop over tiles, the two products, the epilogues. See similarity_kernel.cuh.
#pragma once

#include "similarity_kernel.cuh"

namespace wscl::cuda {

template <class T>
using Logits = float[T::kRowTiles][T::kColumns / 8][4];
template <class T>
using Output = float[T::kRowTiles][T::kDim / 8][4];
template <class T>
using RowFragments = uint32_t[T::kRowTiles][T::kTerms][4];

// The address of chunk `chunk` (0 or 1) of a row. That of chunk 2 k + `chunk` is this ^ (k << 5): tiles are
// aligned to their pitch, so the exclusive or of the swizzle and that of k are one. `hide` keeps the compiler
// from holding every k's address in a register throughout.
__device__ __forceinline__ uint32_t hide(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <class T>
__device__ __forceinline__ uint32_t lane_address(uint32_t tile, int row, int chunk) {
  return hide(tile + chunk_offset<T::kPitch>(row, chunk));
}

template <class T>
constexpr uint64_t kTileBits = T::kColumns == 64 ? ~uint64_t(0) : (uint64_t(1) << T::kColumns % 64) - 1;

// Rows of a warp: at step k of the first product.
template <class T>
__device__ __forceinline__ uint32_t rows_address(uint32_t x_tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return lane_address<T>(x_tile, warp * T::kRowTiles * 16 + lane % 16, lane / 16);
}
template <class T>
__device__ __forceinline__ void load_rows(uint32_t address, int k, RowFragments<T>& a) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int term = 0; term < T::kTerms; ++term)
      load_matrices(a[rt][term], (address ^ (k << 5)) + term * T::kRowPlane + rt * 16 * T::kPitch);
}

template <class T>
__device__ __forceinline__ void clear(Logits<T>& s) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int n = 0; n < T::kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[rt][n][e] = 0;
}

// s += x · yᵀ
template <class T>
__device__ __forceinline__ void similarities(
    uint32_t x_tile, const RowFragments<T> (&kept)[T::kRowsInRegisters ? T::kDim / 16 : 1], uint32_t y_tile,
    Logits<T>& s) {
  const int lane = threadIdx.x % 32;
  const uint32_t x_address = T::kRowsInRegisters ? 0 : rows_address<T>(x_tile);
  const uint32_t y_address = lane_address<T>(y_tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < T::kDim / 16; ++k) {
    RowFragments<T> a;
    if constexpr (T::kRowsInRegisters) {
#pragma unroll
      for (int i = 0; i < T::kRowTiles * T::kTerms * 4; ++i) (&a[0][0][0])[i] = (&kept[k][0][0][0])[i];
    } else {
      load_rows<T>(x_address, k, a);
    }
#pragma unroll
    for (int n = 0; n < T::kColumns / 16; ++n) {
      uint32_t b[T::kTerms][4];
#pragma unroll
      for (int term = 0; term < T::kTerms; ++term)
        load_matrices(b[term], (y_address ^ (k << 5)) + term * T::kColumnPlane + n * 16 * T::kPitch);
#pragma unroll
      for (int rt = 0; rt < T::kRowTiles; ++rt) multiply_add_terms<T>(s[rt][2 * n], s[rt][2 * n + 1], a[rt], b);
    }
  }
}

template <class T>
__device__ __forceinline__ void gather(const Logits<T>& w, uint32_t y_tile, Output<T>& o) {
  const int lane = threadIdx.x % 32;
  const uint32_t y_address = lane_address<T>(y_tile, lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < T::kColumns / 16; ++k) {
    RowFragments<T> a;
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pack_terms<T>(w[rt][2 * k + i / 2][i % 2 * 2], w[rt][2 * k + i / 2][i % 2 * 2 + 1], &a[rt][0][i], 4);
#pragma unroll
    for (int n = 0; n < T::kDim / 16; ++n) {
      uint32_t b[T::kTerms][4];
#pragma unroll
      for (int term = 0; term < T::kTerms; ++term)
        load_matrices_transposed(b[term], (y_address ^ (n << 5)) + term * T::kColumnPlane + k * 16 * T::kPitch);
#pragma unroll
      for (int rt = 0; rt < T::kRowTiles; ++rt) multiply_add_terms<T>(o[rt][2 * n], o[rt][2 * n + 1], a[rt], b);
    }
  }
}

template <class T>
__device__ __forceinline__ void mask(const WarpRows<T>& rows, int column0, uint64_t valid, Logits<T>& s) {
#pragma unroll
  for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t bits = rows.template pairs<false>(rows.row(rt, h), column0, valid);
#pragma unroll
      for (int i = 0; i < T::kColumns / 4; ++i)
        if (!((bits >> i) & 1)) s[rt][i / 2][h * 2 + i % 2] = -INFINITY;
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

// Online softmax with a lazy shift.
template <class T>
struct RowSoftmax {
  float shift[T::kRowTiles][2];
  float sum[T::kRowTiles][2];  // of this lane's columns
  bool unsettled = true;       // a row has no shift yet, or its shift is too low; the same for all lanes

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shift[rt][h] = -INFINITY;
        sum[rt][h] = 0;
      }
  }

  // Raises the shifts to what this tile's logits need.
  template <bool kOutput>
  __device__ __forceinline__ void settle(const Logits<T>& s, float scale, Output<T>& o) {
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) top = fmaxf(top, fmaxf(s[rt][n][2 * h], s[rt][n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float raised = fmaxf(shift[rt][h], ceilf(top * scale) - T::Mma::kHeadroom);
        const float shrink = raised == shift[rt][h] ? 1.f : power_of_two(shift[rt][h] - raised);
        shift[rt][h] = raised;
        sum[rt][h] *= shrink;
        if constexpr (kOutput)
#pragma unroll
          for (int n = 0; n < T::kDim / 8; ++n) {
            o[rt][n][2 * h] *= shrink;
            o[rt][n][2 * h + 1] *= shrink;
          }
      }
  }

  // Logits to weights. False: a weight is too large (or a NaN), do it again with the logits as they were.
  __device__ __forceinline__ bool weigh(Logits<T>& s, float scale) {
    float part[T::kRowTiles][2];
    bool fine = true;
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float used = shift[rt][h] == -INFINITY ? 0.f : -shift[rt][h];
        float even = 0, odd = 0;
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) {
          s[rt][n][2 * h] = exp2_approx(fmaf(s[rt][n][2 * h], scale, used));
          s[rt][n][2 * h + 1] = exp2_approx(fmaf(s[rt][n][2 * h + 1], scale, used));
          even += s[rt][n][2 * h];
          odd += s[rt][n][2 * h + 1];
        }
        part[rt][h] = even + odd;
        fine = fine && part[rt][h] <= T::Mma::kLimit;
      }
    if (!unsettled && !__all_sync(kAllLanes, fine)) {
      unsettled = true;
      return false;
    }
    bool set = true;
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[rt][h] += part[rt][h];
        set = set && shift[rt][h] != -INFINITY;
      }
    if (unsettled) unsettled = !__all_sync(kAllLanes, set);
    return true;
  }
};

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

// Shifts and weights of rows wait in shared memory: registers are dear.
template <class T>
__device__ __forceinline__ void store_row_vectors(const SimilarityParams& p, int row0, uint32_t to) {
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    const int r = row0 + i;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + i * 8),
                 "f"(r < p.x.count ? p.row_shift[r] : 0.f), "f"(r < p.x.count ? p.row_weight[r] : 0.f)
                 : "memory");
  }
}

template <class T, Epilogue kEpilogue>
__device__ __forceinline__ void weigh_by_columns(Logits<T>& s, float scale, uint32_t vectors,
                                                 uint32_t row_vectors, bool one_shift) {
  const uint32_t at = vectors + threadIdx.x % 4 * 8;
  const uint32_t rows_at = row_vectors + (threadIdx.x / 32 * T::kRowTiles * 16 + threadIdx.x % 32 / 4) * 8;
#pragma unroll
  for (int n = 0; n < T::kColumns / 8; ++n) {
    const float2 shifts = load_pair(at + n * 32), weights = load_pair(at + T::kColumns * 4 + n * 32);
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i) {
      float2 row = {};
      if constexpr (kEpilogue == Epilogue::kSymmetric) row = load_pair(rows_at + i * 64);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = e ? shifts.y : shifts.x, weight = e ? weights.y : weights.x;
        float& x = s[i / 2][n][i % 2 * 2 + e];
        if constexpr (kEpilogue == Epilogue::kColumns) {
          x = weight * exp2_approx(fmaf(x, scale, -shift));
        } else if (one_shift) {
          x = (row.y + weight) * exp2_approx(fmaf(x, scale, -shift));
        } else {
          x = row.y * exp2_approx(fmaf(x, scale, -row.x)) + weight * exp2_approx(fmaf(x, scale, -shift));
        }
      }
    }
  }
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
      float* row = p.output + (split * p.x.count + r) * p.output_stride + column0 + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < T::kDim / 8; ++n)
        if (column0 + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 < p.d)
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
      float sum = softmax.sum[rt][h];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int r = rows.row(rt, h);
      if (threadIdx.x % 4 || r >= p.x.count) continue;
      const int64_t to = split * p.x.count + r;
      p.shift[to] = softmax.shift[rt][h];
      p.sum[to] = sum;
    }
}

template <class T, Epilogue kEpilogue, bool kOutput>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) similarity_kernel(const SimilarityParams p) {
  constexpr bool kSoftmax = kEpilogue == Epilogue::kSoftmax;
  extern __shared__ __align__(512) char shared[];
  const uint32_t x_tile = shared_address(shared);
  const float scale = *p.scale * kLog2E;
  const bool x_chunks = in_chunks(p.x, sizeof(typename T::In));
  const bool one_shift = kEpilogue == Epilogue::kSymmetric && *p.one_shift;
  const int row0 = blockIdx.x * T::kRows, split = blockIdx.y;
  const auto [first, last] = tiles_of<T>(p, row0, split);

  const auto live = [&](int row) { return row0 + row < p.x.count; };
  if constexpr (T::kSplit) {
    // The rows go through the columns' staging area, as many at a time.
#pragma unroll 1
    for (int r = 0; r < T::kRows; r += T::kColumns) {
      Staging<T, T::kColumns>::fill(x_tile + T::kStaging, p.x, row0 + r, p.d, x_chunks,
                                    [&](int row) { return live(r + row); });
      copy_commit();
      copy_wait<0>();
      Staging<T, T::kColumns>::template split<T::kRowPlane>(x_tile + T::kStaging, x_tile + r * T::kPitch);
    }
  } else {
    load_tile<T, T::kRows>(x_tile, p.x, row0, p.d, x_chunks, live);
  }
  ColumnStream<T, !kSoftmax> columns(p, x_tile + T::kRowBytes);
  columns.start(first, last);

  const WarpRows<T> rows(p, x_tile + T::kBounds);
  rows.start();
  RowSoftmax<T> softmax;
  if constexpr (kEpilogue == Epilogue::kSymmetric) store_row_vectors<T>(p, row0, x_tile + T::kRowVectors);
  Output<T> o;
  if constexpr (kOutput)
#pragma unroll
    for (int i = 0; i < T::kRowTiles * T::kDim / 2; ++i) (&o[0][0][0])[i] = 0;
  RowFragments<T> kept[T::kRowsInRegisters ? T::kDim / 16 : 1];

  for (int tile = first; tile < last; ++tile) {
    const int buffer = columns.advance(tile);
    const uint32_t y_tile = columns.tiles + buffer * T::kColumnBytes;
    if (T::kRowsInRegisters && tile == first)
#pragma unroll
      for (int k = 0; k < (T::kRowsInRegisters ? T::kDim / 16 : 0); ++k)
        load_rows<T>(rows_address<T>(x_tile), k, kept[k]);
    const int column0 = tile * T::kColumns;
    bool masked;
    {
      const uint64_t valid = columns.valid(tile) | ~kTileBits<T>;
      // No column of this tile takes part, or no row of this warp exists.
      if (valid == ~kTileBits<T> || rows.warp_row() >= p.x.count) continue;
      masked = valid != ~uint64_t(0) || rows.masks(column0);
    }

    Logits<T> s;
    bool done = true;
    do {
      clear<T>(s);
      similarities<T>(x_tile, kept, y_tile, s);
      if (masked) mask<T>(rows, column0, columns.valid(tile), s);
      if constexpr (kSoftmax) {
        if (softmax.unsettled) softmax.template settle<kOutput>(s, scale, o);
        done = softmax.weigh(s, scale);
      } else {
        weigh_by_columns<T, kEpilogue>(s, scale, columns.vectors + buffer * T::kVectorBytes,
                                       x_tile + T::kRowVectors, one_shift);
        if (masked && p.excluded_weight) weigh_excluded<T>(p, rows, column0, columns.valid(tile), s);
      }
    } while (!done);
    if constexpr (kOutput) gather<T>(s, y_tile, o);
  }

  copy_wait<0>();
  if constexpr (kSoftmax) store_softmax<T>(p, rows, split, softmax);
  if constexpr (kOutput) store_output<T>(p, rows, split, o);
}

}  // namespace wscl::cuda
