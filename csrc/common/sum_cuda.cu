// Adds up the parts that kernels of every family make of a long sum (common/cuda.h, Split).
#include "common/sum_cuda.h"

#include "common/cuda.h"

namespace pyml {
namespace {

constexpr int kSumThreads = 256;

template <class A>
struct SumParams {
  const A* part;
  A* out;
  int64_t count, size;
};

template <class A>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(SumParams<A> p) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (e >= p.size) return;
  A sum = A(0);
  for (int64_t s = 0; s < p.count; ++s) sum += p.part[s * p.size + e];
  p.out[e] = sum;
}

template <class A>
cudaError_t add_up(const void* part, void* out, int64_t count, int64_t size, cudaStream_t stream) {
  const SumParams<A> p{static_cast<const A*>(part), static_cast<A*>(out), count, size};
  return launch(sum_kernel<A>, ceil_div(size, kSumThreads), 1, kSumThreads, 0, stream, p);
}

}  // namespace
}  // namespace pyml

cudaError_t pyml_cuda_sum(const void* part, void* out, int64_t count, int64_t size, int64_t is_double,
                          cudaStream_t stream) {
  return (is_double ? pyml::add_up<double> : pyml::add_up<float>)(part, out, count, size, stream);
}
