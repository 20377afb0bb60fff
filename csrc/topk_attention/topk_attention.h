// Top-k attention family: plain parameter structs and the kernel signatures that every instruction set provides. No
// torch here.
//
// Words: P regions of S queries choose K of Pk regions of Sk keys; D numbers in a query and a key, Dv in a value.
// Logits and log-sum-exps are natural.
#pragma once
#include <cstdint>

#include "common/host_device.h"
#include "common/rows.h"

namespace pyml {

inline int64_t size_of(DType t) { return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : 2; }

// A tensor [B, H, regions, tokens, features] with any strides, counted in elements.
struct Regions {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t tokens = 0;
  int64_t stride[5] = {0, 0, 0, 0, 0};

  PYML_HD int64_t offset(int64_t b, int64_t h, int64_t region) const {
    return b * stride[0] + h * stride[1] + region * stride[2];
  }
  // The tokens of one region as rows.
  Rows rows(int64_t b, int64_t h, int64_t region) const {
    Rows r;
    r.data = static_cast<char*>(data) + offset(b, h, region) * size_of(dtype);
    r.dtype = dtype;
    r.width = tokens > 0 ? tokens : 1;
    r.stride_w = stride[3];
    r.stride_c = stride[4];
    return r;
  }
};

// `size` tokens in as few blocks of at most kBlock as it takes, all about as long, padded to whole vectors of `lanes`.
constexpr int64_t kBlock = 64;
struct Blocks {
  int64_t count, length, padded;
  Blocks(int64_t size, int64_t lanes, int64_t most = kBlock) {
    count = size > 0 ? (size + most - 1) / most : 0;
    length = count ? (size + count - 1) / count : 0;
    padded = (length + lanes - 1) / lanes * lanes;
  }
};

template <class T>
struct RegionParams {
  int64_t batch, heads;
  int64_t query_regions, queries, key_regions, keys, slots, features, value_features;
  Regions q, k, v;
  Regions out, exact;  // exact: out in T where out has fewer bits, else no data; the backward reads it as `out`
  Regions grad, dq, dk, dv;
  const int64_t* index;   // [B, index_heads, P, K]
  const int64_t* counts;  // [B, count_heads, P] or null
  const T* weight;        // [B, weight_heads, P, K] or null
  int64_t index_heads, count_heads, weight_heads;
  T scale;      // of the logits
  double* lse;  // [B, H, P, S], in double whatever T is; +infinity for a query without a key

  // Valid keys of a region, in order: `valid` [B, Pk, Sk] holds `valid_count` [B, Pk] positions. Null: all are valid.
  const int32_t* valid;
  const int32_t* valid_count;

  // Forward: keys and values as rows of T, one after another without the masked ones. They are the tensors themselves
  // or what region_rows_kernel made of them.
  T *key_rows, *value_rows;
  int64_t key_stride[4], value_stride[4];  // of b, h, region, token

  // Backward: packed by region_pack_kernel, [B, H, Pk, blocks] of: keys and values [D + Dv][padded], key rows
  // [region_row_size].
  T *packed, *packed_rows;
  // One task is one (b, h) and one split of the query regions. It adds up the gradients of all keys in `partial`
  // [split][B, H, Pk, blocks][D + Dv][padded]; `touched` [split][B, H, Pk] says which regions it wrote.
  int64_t splits;
  T* partial;
  uint8_t* touched;
  T* dweight;  // [B, H, P, K] or null
  bool want_q, want_kv;

  PYML_HD int64_t group() const { return batch * heads; }
  PYML_HD int64_t valid_keys(int64_t b, int64_t g) const { return valid ? valid_count[b * key_regions + g] : keys; }
  PYML_HD int64_t chosen(int64_t b, int64_t h, int64_t p) const {
    return counts ? counts[(b * count_heads + (count_heads > 1 ? h : 0)) * query_regions + p] : slots;
  }
  PYML_HD int64_t slot(int64_t b, int64_t h, int64_t p, int64_t of_heads) const {
    return ((b * of_heads + (of_heads > 1 ? h : 0)) * query_regions + p) * slots;
  }
};

// route_regions: means [B, H, regions, D] in float32, rounded from sums in double; then logits and the topk largest.
struct RouteParams {
  int64_t batch, heads, query_regions, key_regions, features, topk;
  Regions tokens;       // route_means_kernel: what to average
  const bool* mask;     // [B, regions, tokens] or null
  int64_t regions;      // of `tokens`
  double* means;        // [B, H, regions, D]
  double* query_means;  // [B, H, P, D]
  double* key_means;    // [B, H, D, Pk padded to whole vectors]
  const bool* key_any;  // [B, Pk]: whether the region has a valid key, or null
  bool per_head;
  double scale;
  int64_t* index;  // [B, 1 or H, P, topk]
  float* logits;   // the same
};

// Each kernel works on the range [begin, end) of what its comment names; `scratch` is as large as the functions
// <kernel>_scratch say, in elements.
#define PYML_REGION_KERNELS(T)                                                                                     \
  void region_rows_kernel(const RegionParams<T>&, int64_t begin, int64_t end); /* (b, h, key region) */            \
  void region_fwd_kernel(const RegionParams<T>&, int64_t begin, int64_t end,                                       \
                         T* scratch); /* (b, h, query region, query block) */                                      \
  int64_t region_fwd_scratch(const RegionParams<T>&);                                                              \
  void region_pack_kernel(const RegionParams<T>&, int64_t begin, int64_t end);            /* (b, h, key region) */ \
  void region_bwd_kernel(const RegionParams<T>&, int64_t begin, int64_t end, T* scratch); /* (b, h, split) */      \
  int64_t region_bwd_scratch(const RegionParams<T>&);                                                              \
  void region_reduce_kernel(const RegionParams<T>&, int64_t begin, int64_t end, T* scratch); /* key region */      \
  int64_t region_row_size(const RegionParams<T>&);                                                                 \
  int64_t region_lanes(const RegionParams<T>&);

#define PYML_ROUTE_KERNELS                                                                                      \
  void route_means_kernel(const RouteParams&, int64_t begin, int64_t end);            /* (b, h, region) */      \
  void route_kernel(const RouteParams&, int64_t begin, int64_t end, double* scratch); /* (b, 1 or h, region) */ \
  int64_t route_scratch(const RouteParams&);                                                                    \
  int64_t route_lanes();

#define PYML_TOPK_ATTENTION_VARIANT(isa) \
  namespace isa {                        \
  PYML_REGION_KERNELS(float)             \
  PYML_REGION_KERNELS(double)            \
  PYML_ROUTE_KERNELS                     \
  }

PYML_TOPK_ATTENTION_VARIANT(DEFAULT)
#if defined(__x86_64__)
PYML_TOPK_ATTENTION_VARIANT(AVX2)
PYML_TOPK_ATTENTION_VARIANT(AVX512)
#endif

}  // namespace pyml
