// kan_linear on a CPU: local support, K + 2 fused multiply-adds an edge instead of G + K + 1.
//
// Outputs lie in the vector lanes. Coefficients are repacked to [in][padded row][tile of outputs], so that the K + 1
// rows an input needs are K + 1 neighbouring tile rows. A block of features whose rows fit in the first-level cache
// meets a block of batch rows whose basis was evaluated just before, rows in the lanes.
//
// What bounds it (4096 x 784 -> 64, AVX-512, two loads and two FMAs a cycle): the inner loop of the forward has 77
// loads for 80 FMAs and runs at 60 % of the FMA rate as a whole. A fifth of the time goes into the basis, the base
// branch and the load of x; with every input in one interval the rest would be at the FMA bound, so what is left are
// misses of the first-level cache: neither smaller blocks of features nor of rows help, they move as much elsewhere.

#include "bspline/kan_rows_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

// y[rows r..r+RB][tile] += sum over a block of features. NT vectors in the tile, OV of them in registers.
template <class T, int K, int NT, int OV, int RB>
PYML_INLINE void kan_fwd_rows(int64_t ni, int64_t feature_stride, int64_t base_row, const T* w, const T* values,
                              const Int<T>* offset, int64_t ld, int64_t r, T* y) {
  constexpr int L = kLanes<T>, W = NT * L;
  using Values = RowValues<T, K>;
  Vec<T> acc[RB][OV];
#pragma GCC unroll 16
  for (int b = 0; b < RB; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) acc[b][v] = load<T>(y + b * W + v * L);
  const T* quads = values + Values::at(r);
  const T* bases = values + (K + 1) * ld + r;
  offset += r;
  for (int64_t i = 0; i < ni; ++i, w += feature_stride, quads += (K + 2) * ld, bases += (K + 2) * ld, offset += ld) {
    // All rows in turn before the next of the K + 1: an accumulator rests between two additions.
    typename Values::Row N[RB];
    const T* row[RB];
#pragma GCC unroll 16
    for (int b = 0; b < RB; ++b) {
      N[b] = {quads + Values::at(b), ld};
      row[b] = w + offset[b];
    }
#pragma GCC unroll 6
    for (int m = 0; m <= K; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < RB; ++b) {
        const Vec<T> s = N[b].value(m);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[b][v] += s * load<T>(row[b] + m * W + v * L);
      }
    const T* base = w + base_row * W;
#pragma GCC unroll 16
    for (int b = 0; b < RB; ++b) {
      const Vec<T> s = splat<T>(bases[b]);
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) acc[b][v] += s * load<T>(base + v * L);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < RB; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) store<T>(y + b * W + v * L, acc[b][v]);
}

template <class T>
void kan_fwd(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t R = kKanRows, P = p.spline.padded(), block = kan_feature_block(p);
  by_order(p.spline.order, [&](auto order) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int OV = NT < 4 ? NT : 4,
                    RB = (kRegisters >= 32 ? 16 : 8) / OV;  // 8 chains just hide the FMA's latency
      T* x = scratch;
      T* values = x + block * R;
      Int<T>* offset = reinterpret_cast<Int<T>*>(values + block * (K + 2) * R);
      T* y = reinterpret_cast<T*>(offset + block * R);  // [tiles][R][W]
      const int64_t stride = (P + 1) * W;
      for (int64_t r0 = begin; r0 < end; r0 += R) {
        const int64_t n = end - r0 < R ? end - r0 : R;
        const int64_t used = (n + kKanGroup - 1) / kKanGroup * kKanGroup;
        for (int64_t t = 0; t < p.tiles(); ++t) std::memset(y + t * R * W, 0, size_t(used * W) * sizeof(T));
        for (int64_t i0 = 0; i0 < p.features; i0 += block) {
          const int64_t ni = p.features - i0 < block ? p.features - i0 : block;
          kan_values<T, K, W, false>(p, r0, n, i0, ni, R, x, values, offset);
          for (int64_t t = 0; t < p.tiles(); ++t) {
            const T* w = p.packed + (t * p.features + i0) * stride;
            for (int v = 0; v < NT; v += OV)
              for (int64_t r = 0; r < n; r += RB)
                kan_fwd_rows<T, K, NT, OV, RB>(ni, stride, P, w + v * L, values, offset, R, r,
                                               y + (t * R + r) * W + v * L);
          }
        }
        for (int64_t t = 0; t < p.tiles(); ++t) {
          const int64_t left = p.outputs - t * W;
          store_rows<T>(y + t * R * W, W, p.y, r0, n, t * W, left < W ? left : W);
        }
      }
    });
  });
}

