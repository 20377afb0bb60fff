// region_attention on a CPU, backward: keys in the lanes, so that dK and dV need no sum across lanes; dQ is a product
// with the key rows. Every pair of a query region and a key region is visited once.
#include <limits>

#include "common/exp2_cpu.h"
#include "common/tile_cpu.h"
#include "topk_attention/region_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

// Sizes of one block of keys in the backward's buffers. For dQ the features are in the lanes; where that leaves half a
// vector empty (D = 24), two keys share a row: their features alternate, and so do the sums, until the end.
template <class T>
struct KeyBlocks {
  Blocks blocks;
  bool pairs;
  int64_t row, packed, rows;  // lanes of a key row; elements of keys and values [D + Dv][padded], of key rows
  explicit KeyBlocks(const RegionParams<T>& c) : blocks(c.keys, kLanes<T>) {
    constexpr int64_t L = kLanes<T>;
    const int64_t single = (c.features + L - 1) / L * L, twice = (2 * c.features + L - 1) / L * L;
    pairs = sizeof(T) == 4 && twice < 2 * single;
    row = pairs ? twice : single;
    packed = (c.features + c.value_features) * blocks.padded;
    rows = pairs ? blocks.padded / 2 * row : blocks.padded * row;
  }
  int64_t at(int64_t key, int64_t feature) const {
    return pairs ? key / 2 * row + 2 * feature + key % 2 : key * row + feature;
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
      std::memset(rows, 0, size_t(size.rows) * sizeof(T));
      for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < c.features; ++d) rows[size.at(t, d)] = columns[d * W + t];
    }
  }
}

// Queries that the backward takes at a time. Smaller blocks leave P and dS more of the first cache, but dK and dV are
// then read and written more often: 32 and 16 are 8 % slower.
constexpr int64_t kQueryBlock = 64;

// The buffers of one block of queries.
template <class T>
struct QueryTile {
  T *queries, *grad;      // [n][D] with the scale in them, [n][Dv]
  T *lse, *rest, *delta;  // [n]: lse rounded to T, what that left out, rowsum(dO * O)
  T* dq;                  // [n][D padded]
  T *p, *ds;              // [n][W]
};

// A block of keys times the weight of a region, in the same form as without it, and what comes back to it.
template <class T>
struct WeightedBlock {
  T *packed, *rows;
  T *sums, *terms;  // gradients of `packed` by one block of queries; terms of the weight's gradient [W]
};

// Sum over the keys and values of a block of gradient times number. Lanes beyond the keys may hold anything.
template <class T>
T weight_gradient(const WeightedBlock<T>& x, const T* packed, int64_t size, int64_t W, int64_t keys) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < W; i += L) {
    Vec<T> sum = splat<T>(0);
    for (int64_t at = i; at < size; at += W) sum += load<T>(x.sums + at) * load<T>(packed + at);
    store<T>(x.terms + i, sum);
  }
  T sum = 0;
  for (int64_t i = 0; i < keys; ++i) sum += x.terms[i];
  return sum;
}

// The exponentials run where the logits leave the registers: as a pass of their own they take 10 % more of this
// function. P = exp(S - lse) and dS = P * (dP - delta) of one block of keys.
template <class T, int NV>
PYML_INLINE void scores(const RegionParams<T>& c, const QueryTile<T>& x, int64_t n, int64_t W, const T* k, const T* v,
                        int64_t at) {
  constexpr int L = kLanes<T>;
  const auto zero = [](int, int) { return splat<T>(0); };
  for_tile_rows<NV>(n, [&](auto rows, int64_t q) {
    const auto place = [&](int r, int i) { return (q + r) * W + at + i * L; };
    // From 0, as delta: so dP - delta is 0 where one key takes all.
    tile<T, rows, NV>(c.value_features, x.grad + q * c.value_features, c.value_features, 1, v, W, zero,
                      [&](int r, int i, const Vec<T>& dp) { store<T>(x.ds + place(r, i), dp); });
    tile<T, rows, NV>(c.features, x.queries + q * c.features, c.features, 1, k, W, zero,
                      [&](int r, int i, const Vec<T>& logit) {
                        const Vec<T> dp = load<T>(x.ds + place(r, i));
                        const T rest = sizeof(T) == 8 ? T(0) : x.rest[q + r];
                        const Vec<T> p = exp2_fast<T>(exponent<T>(logit - x.lse[q + r], splat<T>(rest)));
                        store<T>(x.p + place(r, i), p);
                        store<T>(x.ds + place(r, i), p * (dp - x.delta[q + r]));
                      });
  });
}

// to[m][N] (+)= sum_k A(m, k) b[k][N]. The sum begins at 0 and is then added: rounding grows with the blocks' lengths,
// not with their product.
template <class T, class Broadcast = One>
PYML_INLINE void accumulate(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b,
                            int64_t ldb, T* to, int64_t ld, bool add) {
  constexpr int L = kLanes<T>;
  for_tile_columns(N / L, [&](auto vectors, int64_t v) {
    for_tile_rows<vectors>(M, [&](auto rows, int64_t m) {
      T* out = to + m * ld + v * L;
      tile<T, rows, vectors, Broadcast>(
          K, a + m * am, am, ak, b + v * L, ldb, [](int, int) { return splat<T>(0); },
          [&](int r, int i, const Vec<T>& sum) {
            T* place = out + r * ld + i * L;
            store<T>(place, add ? load<T>(place) + sum : sum);
          });
    });
  });
}

