// region_attention on a CPU. Forward: queries in the lanes, so that the softmax needs no sum across lanes and a masked
// key is just a row less. Backward: keys in the lanes, so that dK and dV need none; every pair of a query region and a
// key region is visited once.
#include "common/exp2_cpu.h"
#include "common/rows_cpu.h"
#include "common/tile_cpu.h"
#include "topk_attention/topk_attention.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

PYML_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// dst[c * ld + i] = column c of row chosen[i], with zeros up to ld; for the valid keys among masked ones.
template <class T>
void gather_columns(const Rows& src, const int32_t* chosen, int64_t n, int64_t columns, T* dst, int64_t ld) {
  by_dtype(src.dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(src.data);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < n; ++i) dst[c * ld + i] = T(widen(from[chosen[i] * src.stride_w + c * src.stride_c]));
      for (int64_t i = n; i < ld; ++i) dst[c * ld + i] = 0;
    }
  });
}

template <class T>
void scatter_columns(const T* src, int64_t ld, const Rows& dst, const int32_t* chosen, int64_t n, int64_t columns) {
  by_dtype(dst.dtype, [&](auto tag) {
    using To = decltype(tag);
    auto* to = static_cast<To*>(dst.data);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < columns; ++c)
        to[chosen[i] * dst.stride_w + c * dst.stride_c] = narrow<To>(src[c * ld + i]);
  });
}

// Calls f(slot, region, weight) for the regions that query region p of (b, h) chose.
template <class T, class F>
inline void for_chosen(const RegionParams<T>& c, int64_t b, int64_t h, int64_t p, const F& f) {
  const int64_t* index = c.index + c.slot(b, h, p, c.index_heads);
  const T* weight = c.weight ? c.weight + c.slot(b, h, p, c.weight_heads) : nullptr;
  const int64_t used = c.chosen(b, h, p);
  for (int64_t j = 0; j < used; ++j)
    if (index[j] >= 0) f(j, index[j], weight ? weight[j] : T(1));
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
void region_rows(const RegionParams<T>& c, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item % c.key_regions, h = item / c.key_regions % c.heads, b = item / c.key_regions / c.heads;
    const int64_t n = c.valid_keys(b, g);
    const int32_t* valid = c.valid ? c.valid + (b * c.key_regions + g) * c.keys : nullptr;
    const auto copy = [&](const Regions& from, int64_t width, T* to) {
      const Rows rows = from.rows(b, h, g);
      if (!valid) return load_rows<T>(rows, 0, n, 0, width, to, width);
      for (int64_t t = 0; t < n; ++t) load_rows<T>(rows, valid[t], 1, 0, width, to + t * width, width);
    };
    copy(c.k, c.features, c.key_rows + item * c.keys * c.features);
    copy(c.v, c.value_features, c.value_rows + item * c.keys * c.value_features);
  }
}

// One block of queries [D][W] against `n` keys, NV vectors of queries at a time: logits [n][W], largest m, sum l, o
// [Dv][W].
template <class T, int NV, bool kWeighted>
PYML_INLINE void attend(const RegionParams<T>& c, const T* queries, int64_t W, const T* k, int64_t k_stride, const T* v,
                        int64_t v_stride, int64_t n, T weight, T* s, T* o, T* m, T* l) {
  constexpr int L = kLanes<T>;
  Vec<T> top[NV], factor[NV], total[NV];
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) top[i] = load<T>(m + i * L);
  const auto zero = [](int, int) { return splat<T>(0); };
  for_tile_rows(n, [&](auto rows, int64_t t) {
    tile<T, rows, NV>(c.features, k + t * k_stride, k_stride, 1, queries, W, zero, [&](int r, int i, Vec<T> logit) {
      if constexpr (kWeighted) logit *= weight;
      top[i] = larger<T>(logit, top[i]);  // a NaN is not the largest: it comes back with the exponentials
      store<T>(s + (t + r) * W + i * L, logit);
    });
  });
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) {
    const Vec<T> before = load<T>(m + i * L);
    store<T>(m + i * L, top[i]);
    top[i] = top[i] == kLowest ? splat<T>(0) : top[i];
    factor[i] = exp2_fast<T>(before - top[i]);
    total[i] = splat<T>(0);
  }
  for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      Vec<T> p = exp2_fast<T>(load<T>(s + t * W + i * L) - top[i]);
      total[i] += p;
      if constexpr (kWeighted) p *= weight;
      store<T>(s + t * W + i * L, p);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) store<T>(l + i * L, load<T>(l + i * L) * factor[i] + total[i]);
  for_tile_rows(c.value_features, [&](auto rows, int64_t e) {
    tile<T, rows, NV>(n, v + e, 1, v_stride, s, W, zero, [&](int r, int i, const Vec<T>& sum) {
      T* to = o + (e + r) * W + i * L;
      store<T>(to, load<T>(to) * factor[i] + sum);
    });
  });
}

