// The kernel itself: the loop over tiles, the two products and, between them, an epilogue.
// See similarity_kernel.cuh.
#pragma once

#include "similarity_both.cuh"
#include "similarity_sigmoid.cuh"
#include "similarity_tags.cuh"

namespace wscl::cuda {

// The symmetric pass takes every register there is: ptxas spills one on sm_120 where the scale is held, on
// sm_80 to sm_90 where it is not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kScaleIsReadAgain = true;
#else
constexpr bool kScaleIsReadAgain = false;
#endif

// In base 2.
template <Epilogue kEpilogue>
__device__ __forceinline__ float scale_of(const SimilarityParams& p) {
  constexpr bool kSigmoids = kEpilogue == Epilogue::kSigmoid || kEpilogue == Epilogue::kSigmoidColumns;
  if constexpr (kEpilogue == Epilogue::kTags) return 1;
  return (kSigmoids ? nonzero(*p.scale) : *p.scale) * kLog2E;
}
// What a masked pair's similarity becomes.
template <Epilogue kEpilogue>
__device__ __forceinline__ float masked_by(float scale) {
  constexpr bool kSigmoids = kEpilogue == Epilogue::kSigmoid || kEpilogue == Epilogue::kSigmoidColumns;
  return kSigmoids ? masked_logit(scale) : -INFINITY;
}

template <class T, Epilogue kEpilogue, bool kOutput>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) similarity_kernel(const SimilarityParams p) {
  constexpr bool kSoftmax = kEpilogue == Epilogue::kSoftmax, kBoth = kEpilogue == Epilogue::kBoth,
                 kSigmoid = kEpilogue == Epilogue::kSigmoid, kTags = kEpilogue == Epilogue::kTags;
  extern __shared__ __align__(512) char shared[];
  if (p.gate && *p.gate != p.gate_value) return;
  const uint32_t x_tile = shared_address(shared);
  constexpr bool kByColumns = !kSoftmax && !kBoth && !kSigmoid && !kTags;  // columns have vectors
  const float scale = scale_of<kEpilogue>(p);
  const bool x_chunks = in_chunks(p.x, sizeof(typename T::In));
  const bool one_shift = kEpilogue == Epilogue::kSymmetric && *p.shifts == Shifts::kOne;
  const bool far = kEpilogue == Epilogue::kColumns && *p.shifts == Shifts::kFar;
  const int row0 = block_row<T>(p), split = blockIdx.y;
  if (split >= parts_of(p, row0)) return;
  const TileRange range = range_of<T, kBoth>(p, row0, split);

  const RowsTakingPart<T> take_part(p, row0);
  const auto live = [&](int row) { return kBoth ? take_part(row) : row0 + row < p.x.count; };
  if constexpr (kTags) {
    // No product has these rows in it.
  } else if constexpr (T::kSplit) {
    // The rows go through the columns' staging area, as many at a time.
#pragma unroll 1
    for (int r = 0; r < T::kRows; r += T::kColumns) {
      Staging<T, T::kColumns>::fill(x_tile + T::kStaging, p.x, row0 + r, p.d, x_chunks, false,
                                    [&](int row) { return live(r + row); });
      copy_commit();
      copy_wait<0>();
      Staging<T, T::kColumns>::template split<T::kRowPlane>(x_tile + T::kStaging, x_tile + r * T::kPitch);
    }
  } else {
    load_tile<T, T::kRows>(x_tile, p.x, row0, p.d, x_chunks, false, live);
  }
  ColumnStream<T, kByColumns, kBoth, kBoth> columns(p, x_tile + T::kRowBytes);
  columns.start(range);

  const WarpRows<T> rows(p, x_tile + T::kBounds);
  rows.start();
  RowSoftmax<T> softmax;
  BothSums<T> both(p, rows, take_part, x_tile + T::kRowVectors);
  const SoftplusSums<T> softplus(x_tile + T::kRowVectors);
  TagWeights<T> tags;
  if constexpr (kSigmoid) softplus.start();
  if constexpr (kSigmoid || kEpilogue == Epilogue::kSymmetric)
    store_row_vectors<T>(p, row0, x_tile + T::kRowVectors);
  Output<T> o;
  if constexpr (kOutput)
#pragma unroll
    for (int i = 0; i < T::kRowTiles * T::kDim / 2; ++i) (&o[0][0][0])[i] = 0;
  MmaSync<T> mma;

  for (int tile = range.first; tile < range.last; ++tile) {
    const int buffer = columns.advance(tile);
    const uint32_t y_tile = columns.tiles + buffer * T::kColumnBytes;
    if (!kTags && tile == range.first) mma.take_rows(x_tile);
    if constexpr (kBoth) both.flush(range);
    const int column0 = columns.place(tile) * T::kColumns;
    // The block of the diagonal is met as a square, and counts for its rows only.
    const bool with_columns = kBoth && !(p.triangular && column0 >= row0 && column0 < row0 + T::kRows);
    bool masked;
    {
      const uint64_t valid = columns.bits_of(tile) | ~kTileBits<T>;
      // No column of this tile takes part, or no row of this warp exists.
      if (valid == ~kTileBits<T>) continue;
      if (kBoth && with_columns) both.pending = tile;
      if (rows.warp_row() >= p.x.count) {
        if (kBoth && with_columns) both.add_nothing(tile);
        continue;
      }
      masked = valid != ~uint64_t(0) || rows.masks(column0);
    }

    Logits<T> s;
    bool done;
    do {
      done = true;
      if constexpr (kTags) {
        tags.weigh(p, rows, column0, s);
        break;
      }
      mma.template similarities<true>(x_tile, y_tile, s);
      if (masked) mask<T>(rows, column0, columns.bits_of(tile), s, masked_by<kEpilogue>(scale));
      if constexpr (kSoftmax) {
        if (softmax.unsettled)
          softmax.template settle<kOutput>(s, scale, o);
        else
          done = softmax.weigh(s, scale);
      } else if constexpr (kBoth) {
        both.add(s, scale, tile, with_columns);
      } else if constexpr (kSigmoid) {
        softplus.weigh(s, scale);
      } else if constexpr (kEpilogue == Epilogue::kSymmetric) {
        weigh_by_both<T>(s, kScaleIsReadAgain ? scale_of<kEpilogue>(p) : scale,
                         columns.vectors + buffer * T::kVectorBytes, x_tile + T::kRowVectors, p, one_shift);
      } else if constexpr (kEpilogue == Epilogue::kSigmoidColumns) {
        weigh_by_sigmoid<T>(s, scale, columns.vectors + buffer * T::kVectorBytes);
      } else {
        weigh_by_columns<T>(s, scale, columns.vectors + buffer * T::kVectorBytes, far);
        if (masked && p.excluded_weight) weigh_excluded<T>(p, rows, column0, columns.valid(tile), s);
      }
    } while (!done);
    if constexpr (kOutput) mma.gather(s, y_tile, o);
  }

  copy_wait<0>();
  if constexpr (kBoth) both.finish(rows, range, split);
  if constexpr (kSoftmax) store_softmax<T>(p, rows, split, softmax);
  if constexpr (kSigmoid) softplus.store(p, rows, split);
  if constexpr (kTags) tags.store(p, rows, split);
  if constexpr (kOutput) store_output<T>(p, rows, split, o);
}

}  // namespace wscl::cuda
