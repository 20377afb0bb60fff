// The op `topk_attention` on a CPU, backward. The logits are made again, the kept ones known from the threshold and the
// last tie of each row; per row and softmax a list of the kept keys with probability and logit gradient is all that the
// gradients are summed from. A task owns rows of one group and goes through the keys a chunk at a time, so that the
// chunk's keys, values and gradients stay in the second-level cache; it sums dk and dv of its rows alone, and these
// parts are added up in order. So no two tasks write to one place, and the bits do not depend on the threads.
#include "topk_attention/topk_logits_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

template <class T>
int64_t topk_bwd_scratch(const TopkAttentionParams<T>& p) {
  return kQueryRows * (p.depth_ld() + p.value_ld() + 2 * logits_ld<T>(kChunkKeys)) + 5 * (kChunkKeys + kListPad) + 64;
}

// delta = grad . output, the sum that the derivative of softmax subtracts.
template <class T>
void topk_delta(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  T *g = scratch, *o = scratch + p.value_ld();
  for (int64_t row = begin; row < end; ++row) {
    load_rows<T>(p.grad, row, 1, 0, p.value_depth, g, p.value_ld());
    if (p.average)
      std::memcpy(o, p.average + row * p.value_depth, size_t(p.value_depth) * sizeof(T));
    else
      load_rows<T>(p.result, row, 1, 0, p.value_depth, o, p.value_ld());
    T total = 0;
    for (int64_t c = 0; c < p.value_depth; ++c) total += g[c] * o[c];
    p.delta[row] = total;
  }
}

// What one row keeps of a chunk of keys, for one softmax. The list is of `n` keys counted from the chunk's first.
template <class T>
struct KeptTerms {
  int64_t n;
  const int32_t* number;
  const T* probability;  // null when this softmax has no part in the values' gradient
  const T* slope;        // gradient of the logit; null when this softmax passes none
};

template <class T>
struct BwdScratch {
  T *q, *grad, *s, *ds, *logit, *product, *extra;
  int32_t* number;
  BwdScratch(const TopkAttentionParams<T>& p, T* at) {
    const int64_t lds = logits_ld<T>(kChunkKeys), list = kChunkKeys + kListPad;
    q = at, grad = q + kQueryRows * p.depth_ld(), s = grad + kQueryRows * p.value_ld(), ds = s + kQueryRows * lds;
    logit = ds + kQueryRows * lds, product = logit + list, extra = product + list;
    number = reinterpret_cast<int32_t*>(extra + list);
  }
};

// Calls f(r, threshold, terms) for query row + r (r < n) and the keys of one chunk.
template <class T, class F>
void chunk_terms(const TopkAttentionParams<T>& p, int64_t row, int64_t n, int64_t first, BwdScratch<T>& w, F&& f) {
  const int64_t left = p.keys - first, width = left < kChunkKeys ? left : kChunkKeys;
  const int64_t lds = logits_ld<T>(kChunkKeys), tiles = (width + kTileKeys - 1) / kTileKeys;
  const int64_t tile = row / p.group_rows() * p.tiles() + first / kTileKeys;
  load_rows<T>(p.q, row, n, 0, p.depth, w.q, p.depth_ld());
  block_logits<T>(p, row, n, first, width, w.q, w.s, lds, w.extra);
  for (int64_t t = 0; t < p.thresholds; ++t) {
    load_rows<T>(p.grad, p.place(t, row, p.thresholds), n, 0, p.value_depth, w.grad, p.value_ld());
    products<T>(n, tiles, p.value_depth, w.grad, p.value_ld(), p.value_tiles + tile * p.value_depth * kTileKeys, T(1),
                w.ds, lds);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = t; i < p.softmaxes(); i += p.thresholds) {  // straight-through: the hard one, then the dense one
        const int64_t at = p.place(i, row + r, p.softmaxes());
        const T *s = w.s + r * lds, *products_of = w.ds + r * lds;
        const int64_t kept = kept_lanes<T>(s, tiles * kTileKeys, nullptr, int32_t(first), p.tau[at], p.cut[at],
                                           [&](uint32_t bits, int64_t j, int64_t place) {
                                             compress<T>(w.logit + place, load<T>(s + j), bits);
                                             compress<T>(w.product + place, load<T>(products_of + j), bits);
                                             compress_index<T>(w.number + place, nullptr, int32_t(j), bits);
                                           });
        if (kept == 0) continue;
        const bool dense = i == p.thresholds, slopes = dense || !p.straight_through;
        exponentials<T>(w.logit, kept, p.lse[at], w.logit);
        if (slopes && p.lse[at] == p.tau[at]) {  // one key alone: its probability is 1 whatever its logit
          std::memset(w.product, 0, size_t(kept) * sizeof(T));
        } else if (slopes) {
          const T delta = p.delta[p.place(t, row + r, p.thresholds)];
          for (int64_t j = 0; j < kept; j += kLanes<T>)
            store<T>(w.product + j, load<T>(w.logit + j) * (load<T>(w.product + j) - delta));
        }
        f(r, t, KeptTerms<T>{kept, w.number, dense ? nullptr : w.logit, slopes ? w.product : nullptr});
      }
  }
}

