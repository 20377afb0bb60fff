// sinkhorn_solve and sinkhorn_plan on CUDA: launches. Kernels: ot_*_cuda.cu.
#include <torch/library.h>

#include <algorithm>

#include "batched_ot/batched_ot_cuda.h"
#include "batched_ot/batched_ot_op.h"
#include "batched_ot/ot_host_cuda.h"
#include "common/cuda_host.h"

namespace pyml {
namespace {

template <class T>
struct CudaCall : SinkhornCall<T, SinkhornCuda<T>> {
  using Base = SinkhornCall<T, SinkhornCuda<T>>;
  using Base::p;
  static constexpr bool kImplicitInDouble = true;  // in float, conjugate gradients lose more than the reference does
  const char* op;
  OnDevice device;

  explicit CudaCall(const Arguments& c) : Base(c), op(c.op), device(c.cost) {
    PYML_CHECK(std::max(p.n, p.m) <= kOtMostPoints, op, "cost",
               c10::str("at most ", kOtMostPoints, " rows and columns in a CUDA kernel"), c.cost.sizes());
    p.cost = where_it_lies(c.cost, p.cost_lead, this->kept);
  }
  void take_plan(const at::Tensor& t) { p.plan = where_it_lies(t, p.plan_lead, this->kept); }

  void run(cudaError_t (*launcher)(const SinkhornCuda<T>&, cudaStream_t), OtKernel kernel) {
    p.damping = p.damp(), p.stretch = p.tau();
    check_cuda(op, ot_cuda_layout(p, kernel));
    const at::Tensor workspace = this->made({p.blocks, p.workspace_size}, p.workspace);
    check_cuda(op, launcher(p, device.stream()));
  }
  void solve() { run(ot_cuda_solve, OtKernel::kSolve); }
  void gradient() { run(ot_cuda_gradient, OtKernel::kGradient); }
  void plan() { run(ot_cuda_plan, OtKernel::kPlan); }
  void plan_gradient() { run(ot_cuda_plan_gradient, OtKernel::kPlanGradient); }
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("sinkhorn_solve_fwd", &SinkhornOp<CudaCall>::solve_fwd);
  m.impl("sinkhorn_solve_bwd", &SinkhornOp<CudaCall>::solve_bwd);
  m.impl("sinkhorn_plan_fwd", &SinkhornOp<CudaCall>::plan_fwd);
  m.impl("sinkhorn_plan_bwd", &SinkhornOp<CudaCall>::plan_bwd);
}

}  // namespace pyml
