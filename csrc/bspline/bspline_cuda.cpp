// The B-spline ops on CUDA: checks, allocation, launches. Kernels: bspline_*_cuda.cu; the same rules as on the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "bspline/bspline_cuda.h"
#include "bspline/bspline_prepare.h"
#include "common/cpu.h"
#include "common/cuda_parts.h"
#include "common/gradients.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using KanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using WkanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// One op call: its tensors as the kernels want them. x (and so y, grad, dx) keeps its dtype unless another input is
// float64; weights and knots are float32 or float64. Every contiguous copy has a name here and lives until the launch.
struct Call : CudaParts<BsplineCuda> {
  at::ScalarType io, compute;
  at::Tensor grid, x;
  std::vector<at::Tensor> kept;

  Call(const char* op, const at::Tensor& input, const at::Tensor& knots, int64_t order, std::string_view extrapolation,
       bool wide)
      : CudaParts(op, input, wide ? at::kDouble : at::kFloat),
        io(wide ? at::kDouble : input.scalar_type()),
        compute(wide ? at::kDouble : at::kFloat) {
    grid = knots.to(compute).contiguous();
    x = input.to(io).contiguous();
    p.dtype = int64_t(dtype_of(x));
    p.base = int64_t(Base::kNone);
    p.extrapolation = int64_t(extrapolation_of(op, extrapolation));
    p.order = order;
    p.count = knots.size(-1);
    p.grid_row = knots.dim() == 1 || knots.size(0) == 1 ? 0 : p.count;
    p.grid = grid.const_data_ptr();
    p.x = x.const_data_ptr();
  }

  const void* weight(const at::Tensor& t) {
    kept.push_back(t.to(compute).contiguous());
    return kept.back().const_data_ptr();
  }
  void take_base(const Optional& base_weight, std::string_view base, bool transposed) {
    if (!base_weight) return;
    p.base = int64_t(base_of(op, base));
    p.base_weight = weight(transposed ? base_weight->t() : *base_weight);
  }
  void take_grad(const at::Tensor& grad, at::IntArrayRef shape) {
    check_float(op, "grad", grad, x.device());
    check_shape(op, "grad", grad, shape);
    kept.push_back(grad.to(io).contiguous());
    p.grad = kept.back().const_data_ptr();
  }
  at::Tensor make(at::IntArrayRef shape) const { return at::empty(shape, x.options()); }
};

// --- basis ---

at::Tensor basis(const at::Tensor& x, const at::Tensor& grid, int64_t order, int64_t derivative,
                 std::string_view extrapolation, const at::Tensor* grad) {
  constexpr const char* op = "bspline_basis";
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  const int64_t nb = check_knots(op, x, x.size(-1), grid, order);
  PYML_CHECK(derivative >= 0, op, "derivative", "at least 0", derivative);
  extrapolation_of(op, extrapolation);
  auto columns = x.sizes().vec();
  columns.push_back(nb);
  if (grad) check_shape(op, "grad", *grad, columns);
  const at::IntArrayRef shape = grad ? x.sizes() : at::IntArrayRef(columns);
  if (x.numel() == 0 || derivative > order) return at::zeros(shape, x.options());
  Call call(op, x, grid, order, extrapolation, any_double(x, grid));
  const at::Tensor out = call.make(shape);
  call.p.derivative = derivative;
  call.p.features = x.size(-1);
  call.p.rows = x.numel() / x.size(-1);
  (grad ? call.p.dx : call.p.y) = out.mutable_data_ptr();
  if (grad) call.take_grad(*grad, columns);
  grad ? call.run(bspline_cuda_basis_bwd) : call.run(bspline_cuda_basis_fwd);
  return out.to(x.scalar_type());
}

at::Tensor bspline_basis_fwd(const at::Tensor& x, const at::Tensor& grid, int64_t order, int64_t derivative,
                             c10::string_view extrapolation) {
  return basis(x, grid, order, derivative, extrapolation, nullptr);
}

at::Tensor bspline_basis_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid, int64_t order,
                             int64_t derivative, c10::string_view extrapolation, std::array<bool, 1> mask) {
  return mask[0] ? basis(x, grid, order, derivative + 1, extrapolation, &grad) : no_gradient(x);
}

// --- kan_linear ---

Call kan_call(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& base_weight,
              int64_t order, std::string_view base, std::string_view extrapolation) {
  constexpr const char* op = "kan_linear";
  check_kan(op, x, grid, coeff, base_weight, order);
  Call call(op, x, grid, order, extrapolation, any_double(x, grid, coeff, or_undefined(base_weight)));
  base_of(op, base);
  call.p.features = coeff.size(1);
  call.p.outs = coeff.size(0);
  call.p.rows = coeff.size(1) ? x.numel() / coeff.size(1) : 0;
  call.take_base(base_weight, base, true);
  return call;
}

