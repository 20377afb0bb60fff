// Standard normals of Philox words, one at a time: for GPUs, for double, and for the tail of the vector kernels. In
// float, every product that meets a sum is a written fma and every other operation is rounded as IEEE wants it, so that
// these are the bits of normal_cpu.h. Formula: pyml/reference/hetero_noise.py.
#pragma once
#include <cmath>

#include "common/exact.h"
#include "common/philox.h"

namespace pyml {

constexpr uint64_t kTailKey = 0x9E3779B97F4A7C15ull;  // the key of the refined tail is the key xor this
constexpr uint32_t kRefineBelow = 1u << 8;

// -2 ln(1 + z) = z (-2 + z h(z)) for z in [-1/2, 0]: h, highest power first. Relative error of the whole below 2.4e-8.
#define PYML_NORMAL_LOG                                                            \
  {-2.8290674686e+00f, -3.2791247368e+00f, -2.4173848629e+00f, -3.6188709736e-01f, \
   -5.2737796307e-01f, 4.8736566305e-01f,  -6.6726422310e-01f, 9.9999046326e-01f}
constexpr int kNormalLogTerms = 8;
constexpr float kMinusTwoLn2 = -1.3862943611198906f;
// sin x = x + x^3 s(x^2) and cos x = 1 - x^2 / 2 + x^4 c(x^2) for |x| <= pi / 4, highest power first.
#define PYML_NORMAL_SIN {-1.9515249005e-04f, 8.3321603015e-03f, -1.6666655242e-01f}
#define PYML_NORMAL_COS {2.4438413675e-05f, -1.3887367677e-03f, 4.1666645557e-02f}
constexpr float kAngle = 3.6572951981698e-10f;  // 2 pi / 2^34

// sqrt(-2 ln u), where d is u below 1/2 and u - 1 from there on: near 1 the difference has the digits that u has not.
static PYML_HD float radius_of(float d) {
  const float terms[] = PYML_NORMAL_LOG;
  float z = d, e = 0;
  if (d > 0) {
    const uint32_t bits = bits_of(d);
    e = float(int32_t(bits >> 23) - 126);
    z = float_of((bits & 0x7fffffu) | 0x3f000000u) - 1.0f;
  }
  float h = terms[0];
  PYML_UNROLL
  for (int i = 1; i < kNormalLogTerms; ++i) h = fused_once(h, z, terms[i]);
  return sqrtf(fused_once(z, fused_once(z, h, -2.0f), rounded_product(e, kMinusTwoLn2)));
}
static PYML_HD float radius(uint32_t w) { return radius_of(fused_once(float(int32_t(w)), 0x1p-32f, 0x1p-33f)); }
static PYML_HD float radius_in_tail(uint32_t w, uint32_t more) {
  return radius_of(fused_once(float((uint64_t(w) << 32) | more), 0x1p-64f, 0x1p-65f));
}
static PYML_HD double radius(uint32_t w, double) { return sqrt(-2.0 * log((double(w) + 0.5) * 0x1p-32)); }
static PYML_HD double radius_in_tail(uint32_t w, uint32_t more, double) {
  return sqrt(-2.0 * log((double((uint64_t(w) << 32) | more) + 0.5) * 0x1p-64));
}

// r (cos, sin) of the angle of a word; bit 31 turns the sign of the cosine, bit 30 swaps the two.
static PYML_HD void turn(uint32_t w, float r, float* first, float* second) {
  const float s_terms[] = PYML_NORMAL_SIN, c_terms[] = PYML_NORMAL_COS;
  const float x = rounded_product(float(int32_t(w << 2)), kAngle), x2 = rounded_product(x, x);
  float s = fused_once(fused_once(s_terms[0], x2, s_terms[1]), x2, s_terms[2]);
  s = fused_once(rounded_product(s, x2), x, x);
  float c = fused_once(fused_once(c_terms[0], x2, c_terms[1]), x2, c_terms[2]);
  c = fused_once(fused_once(c, x2, -0.5f), x2, 1.0f);
  c = float_of(bits_of(c) ^ (w & 0x80000000u));
  const bool swap = (w >> 30) & 1;
  *first = rounded_product(r, swap ? s : c);
  *second = rounded_product(r, swap ? c : s);
}
static PYML_HD void turn(uint32_t w, double r, double* first, double* second) {
  const double x = double(int32_t(w << 2)) * 3.6572951981698e-10;
  const double s = sin(x), c = (w >> 31) ? -cos(x) : cos(x);
  const bool swap = (w >> 30) & 1;
  *first = r * (swap ? s : c);
  *second = r * (swap ? c : s);
}

template <class T>
static PYML_HD void four_normals(uint64_t key, int64_t block, int lane, uint32_t id, uint32_t step, T z[4]) {
  const Words plain = block_words(key, block, lane, id, step);
  PYML_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t w = plain.w[2 * pair];
    T r;
    if constexpr (sizeof(T) == 4)
      r = w >= kRefineBelow ? radius(w)
                            : radius_in_tail(w, block_words(key ^ kTailKey, block, lane, id, step).w[2 * pair]);
    else
      r = w >= kRefineBelow ? radius(w, T())
                            : radius_in_tail(w, block_words(key ^ kTailKey, block, lane, id, step).w[2 * pair], T());
    turn(plain.w[2 * pair + 1], r, &z[2 * pair], &z[2 * pair + 1]);
  }
}

}  // namespace pyml
