// CUDA launchers of the op `topk_attention`: plain structs, no torch.
#pragma once
#include <cstdint>

#include "common/host_device.h"
#include "common/rows.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

constexpr int kTokenWants = 8;  // softmaxes that one launch looks for in the same logits

// One call. Strides are counted in elements. q, k, v, grad, out and dq have one dtype; everything else but the mask is
// double when that is double, else float. Rows are [B][thresholds or softmaxes][heads][N].
struct TokenCuda {
  int64_t dtype = 0;
  int64_t mask_kind = 0, mask_dtype = 0;     // 0: no mask, 1: bool, 2: floating, added to the logits
  int64_t batch = 0, heads = 0, shared = 1;  // shared: query heads for each kv head
  int64_t queries = 0, keys = 0, depth = 0, value_depth = 0;
  int64_t thresholds = 0, softmaxes = 0;  // softmaxes: for straight-through one more, the dense one
  int64_t causal = 0;
  double scale = 1;
  int64_t q_stride[4] = {}, k_stride[4] = {}, v_stride[4] = {}, mask_stride[4] = {}, grad_stride[5] = {};
  const void *q = nullptr, *k = nullptr, *v = nullptr, *mask = nullptr, *grad = nullptr;

  int64_t first = 0, count = 0, want[kTokenWants] = {};  // forward: softmax first + i keeps want[i] keys
  void *out = nullptr, *average = nullptr;               // average may be null, see TopkArguments::keeps_average
  void *top = nullptr, *total = nullptr, *tau = nullptr;
  int32_t* cut = nullptr;

  const void* result = nullptr;               // what delta is made of, as out but not rounded
  void* delta = nullptr;                      // grad . result, one a row
  void* dq = nullptr;                         // [B, heads, N, D]
  void *part_k = nullptr, *part_v = nullptr;  // [split, B * kv heads, M, D or Dv]; null: not wanted
  void* part_mask = nullptr;                  // [split, *mask_size]
  int64_t mask_size[4] = {1, 1, 1, 1};
  int64_t split_count = 1, split_size = 0;  // from token_cuda_*_split

  PYML_HD bool straight_through() const { return softmaxes > thresholds; }
};

extern "C" {
cudaError_t token_cuda_fwd(const TokenCuda* call, cudaStream_t stream);    // out, average, top, total, tau, cut
cudaError_t token_cuda_delta(const TokenCuda* call, cudaStream_t stream);  // delta
cudaError_t token_cuda_bwd_q(const TokenCuda* call, cudaStream_t stream);  // dq
// How many parts the sums over queries, or over what a mask is broadcast to, have; by shape alone.
void token_cuda_keys_split(const TokenCuda* call, int64_t* count, int64_t* size);
void token_cuda_mask_split(const TokenCuda* call, int64_t* count, int64_t* size);
cudaError_t token_cuda_bwd_keys(const TokenCuda* call, cudaStream_t stream);  // part_k, part_v
cudaError_t token_cuda_bwd_mask(const TokenCuda* call, cudaStream_t stream);  // part_mask
}

}  // namespace pyml
