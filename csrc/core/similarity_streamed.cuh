// The kernel of similarity_cuda.h for any d: where a row does not fit, its columns stream past as well.
//
// Tile map. As in similarity_kernel.cuh, but X and Y come in pieces of kDim columns of d, both streamed, and a
// CTA gathers one such piece ("slice") of the output; grid.z is the slice:
//
//   for each tile of kColumns columns:
//     for each piece of d:
//       S += X piece · Y pieceᵀ
//     W = epilogue(S)
//     O[slice] += W · Y piece                 the slice's: the last one lies there still, others come again
//
// So every slice computes S anew: ⌈d / kDim⌉ + 1 products where 2 would do. Without an output there is one
// slice, and nothing is done twice. All add pieces up in one order, that of a row that fits: slices agree on S,
// so on shifts and sums, to the last bit, and the weights of a gradient are made of the S that its statistics
// were. Large logits need that: S off by a rounding is a weight off by a power of two.
#pragma once

#include "similarity_pass.cuh"

namespace wscl::cuda {

template <class T>
struct Streamed {
  static constexpr int kPair = T::kRowBytes + T::kColumnBytes;
  static constexpr int kBuffers = T::kSplit ? 1 : 2;
  static constexpr int kVectors = kBuffers * kPair;
  static constexpr int kStaging = kVectors + T::kVectorBytes;
  static constexpr int kRowStagingBytes = T::kSplit ? T::kRows * T::kDim * 4 : 0;
  static constexpr int kBounds = kStaging + kRowStagingBytes + T::kStagingBytes;
  static constexpr int kRowVectors = kBounds + T::kWarps * 16;
  static constexpr int kSharedBytes = kRowVectors + T::kRowVectorBytes;
};

// From piece `piece` of d on.
template <class T>
__device__ __forceinline__ Rows from_piece(Rows rows, int piece) {
  rows.data = static_cast<const char*>(rows.data) + int64_t(piece) * T::kDim * sizeof(typename T::In);
  return rows;
}

// A pair of pieces on its way to shared memory, or the columns' alone.
template <class T, bool kRowsTakePart>
__device__ __forceinline__ void ask_pair(const SimilarityParams& p, uint32_t memory, int buffer, int row0,
                                         int column0, int piece, bool with_rows, uint64_t valid) {
  using Layout = Streamed<T>;
  const int d = static_cast<int>(p.d) - piece * T::kDim;
  const Rows x = from_piece<T>(p.x, piece), y = from_piece<T>(p.y, piece);
  const bool x_chunks = in_chunks(p.x, sizeof(typename T::In)),
             y_chunks = in_chunks(p.y, sizeof(typename T::In));
  const RowsTakingPart<T> take_part(p, row0);
  const auto x_live = [&](int row) { return kRowsTakePart ? take_part(row) : row0 + row < p.x.count; };
  const auto y_live = [=](int row) { return (valid >> row) & 1; };
  const bool whole = (valid | ~kTileBits<T>) == ~uint64_t(0);
  if constexpr (T::kSplit) {
    const uint32_t staging = memory + Layout::kStaging;
    if (with_rows) Staging<T, T::kRows>::fill(staging, x, row0, d, x_chunks, false, x_live);
    Staging<T, T::kColumns>::fill(staging + Layout::kRowStagingBytes, y, column0, d, y_chunks, whole, y_live);
  } else {
    const uint32_t pair = memory + buffer * Layout::kPair;
    if (with_rows) load_tile<T, T::kRows>(pair, x, row0, d, x_chunks, false, x_live);
    load_tile<T, T::kColumns>(pair + T::kRowBytes, y, column0, d, y_chunks, whole, y_live);
  }
  copy_commit();
}

// Makes what was asked for last readable by every warp.
template <class T>
__device__ __forceinline__ void take_pair(uint32_t memory, bool with_rows) {
  using Layout = Streamed<T>;
  copy_wait<0>();
  __syncthreads();  // 2-byte numbers: the pair is here; float32: every warp is done with the planes before
  if constexpr (T::kSplit) {
    const uint32_t staging = memory + Layout::kStaging;
    if (with_rows) Staging<T, T::kRows>::template split<T::kRowPlane>(staging, memory);
    Staging<T, T::kColumns>::template split<T::kColumnPlane>(staging + Layout::kRowStagingBytes,
                                                             memory + T::kRowBytes);
    __syncthreads();  // the planes are whole
  }
}

template <class T, Epilogue kEpilogue, bool kOutput>
__global__ void __launch_bounds__(T::kThreads, 1) streamed_kernel(const SimilarityParams p) {
  using Layout = Streamed<T>;
  constexpr bool kSoftmax = kEpilogue == Epilogue::kSoftmax, kBoth = kEpilogue == Epilogue::kBoth,
                 kSigmoid = kEpilogue == Epilogue::kSigmoid;
  extern __shared__ __align__(512) char shared[];
  if (p.gate && *p.gate != p.gate_value) return;
  const uint32_t memory = shared_address(shared);
  const float scale = scale_of<kEpilogue>(p);
  const bool one_shift = kEpilogue == Epilogue::kSymmetric && *p.shifts == Shifts::kOne;
  const bool far = kEpilogue == Epilogue::kColumns && *p.shifts == Shifts::kFar;
  const int row0 = block_row<T>(p), split = blockIdx.y, slice = blockIdx.z;
  if (split >= parts_of(p, row0)) return;
  const int pieces = (static_cast<int>(p.d) + T::kDim - 1) / T::kDim;
  const TileRange range = range_of<T, kBoth>(p, row0, split);

  const WarpRows<T> rows(p, memory + Layout::kBounds);
  rows.start();
  const SoftplusSums<T> softplus(memory + Layout::kRowVectors);
  if constexpr (kSigmoid) softplus.start();
  if constexpr (kSigmoid || kEpilogue == Epilogue::kSymmetric)
    store_row_vectors<T>(p, row0, memory + Layout::kRowVectors);
  RowSoftmax<T> softmax;
  if constexpr (kSoftmax) softmax.put_away(memory + Layout::kRowVectors);
  BothSums<T> both(p, rows, RowsTakingPart<T>(p, row0), memory + Layout::kRowVectors);
  Output<T> o;
  if constexpr (kOutput)
#pragma unroll
    for (int i = 0; i < T::kRowTiles * T::kDim / 2; ++i) (&o[0][0][0])[i] = 0;

  // Of a tile: its pieces, then the slice's columns.
  const int steps = pieces + (kOutput && slice != pieces - 1);
  const auto ask = [&](int tile, int step, int buffer) {
    if (step == steps) {
      step = 0;
      ++tile;
    }
    if (tile < range.last)
      ask_pair<T, kBoth>(p, memory, buffer, row0, range.place(tile) * T::kColumns, step < pieces ? step : slice,
                         step < pieces, valid_columns<T>(p, range.place(tile)));
  };
  int buffer = 0;
  ask(range.first, 0, buffer);
  for (int tile = range.first; tile < range.last; ++tile) {
    const int column0 = range.place(tile) * T::kColumns;
    const bool with_columns = kBoth && !(p.triangular && column0 >= row0 && column0 < row0 + T::kRows);
    Logits<T> s;
    clear<T>(s);
    const MmaSync<T> mma{};
    uint32_t pair = memory;
    for (int step = 0; step < steps; ++step) {
      take_pair<T>(memory, step < pieces);
      pair = memory + buffer * Layout::kPair;
      buffer = (buffer + 1) % Layout::kBuffers;
      ask(tile, step + 1, buffer);
      if (step < pieces) mma.template similarities<false>(pair, pair + T::kRowBytes, s);
    }
    if constexpr (kBoth) {
      both.flush(range);  // take_pair's barrier lies between
    } else if constexpr (!kSoftmax && !kSigmoid) {
      __syncthreads();  // every warp is done with the vectors of the tile before
      ask_columns<T>(p, memory + Layout::kVectors, column0);
      copy_commit();
      copy_wait<0>();
      __syncthreads();  // those of this tile are here
    }
    const uint64_t valid = valid_columns<T>(p, range.place(tile)) | ~kTileBits<T>;
    if (valid == ~kTileBits<T>) continue;
    if (kBoth && with_columns) both.pending = tile;
    if (rows.warp_row() >= p.x.count) {
      if (kBoth && with_columns) both.add_nothing(tile);
      continue;
    }
    const bool masked = valid != ~uint64_t(0) || rows.masks(column0);
    if (masked) mask<T>(rows, column0, valid, s, masked_by<kEpilogue>(scale));
    if constexpr (kSoftmax) {
      softmax.take_up(memory + Layout::kRowVectors);
      // To compute the similarities again would cost more than to look for a maximum.
      softmax.template settle<kOutput>(s, scale, o);
      softmax.put_away(memory + Layout::kRowVectors);
    } else if constexpr (kBoth) {
      both.add(s, scale, tile, with_columns);
    } else if constexpr (kSigmoid) {
      softplus.weigh(s, scale);
    } else if constexpr (kEpilogue == Epilogue::kSymmetric) {
      weigh_by_both<T>(s, scale, memory + Layout::kVectors, memory + Layout::kRowVectors, p, one_shift);
    } else if constexpr (kEpilogue == Epilogue::kSigmoidColumns) {
      weigh_by_sigmoid<T>(s, scale, memory + Layout::kVectors);
    } else {
      weigh_by_columns<T>(s, scale, memory + Layout::kVectors, far);
      if (masked && p.excluded_weight) weigh_excluded<T>(p, rows, column0, valid, s);
    }
    if constexpr (kOutput) mma.gather(s, pair + T::kRowBytes, o);
  }

  copy_wait<0>();
  if constexpr (kBoth) both.finish(rows, range, split);
  if constexpr (kSigmoid)
    if (slice == 0) softplus.store(p, rows, split);
  if constexpr (kSoftmax) {
    softmax.take_up(memory + Layout::kRowVectors);
    if (slice == 0) store_softmax<T>(p, rows, split, softmax);
  }
  if constexpr (kOutput) store_output<T>(p, rows, split, o, slice * T::kDim);
}

template <class T, Epilogue kEpilogue, bool kOutput>
cudaError_t launch_streamed(const SimilarityParams& p, cudaStream_t stream) {
  const auto kernel = streamed_kernel<T, kEpilogue, kOutput>;
  constexpr int kBytes = Streamed<T>::kSharedBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error || p.x.count == 0) return error;
  const dim3 grid(static_cast<unsigned>(blocks_of(p)), p.splits,
                  kOutput ? static_cast<unsigned>((p.d + T::kDim - 1) / T::kDim) : 1);
  kernel<<<grid, T::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_streamed_epilogue(const SimilarityParams& p, cudaStream_t stream) {
  switch (p.epilogue) {
    case Epilogue::kSoftmax:
      return p.output ? launch_streamed<T, Epilogue::kSoftmax, true>(p, stream)
                      : launch_streamed<T, Epilogue::kSoftmax, false>(p, stream);
    case Epilogue::kColumns:
      return launch_streamed<T, Epilogue::kColumns, true>(p, stream);
    case Epilogue::kSymmetric:
      return launch_streamed<T, Epilogue::kSymmetric, true>(p, stream);
    case Epilogue::kBoth:
      return launch_streamed<T, Epilogue::kBoth, false>(p, stream);
    case Epilogue::kSigmoid:
      return p.output ? launch_streamed<T, Epilogue::kSigmoid, true>(p, stream)
                      : launch_streamed<T, Epilogue::kSigmoid, false>(p, stream);
    case Epilogue::kSigmoidColumns:
      return launch_streamed<T, Epilogue::kSigmoidColumns, true>(p, stream);
    case Epilogue::kTags:  // tags_cuda.cu
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace wscl::cuda
