// Short stretches of a strided tensor, in row-major order, in and out of plain memory.
#pragma once
#include "common/rows_cpu.h"
#include "common/strided.h"

namespace pyml {
namespace CPU_CAPABILITY {

// f(offset in elements) for each of the elements [i0, i0 + n).
template <class F>
inline void walk(const Elements& e, const int64_t* strides, int64_t i0, int64_t n, F&& f) {
  int64_t place[kStridedDims] = {}, at = 0, rest = i0;
  for (int d = e.dims - 1; d >= 0; --d) {
    place[d] = rest % e.sizes[d];
    rest /= e.sizes[d];
    at += place[d] * strides[d];
  }
  for (int64_t i = 0; i < n; ++i) {
    f(at);
    for (int d = e.dims - 1; d >= 0; --d) {
      at += strides[d];
      if (++place[d] < e.sizes[d]) break;
      at -= strides[d] * e.sizes[d];
      place[d] = 0;
    }
  }
}

inline bool plain(const Elements& e, const Strided& s) { return e.dims <= 1 && (e.dims == 0 || s.strides[0] == 1); }

// Where the elements from i0 on lie, if they lie as T one after the other; else null.
template <class T>
inline T* direct(const Elements& e, const Strided& s, int64_t i0) {
  const bool same = s.dtype == (sizeof(T) == 4 ? DType::kFloat : DType::kDouble);
  return same && plain(e, s) ? static_cast<T*>(s.data) + i0 : nullptr;
}

template <class T>
inline void gather(const Elements& e, const Strided& s, int64_t i0, int64_t n, T* dst) {
  by_dtype(s.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* src = static_cast<const S*>(s.data);
    if (plain(e, s))
      for (int64_t i = 0; i < n; ++i) dst[i] = T(widen(src[i0 + i]));
    else
      walk(e, s.strides, i0, n, [&](int64_t at) { *dst++ = T(widen(src[at])); });
  });
}

template <class T>
inline void scatter(const Elements& e, const Strided& s, int64_t i0, int64_t n, const T* src) {
  by_dtype(s.dtype, [&](auto tag) {
    using S = decltype(tag);
    S* dst = static_cast<S*>(s.data);
    if (plain(e, s))
      for (int64_t i = 0; i < n; ++i) dst[i0 + i] = narrow<S>(src[i]);
    else
      walk(e, s.strides, i0, n, [&](int64_t at) { dst[at] = narrow<S>(*src++); });
  });
}

// The tensor that a block belongs to, among tensors with their `begin`.
template <class Tensor>
inline const Tensor* tensor_of(const Tensor* tensors, int64_t count, int64_t block) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (tensors[middle].begin <= block ? low : high) = middle;
  }
  return tensors + low;
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
