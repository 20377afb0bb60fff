// Elements of any dtype and tables of tensors, as kernels read them.
#pragma once
#include "common/cuda.h"
#include "common/strided.h"

namespace pyml {

template <class T>
__device__ inline T load_flat(const Flat& f, int64_t i) {
  switch (f.dtype) {
    case DType::kFloat:
      return T(static_cast<const float*>(f.data)[i]);
    case DType::kDouble:
      return T(static_cast<const double*>(f.data)[i]);
    case DType::kBFloat16:
      return T(up(static_cast<const __nv_bfloat16*>(f.data)[i]));
    default:
      return T(up(static_cast<const __half*>(f.data)[i]));
  }
}
template <class T>
__device__ inline void store_flat(const Flat& f, int64_t i, T v) {
  switch (f.dtype) {
    case DType::kFloat:
      static_cast<float*>(f.data)[i] = float(v);
      return;
    case DType::kDouble:
      static_cast<double*>(f.data)[i] = double(v);
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(f.data)[i] = down<__nv_bfloat16>(float(v));
      return;
    default:
      static_cast<__half*>(f.data)[i] = down<__half>(float(v));
  }
}

// v as store_flat would leave it.
template <class T>
__device__ inline T rounded_to(DType dtype, T v) {
  switch (dtype) {
    case DType::kFloat:
      return T(float(v));
    case DType::kDouble:
      return v;
    case DType::kBFloat16:
      return T(up(down<__nv_bfloat16>(float(v))));
    default:
      return T(up(down<__half>(float(v))));
  }
}

// The tensor of a table that a block belongs to.
template <class Tensor>
__device__ inline const Tensor& tensor_at(const Tensor* tensors, int count, int64_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors[middle].begin <= block)
      low = middle;
    else
      high = middle;
  }
  return tensors[low];
}

}  // namespace pyml
