// log(1 + e^t) and its derivative, both from one exponential, in vectors of T (included as simd.h is).
#pragma once

#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

// log(1 + e) / e on [0, 1], interpolated at Chebyshev's nodes.
template <class T>
struct LogOnePlus;

template <>
struct LogOnePlus<float> {  // relative error 5e-9 before rounding
  static constexpr int kDegree = 9;
  static constexpr float kCoefficients[kDegree + 1] = {
      0.9999999946562919754f, -0.49999892648063278673f,  0.33329710498917748649f, -0.24951616262872074329f,
      0.1966327425720480527f, -0.15269667074363287768f,  0.10543623795419526143f, -0.056373612830107328154f,
      0.0195425272610141015f, -0.0031760570184319596946f};
};

template <>
struct LogOnePlus<double> {  // relative error 2e-18 before rounding
  static constexpr int kDegree = 21;
  static constexpr double kCoefficients[kDegree + 1] = {
      0.99999999999999999829,     -0.49999999999999833902,   0.33333333333306460695,
      -0.249999999982648114,      0.1999999994034981464,     -0.16666665403691092447,
      0.14285696309567309626,     -0.1249981776951395388,    0.11109740896460193256,
      -0.099921278217600168255,   0.090555675155907330957,   -0.082071636804374289723,
      0.073290152555349543793,    -0.062887546707831462656,  0.050077423953917040277,
      -0.035530525401441245436,   0.021511022653356974242,   -0.010614696363585529783,
      0.0040478098934675120205,   -0.0011093809681700343293, 0.00019330794553431145575,
      -0.000016020216725538193085};
};

template <class T>
struct Softplus {
  Vector<T> value, slope;  // log(1 + e^t) and 1 / (1 + e^−t)
};

// Of t = ln 2 · x; 0 and 0 for x = −∞, NaN for NaN.
template <class T>
WSCL_INLINE Softplus<T> softplus(Vector<T> x) {
  using P = LogOnePlus<T>;
  const Vector<T> one = broadcast<T>(1), zero = Vector<T>{};
  const Vector<T> e = exp2<T>(x > zero ? -x : x);  // in [0, 1]
  Vector<T> p = broadcast<T>(P::kCoefficients[P::kDegree]);
#pragma GCC unroll 32
  for (int k = P::kDegree - 1; k >= 0; --k) p = p * e + broadcast<T>(P::kCoefficients[k]);
  const Vector<T> inverse = one / (one + e);
  Softplus<T> result;
  result.value = p * e + (x > zero ? x : zero) * broadcast<T>(T(0.69314718055994530942));
  result.slope = (x > zero ? one : e) * inverse;
  return result;
}

}  // namespace WSCL_ISA
}  // namespace wscl
