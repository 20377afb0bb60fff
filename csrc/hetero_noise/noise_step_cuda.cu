// Noise on NVIDIA GPUs: a thread for each Philox counter, that is for four elements 16 apart, so that each of its loads
// lies beside those of its neighbours. The bits are those of the CPU, see normal.h. Bound by memory.
#include "common/cuda.h"
#include "hetero_noise/flat_cuda.h"
#include "hetero_noise/hetero_noise_cuda.h"
#include "hetero_noise/normal.h"

namespace pyml {
namespace {

constexpr int kThreads = 256, kCounters = 16;

template <class T>
__device__ inline T fused_in(T a, T b, T c) {
  if constexpr (sizeof(T) == 4)
    return fused_once(a, b, c);
  else
    return fma(a, b, c);
}

template <class T>
__device__ inline void change(const NoiseCuda& p, const NoiseCudaTensor& t, int64_t i, T z) {
  // As on a CPU: a tensor's scale times std is rounded once.
  const T s = scale_at<T>(t.scale, i) * T(p.std), in = load_flat<T>(t.in, i);
  T out;
  if (p.mode == NoiseMode::kAdd)
    out = fused_in<T>(s, z, in) * T(p.factor);
  else if (p.mode == NoiseMode::kStep)
    out = fused_in<T>(T(p.factor), fused_in<T>(s, z, in), load_flat<T>(t.base, i));
  else
    out = in * (s * z);
  store_flat<T>(t.out, i, out);
}

template <class T>
__global__ void __launch_bounds__(kThreads) hetero_noise_kernel(NoiseCuda p) {
  const uint64_t key = uint64_t(*p.key);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < p.blocks * kCounters; at += step) {
    const int64_t block = at / kCounters;
    const int lane = int(at % kCounters);
    const NoiseCudaTensor& t = tensor_at(p.tensors, p.count, block);
    const int64_t number = t.first / kNoiseBlock + (block - t.begin);
    T z[4];
    four_normals<T>(key, number, lane, t.id, p.step, z);
    PYML_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t i = number * kNoiseBlock + j * kCounters + lane - t.first;
      if (i >= 0 && i < t.count) change<T>(p, t, i, z[j]);
    }
  }
}

}  // namespace
}  // namespace pyml

extern "C" cudaError_t pyml_cuda_hetero_noise(const pyml::NoiseCuda* p, int64_t wide, cudaStream_t stream) {
  using namespace pyml;
  const int64_t wanted = ceil_div(p->blocks * kCounters, kThreads), blocks = wanted < (1 << 20) ? wanted : 1 << 20;
  return launch(wide ? hetero_noise_kernel<double> : hetero_noise_kernel<float>, blocks, 1, kThreads, 0, stream, *p);
}
