// The centroids and the rows as the product of kmeans_passes_cuda.cuh sees them: moved, scaled, rounded to
// float16, with the bounds of what that loses. O((n + k) d) work, each number read two or three times from
// cache.
#include <algorithm>
#include <climits>

#include "kmeans_passes_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLeastExponent = -120;  // below, float's own range ends

// 1 / ‖x‖ in float64, whose range holds the squares of floats; 0 for zero.
template <class G, class In>
__device__ __forceinline__ double inverse_length(const In* x, int64_t d) {
  double sum = 0;
  for (int64_t c = G::lane(); c < d; c += G::kLanesInGroup) {
    const double number = to_float(x[c]);
    sum += number * number;
  }
  sum = G::sum(sum);
  return sum > 0 ? 1 / sqrt(sum) : 0;
}

__global__ void centroid_lengths(const KMeansTable t) {
  const int64_t j = Warp::index();
  if (j >= t.k) return;
  const double inverse = inverse_length<Warp>(t.centroids + j * t.d, t.d);
  if (threadIdx.x % 32 == 0) t.inverse[j] = inverse;
}

// c_jc in float64, of the unit vector for the cosine.
__device__ __forceinline__ double centroid_at(const KMeansTable& t, int64_t j, int64_t c) {
  const double number = t.centroids[j * t.d + c];
  return t.cosine ? number * t.inverse[j] : number;
}

// A thread for each column of d, a CTA for a slice of the centroids.
__global__ void add_slice(const KMeansTable t) {
  const int64_t c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (c >= t.d) return;
  const int64_t first = t.k * blockIdx.x / t.slices, last = t.k * (blockIdx.x + 1) / t.slices;
  double sum = 0;
#pragma unroll 4
  for (int64_t j = first; j < last; ++j) sum += centroid_at(t, j, c);
  t.partial[blockIdx.x * t.d + c] = sum;
}

__global__ void find_origin(const KMeansTable t) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= t.d) return;
  double sum = 0;
#pragma unroll 4
  for (int s = 0; s < t.slices; ++s) sum += t.partial[s * t.d + c];
  t.origin[c] = static_cast<float>(sum / static_cast<double>(t.k));
}

__global__ void find_exponent(const KMeansTable t) {
  const int64_t j = Warp::index();
  if (j >= t.k) return;
  double most = 0;
  for (int64_t c = threadIdx.x % 32; c < t.d; c += 32)
    most = fmax(most, fabs(centroid_at(t, j, c) - static_cast<double>(t.origin[c])));
  most = Warp::max(most);
  if (threadIdx.x % 32 || !(most > 0)) return;
  const int exponent = ilogb(most) + 1;
  if (*static_cast<volatile int32_t*>(t.exponent) < exponent) atomicMax(t.exponent, exponent);
}

// log2 of 1 / scale.
__device__ __forceinline__ int scale_exponent(const KMeansTable& t) {
  const int exponent = *t.exponent;
  return exponent < -10000 ? 0 : max(exponent, kLeastExponent);
}

// The order of doubles above zero is that of their bits. A look first: few columns have to raise anything.
__device__ __forceinline__ void raise(unsigned long long* to, double value) {
  const unsigned long long bits = __double_as_longlong(value);
  if (*static_cast<volatile unsigned long long*>(to) < bits) atomicMax(to, bits);
}

// A warp for each column, those past k too.
__global__ void pack_columns(const KMeansTable t) {
  const int64_t j = Warp::index();
  if (j >= t.columns_padded) return;
  const double scale = ldexp(1., -scale_exponent(t));
  double norm = 0, lost = 0, shift = 0;
  for (int64_t c = threadIdx.x % 32; c < t.depth; c += 32) {
    double number = 0;
    if (j < t.k && c < t.d) {
      const double origin = t.origin[c];
      number = (centroid_at(t, j, c) - origin) * scale;
      shift += number * (origin * scale);
    }
    const __half kept = __float2half_rn(static_cast<float>(number));
    t.columns[j * t.depth + c] = kept;
    const double loss = number - static_cast<double>(__half2float(kept));
    norm += number * number;
    lost += loss * loss;
  }
  norm = Warp::sum(norm);
  lost = Warp::sum(lost);
  shift = Warp::sum(shift);
  if (threadIdx.x % 32) return;
  const double offset = t.cosine ? -shift : norm / 2;
  t.offset[j] = static_cast<float>(offset);
  raise(t.largest, norm);
  raise(t.largest + 1, lost);
  raise(t.largest + 2, fabs(offset));
}

__global__ void find_bound(const KMeansTable t) {
  const double longest = sqrt(__longlong_as_double(t.largest[0])) * (1 + 1e-9);
  const double lost = sqrt(__longlong_as_double(t.largest[1])) * (1 + 1e-9);
  const double offset = __longlong_as_double(t.largest[2]) * (1 + 1e-9);
  const double unit = ldexp(1., -24), scale = ldexp(1., -scale_exponent(t));
  const double root = sqrt(static_cast<double>(t.depth));
  const double sum = unit * (3 * static_cast<double>(t.depth) + 48 + 32);
  TableBound bound;
  bound.per_norm = static_cast<float>(lost + unit * longest + sum * (longest + lost));
  bound.per_loss = static_cast<float>((1 + sum) * (longest + lost));
  // What the offset rounds, what halving may cut off below float's normal range, and for the cosine what the
  // unit vector rounds before it is moved.
  bound.per_factor = static_cast<float>(offset * (sum + 2 * unit) + longest * scale * root * ldexp(1., -148) +
                                        (t.cosine ? 4 * unit * scale * longest : 0));
  bound.constant = static_cast<float>(longest * root * ldexp(1., -72) + offset * ldexp(1., -125) + 1e-37);
  *t.bound = bound;
}

