// What the B-spline kernels share on a GPU: the call as a kernel sees it, and the choice of its types.
#pragma once
#include "bspline/basis.h"
#include "bspline/bspline_cuda.h"
#include "common/cuda.h"

namespace pyml {

constexpr int kThreads = 256;  // of every block

// The call as kernels see it: constants folded in, pointers with their types.
template <class X_, class A_, int kOrder>
struct Call : BsplineCuda {
  using X = X_;
  using A = A_;
  static constexpr int kMax = kOrder ? kOrder : kMaxOrder;
  __device__ int k() const { return kOrder ? kOrder : int(order); }
  __device__ int nb() const { return int(count) - k() - 1; }
  __device__ Base base_kind() const { return static_cast<Base>(base); }
  __device__ Local<A, kMax> local(A value, int64_t feature, int deriv) const {
    const A* knots = static_cast<const A*>(grid) + feature * grid_row;
    return nonzero<kMax>(value, knots, int(count), k(), deriv, static_cast<Extrapolation>(extrapolation));
  }
  __device__ A load(int64_t at) const { return A(up(static_cast<const X*>(x)[at])); }
  __device__ A load_grad(int64_t at) const { return A(up(static_cast<const X*>(grad)[at])); }
  __device__ const A* weights(const void* p) const { return static_cast<const A*>(p); }
  __device__ int64_t pixel(int64_t r) const {  // offset of output pixel r in x
    if (map.pixels == 1) return r * map.image;
    const int64_t p = r % map.pixels;
    return r / map.pixels * map.image + p / map.width * map.step_h + p % map.width * map.step_w;
  }
  __device__ int64_t tap(int64_t f) const {  // offset of feature f in x
    if (map.taps == 1) return f * map.plane;
    const int64_t t = f % map.taps;
    return f / map.taps * map.plane + t / map.kernel_w * map.tap_h + t % map.kernel_w * map.tap_w;
  }
  __device__ int64_t
  output(int64_t r) const {  // offset of output 0 of row r in y and grad; outputs lie map.pixels apart
    if (map.pixels == 1) return r * outs;
    return r / map.pixels * outs * map.pixels + r % map.pixels;
  }
};

__device__ inline int64_t block_id() { return static_cast<int64_t>(blockIdx.x); }

// Calls f with the Call type of this dtype and order: a cubic of its own, any other order (and double) by one that
// loops.
template <class F>
inline cudaError_t dispatch(const BsplineCuda& call, F f) {
  if (call.order < 1 || call.order > kMaxOrder || call.count < 2 * call.order + 2 || call.count >= (1 << 24))
    return cudaErrorInvalidValue;
  switch (static_cast<DType>(call.dtype)) {
    case DType::kDouble:
      return f(Call<double, double, 0>{call});
    case DType::kFloat:
      return call.order == 3 ? f(Call<float, float, 3>{call}) : f(Call<float, float, 0>{call});
    case DType::kHalf:
      return call.order == 3 ? f(Call<__half, float, 3>{call}) : f(Call<__half, float, 0>{call});
    case DType::kBFloat16:
      return call.order == 3 ? f(Call<__nv_bfloat16, float, 3>{call}) : f(Call<__nv_bfloat16, float, 0>{call});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyml
