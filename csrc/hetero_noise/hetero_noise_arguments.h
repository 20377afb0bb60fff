// What the noise ops check, and tensors as their kernels see them. Shared by the CPU and CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/cpu.h"
#include "hetero_noise/hetero_noise.h"

namespace pyml {

struct NoiseArguments {
  const char* op;
  double std;
  const at::Tensor& key;
  int64_t step;

  void check(const at::Device& device) const {
    PYML_CHECK(std >= 0 && std::isfinite(std), op, "std", "a finite number of at least 0", std);
    PYML_CHECK(key.scalar_type() == at::kLong, op, "key", "an int64 tensor", key.scalar_type());
    PYML_CHECK(key.numel() == 1, op, "key", "one element", key.sizes());
    PYML_CHECK(key.device() == device, op, "key", c10::str("a tensor on ", device), key.device());
    PYML_CHECK(step >= 0 && step < (int64_t(1) << 32), op, "step", "an integer in [0, 2^32)", step);
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

// Elements of this shape, and the strides of operands over it, with dimensions that lie one after the other joined.
class Joined {
 public:
  explicit Joined(at::IntArrayRef shape) : shape_(shape) {}
  void add(const at::Tensor& t, Strided* to, int64_t skip = 0) {
    to->data = const_cast<void*>(t.const_data_ptr());
    to->dtype = dtype_of(t);
    operands_.push_back({to, t.strides().slice(size_t(skip)).vec()});
  }
  at::IntArrayRef shape() const { return shape_; }
  void into(const char* op, Elements& e) {
    e.count = c10::multiply_integers(shape_);
    std::vector<int64_t> kept;  // dimensions, the last first
    std::vector<int64_t> sizes;
    for (int64_t d = int64_t(shape_.size()) - 1; d >= 0; --d) {
      const int64_t size = shape_[size_t(d)];
      if (size == 1) continue;
      const bool joins = !kept.empty() && std::all_of(operands_.begin(), operands_.end(), [&](const Operand& o) {
        return o.strides[size_t(d)] == o.strides[size_t(kept.back())] * sizes.back();
      });
      if (joins) {
        sizes.back() *= size;  // the strides stay those of the inner one
      } else {
        kept.push_back(d);
        sizes.push_back(size);
      }
    }
    PYML_CHECK(kept.size() <= size_t(kNoiseDims), op, "tensors",
               c10::str("at most ", kNoiseDims, " dimensions that do not lie one after the other"), kept.size());
    e.dims = int(kept.size());
    for (int i = 0; i < e.dims; ++i) {
      const size_t from = kept.size() - 1 - size_t(i);
      e.sizes[i] = sizes[from];
      for (const Operand& o : operands_) o.to->strides[i] = o.strides[size_t(kept[from])];
    }
  }

 private:
  struct Operand {
    Strided* to;
    std::vector<int64_t> strides;
  };
  at::IntArrayRef shape_;
  std::vector<Operand> operands_;
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
