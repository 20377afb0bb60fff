// Tensors [..., n, m] of any strides as CUDA kernels see them.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "batched_ot/batched_ot_cuda.h"
#include "common/cpu.h"

namespace pyml {

// The leading dimensions of a tensor [..., n, m], those that lie one behind the other taken together.
inline Lead lead_of(const at::Tensor& t) {
  Lead lead;
  for (int64_t d = 0; d < t.dim() - 2; ++d) {
    if (t.size(d) == 1) continue;
    const int last = lead.dims - 1;
    if (last >= 0 && lead.stride[last] == t.size(d) * t.stride(d)) {
      lead.size[last] *= t.size(d);
      lead.stride[last] = t.stride(d);
      continue;
    }
    if (lead.dims == kLeadDims) return Lead{-1};
    lead.size[lead.dims] = t.size(d);
    lead.stride[lead.dims++] = t.stride(d);
  }
  return lead;
}

// A tensor where it lies; one with too many leading dimensions as a copy. `kept` holds what is pointed to.
inline Costs where_it_lies(const at::Tensor& t, Lead& lead, std::vector<at::Tensor>& kept) {
  kept.push_back(t);
  lead = lead_of(t);
  if (lead.dims < 0) {
    kept.back() = t.contiguous();
    lead = lead_of(kept.back());
  }
  const at::Tensor& used = kept.back();
  return {const_cast<void*>(used.const_data_ptr()), dtype_of(used), nullptr, used.stride(-2), used.stride(-1)};
}

}  // namespace pyml
