// kan_linear on a CPU: local support, K + 2 fused multiply-adds an edge instead of G + K + 1.
//
// Outputs lie in the vector lanes. Coefficients are repacked to [in][padded row][tile of outputs], so that the K + 1
// rows an input needs are K + 1 neighbouring tile rows. The basis of a block of rows and 16 features is evaluated with
// the rows in the lanes; then every feature sweeps over the rows, sorted by interval (kan_sweep_cpu.h).
//
// What bounds it (4096 x 784 -> 64, cubic, G = 5, a Xeon with AVX-512 and two FMAs a cycle): an input has 20 FMAs, 9
// loads and 4 stores, 10 cycles at best; a sweep takes 14.5 alone and 17 in place. Basis, base branch, x and sorting
// take 5 more.
#include "bspline/kan_sweep_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

template <class T>
int64_t kan_scratch(const KanLinearParams<T>& p) {
  return KanBlock<T>(p, nullptr).size + 64;
}

template <class T>
void kan_fwd(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t P = p.spline.padded(), F = kKanMost;
  by_order(p.spline.order, [&](auto order) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int OV = sweep_vectors<K, NT>();
      const KanBlock<T> b(p, scratch);
      const int64_t R = b.R, stride = (P + 1) * W;
      Runs runs[kKanMost];
      for (int64_t r0 = begin; r0 < end; r0 += R) {
        const int64_t n = end - r0 < R ? end - r0 : R;
        for (int64_t t = 0; t < p.tiles(); ++t) std::memset(b.rows + t * R * W, 0, size_t(n * W) * sizeof(T));
        for (int64_t i0 = 0; i0 < p.features; i0 += F) {
          const int64_t ni = p.features - i0 < F ? p.features - i0 : F;
          kan_values<T, K, false>(p, r0, n, i0, ni, b, runs);
          for (int64_t t = 0; t < p.tiles(); ++t)
            for (int64_t i = 0; i < ni; ++i) {
              const T* w = p.packed + (t * p.features + i0 + i) * stride;
              for (int v = 0; v < W; v += OV * L)
                kan_fwd_sweep<T, K, NT, OV>(runs[i], b.values + i * (K + 2) * R, R, w + v, w + P * W + v,
                                            b.rows + t * R * W + v);
            }
        }
        for (int64_t t = 0; t < p.tiles(); ++t) {
          const int64_t left = p.outputs - t * W;
          store_rows<T>(b.rows + t * R * W, W, p.y, r0, n, t * W, left < W ? left : W);
        }
      }
    });
  });
}

// Tasks own a block of features for one split of the rows, so each element of dx and of a partial gradient has one
// owner. Both gradients share the basis and the order of the rows.
template <class T>
void kan_bwd(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t P = p.spline.padded();
  static_assert(kKanBlock <= kKanMost);
  by_order(p.spline.order, [&](auto order) {
    by_tile<T>(p.tile, [&](auto vectors) {
      constexpr int K = decltype(order)::value, NT = decltype(vectors)::value, L = kLanes<T>, W = NT * L;
      constexpr int OV = sweep_vectors<K, NT>();
      const KanBlock<T> b(p, scratch);
      const int64_t R = b.R, stride = (P + 1) * W, tile_stride = p.features * stride;
      Runs runs[kKanMost];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task / p.blocks(), i0 = task % p.blocks() * kKanBlock;
        const int64_t ni = p.features - i0 < kKanBlock ? p.features - i0 : kKanBlock;
        const int64_t first = split * p.rows_per_split;
        const int64_t last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
        T* partial = p.want_weights ? p.partial + split * p.packed_size() + i0 * stride : nullptr;
        for (int64_t t = 0; t < p.tiles() && p.want_weights; ++t)
          std::memset(partial + t * tile_stride, 0, size_t(ni * stride) * sizeof(T));
        for (int64_t r0 = first; r0 < last; r0 += R) {
          const int64_t n = last - r0 < R ? last - r0 : R;
          for (int64_t t = 0; t < p.tiles(); ++t) {
            const int64_t left = p.outputs - t * W;
            load_rows<T>(p.y, r0, n, t * W, left < W ? left : W, b.rows + t * R * W, W);
          }
          kan_values<T, K, true>(p, r0, n, i0, ni, b, runs);
          for (int64_t t = 0; t < p.tiles(); ++t)
            for (int64_t i = 0; i < ni; ++i) {
              const T* g = b.rows + t * R * W;
              if (p.want_weights) {
                T* to = partial + t * tile_stride + i * stride;
                for (int v = 0; v < W; v += OV * L)
                  kan_bwd_w_sweep<T, K, NT, OV>(runs[i], b.values + i * (K + 2) * R, R, g + v, to + v, to + P * W + v);
              }
              if (!p.want_x) continue;
              const T* w = p.packed + t * tile_stride + (i0 + i) * stride;
              for (int v = 0; v < W; v += OV * L)
                kan_bwd_x_sweep<T, K, NT, OV>(runs[i], b.slopes + i * (K + 2) * R, R, w + v, w + P * W + v, g + v,
                                              v > 0, b.part);
              for (int64_t r = 0; r < n; r += L) {
                T* to = b.dx + i * R + r;
                const Vec<T> sum = sum_each<T>(b.part + r * L);
                store<T>(to, t ? load<T>(to) + sum : sum);
              }
            }
          if (p.want_x) store_columns<T>(b.dx, R, p.dx, r0, n, i0, ni);
        }
      }
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
