// Elements of a tensor wherever they lie, as kernels see them. Plain data, no torch.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace pyml {

constexpr int kStridedDims = 8;

// The elements of a tensor in row-major order, wherever they lie: strides belong to the sizes of the struct around it.
struct Strided {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t strides[kStridedDims] = {};
};

struct Elements {
  int64_t count = 0;
  int dims = 0;
  int64_t sizes[kStridedDims] = {};
};

// A tensor without gaps: elements lie one after the other.
struct Flat {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

}  // namespace pyml
