// wkan_linear and wkan_conv2d on a CPU: checks, allocation, threads. The convolution differs in nothing but where its
// rows lie: row (n, h, w) is a patch, its columns are offsets into the image.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "bspline/bspline.h"
#include "bspline/bspline_prepare.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "common/gradients.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Options {
  const char* op;
  int64_t order;
  Base base;
  Extrapolation extrapolation;
};

// Patches of an image [N, C, H, W]; `columns` receives the offset of every tap and must outlive the rows.
Rows patch_rows(const at::Tensor& image, const Window& w, std::vector<int64_t>& columns) {
  columns.clear();
  for (int64_t c = 0; c < image.size(1); ++c)
    for (int64_t i = 0; i < w.kernel[0]; ++i)
      for (int64_t j = 0; j < w.kernel[1]; ++j)
        columns.push_back(c * image.stride(1) + i * w.dilation[0] * image.stride(2) +
                          j * w.dilation[1] * image.stride(3));
  Rows rows;
  rows.data = const_cast<void*>(image.const_data_ptr());
  rows.dtype = dtype_of(image);
  rows.width = w.out(image, 1);
  rows.height = w.out(image, 0);
  rows.stride_w = w.stride[1] * image.stride(3);
  rows.stride_h = w.stride[0] * image.stride(2);
  rows.stride_n = image.stride(0);
  rows.columns = columns.data();
  return rows;
}

// The pixels of an image [N, O, H, W] as rows of O columns; with any strides.
Rows pixel_rows(const at::Tensor& image) {
  Rows rows;
  rows.data = const_cast<void*>(image.const_data_ptr());
  rows.dtype = dtype_of(image);
  rows.width = image.size(3);
  rows.height = image.size(2);
  rows.stride_w = image.stride(3);
  rows.stride_h = image.stride(2);
  rows.stride_n = image.stride(0);
  rows.stride_c = image.stride(1);
  return rows;
}

template <class T>
struct Call {
  Knots<T> knots;
  at::Tensor coeff, base_weight, scaler, power;
  WkanParams<T> p{};

  Call(const Rows& x, int64_t rows, const at::Tensor& grid, const at::Tensor& c, const Optional& w, const at::Tensor& s,
       const Options& options)
      : knots(options.op, grid, options.order, options.extrapolation),
        coeff(as_compute<T>(c)),
        base_weight(as_compute<T>(or_undefined(w))),
        scaler(as_compute<T>(s)) {
    p.spline = knots.spline();
    p.base = w ? options.base : Base::kNone;
    p.x = x;
    p.rows = rows;
    p.features = s.size(1);
    p.outputs = s.size(0);
    p.block = kWkanBlock;
    p.coeff = coeff.template const_data_ptr<T>();
    p.base_weight = data_of<T>(base_weight);
    p.scaler = scaler.template const_data_ptr<T>();
    power = buffer<T>(p.features * (options.order + 1) * p.power_ld(), scaler);
    p.power = power.template mutable_data_ptr<T>();
    parallel(p.features, p.spline.knots * 32,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(wkan_power_kernel, p, begin, end); });
  }

  int64_t row_work() const { return p.features * (p.outputs + 8) / 4; }
  T* work() const { return scratch<T>(PYML_CALL_ISA(wkan_scratch, p)); }

  void forward(const Rows& y) {
    p.y = y;
    parallel(p.rows, row_work(),
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(wkan_fwd_kernel, p, begin, end, work()); });
  }

  // `unit`: rows that must stay together.
  void backward(bool want_x, bool want_weights, int64_t unit) {
    p.want_x = want_x;
    p.want_weights = want_weights;
    const int64_t size = sizeof(T);
    const int64_t splits =
        row_splits(p.rows, (p.features + p.outputs) * size, p.blocks(), p.features * p.partial_ld() * size);
    p.rows_per_split = ((p.rows + splits - 1) / splits + unit - 1) / unit * unit;
    const at::Tensor partial = buffer<T>(want_weights ? p.splits() * p.features * p.partial_ld() : 0, scaler);
    p.partial = partial.template mutable_data_ptr<T>();
    parallel(p.splits() * p.blocks(), row_work() * 3 / p.blocks() * p.rows_per_split,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(wkan_bwd_kernel, p, begin, end, work()); });
    if (want_weights) reduce();
  }

  at::Tensor dcoeff, dbase, dscaler;  // in the dtype of computation, after backward

 private:
  void reduce() {
    dcoeff = at::zeros(coeff.sizes(), coeff.options());
    dscaler = at::empty(scaler.sizes(), scaler.options());
    if (base_weight.defined()) dbase = at::empty(scaler.sizes(), scaler.options());
    T *c = dcoeff.template mutable_data_ptr<T>(), *s = dscaler.template mutable_data_ptr<T>();
    T* b = dbase.defined() ? dbase.template mutable_data_ptr<T>() : nullptr;
    const int64_t ld = p.partial_ld(), padded = p.padded_outputs(), nb = p.spline.functions(), K = p.spline.order;
    parallel(p.features, ld * p.splits() / 4, [&](int64_t begin, int64_t end) {
      std::vector<T> total(ld);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(total.begin(), total.end(), T(0));
        for (int64_t split = 0; split < p.splits(); ++split) {
          const T* from = p.partial + (split * p.features + i) * ld;
          for (int64_t k = 0; k < ld; ++k) total[k] += from[k];
        }
        for (int64_t o = 0; o < p.outputs; ++o) {
          s[o * p.features + i] = total[o];
          if (b) b[o * p.features + i] = total[padded + o];
        }
        const T* moments = total.data() + 2 * padded;
        for (int64_t j = 0; j < p.spline.knots - 1; ++j)
          for (int64_t m = 0; m <= K; ++m)
            if (j + m >= K && j + m < K + nb) c[i * nb + j + m - K] += moments[j * (K + 1) + m];
        T* own = c + i * nb;  // NaN reaches all of them, as in kan_linear
        if (std::any_of(own, own + nb, [](T v) { return v != v; }))
          std::fill(own, own + nb, std::numeric_limits<T>::quiet_NaN());
      }
    });
  }
};

