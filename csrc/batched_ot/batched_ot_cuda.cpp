// Batched optimal transport on CUDA: allocation and launches. Kernels: ot_*_cuda.cu; checks: those of the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "batched_ot/batched_ot_arguments.h"
#include "batched_ot/batched_ot_cuda.h"
#include "batched_ot/ot_host_cuda.h"
#include "common/cuda_host.h"
#include "common/gradients.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using Solved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char *kSolve = "sinkhorn_solve", *kPlan = "sinkhorn_plan";

// Parameters of a call and the tensors behind them: small arguments as contiguous rows of T.
template <class T>
struct CudaCall {
  const char* op;
  OnDevice device;
  SinkhornCuda<T> p{};
  std::vector<at::Tensor> kept;
  at::TensorOptions wide;

  explicit CudaCall(const Arguments& c)
      : op(c.op), device(c.cost), wide(c.cost.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    p.n = c.n();
    p.m = c.m();
    PYML_CHECK(std::max(p.n, p.m) <= kOtMostPoints, op, "cost",
               c10::str("at most ", kOtMostPoints, " rows and columns in a CUDA kernel"), c.cost.sizes());
    p.batch = 1;
    for (const int64_t size : c.lead()) p.batch *= size;
    p.a = rows(c.a);
    p.b = rows(c.b);
    p.eps = T(c.eps);
    p.mass_tolerance = T(c.mass_tolerance());
    p.cost = strided(c.cost, p.cost_lead);
  }
  const T* rows(const Optional& t) { return t ? rows(*t) : nullptr; }
  const T* rows(const at::Tensor& t) {
    kept.push_back(t.to(wide.dtype()).contiguous());
    return kept.back().template const_data_ptr<T>();
  }
  Costs strided(const at::Tensor& t, Lead& lead) { return where_it_lies(t, lead, kept); }
  Costs result(const at::Tensor& t) const { return {t.mutable_data_ptr(), dtype_of(t), nullptr, p.m, 1}; }
  at::Tensor made(at::IntArrayRef shape, T*& pointer) const {
    const at::Tensor t = at::empty(shape, wide);
    pointer = t.template mutable_data_ptr<T>();
    return t;
  }
  at::Tensor made_if(bool wanted, const at::Tensor& like, T*& pointer) const {
    return wanted ? made(like.sizes(), pointer) : no_gradient(like);
  }
  void run(cudaError_t (*launcher)(const SinkhornCuda<T>&, cudaStream_t), OtKernel kernel) {
    p.damping = p.damp(), p.stretch = p.tau();
    check_cuda(op, ot_cuda_layout(p, kernel));
    const at::Tensor workspace = at::empty({p.blocks, p.workspace_size}, wide);
    p.workspace = workspace.template mutable_data_ptr<T>();
    check_cuda(op, launcher(p, device.stream()));
  }
};

template <class T>
Solved solve(const Arguments& c, const Optional& init, const SolveOptions& options) {
  CudaCall<T> call(c);
  auto& p = call.p;
  options.give(p);
  p.init = call.rows(init);
  const auto lead = c.lead();
  const at::Tensor value = call.made(lead, p.value), transport = call.made(lead, p.transport);
  const at::Tensor f = call.made(c.shape({p.n}), p.f), g = call.made(c.shape({p.m}), p.g);
  const at::Tensor mass = call.made(c.shape({p.n}), p.row_mass);
  const at::Tensor counts = at::zeros({2, p.batch}, call.wide.dtype(at::kInt));
  p.n_iter = counts.mutable_data_ptr<int32_t>();
  p.status = p.n_iter + p.batch;
  if (p.n * p.m == 0)
    for (const at::Tensor& t : {value, transport, f, g, mass}) t.zero_();
  else if (p.batch > 0)
    call.run(ot_cuda_solve, OtKernel::kSolve);
  return {value, transport, f, g, mass, counts.select(0, 0).view(lead).clone(), counts.select(0, 1).view(lead).clone()};
}

Solved sinkhorn_solve_fwd(const at::Tensor& cost, const Optional& a, const Optional& b, const Optional& init,
                          double eps, int64_t max_iter, std::optional<double> tol, std::optional<double> rho,
                          bool implicit) {
  const Arguments c{kSolve, cost, a, b, eps};
  const SolveOptions options{max_iter, tol, rho};
  c.check();
  if (init) c.check_one("init", *init, {c.m()});
  options.check(kSolve);
  return in_compute_type(c.is_double(), [&](auto tag) { return solve<decltype(tag)>(c, init, options); });
}

template <class T>
Three solve_backward(const std::array<const at::Tensor*, 4>& grads, const Arguments& c, const SolveOptions& options,
                     bool implicit, const at::Tensor& f, const at::Tensor& g, std::array<bool, 3> mask) {
  const at::Tensor &like_a = c.a.value_or(c.cost), &like_b = c.b.value_or(c.cost);
  if (c.cost.numel() == 0) return zero_gradients(mask, c.cost, like_a, like_b);
  CudaCall<T> call(c);
  auto& p = call.p;
  options.give(p);
  p.implicit = implicit;
  p.grad_value = call.rows(*grads[0]);
  p.grad_transport = call.rows(*grads[1]);
  p.grad_f = call.rows(*grads[2]);
  p.grad_g = call.rows(*grads[3]);
  p.potential_f = call.rows(f);
  p.potential_g = call.rows(g);
  const at::Tensor dcost = mask[0] ? at::empty(c.cost.sizes(), c.cost.options()) : no_gradient(c.cost);
  if (mask[0]) p.grad_cost = call.result(dcost);
  const at::Tensor da = call.made_if(mask[1], like_a, p.grad_a), db = call.made_if(mask[2], like_b, p.grad_b);
  call.run(ot_cuda_gradient, OtKernel::kGradient);
  return {dcost, gradient_or_empty(mask[1], da, like_a), gradient_or_empty(mask[2], db, like_b)};
}

