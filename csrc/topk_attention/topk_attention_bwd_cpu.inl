// The op `topk_attention` on a CPU, backward. The logits are made again, the kept ones known from the threshold and the
// last tie of each row; per row and softmax a list of the kept keys with probability and logit gradient is all that the
// gradients are summed from. A task owns rows of one group and goes through the keys a chunk at a time, so that the
// chunk's keys, values and gradients stay in the second-level cache; it sums dk and dv of its rows alone, and these
// parts are added up in order. So no two tasks write to one place, and the bits do not depend on the threads.
#include "topk_attention/rounding_cpu.h"
#include "topk_attention/topk_logits_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

template <class T>
int64_t topk_bwd_scratch(const TopkAttentionParams<T>& p) {
  return kQueryRows * (p.depth_ld() + p.value_ld() + 3 * logits_ld<T>(kChunkKeys)) + 5 * (kChunkKeys + kListPad) + 64;
}

// The sum over the lanes of products of a row of the gradient and one of values, both zero-padded to whole vectors.
template <class T>
PYML_INLINE T dot_in_lanes(const T* g, const T* value, int64_t ld) {
  Vec<T> total = Vec<T>{};
  for (int64_t c = 0; c < ld; c += kLanes<T>) total += load<T>(g + c) * load<T>(value + c);
  return lane_sum<T>(total);
}

// The same in the order of product_rows, and rounded like it.
template <class T>
PYML_INLINE T dot_in_order(const T* g, const T* value, int64_t depth) {
  T total = 0;
  for (int64_t from = 0; from < depth; from += kSumBlock) {
    const int64_t to = depth - from > kSumBlock ? from + kSumBlock : depth;
    T part = 0;
    for (int64_t c = from; c < to; ++c) part = fused<T>(g[c], value[c], part);
    total = from ? total + part : part;
  }
  return total;
}

// delta = grad . output, the sum that the derivative of softmax subtracts. It is summed as the products of the gradient
// with values are: so their difference is 0 where one key takes all.
template <class T>
void topk_delta(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  T *g = scratch, *o = scratch + p.value_ld();
  for (int64_t row = begin; row < end; ++row) {
    load_rows<T>(p.grad, row, 1, 0, p.value_depth, g, p.value_ld());
    if (p.average) {
      std::memcpy(o, p.average + row * p.value_depth, size_t(p.value_depth) * sizeof(T));
      for (int64_t c = p.value_depth; c < p.value_ld(); ++c) o[c] = 0;
    } else {
      load_rows<T>(p.result, row, 1, 0, p.value_depth, o, p.value_ld());
    }
    int64_t t = 0;
    while (p.output[t] != row / (p.all_rows() / p.batch) % p.thresholds) ++t;
    p.delta[row] =
        p.all_products(p.topk[t]) ? dot_in_order<T>(g, o, p.value_depth) : dot_in_lanes<T>(g, o, p.value_ld());
  }
}

template <class T>
struct BwdScratch {
  T *q, *grad, *s, *slope, *probability, *logits, *slopes, *extra;
  int32_t* number;
  BwdScratch(const TopkAttentionParams<T>& p, T* at) {
    const int64_t tile = kQueryRows * logits_ld<T>(kChunkKeys), list = kChunkKeys + kListPad;
    q = at, grad = q + kQueryRows * p.depth_ld(), s = grad + kQueryRows * p.value_ld(), slope = s + tile;
    probability = slope + tile, logits = probability + tile, slopes = logits + list, extra = slopes + list;
    number = reinterpret_cast<int32_t*>(extra + list);
  }
};

// One softmax of one row: what its kept keys and their gradients follow from.
template <class T>
struct RowSoftmax {
  T top, inverse, tau, delta;  // probability = exp(logit - top) * inverse
  int32_t cut;
  bool alone;  // one key is kept: its probability is 1 whatever its logit
};

// slope = probability * (product - delta) * factor, the gradient of the logit.
template <class T>
PYML_INLINE Vec<T> slope_of(const RowSoftmax<T>& row, std::common_type_t<Vec<T>> probability,
                            std::common_type_t<Vec<T>> product, T factor) {
  return row.alone ? Vec<T>{} : probability * (product - row.delta) * factor;
}