// A group of lanes for each row.
template <class In>
__global__ void __launch_bounds__(kThreads)
    pack_rows(const KMeansProblem p, const KMeansTable t, const KMeansBlock b) {
  using G = RowGroup<In>;
  const int64_t lane = G::lane(), i = min(G::index(), int64_t(b.count - 1));
  const bool live = G::index() < b.count;
  const In* x = row_of<In>(p, b.first + i);
  const double inverse = t.cosine ? inverse_length<G>(x, t.d) : 1;
  // Half of what lies between x and the origin: that cannot overflow.
  const auto moved = [&](int64_t c) {
    const float number = to_float(x[c]);
    const float point = t.cosine ? static_cast<float>(number * inverse) : number;
    return 0.5f * point - 0.5f * t.origin[c];
  };
  float most = 0;
  bool finite = true;
  for (int64_t c = lane; c < t.d; c += G::kLanesInGroup) {
    finite = finite && isfinite(to_float(x[c]));
    most = fmaxf(most, fabsf(moved(c)));
  }
  most = G::max(most);
  if (G::ballot(!finite) && lane == 0 && live)
    atomicMin(reinterpret_cast<unsigned long long*>(p.bad_row), static_cast<unsigned long long>(b.first + i));
  // 2 · most · scale has the exponent `beyond`; f takes off what is above zero.
  const int down = scale_exponent(t);
  const int beyond = most > 0 && most < INFINITY ? ilogbf(most) + 2 - down : 0;
  const int factor = max(0, beyond);
  const float times = ldexpf(1.f, 1 - down - factor);
  float norm = 0, lost = 0;
  __half* to = b.rows + i * t.depth;
  for (int64_t c = lane; c < t.depth; c += G::kLanesInGroup) {
    const float number = c < t.d ? moved(c) * times : 0.f;
    const __half kept = __float2half_rn(number);
    if (live) to[c] = kept;
    const float loss = number - __half2float(kept);
    norm = fmaf(number, number, norm);
    lost = fmaf(loss, loss, lost);
  }
  norm = sqrtf(G::sum(norm));
  lost = sqrtf(G::sum(lost));
  if (lane || !live) return;
  const TableBound bound = *t.bound;
  const float f = ldexpf(1.f, max(-factor, -126));
  b.factor[i] = f;
  if (t.cosine) b.inverse[i] = inverse;
  // Norms were summed up in float, and so is this: a little more. The last term is 16 units of float64 of the
  // distance: where the definition itself cannot tell, it takes the first, so all of them are candidates.
  b.margin[i] =
      2.004f * (bound.per_norm * norm + bound.per_loss * lost + bound.per_factor * f + bound.constant) +
      norm * norm * (0x1p-50f / f);
}

}  // namespace

KMeansTable::KMeansTable(const KMeansProblem& p, Workspace& space)
    : k(p.k),
      d(p.d),
      columns_padded((p.k + kScanColumns - 1) / kScanColumns * kScanColumns),
      depth(std::max<int64_t>(1, (p.d + kPiece - 1) / kPiece) * kPiece),
      cosine(p.cosine),
      centroids(p.centroids),
      inverse(space.take<double>(p.cosine ? p.k : 0)),
      partial(nullptr),
      slices(static_cast<int>(std::min<int64_t>(512, (p.k + 63) / 64))) {
  partial = space.take<double>(slices * d);
  origin = space.take<float>(d);
  exponent = space.take<int32_t>(1);
  largest = space.take<unsigned long long>(3);
  bound = space.take<TableBound>(1);
  columns = space.take<__half>(columns_padded * depth);
  offset = space.take<float>(columns_padded);
}

cudaError_t KMeansTable::prepare(const KMeansProblem& p, cudaStream_t stream) const {
  cudaError_t error = cudaMemsetAsync(exponent, 0x80, sizeof(*exponent), stream);  // below every exponent
  if (!error) error = cudaMemsetAsync(largest, 0, 3 * sizeof(*largest), stream);
  if (!error) error = cudaMemsetAsync(p.bad_row, 0xff, sizeof(*p.bad_row), stream);  // −1
  if (error) return error;
  if (cosine) centroid_lengths<<<blocks_for(k, kWarps), kThreads, 0, stream>>>(*this);
  if (d) {
    add_slice<<<dim3(slices, blocks_for(d, 128)), 128, 0, stream>>>(*this);
    find_origin<<<blocks_for(d, 128), 128, 0, stream>>>(*this);
    find_exponent<<<blocks_for(k, kWarps), kThreads, 0, stream>>>(*this);
  }
  pack_columns<<<blocks_for(columns_padded, kWarps), kThreads, 0, stream>>>(*this);
  find_bound<<<1, 1, 0, stream>>>(*this);
  return cudaGetLastError();
}

cudaError_t prepare_rows(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                         cudaStream_t stream) {
  with_element(p.precision, [&](auto* element) {
    using In = std::remove_pointer_t<decltype(element)>;
    const unsigned blocks = blocks_for(block.count, kThreads / RowGroup<In>::kLanesInGroup);
    pack_rows<In><<<blocks, kThreads, 0, stream>>>(p, table, block);
  });
  return cudaGetLastError();
}

}  // namespace wscl::cuda
