// CUDA launchers of region_attention: plain structs, no torch. T is float or double, the type of every sum.
#pragma once
#include <cstdint>

#include "topk_attention/topk_attention.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

// One call. Of RegionParams, the sizes, q, k, v, out, exact, grad, dq, index, counts, weight, scales, lse and the lists
// of valid keys are used; only values in [-1, Pk) of the index are followed.
template <class T>
struct RegionCuda : RegionParams<T> {
  int32_t* status;   // becomes 1 when index or counts hold something else
  const bool* mask;  // [B, Pk, Sk] or null
  T* delta;          // [B, H, P, S]: sum over the features of grad * out
  T* part_weight;    // [B, H, P, query blocks, K]; null: not wanted

  // Who chose each key region: row (b, list head, region) has entries first_slot[row] to first_slot[row + 1] of
  // slots, positions in [B, list heads, P, K]. It is cut into chunks of chunk_size, numbered from first_chunk[row] on;
  // row_of_chunk is rows or more for a chunk without work.
  const int64_t *slots_of, *first_slot, *first_chunk, *row_of_chunk;
  int64_t rows, list_heads, chunks, chunk_size;
  T *part_k, *part_v;  // [chunks, H / list heads, Sk, D or Dv]: sums over one chunk; null: not wanted
};

// Adds up the chunks of every key region: result [B, H, Pk, Sk, width], 0 for what nobody chose.
template <class T>
struct RegionChunks {
  const T* part;
  Regions result;
  const int64_t* first_chunk;
  int64_t batch, heads, list_heads, key_regions, keys, width;
};

// Rows wider than this do not fit in shared memory.
constexpr int64_t region_cuda_widest(bool is_double) { return is_double ? 256 : 512; }

#define PYML_REGION_CUDA(T)                                                                                       \
  int64_t region_cuda_query_blocks(const RegionCuda<T>&);                /* of region_cuda_bwd_query, a region */ \
  cudaError_t region_cuda_fwd(const RegionCuda<T>&, cudaStream_t);       /* out, exact, lse, status */            \
  cudaError_t region_cuda_delta(const RegionCuda<T>&, cudaStream_t);     /* delta */                              \
  cudaError_t region_cuda_bwd_query(const RegionCuda<T>&, cudaStream_t); /* dq, part_weight */                    \
  cudaError_t region_cuda_bwd_key(const RegionCuda<T>&, cudaStream_t);   /* part_k, part_v */                     \
  cudaError_t region_cuda_chunks(const RegionChunks<T>&, cudaStream_t);

PYML_REGION_CUDA(float)
PYML_REGION_CUDA(double)
#undef PYML_REGION_CUDA

}  // namespace pyml
