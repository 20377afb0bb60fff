// 2^x for softmaxes: logits in base 2 (their scale takes the factor log2 e), the largest subtracted. About half the
// work of exp in vec.h.
#pragma once
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

// 2^x for x up to 126 (1022 in double): relative error below 1.2 ulp in float, 1 ulp in double. Below the smallest
// normal numbers it is about 2^-125 (2^-1021), never 0. NaN passes.
template <class T>
PYML_INLINE Vec<T> exp2_fast(std::common_type_t<Vec<T>> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  // Adding 1.5 * 2^mantissa rounds to an integer; the bias on top leaves the exponent's bits where one shift wants
  // them.
  constexpr T kMagic = kFloat ? T(12582912 + 127) : T(6755399441055744.0 + 1023);
  x = max<T>(splat<T>(kFloat ? T(-125) : T(-1021)), x);
  const Vec<T> shifted = x + kMagic;
  const Vec<T> f = x - (shifted - kMagic);  // in [-1/2, 1/2]
  constexpr int kDegree = kFloat ? 6 : 11;
  // Minimax in the relative error of 2^f among those that give 2^0 = 1: 2.6e-9 and 1.8e-17.
  constexpr double kFloatTerms[] = {1.0,
                                    0.6931472149680278995,
                                    0.2402265278288773743,
                                    0.055503105510137971734,
                                    0.0096176929729930623181,
                                    0.0013406643902351759246,
                                    0.00015594678161326619324};
  constexpr double kDoubleTerms[] = {1.0,
                                     0.69314718055994569675,
                                     0.24022650695910098007,
                                     0.055504108664790394552,
                                     0.0096181291076070023796,
                                     0.0013333558153439964747,
                                     0.0001540353044157213033,
                                     0.000015252727385193868197,
                                     1.3215442675329822143e-6,
                                     1.0180647659234138888e-7,
                                     7.0725704128144235096e-9,
                                     4.078071929588336665e-10};
  const double* terms = kFloat ? kFloatTerms : kDoubleTerms;
  Vec<T> p = splat<T>(T(terms[kDegree]));
#pragma GCC unroll 16
  for (int d = kDegree - 1; d >= 0; --d) p = p * f + T(terms[d]);
  return p * (Vec<T>)((IVec<T>)shifted << (kFloat ? 23 : 52));
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
