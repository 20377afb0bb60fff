// What the CUDA kernels of the family share: entries of tensors, exponentials, limits of the fast scalings.
#pragma once
#include <cfloat>
#include <cmath>

#include "batched_ot/batched_ot_cuda.h"
#include "common/cuda.h"

namespace pyml {

// body(pointer to element `at` of t, of its type).
template <class Body>
__device__ void with_dtype(const Costs& t, int64_t at, const Body& body) {
  if (t.dtype == DType::kDouble) body(static_cast<double*>(t.data) + at);
  if (t.dtype == DType::kFloat) body(static_cast<float*>(t.data) + at);
  if (t.dtype == DType::kHalf) body(static_cast<__half*>(t.data) + at);
  if (t.dtype == DType::kBFloat16) body(static_cast<__nv_bfloat16*>(t.data) + at);
}

constexpr double kOtLog2e = 1.4426950408889634074, kOtLn2 = 0.69314718055994530942;

__device__ inline float exp2_of(float x) { return exp2f(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }
__device__ inline float log2_of(float x) { return log2f(x); }
__device__ inline double log2_of(double x) { return log2(x); }

// What ot_math_cpu.h says of them holds here too.
template <class T>
struct Trust {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr T kSoft = kFloat ? T(0x1p24) : T(0x1p240), kHard = kFloat ? T(0x1p34) : T(0x1p300);
  static constexpr T kFlush = kFloat ? T(-96) : T(-800), kHighest = kFloat ? T(120) : T(1000);
  static constexpr T kSmallest = kFloat ? T(FLT_MIN) : T(DBL_MIN), kLargest = kFloat ? T(FLT_MAX) : T(DBL_MAX);
  static constexpr T kLow = -kLargest / 4;
};

template <class T>
__device__ T exp2_bounded(T x) {
  return exp2_of(x < Trust<T>::kHighest ? x : Trust<T>::kHighest);
}
template <class T>
__device__ T exp2_flushed(T x) {
  return x < Trust<T>::kFlush ? T(0) : exp2_bounded(x);
}

template <class S, class T>
__device__ S narrow(T v) {
  if constexpr (sizeof(S) == 2)
    return down<S>(float(v));
  else
    return S(v);
}

}  // namespace pyml
