// The op `topk_attention` (token level): what its kernels are told. Plain data, no torch.
//
// Words: a group is the set of query heads that share one kv head; its rows are the queries of these heads one after
// the other, and in memory row r of group g is row g * group_rows() + r of all queries. Thresholds are in falling
// order.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace pyml {

constexpr int64_t kTileKeys = 64;    // keys in a packed tile [depth][kTileKeys]
constexpr int64_t kQueryRows = 16;   // queries in a block
constexpr int64_t kChunkKeys = 256;  // keys that a backward holds at once

template <class T>
struct TopkAttentionParams {
  int64_t batch;
  int64_t groups;  // batch * kv heads
  int64_t heads;   // query heads in a group
  int64_t queries, keys, depth, value_depth;
  int64_t thresholds;
  const int64_t* topk;    // [thresholds], falling
  const int64_t* output;  // [thresholds]: the place of each in the outputs
  T scale;
  bool causal;
  bool straight_through;
  Rows q, k, v;
  Rows mask;              // rows as those of q, with stride 0 where the mask is broadcast; unused without data
  const bool* mask_bool;  // instead of mask.data

  // Packed by topk_pack_kernel, where not null: transposed tiles [group][tile][depth][kTileKeys], rows
  // [group][key][ld].
  T *key_tiles, *value_tiles, *key_rows, *value_rows;

  // Forward. Softmaxes: one a threshold and, for straight_through, the dense one last.
  // Each has rows [batch][threshold or softmax][head][query], see place().
  Rows out;
  T *top, *total;  // largest logit, and sum of exp(logit - top): more exact than their log-sum-exp alone
  T* tau;          // smallest logit that is kept
  int32_t* cut;    // number of the last key with logit tau that is kept
  T* average;      // null, or in full precision the output of the softmax that passes the gradient on

  // Backward.
  Rows grad;               // as out
  Rows result;             // as out: what delta is made of
  T* delta;                // as out, one a row
  int64_t rows_per_split;  // a task is a group times a split of its rows
  T* dq;                   // [all queries][depth_ld()]
  T *dk, *dv;              // [split][group][key][ld]
  Rows dk_rows, dv_rows;   // results, rows [group][key]
  bool want_q, want_k, want_v;
  T* dmask;  // [mask_batch][mask_heads][mask_queries][mask_keys]
  int64_t mask_batch, mask_heads, mask_queries, mask_keys;

  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  int64_t depth_ld() const { return padded(depth); }
  int64_t value_ld() const { return padded(value_depth); }
  int64_t tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
  int64_t group_rows() const { return heads * queries; }
  int64_t all_rows() const { return groups * group_rows(); }
  // Where row `row` of all queries lies among `count` outputs a batch, for output `which`.
  int64_t place(int64_t which, int64_t row, int64_t count) const {
    const int64_t rows = all_rows() / batch;
    return (row / rows * count + which) * rows + row % rows;
  }
  int64_t softmaxes() const { return thresholds + (straight_through ? 1 : 0); }
  // What a backward does for a softmax that keeps k keys, by shape alone: with few, dot products for them only; with
  // many, matrix products over all keys and zeros.
  bool few(int64_t k) const { return k < keys / 8; }
  bool many(int64_t k) const { return k > keys / 4; }
  // Whether the backward multiplies the gradient by all values, not by those of the kept keys alone.
  bool all_products(int64_t k) const { return straight_through || !few(k); }
  // Rows whose logits fit the second-level cache together.
  int64_t block_rows() const { return keys <= 16384 ? kQueryRows : keys <= 32768 ? 8 : 4; }
  int64_t blocks() const { return (group_rows() + block_rows() - 1) / block_rows(); }
  int64_t splits() const { return (group_rows() + rows_per_split - 1) / rows_per_split; }
  int64_t chunks() const { return (keys + kChunkKeys - 1) / kChunkKeys; }
  int64_t mask_blocks() const { return mask_queries == 1 ? 1 : (queries + kQueryRows - 1) / kQueryRows; }
};

// Each kernel works on the range [begin, end) of what its comment names, with scratch of topk_attention_scratch
// elements.
#define PYML_TOPK_KERNELS(T)                                                                                          \
  int64_t topk_attention_scratch(const TopkAttentionParams<T>&);                                                      \
  void topk_pack_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end);              /* (group, tile) */  \
  void topk_attention_fwd_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end, T*); /* (group, block) */ \
  void topk_delta_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end, T*);         /* rows of out */    \
  void topk_attention_bwd_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end, T*); /* (group, split) */ \
  void topk_reduce_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end);            /* (group, chunk) */ \
  void topk_mask_bwd_kernel(const TopkAttentionParams<T>&, int64_t begin, int64_t end, T*);      /* blocks of dmask */

#define PYML_TOPK_VARIANT(isa) \
  namespace isa {              \
  PYML_TOPK_KERNELS(float)     \
  PYML_TOPK_KERNELS(double)    \
  }

PYML_TOPK_VARIANT(DEFAULT)
#if defined(__x86_64__)
PYML_TOPK_VARIANT(AVX2)
PYML_TOPK_VARIANT(AVX512)
#endif

}  // namespace pyml
