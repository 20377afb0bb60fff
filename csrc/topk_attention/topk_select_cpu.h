// Exact selection of the k largest of a row of logits, and lists of what is kept.
//
// A row has no NaN here (its kernel looks first); -inf means masked and is never kept. -0 and +0 are equal, as for `<`.
#pragma once
#include <utility>

#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

// --- lanes as bits --------------------------------------------------------------------------------------------------

enum class Compare { kAbove, kNotBelow, kEqual };

// Bit l: a[l] > b[l], !(a[l] < b[l]) (true for NaN), a[l] == b[l].
template <class T, Compare kind>
PYML_INLINE uint32_t lanes(const std::common_type_t<Vec<T>>& a, const std::common_type_t<Vec<T>>& b) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  constexpr int kHow = kind == Compare::kAbove ? _CMP_GT_OQ : kind == Compare::kNotBelow ? _CMP_NLT_UQ : _CMP_EQ_OQ;
#endif
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, kHow);
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, kHow);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, kHow)));
  else
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, kHow)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<T>; ++l) {
    const bool yes = kind == Compare::kAbove ? a[l] > b[l] : kind == Compare::kNotBelow ? !(a[l] < b[l]) : a[l] == b[l];
    bits |= uint32_t(yes) << l;
  }
  return bits;
#endif
}

// The lanes named by `bits`, side by side, at dst; a whole vector may be written there.
template <class T>
PYML_INLINE void compress(T* dst, const std::common_type_t<Vec<T>>& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(__mmask16(bits), (__m512)v));
  else
    _mm512_storeu_pd(dst, _mm512_maskz_compress_pd(__mmask8(bits), (__m512d)v));
#else
  T part[kLanes<T>];
  store<T>(part, v);
  for (; bits; bits &= bits - 1) *dst++ = part[__builtin_ctz(bits)];
#endif
}

// The same for the numbers first, first + 1, ... of the lanes, or (from) for numbers in memory.
template <class T>
PYML_INLINE void compress_index(int32_t* dst, const int32_t* from, int32_t first, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i v = from ? _mm512_loadu_si512(from) : _mm512_add_epi32(_mm512_set1_epi32(first), lane);
    _mm512_storeu_si512(dst, _mm512_maskz_compress_epi32(__mmask16(bits), v));
  } else {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i v = from ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                           : _mm256_add_epi32(_mm256_set1_epi32(first), lane);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_maskz_compress_epi32(__mmask8(bits), v));
  }
#else
  for (; bits; bits &= bits - 1) {
    const int l = __builtin_ctz(bits);
    *dst++ = from ? from[l] : first + l;
  }
#endif
}

// --- selection ------------------------------------------------------------------------------------------------------

constexpr int64_t kFew = 64;  // numbers that are ranked by comparing all pairs

// Adds 1 in the lanes where a > b.
template <class T>
PYML_INLINE IVec<T> count_above(const std::common_type_t<IVec<T>>& count, const std::common_type_t<Vec<T>>& a,
                                const std::common_type_t<Vec<T>>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)  // in two instructions, where GCC makes three of the line below
    return (IVec<T>)_mm512_mask_add_epi32((__m512i)count, __mmask16(lanes<T, Compare::kAbove>(a, b)), (__m512i)count,
                                          _mm512_set1_epi32(1));
#endif
  return count - (a > b);  // a true comparison is -1
}

// value[i] = the rank[i]-th largest (1 = the largest) of the first n of x, which has kFew entries, -inf beyond n.
template <class T>
void by_rank(const T* x, int64_t n, const int64_t (&rank)[2], T (&value)[2]) {
  constexpr int L = kLanes<T>, V = int(kFew) / L, kAtOnce = V < 4 ? V : 4;
  constexpr T kInf = std::numeric_limits<T>::infinity();
  value[0] = value[1] = kInf;
  for (int v = 0; v < V; v += kAtOnce) {
    Vec<T> own[kAtOnce];
    IVec<T> above[kAtOnce];
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) own[i] = load<T>(x + (v + i) * L), above[i] = IVec<T>{};
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> other = splat<T>(x[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) above[i] = count_above<T>(above[i], other, own[i]);
    }
    for (int which = 0; which < 2; ++which) {
      T best[L];
      Vec<T> least = splat<T>(kInf);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) {
        const Vec<T> in = above[i] < Int<T>(rank[which]) ? own[i] : splat<T>(kInf);
        least = in < least ? in : least;
      }
      store<T>(best, least);
      for (int l = 0; l < L; ++l) value[which] = best[l] < value[which] ? best[l] : value[which];
    }
  }
}

// Two numbers that hold the k-th largest of n > kFew between them, most of the time: taken from an even sample,
// `margin` standard deviations away (0: both are the same).
template <class T>
void sample_pivots(const T* from, int64_t n, int64_t k, double margin, T (&pivot)[2]) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  alignas(64) T sample[kFew];
  for (int64_t i = 0; i < kFew; ++i) sample[i] = from[i * n / kFew];
  const double place = double(k) * double(kFew) / double(n);
  const double away = margin > 0 ? 1.5 + margin * std::sqrt(place * (1 - place / double(kFew))) : 0;
  const int64_t middle = int64_t(place) < 1 ? 1 : int64_t(place);
  const int64_t high = margin > 0 ? int64_t(place - away) : middle,
                low = margin > 0 ? int64_t(place + away) + 1 : middle;
  const int64_t rank[2] = {high < 1 ? 1 : high, low > kFew ? kFew : low};
  by_rank<T>(sample, kFew, rank, pivot);
  if (high < 1) pivot[0] = kInf;
  if (low > kFew) pivot[1] = -kInf;
}

