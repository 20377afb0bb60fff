// What every op checks before it touches memory, in one voice: "op: argument: expected E, got G".
// The public Python functions check first and say more; these hold for calls of torch.ops.pyml as well.
#pragma once
#include <ATen/core/Tensor.h>

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

// The dtype that ops compute in: float64 when any input has it, else float32.
template <class... Tensors>
bool any_double(const Tensors&... tensors) {
  return ((tensors.defined() && tensors.scalar_type() == at::kDouble) || ...);
}

}  // namespace pyml
