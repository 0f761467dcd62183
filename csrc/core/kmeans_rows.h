// Rows of points in whatever type and stride they come: reading them, their exact distances, their sums.
#pragma once

#include <cmath>
#include <cstdlib>

#include "kmeans_pass.h"
#include "kmeans_simd.h"

namespace wscl {
namespace WSCL_ISA {

// One allocation, cut into aligned pieces.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    std::free(memory_);
  }

  template <class P>
  void reserve(P** piece, int64_t count) {
    pieces_[count_] = reinterpret_cast<void**>(piece);
    offsets_[count_++] = size_;
    size_ += (count * static_cast<int64_t>(sizeof(P)) + 63) / 64 * 64;
  }

  void allocate() {
    memory_ = std::aligned_alloc(64, size_ > 0 ? size_ : 64);
    if (!memory_) std::abort();
    for (int i = 0; i < count_; ++i) *pieces_[i] = static_cast<char*>(memory_) + offsets_[i];
  }

 private:
  static constexpr int kMost = 11;
  void** pieces_[kMost] = {};
  int64_t offsets_[kMost] = {};
  int64_t size_ = 0;
  int count_ = 0;
  void* memory_ = nullptr;
};

WSCL_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

WSCL_INLINE float widen_bfloat16(uint16_t bits) {
  return from_bits(static_cast<uint32_t>(bits) << 16);
}

WSCL_INLINE float widen_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  if ((bits & 0x7c00u) == 0x7c00u) return from_bits(sign | 0x7f800000u | (bits & 0x3ffu) << 13);
  const float magnitude = from_bits((bits & 0x7fffu) << 13) * 0x1p112f;  // exact, below the normal range too
  return sign ? -magnitude : magnitude;
}

template <class T, class From, class Widen>
WSCL_INLINE void gather(const From* from, int64_t stride, int64_t d, T* to, const Widen& widen) {
  if (stride == 1)
    for (int64_t c = 0; c < d; ++c) to[c] = widen(from[c]);
  else
    for (int64_t c = 0; c < d; ++c) to[c] = widen(from[c * stride]);
}

// Row i as d numbers of T: where it lies, or converted into `scratch`.
template <class T>
const T* fetch(const Points& x, int64_t i, int64_t d, T* scratch) {
  const int64_t first = i * x.row_stride;
  switch (x.type) {
    case PointType::kFloat: {
      const float* from = static_cast<const float*>(x.data) + first;
      if constexpr (sizeof(T) == sizeof(float))
        if (x.column_stride == 1) return from;
      gather(from, x.column_stride, d, scratch, [](float v) { return static_cast<T>(v); });
      break;
    }
    case PointType::kDouble: {
      const double* from = static_cast<const double*>(x.data) + first;
      if constexpr (sizeof(T) == sizeof(double))
        if (x.column_stride == 1) return from;
      gather(from, x.column_stride, d, scratch, [](double v) { return static_cast<T>(v); });
      break;
    }
    case PointType::kHalf:
      gather(static_cast<const uint16_t*>(x.data) + first, x.column_stride, d, scratch, widen_half);
      break;
    case PointType::kBfloat16:
      gather(static_cast<const uint16_t*>(x.data) + first, x.column_stride, d, scratch, widen_bfloat16);
      break;
  }
  return scratch;
}

// Where rows of T lie that need no conversion; null where they do.
template <class T>
const T* rows_of(const Points& x) {
  const PointType own = sizeof(T) == sizeof(float) ? PointType::kFloat : PointType::kDouble;
  return x.type == own && x.column_stride == 1 ? static_cast<const T*>(x.data) : nullptr;
}

// ‖x‖, whatever x's scale.
template <class T>
double length_of(const T* x, int64_t d) {
  double scale = 1;
  if (sizeof(T) == sizeof(double)) {  // squares could leave the range
    double largest = 0;
    for (int64_t c = 0; c < d; ++c) largest = std::fabs(x[c]) > largest ? std::fabs(x[c]) : largest;
    if (largest == 0) return 0;
    scale = std::ldexp(1., -std::ilogb(largest) < 1000 ? -std::ilogb(largest) : 1000);
  }
  Vector<double> sum = {};
  for (int64_t c = 0; c < d; c += Simd<double>::kWidth) {
    const Vector<double> part = widen_part(x + c, d - c) * broadcast(scale);
    sum += part * part;
  }
  const double squared = horizontal_sum<double>(sum);
  return std::sqrt(squared) / scale;
}

