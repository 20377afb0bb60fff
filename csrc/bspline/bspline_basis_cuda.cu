// B-spline kernels for NVIDIA GPUs in exact float32 (float64 for double): local support, so only k + 1 functions a
// value.
//
// The basis lives in registers and shared memory only. Sums over rows are made in parts (common/cuda.h, Split) and
// added in order: no atomics, the same bits on every run. X is the dtype of x, A that of all arithmetic, kOrder a fixed
// order (the cubic) or 0 for any. All offsets are 64-bit. Here: bspline_basis; kan_linear and wkan_* are in the files
// beside this one.
#include "bspline/bspline_device.h"

namespace pyml {
namespace {

constexpr int kBasisElements = 64;

// A block evaluates 64 inputs once, then all its threads write the columns side by side.
template <class C>
__global__ void __launch_bounds__(kThreads) basis_fwd_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, values);  // [64][kMax + 2], then the first function of each as int
  constexpr int kLd = C::kMax + 2;
  int* firsts = reinterpret_cast<int*>(values + kBasisElements * kLd);
  const int64_t start = block_id() * kBasisElements, size = c.rows * c.features;
  const int tid = threadIdx.x, nb = c.nb();
  if (tid < kBasisElements && start + tid < size) {
    const auto local = c.local(c.load(start + tid), (start + tid) % c.features, int(c.derivative));
    for (int q = 0; q <= C::kMax; ++q) values[tid * kLd + q] = local.value[q];
    values[tid * kLd + C::kMax + 1] = local.rest;
    firsts[tid] = local.first;
  }
  __syncthreads();
  for (int64_t i = tid; i < int64_t(kBasisElements) * nb; i += kThreads) {
    const int e = int(i / nb), q = int(i % nb) - firsts[e];
    if (start + e >= size) break;
    const A value = values[e * kLd + (q >= 0 && q <= c.k() ? q : C::kMax + 1)];
    static_cast<typename C::X*>(c.y)[start * nb + i] = down<typename C::X>(value);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) basis_bwd_kernel(C c) {
  using A = typename C::A;
  const int64_t e = block_id() * kThreads + threadIdx.x;
  if (e >= c.rows * c.features) return;
  const int nb = c.nb();
  const auto local = c.local(c.load(e), e % c.features, int(c.derivative));
  A sum = local.rest;
  PYML_UNROLL
  for (int q = 0; q <= C::kMax; ++q)
    if (q <= c.k()) sum += local.value[q] * c.load_grad(e * nb + local.first + q);
  static_cast<typename C::X*>(c.dx)[e] = down<typename C::X>(sum);
}

}  // namespace

extern "C" {

cudaError_t bspline_cuda_basis_fwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared = kBasisElements * ((C::kMax + 2) * sizeof(typename C::A) + sizeof(int));
    return launch(basis_fwd_kernel<C>, ceil_div(c.rows * c.features, kBasisElements), 1, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_basis_bwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    return launch(basis_bwd_kernel<C>, ceil_div(c.rows * c.features, kThreads), 1, kThreads, 0, stream, c);
  });
}

}  // extern "C"

}  // namespace pyml
