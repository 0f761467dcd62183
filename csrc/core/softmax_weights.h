// Softmaxes over the same logits as a pass takes their gradients: grad_i p_ij = weight_i · 2^(logit_ij −
// shift_i).
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "similarity.h"

namespace wscl {

// Base-2 statistics of one softmax, and the gradient that reaches its logarithm.
struct Softmax {
  double max = -kInfinity, sum = 0, grad = 0;

  bool empty() const {
    return sum == 0;
  }
  // The sum over other logits joins in.
  void add(double other_max, double other_sum) {
    if (other_sum == 0) return;
    const double top = std::max(max, other_max);
    sum = (empty() ? 0 : sum * std::exp2(max - top)) + other_sum * std::exp2(other_max - top);
    max = top;
  }
};

// One shift for all of them, so that one exponential serves a row and a column; false if their log-sum-exps lie
// too far apart for it.
template <class T>
bool find_common_shift(std::initializer_list<const std::vector<Softmax>*> sides, T* shift) {
  constexpr double kSafeRange = sizeof(T) == sizeof(float) ? 60 : 500;  // log2 of the spread of the weights
  double low = kInfinity, high = -kInfinity;
  for (const std::vector<Softmax>* side : sides)
    for (const Softmax& softmax : *side) {
      if (softmax.empty()) continue;
      const double lse = softmax.max + std::log2(softmax.sum);
      low = std::min(low, lse);
      high = std::max(high, lse);
    }
  if (!(low <= high && high - low <= kSafeRange)) return false;
  *shift = static_cast<T>(high);
  return true;
}

// Of every softmax, under its own shift or under the common one; zero where nothing was met.
template <class T>
struct SoftmaxWeights {
  std::vector<T> shift, weight;

  SoftmaxWeights(const std::vector<Softmax>& softmaxes, const T* common)
      : shift(softmaxes.size()), weight(softmaxes.size()) {
    for (size_t i = 0; i < softmaxes.size(); ++i) {
      const Softmax& s = softmaxes[i];
      if (s.empty()) continue;
      shift[i] = common ? *common : static_cast<T>(s.max);
      weight[i] = static_cast<T>(s.grad / s.sum * (common ? std::exp2(*common - s.max) : 1));
    }
  }
};

// The pass sends both sides' softmaxes to the rows (and the columns). `of_rows` and `of_columns` outlive it.
template <class In, class T = Compute<In>>
void set_softmaxes(SimilarityParams<In>& pass, const SoftmaxWeights<T>& of_rows,
                   const SoftmaxWeights<T>& of_columns, const T* common) {
  pass.epilogue = common ? Epilogue::kShared : Epilogue::kSymmetric;
  pass.shift = common ? *common : T(0);
  pass.row_shift = of_rows.shift.data();
  pass.row_weight = of_rows.weight.data();
  pass.column_shift = of_columns.shift.data();
  pass.column_weight = of_columns.weight.data();
}

}  // namespace wscl