// The k-th largest of n numbers, 1 <= k <= n; -inf may be among them. `work` has 2 * (n + kFew) entries. The numbers
// are narrowed to those between two pivots of a sample until few are left; each pass that misses still excludes some.
template <class T>
T kth_largest(const T* from, int64_t n, int64_t k, T* work) {
  constexpr int L = kLanes<T>;
  constexpr T kInf = std::numeric_limits<T>::infinity();
  T *to = work, *other = work + n + kFew;
  alignas(64) T sample[kFew];
  T pivot[2];
  bool exact = false;  // both pivots the same: always excludes something
  while (n > kFew) {
    sample_pivots<T>(from, n, k, exact ? 0 : 1.8, pivot);
    // In one pass: how many lie above, and a copy of those between (both included).
    const Vec<T> top = splat<T>(pivot[0]), bottom = splat<T>(pivot[1]);
    int64_t above = 0, between = 0, i = 0;
    for (; i + L <= n; i += L) {
      const Vec<T> v = load<T>(from + i);
      const uint32_t over = lanes<T, Compare::kAbove>(v, top), in = lanes<T, Compare::kNotBelow>(v, bottom) & ~over;
      compress<T>(to + between, v, in);
      above += __builtin_popcount(over);
      between += __builtin_popcount(in);
    }
    for (; i < n; ++i) {
      const bool over = from[i] > pivot[0];
      above += over;
      if (!over && from[i] >= pivot[1]) to[between++] = from[i];
    }
    if (k > above && k <= above + between) {
      if (pivot[0] == pivot[1]) return pivot[0];
      exact = between * 2 > n;
      n = between;
      k -= above;
    } else {  // the sample misled: the number lies outside
      const bool over = k <= above;
      int64_t count = 0;
      for (i = 0; i < n; ++i)
        if (over ? from[i] > pivot[0] : from[i] < pivot[1]) to[count++] = from[i];
      if (!over) k -= above + between;
      exact = count * 2 > n;
      n = count;
    }
    from = to;
    std::swap(to, other);
  }
  for (int64_t i = 0; i < kFew; ++i) sample[i] = i < n ? from[i] : -kInf;
  const int64_t rank[2] = {k, k};
  by_rank<T>(sample, n, rank, pivot);
  return pivot[0];
}

// --- lists of what is kept ------------------------------------------------------------------------------------------

// Calls emit(bits, j, place) for each vector of s [0, n): the lanes not below tau (NaN among them), equal ones only up
// to number `cut`; `place` counts those before. s is readable, and -inf, up to a whole vector. `number` gives the
// numbers of the entries, else they are first + j. Returns how many there are.
template <class T, class F>
PYML_INLINE int64_t kept_lanes(const T* s, int64_t n, const int32_t* number, int32_t first, T tau, int32_t cut,
                               F&& emit) {
  constexpr int L = kLanes<T>;
  const Vec<T> least = splat<T>(tau);
  const bool ties = cut != std::numeric_limits<int32_t>::max();
  int64_t place = 0;
  for (int64_t j = 0; j < n; j += L) {
    const Vec<T> v = load<T>(s + j);
    uint32_t bits = lanes<T, Compare::kNotBelow>(v, least);
    if (ties)
      for (uint32_t equal = lanes<T, Compare::kEqual>(v, least); equal; equal &= equal - 1) {
        const int l = __builtin_ctz(equal);
        if ((number ? number[j + l] : first + int32_t(j) + l) > cut) bits &= ~(1u << l);
      }
    emit(bits, j, place);
    place += __builtin_popcount(bits);
  }
  return place;
}

// Where few of many are kept: the places in s [0, n), n a multiple of 64, of what kept_lanes keeps. One branch for 64
// entries is cheaper than a compressed store for each vector.
template <class T>
PYML_INLINE int64_t kept_few(const T* s, int64_t n, int32_t first, T tau, int32_t cut, int32_t* place) {
  constexpr int L = kLanes<T>;
  const Vec<T> least = splat<T>(tau);
  const bool ties = cut != std::numeric_limits<int32_t>::max();
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += 64) {
    uint64_t word = 0, equal = 0;
#pragma GCC unroll 16
    for (int l = 0; l < 64; l += L) word |= uint64_t(lanes<T, Compare::kNotBelow>(load<T>(s + j + l), least)) << l;
    if (ties && word) {
#pragma GCC unroll 16
      for (int l = 0; l < 64; l += L) equal |= uint64_t(lanes<T, Compare::kEqual>(load<T>(s + j + l), least)) << l;
      for (; equal; equal &= equal - 1)
        if (first + int32_t(j) + __builtin_ctzll(equal) > cut) word &= ~(equal & -equal);
    }
    for (; word; word &= word - 1) place[count++] = int32_t(j) + __builtin_ctzll(word);
  }
  return count;
}

// The number of the last tie that is kept when of `n` entries not below tau (numbers ascending) only k may stay.
template <class T>
int32_t last_tie(const T* value, const int32_t* number, int64_t n, T tau, int64_t k) {
  int64_t left = k;
  for (int64_t j = 0; j < n; ++j) left -= value[j] > tau;
  for (int64_t j = 0; j < n; ++j)
    if (value[j] == tau && --left == 0) return number[j];
  return std::numeric_limits<int32_t>::max();
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
