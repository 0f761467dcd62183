// The kernel of tags.h; included once per instruction set, see simd.h.
//
// For a block of rows and kTagColumns columns at a time: common bits are counted and become weights, four rows
// by kTagColumns; columns that share nothing with any of the four are left out of a list; then the values of
// the listed columns, two vectors wide, are added to the four rows' sums in registers. Sparse tags so cost what
// they share.
#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

// Adds Σ_c weight[r][c] · values[column c][0, kVectors vectors) of the listed columns to four rows' sums.
template <class T, int kVectors>
WSCL_INLINE void add_strip(const T* weights /* [listed, kTagRows] */, const int32_t* list, int listed,
                           const T* values, int64_t stride, double* accumulator, int64_t row_stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum[kTagRows][kVectors] = {};
  for (int c = 0; c < listed; ++c) {
    const T* row = values + list[c] * stride;
    Vector<T> v[kVectors];
    for (int k = 0; k < kVectors; ++k) v[k] = load(row + k * kWidth);
    for (int r = 0; r < kTagRows; ++r)
      for (int k = 0; k < kVectors; ++k) sum[r][k] += broadcast(weights[c * kTagRows + r]) * v[k];
  }
  for (int r = 0; r < kTagRows; ++r)
    for (int k = 0; k < kVectors; ++k)
      for (int i = 0; i < kWidth; ++i) accumulator[r * row_stride + k * kWidth + i] += sum[r][k][i];
}

template <class T>
WSCL_INLINE void add_tail(const T* weights, const int32_t* list, int listed, const T* values, int64_t stride,
                          int64_t begin, int64_t d, double* accumulator) {
  for (int64_t i = begin; i < d; ++i) {
    T sum[kTagRows] = {};
    for (int c = 0; c < listed; ++c)
      for (int r = 0; r < kTagRows; ++r) sum[r] += weights[c * kTagRows + r] * values[list[c] * stride + i];
    for (int r = 0; r < kTagRows; ++r) accumulator[r * d + i] += sum[r];
  }
}

inline int count_bits(const int64_t* tags, int64_t words) {
  int count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(static_cast<uint64_t>(tags[w]));
  return count;
}

template <class T>
void sum_tagged(const TagProblem<T>& p, int64_t row0, int64_t row1, const double* column_counts,
                double* accumulator, double* totals) {
  constexpr int kStrip = 2 * Simd<T>::kWidth;
  T weights[kTagColumns * kTagRows];
  int32_t list[kTagColumns];
  for (int64_t c0 = 0; c0 < p.m; c0 += kTagColumns) {
    const int columns = static_cast<int>(p.m - c0 < kTagColumns ? p.m - c0 : kTagColumns);
    const T* values = p.values + c0 * p.value_stride;
    for (int64_t r0 = row0; r0 < row1; r0 += kTagRows) {
      int row_counts[kTagRows] = {}, listed = 0;
      for (int64_t r = r0; r < row1 && r < r0 + kTagRows; ++r)
        row_counts[r - r0] = count_bits(p.row_tags + r * p.words, p.words);
      for (int c = 0; c < columns; ++c) {
        const int64_t* other = p.column_tags + (c0 + c) * p.words;
        bool any = false;
        for (int r = 0; r < kTagRows; ++r) {
          double weight = 0;
          if (r0 + r < row1) {
            const int64_t* mine = p.row_tags + (r0 + r) * p.words;
            int common = 0;
            for (int64_t w = 0; w < p.words; ++w)
              common += __builtin_popcountll(static_cast<uint64_t>(mine[w] & other[w]));
            if (common) {
              weight = 1;
              if (p.weight == TagWeight::kJaccard)
                weight = common / (row_counts[r] + column_counts[c0 + c] - common);
              totals[r0 + r - row0] += weight;
              any = true;
            }
          }
          weights[listed * kTagRows + r] = static_cast<T>(weight);
        }
        if (any) list[listed++] = c;
      }
      if (!listed) continue;
      double* sums = accumulator + (r0 - row0) * p.d;
      int64_t i = 0;
      for (; i + kStrip <= p.d; i += kStrip)
        add_strip<T, 2>(weights, list, listed, values + i, p.value_stride, sums + i, p.d);
      if (i + kStrip / 2 <= p.d) {
        add_strip<T, 1>(weights, list, listed, values + i, p.value_stride, sums + i, p.d);
        i += kStrip / 2;
      }
      add_tail(weights, list, listed, values, p.value_stride, i, p.d, sums);
    }
  }
}

// A constant: nothing of an instruction set runs before the processor was asked for it.
constexpr TagKernels tag_kernels() {
  return {sum_tagged<float>, sum_tagged<double>};
}

}  // namespace WSCL_ISA
}  // namespace wscl
