// What forward and backward of topk_attention share. Both must see the same bits of every logit, or the backward would
// keep other keys than the forward: so logits are made by `block_logits` alone.
#pragma once
#include "common/rows_cpu.h"
#include "topk_attention/topk_attention_params.h"
#include "topk_attention/topk_select_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

constexpr int kProductRows = 4;
constexpr int64_t kListPad = kFew;  // a compressed store writes a whole vector

template <class T>
int64_t logits_ld(int64_t width) {
  return (width + kTileKeys - 1) / kTileKeys * kTileKeys + 16;  // + 16: rows do not share cache sets
}

constexpr int64_t kSumBlock = 256;  // long sums are made of sums of so many terms: rounding errors stay small

// out[r][j] = scale * sum_d a[r][d] tile[d][j] for kProductRows rows and one tile of keys, summed in the order of d.
template <class T>
PYML_INLINE void product_rows(int64_t depth, const T* a, int64_t lda, const T* tile, T scale, T* out, int64_t ldo) {
  constexpr int L = kLanes<T>, V = kRegisters >= 32 ? 4 : 2;
  for (int64_t j = 0; j < kTileKeys; j += V * L)
    for (int64_t from = 0, to = 0; from == 0 || from < depth; from = to) {
      to = depth - from > kSumBlock ? from + kSumBlock : depth;
      Vec<T> acc[kProductRows][V];
#pragma GCC unroll 4
      for (int r = 0; r < kProductRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
      for (int64_t d = from; d < to; ++d) {
        Vec<T> b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load<T>(tile + d * kTileKeys + j + v * L);
#pragma GCC unroll 4
        for (int r = 0; r < kProductRows; ++r) {
          const Vec<T> x = splat<T>(a[r * lda + d]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[r][v] += x * b[v];
        }
      }
      const T factor = to == depth ? scale : T(1);
#pragma GCC unroll 4
      for (int r = 0; r < kProductRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          T* o = out + r * ldo + j + v * L;
          const Vec<T> sum = from ? load<T>(o) + acc[r][v] : acc[r][v];
          store<T>(o, sum * factor);
        }
      if (to == depth) break;
    }
}

// The same for any number of rows and of tiles; a has rows up to a multiple of kProductRows.
template <class T>
__attribute__((noinline)) void products(int64_t rows, int64_t tiles, int64_t depth, const T* a, int64_t lda,
                                        const T* tile, T scale, T* out, int64_t ldo) {
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t r = 0; r < rows; r += kProductRows)
      product_rows<T>(depth, a + r * lda, lda, tile + t * depth * kTileKeys, scale, out + r * ldo + t * kTileKeys, ldo);
}

// Keys that a query may attend to, as far as `causal` says.
template <class T>
int64_t reach(const TopkAttentionParams<T>& p, int64_t row) {
  const int64_t last = row % p.queries + 1;
  return p.causal && last < p.keys ? last : p.keys;
}

template <class T>
int64_t farthest(const TopkAttentionParams<T>& p, int64_t row, int64_t n) {
  int64_t most = 0;
  for (int64_t r = row; r < row + n; ++r) most = reach(p, r) > most ? reach(p, r) : most;
  return most;
}

// s[r][j] = the logit of query row + r (r < n) and key first + j (j < width), -inf where masked and from there to a
// whole tile. `first` starts a tile, q holds the queries, `extra` has room for `width` numbers.
template <class T>
void block_logits(const TopkAttentionParams<T>& p, int64_t row, int64_t n, int64_t first, int64_t width, const T* q,
                  T* s, int64_t lds, T* extra) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const int64_t group = row / p.group_rows(), tiles = (width + kTileKeys - 1) / kTileKeys;
  const T* keys = p.key_tiles + (group * p.tiles() + first / kTileKeys) * p.depth * kTileKeys;
  products<T>(n, tiles, p.depth, q, p.depth_ld(), keys, p.scale, s, lds);
  for (int64_t r = 0; r < n; ++r) {
    T* to = s + r * lds;
    int64_t seen = reach(p, row + r) - first;
    seen = seen < 0 ? 0 : seen < width ? seen : width;
    if (p.mask_bool) {
      const bool* m = p.mask_bool + p.mask.row(row + r) + first * p.mask.stride_c;
      const int64_t step = p.mask.stride_c;
      if (step == 1)
        for (int64_t j = 0; j < seen; ++j) to[j] = m[j] ? to[j] : -kInf;
      else
        for (int64_t j = 0; j < seen; ++j) to[j] = m[j * step] ? to[j] : -kInf;
    } else if (p.mask.data) {
      load_rows<T>(p.mask, row + r, 1, first, seen, extra, seen);
      for (int64_t j = 0; j < seen; ++j) to[j] = extra[j] == -kInf ? -kInf : to[j] + extra[j];
    }
    for (int64_t j = seen; j < tiles * kTileKeys; ++j) to[j] = -kInf;
  }
}