// The kept keys of one row and chunk as a list w.number (counted from `first`), w.logits (turned into probabilities)
// and w.slopes. `products` holds the products of the gradient with all values, or null: then they are made for the kept
// keys alone, from the gradient g and the value rows. Returns how many are kept.
template <class T>
int64_t kept_list(const TopkAttentionParams<T>& p, const RowSoftmax<T>& row, const T* s, int64_t n, int64_t first,
                  const T* products, const T* g, const T* values, T factor, BwdScratch<T>& w) {
  constexpr int L = kLanes<T>;
  int64_t kept;
  if (products) {
    kept = kept_lanes<T>(s, n, nullptr, int32_t(first), row.tau, row.cut, [&](uint32_t bits, int64_t j, int64_t place) {
      compress<T>(w.logits + place, load<T>(s + j), bits);
      compress<T>(w.slopes + place, load<T>(products + j), bits);
      compress_index<T>(w.number + place, nullptr, int32_t(j), bits);
    });
  } else {
    kept = kept_few<T>(s, n, int32_t(first), row.tau, row.cut, w.number);
    for (int64_t t = 0; t < kept; ++t) {
      const T* value = values + w.number[t] * p.value_ld();
      w.slopes[t] = dot_in_lanes<T>(g, value, p.value_ld());
      w.logits[t] = s[w.number[t]];
    }
  }
  exponentials<T>(w.logits, kept, row.top, w.logits);
  for (int64_t j = 0; j < kept; j += L) {
    const Vec<T> probability = load<T>(w.logits + j) * row.inverse;
    store<T>(w.logits + j, probability);
    store<T>(w.slopes + j, slope_of<T>(row, probability, load<T>(w.slopes + j), factor));
  }
  return kept;
}

// The same for all keys of the chunk, with zeros for those that are not kept.
template <class T>
void kept_tile(const RowSoftmax<T>& row, const T* s, int64_t n, int64_t first, const T* products, T factor,
               T* probability, T* slope) {
  constexpr int L = kLanes<T>;
  IVec<T> number;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) number[l] = Int<T>(first + l);
  const bool ties = row.cut != std::numeric_limits<int32_t>::max();
  for (int64_t j = 0; j < n; j += L, number += L) {
    const Vec<T> v = load<T>(s + j);
    IVec<T> gone = v < row.tau;
    if (ties) gone |= (v == row.tau) & (number > Int<T>(row.cut));
    const Vec<T> e = gone ? Vec<T>{} : exp<T>(v - row.top) * row.inverse;
    if (probability) store<T>(probability + j, e);
    if (slope) store<T>(slope + j, gone ? Vec<T>{} : slope_of<T>(row, e, load<T>(products + j), factor));
  }
}

// Goes through the softmaxes of query rows row + r (r < n) over one chunk of keys, and calls list(r, kept, probability,
// slope) with a list in w, or tile(probability, slope) with all of w.probability and w.slope. The flags say which of
// the two has a part in the gradients. Slopes are times `factor`.
template <class T, class List, class Tile>
void chunk_terms(const TopkAttentionParams<T>& p, int64_t row, int64_t n, int64_t first, T factor, BwdScratch<T>& w,
                 List&& list, Tile&& tile) {
  const int64_t left = p.keys - first, width = left < kChunkKeys ? left : kChunkKeys;
  const int64_t lds = logits_ld<T>(kChunkKeys), tiles = (width + kTileKeys - 1) / kTileKeys, vld = p.value_ld();
  const int64_t group = row / p.group_rows(), packed = group * p.tiles() + first / kTileKeys;
  load_rows<T>(p.q, row, n, 0, p.depth, w.q, p.depth_ld());
  block_logits<T>(p, row, n, first, width, w.q, w.s, lds, w.extra);
  for (int64_t t = 0; t < p.thresholds; ++t) {
    load_rows<T>(p.grad, p.place(p.output[t], row, p.thresholds), n, 0, p.value_depth, w.grad, vld);
    const bool all = p.all_products(p.topk[t]);
    if (all)
      products<T>(n, tiles, p.value_depth, w.grad, vld, p.value_tiles + packed * p.value_depth * kTileKeys, T(1),
                  w.slope, lds);
    for (int pass = 0; pass < (p.straight_through ? 2 : 1); ++pass) {  // straight-through: the hard one, the dense one
      const int64_t which = pass ? p.thresholds : p.output[t], k = pass ? p.keys : p.topk[t];
      const bool probability = pass == 0, slope = pass || !p.straight_through;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t at = p.place(which, row + r, p.softmaxes());
        const T delta = p.delta[p.place(p.output[t], row + r, p.thresholds)];
        const bool alone = p.top[at] == p.tau[at] && p.total[at] == 1;
        const RowSoftmax<T> softmax{p.top[at], 1 / p.total[at], p.tau[at], delta, p.cut[at], alone};
        const T *s = w.s + r * lds, *products_of = all ? w.slope + r * lds : nullptr;
        if (p.many(k)) {
          kept_tile<T>(softmax, s, tiles * kTileKeys, first, products_of, factor,
                       probability ? w.probability + r * lds : nullptr, slope ? w.slope + r * lds : nullptr);
        } else {
          const T* values = p.value_rows ? p.value_rows + (group * p.keys + first) * vld : nullptr;
          const int64_t kept =
              kept_list<T>(p, softmax, s, tiles * kTileKeys, first, products_of, w.grad + r * vld, values, factor, w);
          if (kept) list(r, kept, probability, slope);
        }
      }
      if (p.many(k)) tile(probability, slope);
    }
  }
}

