// Gradients of solved problems on NVIDIA GPUs, a block of threads for each: the envelope, and through the potentials by
// the implicit function theorem. The maths is that of ot_bwd_cpu.h.
#include "batched_ot/ot_block_cuda.h"

namespace pyml {
namespace {

template <class T, int G, int Q>
struct Gradient : OtBlock<T, G, Q> {
  using Base = OtBlock<T, G, Q>;
  using Base::a, Base::b, Base::c, Base::each, Base::ld, Base::m, Base::n, Base::q, Base::threads, Base::tid,
      Base::total;
  struct Extra {
    T *mass, *h, *move;  // sums of the plan, gradient of the potentials, solution of the system
  };
  T *f, *g;
  Extra rows, columns;
  T *inverse, *x;                                  // 1 / (tau row mass); of the last sweep
  T *residual, *direction, *image, *rhs, *scaled;  // of conjugate gradients, on the columns
  OtMass mass_a, mass_b;
  T value, transport;

  __device__ Gradient(const SinkhornCuda<T>& c, double* shared)
      : Base(c, shared),
        f(this->row_vector()),
        g(this->column_vector()),
        rows{this->row_vector(), this->row_vector(), this->row_vector()},
        columns{this->column_vector(), this->column_vector(), this->column_vector()},
        inverse(this->row_vector()),
        x(this->row_vector()),
        residual(this->column_vector()),
        direction(this->column_vector()),
        image(this->column_vector()),
        rhs(this->column_vector()),
        scaled(this->column_vector()) {}

  // --- the system --------------------------------------------------------------------------------------------------

  // The plan into the tile, its sums into mass, those of plan times cost into h.
  __device__ void plan_and_sums() const {
    this->load(c.cost, c.cost_lead, [&](int i, int j, T cost, T) { return this->plan(f, g, i, j, cost); });
    const auto entry = [](int, int, T e) { return e; };
    this->over_rows(T(0), Plus(), entry, [&](int i, T sum) { rows.mass[i] = sum; });
    this->over_columns(T(0), Plus(), entry, [&](int j, T sum) { columns.mass[j] = sum; });
    this->typed(c.cost, c.cost_lead, [&](const auto* cost) {
      const auto spent = [&](int i, int j, T e) {
        return this->live(i, j) ? e * T(up(cost[i * c.cost.stride_n + j * c.cost.stride_m])) : T(0);
      };
      this->over_rows(T(0), Plus(), spent, [&](int i, T sum) { rows.h[i] = sum; });
      this->over_columns(T(0), Plus(), spent, [&](int j, T sum) { columns.h[j] = sum; });
    });
  }

  // The gradients of the potentials, and their part along the direction in which balanced potentials are free.
  __device__ double potential_gradients() const {
    const auto side = [&](int size, const T* weight, T* h, const T* given) {
      return total(size, [&](int i) {
        h[i] = weight[i] > T(0) ? transport / c.eps * h[i] + given[q * size + i] : T(0);
        return double(h[i]);
      });
    };
    const double of_rows = side(n, a, rows.h, c.grad_f), of_columns = side(m, b, columns.h, c.grad_g);
    if (c.unbalanced) return 0;
    const double apart = of_rows - of_columns;
    each(m, [&](int j) { columns.h[j] += T(double(b[j]) * apart / mass_b.sum); });
    return apart;
  }

  // image = S y with S = tau c - P^T (tau r)^-1 P, the Schur complement on the columns.
  __device__ void schur(const T* y) const {
    this->sweep(
        y, x, [&](int i, T sum, bool) { return sum * inverse[i]; },
        [&](int j, T sum) { image[j] = c.stretch * columns.mass[j] * y[j] - sum; });
  }
  // residual / diagonal into `scaled`; their product. An entry whose plan has vanished does not move.
  __device__ double precondition() const {
    return total(m, [&](int j) {
      scaled[j] = b[j] > T(0) && columns.mass[j] > T(0) ? residual[j] / (c.stretch * columns.mass[j]) : T(0);
      return double(residual[j]) * double(scaled[j]);
    });
  }

