// Batched optimal transport on a CPU: checks, allocation, threads.
#include "batched_ot/batched_ot.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "batched_ot/batched_ot_arguments.h"
#include "batched_ot/matrices.h"
#include "common/check.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "common/gradients.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using Solved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Parameters of a call and the tensors behind them: small arguments as contiguous rows of T.
template <class T>
struct Call {
  SinkhornParams<T> p{};
  std::vector<int64_t> offsets, plain;  // of the cost; of a contiguous tensor of its shape
  std::vector<at::Tensor> kept;
  at::TensorOptions wide;

  explicit Call(const Arguments& c)
      : offsets(offsets_of(c.cost)), wide(c.cost.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    p.batch = int64_t(offsets.size());
    p.n = c.n();
    p.m = c.m();
    p.cost = costs_of(c.cost, offsets);
    p.a = rows(c.a);
    p.b = rows(c.b);
    p.eps = T(c.eps);
    p.mass_tolerance = T(c.mass_tolerance());
    plain.resize(offsets.size());
    for (size_t q = 0; q < plain.size(); ++q) plain[q] = int64_t(q) * p.n * p.m;
  }
  const T* rows(const Optional& t) { return t ? rows(*t) : nullptr; }
  const T* rows(const at::Tensor& t) {
    kept.push_back(t.to(wide.dtype()).contiguous());
    return kept.back().template const_data_ptr<T>();
  }
  Costs contiguous(const at::Tensor& t) const { return costs_of(t, plain); }
  bool empty() const { return p.batch * p.n * p.m == 0; }
  int64_t work(int64_t sweeps) const { return sweeps * std::max<int64_t>(4, p.n * p.m / 8); }
};

constexpr const char* kSolve = "sinkhorn_solve";

template <class T>
Solved solve(const Arguments& c, const Optional& init, const SolveOptions& options) {
  Call<T> call(c);
  auto& p = call.p;
  options.give(p);
  const auto counts = call.wide.dtype(at::kInt);
  const auto rows = c.shape({p.n}), columns = c.shape({p.m});
  if (call.empty()) {
    const auto zeros = [&](at::IntArrayRef shape, const at::TensorOptions& o) { return at::zeros(shape, o); };
    return {zeros(c.lead(), call.wide), zeros(c.lead(), call.wide), zeros(rows, call.wide), zeros(columns, call.wide),
            zeros(rows, call.wide),     zeros(c.lead(), counts),    zeros(c.lead(), counts)};
  }
  const at::Tensor value = at::empty(c.lead(), call.wide), transport = at::empty(c.lead(), call.wide);
  const at::Tensor f = at::empty(rows, call.wide), g = at::empty(columns, call.wide), mass = at::empty(rows, call.wide);
  const at::Tensor n_iter = at::empty(c.lead(), counts), status = at::empty(c.lead(), counts);
  p.init = call.rows(init);
  p.value = value.template mutable_data_ptr<T>();
  p.transport = transport.template mutable_data_ptr<T>();
  p.f = f.template mutable_data_ptr<T>();
  p.g = g.template mutable_data_ptr<T>();
  p.row_mass = mass.template mutable_data_ptr<T>();
  p.n_iter = n_iter.template mutable_data_ptr<int32_t>();
  p.status = status.template mutable_data_ptr<int32_t>();
  const int64_t tasks = PYML_CALL_ISA(sinkhorn_tasks, p), lanes = (p.batch + tasks - 1) / tasks;
  parallel(tasks, lanes * call.work(p.max_iter), [&](int64_t begin, int64_t end) {
    T* memory = scratch<T>(PYML_CALL_ISA(sinkhorn_scratch, p));
    PYML_CALL_ISA(sinkhorn_fwd_kernel, p, begin, end, memory);
  });
  return {value, transport, f, g, mass, n_iter, status};
}

