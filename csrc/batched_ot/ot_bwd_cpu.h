// Gradients of a solved problem: the envelope, and through the potentials by the implicit function theorem.
#pragma once
#include "batched_ot/ot_system_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Gradient : System<T> {
  using Base = System<T>;
  using Base::at, Base::block, Base::blocks, Base::columns, Base::L, Base::lane, Base::ld, Base::of_block,
      Base::of_columns, Base::of_lane, Base::of_rows, Base::p, Base::q, Base::rows, Base::tau;
  using Extra = typename Base::Extra;
  const T value, transport;

  Gradient(const SinkhornParams<T>& p, int64_t q, T* memory)
      : Base(p, q, memory), value(p.grad_value[q]), transport(p.grad_transport[q]) {}

  bool solved() const {
    return this->found() && this->mass_a.any && this->mass_b.any && !this->mass_a.bad && !this->mass_b.bad;
  }

  // The gradients of the potentials, and their part along the direction in which balanced potentials are free.
  double potential_gradients() {
    double apart = 0;
    const auto side = [&](const Side<T>& s, double* h, const T* given, double sign) {
      for (int64_t i = 0; i < s.padded; ++i) {
        const bool live = i < s.size && s.w[i] > 0;
        h[i] = live ? double(transport) / double(p.eps) * h[i] + (given ? double(given[q * s.size + i]) : 0) : 0;
        apart += sign * h[i];
      }
    };
    side(rows(), of_rows().h, p.grad_f, 1);
    side(columns(), of_columns().h, p.grad_g, -1);
    if (p.unbalanced) return 0;
    for (int64_t j = 0; j < columns().size; ++j) of_columns().h[j] += double(columns().w[j]) * apart / this->mass_b.sum;
    return apart;
  }

  // As sum b g = 0 fixes the potentials, it fixes the solution.
  void pin(double apart) {
    const Side<T>& c = columns();
    double total = apart / this->mass_b.sum;
    for (int64_t j = 0; j < c.size; ++j) total += double(c.w[j]) * of_columns().move[j];
    const double shift = total / this->mass_b.sum;
    for (int64_t j = 0; j < c.size; ++j) of_columns().move[j] -= shift;
    for (int64_t i = 0; i < rows().size; ++i) of_rows().move[i] += shift;
  }

  bool anything() const {
    if (!p.implicit) return false;
    bool some = transport != 0;
    for (int64_t i = 0; p.grad_f && i < p.n; ++i) some |= p.grad_f[q * p.n + i] != 0;
    for (int64_t j = 0; p.grad_g && j < p.m; ++j) some |= p.grad_g[q * p.m + j] != 0;
    return some;
  }

  void run() {
    if (!solved()) return this->nothing();
    const bool implicit = anything();
    double apart = 0;
    if (implicit || (p.unbalanced && p.grad_a)) this->plan_and_sums();
    if (implicit) {
      apart = potential_gradients();
      if (!this->solve()) p.status[q] = kNotConverged;
      if (!p.unbalanced) pin(apart);
      for (int64_t i = 0; i < block.padded; ++i) block.x[i] = T(of_block.move[i]);
      for (int64_t v = 0; v < ld; ++v) lane.x[v] = T(of_lane.move[v]);
    }
    if (p.grad_cost.data) implicit ? implicit_cost_gradient() : this->write_plan(p.grad_cost, value + transport);
    weight_gradients(implicit, apart);
  }

  void implicit_cost_gradient() {
    const T both = value + transport, scale = transport / p.eps;
    for (int64_t k = 0; k < blocks; ++k) {
      this->read(p.cost, k);
      this->change(k, [&](int64_t i, int64_t v, Vec<T> c) {
        const Vec<T> x = load<T>(at(k, v / L) + (i - k * L) * L);
        return x * (both - scale * c + block.x[i] + load<T>(lane.x + v));
      });
      this->write(p.grad_cost, k);
    }
  }

  void weight_gradients(bool implicit, double apart) {
    const double a = this->mass_a.sum, b = this->mass_b.sum, eps = double(p.eps), rho = double(p.rho);
    const auto through = [&](const Side<T>& s, const Extra& e, const T* given, int64_t i) {
      const double upstream = given ? double(given[q * s.size + i]) : 0;
      return eps * (tau * e.mass[i] * e.move[i] - upstream) / double(s.w[i]);
    };
    // What fixes the free direction answers to masses that move apart; equal ones do not see it.
    const double uneven = p.unbalanced ? 0 : apart * eps / (b * b);
    const auto share = [](const Side<T>& s, const Extra& e, int64_t i) { return e.mass[i] / double(s.w[i]); };
    for (int64_t i = 0; i < p.n && p.grad_a; ++i) {
      const Side<T>& s = rows();
      double d = double(s.pot[i]) + eps * (b - 1);
      if (p.unbalanced) {
        const double kept = s.w[i] > 0 ? share(s, of_rows(), i) : 0;
        d = eps * (b - kept) + rho * (1 - kept);
      }
      d *= double(value);
      if (implicit && s.w[i] > 0) d += through(s, of_rows(), p.grad_f, i) - uneven * share(s, of_rows(), i);
      p.grad_a[q * p.n + i] = s.w[i] > 0 ? T(d) : T(0);
    }
    for (int64_t j = 0; j < p.m && p.grad_b; ++j) {
      const Side<T>& s = columns();
      double d = double(s.pot[j]) + eps * (a - 1);
      if (p.unbalanced) {
        const double kept = std::exp(-double(s.pot[j]) / rho);
        d = eps * (a - kept) + rho * (1 - kept);
      }
      d *= double(value);
      if (implicit && s.w[j] > 0) {
        d += through(s, of_columns(), p.grad_g, j) + uneven * share(s, of_columns(), j);
        if (!p.unbalanced) d += apart * (double(s.pot[j]) - eps) / b;
      }
      p.grad_b[q * p.m + j] = s.w[j] > 0 ? T(d) : T(0);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
