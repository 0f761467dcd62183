// All kernels of k-means for one instruction set and one kind of operands (included by kmeans_<isa>.cpp).
#pragma once

#include "kmeans_assigned.h"
#include "kmeans_bounds_kernel.h"
#include "kmeans_in_place.h"
#include "kmeans_potentials_kernel.h"

namespace wscl {
namespace WSCL_ISA {

// Rows [first, first + count) of q, [count][d] in T, as the panel that score_tile wants:
// [depth][vectors][kWidth], kStep elements of a column together; or, where each column has several `terms`,
// score_narrow_tile: [depth / terms][kWidth / terms][terms].
template <class Op>
void kmeans_pack(const typename Op::Number* rows, int64_t count, int64_t vectors, int64_t terms, int64_t d,
                 int64_t depth, void* panel) {
  constexpr int kWidth = Simd<typename Op::Number>::kWidth;
  typename Op::Element* out = static_cast<typename Op::Element*>(panel);
  for (int64_t p = 0; p < depth; ++p)
    for (int64_t j = 0; j < vectors * kWidth / terms; ++j) {
      const int64_t step = p / Op::kStep, lane = j * terms + step % terms;
      out[(step / terms * vectors * kWidth + lane) * Op::kStep + p % Op::kStep] =
          p < d && j < count ? Op::round(rows[j * d + p]) : typename Op::Element(0);
    }
}

template <class Op>
constexpr KMeansTyped<typename Op::Number> kmeans_typed() {
  return {kmeans_pack<Op>,
          kmeans_run<Op>,
          kmeans_sum<typename Op::Number>,
          kmeans_distances_part<typename Op::Number>,
          kmeans_potentials_part<typename Op::Number>,
          kmeans_bounded_run<Op>,
          kmeans_move_rows<typename Op::Number>,
          kVectors,
          Simd<typename Op::Number>::kWidth,
          Op::kStretch,
          Op::kMostTerms,
          sizeof(typename Op::Element)};
}

}  // namespace WSCL_ISA
}  // namespace wscl
