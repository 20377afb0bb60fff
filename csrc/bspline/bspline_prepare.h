// Shared by the torch side of the B-spline ops: argument checks and knots made ready for the kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "bspline/bspline.h"
#include "bspline/knots.h"
#include "common/check.h"

namespace pyml {

inline Extrapolation extrapolation_of(const char* op, std::string_view name) {
  if (name == "clamp") return Extrapolation::kClamp;
  if (name == "linear") return Extrapolation::kLinear;
  PYML_CHECK(name == "zero", op, "extrapolation", "zero, clamp or linear", name);
  return Extrapolation::kZero;
}

inline Base base_of(const char* op, std::string_view name) {
  if (name == "relu") return Base::kRelu;
  if (name == "tanh") return Base::kTanh;
  if (name == "identity") return Base::kIdentity;
  PYML_CHECK(name == "silu", op, "base", "silu, relu, tanh or identity", name);
  return Base::kSilu;
}

// Number of basis functions, after checking the knots.
inline int64_t check_knots(const char* op, const at::Tensor& x, int64_t features, const at::Tensor& grid,
                           int64_t order) {
  check_float(op, "x", x, x.device());
  check_float(op, "grid", grid, x.device());
  PYML_CHECK(order >= 1 && order <= 5, op, "order", "1 to 5", order);
  PYML_CHECK(grid.dim() == 1 || (grid.dim() == 2 && (grid.size(0) == 1 || grid.size(0) == features)), op, "grid",
             c10::str("shape [in = ", features, ", G + 2k + 1] or one row"), grid.sizes());
  PYML_CHECK(grid.size(-1) >= 2 * order + 2, op, "grid", c10::str("at least ", 2 * order + 2, " knots"), grid.size(-1));
  PYML_CHECK(grid.size(-1) < (1 << 24), op, "grid", "fewer than 2^24 knots", grid.size(-1));
  return grid.size(-1) - order - 1;
}

// Checks of wkan_linear and wkan_conv2d; returns the number of outputs.
inline int64_t check_wkan(const char* op, const at::Tensor& x, int64_t features, const at::Tensor& grid,
                          const at::Tensor& coeff, const std::optional<at::Tensor>& base_weight,
                          const at::Tensor& scaler, int64_t order) {
  const int64_t nb = check_knots(op, x, features, grid, order);
  check_float(op, "coeff", coeff, x.device());
  check_float(op, "scaler", scaler, x.device());
  check_shape(op, "coeff", coeff, {features, nb});
  PYML_CHECK(scaler.dim() == 2 && scaler.size(1) == features, op, "scaler", c10::str("shape [out, ", features, "]"),
             scaler.sizes());
  if (base_weight) {
    check_float(op, "base_weight", *base_weight, x.device());
    check_shape(op, "base_weight", *base_weight, scaler.sizes());
  }
  return scaler.size(0);
}

// Checks of kan_linear.
inline void check_kan(const char* op, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                      const std::optional<at::Tensor>& base_weight, int64_t order) {
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  const int64_t nb = check_knots(op, x, x.size(-1), grid, order);
  check_float(op, "coeff", coeff, x.device());
  PYML_CHECK(coeff.dim() == 3 && coeff.size(1) == x.size(-1) && coeff.size(2) == nb, op, "coeff",
             c10::str("shape [out, ", x.size(-1), ", ", nb, "]"), coeff.sizes());
  if (!base_weight) return;
  check_float(op, "base_weight", *base_weight, x.device());
  check_shape(op, "base_weight", *base_weight, {coeff.size(0), coeff.size(1)});
}

// The window of a convolution, and what it makes of an image [N, C, H, W].
struct Window {
  at::IntArrayRef kernel, stride, dilation;
  int64_t out(const at::Tensor& image, int axis) const {
    return (image.size(2 + axis) - (kernel[axis] - 1) * dilation[axis] - 1) / stride[axis] + 1;
  }
};

inline void check_window(const char* op, const at::Tensor& x, const Window& w) {
  PYML_CHECK(x.dim() == 4, op, "x", "[N, C, H, W]", x.sizes());
  for (const auto& [name, pair] : {std::pair{"kernel_size", w.kernel}, {"stride", w.stride}, {"dilation", w.dilation}})
    PYML_CHECK(pair.size() == 2 && pair[0] > 0 && pair[1] > 0, op, name, "two positive integers", pair);
  for (int axis = 0; axis < 2; ++axis) {  // by division: kernel and dilation may be so large that their product wraps
    const int64_t size = x.size(2 + axis), kernel = w.kernel[axis], dilation = w.dilation[axis];
    PYML_CHECK(kernel <= size && (kernel == 1 || dilation <= (size - 1) / (kernel - 1)), op, "x",
               c10::str("room along axis ", 2 + axis, " for ", kernel, " taps ", dilation, " apart"), size);
  }
}

inline at::Tensor or_undefined(const std::optional<at::Tensor>& t) { return t ? *t : at::Tensor(); }

// The knots of every feature as the kernels want them, and the memory they point into.
template <class T>
class Knots {
 public:
  Knots(const char* op, const at::Tensor& grid, int64_t order, Extrapolation extrapolation) {
    const at::Tensor knots = grid.to(c10::CppTypeToScalarType<T>::value).contiguous();
    const int64_t n = knots.size(-1), count = knots.numel() / n, ld = knot_table_size(n, order);
    table_.assign(count * ld, T(0));
    rows_.resize(count);
    spline_ = {rows_.data(), count > 1 ? 1 : 0, int32_t(n), int32_t(order), true, extrapolation};
    for (int64_t r = 0; r < count; ++r) {
      const T* t = knots.template const_data_ptr<T>() + r * n;
      PYML_CHECK(ascending_knots(t, n), op, "grid",
                 "finite knots in ascending order, none beyond a quarter of the largest number",
                 c10::ArrayRef<T>(t, n));
      spline_.uniform = spline_.uniform && uniform_knots(t, n);
      prepare_knots(t, n, order, extrapolation, table_.data() + r * ld, rows_[r]);
    }
  }
  Knots(const Knots&) = delete;
  const Spline<T>& spline() const { return spline_; }

 private:
  std::vector<T> table_;
  std::vector<KnotRow<T>> rows_;
  Spline<T> spline_;
};

// A tensor in the dtype of computation, contiguous; undefined stays undefined.
template <class T>
at::Tensor as_compute(const at::Tensor& t) {
  return t.defined() ? t.to(c10::CppTypeToScalarType<T>::value).contiguous() : t;
}
template <class T>
const T* data_of(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

}  // namespace pyml
