// Shared by the forward and the backward of region_attention: walking over chosen regions, moving valid keys.
#pragma once
#include "common/rows_cpu.h"
#include "common/vec.h"
#include "topk_attention/topk_attention.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

PYML_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr T kLog2E = T(1.4426950408889634074);

// What a power of 2 gets of a logit less `shift`: exactly 0 where they are equal, and log2 e rounds the difference
// alone.
template <class T>
PYML_INLINE Vec<T> exponent(const std::common_type_t<Vec<T>>& logit, const std::common_type_t<Vec<T>>& shift) {
  return (logit - shift) * kLog2E<T>;
}

// v as a number of its own: a product in it is rounded, whatever it is added to.
template <class T>
PYML_INLINE Vec<T> rounded(std::common_type_t<Vec<T>> v) {
#if defined(CPU_CAPABILITY_AVX512)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// exponent(logit * weight, shift + rest), where the product is not rounded: its error would be one of the probability.
template <class T>
PYML_INLINE Vec<T> weighted_exponent(const std::common_type_t<Vec<T>>& logit, T weight,
                                     const std::common_type_t<Vec<T>>& shift, T rest = 0) {
  const Vec<T> product = rounded<T>(logit * weight), same = rounded<T>(logit);
  const Vec<T> error = same * weight - product;  // one multiply-add, exact; of `logit` it would take the product again
  return ((product - shift) + (error - rest)) * kLog2E<T>;
}

// Calls f(slot, region, weight) for the regions that query region p of (b, h) chose.
template <class T, class F>
inline void for_chosen(const RegionParams<T>& c, int64_t b, int64_t h, int64_t p, const F& f) {
  const int64_t* index = c.index + c.slot(b, h, p, c.index_heads);
  const T* weight = c.weight ? c.weight + c.slot(b, h, p, c.weight_heads) : nullptr;
  const int64_t used = c.chosen(b, h, p);
  for (int64_t j = 0; j < used; ++j)
    if (index[j] >= 0) f(j, index[j], weight ? weight[j] : T(1));
}

// dst[c * ld + i] = column c of row chosen[i], with zeros up to ld; for the valid keys among masked ones.
template <class T>
void gather_columns(const Rows& src, const int32_t* chosen, int64_t n, int64_t columns, T* dst, int64_t ld) {
  by_dtype(src.dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(src.data);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < n; ++i) dst[c * ld + i] = T(widen(from[chosen[i] * src.stride_w + c * src.stride_c]));
      for (int64_t i = n; i < ld; ++i) dst[c * ld + i] = 0;
    }
  });
}

template <class T>
void scatter_columns(const T* src, int64_t ld, const Rows& dst, const int32_t* chosen, int64_t n, int64_t columns) {
  by_dtype(dst.dtype, [&](auto tag) {
    using To = decltype(tag);
    auto* to = static_cast<To*>(dst.data);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < columns; ++c)
        to[chosen[i] * dst.stride_w + c * dst.stride_c] = narrow<To>(src[c * ld + i]);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
