// Philox in vectors, for counters that differ in their first word alone, which is what one tensor at one step has.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/philox.h"
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

typedef uint32_t U32 __attribute__((vector_size(kVecBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVecBytes)));
constexpr int kFloats = kLanes<float>;

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

// Counters lie in the lower halves of 64-bit lanes, where the products want them; what the upper halves hold is never
// read. The second multiplier's product of round 0 and the first one's of round 1 are the same for all counters, so
// they are made once.
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

}  // namespace CPU_CAPABILITY
}  // namespace pyml
