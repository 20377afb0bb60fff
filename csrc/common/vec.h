// Vectors for the CPU kernels: GCC/Clang vector types as wide as the instruction set this file is compiled for, so that
// one source serves AVX-512, AVX2 and everything else. Arithmetic is the plain operators (a * b + c becomes one FMA).
// Everything lives in a namespace named after the instruction set: no two variants may share a symbol.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Small pieces of kernels must not become calls: a call spills every accumulator.
#define PYML_INLINE inline __attribute__((always_inline))

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY DEFAULT
#endif

namespace pyml {
namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVecBytes = 64;
constexpr int kRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVecBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVecBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef int32_t I __attribute__((vector_size(kVecBytes)));
  using Int = int32_t;
};
template <>
struct VecTypes<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef int64_t I __attribute__((vector_size(kVecBytes)));
  using Int = int64_t;
};
template <class T>
using Vec = typename VecTypes<T>::V;
template <class T>
using IVec = typename VecTypes<T>::I;
template <class T>
using Int = typename VecTypes<T>::Int;
template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T>
PYML_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, kVecBytes);
  return v;
}
template <class T>
PYML_INLINE IVec<T> load_int(const Int<T>* p) {
  IVec<T> v;
  std::memcpy(&v, p, kVecBytes);
  return v;
}
template <class T>
PYML_INLINE void store(T* p, const std::common_type_t<Vec<T>>& v) {
  std::memcpy(p, &v, kVecBytes);
}
template <class T>
PYML_INLINE void store_int(Int<T>* p, const std::common_type_t<IVec<T>>& v) {
  std::memcpy(p, &v, kVecBytes);
}
template <class T>
PYML_INLINE Vec<T> splat(T x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm512_set1_ps(x);
  else
    return (Vec<T>)_mm512_set1_pd(x);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm256_set1_ps(x);
  else
    return (Vec<T>)_mm256_set1_pd(x);
#else
  return x - Vec<T>{};  // not a loop over lanes: GCC makes a chain of masked moves of it
#endif
}
// The smaller and the larger, one instruction each; `b` where either is NaN. Masked by all ones: GCC 12 warns of the
// plain intrinsic.
template <class T>
PYML_INLINE Vec<T> min(const std::common_type_t<Vec<T>>& a, const std::common_type_t<Vec<T>>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
template <class T>
PYML_INLINE Vec<T> max(const std::common_type_t<Vec<T>>& a, const std::common_type_t<Vec<T>>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>)
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class T>
PYML_INLINE T sum(const std::common_type_t<Vec<T>>& v) {
  T part[kLanes<T>];
  std::memcpy(part, &v, kVecBytes);
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Integer part towards minus infinity, for values known to be small.
template <class T>
PYML_INLINE IVec<T> floor_int(const std::common_type_t<Vec<T>>& v) {
  IVec<T> i = __builtin_convertvector(v, IVec<T>);
  return i + (__builtin_convertvector(i, Vec<T>) > v);  // a true comparison is -1
}

// table[index] for indices below `size`, a table of at least 32 readable entries: a register permute where it fits.
template <class T>
PYML_INLINE Vec<T> lookup(const T* table, const std::common_type_t<IVec<T>>& index, int size) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i i = (__m512i)index;
    if (size <= 16) return (Vec<T>)_mm512_permutexvar_ps(i, _mm512_loadu_ps(table));
    if (size <= 32) return (Vec<T>)_mm512_permutex2var_ps(_mm512_loadu_ps(table), i, _mm512_loadu_ps(table + 16));
    return (Vec<T>)_mm512_i32gather_ps(i, table, 4);
  } else {
    const __m512i i = (__m512i)index;
    if (size <= 8) return (Vec<T>)_mm512_permutexvar_pd(i, _mm512_loadu_pd(table));
    if (size <= 16) return (Vec<T>)_mm512_permutex2var_pd(_mm512_loadu_pd(table), i, _mm512_loadu_pd(table + 8));
    return (Vec<T>)_mm512_i64gather_pd(i, table, 8);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<T>)_mm256_i32gather_ps(table, (__m256i)index, 4);
  } else {
    return (Vec<T>)_mm256_i64gather_pd(table, (__m256i)index, 8);
  }
#else
  Vec<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = table[index[l]];
  return v;
#endif
}

// Interleave two vectors of floats within each group of four lanes: single lanes (a0 b0 a1 b1) or pairs (a0 a1 b0 b1).
#if defined(CPU_CAPABILITY_AVX512)
#define PYML_INTERLEAVE(name, type, op)                                             \
  PYML_INLINE VecTypes<float>::V name(VecTypes<float>::V a, VecTypes<float>::V b) { \
    return (VecTypes<float>::V)_mm512_##op((type)a, (type)b);                       \
  }
PYML_INTERLEAVE(interleave_low, __m512, unpacklo_ps)
PYML_INTERLEAVE(interleave_high, __m512, unpackhi_ps)
PYML_INTERLEAVE(interleave_low_pairs, __m512d, unpacklo_pd)
PYML_INTERLEAVE(interleave_high_pairs, __m512d, unpackhi_pd)
#elif defined(CPU_CAPABILITY_AVX2)
#define PYML_INTERLEAVE(name, type, op)                                             \
  PYML_INLINE VecTypes<float>::V name(VecTypes<float>::V a, VecTypes<float>::V b) { \
    return (VecTypes<float>::V)_mm256_##op((type)a, (type)b);                       \
  }
