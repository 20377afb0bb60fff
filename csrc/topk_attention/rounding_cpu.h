// A product and a sum that are rounded once, as in the vector kernels of a CPU that can: GCC may cut a loop over plain
// ones into vectors of rounded products and sums of them.
#pragma once
#include <cmath>

#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
PYML_INLINE T fused(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
