// kan_linear on a CPU: local support, K + 2 fused multiply-adds an edge instead of G + K + 1.
//
// Outputs lie in the vector lanes. Coefficients are repacked to [in][padded row][tile of outputs], so that the K + 1
// rows an input needs are K + 1 neighbouring tile rows. A block of features whose rows fit in the first-level cache
// meets a block of batch rows whose basis was evaluated just before, rows in the lanes. Bound by loads: each FMA reads
// one weight vector, two rows at a time share nothing but the base weight, so about 1.2 loads an FMA.

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
  const int64_t back_w = weight_rows * (padded + kKanBlock * (1 + (K + 2) + 1) + 2) + p.spline.knots + 64;
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

// values[i][m][r] = N_m (or its slope) for m <= K and the base branch at m = K + 1; offset[i][r] = where the row's K +
// 1 coefficient rows start within the feature. Rows come in groups of kKanGroup; those beyond n are those of x = 0.
template <class T, int K, bool kSlope>
void kan_values(const KanLinearParams<T>& p, int64_t r0, int64_t n, int64_t i0, int64_t ni, int64_t ld, T* x, T* values,
                Int<T>* offset) {
  constexpr int L = kLanes<T>;
  load_columns<T>(p.x, r0, n, i0, ni, x, ld);
  for (int64_t i = 0; i < ni; ++i) {
    const KnotRow<T>& row = p.spline.row(i0 + i);
    T* out = values + i * (K + 2) * ld;
    for (int64_t r = 0; r < (n + kKanGroup - 1) / kKanGroup * kKanGroup; r += L) {
      const Vec<T> v = load<T>(x + i * ld + r);
      Vec<T> N[K + 1], D[K + 1], slope = splat<T>(0), value = slope;
      const Located<T> at = locate<T>(p.spline, row, v);
      basis<T, K, kSlope>(p.spline, row, at, N, D);
      if (p.base != Base::kNone) value = base_value<T>(p.base, v, kSlope ? &slope : nullptr);
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) store<T>(out + m * ld + r, kSlope ? D[m] : N[m]);
      store<T>(out + (K + 1) * ld + r, kSlope ? slope : value);
      store_int<T>(offset + i * ld + r, at.interval * Int<T>(p.tile));
    }
  }
}

