// Torch side of strided elements: tensors as the kernels see them, and where they lie.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/cpu.h"
#include "common/strided.h"

namespace pyml {

// Elements of this shape, and the strides of operands over it, with dimensions that lie one after the other joined.
class Joined {
 public:
  explicit Joined(at::IntArrayRef shape) : shape_(shape) {}
  void add(const at::Tensor& t, Strided* to, int64_t skip = 0) {
    to->data = const_cast<void*>(t.const_data_ptr());
    to->dtype = dtype_of(t);
    const at::IntArrayRef strides = t.strides().slice(size_t(skip));
    operands_.push_back({to, {strides.begin(), strides.end()}});
  }
  at::IntArrayRef shape() const { return shape_; }
  void into(const char* op, Elements& e) {
    e.count = c10::multiply_integers(shape_);
    c10::SmallVector<int64_t, kStridedDims> kept, sizes;  // dimensions, the last first
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
    PYML_CHECK(kept.size() <= size_t(kStridedDims), op, "tensors",
               c10::str("at most ", kStridedDims, " dimensions that do not lie one after the other"), kept.size());
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
    c10::SmallVector<int64_t, kStridedDims> strides;  // its own: the tensor may be a view that goes
  };
  at::IntArrayRef shape_;
  c10::SmallVector<Operand, 5> operands_;
};

// Where a tensor lies: the bytes from its first element to behind its last one.
struct Span {
  uintptr_t begin, end;
  size_t tensor;
  Span(const at::Tensor& t, size_t n) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())), tensor(n) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    end = t.numel() == 0 ? begin : begin + uintptr_t((last + 1) * t.element_size());
  }
};

// Whether two elements may share memory: in order of stride, each step must pass over all that lies below it.
inline bool overlaps(const at::Tensor& t) {
  if (t.numel() == 0) return false;
  c10::SmallVector<std::pair<int64_t, int64_t>, kStridedDims> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // offset of the last element below
  for (const auto& [step, size] : dims) {
    if (step <= reach) return true;
    reach += step * (size - 1);
  }
  return false;
}

// A tensor that an op writes to: no gradient is lost, and no place in memory has two elements.
inline void check_written(const char* op, const char* name, const at::Tensor& t) {
  PYML_CHECK(!t.requires_grad() || !c10::GradMode::is_enabled(), op, name,
             "a tensor without requires_grad, or a call under torch.no_grad()", "requires_grad");
  PYML_CHECK(t.is_non_overlapping_and_dense() || !overlaps(t), op, name, "elements with places of their own in memory",
             c10::str("strides ", t.strides()));
}

}  // namespace pyml
