// What the three kernels of kan_linear share: tiles, blocks, packed coefficients, and the numbers of a block of rows.
#pragma once
#include "bspline/basis_cpu.h"
#include "bspline/bspline.h"
#include "common/rows_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kKanRows = 128;        // batch rows in a block
constexpr int64_t kKanCache = 36 << 10;  // bytes of coefficient rows that should stay in the first-level cache
constexpr int64_t kKanGroup = 16;        // rows that a kernel may take at once
constexpr int64_t kKanMost = 16;         // features in a block, at most

// Calls f(integral_constant<int, vectors in a tile>): tiles are 64, 128 or 256 bytes wide.
template <class T, class F>
void by_tile(int64_t tile, F&& f) {
  constexpr int kUnit = 64 / kVecBytes;
  const int64_t bytes = tile * int64_t(sizeof(T));
  if (bytes == 64) return f(std::integral_constant<int, kUnit>{});
  if (bytes == 128) return f(std::integral_constant<int, 2 * kUnit>{});
  return f(std::integral_constant<int, 4 * kUnit>{});
}

template <class T>
int64_t kan_feature_block(const KanLinearParams<T>& p) {
  const int64_t used = (p.spline.functions() + 1) * p.tile * int64_t(sizeof(T));
  const int64_t fit = kKanCache / used;
  return fit < 1 ? 1 : fit > kKanMost ? kKanMost : fit;
}

// Rows of g that one pass of the backward over weights holds: more rows amortise the accumulators, if g still fits.
template <class T>
int64_t kan_weight_rows(const KanLinearParams<T>& p) {
  return p.tiles() * p.tile <= 128 ? 256 : 128;
}

template <class T>
int64_t kan_scratch(const KanLinearParams<T>& p) {
  const int64_t K = p.spline.order, padded = p.tiles() * p.tile;
  const int64_t values = kKanMost * kKanRows * (1 + (K + 2) + 1), rows = kKanRows * padded;
  const int64_t forward = values + rows, back_x = values + rows + kKanRows * kKanMost;
  const int64_t weight_rows = kan_weight_rows(p);
  const int64_t back_w = weight_rows * (padded + kKanBlock * (1 + (K + 2) + 1) + 2) + p.spline.knots + 80;
  const int64_t most = forward > back_x ? forward : back_x;
  return (most > back_w ? most : back_w) + 256;
}

template <class T>
void kan_pack(const KanLinearParams<T>& p, int64_t begin, int64_t end) {
  const int64_t nb = p.spline.functions(), K = p.spline.order, P = p.spline.padded(), W = p.tile;
  for (int64_t t = 0; t < p.tiles(); ++t) {
    const int64_t o0 = t * W, n = p.outputs - o0 < W ? p.outputs - o0 : W;
    for (int64_t i = begin; i < end; ++i) {
      T* to = p.packed + (t * p.features + i) * (P + 1) * W;
      std::memset(to, 0, size_t((P + 1) * W) * sizeof(T));
      for (int64_t o = 0; o < n; ++o) {
        const T* from = p.coeff + ((o0 + o) * p.features + i) * nb;
        for (int64_t b = 0; b < nb; ++b) to[(K + b) * W + o] = from[b];
        if (p.base_weight) to[P * W + o] = p.base_weight[(o0 + o) * p.features + i];
      }
    }
  }
}

// Where the K + 2 numbers of a row lie within a feature's (K + 2) * ld of them: N_m (or its slope) for m <= K, then the
// base branch. For cubics in floats the four N_m of a row are neighbours (rows of a vector four lanes apart), so that a
// kernel gets them by one load and four permutes within 16 bytes; else each N_m is a column. Both make row r + b of an
// aligned group lie at at(r) + at(b).
template <class T, int K>
struct RowValues {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  static constexpr bool kQuads = K == 3 && std::is_same_v<T, float>;
#else
  static constexpr bool kQuads = false;
#endif
  static constexpr int64_t at(int64_t row) {
    const uint64_t r = uint64_t(row), L = kLanes<T>;
    return int64_t(kQuads ? r / L * (4 * L) + r % 4 * L + r % L / 4 * 4 : r);
  }
  static PYML_INLINE void put(T* feature, int64_t ld, int64_t r, const Vec<T>* N, const Vec<T>& base) {
    constexpr int L = kLanes<T>;
    if constexpr (kQuads) {
      T* to = feature + r * 4;
      const Vec<T> low01 = interleave_low(N[0], N[1]), high01 = interleave_high(N[0], N[1]);
      const Vec<T> low23 = interleave_low(N[2], N[3]), high23 = interleave_high(N[2], N[3]);
      store<T>(to, interleave_low_pairs(low01, low23));
      store<T>(to + L, interleave_high_pairs(low01, low23));
      store<T>(to + 2 * L, interleave_low_pairs(high01, high23));
      store<T>(to + 3 * L, interleave_high_pairs(high01, high23));
    } else {
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) store<T>(feature + m * ld + r, N[m]);
    }
    store<T>(feature + (K + 1) * ld + r, base);
  }
  static PYML_INLINE T one(const T* feature, int64_t ld, int64_t r, int m) {
    return feature[at(r) + m * (kQuads ? 1 : ld)];
  }
  // The numbers of one row, `row` = feature + at(r); value<m>() is N_m in all lanes.
  struct Row {
    const T* row;
    int64_t ld;
    Vec<T> four;
    PYML_INLINE Row() {}
    PYML_INLINE Row(const T* at, int64_t stride) : row(at), ld(stride) {
      if constexpr (kQuads) four = splat_four(at);
    }
    PYML_INLINE Vec<T> value(int m) const {
      if constexpr (kQuads)
        return m == 0   ? pick_of_four<0>(four)
               : m == 1 ? pick_of_four<1>(four)
               : m == 2 ? pick_of_four<2>(four)
                        : pick_of_four<3>(four);
      else
        return splat<T>(row[m * ld]);
    }
  };
};

// values[i] = RowValues of a feature; offset[i][r] = where the row's K + 1 coefficient rows start within the feature.
// Rows come in groups of kKanGroup; those beyond n are those of x = 0.
template <class T, int K, int W, bool kSlope>
void kan_values(const KanLinearParams<T>& p, int64_t r0, int64_t n, int64_t i0, int64_t ni, int64_t ld, T* x, T* values,
                Int<T>* offset) {
  constexpr int L = kLanes<T>;
  const Spline<T> spline = p.spline;
  const Base base = p.base;
  load_columns<T>(p.x, r0, n, i0, ni, x, ld);
  for (int64_t i = 0; i < ni; ++i) {
    const KnotRow<T> row = p.spline.row(i0 + i);  // a copy: the stores below cannot change it
    T* out = values + i * (K + 2) * ld;
    for (int64_t r = 0; r < (n + kKanGroup - 1) / kKanGroup * kKanGroup; r += L) {
      const Vec<T> v = load<T>(x + i * ld + r);
      Vec<T> N[K + 1], D[K + 1], slope = splat<T>(0), value = slope;
      const Located<T> at = locate<T, K>(spline, row, v);
      basis<T, K, kSlope>(spline, row, at, N, D);
      if (base != Base::kNone) value = base_value<T>(base, v, kSlope ? &slope : nullptr);
      RowValues<T, K>::put(out, ld, r, kSlope ? D : N, kSlope ? slope : value);
      store_int<T>(offset + i * ld + r, at.interval * Int<T>(W));
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
