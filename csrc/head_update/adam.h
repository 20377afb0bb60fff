// One element of AdamW and its stochastic rounding, for GPUs and CPUs. In float every product that meets a sum is a
// written fma and every other operation is rounded as IEEE wants it: so the bits are the same everywhere.
#pragma once
#include <cmath>

#include "common/exact.h"
#include "common/philox.h"
#include "head_update/head_update.h"

namespace pyml {

static PYML_HD double fused_once(double a, double b, double c) { return fma(a, b, c); }
static PYML_HD double rounded_product(double a, double b) { return a * b; }
static PYML_HD float square_root(float a) { return sqrtf(a); }
static PYML_HD double square_root(double a) { return sqrt(a); }

template <class T>
struct AdamNumbers {
  T decay, to_grad, kept, to_square, root, eps, rate;
  static PYML_HD AdamNumbers of(const AdamStep& s) {
    return {T(s.decay), T(s.to_grad), T(s.kept), T(s.to_square), T(s.root), T(s.eps), T(s.rate)};
  }
};

template <class T>
static PYML_HD void adam(const AdamNumbers<T>& s, T& p, T g, T& m, T& v) {
  // From the nearer end, as torch's lerp: with beta1 = 0 all of an old m goes, however large.
  m = s.to_grad < T(0.5) ? fused_once(s.to_grad, g - m, m) : fused_once(s.to_grad - T(1), g - m, g);
  v = fused_once(rounded_product(s.to_square, g), g, rounded_product(s.kept, v));
  p = fused_once(s.rate, m / fused_once(square_root(v), s.root, s.eps), rounded_product(s.decay, p));
}

// What a step starts from: the master as long as it rounds to the parameter, else the parameter, which something else
// has written to then. A NaN in either is no such rounding.
template <class T>
static PYML_HD T start_of(T master, T rounded, T param) {
  return rounded == param ? master : param;
}

constexpr uint32_t kSmallestHalf = 0x38800000u;  // bits of 2^-14, below which halves are denormal

// x, rounded up or down to a number of the 16-bit dtype by the low bits of a random word.
static PYML_HD float stochastic(float x, uint32_t word, DType to) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
  if (size >= 0x7f800000u) return x;
  if (to == DType::kBFloat16) return float_of((bits + (word & 0xffffu)) & 0xffff0000u);
  const uint32_t low = word & 0x1fffu;
  if (size >= kSmallestHalf) return float_of(sign | ((size + low) & 0x7fffe000u));
  const uint32_t steps = (uint32_t(float_of(size) * 0x1p37f) + low) >> 13;  // of 2^-24
  return float_of(sign | bits_of(float(steps) * 0x1p-24f));
}
static PYML_HD bool rounds(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kHalf; }

}  // namespace pyml
