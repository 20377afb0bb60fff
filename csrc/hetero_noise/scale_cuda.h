// The scale of an element.
#pragma once
#include "common/flat_cuda.h"
#include "hetero_noise/hetero_noise_cuda.h"

namespace pyml {

template <class T>
__device__ inline T scale_at(const FlatScale& s, int64_t i) {
  if (s.kind == ScaleKind::kFactors)
    return load_flat<T>(s.elements, i / s.columns) * load_flat<T>(s.column, i % s.columns);
  return load_flat<T>(s.elements, s.one ? 0 : i);
}

}  // namespace pyml
