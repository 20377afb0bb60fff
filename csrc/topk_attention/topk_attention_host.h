// Torch side shared by the ops of the family: Regions over a tensor, checks.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/check.h"
#include "common/cpu.h"
#include "topk_attention/topk_attention.h"

namespace pyml {

// A tensor [B, H, regions, tokens, features] as kernels see it.
inline Regions regions_of(const at::Tensor& t) {
  Regions r;
  r.data = const_cast<void*>(t.const_data_ptr());
  r.dtype = dtype_of(t);
  r.tokens = t.size(3);
  for (int i = 0; i < 5; ++i) r.stride[i] = t.stride(i);
  return r;
}

// q and k as [B, H, regions, tokens, D] of one B, H and D.
inline void check_five(const char* op, const at::Tensor& q, const at::Tensor& k) {
  check_float(op, "q", q, q.device());
  check_float(op, "k", k, q.device());
  for (const auto& [name, t] : {std::pair{"q", q}, {"k", k}})
    PYML_CHECK(t.dim() == 5, op, name, "shape [B, H, regions, tokens, D]", t.sizes());
  PYML_CHECK(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(4) == q.size(4), op, "k",
             c10::str("B = ", q.size(0), ", H = ", q.size(1), ", D = ", q.size(4), " as in q"), k.sizes());
}

// A mask [B, regions, tokens] over the tokens of t.
inline void check_mask(const char* op, const char* name, const at::Tensor& mask, const at::Tensor& t) {
  PYML_CHECK(mask.scalar_type() == at::kBool, op, name, "bool", mask.scalar_type());
  PYML_CHECK(mask.device() == t.device(), op, name, c10::str("a tensor on ", t.device()), mask.device());
  check_shape(op, name, mask, {t.size(0), t.size(2), t.size(3)});
}

}  // namespace pyml