template <class T>
Gradients gradients(const Call<T>& call, const at::Tensor& dx, const at::Tensor& x, const at::Tensor& coeff,
                    const Optional& base_weight, const at::Tensor& scaler, const std::array<bool, 4>& mask) {
  return {gradient_or_empty(mask[0], dx, x), gradient_or_empty(mask[1], call.dcoeff, coeff),
          gradient_or_empty(mask[2], call.dbase, base_weight ? *base_weight : scaler),
          gradient_or_empty(mask[3], call.dscaler, scaler)};
}

bool wide(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& w,
          const at::Tensor& s) {
  return any_double(x, grid, coeff, or_undefined(w), s);
}

// --- wkan_linear ---

Options linear_options(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                       const Optional& base_weight, const at::Tensor& scaler, int64_t order, c10::string_view base,
                       c10::string_view extrapolation) {
  constexpr const char* op = "wkan_linear";
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  check_wkan(op, x, x.size(-1), grid, coeff, base_weight, scaler, order);
  return {op, order, base_of(op, base), extrapolation_of(op, extrapolation)};
}

template <class T>
at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, const at::Tensor& scaler, const Options& options) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  Call<T> call(matrix_rows(rows), rows.size(0), grid, coeff, base_weight, scaler, options);
  auto shape = x.sizes().vec();
  shape.back() = scaler.size(0);
  const at::Tensor y = at::empty(shape, x.options());
  call.forward(matrix_rows(y.view({rows.size(0), scaler.size(0)})));
  return y;
}

template <class T>
Gradients linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, const at::Tensor& scaler, const Options& options,
                          const std::array<bool, 4>& mask) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)}), g = grad.reshape({rows.size(0), scaler.size(0)});
  Call<T> call(matrix_rows(rows), rows.size(0), grid, coeff, base_weight, scaler, options);
  const at::Tensor dx = at::empty(mask[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  if (mask[0]) call.p.dx = matrix_rows(dx.view(rows.sizes()));
  call.p.y = matrix_rows(g);
  call.backward(mask[0], mask[1] || mask[2] || mask[3], 1);
  return gradients(call, dx, x, coeff, base_weight, scaler, mask);
}

at::Tensor wkan_linear_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                           const Optional& base_weight, const at::Tensor& scaler, int64_t order, c10::string_view base,
                           c10::string_view extrapolation) {
  const auto options = linear_options(x, grid, coeff, base_weight, scaler, order, base, extrapolation);
  auto shape = x.sizes().vec();
  shape.back() = scaler.size(0);
  if (x.numel() == 0 || scaler.size(0) == 0) return at::zeros(shape, x.options());
  return in_compute_type(wide(x, grid, coeff, base_weight, scaler), [&](auto zero) {
    return linear_forward<decltype(zero)>(x, grid, coeff, base_weight, scaler, options);
  });
}

