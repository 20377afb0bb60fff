// clip_sum on NVIDIA GPUs: squares of each block of a sample, then sums over the samples, one element a thread and one
// sample after the other. No atomics; both passes are bound by memory.
#include "common/cuda.h"
#include "hetero_noise/hetero_noise_cuda.h"
#include "hetero_noise/scale_cuda.h"

namespace pyml {
namespace {

constexpr int kThreads = 256;

__device__ inline Flat of_sample(const ClipCudaTensor& t, int64_t b) {
  const int bytes = t.grad.dtype == DType::kDouble ? 8 : t.grad.dtype == DType::kFloat ? 4 : 2;
  return {static_cast<char*>(t.grad.data) + b * t.batch_stride * bytes, t.grad.dtype};
}

// Program (block of this table, sample): the squares of g / scale in that block.
__global__ void __launch_bounds__(kThreads) clip_norm_kernel(ClipCuda p) {
  PYML_SHARED(double, part);
  for (int64_t b = blockIdx.y; b < p.samples; b += gridDim.y) {
    const int64_t block = p.first_block + blockIdx.x;
    const ClipCudaTensor& t = tensor_at(p.tensors, p.count, block);
    const Flat g = of_sample(t, b);
    const int64_t i0 = (block - t.begin) * kClipBlock, end = i0 + kClipBlock < t.count ? i0 + kClipBlock : t.count;
    double sum = 0;
    for (int64_t i = i0 + threadIdx.x; i < end; i += kThreads) {
      double v = load_flat<double>(g, i);
      if (t.scale.kind != ScaleKind::kNone) {
        // As the sums see it: an element is dropped in both or in none.
        const double s = t.sum.dtype == DType::kDouble ? scale_at<double>(t.scale, i) : scale_at<float>(t.scale, i);
        v = s == 0 ? 0 : v / s;
      }
      sum += v * v;
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) part[threadIdx.x] += part[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) p.squares[b * p.blocks + block] = part[0];
    __syncthreads();
  }
}

template <class T>
__device__ inline void sum_samples(const ClipCuda& p, const ClipCudaTensor& t, int64_t i) {
  T sum = 0;
  if (t.scale.kind == ScaleKind::kNone || scale_at<T>(t.scale, i) != T(0))
    for (int64_t b = 0; b < p.samples; ++b) {
      const double factor = p.factors[b * p.groups + t.group];
      if (factor >= 0) sum += T(factor) * load_flat<T>(of_sample(t, b), i);
    }
  store_flat<T>(t.sum, i, sum);
}

__global__ void __launch_bounds__(kThreads) clip_sum_kernel(ClipCuda p) {
  const int64_t block = p.first_block + blockIdx.x;
  const ClipCudaTensor& t = tensor_at(p.tensors, p.count, block);
  const int64_t i0 = (block - t.begin) * kClipBlock, end = i0 + kClipBlock < t.count ? i0 + kClipBlock : t.count;
  for (int64_t i = i0 + threadIdx.x; i < end; i += kThreads)
    t.sum.dtype == DType::kDouble ? sum_samples<double>(p, t, i) : sum_samples<float>(p, t, i);
}

}  // namespace
}  // namespace pyml

extern "C" {
cudaError_t pyml_cuda_clip_norm(const pyml::ClipCuda* p, cudaStream_t stream) {
  using namespace pyml;
  const int64_t samples = p->samples < 32768 ? p->samples : 32768;
  return launch(clip_norm_kernel, p->table_blocks, samples, kThreads, kThreads * sizeof(double), stream, *p);
}
cudaError_t pyml_cuda_clip_sum(const pyml::ClipCuda* p, cudaStream_t stream) {
  using namespace pyml;
  return launch(clip_sum_kernel, p->table_blocks, 1, kThreads, 0, stream, *p);
}
}
