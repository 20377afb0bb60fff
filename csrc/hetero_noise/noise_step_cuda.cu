// Noise on NVIDIA GPUs: a thread for each Philox counter, that is for four elements 16 apart, so that each of its loads
// lies beside those of its neighbours; in float32 a thread for four counters. The bits are those of the CPU, see
// normal.h. Bound by memory in float32, else by instructions.
#include "common/cuda.h"
#include "hetero_noise/hetero_noise_cuda.h"
#include "hetero_noise/normal.h"
#include "hetero_noise/scale_cuda.h"

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

// The numbers of a call in the type that computes: a conversion from double takes as long as ten products.
template <class T>
struct Numbers {
  NoiseMode mode;
  T std, factor;
  __device__ explicit Numbers(const NoiseCuda& p) : mode(p.mode), std(T(p.std)), factor(T(p.factor)) {}

  __device__ T changed(T in, T scale, T base, T z) const {
    const T s = scale * std;  // as on a CPU: rounded once
    if (mode == NoiseMode::kAdd) return fused_in<T>(s, z, in) * factor;
    if (mode == NoiseMode::kStep) return fused_in<T>(factor, fused_in<T>(s, z, in), base);
    return in * (s * z);
  }
};

template <class T>
__device__ inline void change(const Numbers<T>& by, const NoiseCudaTensor& t, int64_t i, T z) {
  const T base = by.mode == NoiseMode::kStep ? load_flat<T>(t.base, i) : T(0);
  store_flat<T>(t.out, i, by.changed(load_flat<T>(t.in, i), scale_at<T>(t.scale, i), base, z));
}

template <class T>
__global__ void __launch_bounds__(kThreads) hetero_noise_kernel(NoiseCuda p) {
  const uint64_t key = uint64_t(*p.key);
  const Numbers<T> by(p);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < p.blocks * kCounters; at += step) {
    const int64_t block = at / kCounters;
    const int lane = int(at % kCounters);
    const NoiseCudaTensor& t = tensor_at(p.tensors, p.count, block);
    const int64_t number = t.first / kPhiloxBlock + (block - t.begin);
    T z[4];
    four_normals<T>(key, number, lane, t.id, p.step, z);
    PYML_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t i = number * kPhiloxBlock + j * kCounters + lane - t.first;
      if (i >= 0 && i < t.count) change<T>(by, t, i, z[j]);
    }
  }
}

// For NoiseTypes::kFloats: a thread has four neighbouring counters, so its elements are four runs of four, and each
// load or store is one of 16 bytes. About half of the instructions an element are left.
struct alignas(16) Four {
  float at[4];
};
__device__ inline Four& four(const Flat& f, int64_t i) {
  return *reinterpret_cast<Four*>(static_cast<float*>(f.data) + i);
}

__global__ void __launch_bounds__(kThreads) hetero_noise_floats_kernel(NoiseCuda p) {
  constexpr int kFours = kCounters / 4;
  const uint64_t key = uint64_t(*p.key);
  const Numbers<float> by(p);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < p.blocks * kFours; at += step) {
    const int64_t block = at / kFours;
    const int lane = int(at % kFours) * 4;
    const NoiseCudaTensor& t = tensor_at(p.tensors, p.count, block);
    const int64_t number = t.first / kPhiloxBlock + (block - t.begin), start = number * kPhiloxBlock + lane - t.first;
    float z[4][4];
    PYML_UNROLL
    for (int k = 0; k < 4; ++k) four_normals<float>(key, number, lane + k, t.id, p.step, z[k]);
    PYML_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t i = start + j * kCounters;
      if (i >= 0 && i + 4 <= t.count) {
        const Four in = four(t.in, i), base = by.mode == NoiseMode::kStep ? four(t.base, i) : Four{};
        const float one = t.scale.one ? load_flat<float>(t.scale.elements, 0) : 0;
        const Four scale = t.scale.one ? Four{{one, one, one, one}} : four(t.scale.elements, i);
        Four out;
        PYML_UNROLL
        for (int k = 0; k < 4; ++k) out.at[k] = by.changed(in.at[k], scale.at[k], base.at[k], z[k][j]);
        four(t.out, i) = out;
      } else {
        PYML_UNROLL
        for (int k = 0; k < 4; ++k)
          if (i + k >= 0 && i + k < t.count) change<float>(by, t, i + k, z[k][j]);
      }
    }
  }
}

}  // namespace
}  // namespace pyml

extern "C" cudaError_t pyml_cuda_hetero_noise(const pyml::NoiseCuda* p, pyml::NoiseTypes types, cudaStream_t stream) {
  using namespace pyml;
  const bool floats = types == NoiseTypes::kFloats;
  const auto kernel = floats                          ? hetero_noise_floats_kernel
                      : types == NoiseTypes::kDoubles ? hetero_noise_kernel<double>
                                                      : hetero_noise_kernel<float>;
  const int64_t wanted = ceil_div(p->blocks * (floats ? kCounters / 4 : kCounters), kThreads);
  return launch(kernel, wanted < (1 << 20) ? wanted : 1 << 20, 1, kThreads, 0, stream, *p);
}