// dQ += dS K
template <class T>
PYML_INLINE void add_dq(const QueryTile<T>& x, const KeyBlocks<T>& size, int64_t n, int64_t keys, const T* rows) {
  const int64_t W = size.blocks.padded;
  if constexpr (sizeof(T) == 4) {
    if (size.pairs) {
      for (int64_t i = 0; keys % 2 && i < n; ++i) x.ds[i * W + keys] = 0;  // no key: whatever there is, not NaN
      return accumulate<T, Pair>(n, size.row, (keys + 1) / 2, x.ds, W, 2, rows, size.row, x.dq, size.row, true);
    }
  }
  accumulate<T>(n, size.row, keys, x.ds, W, 1, rows, size.row, x.dq, size.row, true);
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
  x.rest = x.lse + kQueryBlock;
  x.delta = x.rest + kQueryBlock;
  T* out = x.delta + kQueryBlock;
  WeightedBlock<T> weighted;
  weighted.packed = out + kQueryBlock * Dv;
  weighted.sums = weighted.packed + size.packed;
  weighted.rows = weighted.sums + size.packed;
  weighted.terms = weighted.rows + size.rows;
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
          const double lse = c.lse[(bh * c.query_regions + p) * c.queries + first + i];
          x.lse[i] = T(lse);
          x.rest[i] = lse < std::numeric_limits<T>::infinity() ? T(lse - double(x.lse[i])) : T(0);
          T sum = 0;
          for (int64_t e = 0; e < Dv; ++e) sum = fused<T>(x.grad[i * Dv + e], out[i * Dv + e], sum);
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
            const T *packed = c.packed + at * size.packed, *rows = c.packed_rows + at * size.rows, *k = packed;
            if constexpr (kWeighted) {
              weigh(packed, size.packed, 1, size.packed, weight, weighted.packed);
              if (c.want_q) weigh(rows, size.rows, 1, size.rows, weight, weighted.rows);
              k = weighted.packed, rows = weighted.rows;
            }
            for_tile_columns(W / L, [&](auto vectors, int64_t i) {
              scores<T, vectors>(c, x, n, W, k + i * L, k + D * W + i * L, i * L);
            });
            if (c.want_kv || dweights) {
              const int64_t place = split * c.group() * c.key_regions * size.blocks.count + at;
              T* of_region = c.want_kv ? c.partial + place * size.packed : nullptr;
              T* to = kWeighted ? weighted.sums : of_region;
              const bool add = touched[g];
              accumulate<T>(D, W, n, x.queries, 1, D, x.ds, W, to, W, add && !kWeighted);
              accumulate<T>(Dv, W, n, x.grad, 1, Dv, x.p, W, to + D * W, W, add && !kWeighted);
              if (kWeighted && dweights) dw += weight_gradient(weighted, packed, size.packed, W, keys);
              for (int64_t i = 0; kWeighted && c.want_kv && i < size.packed; i += L) {
                const Vec<T> sum = load<T>(to + i) * weight;
                store<T>(of_region + i, add ? load<T>(of_region + i) + sum : sum);
              }
            }
            if (c.want_q) add_dq<T>(x, size, n, keys, rows);
          }
          if (valid > 0) touched[g] = 1;
          if (dweights) dweights[j] += dw;
        });
        if (c.want_q) {
          for (int64_t i = 0; i < n; ++i)
            for (int64_t d = 0; d < D; ++d) {
              T* row = x.dq + i * size.row;
              row[d] = c.scale * (size.pairs ? row[2 * d] + row[2 * d + 1] : row[d]);
            }
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

#define PYML_REGION_DEFINE(T)                                                                                        \
  void region_pack_kernel(const RegionParams<T>& c, int64_t begin, int64_t end) { region_pack<T>(c, begin, end); }   \
  void region_bwd_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                         \
    c.weight ? region_bwd<T, true>(c, begin, end, scratch) : region_bwd<T, false>(c, begin, end, scratch);           \
  }                                                                                                                  \
  int64_t region_bwd_scratch(const RegionParams<T>& c) {                                                             \
    const KeyBlocks<T> size(c);                                                                                      \
    return kQueryBlock * (2 * size.blocks.padded + size.row + c.features + 2 * c.value_features + 3) + size.packed + \
           (c.weight ? size.packed + size.rows + size.blocks.padded : 0);                                            \
  }                                                                                                                  \
  int64_t region_row_size(const RegionParams<T>& c) { return KeyBlocks<T>(c).rows; }                                 \
  void region_reduce_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                      \
    region_reduce<T>(c, begin, end, scratch);                                                                        \
  }

PYML_REGION_DEFINE(float)
PYML_REGION_DEFINE(double)
#undef PYML_REGION_DEFINE

}  // namespace CPU_CAPABILITY
}  // namespace pyml
