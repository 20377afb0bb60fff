// Matrix products on tiles of registers, for kernels that do more with a product than store it:
// acc(m, n) = start(m, n) + sum_k A(m, k) * B[k][n], then finish(m, n, acc), with n in the vector lanes. The sum runs
// over k in order for every element, whatever the tile, so the bits are the same for every blocking.
#pragma once
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

constexpr int kTileVectors = kRegisters >= 32 ? 4 : 2;
// Rows beside NV vectors: up to 24 (12) sums, a row of B and one broadcast fill the registers.
template <int NV>
constexpr int kTileRows = NV == kTileVectors ? 6 : 8;

// One number, or a pair of them over and over, as a vector.
struct One {
  template <class T>
  PYML_INLINE Vec<T> operator()(const T* p) const {
    return splat<T>(*p);
  }
};
struct Pair {
  PYML_INLINE Vec<float> operator()(const float* p) const {
    double both;
    std::memcpy(&both, p, sizeof both);
    return (Vec<float>)splat<double>(both);
  }
};

// What an entry of A and a vector of B add to a sum.
struct Product {
  template <class V>
  PYML_INLINE V operator()(const V& acc, const V& a, const V& b, int, int) const {
    return acc + a * b;
  }
};

// A(m, k) = broadcast(a + m * am + k * ak); B(k, v-th vector) = b[k * ldb + v * L]. start(m, v) gives a vector,
// finish(m, v, acc) takes one, term(acc, A, B, m, v) is the next sum.
template <class T, int MR, int NV, class Broadcast = One, class Start, class Finish, class Term = Product>
PYML_INLINE void tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, const Start& start,
                      const Finish& finish, const Term& term = {}) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = start(m, v);
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load<T>(b + k * ldb + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> s = Broadcast{}(a + m * am + k * ak);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = term(acc[m][v], s, row[v], m, v);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) finish(m, v, acc[m][v]);
}

// Calls f(integral_constant rows, first row) over M rows.
template <int NV, class F>
PYML_INLINE void for_tile_rows(int64_t M, const F& f) {
  constexpr int R = kTileRows<NV>;
  int64_t m = 0;
  for (; m + R <= M; m += R) f(std::integral_constant<int, R>{}, m);
  if (m + 4 <= M) {
    f(std::integral_constant<int, 4>{}, m);
    m += 4;
  }
  for (; m + 2 <= M; m += 2) f(std::integral_constant<int, 2>{}, m);
  if (m < M) f(std::integral_constant<int, 1>{}, m);
}

// Calls f(integral_constant vectors, first vector) over N vectors.
template <class F>
PYML_INLINE void for_tile_columns(int64_t N, const F& f) {
  int64_t n = 0;
  for (; n + kTileVectors <= N; n += kTileVectors) f(std::integral_constant<int, kTileVectors>{}, n);
  if constexpr (kTileVectors > 2) {
    if (n + 3 <= N) {
      f(std::integral_constant<int, 3>{}, n);
      n += 3;
    }
    if (n + 2 <= N) {
      f(std::integral_constant<int, 2>{}, n);
      n += 2;
    }
  }
  if (n < N) f(std::integral_constant<int, 1>{}, n);
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