Three sinkhorn_solve_bwd(const at::Tensor& grad_value, const at::Tensor& grad_transport, const at::Tensor& grad_f,
                         const at::Tensor& grad_g, const at::Tensor& cost, const Optional& a, const Optional& b,
                         const Optional& init, double eps, int64_t max_iter, std::optional<double> tol,
                         std::optional<double> rho, bool implicit, const at::Tensor& f, const at::Tensor& g,
                         std::array<bool, 3> mask) {
  const Arguments c{kSolve, cost, a, b, eps};
  const SolveOptions options{max_iter, tol, rho};
  c.check();
  options.check(kSolve);
  c.check_one("grad", grad_value, {});
  c.check_one("grad", grad_transport, {});
  c.check_one("grad", grad_f, {c.n()});
  c.check_one("grad", grad_g, {c.m()});
  c.check_one("f", f, {c.n()});
  c.check_one("g", g, {c.m()});
  mask[1] = mask[1] && a, mask[2] = mask[2] && b;
  const std::array<const at::Tensor*, 4> grads{&grad_value, &grad_transport, &grad_f, &grad_g};
  // Conjugate gradients in float lose more digits than the plain way of the reference.
  return in_compute_type(c.is_double() || implicit, [&](auto tag) {
    return solve_backward<decltype(tag)>(grads, c, options, implicit, f, g, mask);
  });
}

// --- the plan of given potentials -----------------------------------------------------------------------------------

Arguments plan_arguments(const at::Tensor& cost, const Optional& a, const Optional& b, const at::Tensor& f,
                         const at::Tensor& g, double eps) {
  const Arguments c{kPlan, cost, a, b, eps};
  c.check();
  c.check_one("f", f, {c.n()});
  c.check_one("g", g, {c.m()});
  return c;
}

at::Tensor sinkhorn_plan_fwd(const at::Tensor& cost, const Optional& a, const Optional& b, const at::Tensor& f,
                             const at::Tensor& g, double eps) {
  const Arguments c = plan_arguments(cost, a, b, f, g, eps);
  const at::Tensor plan = at::empty(cost.sizes(), cost.options());
  if (plan.numel() == 0) return plan;
  in_compute_type(c.is_double(), [&](auto tag) {
    CudaCall<decltype(tag)> call(c);
    call.p.potential_f = call.rows(f);
    call.p.potential_g = call.rows(g);
    call.p.plan = call.result(plan);
    call.run(ot_cuda_plan, OtKernel::kPlan);
  });
  return plan;
}

template <class T>
Five plan_backward(const at::Tensor& grad, const Arguments& c, const at::Tensor& f, const at::Tensor& g,
                   std::array<bool, 5> mask) {
  const at::Tensor &like_a = c.a.value_or(c.cost), &like_b = c.b.value_or(c.cost);
  if (c.cost.numel() == 0) return zero_gradients(mask, c.cost, like_a, like_b, f, g);
  CudaCall<T> call(c);
  auto& p = call.p;
  p.potential_f = call.rows(f);
  p.potential_g = call.rows(g);
  p.plan = call.strided(grad, p.plan_lead);
  const at::Tensor dcost = mask[0] ? at::empty(c.cost.sizes(), c.cost.options()) : no_gradient(c.cost);
  if (mask[0]) p.grad_cost = call.result(dcost);
  const at::Tensor da = call.made_if(mask[1], like_a, p.grad_a), db = call.made_if(mask[2], like_b, p.grad_b);
  const at::Tensor df = call.made_if(mask[3], f, p.out_f), dg = call.made_if(mask[4], g, p.out_g);
  call.run(ot_cuda_plan_gradient, OtKernel::kPlanGradient);
  return {dcost, gradient_or_empty(mask[1], da, like_a), gradient_or_empty(mask[2], db, like_b),
          gradient_or_empty(mask[3], df, f), gradient_or_empty(mask[4], dg, g)};
}

Five sinkhorn_plan_bwd(const at::Tensor& grad, const at::Tensor& cost, const Optional& a, const Optional& b,
                       const at::Tensor& f, const at::Tensor& g, double eps, std::array<bool, 5> mask) {
  const Arguments c = plan_arguments(cost, a, b, f, g, eps);
  c.check_one("grad", grad, {c.n(), c.m()});
  mask[1] = mask[1] && a, mask[2] = mask[2] && b;
  return in_compute_type(c.is_double(), [&](auto tag) { return plan_backward<decltype(tag)>(grad, c, f, g, mask); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("sinkhorn_solve_fwd", &sinkhorn_solve_fwd);
  m.impl("sinkhorn_solve_bwd", &sinkhorn_solve_bwd);
  m.impl("sinkhorn_plan_fwd", &sinkhorn_plan_fwd);
  m.impl("sinkhorn_plan_bwd", &sinkhorn_plan_bwd);
}

}  // namespace pyml
