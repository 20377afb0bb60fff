// kan_linear on a CPU: checks, allocation, threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "bspline/bspline.h"
#include "bspline/bspline_prepare.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "common/gradients.h"

namespace pyml {
namespace {

constexpr const char* kOp = "kan_linear";
using Optional = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Everything that forward and backward share: tensors in the dtype of computation, and the packed coefficients.
template <class T>
struct Call {
  Knots<T> knots;
  at::Tensor x, coeff, base_weight, packed;
  KanLinearParams<T> p{};

  Call(const at::Tensor& input, const at::Tensor& grid, const at::Tensor& c, const Optional& w, int64_t order,
       Base base, Extrapolation extrapolation)
      : knots(kOp, grid, order, extrapolation),
        x(input.reshape({-1, input.size(-1)})),
        coeff(as_compute<T>(c)),
        base_weight(as_compute<T>(or_undefined(w))) {
    p.spline = knots.spline();
    p.base = w ? base : Base::kNone;
    p.x = matrix_rows(x);
    p.features = x.size(1);
    p.outputs = c.size(0);
    p.rows = x.size(0);
    p.coeff = coeff.template const_data_ptr<T>();
    p.base_weight = data_of<T>(base_weight);
    const int64_t unit = 64 / int64_t(sizeof(T));
    p.tile = p.outputs <= unit ? unit : p.outputs <= 2 * unit ? 2 * unit : 4 * unit;
  }

  void pack() {
    packed = buffer<T>(p.packed_size(), x);
    p.packed = packed.template mutable_data_ptr<T>();
    parallel(p.features, (p.spline.padded() + 1) * p.outputs / 4,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(kan_linear_pack_kernel, p, begin, end); });
  }

  int64_t row_work() const { return p.features * (p.spline.order + 2) * p.tiles() * 4; }
};

template <class T>
at::Tensor forward(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& base_weight,
                   int64_t order, Base base, Extrapolation extrapolation) {
  Call<T> call(x, grid, coeff, base_weight, order, base, extrapolation);
  call.pack();
  at::Tensor y = at::empty({call.p.rows, call.p.outputs}, x.options());
  call.p.y = matrix_rows(y);
  parallel(call.p.rows, call.row_work(), [&](int64_t begin, int64_t end) {
    PYML_CALL_ISA(kan_linear_fwd_kernel, call.p, begin, end, scratch<T>(PYML_CALL_ISA(kan_linear_scratch, call.p)));
  });
  auto shape = x.sizes().vec();
  shape.back() = call.p.outputs;
  return y.view(shape);
}

template <class T>
Gradients backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                   const Optional& base_weight, int64_t order, Base base, Extrapolation extrapolation,
                   std::array<bool, 3> mask) {
  Call<T> call(x, grid, coeff, base_weight, order, base, extrapolation);
  auto& p = call.p;
  const at::Tensor g = grad.reshape({p.rows, p.outputs});
  p.y = matrix_rows(g);
  p.want_x = mask[0];
  p.want_weights = mask[1] || mask[2];
  at::Tensor dx, dcoeff, dbase, rows, partial;
  if (p.want_x) {
    call.pack();
    dx = at::empty(x.sizes(), x.options());
    rows = dx.view({p.rows, p.features});
    p.dx = matrix_rows(rows);
  }
  const bool few_knots = p.spline.knots <= 64;  // else a block should have many rows
  p.rows_per_split = few_knots ? 128 : 1024;    // the gradient of x alone: any is right
  if (p.want_weights) {                         // every split costs memory
    const int64_t size = sizeof(T), bytes = p.packed_size() * size, row_bytes = (p.features + p.outputs) * size;
    int64_t splits = row_splits(p.rows, row_bytes, p.blocks(), bytes);
    // 512 rows of one block of features would be one task, however many outputs: four parts of 128 rows instead.
    if (p.blocks() == 1 && few_knots)
      splits = std::max(splits, row_splits(4 * std::min<int64_t>(p.rows, 512), row_bytes, 1, bytes));
    p.rows_per_split = (p.rows + splits - 1) / splits;
    partial = buffer<T>(p.splits() * p.packed_size(), x);
    p.partial = partial.template mutable_data_ptr<T>();
  }
  parallel(p.splits() * p.blocks(), 2 * call.row_work() / p.blocks() * p.rows_per_split,
           [&](int64_t begin, int64_t end) {
             PYML_CALL_ISA(kan_linear_bwd_kernel, p, begin, end, scratch<T>(PYML_CALL_ISA(kan_linear_scratch, p)));
           });
  if (p.want_weights) {
    dcoeff = at::empty(coeff.sizes(), call.coeff.options());
    if (mask[2]) dbase = at::empty(base_weight->sizes(), call.coeff.options());
    p.dcoeff = dcoeff.template mutable_data_ptr<T>();
    p.dbase = mask[2] ? dbase.template mutable_data_ptr<T>() : nullptr;
    parallel(p.features, (p.spline.functions() + 1) * p.outputs * p.splits() / 4,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(kan_linear_reduce_kernel, p, begin, end); });
  }
  return {gradient_or_empty(mask[0], dx, x), gradient_or_empty(mask[1], dcoeff, coeff),
          gradient_or_empty(mask[2], dbase, base_weight ? *base_weight : coeff)};
}

at::Tensor kan_linear_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, int64_t order, c10::string_view base,
                          c10::string_view extrapolation) {
  check_kan(kOp, x, grid, coeff, base_weight, order);
  const auto b = base_of(kOp, base);
  const auto e = extrapolation_of(kOp, extrapolation);
  if (x.numel() == 0 || coeff.size(0) == 0) {
    auto shape = x.sizes().vec();
    shape.back() = coeff.size(0);
    return at::zeros(shape, x.options());
  }
  return in_compute_type(any_double(x, grid, coeff, or_undefined(base_weight)),
                         [&](auto zero) { return forward<decltype(zero)>(x, grid, coeff, base_weight, order, b, e); });
}

Gradients kan_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                         const Optional& base_weight, int64_t order, c10::string_view base,
                         c10::string_view extrapolation, std::array<bool, 3> mask) {
  check_kan(kOp, x, grid, coeff, base_weight, order);
  const auto b = base_of(kOp, base);
  const auto e = extrapolation_of(kOp, extrapolation);
  auto shape = x.sizes().vec();
  shape.back() = coeff.size(0);
  check_float(kOp, "grad", grad, x.device());
  check_shape(kOp, "grad", grad, shape);
  mask[2] = mask[2] && base_weight.has_value();
  if (x.numel() == 0 || coeff.size(0) == 0) return zero_gradients(mask, x, coeff, base_weight ? *base_weight : coeff);
  return in_compute_type(any_double(x, grid, coeff, or_undefined(base_weight)), [&](auto zero) {
    return backward<decltype(zero)>(grad, x, grid, coeff, base_weight, order, b, e, mask);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("kan_linear_fwd", &kan_linear_fwd);
  m.impl("kan_linear_bwd", &kan_linear_bwd);
}

}  // namespace pyml
