// A set of rows somewhere in memory, as kernels see it: a plain matrix with any strides, or every patch of an image.
// Plain data, no torch.
#pragma once
#include <cstdint>

namespace pyml {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// Element (r, c) lies at offset of row r + offset of column c, counted in elements. Row r = (n * height + h) * width +
// w starts at n * stride_n + h * stride_h + w * stride_w; a matrix has width = its rows and height = 1. Column c starts
// at columns[c] when given, else at c * stride_c.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t width = 1, height = 1;
  int64_t stride_w = 0, stride_h = 0, stride_n = 0;
  int64_t stride_c = 1;
  const int64_t* columns = nullptr;

  int64_t column(int64_t c) const { return columns ? columns[c] : c * stride_c; }
  int64_t row(int64_t r) const {
    const int64_t w = r % width, h = r / width;
    return (h / height) * stride_n + (h % height) * stride_h + w * stride_w;
  }
};

}  // namespace pyml