Gradients wkan_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, const at::Tensor& scaler, int64_t order, c10::string_view base,
                          c10::string_view extrapolation, std::array<bool, 4> mask) {
  const auto options = linear_options(x, grid, coeff, base_weight, scaler, order, base, extrapolation);
  auto shape = x.sizes().vec();
  shape.back() = scaler.size(0);
  check_float(options.op, "grad", grad, x.device());
  check_shape(options.op, "grad", grad, shape);
  mask[2] = mask[2] && base_weight.has_value();
  if (x.numel() == 0 || scaler.size(0) == 0)
    return zero_gradients(mask, x, coeff, base_weight ? *base_weight : scaler, scaler);
  return in_compute_type(wide(x, grid, coeff, base_weight, scaler), [&](auto zero) {
    return linear_backward<decltype(zero)>(grad, x, grid, coeff, base_weight, scaler, options, mask);
  });
}

// --- wkan_conv2d ---

Options conv_options(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& base_weight,
                     const at::Tensor& scaler, const Window& w, int64_t order, c10::string_view base,
                     c10::string_view extrapolation) {
  constexpr const char* op = "wkan_conv2d";
  check_window(op, x, w);
  check_wkan(op, x, x.size(1) * w.kernel[0] * w.kernel[1], grid, coeff, base_weight, scaler, order);
  return {op, order, base_of(op, base), extrapolation_of(op, extrapolation)};
}

template <class T>
at::Tensor conv_forward(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                        const Optional& base_weight, const at::Tensor& scaler, const Window& w, const Options& options,
                        const at::Tensor& y) {
  std::vector<int64_t> columns;
  Call<T> call(patch_rows(x, w, columns), y.numel() / y.size(1), grid, coeff, base_weight, scaler, options);
  call.forward(pixel_rows(y));
  return y;
}

template <class T>
Gradients conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                        const Optional& base_weight, const at::Tensor& scaler, const Window& w, const Options& options,
                        const std::array<bool, 4>& mask) {
  std::vector<int64_t> columns, dx_columns;
  const int64_t taps = w.kernel[0] * w.kernel[1], pixels = grad.size(2) * grad.size(3);
  Call<T> call(patch_rows(x, w, columns), grad.size(0) * pixels, grid, coeff, base_weight, scaler, options);
  at::Tensor dx = at::empty({0}, scaler.options());
  if (mask[0]) {
    dx = at::zeros(x.sizes(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
    call.p.dx = patch_rows(dx, w, dx_columns);
    call.p.add_dx = true;
  }
  // Patches overlap within a channel of an image: a task owns whole channels of whole images, so no two add to one
  // pixel.
  call.p.block = std::max<int64_t>(1, kWkanBlock / taps) * taps;
  call.p.y = pixel_rows(grad);
  call.backward(mask[0], mask[1] || mask[2] || mask[3], mask[0] ? pixels : 1);
  return gradients(call, dx, x, coeff, base_weight, scaler, mask);
}

at::Tensor wkan_conv2d_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                           const Optional& base_weight, const at::Tensor& scaler, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef dilation, int64_t order, c10::string_view base,
                           c10::string_view extrapolation) {
  const Window w{kernel, stride, dilation};
  const auto options = conv_options(x, grid, coeff, base_weight, scaler, w, order, base, extrapolation);
  const at::Tensor y = at::empty({x.size(0), scaler.size(0), w.out(x, 0), w.out(x, 1)}, x.options());
  if (y.numel() == 0) return y;
  if (x.numel() == 0) return at::zeros(y.sizes(), y.options());
  return in_compute_type(wide(x, grid, coeff, base_weight, scaler), [&](auto zero) {
    return conv_forward<decltype(zero)>(x, grid, coeff, base_weight, scaler, w, options, y);
  });
}

Gradients wkan_conv2d_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, const at::Tensor& scaler, at::IntArrayRef kernel,
                          at::IntArrayRef stride, at::IntArrayRef dilation, int64_t order, c10::string_view base,
                          c10::string_view extrapolation, std::array<bool, 4> mask) {
  const Window w{kernel, stride, dilation};
  const auto options = conv_options(x, grid, coeff, base_weight, scaler, w, order, base, extrapolation);
  check_float(options.op, "grad", grad, x.device());
  check_shape(options.op, "grad", grad, {x.size(0), scaler.size(0), w.out(x, 0), w.out(x, 1)});
  mask[2] = mask[2] && base_weight.has_value();
  if (grad.numel() == 0 || x.numel() == 0)
    return zero_gradients(mask, x, coeff, base_weight ? *base_weight : scaler, scaler);
  return in_compute_type(wide(x, grid, coeff, base_weight, scaler), [&](auto zero) {
    return conv_backward<decltype(zero)>(grad, x, grid, coeff, base_weight, scaler, w, options, mask);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("wkan_linear_fwd", &wkan_linear_fwd);
  m.impl("wkan_linear_bwd", &wkan_linear_bwd);
  m.impl("wkan_conv2d_fwd", &wkan_conv2d_fwd);
  m.impl("wkan_conv2d_bwd", &wkan_conv2d_bwd);
}

}  // namespace pyml
