// Tensors [..., n, m] of any strides as the kernels see them.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "batched_ot/batched_ot.h"
#include "common/cpu.h"

namespace pyml {

// Where each problem of a tensor [..., n, m] with any strides begins, in elements.
inline std::vector<int64_t> offsets_of(const at::Tensor& t) {
  int64_t batch = 1;
  const int64_t dims = t.dim() - 2;
  for (int64_t d = 0; d < dims; ++d) batch *= t.size(d);
  std::vector<int64_t> offsets(size_t(batch), 0), place(size_t(dims), 0);
  int64_t at = 0;
  for (int64_t& offset : offsets) {
    offset = at;
    for (int64_t d = dims - 1; d >= 0; --d) {
      at += t.stride(d);
      if (++place[size_t(d)] < t.size(d)) break;
      at -= t.stride(d) * t.size(d);
      place[size_t(d)] = 0;
    }
  }
  return offsets;
}

inline Costs costs_of(const at::Tensor& t, const std::vector<int64_t>& offsets) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t), offsets.data(), t.stride(-2), t.stride(-1)};
}

}  // namespace pyml
