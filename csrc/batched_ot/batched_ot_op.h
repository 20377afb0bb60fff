// Torch side of sinkhorn_solve and sinkhorn_plan, shared by the CPU and CUDA: what a call tells its kernels, outputs,
// gradients.
#pragma once
#include <ATen/ops/empty.h>

#include <array>
#include <tuple>
#include <vector>

#include "batched_ot/batched_ot_arguments.h"
#include "common/cpu.h"
#include "common/gradients.h"

namespace pyml {

// What a call has on every backend: parameters and the tensors behind them, small arguments as contiguous rows of T.
// Params is SinkhornParams<T> or more.
template <class T, class Params>
struct SinkhornCall {
  Params p{};
  std::vector<at::Tensor> kept;
  at::TensorOptions wide;
  const int64_t* dense = nullptr;  // offsets of a contiguous [..., n, m], for kernels that ask for them

  explicit SinkhornCall(const Arguments& c) : wide(c.cost.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    p.batch = c.batch();
    p.n = c.n();
    p.m = c.m();
    p.a = rows(c.a);
    p.b = rows(c.b);
    p.eps = T(c.eps);
    p.mass_tolerance = T(c.mass_tolerance());
  }
  const T* rows(const std::optional<at::Tensor>& t) { return t ? rows(*t) : nullptr; }
  const T* rows(const at::Tensor& t) {
    kept.push_back(t.to(wide.dtype()).contiguous());
    return kept.back().template const_data_ptr<T>();
  }
  void potentials(const at::Tensor& f, const at::Tensor& g) {
    p.potential_f = rows(f);
    p.potential_g = rows(g);
  }

  // Tensors that a kernel will write.
  template <class N>
  at::Tensor made(at::IntArrayRef shape, N*& pointer) const {
    const at::Tensor t = at::empty(shape, wide.dtype(c10::CppTypeToScalarType<N>::value));
    pointer = t.template mutable_data_ptr<N>();
    return t;
  }
  at::Tensor made_if(bool wanted, const at::Tensor& like, T*& pointer) const {
    return wanted ? made(like.sizes(), pointer) : no_gradient(like);
  }
  at::Tensor matrix(const at::Tensor& like, Costs& to) const {  // in the dtype of `like`
    const at::Tensor t = at::empty(like.sizes(), like.options());
    to = {t.mutable_data_ptr(), dtype_of(t), dense, p.m, 1};
    return t;
  }
  at::Tensor matrix_if(bool wanted, const at::Tensor& like, Costs& to) const {
    return wanted ? matrix(like, to) : no_gradient(like);
  }
};

// The two ops where a Call runs the kernels of a backend. Call<T> is a SinkhornCall that computes in T, with solve(),
// gradient(), plan(), plan_gradient(), and take_plan(grad) for what comes in to the last; implicit gradients are solved
// for in double where `kImplicitInDouble`.
template <template <class> class Call>
struct SinkhornOp {
  using Optional = std::optional<at::Tensor>;
  using Solved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static Solved solve_fwd(const at::Tensor& cost, const Optional& a, const Optional& b, const Optional& init,
                          double eps, int64_t max_iter, std::optional<double> tol, std::optional<double> rho, bool) {
    const Arguments c{"sinkhorn_solve", cost, a, b, eps};
    const SolveOptions options{max_iter, tol, rho};
    c.check();
    if (init) c.check_one("init", *init, {c.m()});
    options.check(c.op);
    return in_compute_type(c.is_double(), [&](auto tag) {
      Call<decltype(tag)> call(c);
      auto& p = call.p;
      options.give(p);
      p.init = call.rows(init);
      const auto lead = c.lead();
      const auto rows = c.shape({p.n}), columns = c.shape({p.m});
      const Solved made{call.made(lead, p.value), call.made(lead, p.transport), call.made(rows, p.f),
                        call.made(columns, p.g),  call.made(rows, p.row_mass),  call.made(lead, p.n_iter),
                        call.made(lead, p.status)};
      if (cost.numel() > 0)
        call.solve();
      else
        std::apply([](const auto&... t) { (t.zero_(), ...); }, made);
      return made;
    });
  }