template <class T, bool kWeighted>
void region_fwd(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {
  constexpr int L = kLanes<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const Blocks blocks(c.queries, L);
  const int64_t W = blocks.padded, D = c.features, Dv = c.value_features;
  T* queries = scratch;
  T* s = queries + D * W;
  T* o = s + kBlock * W;
  T* m = o + Dv * W;
  T* l = m + W;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks.count * blocks.length, region = item / blocks.count;
    const int64_t p = region % c.query_regions, h = region / c.query_regions % c.heads,
                  b = region / c.query_regions / c.heads;
    const int64_t count = least(blocks.length, c.queries - first);
    load_columns<T>(c.q.rows(b, h, p), first, count, 0, D, queries, W);
    for (int64_t i = 0; i < D * W; i += L) store<T>(queries + i, load<T>(queries + i) * c.scale);
    for (int64_t i = 0; i < W; i += L) store<T>(m + i, splat<T>(-kInfinity)), store<T>(l + i, splat<T>(0));
    for (int64_t i = 0; i < Dv * W; i += L) store<T>(o + i, splat<T>(0));
    for_chosen(c, b, h, p, [&](int64_t, int64_t g, T weight) {
      const T* k = c.key_rows + b * c.key_stride[0] + h * c.key_stride[1] + g * c.key_stride[2];
      const T* v = c.value_rows + b * c.value_stride[0] + h * c.value_stride[1] + g * c.value_stride[2];
      const Blocks part(c.valid_keys(b, g), 1);
      for (int64_t t = 0; t < part.count; ++t) {
        const int64_t from = t * part.length, n = least(part.length, c.valid_keys(b, g) - from);
        for_tile_columns(W / L, [&](auto vectors, int64_t i) {
          attend<T, vectors, kWeighted>(c, queries + i * L, W, k + from * c.key_stride[3], c.key_stride[3],
                                        v + from * c.value_stride[3], c.value_stride[3], n, weight, s + i * L,
                                        o + i * L, m + i * L, l + i * L);
        });
      }
    });
    T* lse = c.lse + region * c.queries + first;
    for (int64_t i = 0; i < W; i += L) {
      const Vec<T> total = load<T>(l + i), top = load<T>(m + i);
      const auto none = (top == -kInfinity) & (total == total);  // no key, or logits of -infinity only
      const Vec<T> inverse = none ? splat<T>(0) : T(1) / total;
      for (int64_t e = 0; e < Dv; ++e) store<T>(o + e * W + i, load<T>(o + e * W + i) * inverse);
      store<T>(l + i, none ? splat<T>(0) : total);
    }
    for (int64_t i = 0; i < count; ++i)
      lse[i] =
          l[i] == 0 ? kInfinity : m[i] + (sizeof(T) == 8 ? T(__builtin_log2(l[i])) : T(__builtin_log2f(float(l[i]))));
    store_columns<T>(o, W, c.out.rows(b, h, p), first, count, 0, Dv);
    if (c.exact.data) store_columns<T>(o, W, c.exact.rows(b, h, p), first, count, 0, Dv);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// Sizes of one block of keys in the backward's buffers.
template <class T>
struct KeyBlocks {
  Blocks blocks;
  int64_t row, packed, rows;  // padded D; elements of keys and values [D + Dv][padded]; of key rows [padded][padded D]
  explicit KeyBlocks(const RegionParams<T>& c) : blocks(c.keys, kLanes<T>) {
    row = (c.features + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    packed = (c.features + c.value_features) * blocks.padded;
    rows = blocks.padded * row;
  }
};

template <class T>
void region_pack(const RegionParams<T>& c, int64_t begin, int64_t end) {
  const KeyBlocks<T> size(c);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item % c.key_regions, h = item / c.key_regions % c.heads, b = item / c.key_regions / c.heads;
    const int64_t n = c.valid_keys(b, g), W = size.blocks.padded;
    const int32_t* valid = c.valid ? c.valid + (b * c.key_regions + g) * c.keys : nullptr;
    for (int64_t block = 0; block < size.blocks.count; ++block) {
      const int64_t first = block * size.blocks.length;
      const int64_t count = n > first ? least(size.blocks.length, n - first) : 0;
      T* columns = c.packed + (item * size.blocks.count + block) * size.packed;
      T* rows = c.packed_rows + (item * size.blocks.count + block) * size.rows;
      const auto copy = [&](const Regions& from, int64_t width, T* to) {
        const Rows source = from.rows(b, h, g);
        if (valid) return gather_columns<T>(source, valid + first, count, width, to, W);
        load_columns<T>(source, first, count, 0, width, to, W);
      };
      copy(c.k, c.features, columns);
      copy(c.v, c.value_features, columns + c.features * W);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < size.row; ++d) rows[t * size.row + d] = d < c.features ? columns[d * W + t] : T(0);
    }
  }
}

// Queries that the backward takes at a time: its two tiles of them, P and dS, share the first cache with the rest.
constexpr int64_t kQueryBlock = 32;

// The buffers of one block of queries.
template <class T>
struct QueryTile {
  T *queries, *grad, *lse, *delta;  // [n][D] with the scale in them, [n][Dv], [n], [n] = rowsum(dO * O)
  T* dq;                            // [n][D padded]
  T *p, *ds;                        // [n][W]
};

// P = exp2(S - lse) and dS = P * (dP - delta) of one block of keys; both times the region's weight, whose gradient is
// added up in the lanes of `dweight`.
template <class T, int NV, bool kWeighted>
PYML_INLINE void scores(const RegionParams<T>& c, const QueryTile<T>& x, int64_t n, int64_t W, const T* k, const T* v,
                        int64_t at, T weight, T* dweight) {
  constexpr int L = kLanes<T>;
  for_tile_rows(n, [&](auto rows, int64_t q) {
    const auto place = [&](int r, int i) { return (q + r) * W + at + i * L; };
    tile<T, rows, NV>(
        c.value_features, x.grad + q * c.value_features, c.value_features, 1, v, W,
        [&](int r, int) { return kWeighted ? splat<T>(0) : splat<T>(-x.delta[q + r]); },
        [&](int r, int i, const Vec<T>& dp) { store<T>(x.ds + place(r, i), dp); });
    tile<T, rows, NV>(
        c.features, x.queries + q * c.features, c.features, 1, k, W, [](int, int) { return splat<T>(0); },
        [&](int r, int i, const Vec<T>& logit) {
          const Vec<T> dp = load<T>(x.ds + place(r, i));
          if constexpr (kWeighted) {
            const Vec<T> p = exp2_fast<T>(logit * weight - x.lse[q + r]), ds = p * (dp * weight - x.delta[q + r]);
            constexpr T kLn2 = T(0.69314718055994530942);  // the logits are in base 2
            store<T>(dweight + at + i * L, load<T>(dweight + at + i * L) + (ds * logit * kLn2 + p * dp));
            store<T>(x.p + place(r, i), p * weight);
            store<T>(x.ds + place(r, i), ds * weight);
          } else {
            const Vec<T> p = exp2_fast<T>(logit - x.lse[q + r]);
            store<T>(x.p + place(r, i), p);
            store<T>(x.ds + place(r, i), p * dp);
          }
        });
  });
}

// to[m][N] (+)= sum_k A(m, k) b[k][N]. The sum begins at 0 and is then added: rounding grows with the blocks' lengths,
// not with their product.
template <class T>
PYML_INLINE void accumulate(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b,
                            int64_t ldb, T* to, int64_t ld, bool add) {
  constexpr int L = kLanes<T>;
  for_tile_columns(N / L, [&](auto vectors, int64_t v) {
    for_tile_rows(M, [&](auto rows, int64_t m) {
      T* out = to + m * ld + v * L;
      tile<T, rows, vectors>(
          K, a + m * am, am, ak, b + v * L, ldb, [](int, int) { return splat<T>(0); },
          [&](int r, int i, const Vec<T>& sum) {
            T* place = out + r * ld + i * L;
            store<T>(place, add ? load<T>(place) + sum : sum);
          });
    });
  });
}

template <class T, bool kWeighted>
void region_bwd(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {
  constexpr int L = kLanes<T>;
  const KeyBlocks<T> size(c);
  const Blocks queries(c.queries, 1, kQueryBlock);
  const int64_t W = size.blocks.padded, D = c.features, Dv = c.value_features;
  QueryTile<T> x;
  x.p = scratch;
  x.ds = x.p + kQueryBlock * W;
  x.dq = x.ds + kQueryBlock * W;
  x.queries = x.dq + kQueryBlock * size.row;
  x.grad = x.queries + kQueryBlock * D;
  x.lse = x.grad + kQueryBlock * Dv;
  x.delta = x.lse + kQueryBlock;
  T* out = x.delta + kQueryBlock;
  T* dweight = out + kQueryBlock * Dv;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task / c.group(), bh = task % c.group(), b = bh / c.heads, h = bh % c.heads;
    const int64_t p0 = c.query_regions * split / c.splits, p1 = c.query_regions * (split + 1) / c.splits;
    uint8_t* touched = c.touched + task * c.key_regions;
    for (int64_t p = p0; p < p1; ++p) {
      T* dweights = c.dweight ? c.dweight + (bh * c.query_regions + p) * c.slots : nullptr;
      for (int64_t j = 0; dweights && j < c.slots; ++j) dweights[j] = 0;
      for (int64_t block = 0; block < queries.count; ++block) {
        const int64_t first = block * queries.length, n = least(queries.length, c.queries - first);
        load_rows<T>(c.q.rows(b, h, p), first, n, 0, D, x.queries, D);
        for (int64_t i = 0; i < n * D; ++i) x.queries[i] *= c.scale;
        load_rows<T>(c.grad.rows(b, h, p), first, n, 0, Dv, x.grad, Dv);
        load_rows<T>(c.out.rows(b, h, p), first, n, 0, Dv, out, Dv);
        for (int64_t i = 0; i < n; ++i) {
          x.lse[i] = c.lse[(bh * c.query_regions + p) * c.queries + first + i];
          T sum = 0;
          for (int64_t e = 0; e < Dv; ++e) sum += x.grad[i * Dv + e] * out[i * Dv + e];
          x.delta[i] = sum;
        }
        std::memset(x.dq, 0, size_t(n * size.row) * sizeof(T));
        for_chosen(c, b, h, p, [&](int64_t j, int64_t g, T weight) {
          const int64_t valid = c.valid_keys(b, g);
          T dw = 0;
          for (int64_t t = 0; t < size.blocks.count; ++t) {
            const int64_t keys = least(size.blocks.length, valid - t * size.blocks.length);
            if (keys <= 0) break;
            const int64_t at = (bh * c.key_regions + g) * size.blocks.count + t;
            const T* k = c.packed + at * size.packed;
            if (kWeighted) std::memset(dweight, 0, size_t(W) * sizeof(T));
            for_tile_columns(W / L, [&](auto vectors, int64_t i) {
              scores<T, vectors, kWeighted>(c, x, n, W, k + i * L, k + D * W + i * L, i * L, weight, dweight);
            });
            for (int64_t i = 0; kWeighted && i < keys; ++i) dw += dweight[i];
            if (c.want_kv) {
              T* to = c.partial + (split * c.group() * c.key_regions * size.blocks.count + at) * size.packed;
              const bool add = touched[g];
              accumulate<T>(D, W, n, x.queries, 1, D, x.ds, W, to, W, add);
              accumulate<T>(Dv, W, n, x.grad, 1, Dv, x.p, W, to + D * W, W, add);
            }
            if (c.want_q)
              accumulate<T>(n, size.row, keys, x.ds, W, 1, c.packed_rows + at * size.rows, size.row, x.dq, size.row,
                            true);
          }
          if (valid > 0) touched[g] = 1;
          if (dweights) dweights[j] += dw;
        });
        if (c.want_q) {
          for (int64_t i = 0; i < n * size.row; ++i) x.dq[i] *= c.grad_scale;
          store_rows<T>(x.dq, size.row, c.dq.rows(b, h, p), first, n, 0, D);
        }
      }
    }
  }
}

// dK and dV of one key region: the partial sums of the splits that touched it, in order.
template <class T>
void region_reduce(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {
  constexpr int L = kLanes<T>;
  constexpr T kLn2 = T(0.69314718055994530942);  // the queries in the sums have log2 e in their scale
  const KeyBlocks<T> size(c);
  const int64_t W = size.blocks.padded, regions = c.group() * c.key_regions;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item % c.key_regions, h = item / c.key_regions % c.heads, b = item / c.key_regions / c.heads;
    const int64_t n = c.valid_keys(b, g);
    const int32_t* valid = c.valid ? c.valid + (b * c.key_regions + g) * c.keys : nullptr;
    const Rows dk = c.dk.rows(b, h, g), dv = c.dv.rows(b, h, g);
    std::memset(scratch, 0, size_t(size.packed) * sizeof(T));
    for (int64_t t = 0; n < c.keys && t < c.keys; ++t) {  // the masked keys keep this zero
      if (c.dk.data) store_columns<T>(scratch, W, dk, t, 1, 0, c.features);
      if (c.dv.data) store_columns<T>(scratch, W, dv, t, 1, 0, c.value_features);
    }
    for (int64_t block = 0; block < size.blocks.count; ++block) {
      const int64_t first = block * size.blocks.length;
      const int64_t count = least(size.blocks.length, n - first);
      if (count <= 0) break;
      bool any = false;
      for (int64_t split = 0; split < c.splits; ++split) {
        if (!c.touched[split * regions + item]) continue;
        const T* from = c.partial + ((split * regions + item) * size.blocks.count + block) * size.packed;
        for (int64_t i = 0; i < size.packed; i += L)
          store<T>(scratch + i, any ? load<T>(scratch + i) + load<T>(from + i) : load<T>(from + i));
        any = true;
      }
      if (any)
        for (int64_t i = 0; i < c.features * W; i += L) store<T>(scratch + i, load<T>(scratch + i) * kLn2);
      const auto write = [&](const T* from, const Regions& to, int64_t width) {
        if (!to.data) return;
        if (valid) return scatter_columns<T>(from, W, to.rows(b, h, g), valid + first, count, width);
        store_columns<T>(from, W, to.rows(b, h, g), first, count, 0, width);
      };
      write(scratch, c.dk, c.features);
      write(scratch + c.features * W, c.dv, c.value_features);
    }
  }
}

}  // namespace

