// pairwise_cost on CUDA: launches. Kernels: ot_points_cuda.cu.
#include <torch/library.h>

#include "batched_ot/ot_host_cuda.h"
#include "batched_ot/ot_points_cuda.h"
#include "batched_ot/pairwise_op.h"
#include "common/cuda_host.h"

namespace pyml {
namespace {

// The scales of the points are made first.
template <class T>
struct CudaCall {
  OnDevice device;
  PairwiseCuda<T> p{};
  std::vector<at::Tensor> kept;
  at::TensorOptions wide;

  CudaCall(const Clouds& c, const at::Tensor& cost)
      : device(c.x), wide(c.x.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    c.tell(p);
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

  void costs() const { check_cuda(Clouds::op, ot_cuda_costs(p, device.stream())); }
  at::Tensor gradient(bool of_y, const at::Tensor& points) {
    (of_y ? p.sum_y : p.sum_x) = made(points.sizes());
    const at::Tensor found = kept.back();
    check_cuda(Clouds::op, ot_cuda_pull(p, of_y, device.stream()));
    return found.to(points.scalar_type());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("pairwise_cost_fwd", &PairwiseOp<CudaCall>::fwd);
  m.impl("pairwise_cost_bwd", &PairwiseOp<CudaCall>::bwd);
}

}  // namespace pyml
