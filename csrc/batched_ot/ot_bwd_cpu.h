// Gradients of a solved problem: the envelope, and through the potentials by the implicit function theorem; the plan of
// given potentials and its gradient.
#pragma once
#include "batched_ot/ot_tiles_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Plan : Tiles<T> {
  using Base = Tiles<T>;
  using Base::at, Base::block, Base::blocks, Base::buffer, Base::columns, Base::inv2, Base::L, Base::lane, Base::ld,
      Base::p, Base::q, Base::rows, Base::vectors;

  Plan(const SinkhornParams<T>& p, int64_t q, T* memory) : Base(p, q, memory) {
    for (int64_t i = 0; i < rows().padded; ++i) rows().pot[i] = i < p.n ? p.potential_f[q * p.n + i] : T(0);
    for (int64_t j = 0; j < columns().padded; ++j) columns().pot[j] = j < p.m ? p.potential_g[q * p.m + j] : T(0);
  }

  // P at block entry k and lanes v, from the cost there; 0 where something is masked.
  PYML_INLINE Vec<T> plan(int64_t k, int64_t v, const Vec<T>& cost) const {
    if (!(block.w[k] > 0)) return Vec<T>{};
    const Vec<T> w = load<T>(lane.w + v), x = ((block.pot[k] - cost) + load<T>(lane.pot + v)) * inv2;
    return w > T(0) ? (block.w[k] * w) * exp2_flushed<T>(x) : Vec<T>{};
  }

  // buffer = f(k, v, buffer) for the entries of block k.
  template <class F>
  PYML_INLINE void change(int64_t k, const F& f) {
    for (int64_t i = 0; i < this->in_block(k); ++i)
      for (int64_t v = 0; v < ld; v += L) store<T>(buffer + i * ld + v, f(k * L + i, v, load<T>(buffer + i * ld + v)));
  }

  void forward() {
    for (int64_t k = 0; k < blocks; ++k) {
      Base::read(p.cost, k);
      change(k, [&](int64_t i, int64_t v, Vec<T> c) { return plan(i, v, c); });
      Base::write(p.plan, k);
    }
  }

  void backward() {
    std::memset(lane.sum, 0, size_t(ld) * sizeof(T));
    T* plans = this->tile;  // of one block
    for (int64_t k = 0; k < blocks; ++k) {
      Base::read(p.cost, k);
      for (int64_t i = 0; i < L; ++i)
        for (int64_t v = 0; v < ld; v += L)
          store<T>(plans + i * ld + v, plan(k * L + i, v, load<T>(buffer + i * ld + v)));
      Base::read(p.plan, k);
      for (int64_t i = 0; i < L; ++i) {
        Vec<T> total = {};
        for (int64_t v = 0; v < ld; v += L) {
          const Vec<T> w = load<T>(plans + i * ld + v) * load<T>(buffer + i * ld + v);
          total += w;
          store<T>(lane.sum + v, load<T>(lane.sum + v) + w);
          store<T>(buffer + i * ld + v, w * (T(-1) / p.eps));
        }
        block.sum[k * L + i] = sum<T>(total);
      }
      if (p.grad_cost.data) Base::write(p.grad_cost, k);
    }
    const auto give = [&](const Side<T>& side, T* weight, T* potential) {
      for (int64_t i = 0; i < side.size; ++i) {
        if (weight) weight[q * side.size + i] = side.w[i] > 0 ? side.sum[i] / side.w[i] : T(0);
        if (potential) potential[q * side.size + i] = side.sum[i] / p.eps;
      }
    };
    give(rows(), p.grad_a, p.out_f);
    give(columns(), p.grad_b, p.out_g);
  }
};

template <class T>
struct Gradient : Plan<T> {
  using Base = Plan<T>;
  using Base::at, Base::block, Base::blocks, Base::buffer, Base::columns, Base::L, Base::lane, Base::ld, Base::p,
      Base::q, Base::rows, Base::swapped, Base::vectors;
  struct Extra {
    T *mass, *h, *move;  // sums of the plan, gradient of the potentials, solution of the system
  } of_block, of_lane;
  T *residual, *direction, *image;  // of conjugate gradients, on the lane side
  const T value, transport, tau;

