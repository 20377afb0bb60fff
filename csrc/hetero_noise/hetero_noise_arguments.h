// What the noise ops check, and tensors as their kernels see them. Shared by the CPU and CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "common/check.h"
#include "common/random_host.h"
#include "common/strided_host.h"
#include "hetero_noise/hetero_noise.h"

namespace pyml {

struct NoiseArguments {
  const char* op;
  double std;
  const at::Tensor& key;
  int64_t step;

  void check(const at::Device& device) const {
    PYML_CHECK(std >= 0 && std::isfinite(std), op, "std", "a finite number of at least 0", std);
    check_key(op, key, step, device);
  }
};

inline void check_factors(const char* op, at::IntArrayRef shape, const at::Tensor& scale, const at::Tensor& columns,
                          const at::Device& device) {
  check_float(op, "scale", scale, device);
  if (columns.defined() && columns.dim() > 0) {
    check_float(op, "columns", columns, device);
    PYML_CHECK(!shape.empty(), op, "columns", "none for a tensor without dimensions", columns.sizes());
    check_shape(op, "scale", scale, {shape[0]});
    check_shape(op, "columns", columns, {c10::multiply_integers(shape.slice(1))});
  } else {
    PYML_CHECK(scale.dim() == 0 || scale.sizes() == shape, op, "scale", c10::str("no dimensions, or shape ", shape),
               scale.sizes());
  }
}

// The scale of tensor n in the lists of an op, checked.
struct ScaleLists {
  const char* op;
  at::TensorList scale, columns;
  size_t count;

  void check() const {
    PYML_CHECK(scale.size() == 1 || scale.size() == count, op, "scale", c10::str("one tensor, or ", count),
               scale.size());
    PYML_CHECK(columns.empty() || (columns.size() == count && scale.size() == count), op, "columns",
               c10::str("none, or ", count, " tensors beside as many in scale"), columns.size());
  }
  const at::Tensor& scale_of(size_t n) const { return scale[scale.size() > 1 ? n : 0]; }
  at::Tensor columns_of(size_t n) const { return columns.empty() ? at::Tensor() : columns[n]; }
};

inline Strided line(const at::Tensor& t) {
  Strided s;
  s.data = const_cast<void*>(t.const_data_ptr());
  s.dtype = dtype_of(t);
  s.strides[0] = t.stride(0);
  return s;
}

// A number on a GPU stays there: its elements are one, with stride 0.
inline void tell_scale(const at::Tensor& scale, const at::Tensor& columns, Joined& joined, Scale* to) {
  if (columns.defined() && columns.dim() > 0) {
    to->kind = ScaleKind::kFactors;
    to->row = line(scale);
    to->column = line(columns);
    to->columns = std::max<int64_t>(1, columns.numel());
  } else if (scale.dim() == 0 && scale.is_cpu()) {
    to->kind = ScaleKind::kNumber;
    to->number = scale.item().toDouble();
  } else {
    to->kind = ScaleKind::kElements;
    joined.add(scale.expand(joined.shape()), &to->elements);
  }
}

}  // namespace pyml