// The distance of x from centroid j in float64. For the cosine `length` is ‖x‖; vectors are divided by their
// lengths, so that those which are a power of two apart become the same.
template <class T>
double exact_distance(const CentroidTable<T>& table, const T* x, double length, int64_t j) {
  const T* centroid = table.centroids + j * table.d;
  Vector<double> sum = {};
  if (table.cosine) {
    if (length == 0 || table.length[j] == 0) return 1;
    const Vector<double> own = broadcast(length), other = broadcast(table.length[j]);
    for (int64_t c = 0; c < table.d; c += Simd<double>::kWidth) {
      const Vector<double> apart =
          widen_part(x + c, table.d - c) / own - widen_part(centroid + c, table.d - c) / other;
      sum += apart * apart;
    }
    return horizontal_sum<double>(sum) / 2;
  }
  const double scale = sizeof(T) == sizeof(double) ? table.scale : 1;  // floats' squares fit anyway
  for (int64_t c = 0; c < table.d; c += Simd<double>::kWidth) {
    const Vector<double> apart =
        (widen_part(x + c, table.d - c) - widen_part(centroid + c, table.d - c)) * broadcast(scale);
    sum += apart * apart;
  }
  return horizontal_sum<double>(sum) / scale / scale;
}

// ‖x − c‖², lane by lane.
template <class T>
WSCL_INLINE Vector<T> squares_of(const T* x, const T* centroid, int64_t d) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum = {}, other = {};
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth) {
    const Vector<T> first = load(x + c) - load(centroid + c);
    const Vector<T> next = load(x + c + kWidth) - load(centroid + c + kWidth);
    sum += first * first;
    other += next * next;
  }
  for (; c < d; c += kWidth) {
    const int64_t count = d - c < kWidth ? d - c : kWidth;
    const Vector<T> rest = load_part(x + c, count) - load_part(centroid + c, count);
    sum += rest * rest;
  }
  return sum + other;
}

// Whether a sum of squares in T neither overflowed nor lost terms below the normal range.
template <class T>
WSCL_INLINE bool in_range_of_squares(T square) {
  return square > T(1e-25) && square < T(1e37);
}

template <class T>
WSCL_INLINE bool all_in_range_of_squares(Vector<T> squares) {
  const uint32_t inside = at_least<T>(squares, broadcast(T(1e-25))) & at_least<T>(broadcast(T(1e37)), squares);
  return inside == kAllLanes<T>;
}

// A distance as T, the largest number where it is beyond.
template <class T>
WSCL_INLINE T saturate(double distance) {
  constexpr double kLargest = sizeof(T) == sizeof(float) ? __FLT_MAX__ : __DBL_MAX__;
  return static_cast<T>(distance < kLargest ? distance : kLargest);
}

// 1 / length; 0 for zero, which has no direction.
WSCL_INLINE double to_unit(double length) {
  return length > 0 ? 1 / length : 0;
}

// What a row adds to the sums of its cluster: w x, or for the cosine w x / ‖x‖. Unit vectors of floats are
// rounded to multiples of 2^−40, far below what floats tell, so that sums of them are exact whatever joined and
// left before.
template <class T>
struct Addend {
  double weight, unit;
  bool cosine;

  Addend(const KMeansProblem<T>& problem, double weight, double length)
      : weight(weight), unit(problem.cosine ? to_unit(length) : 1), cosine(problem.cosine) {}

  template <class V>
  WSCL_INLINE V of(V value) const {
    if (!cosine) return weight * value;
    value = unit * value;
    if (sizeof(T) == sizeof(float)) value = (value + 0x1.8p12) - 0x1.8p12;
    return weight * value;
  }
};

// Adds a row to the sums of its cluster, and its weight to the count. `length` is ‖x‖, for the cosine.
template <class T>
WSCL_INLINE void add_row(const KMeansProblem<T>& problem, const T* x, int64_t cluster, double weight,
                         double length, KMeansPart& part) {
  constexpr int kWidth = Simd<double>::kWidth;
  double* sum = part.sums + cluster * problem.d;
  const Addend<T> addend(problem, weight, length);
  int64_t c = 0;
  for (; c + kWidth <= problem.d; c += kWidth) store(sum + c, load(sum + c) + addend.of(widen(x + c)));
  for (; c < problem.d; ++c) sum[c] += addend.of(double(x[c]));
  if (part.weight_sums)
    part.weight_sums[cluster] += weight;
  else
    ++part.counts[cluster];
}

}  // namespace WSCL_ISA
}  // namespace wscl
