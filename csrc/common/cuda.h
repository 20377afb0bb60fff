// What CUDA files need of CUDA: types, conversions, and one way to launch. No torch header.
// tests/cpp/cuda_emulation.h stands in for the toolkit when the same file is compiled for a CPU (PYML_CUDA_EMULATION).
#pragma once
#include <cstdint>

#include "common/host_device.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The dynamic shared memory of the block, as an array of T.
#define PYML_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
#endif

namespace pyml {

// Values are converted at once after a load and just before a store: all arithmetic is in float or double.
__device__ inline float up(float v) { return v; }
__device__ inline double up(double v) { return v; }
__device__ inline float up(__half v) { return __half2float(v); }
__device__ inline float up(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T, class A>
__device__ inline T down(A v) {
  return static_cast<T>(v);
}
template <>
__device__ inline __half down<__half, float>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 down<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}

PYML_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One equal part of the rows, so that sums over rows can run in parallel and still in a fixed order: the parts are
// added one after the other by a second kernel. Depends on the shape alone: the same bits on every run and every GPU.
struct Split {
  int64_t count = 1, size = 0;
  static Split of(int64_t rows, int64_t block, int64_t tiles, int64_t programs) {
#ifdef PYML_CUDA_EMULATION
    programs = emulation::programs(programs);
#endif
    const int64_t blocks = ceil_div(rows, block);
    int64_t want = programs / (tiles > 0 ? tiles : 1);
    if (want > blocks) want = blocks;
    if (want < 1) want = 1;
    Split split;
    split.size = ceil_div(blocks, want) * block;
    split.count = split.size > 0 ? ceil_div(rows, split.size) : 1;
    return split;
  }
  void store(int64_t* to_count, int64_t* to_size) const {
    *to_count = count;
    *to_size = size;
  }
};

// Launch `kernel` on blocks x splits blocks. Reports what the launch itself reports; nothing waits.
template <class Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int64_t splits, int threads, size_t shared,
                   cudaStream_t stream, const Params& params) {
  if (blocks <= 0 || splits <= 0) return cudaSuccess;
  if (blocks > INT32_MAX || splits > 65535) return cudaErrorInvalidConfiguration;
#ifdef PYML_CUDA_EMULATION
  return emulation::launch([&] { kernel(params); }, blocks, splits, threads, shared);
#else
  if (shared > (48 << 10)) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
  // clang-format off
  kernel<<<grid, threads, shared, stream>>>(params);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace pyml