// dx[r][i] = sum_o g[o] (sum_m N'_m C[J + m][o] + base' Wb[o]): weights are combined first, so one dot product an edge.
// part[b][i] gets the lanes of row r + b and feature i, for the features of one vector; `sum_each` adds them up.
template <class T, int K, int NT, int OV, int RB>
PYML_INLINE void kan_bwd_x_rows(int64_t ni, int64_t feature_stride, int64_t base_row, const T* w, const T* values,
                                const Int<T>* offset, int64_t ld, int64_t r, const T* g, T* part) {
  constexpr int L = kLanes<T>, W = NT * L;
  using Values = RowValues<T, K>;
  Vec<T> gr[RB][OV];
#pragma GCC unroll 2
  for (int b = 0; b < RB; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) gr[b][v] = load<T>(g + b * W + v * L);
  const T* quads = values + Values::at(r);
  const T* bases = values + (K + 1) * ld + r;
  offset += r;
  for (int64_t i = 0; i < ni; ++i, w += feature_stride, quads += (K + 2) * ld, bases += (K + 2) * ld, offset += ld) {
    Vec<T> mixed[RB][OV];
#pragma GCC unroll 2
    for (int b = 0; b < RB; ++b) {
      const Vec<T> slope = splat<T>(bases[b]);
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) mixed[b][v] = slope * load<T>(w + base_row * W + v * L);
    }
#pragma GCC unroll 2
    for (int b = 0; b < RB; ++b) {
      const T* row = w + offset[b];
      const typename Values::Row D{quads + Values::at(b), ld};
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) {
        const Vec<T> s = D.value(m);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) mixed[b][v] += s * load<T>(row + m * W + v * L);
      }
      Vec<T> total = mixed[b][0] * gr[b][0];
#pragma GCC unroll 4
      for (int v = 1; v < OV; ++v) total += mixed[b][v] * gr[b][v];
      store<T>(part + (b * L + i) * L, total);
    }
  }
}

template <class T>
void kan_bwd_x(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  constexpr int64_t R = kKanRows, block = kKanMost;
  const int64_t P = p.spline.padded();
  by_order(p.spline.order, [&](auto order) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int OV = NT < 4 ? NT : 4, RB = kRegisters >= 32 ? 2 : 1;
      T* x = scratch;
      T* values = x + block * R;
      Int<T>* offset = reinterpret_cast<Int<T>*>(values + block * (K + 2) * R);
      T* g = reinterpret_cast<T*>(offset + block * R);  // [tiles][R][W]
      T* dx = g + p.tiles() * R * W;                    // [R][block]
      const int64_t stride = (P + 1) * W;
      for (int64_t r0 = begin; r0 < end; r0 += R) {
        const int64_t n = end - r0 < R ? end - r0 : R;
        for (int64_t t = 0; t < p.tiles(); ++t) {
          const int64_t left = p.outputs - t * W;
          load_rows<T>(p.y, r0, n, t * W, left < W ? left : W, g + t * R * W, W);
        }
        for (int64_t i0 = 0; i0 < p.features; i0 += block) {
          const int64_t ni = p.features - i0 < block ? p.features - i0 : block;
          kan_values<T, K, W, true>(p, r0, n, i0, ni, R, x, values, offset);
          std::memset(dx, 0, size_t(R * block) * sizeof(T));
          T part[RB * L * L] = {};
          for (int64_t t = 0; t < p.tiles(); ++t)
            for (int64_t v = 0; v < NT; v += OV)
              for (int64_t i1 = 0; i1 < ni; i1 += L)
                for (int64_t r = 0; r < n; r += RB) {
                  kan_bwd_x_rows<T, K, NT, OV, RB>(
                      ni - i1 < L ? ni - i1 : L, stride, P, p.packed + (t * p.features + i0 + i1) * stride + v * L,
                      values + i1 * (K + 2) * R, offset + i1 * R, R, r, g + (t * R + r) * W + v * L, part);
                  for (int b = 0; b < RB; ++b) {
                    T* to = dx + (r + b) * block + i1;
                    store<T>(to, load<T>(to) + sum_each<T>(part + b * L * L));
                  }
                }
          store_rows<T>(dx, block, p.dx, r0, n, i0, ni);
        }
      }
    });
  });
}

// sorted = the n rows by interval at[r] / W, ascending within one; interval j has those from start[j] to start[j + 1].
// `sorted` has room for a vector more.
template <class T>
void sort_rows(const Int<T>* at, int64_t n, int64_t W, int intervals, int32_t* sorted, int32_t* start) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kFew = 40;  // a compare and a compress an interval and vector are cheaper than counting up to here
  if constexpr (std::is_same_v<T, float>) {
    if (intervals <= kFew) {
      int32_t used = 0;
      for (int j = 0; j < intervals; ++j) {
        start[j] = used;
        const __m512i wanted = _mm512_set1_epi32(int32_t(j * W));
        __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int64_t r = 0; r < n; r += 16) {
          const __mmask16 live = n - r < 16 ? __mmask16((1u << (n - r)) - 1) : __mmask16(0xffff);
          const __mmask16 here = _mm512_mask_cmpeq_epi32_mask(live, _mm512_loadu_si512(at + r), wanted);
          _mm512_storeu_si512(sorted + used, _mm512_maskz_compress_epi32(here, rows));
          used += __builtin_popcount(here);
          rows = _mm512_add_epi32(rows, _mm512_set1_epi32(16));
        }
      }
      start[intervals] = used;
      return;
    }
  }
