// Torch side of CUDA ops whose sums are made in parts: the launches of one call, its parts and their sum.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/cuda_host.h"
#include "common/sum_cuda.h"

namespace pyml {

// P is what the kernels of a family are told, with split_count and split_size, which one of its splitters sets.
template <class P>
struct CudaParts {
  const char* op;
  OnDevice device;
  at::TensorOptions sums;  // float32 or float64
  P p{};

  CudaParts(const char* op, const at::Tensor& on, at::ScalarType type)
      : op(op), device(on), sums(on.options().dtype(type)) {}

  template <class Launcher>
  void run(Launcher launcher) const {
    check_cuda(op, launcher(&p, device.stream()));
  }
  template <class Splitter>
  void split(Splitter splitter) {
    splitter(&p, &p.split_count, &p.split_size);
  }
  at::Tensor parts(const at::Tensor& like) const {
    auto shape = like.sizes().vec();
    shape.insert(shape.begin(), p.split_count);
    return at::empty(shape, sums);
  }
  // The sum of the parts, in order and in the dtype of `like`.
  at::Tensor total(const at::Tensor& part, const at::Tensor& like) const {
    at::Tensor sum = part.select(0, 0);
    if (part.size(0) > 1) {
      sum = at::empty(like.sizes(), sums);
      check_cuda(op, pyml_cuda_sum(part.const_data_ptr(), sum.mutable_data_ptr(), part.size(0), sum.numel(),
                                   sum.scalar_type() == at::kDouble, device.stream()));
    }
    return sum.to(like.scalar_type());
  }
};

}  // namespace pyml
