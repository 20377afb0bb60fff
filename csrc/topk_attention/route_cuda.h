// CUDA launchers of route_regions: plain structs, no torch.
#pragma once
#include "topk_attention/topk_attention.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

constexpr int64_t kMostRegions = 8192;  // that a block sorts in shared memory

cudaError_t route_cuda_means(const RouteParams&, cudaStream_t);  // means [B, H, regions, D]
cudaError_t route_cuda(const RouteParams&, cudaStream_t);        // index, logits; key_means is not padded

}  // namespace pyml
