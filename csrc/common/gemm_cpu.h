// A small matrix product for tiles that sit in the cache: C[m][n] += sum_k A(m, k) * B[k][n], n in the vector lanes.
// The sum runs over k in order for every element, whatever the tile, so the result has the same bits for every
// blocking.
#pragma once
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

constexpr int kGemmRows = 4;                            // rows of C in registers
constexpr int kGemmVectors = kRegisters >= 32 ? 4 : 2;  // vectors of C in registers, beside B and one broadcast

template <class T, int MR, int NV>
PYML_INLINE void gemm_tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = load<T>(c + m * ldc + v * L);
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bk[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bk[v] = load<T>(b + k * ldb + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> s = splat<T>(a[m * am + k * ak]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += s * bk[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<T>(c + m * ldc + v * L, acc[m][v]);
}

template <class T, int NV>
PYML_INLINE void gemm_rows(int64_t M, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c,
                           int64_t ldc) {
  int64_t m = 0;
  for (; m + kGemmRows <= M; m += kGemmRows)
    gemm_tile<T, kGemmRows, NV>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
  if (m + 2 <= M) {
    gemm_tile<T, 2, NV>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
    m += 2;
  }
  if (m < M) gemm_tile<T, 1, NV>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
}

// N is a multiple of the vector length; A(m, k) = a[m * am + k * ak].
template <class T>
PYML_INLINE void gemm_add(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
                          T* c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  int64_t n = 0;
  for (; n + kGemmVectors * L <= N; n += kGemmVectors * L)
    gemm_rows<T, kGemmVectors>(M, K, a, am, ak, b + n, ldb, c + n, ldc);
  for (; n < N; n += L) gemm_rows<T, 1>(M, K, a, am, ak, b + n, ldb, c + n, ldc);
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
