// AdamW on slices and edits of heads on NVIDIA GPUs: plain parameter structs and launchers, no torch. The table of
// slices travels as launch arguments, so that nothing is copied before a launch and hundreds of slices take one.
#pragma once
#include <cstdint>

#include "head_update/head_update.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

constexpr int kAdamTable = 192;  // launch arguments have 32,764 bytes since CUDA 12.1

// Element (r, c) of a slice of `columns` columns lies at r * row + c * column.
struct AdamOperand {
  void* data;
  int64_t row, column;
};
struct AdamCudaSlice {
  AdamOperand param, grad, m, v, master;  // master.data is null where there is none
  int64_t count, columns;
  int32_t begin;  // noise blocks of the slices before it in this table
  uint32_t id;
  uint8_t param_type, grad_type, m_type, v_type, master_type;  // DType
};
struct AdamCuda {
  AdamStep step;
  const int64_t* key;  // null: rounds to nearest
  uint32_t number;
  int32_t count;
  int64_t blocks;
  AdamCudaSlice slices[kAdamTable];
};
static_assert(sizeof(AdamCuda) <= 32764, "launch arguments have 32,764 bytes");

}  // namespace pyml

extern "C" {
cudaError_t pyml_cuda_adamw_slices(const pyml::AdamCuda* p, int64_t wide, cudaStream_t stream);
cudaError_t pyml_cuda_head_edit(const pyml::HeadEditParams* p, cudaStream_t stream);
cudaError_t pyml_cuda_head_edit_matrix(const pyml::HeadMatrixParams* p, cudaStream_t stream);
}
