// Moves blocks between Rows of any dtype and stride and the transposed scratch tiles [column][row] that kernels work
// on.
#pragma once
#include "common/half_cpu.h"
#include "common/rows.h"
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class F>
inline void by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kHalf:
      return f(Half{});
  }
}

// Calls f(first, length, offset) for each stretch of rows [r0, r0 + n) that is contiguous in w.
template <class F>
inline void for_runs(const Rows& rows, int64_t r0, int64_t n, F&& f) {
  for (int64_t done = 0; done < n;) {
    const int64_t left = rows.width - (r0 + done) % rows.width, length = left < n - done ? left : n - done;
    f(done, length, rows.row(r0 + done));
    done += length;
  }
}

// dst[(c - c0) * ld + r] = row r0 + r, column c. The rows up to `ld` beyond n are set to `fill`.
template <class T>
inline void load_columns(const Rows& src, int64_t r0, int64_t n, int64_t c0, int64_t nc, T* dst, int64_t ld,
                         T fill = 0) {
  by_dtype(src.dtype, [&](auto tag) {
    using S = decltype(tag);
    for_runs(src, r0, n, [&](int64_t first, int64_t length, int64_t offset) {
      const S* base = static_cast<const S*>(src.data) + offset;
      int64_t r = 0;
      if constexpr (std::is_same_v<S, T>) {
        constexpr int L = kLanes<T>;
        if (!src.columns && src.stride_c == 1) {  // plain rows: transpose tile by tile
          for (; r + L <= length; r += L) {
            const T* from = base + r * src.stride_w + c0;
            // A block of columns is a line or so of every row, too far apart for the hardware to foresee the next one.
            if (nc < src.stride_w)
              for (int l = 0; l < L; ++l) __builtin_prefetch(from + l * src.stride_w + nc);
            int64_t c = 0;
            for (; c + L <= nc; c += L) transpose_tile<T>(from + c, src.stride_w, dst + c * ld + first + r, ld);
            if (c < nc) transpose_tile<T>(from + c, src.stride_w, dst + c * ld + first + r, ld, L, int(nc - c));
          }
        }
      }
      if (r == length) return;
      for (int64_t c = 0; c < nc; ++c) {
        const S* p = base + src.column(c0 + c);
        T* to = dst + c * ld + first;
        if (src.stride_w == 1)
          for (int64_t i = r; i < length; ++i) to[i] = T(widen(p[i]));
        else
          for (int64_t i = r; i < length; ++i) to[i] = T(widen(p[i * src.stride_w]));
      }
    });
  });
  for (int64_t c = 0; c < nc && n < ld; ++c)
    for (int64_t r = n; r < ld; ++r) dst[c * ld + r] = fill;
}

// Row r0 + r, column c = src[(c - c0) * ld + r]: the inverse of load_columns.
template <class T>
inline void store_columns(const T* src, int64_t ld, const Rows& dst, int64_t r0, int64_t n, int64_t c0, int64_t nc) {
  by_dtype(dst.dtype, [&](auto tag) {
    using D = decltype(tag);
    for_runs(dst, r0, n, [&](int64_t first, int64_t length, int64_t offset) {
      D* base = static_cast<D*>(dst.data) + offset;
      int64_t r = 0;
      if constexpr (std::is_same_v<D, T>) {
        constexpr int L = kLanes<T>;
        if (!dst.columns && dst.stride_c == 1) {
          for (; r + L <= length; r += L) {
            D* to = base + r * dst.stride_w + c0;
            int64_t c = 0;
            for (; c + L <= nc; c += L) transpose_tile<T>(src + c * ld + first + r, ld, to + c, dst.stride_w);
            if (c < nc) transpose_tile<T>(src + c * ld + first + r, ld, to + c, dst.stride_w, int(nc - c));
          }
        }
      }
      if (r == length) return;
      for (int64_t c = 0; c < nc; ++c) {
        D* p = base + dst.column(c0 + c);
        const T* from = src + c * ld + first;
        for (int64_t i = r; i < length; ++i) p[i * dst.stride_w] = narrow<D>(from[i]);
      }
    });
  });
}

// to[c] = from[c]; T is the dtype of computation, one of the two.
template <class T, class From, class To>
PYML_INLINE void copy_row(const From* from, To* to, int64_t n) {
  int64_t c = 0;
  if constexpr (std::is_same_v<From, To>)
    for (; c + kLanes<T> <= n; c += kLanes<T>) store<T>(to + c, load<T>(from + c));
  for (; c < n; ++c) to[c] = narrow<To>(T(widen(from[c])));
}

// dst[r * ld + c - c0] = row r0 + r, column c: rows stay rows (outputs in the lanes).
template <class T>
inline void load_rows(const Rows& src, int64_t r0, int64_t n, int64_t c0, int64_t nc, T* dst, int64_t ld) {
  by_dtype(src.dtype, [&](auto tag) {
    using S = decltype(tag);
    for (int64_t r = 0; r < n; ++r) {
      const S* p = static_cast<const S*>(src.data) + src.row(r0 + r);
      T* to = dst + r * ld;
      if (!src.columns && src.stride_c == 1)
        copy_row<T>(p + c0, to, nc);
      else
        for (int64_t c = 0; c < nc; ++c) to[c] = T(widen(p[src.column(c0 + c)]));
      for (int64_t c = nc; c < ld; ++c) to[c] = 0;
    }
  });
}

template <class T>
inline void store_rows(const T* src, int64_t ld, const Rows& dst, int64_t r0, int64_t n, int64_t c0, int64_t nc) {
  by_dtype(dst.dtype, [&](auto tag) {
    using D = decltype(tag);
    for (int64_t r = 0; r < n; ++r) {
      D* p = static_cast<D*>(dst.data) + dst.row(r0 + r);
      if (!dst.columns && dst.stride_c == 1)
        copy_row<T>(src + r * ld, p + c0, nc);
      else
        for (int64_t c = 0; c < nc; ++c) p[dst.column(c0 + c)] = narrow<D>(src[r * ld + c]);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