// y[rows r..r+RB][tile] += sum over a block of features. NT vectors in the tile, OV of them in registers.
template <class T, int K, int NT, int OV, int RB>
PYML_INLINE void kan_fwd_rows(int64_t ni, int64_t feature_stride, int64_t base_row, const T* w, const T* values,
                              const Int<T>* offset, int64_t ld, T* y) {
  constexpr int L = kLanes<T>, W = NT * L;
  Vec<T> acc[RB][OV];
#pragma GCC unroll 16
  for (int b = 0; b < RB; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < OV; ++v) acc[b][v] = load<T>(y + b * W + v * L);
  for (int64_t i = 0; i < ni; ++i, w += feature_stride, values += (K + 2) * ld, offset += ld) {
#pragma GCC unroll 16
    for (int b = 0; b < RB; ++b) {
      const T* row = w + offset[b];
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) {
        const Vec<T> s = splat<T>(values[m * ld + b]);
#pragma GCC unroll 4
        for (int v = 0; v < OV; ++v) acc[b][v] += s * load<T>(row + m * W + v * L);
      }
    }
    const T* base = w + base_row * W;
#pragma GCC unroll 16
    for (int b = 0; b < RB; ++b) {
      const Vec<T> s = splat<T>(values[(K + 1) * ld + b]);
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
          kan_values<T, K, false>(p, r0, n, i0, ni, R, x, values, offset);
          for (int64_t t = 0; t < p.tiles(); ++t) {
            const T* w = p.packed + (t * p.features + i0) * stride;
            for (int v = 0; v < NT; v += OV)
              for (int64_t r = 0; r < n; r += RB)
                kan_fwd_rows<T, K, NT, OV, RB>(ni, stride, P, w + v * L, values + r, offset + r, R,
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

// dx[r][i] = sum_o g[o] (sum_m N'_m C[J + m][o] + base' Wb[o]): weights are combined first, so one dot product an edge;
// the lanes of a block of features are then added up together by a transpose.
template <class T>
void kan_bwd_x(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  constexpr int64_t R = kKanRows, block = kKanMost;
  const int64_t P = p.spline.padded();
  by_order(p.spline.order, [&](auto order) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int OV = NT < 4 ? NT : 4;
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
          kan_values<T, K, true>(p, r0, n, i0, ni, R, x, values, offset);
          std::memset(dx, 0, size_t(R * block) * sizeof(T));
          for (int64_t t = 0; t < p.tiles(); ++t)
            for (int v0 = 0; v0 < NT; v0 += OV)
              for (int64_t r = 0; r < n; ++r) {
                Vec<T> gr[OV];
#pragma GCC unroll 4
                for (int v = 0; v < OV; ++v) gr[v] = load<T>(g + (t * R + r) * W + (v0 + v) * L);
                for (int64_t i1 = 0; i1 < ni; i1 += L) {
                  T part[L * L], flipped[L * L];
                  const int64_t m1 = ni - i1 < L ? ni - i1 : L;
                  for (int64_t i = m1; i < L; ++i) store<T>(part + i * L, splat<T>(0));
                  for (int64_t i = 0; i < m1; ++i) {
                    const T* w = p.packed + (t * p.features + i0 + i1 + i) * stride + v0 * L;
                    const T* d = values + (i1 + i) * (K + 2) * R + r;
                    const T* row = w + offset[(i1 + i) * R + r];
                    const Vec<T> base_slope = splat<T>(d[(K + 1) * R]);
                    Vec<T> mixed[OV];
#pragma GCC unroll 4
                    for (int v = 0; v < OV; ++v) mixed[v] = base_slope * load<T>(w + P * W + v * L);
#pragma GCC unroll 6
                    for (int m = 0; m <= K; ++m) {
                      const Vec<T> s = splat<T>(d[m * R]);
#pragma GCC unroll 4
                      for (int v = 0; v < OV; ++v) mixed[v] += s * load<T>(row + m * W + v * L);
                    }
                    Vec<T> total = mixed[0] * gr[0];
#pragma GCC unroll 4
                    for (int v = 1; v < OV; ++v) total += mixed[v] * gr[v];
                    store<T>(part + i * L, total);
                  }
                  transpose_tile<T>(part, L, flipped, L);
                  T* to = dx + r * block + i1;
                  Vec<T> sums = load<T>(to);
                  for (int l = 0; l < L; ++l) sums += load<T>(flipped + l * L);
                  store<T>(to, sums);
                }
              }
          store_rows<T>(dx, block, p.dx, r0, n, i0, ni);
        }
      }
    });
  });
}

// acc[m][v] += N_m(r) g[r][v] over the rows of one interval: all K + 2 coefficient rows of that interval stay in
// registers.
template <class T, int K, int NT, int OV>
PYML_INLINE void kan_bwd_w_interval(const int32_t* order, int64_t count, const T* values, int64_t ld, const T* g,
                                    T* rows, T* base) {
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
#pragma GCC unroll 7
    for (int m = 0; m <= K + 1; ++m) {
      const Vec<T> s = splat<T>(values[m * ld + r]);
#pragma GCC unroll 4
      for (int v = 0; v < OV; ++v) acc[m][v] += s * gr[v];
    }
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
      int32_t* start = sorted + R;
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
          kan_values<T, K, false>(p, r0, n, i0, i1 - i0, R, x, values, offset);
          for (int64_t i = i0; i < i1; ++i) {
            const T* N = values + (i - i0) * (K + 2) * R;
            const Int<T>* at = offset + (i - i0) * R;
            const int intervals = p.spline.knots - 1;
            for (int j = 0; j <= intervals; ++j) start[j] = 0;
            for (int64_t r = 0; r < n; ++r) ++start[at[r] / W + 1];
            for (int j = 0; j < intervals; ++j) start[j + 1] += start[j];
            for (int64_t r = 0; r < n; ++r) sorted[start[at[r] / W]++] = int32_t(r);
            for (int64_t t = 0; t < p.tiles(); ++t) {
              T* to = partial + t * tile_stride + i * stride;
              for (int64_t j = 0, from = 0; j < intervals; from = start[j++]) {
                if (start[j] == from) continue;
                for (int v = 0; v < NT; v += OV)
                  kan_bwd_w_interval<T, K, NT, OV>(sorted + from, start[j] - from, N, R, g + t * R * W + v * L,
                                                   to + j * W + v * L, to + P * W + v * L);
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
