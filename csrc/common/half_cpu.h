// 16-bit floats on a CPU: read as float, written to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};
// The compiler's own type where it has one, which the hardware converts: from Clang 15 on, from GCC 13 on, on x86 also
// in GCC 12.
#if defined(__clang__)
#define PYML_FLOAT16 (__clang_major__ >= 15)
#elif defined(__x86_64__)
#define PYML_FLOAT16 (__GNUC__ >= 12)
#else
#define PYML_FLOAT16 (__GNUC__ >= 13)
#endif
#if PYML_FLOAT16 && defined(__FLT16_MAX__)
using Half = _Float16;
inline float widen(Half v) { return float(v); }
#else
using Half = HalfBits;
#endif

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return as_float(uint32_t(v.bits) << 16); }
inline float widen(HalfBits v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, size = v.bits & 0x7fff;
  const float small = float(int32_t(size)) * 0x1p-24f;                // exact: a denormal half is a normal float
  const uint32_t exponent = size < 0x7c00 ? 112u << 23 : 224u << 23;  // infinity and NaN have the largest one there too
  return as_float(sign | (size < 0x400 ? as_bits(small) : (size << 13) + exponent));
}

template <class To, class T>
inline To narrow(T v) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    const float f = float(v);
    const uint32_t bits = as_bits(f);
    if (f != f) return {uint16_t(0x7fc0)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<To, HalfBits>) {
    const uint32_t bits = as_bits(float(v)), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const uint32_t normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;  // rounds up to infinity too
    const uint32_t small = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);  // an ulp of 1/2 is the smallest half
    const uint32_t finite = size < 0x38800000 ? small : normal;
    return {uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : size >= 0x47800000 ? 0x7c00 : finite))};
  } else {
    return To(v);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
