// What the kernels of the family share: log2, the matrices and weights of a problem, limits of the fast scalings.
#pragma once
#include <cfloat>
#include <initializer_list>

#include "batched_ot/batched_ot.h"
#include "common/exp2_cpu.h"
#include "common/rows_cpu.h"
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

// Matrix q of a batch as rows, or its transpose.
inline Rows matrix(const Costs& c, int64_t q, bool transposed = false) {
  const int64_t size = c.dtype == DType::kDouble ? 8 : c.dtype == DType::kFloat ? 4 : 2;
  Rows r;
  r.data = static_cast<char*>(c.data) + c.offsets[q] * size;
  r.dtype = c.dtype;
  r.width = std::numeric_limits<int64_t>::max();
  r.stride_w = transposed ? c.stride_m : c.stride_n;
  r.stride_c = transposed ? c.stride_n : c.stride_m;
  return r;
}

// log2 of positive normal numbers: exponent, and the series of log((1 + s) / (1 - s)) for the rest in
// [sqrt(1/2), sqrt(2)]; the first term left out is below a quarter ulp.
template <class T>
PYML_INLINE Vec<T> log2_fast(const std::common_type_t<Vec<T>>& x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kMantissa = kFloat ? 23 : 52, kTerms = kFloat ? 5 : 11;
  constexpr Int<T> kBias = kFloat ? 127 : 1023, kOne = kBias << kMantissa;
  const IVec<T> bits = (IVec<T>)x;
  IVec<T> exponent = (bits >> kMantissa) - kBias;
  Vec<T> m = (Vec<T>)((bits & ((Int<T>(1) << kMantissa) - 1)) | kOne);
  const IVec<T> high = m > T(1.4142135623730950488);
  m = high ? m * T(0.5) : m;
  exponent -= high;  // a true comparison is -1
  const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  Vec<T> p = splat<T>(T(2.8853900817779268147 / (2 * kTerms - 1)));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) p = p * s2 + T(2.8853900817779268147 / (2 * k + 1));
  return __builtin_convertvector(exponent, Vec<T>) + p * s;
}

template <class T>
struct StoredTypes {
  typedef T V __attribute__((vector_size(kVecBytes / 2)));
};
// As many doubles as a vector holds, from T and to T.
template <class T>
using Stored = typename std::conditional_t<std::is_same_v<T, double>, VecTypes<double>, StoredTypes<T>>::V;
template <class T>
PYML_INLINE Vec<double> widened(const T* from) {
  Stored<T> part;
  std::memcpy(&part, from, sizeof part);
  return __builtin_convertvector(part, Vec<double>);
}
template <class T>
PYML_INLINE void narrowed(const Vec<double>& v, T* to) {
  const Stored<T> part = __builtin_convertvector(v, Stored<T>);
  std::memcpy(to, &part, sizeof part);
}

template <class T>
PYML_INLINE bool any(const std::common_type_t<IVec<T>>& mask) {
  Int<T> all = 0;
  for (int l = 0; l < kLanes<T>; ++l) all |= mask[l];
  return all != 0;
}

// The scalings u, v of a fixed matrix E are trusted within 2^+-kHard: what E loses below 2^kFlush is then beyond the
// precision of a sum. In unbalanced problems a scaling hides how small its sum was: sums are held to the same limit
// there. Scalings beyond 2^+-kSoft are put into the potentials and E is made again. Products stay above the
// smallest normal number, below which arithmetic is slow.
template <class T>
constexpr T kSoft = std::is_same_v<T, float> ? T(0x1p24) : T(0x1p240);
template <class T>
constexpr T kHard = std::is_same_v<T, float> ? T(0x1p34) : T(0x1p300);
template <class T>
constexpr T kFlush = std::is_same_v<T, float> ? T(-96) : T(-800);
// The smallest and largest scaling of each lane. A NaN may get lost in here, but it is in all of the scalings that
// follow it.
template <class T>
struct Range {
  Vec<T> low = splat<T>(T(1)), high = splat<T>(T(1));
  PYML_INLINE void see(const Vec<T>& scaling) {
    low = min<T>(low, scaling);
    high = max<T>(high, scaling);
  }
  PYML_INLINE IVec<T> beyond(T limit) const { return ~((high <= limit) & (low >= 1 / limit)); }
};

// exp of a number in units of log2 that should not be far above 0.
template <class T>
PYML_INLINE Vec<T> exp2_bounded(const std::common_type_t<Vec<T>>& x) {
  return exp2_fast<T>(min<T>(splat<T>(std::is_same_v<T, float> ? T(120) : T(1000)), x));
}

// The same for entries of E: nothing below 2^kFlush.
template <class T>
PYML_INLINE Vec<T> exp2_flushed(const std::common_type_t<Vec<T>>& x) {
  return x < kFlush<T> ? Vec<T>{} : exp2_bounded<T>(x);
}

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr double kSmallest = FLT_MIN;  // a weight below it counts as zero

// Weights of the rows or columns of one problem, zeros up to `padded`; what they add up to and whether they are
// weights.
template <class T>
struct Mass {
  double sum = 0;
  bool any = false, bad = false;
};
template <class T, int kStep = 1>
inline Mass<T> weights(const T* given, int64_t n, T* to, int64_t padded) {
  Mass<T> mass;
  for (int64_t i = n; i < padded; ++i) to[i * kStep] = 0;
  if (!given) {
    const T w = T(1) / T(n);
    int64_t i = 0;
    for (; kStep == 1 && i + kLanes<T> <= n; i += kLanes<T>) store<T>(to + i, splat<T>(w));
    for (; i < n; ++i) to[i * kStep] = w;
    mass.sum = 1;
    mass.any = true;
    return mass;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T w = given[i];
    const bool live = !(std::fabs(double(w)) < kSmallest);
    mass.bad |= live && !(w > 0 && w <= std::numeric_limits<T>::max());
    mass.any |= live;
    to[i * kStep] = live ? w : T(0);
    mass.sum += double(to[i * kStep]);
  }
  return mass;
}
// Whether the potentials to start from are numbers wherever something counts; weights lie `step` apart.
template <class T>
inline bool sound_start(const T* init, const T* w, int64_t n, int64_t step = 1) {
  bool all = true;
  for (int64_t j = 0; j < n; ++j) all &= w[j * step] == 0 || bool(std::isfinite(init[j]));
  return all;
}
template <class T>
inline bool unequal(const SinkhornParams<T>& p, const Mass<T>& a, const Mass<T>& b) {
  const double larger = a.sum > b.sum ? a.sum : b.sum;
  return !p.unbalanced && std::fabs(a.sum - b.sum) > double(p.mass_tolerance) * larger;
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
