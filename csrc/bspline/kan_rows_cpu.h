// What the three kernels of kan_linear share: tiles, packed coefficients, and a block of rows: its numbers, its order.
#pragma once
#include "bspline/basis_cpu.h"
#include "bspline/bspline.h"
#include "common/rows_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kKanGroup = 16;  // rows that a kernel may take at once
constexpr int64_t kKanMost = 16;   // features in a block, at most

// Calls f(integral_constant<int, vectors in a tile>): tiles are 64, 128 or 256 bytes wide.
template <class T, class F>
void by_tile(int64_t tile, F&& f) {
  constexpr int kUnit = 64 / kVecBytes;
  const int64_t bytes = tile * int64_t(sizeof(T));
  if (bytes == 64) return f(std::integral_constant<int, kUnit>{});
  if (bytes == 128) return f(std::integral_constant<int, 2 * kUnit>{});
  return f(std::integral_constant<int, 4 * kUnit>{});
}

// Rows in a block: with the outputs of 128 rows in the first-level cache a kernel is fastest, but an interval should
// have a few of the rows. By shape alone: it orders the sums of the weights' gradients.
template <class T>
int64_t kan_rows(const KanLinearParams<T>& p) {
  const int64_t intervals = p.spline.knots - 1, most = intervals <= 32 ? 128 : intervals <= 64 ? 256 : 1024;
  const int64_t there = (p.rows + kKanGroup - 1) / kKanGroup * kKanGroup;
  return there < most ? there : most;
}

// A block of rows and features on its way through a kernel: slices of the scratch memory.
template <class T>
struct KanBlock {
  T *x, *values, *slopes;  // [features][rows], [features][K + 2][rows] twice: see kan_values
  Int<T>* interval;        // [features][rows]
  T* rows;                 // [tiles][rows][tile]: outputs or their gradients
  T* part;                 // backward over x: [rows][lanes], what is left to be summed over the lanes
  T* dx;                   // backward over x: [features][rows]
  int32_t* sorted;         // [features][rows + kKanGroup]: see sort_rows
  int32_t* start;          // [features][intervals + 1]
  int64_t R;               // room for so many rows
  int64_t size = 0;        // of all, in T

  KanBlock(const KanLinearParams<T>& p, T* scratch) {
    const auto take = [&](int64_t count, int64_t bytes) {
      T* at = scratch ? scratch + size : nullptr;
      size += (count * bytes + 63) / 64 * (64 / int64_t(sizeof(T)));
      return at;
    };
    const int64_t F = kKanMost, t = sizeof(T);
    R = kan_rows(p);
    x = take(F * R, t);
    values = take(F * (p.spline.order + 2) * R, t);
    slopes = take(F * (p.spline.order + 2) * R, t);
    interval = reinterpret_cast<Int<T>*>(take(F * R, t));
    rows = take(p.tiles() * p.tile * R, t);
    part = take(R * kLanes<T>, t);
    dx = take(F * R, t);
    sorted = reinterpret_cast<int32_t*>(take(F * (R + kKanGroup), 4));
    start = reinterpret_cast<int32_t*>(take(F * p.spline.knots, 4));
  }
};

// Coefficients and base weights have the features beside each other, the packed ones the outputs: they go over in
// square tiles, through registers.
template <class T>
void kan_pack(const KanLinearParams<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t nb = p.spline.functions(), K = p.spline.order, P = p.spline.padded(), W = p.tile, stride = (P + 1) * W;
  const auto least = [](int64_t a) { return int(a < L ? a : L); };
  for (int64_t t = 0; t < p.tiles(); ++t) {
    const int64_t o0 = t * W, n = p.outputs - o0 < W ? p.outputs - o0 : W;
    T* to = p.packed + t * p.features * stride;
    for (int64_t i = begin; i < end; ++i) {
      if (n < W || !p.base_weight) std::memset(to + i * stride, 0, size_t(stride) * sizeof(T));
      std::memset(to + i * stride, 0, size_t(K * W) * sizeof(T));
      std::memset(to + i * stride + (K + nb) * W, 0, size_t(K * W) * sizeof(T));
    }
    for (int64_t o = 0; o < n; o += L) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t b = 0; b < nb; b += L)
          transpose_tile<T>(p.coeff + ((o0 + o) * p.features + i) * nb + b, p.features * nb,
                            to + i * stride + (K + b) * W + o, W, least(n - o), least(nb - b));
      if (!p.base_weight) continue;
      for (int64_t i = begin; i < end; i += L)
        transpose_tile<T>(p.base_weight + (o0 + o) * p.features + i, p.features, to + i * stride + P * W + o, stride,
                          least(n - o), least(end - i));
    }
  }
}