#endif
  for (int j = 0; j <= intervals; ++j) start[j] = 0;
  for (int64_t r = 0; r < n; ++r) ++start[at[r] / W + 1];
  for (int j = 0; j < intervals; ++j) start[j + 1] += start[j];
  for (int64_t r = 0; r < n; ++r) sorted[start[at[r] / W]++] = int32_t(r);
  for (int j = intervals; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// acc[m][v] += N_m(r) g[r][v] over the rows of one interval: all K + 2 coefficient rows of that interval stay in
// registers.
template <class T, int K, int NT, int OV>
__attribute__((noinline)) void kan_bwd_w_interval(const int32_t* order, int64_t count, const T* values, int64_t ld,
                                                  const T* g, T* rows, T* base) {
  constexpr int L = kLanes<T>, W = NT * L;
  Vec<T> acc[K + 2][OV];
#pragma GCC unroll 7
  for (int m = 0; m <= K + 1; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) acc[m][v] = splat<T>(0);
  for (int64_t q = 0; q < count; ++q) {
    const int64_t r = order[q];
    Vec<T> gr[OV];
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) gr[v] = load<T>(g + r * W + v * L);
    Vec<T> N[K + 2];
    for (int m = 0; m <= K; ++m) N[m] = splat<T>(RowValues<T, K>::one(values, ld, r, m));  // loads are free here
    N[K + 1] = splat<T>(values[(K + 1) * ld + r]);
#pragma GCC unroll 7
    for (int m = 0; m <= K + 1; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) acc[m][v] += N[m] * gr[v];
  }
#pragma GCC unroll 7
  for (int m = 0; m <= K + 1; ++m) {
    T* to = m <= K ? rows + m * W : base;
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) store<T>(to + v * L, load<T>(to + v * L) + acc[m][v]);
  }
}

// Tasks own a block of features for one split of the rows. The rows of a pass are sorted by interval first: without
// that, every multiply-add would also load and store its accumulator.
template <class T>
void kan_bwd_w(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t R = kan_weight_rows(p), P = p.spline.padded();
  by_order(p.spline.order, [&](auto order_tag) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order_tag)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int kMost = kRegisters >= 32 ? 4 : 2, OV = NT < kMost ? NT : kMost;
      T* x = scratch;
      T* values = x + kKanBlock * R;
      Int<T>* offset = reinterpret_cast<Int<T>*>(values + kKanBlock * (K + 2) * R);
      int32_t* sorted = reinterpret_cast<int32_t*>(offset + kKanBlock * R);
      int32_t* start = sorted + R + 16;
      T* g = reinterpret_cast<T*>(start + (p.spline.knots + 1) / 2 * 2);  // [tiles][R][W]
      const int64_t stride = (P + 1) * W, tile_stride = p.features * stride;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task / p.blocks(), i0 = task % p.blocks() * kKanBlock;
        const int64_t i1 = i0 + kKanBlock < p.features ? i0 + kKanBlock : p.features;
        const int64_t first = split * p.rows_per_split;
        const int64_t last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
        T* partial = p.partial + split * p.packed_size();
        for (int64_t t = 0; t < p.tiles(); ++t)
          std::memset(partial + t * tile_stride + i0 * stride, 0, size_t((i1 - i0) * stride) * sizeof(T));
        for (int64_t r0 = first; r0 < last; r0 += R) {
          const int64_t n = last - r0 < R ? last - r0 : R;
          for (int64_t t = 0; t < p.tiles(); ++t) {
            const int64_t left = p.outputs - t * W;
            load_rows<T>(p.y, r0, n, t * W, left < W ? left : W, g + t * R * W, W);
          }
          kan_values<T, K, W, false>(p, r0, n, i0, i1 - i0, R, x, values, offset);
          for (int64_t i = i0; i < i1; ++i) {
            const T* N = values + (i - i0) * (K + 2) * R;
            const Int<T>* at = offset + (i - i0) * R;
            const int intervals = p.spline.knots - 1;
            sort_rows<T>(at, n, W, intervals, sorted, start);
            for (int64_t t = 0; t < p.tiles(); ++t) {
              T* to = partial + t * tile_stride + i * stride;
              for (int j = 0; j < intervals; ++j) {
                if (start[j] == start[j + 1]) continue;
                for (int v = 0; v < NT; v += OV)
                  kan_bwd_w_interval<T, K, NT, OV>(sorted + start[j], start[j + 1] - start[j], N, R,
                                                   g + t * R * W + v * L, to + j * W + v * L, to + P * W + v * L);
              }
            }
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
