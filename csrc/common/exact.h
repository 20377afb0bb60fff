// Floating-point operations that are rounded once and alike on every GPU and CPU, and the bits of a float. A product
// that meets a sum is a written fma, so that no compiler chooses where one is.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace pyml {

static PYML_HD float fused_once(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
static PYML_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
static PYML_HD float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static PYML_HD uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

}  // namespace pyml
