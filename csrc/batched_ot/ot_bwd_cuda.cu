// Gradients of solved problems on NVIDIA GPUs, a block of threads for each: the envelope, and through the potentials by
// the implicit function theorem. The maths is that of ot_bwd_cpu.h.
#include "batched_ot/ot_system_cuda.h"

namespace pyml {
namespace {

template <class T, int G, int Q>
struct Gradient : OtSystem<T, G, Q> {
  using Base = OtSystem<T, G, Q>;
  using Base::a, Base::b, Base::c, Base::columns, Base::each, Base::f, Base::g, Base::ld, Base::m, Base::n, Base::q,
      Base::rows, Base::threads, Base::tid, Base::total;
  using Extra = typename Base::Extra;
  static constexpr bool kImplicit = sizeof(T) == 8;  // its host side asks for no other
  OtMass mass_a, mass_b;
  T value, transport;

  __device__ Gradient(const SinkhornCuda<T>& c, double* shared) : Base(c, shared) {}

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
    const bool implicit = kImplicit && c.implicit && moves();
    double apart = 0;
    if (implicit || (c.unbalanced && c.grad_a)) this->plan_and_sums();
    if constexpr (kImplicit) {
      if (implicit) {
        apart = potential_gradients();
        this->solve_system();
        if (!c.unbalanced) pin(apart);
      }
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