// c[MR][NV vectors] += sum_k A(m, k) b[k][NV vectors]. Unlike gemm_tile it sums from 0 and then adds to c: a chain over
// all blocks would round as often as there are keys.
template <class T, int MR, int NV>
PYML_INLINE void add_product_tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, T* c, int64_t ld) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = Vec<T>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load<T>(b + k * ld + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = splat<T>(a[m * am + k * ak]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store<T>(c + m * ld + v * L, load<T>(c + m * ld + v * L) + acc[m][v]);
}

// c[m][ld] += sum_k A(m, k) b[k][ld] with A(m, k) = a[m * am + k * ak].
template <class T>
void add_product(int64_t M, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, T* c, int64_t ld) {
  by_vectors<T>(ld, [&](auto vectors, int64_t column) {
    constexpr int NV = decltype(vectors)::value, MR = NV == 1 ? 8 : (kRegisters >= 32 ? 16 : 8) / NV;
    int64_t m = 0;
    for (; m + MR <= M; m += MR)
      add_product_tile<T, MR, NV>(K, a + m * am, am, ak, b + column, c + m * ld + column, ld);
    for (; m < M; ++m) add_product_tile<T, 1, NV>(K, a + m * am, am, ak, b + column, c + m * ld + column, ld);
  });
}

template <class T>
void topk_bwd(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  BwdScratch<T> w(p, scratch);
  const int64_t ld = p.depth_ld(), vld = p.value_ld(), parts = p.groups * p.keys, lds = logits_ld<T>(kChunkKeys);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / p.splits(), split = at % p.splits(), row0 = split * p.rows_per_split;
    const int64_t left = p.group_rows() - row0, rows = left < p.rows_per_split ? left : p.rows_per_split;
    const int64_t start = group * p.group_rows() + row0;
    if (p.want_q) std::memset(p.dq + start * ld, 0, size_t(rows * ld) * sizeof(T));
    for (int64_t first = 0; first < p.keys; first += kChunkKeys) {
      const int64_t over = p.keys - first, width = over < kChunkKeys ? over : kChunkKeys;
      const int64_t key = group * p.keys + first;
      const T* keys = p.want_q ? p.key_rows + key * ld : nullptr;
      T* dk = p.want_k ? p.dk + (split * parts + key) * ld : nullptr;
      T* dv = p.want_v ? p.dv + (split * parts + key) * vld : nullptr;
      if (dk) std::memset(dk, 0, size_t(width * ld) * sizeof(T));
      if (dv) std::memset(dv, 0, size_t(width * vld) * sizeof(T));
      for (int64_t r0 = 0; r0 < rows; r0 += kQueryRows) {
        const int64_t row = start + r0, n = rows - r0 < kQueryRows ? rows - r0 : kQueryRows;
        if (farthest(p, row, n) <= first) continue;
        T* dq = p.want_q ? p.dq + row * ld : nullptr;
        chunk_terms<T>(
            p, row, n, first, p.scale, w,
            [&](int64_t r, int64_t kept, bool probability, bool slope) {
              if (dv && probability) scatter<T>(kept, w.logits, w.number, w.grad + r * vld, dv, vld);
              if (dk && slope) scatter<T>(kept, w.slopes, w.number, w.q + r * ld, dk, ld);
              if (dq && slope) weighted_sum<T>(kept, w.slopes, w.number, keys, ld, dq + r * ld);
            },
            [&](bool probability, bool slope) {
              if (dv && probability) add_product<T>(width, n, w.probability, 1, lds, w.grad, dv, vld);
              if (dk && slope) add_product<T>(width, n, w.slope, 1, lds, w.q, dk, ld);
              if (dq && slope) add_product<T>(n, width, w.slope, lds, 1, keys, dq, ld);
            });
      }
    }
  }
}

