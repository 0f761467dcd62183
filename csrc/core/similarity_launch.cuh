// From a params struct to a kernel: which tiling serves a d, and the launch.
#pragma once

#include "similarity_streamed.cuh"

namespace wscl::cuda {

// Each precision has a translation unit of its own.
cudaError_t run_bfloat16(const SimilarityParams&, cudaStream_t);
cudaError_t run_float16(const SimilarityParams&, cudaStream_t);
cudaError_t run_float32(const SimilarityParams&, cudaStream_t);
cudaError_t run_float32_fast(const SimilarityParams&, cudaStream_t);

// 2-byte numbers. Two row tiles a warp where O leaves room: every fragment of columns then feeds two products,
// which keeps shared memory (128 bytes a clock) below the tensor cores' rate. Beside O (kGathers) registers are
// left for narrower tiles only, or for none of the rows' fragments: nothing spills.
template <class Mma, int kDim, bool kGathers = false>
struct HalfTiling;
template <class Mma, bool kGathers>
struct HalfTiling<Mma, 64, kGathers>
    : Tiling<Mma, typename Mma::type, 1, 64, 2, 4, kGathers ? 32 : 64, kGathers ? 4 : 3, 4, 2> {};
template <class Mma, bool kGathers>
struct HalfTiling<Mma, 128, kGathers>
    : Tiling<Mma, typename Mma::type, 1, 128, 2, 4, kGathers ? 32 : 64, kGathers ? 4 : 2, kGathers ? 1 : 8, 2> {
};
template <class Mma, bool kGathers>
struct HalfTiling<Mma, 256, kGathers>
    : Tiling<Mma, typename Mma::type, 1, 256, 1, 8, 32, 2, kGathers ? 4 : 16, 1> {};

// Of the weights by column: their vectors lie in shared memory, so that d = 128 has room for a half more
// columns, over which the rows' fragments are read once.
template <class T>
struct Weighing : T {};
template <class Mma>
struct Weighing<HalfTiling<Mma, 128, true>> : Tiling<Mma, typename Mma::type, 1, 128, 2, 4, 48, 3, 0, 2> {};
// The same in tiles of 32, which pad few columns less: on an H200 faster at 1024 columns, 3 % slower at 8192.
template <class T>
struct NarrowWeighing : T {};
template <class Mma>
struct NarrowWeighing<HalfTiling<Mma, 128, true>> : Tiling<Mma, typename Mma::type, 1, 128, 2, 4, 32, 4, 0, 2> {
};

// Whether tiles of T pad more columns than narrow ones by a fortieth of them all.
template <class T, class Narrow>
bool pads_more(int64_t columns) {
  const auto padded = [columns](int64_t tile) { return (columns + tile - 1) / tile * tile; };
  return 40 * (padded(T::kColumns) - padded(Narrow::kColumns)) > columns;
}

// The fewest registers.
template <class T>
struct Lean : Tiling<typename T::Mma, typename T::In, T::kTerms, T::kDim, T::kRowTiles, T::kWarps, T::kColumns,
                     2, T::kDim == 128 ? 0 : T::kKeptSteps, T::kBlocks> {};

// float32: a fragment of columns feeds six (three) products already.
template <int kTerms, int kDim>
struct FloatTiling : Tiling<BFloat16, float, kTerms, kDim, 1, 4, 32, 2, 0, 1> {};

template <class T, Epilogue kEpilogue, bool kOutput>
cudaError_t launch(const SimilarityParams& p, cudaStream_t stream) {
  const auto kernel = similarity_kernel<T, kEpilogue, kOutput>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error || p.x.count == 0) return error;
  static_assert(T::kRows == block_rows(T::kSplit ? Precision::kFloat32 : Precision::kBFloat16));
  const dim3 grid(static_cast<unsigned>(blocks_of(p)), p.splits);
  kernel<<<grid, T::kThreads, T::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

// Weights by column.
template <class T, Epilogue kEpilogue>
cudaError_t launch_weighing(const SimilarityParams& p, cudaStream_t stream) {
  using Wide = Weighing<T>;
  using Narrow = NarrowWeighing<T>;
  if constexpr (Wide::kColumns != Narrow::kColumns)
    if (pads_more<Wide, Narrow>(p.y.count)) return launch<Narrow, kEpilogue, true>(p, stream);
  return launch<Wide, kEpilogue, true>(p, stream);
}

template <class T, class Gathering = T>
cudaError_t launch_epilogue(const SimilarityParams& p, cudaStream_t stream) {
  switch (p.epilogue) {
    case Epilogue::kSoftmax:
      return p.output ? launch<Gathering, Epilogue::kSoftmax, true>(p, stream)
                      : launch<T, Epilogue::kSoftmax, false>(p, stream);
    case Epilogue::kColumns:
      return launch_weighing<Gathering, Epilogue::kColumns>(p, stream);
    case Epilogue::kSymmetric:
      return launch_weighing<Gathering, Epilogue::kSymmetric>(p, stream);
    case Epilogue::kBoth:
      return launch<T, Epilogue::kBoth, false>(p, stream);
    case Epilogue::kSigmoid:
      return p.output ? launch<Gathering, Epilogue::kSigmoid, true>(p, stream)
                      : launch<T, Epilogue::kSigmoid, false>(p, stream);
    case Epilogue::kSigmoidColumns:
      return launch<Lean<Gathering>, Epilogue::kSigmoidColumns, true>(p, stream);
    case Epilogue::kTags:  // tags_cuda.cu
      break;
  }
  return cudaErrorInvalidValue;
}

// Whether a CTA may have this much shared memory here.
inline bool fits(int bytes) {
  int device = 0, most = 0;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) && bytes <= most;
}

// 2-byte numbers of any d.
template <class Mma>
cudaError_t run_half(const SimilarityParams& p, cudaStream_t stream) {
  using Wide = Tiling<Mma, typename Mma::type, 1, 256, 1, 8, 32, 2, 0, 1>;
  using Narrow = Tiling<Mma, typename Mma::type, 1, 128, 1, 8, 32, 2, 0, 1>;
  if (p.d <= 64) return launch_epilogue<HalfTiling<Mma, 64>, HalfTiling<Mma, 64, true>>(p, stream);
  if (p.d <= 128) return launch_epilogue<HalfTiling<Mma, 128>, HalfTiling<Mma, 128, true>>(p, stream);
  if (p.d <= 256) return launch_epilogue<HalfTiling<Mma, 256>, HalfTiling<Mma, 256, true>>(p, stream);
  return fits(Streamed<Wide>::kSharedBytes) ? launch_streamed_epilogue<Wide>(p, stream)
                                            : launch_streamed_epilogue<Narrow>(p, stream);
}

// float32 of any d.
template <int kTerms>
cudaError_t run_float(const SimilarityParams& p, cudaStream_t stream) {
  using Wide = FloatTiling<kTerms, 128>;
  using Narrow = FloatTiling<kTerms, 64>;
  if (p.d <= 64) return launch_epilogue<Narrow>(p, stream);
  if (p.d <= 128) return launch_epilogue<Wide>(p, stream);
  return fits(Streamed<Wide>::kSharedBytes) ? launch_streamed_epilogue<Wide>(p, stream)
                                            : launch_streamed_epilogue<Narrow>(p, stream);
}

}  // namespace wscl::cuda
