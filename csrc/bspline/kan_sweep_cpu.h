// One feature of kan_linear over a block of rows that are sorted by their knot interval. The K + 1 coefficient rows of
// an interval stay in registers while its rows pass, and the next interval needs only one more. So an input costs K + 2
// broadcasts and its row of outputs, which is in the first-level cache, instead of K + 2 rows of coefficients.
#pragma once
#include "bspline/kan_rows_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

// Calls f(integral_constant rows, row numbers) over the rows of interval j, two at a time: one row is too short a chain
// of additions to hide their latency.
template <class F>
PYML_INLINE void by_pairs(const Runs& runs, int j, const F& f) {
  const int32_t *row = runs.row + runs.start[j], *end = runs.row + runs.start[j + 1];
  for (; row + 2 <= end; row += 2) f(std::integral_constant<int, 2>{}, row);
  if (row < end) f(std::integral_constant<int, 1>{}, row);
}

// Vectors of a tile that a sweep takes at once: K + 1 coefficient rows, the base row and a row of sums fit the
// registers.
template <int K, int NT>
constexpr int sweep_vectors() {
  constexpr int most = kRegisters >= 32 ? (K <= 4 ? 4 : 2) : (K <= 4 ? 2 : 1);
  return NT < most ? NT : most;
}

// Calls f(interval, coefficient rows, base row) for each interval with rows, in order.
template <class T, int K, int NT, int OV, class F>
PYML_INLINE void with_coefficients(const Runs& runs, const T* w, const T* base_row, const F& f) {
  constexpr int64_t L = kLanes<T>, W = NT * L;
  Vec<T> c[K + 1][OV], base[OV];
#pragma GCC unroll 4
  for (int v = 0; v < OV; ++v) base[v] = load<T>(base_row + v * L);
  int held = runs.first - 2;  // the interval whose rows c has
  for (int j = runs.first; j <= runs.last; ++j) {
    if (runs.start[j] == runs.start[j + 1]) continue;
    if (j != held + 1) {
#pragma GCC unroll 6
      for (int m = 0; m < K; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) c[m + 1][v] = load<T>(w + (j + m) * W + v * L);
    }
#pragma GCC unroll 6
    for (int m = 0; m < K; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) c[m][v] = c[m + 1][v];
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) c[K][v] = load<T>(w + (j + K) * W + v * L);
    held = j;
    f(j, c, base);
  }
}

// y[r] += sum_m N_m(r) C[J + m] + base(r) Wb for one feature and all rows.
template <class T, int K, int NT, int OV>
__attribute__((noinline)) void kan_fwd_sweep(const Runs& runs, const T* values, int64_t ld, const T* w,
                                             const T* base_row, T* y) {
  constexpr int64_t L = kLanes<T>, W = NT * L;
  with_coefficients<T, K, NT, OV>(runs, w, base_row, [&](int j, const auto& c, const auto& base) {
    by_pairs(runs, j, [&](auto count, const int32_t* row) {
      constexpr int B = decltype(count)::value;
      Vec<T> acc[B][OV];
      const T* N[B];
      T* to[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        N[b] = values + row[b];
        to[b] = y + row[b] * W;
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[b][v] = load<T>(to[b] + v * L);
      }
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m)
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) {
          const Vec<T> s = splat<T>(N[b][m * ld]);
#pragma GCC unroll 4
          for (int v = 0; v < OV; ++v) acc[b][v] += s * c[m][v];
        }
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        const Vec<T> s = splat<T>(N[b][(K + 1) * ld]);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) store<T>(to[b] + v * L, acc[b][v] + s * base[v]);
      }
    });
  });
}

// part[r] (+)= the lanes of g[r] (sum_m N'_m(r) C[J + m] + base'(r) Wb).
template <class T, int K, int NT, int OV>
__attribute__((noinline)) void kan_bwd_x_sweep(const Runs& runs, const T* values, int64_t ld, const T* w,
                                               const T* base_row, const T* g, bool add, T* part) {
  constexpr int64_t L = kLanes<T>, W = NT * L;
  with_coefficients<T, K, NT, OV>(runs, w, base_row, [&](int j, const auto& c, const auto& base) {
    by_pairs(runs, j, [&](auto count, const int32_t* row) {
      constexpr int B = decltype(count)::value;
      Vec<T> mixed[B][OV];
      const T* D[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        D[b] = values + row[b];
        const Vec<T> slope = splat<T>(D[b][(K + 1) * ld]);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) mixed[b][v] = slope * base[v];
      }
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m)
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) {
          const Vec<T> s = splat<T>(D[b][m * ld]);
#pragma GCC unroll 4
          for (int v = 0; v < OV; ++v) mixed[b][v] += s * c[m][v];
        }
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        const T* gr = g + row[b] * W;
        T* to = part + row[b] * L;
        Vec<T> total = mixed[b][0] * load<T>(gr);
#pragma GCC unroll 4
        for (int v = 1; v < OV; ++v) total += mixed[b][v] * load<T>(gr + v * L);
        store<T>(to, add ? load<T>(to) + total : total);
      }
    });
  });
}

// rows[J + m] += sum_r N_m(r) g[r], base_row += sum_r base(r) g[r]: the sums of an interval are in registers, and those
// of the next take over all but one.
template <class T, int K, int NT, int OV>
__attribute__((noinline)) void kan_bwd_w_sweep(const Runs& runs, const T* values, int64_t ld, const T* g, T* rows,
                                               T* base_row) {
  constexpr int64_t L = kLanes<T>, W = NT * L;
  Vec<T> acc[K + 1][OV], base[OV];
#pragma GCC unroll 6
  for (int m = 0; m <= K; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) acc[m][v] = splat<T>(0);
#pragma GCC unroll 4
  for (int v = 0; v < OV; ++v) base[v] = splat<T>(0);
  int held = runs.first;  // the interval whose sums acc has
  const auto put = [&](int count) {
#pragma GCC unroll 6
    for (int m = 0; m <= K; ++m) {
      if (m >= count) break;
      T* to = rows + (held + m) * W;
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) store<T>(to + v * L, load<T>(to + v * L) + acc[m][v]);
    }
  };
  for (int j = runs.first; j <= runs.last; ++j) {
    if (runs.start[j] == runs.start[j + 1]) continue;
    if (j == held + 1) {
      put(1);
#pragma GCC unroll 6
      for (int m = 0; m < K; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[m][v] = acc[m + 1][v];
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) acc[K][v] = splat<T>(0);
    } else if (j != held) {
      put(K + 1);
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[m][v] = splat<T>(0);
    }
    held = j;
    for (int64_t q = runs.start[j]; q < runs.start[j + 1]; ++q) {
      const int64_t r = runs.row[q];
      const T* N = values + r;
      Vec<T> gr[OV];
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) gr[v] = load<T>(g + r * W + v * L);
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) {
        const Vec<T> s = splat<T>(N[m * ld]);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[m][v] += s * gr[v];
      }
      const Vec<T> s = splat<T>(N[(K + 1) * ld]);
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) base[v] += s * gr[v];
    }
  }
  put(K + 1);
#pragma GCC unroll 4
  for (int v = 0; v < OV; ++v) store<T>(base_row + v * L, load<T>(base_row + v * L) + base[v]);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