// The sum over the lanes, faster than `sum` for what is called once a key.
template <class T>
PYML_INLINE T lane_sum(const std::common_type_t<Vec<T>>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#else
  return sum<T>(v);
#endif
}

// weight[j] = exp(value[j] - shift) for n entries, 0 up to a whole vector; returns their sum. `value` is readable that
// far.
template <class T>
PYML_INLINE T exponentials(const T* value, int64_t n, T shift, T* weight) {
  constexpr int L = kLanes<T>;
  IVec<T> lane;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) lane[l] = l;
  Vec<T> total = Vec<T>{};
  for (int64_t j = 0; j < n; j += L) {
    Vec<T> e = exp<T>(load<T>(value + j) - shift);
    if (j + L > n) e = lane < Int<T>(n - j) ? e : Vec<T>{};
    store<T>(weight + j, e);
    total += e;
  }
  return lane_sum<T>(total);
}

// out += sum_t weight[t] rows[number[t]], NV vectors of it; several entries at once hide the latency of the sums.
template <class T, int NV>
PYML_INLINE void weighted_sum_part(int64_t n, const T* weight, const int32_t* number, const T* rows, int64_t ld,
                                   T* out) {
  constexpr int L = kLanes<T>, U = 8 / NV;
  Vec<T> acc[U][NV];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[u][v] = Vec<T>{};
  int64_t t = 0;
  for (; t + U <= n; t += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Vec<T> w = splat<T>(weight[t + u]);
      const T* row = rows + number[t + u] * ld;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[u][v] += w * load<T>(row + v * L);
    }
  for (; t < n; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[0][v] += splat<T>(weight[t]) * load<T>(rows + number[t] * ld + v * L);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) acc[0][v] += acc[u][v];
    store<T>(out + v * L, load<T>(out + v * L) + acc[0][v]);
  }
}

// rows[number[t]] += weight[t] x, NV vectors of it.
template <class T, int NV>
PYML_INLINE void scatter_part(int64_t n, const T* weight, const int32_t* number, const T* x, T* rows, int64_t ld) {
  constexpr int L = kLanes<T>;
  Vec<T> own[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) own[v] = load<T>(x + v * L);
  for (int64_t t = 0; t < n; ++t) {
    const Vec<T> w = splat<T>(weight[t]);
    T* row = rows + number[t] * ld;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store<T>(row + v * L, load<T>(row + v * L) + w * own[v]);
  }
}

// Calls f(integral_constant<int, vectors>, first column) over `ld` columns, 4 vectors, 2 or 1 at a time.
template <class T, class F>
PYML_INLINE void by_vectors(int64_t ld, F&& f) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * L <= ld; c += 4 * L) f(std::integral_constant<int, 4>{}, c);
  if (c + 2 * L <= ld) f(std::integral_constant<int, 2>{}, c), c += 2 * L;
  if (c < ld) f(std::integral_constant<int, 1>{}, c);
}

template <class T>
void weighted_sum(int64_t n, const T* weight, const int32_t* number, const T* rows, int64_t ld, T* out) {
  by_vectors<T>(ld, [&](auto vectors, int64_t c) {
    for (int64_t t = 0; t < n; t += kSumBlock)
      weighted_sum_part<T, decltype(vectors)::value>(n - t < kSumBlock ? n - t : kSumBlock, weight + t, number + t,
                                                     rows + c, ld, out + c);
  });
}

template <class T>
void scatter(int64_t n, const T* weight, const int32_t* number, const T* x, T* rows, int64_t ld) {
  by_vectors<T>(ld, [&](auto vectors, int64_t c) {
    scatter_part<T, decltype(vectors)::value>(n, weight, number, x + c, rows + c, ld);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