PYML_INTERLEAVE(interleave_low, __m256, unpacklo_ps)
PYML_INTERLEAVE(interleave_high, __m256, unpackhi_ps)
PYML_INTERLEAVE(interleave_low_pairs, __m256d, unpacklo_pd)
PYML_INTERLEAVE(interleave_high_pairs, __m256d, unpackhi_pd)
#endif

// 1 / v, within 2 ulp: dividing 16 floats at once costs more than an estimate and one Newton step.
template <class T>
PYML_INLINE Vec<T> reciprocal(const std::common_type_t<Vec<T>>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const Vec<T> r = (Vec<T>)_mm512_rcp14_ps((__m512)v);
    return r + r * (T(1) - v * r);
  }
#endif
  return T(1) / v;
}

template <class T>
constexpr T kExpLow = std::is_same_v<T, float> ? T(-87) : T(-708);

// exp by range reduction to |r| <= ln2 / 2 and a Taylor polynomial whose remainder is below half an ulp. Clamped so
// that the scale stays a normal number; NaN passes.
template <class T>
PYML_INLINE Vec<T> exp(std::common_type_t<Vec<T>> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr T kLow = kExpLow<T>, kHigh = kFloat ? T(88) : T(709);
  constexpr T kMagic =
      kFloat ? T(12582912) : T(6755399441055744.0);  // 1.5 * 2^mantissa: adding it rounds to an integer
  constexpr T kLn2High = kFloat ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T kLn2Low = kFloat ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  x = min<T>(splat<T>(kHigh), max<T>(splat<T>(kLow), x));
  const Vec<T> shifted = x * T(1.4426950408889634) + kMagic;
  const Vec<T> n = shifted - kMagic;
  Vec<T> r = x - n * kLn2High;
  r = r - n * kLn2Low;
  constexpr int kDegree = kFloat ? 7 : 13;
  constexpr double kInverse[14] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  Vec<T> p = splat<T>(T(kInverse[kDegree]));
#pragma GCC unroll 16
  for (int d = kDegree - 1; d >= 0; --d) p = p * r + T(kInverse[d]);
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr Int<T> kBias = kFloat ? 127 : 1023;
  const IVec<T> exponent = (IVec<T>)shifted - (IVec<T>)splat<T>(kMagic) + kBias;
  return p * (Vec<T>)(exponent << kMantissa);
}

// dst[c][r] = src[r][c] for `rows` rows and `columns` columns, at most kLanes each; strides in elements. Nothing else
// is read or written.
template <class T, bool kWhole>
PYML_INLINE void transpose_part(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int rows, int columns) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512 r[16], t[16];
    const __mmask16 in = kWhole ? __mmask16(-1) : __mmask16((1u << columns) - 1);
    const __mmask16 out = kWhole ? __mmask16(-1) : __mmask16((1u << rows) - 1);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = kWhole || i < rows ? _mm512_maskz_loadu_ps(in, src + i * src_stride) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1], c = (__m512d)t[4 * i + 2],
                    d = (__m512d)t[4 * i + 3];
      r[4 * i] = (__m512)_mm512_unpacklo_pd(a, c);
      r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, c);
      r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(b, d);
      r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    auto put = [&](int i, __m512 v) {
      if (kWhole || i < columns) _mm512_mask_storeu_ps(dst + i * dst_stride, out, v);
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      put(i, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
      put(i + 8, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
      put(i + 4, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
      put(i + 12, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
    }
    return;
  }
#endif
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}
template <class T>
PYML_INLINE void transpose_tile(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int rows = kLanes<T>,
                                int columns = kLanes<T>) {
  if (rows == kLanes<T> && columns == kLanes<T>)
    transpose_part<T, true>(src, src_stride, dst, dst_stride, kLanes<T>, kLanes<T>);
  else
    transpose_part<T, false>(src, src_stride, dst, dst_stride, rows, columns);
}

// Lane i = the sum of vector i, of kLanes vectors in a row: a tree that halves their number in each step.
template <class T>
PYML_INLINE Vec<T> sum_each(const T* part) {
  constexpr int L = kLanes<T>;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    Vec<T> v[L / 4];
#pragma GCC unroll 4
    for (int q = 0; q < L / 4; ++q) {
      const T* four = part + q * 4 * L;
      const Vec<T> a = load<T>(four), b = load<T>(four + L), c = load<T>(four + 2 * L), d = load<T>(four + 3 * L);
      const Vec<T> ab = interleave_low(a, b) + interleave_high(a, b), cd = interleave_low(c, d) + interleave_high(c, d);
      v[q] = interleave_low_pairs(ab, cd) + interleave_high_pairs(ab, cd);  // a b c d in each group of four lanes
    }
#if defined(CPU_CAPABILITY_AVX512)
    auto groups = [](Vec<T> a, Vec<T> b) {
      return (Vec<T>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
             (Vec<T>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
    };
    return groups(groups(v[0], v[1]), groups(v[2], v[3]));
#else
    return (Vec<T>)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x20) +
           (Vec<T>)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x31);
#endif
  }
#endif
  T flipped[L * L];
  transpose_tile<T>(part, L, flipped, L);
  Vec<T> total = load<T>(flipped);
  for (int l = 1; l < L; ++l) total += load<T>(flipped + l * L);
  return total;
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
