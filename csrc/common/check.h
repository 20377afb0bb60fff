// What every op checks before it touches memory, in one voice: "op: argument: expected E, got G".
// The public Python functions check first and say more; these hold for calls of torch.ops.pyml as well.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <optional>

namespace pyml {

#define PYML_CHECK(condition, op, argument, expected, got) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, ": expected ", expected, ", got ", got)

inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef expected) {
  PYML_CHECK(t.sizes() == expected, op, name, c10::str("shape ", expected), t.sizes());
}

inline void check_float(const char* op, const char* name, const at::Tensor& t, const at::Device& device) {
  const auto type = t.scalar_type();
  PYML_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, name,
             "float32, float64, bfloat16 or float16", type);
  PYML_CHECK(t.device() == device, op, name, c10::str("a tensor on ", device), t.device());
}

// A tensor that an op writes to: no two elements share memory. In order of stride, each step must pass over all below.
inline void check_writable(const char* op, const char* name, const at::Tensor& t) {
  c10::SmallVector<std::pair<int64_t, int64_t>, 6> steps;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) steps.emplace_back(t.stride(d), t.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;  // offset of the last element below
  for (const auto& [step, size] : steps) {
    PYML_CHECK(t.numel() == 0 || step > reach, op, name, "elements with places of their own in memory",
               c10::str("strides ", t.strides()));
    reach += step * (size - 1);
  }
}

// The dtype that ops compute in: float64 when any input has it, else float32.
template <class... Tensors>
bool any_double(const Tensors&... tensors) {
  return ((tensors.defined() && tensors.scalar_type() == at::kDouble) || ...);
}

}  // namespace pyml