  // Solves [tau r, P; P^T, tau c] (x; y) = h for `move` on both sides by conjugate gradients on the Schur complement,
  // whose condition is that of Sinkhorn's iteration itself. What rounding has left over is solved for once more.
  __device__ void solve() const {
    each(n, [&](int i) {
      inverse[i] = rows.mass[i] > T(0) ? T(1) / (c.stretch * rows.mass[i]) : T(0);
      x[i] = rows.h[i] * inverse[i];
    });
    this->over_columns(
        T(0), Plus(), [&](int i, int, T e) { return e * x[i]; },
        [&](int j, T sum) { rhs[j] = residual[j] = b[j] > T(0) ? columns.h[j] - sum : T(0); });
    each(ld, [&](int j) { columns.move[j] = direction[j] = T(0); });
    constexpr double kPrecision = sizeof(T) == 4 ? FLT_EPSILON : DBL_EPSILON;
    double start = 0;
    for (int round = 0; round < 2; ++round) {
      if (!c.unbalanced) {  // what rounding adds outside of the range of S
        const double left = total(m, [&](int j) { return double(residual[j]); });
        const double all = total(m, [&](int j) { return double(columns.mass[j]); });
        each(m, [&](int j) { residual[j] -= T(left / all * double(columns.mass[j])); });
      }
      double size = precondition();
      if (round == 0) start = size;
      each(m, [&](int j) { direction[j] = scaled[j]; });
      for (int64_t step = 0; step < 2 * int64_t(m) + 20 && size > kPrecision * kPrecision * start; ++step) {
        schur(direction);
        const double curvature = total(m, [&](int j) { return double(direction[j]) * double(image[j]); });
        if (!(curvature > 0)) break;
        const T alpha = T(size / curvature);
        each(m, [&](int j) { columns.move[j] += alpha * direction[j], residual[j] -= alpha * image[j]; });
        const double next = precondition();
        const T beta = T(next / size);
        each(m, [&](int j) { direction[j] = scaled[j] + beta * direction[j]; });
        size = next;
      }
      if (round == 0) {
        schur(columns.move);
        each(m, [&](int j) { residual[j] = b[j] > T(0) ? rhs[j] - image[j] : T(0); });
      }
    }
    this->over_rows(
        T(0), Plus(), [&](int, int j, T e) { return e * columns.move[j]; },
        [&](int i, T sum) { rows.move[i] = (rows.h[i] - sum) * inverse[i]; });
  }

  // As sum b g = 0 fixes the potentials, it fixes the solution.
  __device__ void pin(double apart) const {
    const double off = total(m, [&](int j) { return double(b[j]) * double(columns.move[j]); });
    const T shift = T((apart / mass_b.sum + off) / mass_b.sum);
    each(m, [&](int j) { columns.move[j] -= shift; });
    each(n, [&](int i) { rows.move[i] += shift; });
  }

  // --- results -----------------------------------------------------------------------------------------------------

  __device__ void cost_gradient(bool implicit) const {
    const T both = value + transport, scale = transport / c.eps;
    this->write(c.grad_cost, [&](int i, int j, T cost) {
      return implicit ? this->row(i)[j] * (both - scale * cost + rows.move[i] + columns.move[j])
                      : both * this->plan(f, g, i, j, cost);
    });
  }

