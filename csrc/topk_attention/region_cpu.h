// Shared by the forward and the backward of region_attention: walking over chosen regions, moving valid keys.
#pragma once
#include "common/rows_cpu.h"
#include "common/vec.h"
#include "topk_attention/rounding_cpu.h"
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

// to[r * width + c] = from[r * stride + c] * factor: rows as a region's weight makes them. The products are rounded, as
// those of gathered rows are.
template <class T>
inline void weigh(const T* from, int64_t stride, int64_t rows, int64_t width, T factor, T* to) {
  constexpr int L = kLanes<T>;
  if (stride == width) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += width) {
    if (width < L)
      for (int64_t c = 0; c < width; ++c) to[c] = from[c] * factor;
    else  // the last vector may overlap the one before
      for (int64_t c = 0; c < width; c += L) {
        const int64_t at = least(c, width - L);
        store<T>(to + at, load<T>(from + at) * factor);
      }
  }
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
