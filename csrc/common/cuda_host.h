// Torch side of CUDA files: the device and stream of a call, and what becomes of an error. Light headers only:
// ATen/cuda/CUDAContext.h needs the developer headers of every CUDA library.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#define PYML_CUDA_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#define PYML_CUDA_KEY CUDA
#endif

namespace pyml {

#ifdef PYML_CUDA_EMULATION
struct DeviceGuard {};
#else
using DeviceGuard = c10::cuda::CUDAGuard;
#endif

// Makes the device of `t` the current one for as long as it lives, and knows torch's current stream there.
class OnDevice {
 public:
#ifdef PYML_CUDA_EMULATION
  explicit OnDevice(const at::Tensor&) : guard_(std::make_unique<DeviceGuard>()) {}
#else
  explicit OnDevice(const at::Tensor& t)
      : guard_(std::make_unique<DeviceGuard>(t.device())), stream_(c10::cuda::getCurrentCUDAStream().stream()) {}
#endif
  cudaStream_t stream() const { return stream_; }

 private:
  std::unique_ptr<DeviceGuard> guard_;  // a guard cannot be moved, its owner can
  cudaStream_t stream_ = nullptr;
};

// A launch that CUDA refused; faults inside a kernel show at the next call that waits for the GPU.
inline void check_cuda(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA refused the launch: ", cudaGetErrorString(error));
}

}  // namespace pyml