at::Tensor kan_linear_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                          const Optional& base_weight, int64_t order, c10::string_view base,
                          c10::string_view extrapolation) {
  Call call = kan_call(x, grid, coeff, base_weight, order, base, extrapolation);
  auto shape = x.sizes().vec();
  shape.back() = coeff.size(0);
  if (x.numel() == 0 || coeff.size(0) == 0) return at::zeros(shape, x.options());
  const at::Tensor y = call.make(shape);
  call.p.coeff = call.weight(coeff.permute({1, 2, 0}));
  call.p.y = y.mutable_data_ptr();
  call.run(bspline_cuda_kan_fwd);
  return y.to(x.scalar_type());
}

KanGradients kan_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid,
                            const at::Tensor& coeff, const Optional& base_weight, int64_t order, c10::string_view base,
                            c10::string_view extrapolation, std::array<bool, 3> mask) {
  Call call = kan_call(x, grid, coeff, base_weight, order, base, extrapolation);
  auto shape = x.sizes().vec();
  shape.back() = coeff.size(0);
  call.take_grad(grad, shape);
  const at::Tensor& like = base_weight ? *base_weight : coeff;
  mask[2] = mask[2] && base_weight.has_value();
  if (x.numel() == 0 || coeff.size(0) == 0) return zero_gradients(mask, x, coeff, like);
  KanGradients out{no_gradient(x), no_gradient(coeff), no_gradient(like)};
  if (mask[0]) {
    const at::Tensor dx = call.make(x.sizes());
    call.p.coeff = call.weight(coeff.permute({1, 2, 0}));
    call.p.dx = dx.mutable_data_ptr();
    call.run(bspline_cuda_kan_bwd_x);
    std::get<0>(out) = dx.to(x.scalar_type());
  }
  if (mask[1] || mask[2]) {
    call.split(bspline_cuda_kan_split);
    at::Tensor part_coeff, part_base;
    if (mask[1]) call.p.part_coeff = (part_coeff = call.parts(coeff)).mutable_data_ptr();
    if (mask[2]) call.p.part_base = (part_base = call.parts(like)).mutable_data_ptr();
    call.run(bspline_cuda_kan_bwd_coeff);
    if (mask[1]) std::get<1>(out) = call.total(part_coeff, coeff);
    if (mask[2]) std::get<2>(out) = call.total(part_base, like);
  }
  return out;
}

// --- wkan_linear and wkan_conv2d: the same kernels but for the gradient of x ---

void take_wkan(Call& call, const at::Tensor& coeff, const Optional& base_weight, const at::Tensor& scaler,
               std::string_view base) {
  base_of(call.op, base);
  call.p.features = scaler.size(1);
  call.p.outs = scaler.size(0);
  call.p.coeff = call.weight(coeff);
  call.p.scaler = call.weight(scaler);
  call.take_base(base_weight, base, false);
}

Call linear_call(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& base_weight,
                 const at::Tensor& scaler, int64_t order, std::string_view base, std::string_view extrapolation) {
  constexpr const char* op = "wkan_linear";
  PYML_CHECK(x.dim() > 0, op, "x", "[..., in]", "a scalar");
  check_wkan(op, x, x.size(-1), grid, coeff, base_weight, scaler, order);
  Call call(op, x, grid, order, extrapolation, any_double(x, grid, coeff, or_undefined(base_weight), scaler));
  take_wkan(call, coeff, base_weight, scaler, base);
  call.p.rows = x.size(-1) ? x.numel() / x.size(-1) : 0;
  call.p.map.image = x.size(-1);  // an image of one pixel a row
  return call;
}

Call conv_call(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff, const Optional& base_weight,
               const at::Tensor& scaler, const Window& w, int64_t order, std::string_view base,
               std::string_view extrapolation) {
  constexpr const char* op = "wkan_conv2d";
  check_window(op, x, w);
  check_wkan(op, x, x.size(1) * w.kernel[0] * w.kernel[1], grid, coeff, base_weight, scaler, order);
  Call call(op, x, grid, order, extrapolation, any_double(x, grid, coeff, or_undefined(base_weight), scaler));
  take_wkan(call, coeff, base_weight, scaler, base);
  const int64_t height = x.size(2), width = x.size(3);
  call.p.conv = {x.size(0),   x.size(1),   height,      width,       w.out(x, 0),   w.out(x, 1),
                 w.kernel[0], w.kernel[1], w.stride[0], w.stride[1], w.dilation[0], w.dilation[1]};
  auto& map = call.p.map;
  map.width = w.out(x, 1);
  map.pixels = w.out(x, 0) * map.width;
  map.image = x.size(1) * height * width;
  map.step_h = w.stride[0] * width;
  map.step_w = w.stride[1];
  map.taps = w.kernel[0] * w.kernel[1];
  map.kernel_w = w.kernel[1];
  map.plane = height * width;
  map.tap_h = w.dilation[0] * width;
  map.tap_w = w.dilation[1];
  call.p.rows = x.size(0) * map.pixels;
  return call;
}

at::Tensor forward(Call call, at::IntArrayRef shape, const at::Tensor& x) {
  const at::Tensor y = call.make(shape);
  if (y.numel() == 0 || x.numel() == 0) return at::zeros(shape, x.options());
  call.p.y = y.mutable_data_ptr();
  call.run(bspline_cuda_wkan_fwd);
  return y.to(x.scalar_type());
}

