// Standard normals of one block of 64 elements, a vector at a time. The same operations in the same order as normal.h.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/vec.h"
#include "hetero_noise/hetero_noise.h"
#include "hetero_noise/normal.h"

namespace pyml {
namespace CPU_CAPABILITY {

typedef uint32_t U32 __attribute__((vector_size(kVecBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVecBytes)));
using F32 = Vec<float>;
constexpr int kFloats = kLanes<float>;

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

// The product of the lower halves of 64-bit lanes.
PYML_INLINE U64 product(U64 a, U64 b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (U64)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The upper halves of 64-bit lanes in the lower ones. Once as a shift and once as a shuffle: they run on different
// ports.
PYML_INLINE U64 high(U64 p) { return p >> 32; }
PYML_INLINE U64 high_by_shuffle(U64 p) {
#if defined(CPU_CAPABILITY_AVX512)
  return (U64)_mm512_maskz_shuffle_epi32(__mmask16(-1), (__m512i)p, _MM_PERM_DDBB);
#elif defined(CPU_CAPABILITY_AVX2)
  return (U64)_mm256_shuffle_epi32((__m256i)p, 0xf5);
#else
  return p >> 32;
#endif
}

// Philox for counters that differ in their first word alone, which is what one tensor at one step has. Counters lie in
// the lower halves of 64-bit lanes, where the products want them; what the upper halves hold is never read. The second
// multiplier's product of round 0 and the first one's of round 1 are the same for all counters, so they are made once.
class Stream {
 public:
  Stream(uint64_t key, uint32_t high, uint32_t id, uint32_t step) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      k0_[r] = k0, k1_[r] = k1;
      k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    }
    const uint64_t p1 = uint64_t(kPhiloxMultiply1) * id;
    const uint32_t c0 = uint32_t(p1 >> 32) ^ high ^ k0_[0];
    const uint64_t p0 = uint64_t(kPhiloxMultiply0) * c0;
    step_ = step ^ k1_[0];
    c0_ = uint32_t(p1) ^ k0_[1];
    c2_ = uint32_t(p0 >> 32) ^ k1_[1];
    c3_ = uint32_t(p0);
  }

  // The words of the counters first, first + 1, ... in the lanes.
  PYML_INLINE void words(uint32_t first, U32 out[4]) const {
    U64 even = {}, odd;
    for (int i = 0; i < kFloats / 2; ++i) even[i] = uint64_t(2 * i);
    even += uint64_t(first);
    odd = even + uint64_t(1);
    U64 a[4], b[4];
    rounds(even, a);
    rounds(odd, b);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[j] = (U32)((a[j] & uint64_t(0xffffffffu)) | (b[j] << 32));
  }

 private:
  PYML_INLINE void rounds(U64 counter, U64 c[4]) const {
    const U64 m0 = U64{} + uint64_t(kPhiloxMultiply0), m1 = U64{} + uint64_t(kPhiloxMultiply1);
    U64 p0 = product(counter, m0);
    U64 p1 = product(high(p0) ^ step_, m1);
    U64 c0 = high_by_shuffle(p1) ^ c0_, c1 = p1, c2 = p0 ^ c2_, c3 = U64{} + c3_;
#pragma GCC unroll 8
    for (int r = 2; r < kPhiloxRounds; ++r) {
      p0 = product(c0, m0), p1 = product(c2, m1);
      c0 = high_by_shuffle(p1) ^ c1 ^ k0_[r];
      c2 = high(p0) ^ c3 ^ k1_[r];
      c1 = p1, c3 = p0;
    }
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
  }

  uint64_t k0_[kPhiloxRounds], k1_[kPhiloxRounds];
  uint64_t step_, c0_, c2_, c3_;
};

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
