#include "logsumexp_both_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr float kLeastSquare = 0x1p-100f;   // of a norm: squares below 2^-149 vanish, whatever their rows meet
constexpr float kMostLogit = 90;            // base 2: a sum of 2^31 numbers of 2^90 is finite, 2^−90 is normal
constexpr int64_t kNormRows = 64;           // rows of a CTA
constexpr int64_t kColumnBytes = 64 << 20;  // of column sums at a time
constexpr int kMerging = 256;

__device__ __forceinline__ bool is_set(const uint64_t* bits, int64_t at) {
  return !bits || (bits[at / kValidBits] >> (at % kValidBits)) & 1;
}

// The largest squared norm of a CTA's rows that take part; ∞ for NaN. A warp for each row.
template <class In>
__global__ void largest_norms(const Rows rows, const uint64_t* valid, int64_t d, float* to) {
  __shared__ float of_warp[kBlock / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float largest = 0;
  for (int64_t r = blockIdx.x * kNormRows + warp; r < min(rows.count, (blockIdx.x + 1) * kNormRows);
       r += kBlock / 32) {
    if (!is_set(valid, r)) continue;
    const In* row = static_cast<const In*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
    float sum = 0;
    for (int64_t c = lane; c < d; c += 32) {
      const float x = to_float(row[c]);
      sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    largest = sum <= largest ? largest : sum < INFINITY ? sum : INFINITY;
  }
  if (lane == 0) of_warp[warp] = largest;
  __syncthreads();
  if (threadIdx.x) return;
  for (unsigned w = 1; w < kBlock / 32; ++w) largest = fmaxf(largest, of_warp[w]);
  to[blockIdx.x] = largest;
}

__device__ float largest_of(const float* values, int64_t count) {
  float largest = 0;
  for (int64_t i = threadIdx.x; i < count; i += kMerging) largest = fmaxf(largest, values[i]);
  return block_max<kMerging>(largest);
}

__global__ void __launch_bounds__(kMerging) decide(const LogSumExpBoth both) {
  const SimilarityParams& p = both.pass;
  const float x = fmaxf(largest_of(both.x_norms, blocks_for(p.x.count, kNormRows)), kLeastSquare);
  const float y =
      p.triangular ? x : fmaxf(largest_of(both.y_norms, blocks_for(p.y.count, kNormRows)), kLeastSquare);
  // Rows of one range each would have to write column sums that they do not meet.
  const bool ranges = p.begin && !p.outside;
  if (threadIdx.x == 0) *both.small = !ranges && fabsf(*p.scale) * 1.4427f * sqrtf(x) * sqrtf(y) <= kMostLogit;
}

// column_total_j += what this band's blocks of rows say of column j, in their order. Triangular: those that
// triangle_of sends to the column's block.
__global__ void add_columns(const LogSumExpBoth both) {
  const SimilarityParams& p = both.pass;
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (!*both.small || j >= p.y.count) return;
  double total = p.first_block ? both.column_total[j] : 0;
  if (is_set(p.y_valid, j)) {
    const int own = static_cast<int>(j / both.rows_of_block), blocks = static_cast<int>(both.blocks);
    const int first = static_cast<int>(p.first_block), count = static_cast<int>(p.blocks);
    const float* sum = p.column_sum + j;
    for (int b = 0; b < count; ++b, sum += p.column_stride) {
      const int block = first + b, distance = own - block + (own < block ? blocks : 0);
      const int met = blocks / 2 + (blocks % 2 || block < blocks / 2);
      if (!p.triangular || (distance > 0 && distance < met)) total += *sum;
    }
  }
  both.column_total[j] = total;
}

__device__ void store_sum(const SoftmaxParts& to, int64_t at, double sum, double shift) {
  if (sum > 0 && sum < INFINITY) {
    const int more = ilogb(sum);
    sum = scalbn(sum, -more);
    shift += more;
  } else if (sum == 0) {
    shift = -INFINITY;
  }
  to.shift[at] = static_cast<float>(shift);
  to.sum[at] = static_cast<float>(sum);
}

__device__ void merge(const SoftmaxParts& parts, int64_t row, const SoftmaxParts& to) {
  const Merged merged(parts, row);
  to.shift[row] = static_cast<float>(merged.shift);
  to.sum[row] = static_cast<float>(merged.sum);
}

__global__ void finish_rows(const LogSumExpBoth both) {
  const SimilarityParams& p = both.pass;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.x.count) return;
  if (!*both.small) return merge(both.row_parts, i, both.rows);
  double sum = p.triangular && is_set(p.x_valid, i) ? both.column_total[i] : 0;
  for (int s = 0; s < p.splits; ++s) sum += p.sum[s * p.x.count + i];
  store_sum(both.rows, i, sum, 0);
}

__global__ void finish_columns(const LogSumExpBoth both) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= both.pass.y.count) return;
  if (!*both.small) return merge(both.column_parts, j, both.columns);
  store_sum(both.columns, j, both.column_total[j], 0);
}