WkanGradients backward(Call call, const at::Tensor& x, const at::Tensor& coeff, const Optional& base_weight,
                       const at::Tensor& scaler, std::array<bool, 4> mask, bool convolution) {
  const at::Tensor& like = base_weight ? *base_weight : scaler;
  mask[2] = mask[2] && base_weight.has_value();
  if (x.numel() == 0 || scaler.size(0) == 0) return zero_gradients(mask, x, coeff, like, scaler);
  WkanGradients out{no_gradient(x), no_gradient(coeff), no_gradient(like), no_gradient(scaler)};
  at::Tensor dx, part, part_base, part_scaler;
  if (mask[0]) dx = call.make(x.sizes());
  if (mask[0]) call.p.dx = dx.mutable_data_ptr();
  if (mask[0] && convolution) {
    call.run(bspline_cuda_conv2d_bwd_x);
    call.p.dx = nullptr;
  }
  if (mask[1] || (mask[0] && !convolution)) {
    if (mask[1]) call.p.part_coeff = &call;  // only whether it is wanted counts for the split
    call.split(bspline_cuda_wkan_coeff_split);
    if (mask[1]) call.p.part_coeff = (part = call.parts(coeff)).mutable_data_ptr();
    call.run(bspline_cuda_wkan_bwd_z);
    if (mask[1]) std::get<1>(out) = call.total(part, coeff);
  }
  if (mask[0]) std::get<0>(out) = dx.to(x.scalar_type());
  if (mask[2] || mask[3]) {
    call.split(bspline_cuda_wkan_weight_split);
    if (mask[2]) call.p.part_base = (part_base = call.parts(like)).mutable_data_ptr();
    if (mask[3]) call.p.part_scaler = (part_scaler = call.parts(scaler)).mutable_data_ptr();
    call.run(bspline_cuda_wkan_bwd_weight);
    if (mask[2]) std::get<2>(out) = call.total(part_base, like);
    if (mask[3]) std::get<3>(out) = call.total(part_scaler, scaler);
  }
  return out;
}

std::vector<int64_t> linear_shape(const at::Tensor& x, const at::Tensor& scaler) {
  auto shape = x.sizes().vec();
  shape.back() = scaler.size(0);
  return shape;
}
std::vector<int64_t> conv_shape(const at::Tensor& x, const at::Tensor& scaler, const Window& w) {
  return {x.size(0), scaler.size(0), w.out(x, 0), w.out(x, 1)};
}

at::Tensor wkan_linear_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                           const Optional& base_weight, const at::Tensor& scaler, int64_t order, c10::string_view base,
                           c10::string_view extrapolation) {
  Call call = linear_call(x, grid, coeff, base_weight, scaler, order, base, extrapolation);
  return forward(std::move(call), linear_shape(x, scaler), x);
}

WkanGradients wkan_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid,
                              const at::Tensor& coeff, const Optional& base_weight, const at::Tensor& scaler,
                              int64_t order, c10::string_view base, c10::string_view extrapolation,
                              std::array<bool, 4> mask) {
  Call call = linear_call(x, grid, coeff, base_weight, scaler, order, base, extrapolation);
  call.take_grad(grad, linear_shape(x, scaler));
  return backward(std::move(call), x, coeff, base_weight, scaler, mask, false);
}

at::Tensor wkan_conv2d_fwd(const at::Tensor& x, const at::Tensor& grid, const at::Tensor& coeff,
                           const Optional& base_weight, const at::Tensor& scaler, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef dilation, int64_t order, c10::string_view base,
                           c10::string_view extrapolation) {
  const Window w{kernel, stride, dilation};
  Call call = conv_call(x, grid, coeff, base_weight, scaler, w, order, base, extrapolation);
  return forward(std::move(call), conv_shape(x, scaler, w), x);
}

WkanGradients wkan_conv2d_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grid,
                              const at::Tensor& coeff, const Optional& base_weight, const at::Tensor& scaler,
                              at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef dilation, int64_t order,
                              c10::string_view base, c10::string_view extrapolation, std::array<bool, 4> mask) {
  const Window w{kernel, stride, dilation};
  Call call = conv_call(x, grid, coeff, base_weight, scaler, w, order, base, extrapolation);
  call.take_grad(grad, conv_shape(x, scaler, w));
  return backward(std::move(call), x, coeff, base_weight, scaler, mask, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("bspline_basis_fwd", &bspline_basis_fwd);
  m.impl("bspline_basis_bwd", &bspline_basis_bwd);
  m.impl("kan_linear_fwd", &kan_linear_fwd);
  m.impl("kan_linear_bwd", &kan_linear_bwd);
  m.impl("wkan_linear_fwd", &wkan_linear_fwd);
  m.impl("wkan_linear_bwd", &wkan_linear_bwd);
  m.impl("wkan_conv2d_fwd", &wkan_conv2d_fwd);
  m.impl("wkan_conv2d_bwd", &wkan_conv2d_bwd);
}

}  // namespace pyml
