// Torch side of the noise ops, shared by the CPU and CUDA: arguments, outputs, gradients.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "common/gradients.h"
#include "hetero_noise/hetero_noise_arguments.h"

namespace pyml {

using Columns = std::optional<at::Tensor>;

inline void check_division(const char* op, double divide_by) {
  PYML_CHECK(divide_by > 0 && std::isfinite(divide_by), op, "divide_by", "a finite number above 0", divide_by);
}

// No memory is written twice, and none that is read for another tensor: threads would meet there.
inline void check_apart(const char* op, at::TensorList written, at::TensorList read) {
  std::vector<Span> spans;
  for (size_t n = 0; n < written.size(); ++n)
    if (written[n].numel() > 0) spans.emplace_back(written[n], n);
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t n = 1; n < spans.size(); ++n)
    PYML_CHECK(spans[n - 1].end <= spans[n].begin, op, "tensors",
               "tensors whose memory does not meet, since they are written to",
               c10::str("tensors ", spans[n - 1].tensor, " and ", spans[n].tensor));
  for (size_t n = 0; n < read.size(); ++n) {
    if (read[n].numel() == 0) continue;
    const Span own(read[n], n);
    const auto at = std::upper_bound(spans.begin(), spans.end(), own.begin,
                                     [](uintptr_t begin, const Span& s) { return begin < s.end; });
    if (at == spans.end() || at->begin >= own.end) continue;
    const at::Tensor& other = written[at->tensor];
    const bool same = at->tensor == n && at->begin == own.begin && other.strides() == read[n].strides() &&
                      other.sizes() == read[n].sizes() && other.scalar_type() == read[n].scalar_type();
    PYML_CHECK(same, op, "tensors", "written tensors apart from those that are read",
               c10::str("tensor ", at->tensor, " meets what tensor ", n, " reads"));
  }
}

// The ops where a Call runs the kernels of a backend: made of the arguments, a mode, a factor and the number of
// tensors; add(...) for each tensor; run(); and sums(matrix, weights, dim), over the rows (0) or columns of a matrix,
// in double.
template <class Call>
struct NoiseOp {
  // `tensors` take the noise; with a step size they are gradients, and `written` parameters.
  static void over_list(const NoiseArguments& a, at::TensorList tensors, at::TensorList written, at::TensorList scale,
                        at::TensorList columns, const Places& ids, const Places& offsets, double factor,
                        NoiseMode mode) {
    const ScaleLists scales{a.op, scale, columns, tensors.size()};
    PYML_CHECK(written.size() == tensors.size(), a.op, "grads", c10::str(written.size(), " tensors"), tensors.size());
    const at::Device device = tensors.empty() ? a.key.device() : tensors[0].device();
    a.check(device);
    if (tensors.empty()) return;
    scales.check();
    check_places(a.op, "ids", ids, tensors.size(), int64_t(1) << 32);
    check_places(a.op, "offsets", offsets, tensors.size(), int64_t(1) << 62);
    for (size_t n = 0; n < tensors.size(); ++n) {
      check_float(a.op, "tensors", tensors[n], device);
      check_float(a.op, "params", written[n], device);
      check_shape(a.op, "grads", tensors[n], written[n].sizes());
      check_factors(a.op, tensors[n].sizes(), scales.scale_of(n), scales.columns_of(n), device);
    }
    check_apart(a.op, written, tensors);
    check_apart(a.op, written, scale);
    check_apart(a.op, written, columns);
    Call call(a, mode, factor, tensors.size());
    for (size_t n = 0; n < tensors.size(); ++n)
      call.add(n, tensors[n], written[n], mode == NoiseMode::kStep ? written[n] : at::Tensor(), scales.scale_of(n),
               scales.columns_of(n), uint32_t(ids ? (*ids)[n] : int64_t(n)), offsets ? (*offsets)[n] : 0);
    call.run();
  }

  static void hetero_noise_inplace(at::TensorList tensors, at::TensorList scale, at::TensorList columns, double std,
                                   const at::Tensor& key, int64_t step, Places ids, Places offsets, double divide_by) {
    const NoiseArguments a{"hetero_noise_", std, key, step};
    check_division(a.op, divide_by);
    over_list(a, tensors, tensors, scale, columns, ids, offsets, 1 / divide_by, NoiseMode::kAdd);
  }