template <class T>
void topk_bwd(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  BwdScratch<T> w(p, scratch);
  const int64_t ld = p.depth_ld(), vld = p.value_ld(), parts = p.groups * p.keys;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / p.splits(), split = at % p.splits(), row0 = split * p.rows_per_split;
    const int64_t left = p.group_rows() - row0, rows = left < p.rows_per_split ? left : p.rows_per_split;
    const int64_t start = group * p.group_rows() + row0;
    if (p.want_q) std::memset(p.dq + start * ld, 0, size_t(rows * ld) * sizeof(T));
    for (int64_t first = 0; first < p.keys; first += kChunkKeys) {
      const int64_t over = p.keys - first, width = over < kChunkKeys ? over : kChunkKeys;
      const int64_t key = group * p.keys + first;
      T* dk = p.want_k ? p.dk + (split * parts + key) * ld : nullptr;
      T* dv = p.want_v ? p.dv + (split * parts + key) * vld : nullptr;
      if (dk) std::memset(dk, 0, size_t(width * ld) * sizeof(T));
      if (dv) std::memset(dv, 0, size_t(width * vld) * sizeof(T));
      for (int64_t r0 = 0; r0 < rows; r0 += kQueryRows) {
        const int64_t row = start + r0, n = rows - r0 < kQueryRows ? rows - r0 : kQueryRows;
        if (farthest(p, row, n) <= first) continue;
        chunk_terms<T>(p, row, n, first, w, [&](int64_t r, int64_t, const KeptTerms<T>& k) {
          if (dv && k.probability) scatter<T>(k.n, k.probability, k.number, w.grad + r * vld, dv, vld);
          if (!k.slope) return;
          for (int64_t j = 0; j < k.n; j += kLanes<T>) store<T>(w.product + j, load<T>(w.product + j) * p.scale);
          if (dk) scatter<T>(k.n, k.slope, k.number, w.q + r * ld, dk, ld);
          if (p.want_q) weighted_sum<T>(k.n, k.slope, k.number, p.key_rows + key * ld, ld, p.dq + (row + r) * ld);
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
          for (int64_t first = 0; first < farthest(p, row, n); first += kChunkKeys)
            chunk_terms<T>(p, row, n, first, w, [&](int64_t r, int64_t, const KeptTerms<T>& k) {
              if (!k.slope) return;
              T* line = to + (p.mask_queries == 1 ? 0 : i + r) * p.mask_keys;
              for (int64_t j = 0; j < k.n; ++j) line[p.mask_keys == 1 ? 0 : first + k.number[j]] += k.slope[j];
            });
        }
      }
  }
}

}  // namespace

}  // namespace CPU_CAPABILITY
}  // namespace pyml