// The way back, for the gradients: adds up the splits in order. A NaN reaches all coefficients of its edge, as it does
// where the whole basis is multiplied: the functions that are 0 at a NaN are 0 * NaN.
template <class T>
void kan_reduce(const KanLinearParams<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t nb = p.spline.functions(), K = p.spline.order, P = p.spline.padded(), W = p.tile, stride = (P + 1) * W;
  const auto least = [](int64_t a) { return int(a < L ? a : L); };
  T tile[L * L];
  Int<T> spoiled[L];
  const auto sum = [&](const T* from, int64_t step, int count) {  // `count` rows of a tile; returns which lanes had NaN
    IVec<T> nan{};
    for (int m = 0; m < count; ++m) {
      Vec<T> total = load<T>(from + m * step);
      for (int64_t s = 1; s < p.splits(); ++s) total += load<T>(from + m * step + s * p.packed_size());
      nan |= (IVec<T>)(total != total);
      store<T>(tile + m * L, total);
    }
    return nan;
  };
  for (int64_t t = 0; t < p.tiles(); ++t) {
    const int64_t o0 = t * W, n = p.outputs - o0 < W ? p.outputs - o0 : W;
    const T* from = p.partial + t * p.features * stride;
    for (int64_t o = 0; o < n; o += L) {
      for (int64_t i = begin; i < end; ++i) {
        T* to = p.dcoeff + ((o0 + o) * p.features + i) * nb;
        IVec<T> nan{};
        for (int64_t b = 0; b < nb; b += L) {
          nan |= sum(from + i * stride + (K + b) * W + o, W, least(nb - b));
          transpose_tile<T>(tile, L, to + b, p.features * nb, least(nb - b), least(n - o));
        }
        store_int<T>(spoiled, nan);
        for (int l = 0; l < least(n - o); ++l)
          for (int64_t b = 0; b < nb && spoiled[l]; ++b)
            to[l * p.features * nb + b] = std::numeric_limits<T>::quiet_NaN();
      }
      if (!p.dbase) continue;
      for (int64_t i = begin; i < end; i += L) {
        sum(from + i * stride + P * W + o, stride, least(end - i));
        transpose_tile<T>(tile, L, p.dbase + (o0 + o) * p.features + i, p.features, least(end - i), least(n - o));
      }
    }
  }
}

// Rows of a block by interval: those of interval j are row[start[j]] to row[start[j + 1] - 1], ascending. Intervals
// before `first` and after `last` have none.
struct Runs {
  const int32_t *row, *start;
  int first, last;
};

// Sorts n > 0 rows by `interval`. `sorted` has room for kKanGroup more.
template <class T>
Runs sort_rows(const Int<T>* interval, int64_t n, int intervals, int32_t* sorted, int32_t* start) {
  Int<T> first = interval[0], last = first;
  for (int64_t r = 0; r < n; ++r) {
    first = interval[r] < first ? interval[r] : first;
    last = interval[r] > last ? interval[r] : last;
  }
  const Runs runs{sorted, start, int(first), int(last)};
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kFew = 64;  // a compare and a compress an interval and vector are cheaper than counting up to here
  if (std::is_same_v<T, float> && intervals <= kFew) {
    int32_t used = 0;
    for (int j = runs.first; j <= runs.last; ++j) {
      start[j] = used;
      const __m512i wanted = _mm512_set1_epi32(j);
      __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      for (int64_t r = 0; r < n; r += 16) {
        const __mmask16 live = n - r < 16 ? __mmask16((1u << (n - r)) - 1) : __mmask16(0xffff);
        const __mmask16 here = _mm512_mask_cmpeq_epi32_mask(live, _mm512_loadu_si512(interval + r), wanted);
        _mm512_storeu_si512(sorted + used, _mm512_maskz_compress_epi32(here, rows));
        used += __builtin_popcount(here);
        rows = _mm512_add_epi32(rows, _mm512_set1_epi32(16));
      }
    }
    start[runs.last + 1] = used;
    return runs;
  }
#endif
  for (int j = runs.first; j <= runs.last + 1; ++j) start[j] = 0;
  for (int64_t r = 0; r < n; ++r) ++start[interval[r] + 1];
  for (int j = runs.first; j <= runs.last; ++j) start[j + 1] += start[j];
  for (int64_t r = 0; r < n; ++r) sorted[start[interval[r]]++] = int32_t(r);
  for (int j = runs.last + 1; j > runs.first; --j) start[j] = start[j - 1];
  start[runs.first] = 0;
  return runs;
}

// Fills values[i][m][r] = N_m (or its slope) for m <= K, then the base branch; interval[i][r] = the row's knot
// interval; runs[i]. Rows come in groups of kKanGroup; those beyond n are those of x = 0, and in no run.
template <class T, int K, bool kSlope>
void kan_values(const KanLinearParams<T>& p, int64_t r0, int64_t n, int64_t i0, int64_t ni, const KanBlock<T>& b,
                Runs* runs) {
  constexpr int64_t L = kLanes<T>;
  const int64_t ld = b.R;
  const Spline<T> spline = p.spline;
  const Base base = p.base;
  load_columns<T>(p.x, r0, n, i0, ni, b.x, ld);
  for (int64_t i = 0; i < ni; ++i) {
    const KnotRow<T> row = p.spline.row(i0 + i);  // a copy: the stores below cannot change it
    for (int64_t r = 0; r < (n + kKanGroup - 1) / kKanGroup * kKanGroup; r += L) {
      const Vec<T> v = load<T>(b.x + i * ld + r);
      Vec<T> N[K + 1], D[K + 1], slope = splat<T>(0), value = slope;
      const Located<T> at = locate<T, K>(spline, row, v);
      basis<T, K, kSlope>(spline, row, at, N, D);
      if (base != Base::kNone) value = base_value<T>(base, v, kSlope ? &slope : nullptr);
      const auto put = [&](T* to, const Vec<T>* numbers, const Vec<T>& last) {
#pragma GCC unroll 6
        for (int m = 0; m <= K; ++m) store<T>(to + m * ld + r, numbers[m]);
        store<T>(to + (K + 1) * ld + r, last);
      };
      put(b.values + i * (K + 2) * ld, N, value);
      if (kSlope) put(b.slopes + i * (K + 2) * ld, D, slope);
      store_int<T>(b.interval + i * ld + r, at.interval);
    }
    runs[i] = sort_rows<T>(b.interval + i * ld, n, spline.knots - 1, b.sorted + i * (ld + kKanGroup),
                           b.start + i * spline.knots);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