// Adds up the parts of dk and dv in order and writes the results.
template <class T>
void topk_reduce(const TopkAttentionParams<T>& p, int64_t begin, int64_t end) {
  const auto add_up = [&](T* parts, const Rows& to, int64_t row, int64_t n, int64_t depth, int64_t ld) {
    for (int64_t split = 1; split < p.splits(); ++split) {
      T *sum = parts + row * ld, *part = sum + split * p.groups * p.keys * ld;
      for (int64_t i = 0; i < n * ld; ++i) sum[i] += part[i];
    }
    store_rows<T>(parts + row * ld, ld, to, row, n, 0, depth);
  };
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at % p.chunks() * kChunkKeys, left = p.keys - first, row = at / p.chunks() * p.keys + first;
    const int64_t n = left < kChunkKeys ? left : kChunkKeys;
    if (p.want_k) add_up(p.dk, p.dk_rows, row, n, p.depth, p.depth_ld());
    if (p.want_v) add_up(p.dv, p.dv_rows, row, n, p.value_depth, p.value_ld());
  }
}

// The gradient of a float mask: a task owns one block of it and sums over all that the mask is broadcast to.
template <class T>
void topk_mask_bwd(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  BwdScratch<T> w(p, scratch);
  const int64_t heads = p.all_rows() / (p.batch * p.queries), blocks = p.mask_blocks();
  const int64_t lds = logits_ld<T>(kChunkKeys);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t slab = at / blocks, mb = slab / p.mask_heads, mh = slab % p.mask_heads;
    const int64_t i0 = p.mask_queries == 1 ? 0 : at % blocks * kQueryRows;
    const int64_t i1 = p.mask_queries == 1 || i0 + kQueryRows > p.queries ? p.queries : i0 + kQueryRows;
    T* to = p.dmask + slab * p.mask_queries * p.mask_keys;
    const int64_t owned = p.mask_queries == 1 ? 1 : i1 - i0;
    std::memset(to + i0 * p.mask_keys, 0, size_t(owned * p.mask_keys) * sizeof(T));
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        if ((p.mask_batch > 1 && b != mb) || (p.mask_heads > 1 && h != mh)) continue;
        for (int64_t i = i0; i < i1; i += kQueryRows) {
          const int64_t row = (b * heads + h) * p.queries + i, n = i1 - i < kQueryRows ? i1 - i : kQueryRows;
          for (int64_t first = 0; first < farthest(p, row, n); first += kChunkKeys) {
            const auto line = [&](int64_t r) { return to + (p.mask_queries == 1 ? 0 : i + r) * p.mask_keys; };
            const int64_t step = p.mask_keys == 1 ? 0 : 1, left = p.keys - first;
            const int64_t width = left < kChunkKeys ? left : kChunkKeys;
            chunk_terms<T>(
                p, row, n, first, T(1), w,
                [&](int64_t r, int64_t kept, bool, bool slope) {
                  for (int64_t j = 0; slope && j < kept; ++j) line(r)[(first + w.number[j]) * step] += w.slopes[j];
                },
                [&](bool, bool slope) {
                  for (int64_t r = 0; slope && r < n; ++r)
                    for (int64_t j = 0; j < width; ++j) line(r)[(first + j) * step] += w.slope[r * lds + j];
                });
          }
        }
      }
  }
}

}  // namespace

}  // namespace CPU_CAPABILITY
}  // namespace pyml
