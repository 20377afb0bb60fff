// bspline_basis on a CPU: checks, allocation, threads. kan_linear and wkan_* are in the files beside this one.
#include "bspline/bspline.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "bspline/bspline_prepare.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "common/gradients.h"

namespace pyml {
namespace {

template <class T>
at::Tensor run(const at::Tensor& x, const at::Tensor& grid, int64_t order, int64_t derivative,
               Extrapolation extrapolation, const at::Tensor& grad) {
  const Knots<T> knots("bspline_basis", grid, order, extrapolation);
  const int64_t nb = knots.spline().functions(), features = x.size(-1);
  const at::Tensor rows = x.reshape({-1, features}), g = as_compute<T>(grad);
  auto shape = x.sizes().vec();
  if (!grad.defined()) shape.push_back(nb);
  at::Tensor out = at::empty(shape, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  BsplineBasisParams<T> p{knots.spline(), int32_t(derivative), matrix_rows(rows),
                          features,       data_of<T>(g),       out.mutable_data_ptr<T>()};
  parallel(rows.size(0), features * nb,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(bspline_basis_kernel, p, begin, end); });
  return out.to(x.scalar_type());
}

at::Tensor basis(const char* op, const at::Tensor& x, const at::Tensor& grid, int64_t order, int64_t derivative,
                 std::string_view extrapolation, const at::Tensor& grad) {
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  const int64_t nb = check_knots(op, x, x.size(-1), grid, order);
  PYML_CHECK(derivative >= 0 && derivative <= 64, op, "derivative", "0 to 64", derivative);
  const auto mode = extrapolation_of(op, extrapolation);
  auto shape = x.sizes().vec();
  if (!grad.defined()) shape.push_back(nb);
  if (x.numel() == 0 || derivative > order) return at::zeros(shape, x.options());
  return in_compute_type(any_double(x, grid),
                         [&](auto zero) { return run<decltype(zero)>(x, grid, order, derivative, mode, grad); });
}

at::Tensor bspline_basis_fwd(const at::Tensor& x, const at::Tensor& grid, int64_t order, int64_t derivative,
                             c10::string_view extrapolation) {
  return basis("bspline_basis", x, grid, order, derivative, extrapolation, {});
}

at::Tensor bspline_basis_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, int64_t order,
                             int64_t derivative, c10::string_view extrapolation, std::array<bool, 1> mask) {
  constexpr const char* op = "bspline_basis";
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  auto shape = x.sizes().vec();
  shape.push_back(check_knots(op, x, x.size(-1), grid, order));
  check_float(op, "grad", grad, x.device());
  check_shape(op, "grad", grad, shape);
  PYML_CHECK(derivative >= 0 && derivative < 64, op, "derivative", "0 to 63", derivative);
  if (!mask[0]) return no_gradient(x);
  return basis(op, x, grid, order, derivative + 1, extrapolation, grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("bspline_basis_fwd", &bspline_basis_fwd);
  m.impl("bspline_basis_bwd", &bspline_basis_bwd);
}

}  // namespace pyml
