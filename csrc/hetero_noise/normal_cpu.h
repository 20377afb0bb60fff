// Standard normals of one block of 64 elements, a vector at a time. The same operations in the same order as normal.h.
#pragma once
#include "common/philox_cpu.h"
#include "hetero_noise/normal.h"

namespace pyml {
namespace CPU_CAPABILITY {

using F32 = Vec<float>;

PYML_INLINE F32 once(F32 a, F32 b, F32 c) {  // rounded once on every CPU, also where that takes a function
#if defined(CPU_CAPABILITY_AVX512)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(CPU_CAPABILITY_AVX2)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  F32 found;
  for (int i = 0; i < kFloats; ++i) found[i] = std::fma(a[i], b[i], c[i]);
  return found;
#endif
}
PYML_INLINE F32 once(F32 a, F32 b, float c) { return once(a, b, splat<float>(c)); }

PYML_INLINE F32 root(F32 v) {
#if defined(CPU_CAPABILITY_AVX512)
  return (F32)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
#elif defined(CPU_CAPABILITY_AVX2)
  return (F32)_mm256_sqrt_ps((__m256)v);
#else
  F32 found;
  for (int i = 0; i < kFloats; ++i) found[i] = std::sqrt(v[i]);
  return found;
#endif
}

PYML_INLINE F32 radius_of_words(U32 w) {
  constexpr float terms[] = PYML_NORMAL_LOG;
  const F32 d = once(__builtin_convertvector((IVec<float>)w, F32), splat<float>(0x1p-32f), 0x1p-33f);
  const auto above = (IVec<float>)w < 0;  // u >= 1/2: d is u - 1
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 below = _mm512_knot(_mm512_movepi32_mask((__m512i)w));
  const F32 e = (F32)_mm512_maskz_add_ps(below, _mm512_maskz_getexp_ps(below, (__m512)d), _mm512_set1_ps(1.0f));
  const __m512 m = _mm512_maskz_getmant_ps(below, (__m512)d, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_zero);
  const F32 z = (F32)_mm512_mask_sub_ps((__m512)d, below, m, _mm512_set1_ps(1.0f));
  (void)above;
#else
  const IVec<float> bits = (IVec<float>)d;
  const F32 exponent = __builtin_convertvector((bits >> 23) - 126, F32);
  const F32 mantissa = (F32)((bits & 0x7fffff) | 0x3f000000) - 1.0f;
  const F32 z = above ? d : mantissa, e = above ? F32{} : exponent;
#endif
  F32 h = splat<float>(terms[0]);
#pragma GCC unroll 12
  for (int i = 1; i < kNormalLogTerms; ++i) h = once(h, z, terms[i]);
  return root(once(z, once(z, h, -2.0f), e * kMinusTwoLn2));
}

PYML_INLINE void turn_words(U32 w, F32 r, F32* first, F32* second) {
  constexpr float s_terms[] = PYML_NORMAL_SIN, c_terms[] = PYML_NORMAL_COS;
  const F32 x = __builtin_convertvector((IVec<float>)(w << 2), F32) * kAngle, x2 = x * x;
  F32 s = once(once(splat<float>(s_terms[0]), x2, s_terms[1]), x2, s_terms[2]);
  s = once(s * x2, x, x);
  F32 c = once(once(splat<float>(c_terms[0]), x2, c_terms[1]), x2, c_terms[2]);
  c = once(once(c, x2, -0.5f), x2, 1.0f);
  c = (F32)((U32)c ^ (w & 0x80000000u));
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 swap = _mm512_test_epi32_mask((__m512i)w, _mm512_set1_epi32(1 << 30));
  *first = r * (F32)_mm512_mask_blend_ps(swap, (__m512)c, (__m512)s);
  *second = r * (F32)_mm512_mask_blend_ps(swap, (__m512)s, (__m512)c);
#else
  const auto swap = (IVec<float>)(w << 1) < 0;
  *first = r * (swap ? s : c);
  *second = r * (swap ? c : s);
#endif
}

// Whether a lane of either vector is below kRefineBelow.
PYML_INLINE bool any_in_tail(U32 a, U32 b) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i low = _mm512_maskz_min_epu32(__mmask16(-1), (__m512i)a, (__m512i)b);
  return _mm512_cmplt_epu32_mask(low, _mm512_set1_epi32(kRefineBelow)) != 0;
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i low = _mm256_min_epu32((__m256i)a, (__m256i)b);
  const __m256i rest = _mm256_srli_epi32(low, 8);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(rest, _mm256_setzero_si256())) != 0;
#else
  bool any = false;
  for (int i = 0; i < kFloats; ++i) any |= a[i] < kRefineBelow || b[i] < kRefineBelow;
  return any;
#endif
}

// Those lanes again, with 32 bits more.
__attribute__((noinline, cold)) inline void refine(uint64_t key, int64_t block, int lane, uint32_t id, uint32_t step,
                                                   float* z) {
  for (int i = 0; i < kFloats; ++i) {
    float four[4];
    four_normals<float>(key, block, lane + i, id, step, four);
    for (int j = 0; j < 4; ++j) z[j * kFloats + i] = four[j];
  }
}

// Where the random numbers of a tensor at a step come from.
struct Source {
  uint64_t key;
  uint32_t id, step;
  Stream stream;
  Source(uint64_t key, int64_t block, uint32_t id, uint32_t step)
      : key(key), id(id), step(step), stream(key, uint32_t(block >> 28), id, step) {}
};

// kFloats lanes of a block's counters.
constexpr int kGroups = 16 / kFloats;
struct Group {
  int64_t block;
  int lane;
  PYML_INLINE explicit Group(int64_t number) : block(number / kGroups), lane(int(number % kGroups) * kFloats) {}
};

// The normals of kCount groups from `group` on: z[4 k + j] belongs to the elements 64 block + 16 j + lane of group k.
// One group waits for its own chain of products half of the time; two at once take a fifth less.
template <int kCount>
PYML_INLINE void normals(const Source& from, int64_t group, F32 z[4 * kCount]) {
  U32 w[kCount][4];
  bool tail = false;
#pragma GCC unroll 2
  for (int k = 0; k < kCount; ++k) {
    const Group g(group + k);
    from.stream.words(uint32_t(uint64_t(g.block) * 16) + uint32_t(g.lane), w[k]);
  }
#pragma GCC unroll 2
  for (int pair = 0; pair < 4; pair += 2)
#pragma GCC unroll 2
    for (int k = 0; k < kCount; ++k)
      turn_words(w[k][pair + 1], radius_of_words(w[k][pair]), &z[4 * k + pair], &z[4 * k + pair + 1]);
#pragma GCC unroll 2
  for (int k = 0; k < kCount; ++k) tail |= any_in_tail(w[k][0], w[k][2]);
  if (__builtin_expect(tail, 0))
    for (int k = 0; k < kCount; ++k) {
      float again[4 * kFloats];
      const Group g(group + k);
      refine(from.key, g.block, g.lane, from.id, from.step, again);
      for (int j = 0; j < 4; ++j) z[4 * k + j] = load<float>(again + j * kFloats);
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
