// bspline_basis over rows: rows in the lanes, so that one feature's knots serve the whole vector. Bound by the nb
// numbers that an input writes (or reads, in the contracted form): they go through registers, a tile of lanes x
// functions at a time, because a masked store for each input took longer than everything else together.
#pragma once
#include "bspline/basis_cpu.h"
#include "common/rows_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

// Functions first .. first + K of each lane to out[lane * stride + b], `rest` to the others of the nb.
template <class T, int K>
PYML_INLINE void put_functions(const Vec<T>* N, Vec<T> rest, IVec<T> first, int nb, int n, T* out, int64_t stride) {
  constexpr int L = kLanes<T>;
  T tile[L * L];
  for (int b0 = 0; b0 < nb; b0 += L) {
    const int functions = nb - b0 < L ? nb - b0 : L;
    for (int b = 0; b < functions; ++b) {
      Vec<T> v = rest;
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) v = first == Int<T>(b0 + b - m) ? N[m] : v;
      store<T>(tile + b * L, v);
    }
    transpose_tile<T>(tile, L, out + b0, stride, functions, n);
  }
}

// sum of N[m] * grad[lane * stride + first + m] over the functions that exist.
template <class T, int K>
PYML_INLINE Vec<T> contract_functions(const Vec<T>* N, Vec<T> rest, IVec<T> first, int nb, int n, const T* grad,
                                      int64_t stride) {
  constexpr int L = kLanes<T>;
  T tile[L * L];
  Vec<T> g[K + 1] = {};
  for (int b0 = 0; b0 < nb; b0 += L) {
    const int functions = nb - b0 < L ? nb - b0 : L;
    transpose_tile<T>(grad + b0, stride, tile, L, n, functions);
    for (int b = 0; b < functions; ++b) {
      const Vec<T> v = load<T>(tile + b * L);
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) g[m] = first == Int<T>(b0 + b - m) ? v : g[m];
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m <= K; ++m) rest += N[m] * g[m];
  return rest;
}

// The same two for many functions, where passing over all of them costs more than K + 1 single numbers.
template <class T, int K>
inline void put_few(const T* value, const T* rest, const Int<T>* first, int nb, int n, T* out, int64_t stride) {
  for (int l = 0; l < n; ++l, out += stride) {
    for (int b = 0; b < nb; ++b) out[b] = rest[l];
    for (int m = 0; m <= K; ++m)
      if (first[l] + m >= 0 && first[l] + m < nb) out[first[l] + m] = value[m * kLanes<T> + l];
  }
}

template <class T, int K>
inline void contract_few(const T* value, T* total, const Int<T>* first, int nb, int n, const T* grad, int64_t stride) {
  for (int l = 0; l < n; ++l, grad += stride)
    for (int m = 0; m <= K; ++m)
      if (first[l] + m >= 0 && first[l] + m < nb) total[l] += value[m * kLanes<T> + l] * grad[first[l] + m];
}

template <class T, int K>
inline void basis_rows(const BsplineBasisParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int nb = p.spline.functions();
  const bool tiles = nb <= 2 * L;
  const int64_t stride = p.features * nb;
  T x[L * L], values[(K + 1) * L], total[L * L];
  Int<T> firsts[L];
  for (int64_t r0 = begin; r0 < end; r0 += L) {
    const int n = int(end - r0 < L ? end - r0 : L);
    for (int64_t i0 = 0; i0 < p.features; i0 += L) {
      const int columns = int(p.features - i0 < L ? p.features - i0 : L);
      load_columns<T>(p.x, r0, n, i0, columns, x, L);
      for (int i = 0; i < columns; ++i) {
        Vec<T> N[K + 1], rest;
        const IVec<T> first =
            basis_derivative<T, K>(p.spline, p.spline.row(i0 + i), load<T>(x + i * L), p.derivative, N, &rest) -
            Int<T>(K);
        const int64_t at = r0 * stride + (i0 + i) * nb;
        if (!tiles) {
#pragma GCC unroll 6
          for (int m = 0; m <= K; ++m) store<T>(values + m * L, N[m]);
          store<T>(total + i * L, rest);
          store_int<T>(firsts, first);
        }
        if (!p.grad && tiles)
          put_functions<T, K>(N, rest, first, nb, n, p.out + at, stride);
        else if (!p.grad)
          put_few<T, K>(values, total + i * L, firsts, nb, n, p.out + at, stride);
        else if (tiles)
          store<T>(total + i * L, contract_functions<T, K>(N, rest, first, nb, n, p.grad + at, stride));
        else
          contract_few<T, K>(values, total + i * L, firsts, nb, n, p.grad + at, stride);
      }
      if (p.grad) transpose_tile<T>(total, L, p.out + r0 * p.features + i0, p.features, columns, n);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