  static Three solve_bwd(const at::Tensor& grad_value, const at::Tensor& grad_transport, const at::Tensor& grad_f,
                         const at::Tensor& grad_g, const at::Tensor& cost, const Optional& a, const Optional& b,
                         const Optional&, double eps, int64_t max_iter, std::optional<double> tol,
                         std::optional<double> rho, bool implicit, const at::Tensor& f, const at::Tensor& g,
                         std::array<bool, 3> mask) {
    const Arguments c{"sinkhorn_solve", cost, a, b, eps};
    const SolveOptions options{max_iter, tol, rho};
    c.check();
    options.check(c.op);
    c.check_one("grad", grad_value, {});
    c.check_one("grad", grad_transport, {});
    c.check_one("grad", grad_f, {c.n()});
    c.check_one("grad", grad_g, {c.m()});
    c.check_potentials(f, g);
    const at::Tensor like_a = a.value_or(cost), like_b = b.value_or(cost);
    mask[1] = mask[1] && a, mask[2] = mask[2] && b;
    if (cost.numel() == 0) return zero_gradients(mask, cost, like_a, like_b);
    const bool in_double = c.is_double() || (implicit && Call<float>::kImplicitInDouble);
    return in_compute_type(in_double, [&](auto tag) {
      Call<decltype(tag)> call(c);
      auto& p = call.p;
      options.give(p);
      p.implicit = implicit;
      p.grad_value = call.rows(grad_value);
      p.grad_transport = call.rows(grad_transport);
      if (implicit) p.grad_f = call.rows(grad_f), p.grad_g = call.rows(grad_g);
      call.potentials(f, g);
      const at::Tensor dcost = call.matrix_if(mask[0], cost, p.grad_cost);
      const at::Tensor da = call.made_if(mask[1], like_a, p.grad_a), db = call.made_if(mask[2], like_b, p.grad_b);
      call.gradient();
      return Three{dcost, gradient_or_empty(mask[1], da, like_a), gradient_or_empty(mask[2], db, like_b)};
    });
  }

  static at::Tensor plan_fwd(const at::Tensor& cost, const Optional& a, const Optional& b, const at::Tensor& f,
                             const at::Tensor& g, double eps) {
    const Arguments c = checked_plan(cost, a, b, f, g, eps);
    return in_compute_type(c.is_double(), [&](auto tag) {
      Call<decltype(tag)> call(c);
      const at::Tensor plan = call.matrix(cost, call.p.plan);
      call.potentials(f, g);
      if (cost.numel() > 0) call.plan();
      return plan;
    });
  }

  static Five plan_bwd(const at::Tensor& grad, const at::Tensor& cost, const Optional& a, const Optional& b,
                       const at::Tensor& f, const at::Tensor& g, double eps, std::array<bool, 5> mask) {
    const Arguments c = checked_plan(cost, a, b, f, g, eps);
    c.check_one("grad", grad, {c.n(), c.m()});
    const at::Tensor like_a = a.value_or(cost), like_b = b.value_or(cost);
    mask[1] = mask[1] && a, mask[2] = mask[2] && b;
    if (cost.numel() == 0) return zero_gradients(mask, cost, like_a, like_b, f, g);
    return in_compute_type(c.is_double(), [&](auto tag) {
      Call<decltype(tag)> call(c);
      auto& p = call.p;
      call.potentials(f, g);
      call.take_plan(grad);
      const at::Tensor dcost = call.matrix_if(mask[0], cost, p.grad_cost);
      const at::Tensor da = call.made_if(mask[1], like_a, p.grad_a), db = call.made_if(mask[2], like_b, p.grad_b);
      const at::Tensor df = call.made_if(mask[3], f, p.out_f), dg = call.made_if(mask[4], g, p.out_g);
      call.plan_gradient();
      return Five{dcost, gradient_or_empty(mask[1], da, like_a), gradient_or_empty(mask[2], db, like_b),
                  gradient_or_empty(mask[3], df, f), gradient_or_empty(mask[4], dg, g)};
    });
  }

 private:
  static Arguments checked_plan(const at::Tensor& cost, const Optional& a, const Optional& b, const at::Tensor& f,
                                const at::Tensor& g, double eps) {
    const Arguments c{"sinkhorn_plan", cost, a, b, eps};
    c.check();
    c.check_potentials(f, g);
    return c;
  }
};

}  // namespace pyml