  __device__ void weight_gradients(bool implicit, double apart) const {
    const double sum_a = mass_a.sum, sum_b = mass_b.sum, eps = double(c.eps), rho = double(c.rho);
    const double tau = double(c.stretch), uneven = c.unbalanced ? 0 : apart * eps / (sum_b * sum_b);
    const auto through = [&](const Extra& e, T weight, T given, int i) {
      return eps * (tau * double(e.mass[i]) * double(e.move[i]) - double(given)) / double(weight);
    };
    // What fixes the free direction answers to masses that move apart; equal ones do not see it.
    const auto share = [](const Extra& e, T weight, int i) { return double(e.mass[i]) / double(weight); };
    for (int i = tid; i < n && c.grad_a; i += threads) {
      const bool live = a[i] > T(0);
      double d = double(f[i]) + eps * (sum_b - 1);
      if (c.unbalanced && live) d = eps * (sum_b - share(rows, a[i], i)) + rho * (1 - share(rows, a[i], i));
      d *= double(value);
      if (implicit && live) d += through(rows, a[i], c.grad_f[q * n + i], i) - uneven * share(rows, a[i], i);
      c.grad_a[q * n + i] = live ? T(d) : T(0);
    }
    for (int j = tid; j < m && c.grad_b; j += threads) {
      const bool live = b[j] > T(0);
      double d = double(g[j]) + eps * (sum_a - 1);
      if (c.unbalanced) {
        const double kept = exp(-double(g[j]) / rho);
        d = eps * (sum_a - kept) + rho * (1 - kept);
      }
      d *= double(value);
      if (implicit && live) {
        d += through(columns, b[j], c.grad_g[q * m + j], j) + uneven * share(columns, b[j], j);
        if (!c.unbalanced) d += apart * (double(g[j]) - eps) / sum_b;
      }
      c.grad_b[q * m + j] = live ? T(d) : T(0);
    }
  }

  // Gradients of a problem without a solution are zero.
  __device__ void nothing() const {
    each(n, [&](int i) { a[i] = T(0); });  // nothing counts then
    if (c.grad_cost.data) this->write(c.grad_cost, [](int, int, T) { return T(0); });
    for (int i = tid; i < n && c.grad_a; i += threads) c.grad_a[q * n + i] = T(0);
    for (int j = tid; j < m && c.grad_b; j += threads) c.grad_b[q * m + j] = T(0);
  }

  __device__ bool moves() const {
    bool some = transport != T(0);
    for (int i = tid; i < n; i += threads) some |= c.grad_f[q * n + i] != T(0);
    for (int j = tid; j < m; j += threads) some |= c.grad_g[q * m + j] != T(0);
    return Base::block_any(some);
  }

  __device__ void run(int64_t problem) {
    q = problem;
    __syncthreads();  // the problem before is done with all vectors
    value = c.grad_value[q];
    transport = c.grad_transport[q];
    bool odd = false;
    for (int i = tid; i < n; i += threads) {
      f[i] = c.potential_f[q * n + i];
      odd |= !(fabs(double(f[i])) <= double(Trust<T>::kLargest));
    }
    for (int j = tid; j < ld; j += threads) g[j] = j < m ? c.potential_g[q * m + j] : T(0);
    mass_a = this->weights(c.a, n, a, n);
    mass_b = this->weights(c.b, m, b, ld);
    if (Base::block_any(odd) || !mass_a.any || !mass_b.any || mass_a.bad || mass_b.bad) return nothing();
    const bool implicit = c.implicit && moves();
    double apart = 0;
    if (implicit || (c.unbalanced && c.grad_a)) plan_and_sums();
    if (implicit) {
      apart = potential_gradients();
      solve();
      if (!c.unbalanced) pin(apart);
    }
    if (c.grad_cost.data) cost_gradient(implicit);
    weight_gradients(implicit, apart);
  }
};

template <class T, int G, int Q>
__global__ void __launch_bounds__(kOtThreads, 1) sinkhorn_solve_bwd_kernel(SinkhornCuda<T> c) {
  PYML_SHARED(double, shared);
  Gradient<T, G, Q> gradient(c, shared);
  gradient.each_problem([&](int64_t q) { gradient.run(q); });
}

template <class T>
cudaError_t run(const SinkhornCuda<T>& c, cudaStream_t stream) {
  return launch_by_shape<false>(c, stream, [](auto lanes, auto quads) {
    return sinkhorn_solve_bwd_kernel<T, decltype(lanes)::value, decltype(quads)::value>;
  });
}

}  // namespace

cudaError_t ot_cuda_gradient(const SinkhornCuda<float>& c, cudaStream_t stream) { return run(c, stream); }
cudaError_t ot_cuda_gradient(const SinkhornCuda<double>& c, cudaStream_t stream) { return run(c, stream); }

}  // namespace pyml