#define PYML_REGION_DEFINE(T)                                                                                      \
  void region_rows_kernel(const RegionParams<T>& c, int64_t begin, int64_t end) { region_rows<T>(c, begin, end); } \
  void region_fwd_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                       \
    c.weight ? region_fwd<T, true>(c, begin, end, scratch) : region_fwd<T, false>(c, begin, end, scratch);         \
  }                                                                                                                \
  int64_t region_fwd_scratch(const RegionParams<T>& c) {                                                           \
    return (c.features + kBlock + c.value_features + 2) * Blocks(c.queries, kLanes<T>).padded;                     \
  }                                                                                                                \
  void region_pack_kernel(const RegionParams<T>& c, int64_t begin, int64_t end) { region_pack<T>(c, begin, end); } \
  void region_bwd_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                       \
    c.weight ? region_bwd<T, true>(c, begin, end, scratch) : region_bwd<T, false>(c, begin, end, scratch);         \
  }                                                                                                                \
  int64_t region_bwd_scratch(const RegionParams<T>& c) {                                                           \
    const KeyBlocks<T> size(c);                                                                                    \
    return kQueryBlock * (2 * size.blocks.padded + size.row + c.features + 2 * c.value_features + 2) +             \
           size.blocks.padded + size.packed;                                                                       \
  }                                                                                                                \
  void region_reduce_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                    \
    region_reduce<T>(c, begin, end, scratch);                                                                      \
  }                                                                                                                \
  int64_t region_lanes(const RegionParams<T>&) { return kLanes<T>; }

PYML_REGION_DEFINE(float)
PYML_REGION_DEFINE(double)

}  // namespace CPU_CAPABILITY
}  // namespace pyml
