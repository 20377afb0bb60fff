// Products that are rounded in one place only: what a GPU, its emulation and every kernel of a family must round alike.
#pragma once
#include <cmath>

#include "common/cuda.h"

namespace pyml {

// a * b + c, rounded once.
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// The product alone, never contracted with what follows.
#ifdef PYML_CUDA_EMULATION
template <class A>
A rounded_product(A a, A b) {
  return a * b;
}
#else
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

}  // namespace pyml