Solved sinkhorn_solve_fwd(const at::Tensor& cost, const Optional& a, const Optional& b, const Optional& init,
                          double eps, int64_t max_iter, std::optional<double> tol, std::optional<double> rho,
                          bool implicit) {
  const Arguments c{kSolve, cost, a, b, eps};
  const SolveOptions options{max_iter, tol, rho};
  c.check();
  if (init) c.check_one("init", *init, {c.m()});
  options.check(kSolve);
  return c.is_double() ? solve<double>(c, init, options) : solve<float>(c, init, options);
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Three solve_backward(const std::array<const at::Tensor*, 4>& grads, const Arguments& c, const SolveOptions& options,
                     bool implicit, const at::Tensor& f, const at::Tensor& g, std::array<bool, 3> mask) {
  Call<T> call(c);
  auto& p = call.p;
  options.give(p);
  p.implicit = implicit;
  if (call.empty()) return zero_gradients(mask, c.cost, c.a.value_or(c.cost), c.b.value_or(c.cost));
  const at::Tensor dcost = mask[0] ? at::empty(c.cost.sizes(), c.cost.options()) : no_gradient(c.cost);
  const at::Tensor da = mask[1] ? at::empty(c.a->sizes(), call.wide) : no_gradient(c.cost);
  const at::Tensor db = mask[2] ? at::empty(c.b->sizes(), call.wide) : no_gradient(c.cost);
  p.grad_value = call.rows(*grads[0]);
  p.grad_transport = call.rows(*grads[1]);
  p.grad_f = call.rows(*grads[2]);
  p.grad_g = call.rows(*grads[3]);
  p.potential_f = call.rows(f);
  p.potential_g = call.rows(g);
  if (mask[0]) p.grad_cost = call.contiguous(dcost);
  if (mask[1]) p.grad_a = da.template mutable_data_ptr<T>();
  if (mask[2]) p.grad_b = db.template mutable_data_ptr<T>();
  const bool large = implicit && std::min(p.n, p.m) > kDenseSystem;
  const at::Tensor status = at::zeros({large ? p.batch : 0}, call.wide.dtype(at::kInt));
  p.status = status.template mutable_data_ptr<int32_t>();
  parallel(p.batch, call.work(implicit ? 64 : 16), [&](int64_t begin, int64_t end) {
    T* memory = scratch<T>(PYML_CALL_ISA(sinkhorn_bwd_scratch, p));
    PYML_CALL_ISA(sinkhorn_bwd_kernel, p, begin, end, memory);
  });
  if (const auto left = std::count(p.status, p.status + status.numel(), kNotConverged))
    TORCH_WARN("sinkhorn: implicit gradient: expected conjugate gradients to solve the system of each problem, got ",
               left, " of ", p.batch, " that they did not: their plans are too far from full for it; raise eps");
  return {dcost, c.a ? gradient_or_empty(mask[1], da, *c.a) : da, c.b ? gradient_or_empty(mask[2], db, *c.b) : db};
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
  return c.is_double() ? solve_backward<double>(grads, c, options, implicit, f, g, mask)
                       : solve_backward<float>(grads, c, options, implicit, f, g, mask);
}

// --- the plan of given potentials -----------------------------------------------------------------------------------

constexpr const char* kPlan = "sinkhorn_plan";
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
at::Tensor plan(const Arguments& c, const at::Tensor& f, const at::Tensor& g) {
  const at::Tensor out = at::empty(c.cost.sizes(), c.cost.options());
  Call<T> call(c);
  auto& p = call.p;
  if (call.empty()) return out;
  p.potential_f = call.rows(f);
  p.potential_g = call.rows(g);
  p.plan = call.contiguous(out);
  parallel(p.batch, call.work(8), [&](int64_t begin, int64_t end) {
    T* memory = scratch<T>(PYML_CALL_ISA(sinkhorn_bwd_scratch, p));
    PYML_CALL_ISA(sinkhorn_plan_fwd_kernel, p, begin, end, memory);
  });
  return out;
}

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
  return c.is_double() ? plan<double>(c, f, g) : plan<float>(c, f, g);
}

template <class T>
Five plan_backward(const at::Tensor& grad, const Arguments& c, const at::Tensor& f, const at::Tensor& g,
                   std::array<bool, 5> mask) {
  Call<T> call(c);
  auto& p = call.p;
  if (call.empty()) return zero_gradients(mask, c.cost, c.a.value_or(c.cost), c.b.value_or(c.cost), f, g);
  const auto made = [&](bool wanted, const at::Tensor& like, const at::TensorOptions& o, auto& pointer) {
    const at::Tensor t = wanted ? at::empty(like.sizes(), o) : no_gradient(like);
    if (wanted) pointer = t.template mutable_data_ptr<T>();
    return t;
  };
  const at::Tensor dcost = mask[0] ? at::empty(c.cost.sizes(), c.cost.options()) : no_gradient(c.cost);
  const at::Tensor da = made(mask[1], c.a.value_or(c.cost), call.wide, p.grad_a);
  const at::Tensor db = made(mask[2], c.b.value_or(c.cost), call.wide, p.grad_b);
  const at::Tensor df = made(mask[3], f, call.wide, p.out_f), dg = made(mask[4], g, call.wide, p.out_g);
  p.potential_f = call.rows(f);
  p.potential_g = call.rows(g);
  const auto offsets = offsets_of(grad);
  p.plan = costs_of(grad, offsets);
  if (mask[0]) p.grad_cost = call.contiguous(dcost);
  parallel(p.batch, call.work(8), [&](int64_t begin, int64_t end) {
    T* memory = scratch<T>(PYML_CALL_ISA(sinkhorn_bwd_scratch, p));
    PYML_CALL_ISA(sinkhorn_plan_bwd_kernel, p, begin, end, memory);
  });
  const auto cast = [](bool wanted, const at::Tensor& t, const at::Tensor& like) {
    return gradient_or_empty(wanted, t, like);
  };
  return {dcost, cast(mask[1], da, c.a.value_or(c.cost)), cast(mask[2], db, c.b.value_or(c.cost)), cast(mask[3], df, f),
          cast(mask[4], dg, g)};
}

Five sinkhorn_plan_bwd(const at::Tensor& grad, const at::Tensor& cost, const Optional& a, const Optional& b,
                       const at::Tensor& f, const at::Tensor& g, double eps, std::array<bool, 5> mask) {
  const Arguments c = plan_arguments(cost, a, b, f, g, eps);
  c.check_one("grad", grad, {c.n(), c.m()});
  mask[1] = mask[1] && a, mask[2] = mask[2] && b;
  return c.is_double() ? plan_backward<double>(grad, c, f, g, mask) : plan_backward<float>(grad, c, f, g, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("sinkhorn_solve_fwd", &sinkhorn_solve_fwd);
  m.impl("sinkhorn_solve_bwd", &sinkhorn_solve_bwd);
  m.impl("sinkhorn_plan_fwd", &sinkhorn_plan_fwd);
  m.impl("sinkhorn_plan_bwd", &sinkhorn_plan_bwd);
}

}  // namespace pyml