  static int64_t scratch(const SinkhornParams<T>& p) {
    return Tiles<T>::scratch(p) + 6 * (Tiles<T>::padded(p.n) + Tiles<T>::padded(p.m));
  }
  Gradient(const SinkhornParams<T>& p, int64_t q, T* memory)
      : Base(p, q, memory), value(p.grad_value[q]), transport(p.grad_transport[q]), tau(p.tau()) {
    memory += Tiles<T>::scratch(p);
    const auto take = [&](int64_t n) {
      T* at = memory;
      memory += n;
      return at;
    };
    of_block = {take(block.padded), take(block.padded), take(block.padded)};
    of_lane = {take(ld), take(ld), take(ld)};
    residual = take(ld), direction = take(ld), image = take(ld);
  }
  Extra& of_rows() { return swapped ? of_lane : of_block; }
  Extra& of_columns() { return swapped ? of_block : of_lane; }

  bool solved() const {
    for (int64_t i = 0; i < p.n; ++i)
      if (!std::isfinite(p.potential_f[q * p.n + i])) return false;
    return this->mass_a.any && this->mass_b.any && !this->mass_a.bad && !this->mass_b.bad;
  }

  // The plan into the tiles, its sums into mass, those of plan times cost into h.
  void plan_and_sums() {
    for (T* t : {of_lane.mass, of_lane.h}) std::memset(t, 0, size_t(ld) * sizeof(T));
    for (int64_t k = 0; k < blocks; ++k) {
      this->read(p.cost, k);
      for (int64_t i = 0; i < L; ++i) {
        Vec<T> mass = {}, spent = {};
        for (int64_t v = 0; v < vectors; ++v) {
          const Vec<T> c = load<T>(buffer + i * ld + v * L), x = this->plan(k * L + i, v * L, c);
          store<T>(at(k, v) + i * L, x);
          mass += x;
          spent += x * c;
          store<T>(of_lane.mass + v * L, load<T>(of_lane.mass + v * L) + x);
          store<T>(of_lane.h + v * L, load<T>(of_lane.h + v * L) + x * c);
        }
        of_block.mass[k * L + i] = sum<T>(mass);
        of_block.h[k * L + i] = sum<T>(spent);
      }
    }
  }

  // The gradients of the potentials, and their part along the direction in which balanced potentials are free.
  double potential_gradients() {
    double apart = 0;
    const auto side = [&](const Side<T>& s, T* h, const T* given, double sign) {
      for (int64_t i = 0; i < s.padded; ++i) {
        const bool live = i < s.size && s.w[i] > 0;
        h[i] = live ? transport / p.eps * h[i] + (given ? given[q * s.size + i] : T(0)) : T(0);
        apart += sign * double(h[i]);
      }
    };
    side(rows(), of_rows().h, p.grad_f, 1);
    side(columns(), of_columns().h, p.grad_g, -1);
    if (p.unbalanced) return 0;
    for (int64_t j = 0; j < columns().size; ++j)
      of_columns().h[j] += T(double(columns().w[j]) * apart / this->mass_b.sum);
    return apart;
  }

  // image = S x with S = tau c - P^T (tau r)^-1 P, the Schur complement on the lane side; block.u holds (tau r)^-1.
  void schur(const T* x) {
    this->sweep(x, block.x, [&](int64_t i, Vec<T> sums) { store<T>(block.x + i, sums * load<T>(block.u + i)); });
    for (int64_t v = 0; v < ld; v += L)
      store<T>(image + v, tau * load<T>(of_lane.mass + v) * load<T>(x + v) - load<T>(lane.sum + v));
  }
  double product(const T* x, const T* y) const {
    double total = 0;
    for (int64_t v = 0; v < lane.size; ++v) total += double(x[v]) * double(y[v]);
    return total;
  }
  // residual / diagonal into lane.x; their product. An entry whose plan has vanished does not move.
  double precondition() {
    for (int64_t v = 0; v < ld; ++v)
      lane.x[v] = lane.w[v] > 0 && of_lane.mass[v] > 0 ? residual[v] / (tau * of_lane.mass[v]) : T(0);
    return product(residual, lane.x);
  }

