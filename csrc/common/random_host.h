// Torch side of ops that draw random numbers: the key, and where each tensor of a list lies among them.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/check.h"

namespace pyml {

inline void check_key(const char* op, const at::Tensor& key, int64_t step, const at::Device& device) {
  PYML_CHECK(key.scalar_type() == at::kLong, op, "key", "an int64 tensor", key.scalar_type());
  PYML_CHECK(key.numel() == 1, op, "key", "one element", key.sizes());
  PYML_CHECK(key.device() == device, op, "key", c10::str("a tensor on ", device), key.device());
  PYML_CHECK(step >= 0 && step < (int64_t(1) << 32), op, "step", "an integer in [0, 2^32)", step);
}

using Places = at::OptionalIntArrayRef;
inline void check_places(const char* op, const char* name, const Places& given, size_t count, int64_t end) {
  if (!given) return;
  PYML_CHECK(given->size() == count, op, name, c10::str(count, " integers"), given->size());
  for (const int64_t v : *given) PYML_CHECK(v >= 0 && v < end, op, name, c10::str("integers in [0, ", end, ")"), v);
}

}  // namespace pyml
