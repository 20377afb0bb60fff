// Costs between clouds of points on CUDA: allocation and launches. Kernels: ot_points_cuda.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "batched_ot/clouds.h"
#include "batched_ot/ot_host_cuda.h"
#include "batched_ot/ot_points_cuda.h"
#include "common/cuda_host.h"
#include "common/gradients.h"

namespace pyml {
namespace {

// Parameters of a call and the tensors behind them; the scales of the points are made.
template <class T>
struct CudaCall {
  OnDevice device;
  PairwiseCuda<T> p{};
  std::vector<at::Tensor> kept;
  at::TensorOptions wide;

  CudaCall(const Clouds& c, const at::Tensor& cost)
      : device(c.x), wide(c.x.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    p.n = c.x.size(-2), p.m = c.y.size(-2), p.d = c.x.size(-1);
    p.batch = cost.numel() / (p.n * p.m);
    p.cosine = c.cosine;
    p.x = where_it_lies(c.x, p.x_lead, kept);
    p.y = where_it_lies(c.y, p.y_lead, kept);
    p.cost = where_it_lies(cost, p.cost_lead, kept);
    p.scale_x = made({p.batch, p.n});
    p.scale_y = made({p.batch, p.m});
    check_cuda(Clouds::op, ot_cuda_points(p, device.stream()));
  }
  T* made(at::IntArrayRef shape) {
    kept.push_back(at::empty(shape, wide));
    return kept.back().template mutable_data_ptr<T>();
  }
  // The gradient of one cloud, in its dtype.
  at::Tensor pull(bool of_y, const at::Tensor& points, T*& sum) {
    sum = made(points.sizes());
    const at::Tensor found = kept.back();
    check_cuda(Clouds::op, ot_cuda_pull(p, of_y, device.stream()));
    return found.to(points.scalar_type());
  }
};

at::Tensor pairwise_cost_fwd(const at::Tensor& x, const at::Tensor& y, c10::string_view kind) {
  const Clouds c(x, y, kind);
  return in_compute_type(any_double(x, y), [&](auto tag) {
    using T = decltype(tag);
    const at::Tensor cost = at::empty(c.shape(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
    if (cost.numel() == 0) return cost;
    const CudaCall<T> call(c, cost);
    check_cuda(Clouds::op, ot_cuda_costs(call.p, call.device.stream()));
    return cost;
  });
}

std::tuple<at::Tensor, at::Tensor> pairwise_cost_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                                                     c10::string_view kind, std::array<bool, 2> mask) {
  const Clouds c(x, y, kind);
  check_float(Clouds::op, "grad", grad, x.device());
  check_shape(Clouds::op, "grad", grad, c.shape());
  if (grad.numel() == 0 || x.size(-1) == 0) return zero_gradients(mask, x, y);
  return in_compute_type(any_double(x, y), [&](auto tag) {
    CudaCall<decltype(tag)> call(c, grad);
    return std::tuple{mask[0] ? call.pull(false, x, call.p.sum_x) : no_gradient(x),
                      mask[1] ? call.pull(true, y, call.p.sum_y) : no_gradient(y)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("pairwise_cost_fwd", &pairwise_cost_fwd);
  m.impl("pairwise_cost_bwd", &pairwise_cost_bwd);
}

}  // namespace pyml