  // Solves [tau r, P; P^T, tau c] (x; y) = h for `move` on both sides by conjugate gradients on the Schur complement,
  // whose condition is that of Sinkhorn's iteration itself. What rounding has left over is solved for once more.
  void solve() {
    for (int64_t i = 0; i < block.padded; ++i)
      block.u[i] = of_block.mass[i] > 0 ? T(1) / (tau * of_block.mass[i]) : T(0);
    for (int64_t i = 0; i < block.padded; ++i) block.x[i] = of_block.h[i] * block.u[i];
    this->add_all(block.x);
    for (int64_t v = 0; v < ld; ++v) {
      lane.sum[v] = residual[v] = lane.w[v] > 0 ? of_lane.h[v] - lane.sum[v] : T(0);
      of_lane.move[v] = 0;
    }
    T* const rhs = lane.u;
    std::memcpy(rhs, residual, size_t(ld) * sizeof(T));
    constexpr double kPrecision = double(std::numeric_limits<T>::epsilon());
    double start = 0;
    for (int round = 0; round < 2; ++round) {
      if (!p.unbalanced) {  // what rounding adds outside of the range of S
        double left = 0, all = 0;
        for (int64_t v = 0; v < lane.size; ++v) left += double(residual[v]), all += double(of_lane.mass[v]);
        for (int64_t v = 0; v < lane.size; ++v) residual[v] -= T(left / all * double(of_lane.mass[v]));
      }
      double size = precondition();
      if (round == 0) start = size;
      std::memcpy(direction, lane.x, size_t(ld) * sizeof(T));
      for (int64_t step = 0; step < 2 * lane.size + 20 && size > kPrecision * kPrecision * start; ++step) {
        schur(direction);
        const double curvature = product(direction, image);
        if (!(curvature > 0)) break;
        const T alpha = T(size / curvature);
        for (int64_t v = 0; v < ld; ++v) of_lane.move[v] += alpha * direction[v], residual[v] -= alpha * image[v];
        const double next = precondition();
        const T beta = T(next / size);
        for (int64_t v = 0; v < ld; ++v) direction[v] = lane.x[v] + beta * direction[v];
        size = next;
      }
      if (round == 0) {
        schur(of_lane.move);
        for (int64_t v = 0; v < ld; ++v) residual[v] = lane.w[v] > 0 ? rhs[v] - image[v] : T(0);
      }
    }
    for (int64_t k = 0; k < blocks; ++k) {
      const Vec<T> sums = this->dot(k, of_lane.move);
      store<T>(of_block.move + k * L, (load<T>(of_block.h + k * L) - sums) * load<T>(block.u + k * L));
    }
  }

  // As sum b g = 0 fixes the potentials, it fixes the solution.
  void pin(double apart) {
    const Side<T>& c = columns();
    double total = apart / this->mass_b.sum;
    for (int64_t j = 0; j < c.size; ++j) total += double(c.w[j]) * double(of_columns().move[j]);
    const T shift = T(total / this->mass_b.sum);
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
    if (!solved()) return nothing();
    const bool implicit = anything();
    double apart = 0;
    if (implicit || (p.unbalanced && p.grad_a)) plan_and_sums();
    if (implicit) {
      apart = potential_gradients();
      solve();
      if (!p.unbalanced) pin(apart);
    }
    if (p.grad_cost.data) {
      const T both = value + transport, scale = implicit ? transport / p.eps : T(0);
      for (int64_t k = 0; k < blocks; ++k) {
        this->read(p.cost, k);
        if (implicit)
          this->change(k, [&](int64_t i, int64_t v, Vec<T> c) {
            const Vec<T> x = load<T>(at(k, v / L) + (i - k * L) * L);
            return x * (both - scale * c + of_block.move[i] + load<T>(of_lane.move + v));
          });
        else
          this->change(k, [&](int64_t i, int64_t v, Vec<T> c) { return both * this->plan(i, v, c); });
        this->write(p.grad_cost, k);
      }
    }
    weight_gradients(implicit, apart);
  }

  void nothing() {
    std::memset(buffer, 0, size_t(L * ld) * sizeof(T));
    for (int64_t k = 0; k < blocks && p.grad_cost.data; ++k) this->write(p.grad_cost, k);
    for (int64_t i = 0; i < p.n && p.grad_a; ++i) p.grad_a[q * p.n + i] = 0;
    for (int64_t j = 0; j < p.m && p.grad_b; ++j) p.grad_b[q * p.m + j] = 0;
  }

  void weight_gradients(bool implicit, double apart) {
    const double a = this->mass_a.sum, b = this->mass_b.sum, eps = double(p.eps), rho = double(p.rho);
    const auto through = [&](const Side<T>& s, const Extra& e, const T* given, int64_t i) {
      const double upstream = given ? double(given[q * s.size + i]) : 0;
      return eps * (double(tau) * double(e.mass[i]) * double(e.move[i]) - upstream) / double(s.w[i]);
    };
    // What fixes the free direction answers to masses that move apart; equal ones do not see it.
    const double uneven = p.unbalanced ? 0 : apart * eps / (b * b);
    const auto share = [](const Side<T>& s, const Extra& e, int64_t i) { return double(e.mass[i]) / double(s.w[i]); };
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