  static void hetero_noise_sgd(at::TensorList params, at::TensorList grads, at::TensorList scale,
                               at::TensorList columns, double std, const at::Tensor& key, int64_t step, double lr,
                               Places ids, Places offsets, double divide_by) {
    const NoiseArguments a{"hetero_noise_sgd_", std, key, step};
    check_division(a.op, divide_by);
    PYML_CHECK(std::isfinite(lr), a.op, "lr", "a finite number", lr);
    over_list(a, grads, params, scale, columns, ids, offsets, -lr / divide_by, NoiseMode::kStep);
  }

  static void one(const NoiseArguments& a, NoiseMode mode, const at::Tensor& in, const at::Tensor& out,
                  const at::Tensor& scale, const at::Tensor& columns) {
    Call call(a, mode, 1, 1);
    call.add(0, in, out, at::Tensor(), scale, columns, 0, 0);
    call.run();
  }

  static at::Tensor hetero_noise_fwd(const at::Tensor& x, const at::Tensor& scale, const Columns& columns, double std,
                                     const at::Tensor& key, int64_t step) {
    const NoiseArguments a{"hetero_noise", std, key, step};
    check_float(a.op, "x", x, x.device());
    a.check(x.device());
    check_factors(a.op, x.sizes(), scale, columns.value_or(at::Tensor()), x.device());
    const at::Tensor out = at::empty(x.sizes(), x.options());
    one(a, NoiseMode::kAdd, x, out, scale, columns.value_or(at::Tensor()));
    return out;
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> hetero_noise_bwd(const at::Tensor& grad, const at::Tensor& x,
                                                                         const at::Tensor& scale,
                                                                         const Columns& columns, double std,
                                                                         const at::Tensor& key, int64_t step,
                                                                         std::array<bool, 3> mask) {
    const NoiseArguments a{"hetero_noise", std, key, step};
    const at::Tensor factors = columns.value_or(at::Tensor());
    const bool by_factors = factors.defined() && factors.dim() > 0;
    check_float(a.op, "grad", grad, x.device());
    check_shape(a.op, "grad", grad, x.sizes());
    a.check(x.device());
    check_factors(a.op, x.sizes(), scale, factors, x.device());
    at::Tensor of_x = no_gradient(x), of_scale = no_gradient(scale);
    at::Tensor of_columns = no_gradient(factors.defined() ? factors : grad);
    if (mask[0]) of_x = grad.to(x.scalar_type(), false, true).contiguous();
    if (!mask[1] && !mask[2]) return {of_x, of_scale, of_columns};
    // grad * std * z, which the gradient of every kind of scale sums in its own way.
    const at::Tensor product = at::empty(x.sizes(), x.options().dtype(any_double(x, grad) ? at::kDouble : at::kFloat));
    one(a, NoiseMode::kProduct, grad, product, at::scalar_tensor(1.0, x.options().dtype(at::kDouble)), at::Tensor());
    if (by_factors) {
      const at::Tensor matrix = product.view({scale.numel(), factors.numel()});
      if (mask[1]) of_scale = Call::sums(matrix, factors, 1).to(scale.scalar_type());
      if (mask[2]) of_columns = Call::sums(matrix, scale, 0).to(factors.scalar_type());
    } else if (mask[1]) {
      const bool number = scale.dim() == 0;
      of_scale = number
                     ? Call::sums(product.view({1, product.numel()}), at::ones({product.numel()}, product.options()), 1)
                           .squeeze(0)
                     : product;
      of_scale = of_scale.to(scale.scalar_type());
    }
    return {of_x, of_scale, of_columns};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("hetero_noise_fwd", &hetero_noise_fwd);
    m.impl("hetero_noise_bwd", &hetero_noise_bwd);
    m.impl("hetero_noise__fwd", &hetero_noise_inplace);
    m.impl("hetero_noise_sgd__fwd", &hetero_noise_sgd);
  }
};

}  // namespace pyml