SoftmaxParts one_part(int64_t rows, Workspace& space) {
  return {1, rows, 0, space.take<float>(rows), space.take<float>(rows), nullptr};
}

}  // namespace

LogSumExpBoth::LogSumExpBoth(const SimilarityParams& both, const SimilarityParams& transposed, Workspace& space)
    : pass(both), by_rows(both), by_columns(transposed) {
  const int64_t n = pass.x.count, m = pass.y.count;
  pass.epilogue = Epilogue::kBoth;
  pass.column_stride = (m + 63) / 64 * 64;
  rows_of_block = block_rows(pass.precision);
  blocks = (n + rows_of_block - 1) / rows_of_block;
  band = std::min(blocks, std::max<int64_t>(1, kColumnBytes / std::max<int64_t>(1, 4 * pass.column_stride)));
  pass.blocks = band;
  pass.splits = choose_split(pass, false).splits;
  pass.sum = space.take<float>(pass.splits * n);
  pass.column_sum = space.take<float>(band * pass.column_stride);
  column_total = space.take<double>(m);
  x_norms = space.take<float>(blocks_for(n, kNormRows));
  y_norms = pass.triangular ? nullptr : space.take<float>(blocks_for(m, kNormRows));
  small = space.take<int32_t>(1);
  pass.gate = by_rows.gate = by_columns.gate = small;
  pass.gate_value = 1;

  by_rows.epilogue = by_columns.epilogue = Epilogue::kSoftmax;
  by_rows.triangular = false;
  by_rows.x_valid = nullptr;
  row_parts = take_parts(by_rows, false, space);
  rows = one_part(n, space);
  column_parts = columns = {};
  if (pass.triangular) return;
  column_parts = take_parts(by_columns, false, space);
  columns = one_part(m, space);
}

cudaError_t LogSumExpBoth::run(cudaStream_t stream) const {
  if (pass.x.count == 0 || pass.y.count == 0) return cudaErrorInvalidValue;
  with_element(pass.precision, [&](auto* element) {
    using In = std::remove_pointer_t<decltype(element)>;
    largest_norms<In>
        <<<blocks_for(pass.x.count, kNormRows), kBlock, 0, stream>>>(pass.x, pass.x_valid, pass.d, x_norms);
    if (!pass.triangular)
      largest_norms<In>
          <<<blocks_for(pass.y.count, kNormRows), kBlock, 0, stream>>>(pass.y, pass.y_valid, pass.d, y_norms);
  });
  decide<<<1, kMerging, 0, stream>>>(*this);
  cudaError_t error = cudaGetLastError();
  for (int64_t first = 0; first < blocks && !error; first += band) {
    LogSumExpBoth part = *this;
    part.pass.first_block = first;
    part.pass.blocks = std::min(band, blocks - first);
    error = run_similarity(part.pass, stream);
    if (error) break;
    // Small CTAs, so that every multiprocessor has some.
    add_columns<<<blocks_for(pass.y.count, 64), 64, 0, stream>>>(part);
    error = cudaGetLastError();
  }
  if (!error) error = run_similarity(by_rows, stream);
  if (!error && !pass.triangular) error = run_similarity(by_columns, stream);
  if (error) return error;
  finish_rows<<<blocks_for(pass.x.count), kBlock, 0, stream>>>(*this);
  if (!pass.triangular) finish_columns<<<blocks_for(pass.y.count), kBlock, 0, stream>>>(*this);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
