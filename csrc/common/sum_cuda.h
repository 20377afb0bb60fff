// The sum of parts on a GPU: plain arguments, no torch.
#pragma once
#include <cstdint>

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

extern "C" {
// out[e] = sum of part[s, e] over s < count, in order; is_double: both are double, else float.
cudaError_t pyml_cuda_sum(const void* part, void* out, int64_t count, int64_t size, int64_t is_double,
                          cudaStream_t stream);
}
