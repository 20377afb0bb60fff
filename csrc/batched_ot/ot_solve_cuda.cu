// Sinkhorn on NVIDIA GPUs: a block of threads keeps one problem from its first iteration to its last. What happens is
// that of ot_solve_cpu.h: the matrix E = exp((f + g - C) / eps) of some potentials is only scaled while the scalings
// are moderate; then the potentials take them up; five iterations in which a sum loses its precision are done again as
// log-sum-exps. Nothing waits for the host, and nothing depends on batch-mates.
#include "batched_ot/ot_block_cuda.h"

namespace pyml {
namespace {

template <class T, int G, int Q>
struct Solver : OtBlock<T, G, Q> {
  using Base = OtBlock<T, G, Q>;
  using Limits = Trust<T>;
  using Base::a, Base::b, Base::c, Base::each, Base::inv2, Base::ld, Base::m, Base::n, Base::q, Base::threads,
      Base::tid, Base::to_pot, Base::total;
  T *f, *u, *x, *mass;   // potentials, scalings, a u, row sums of the plan
  T *g, *v, *y, *saved;  // y = b v; v before the last few iterations
  OtMass mass_a, mass_b;
  T low, high;  // scalings that this thread has seen in the last few iterations
  bool hidden;  // whether it has seen a sum past trust behind one of an unbalanced problem, which does not show it
  int failures = 0;

  __device__ Solver(const SinkhornCuda<T>& c, double* shared)
      : Base(c, shared),
        f(this->row_vector()),
        u(this->row_vector()),
        x(this->row_vector()),
        mass(this->row_vector()),
        g(this->column_vector()),
        v(this->column_vector()),
        y(this->column_vector()),
        saved(this->column_vector()) {}

  // --- log-sum-exps from costs in the tile -------------------------------------------------------------------------

  // Potentials from those of the other side; kHard: only the largest term of each sum.
  template <bool kHard>
  __device__ void update_rows() const {
    const auto exponent = [&](int, int j, T cost) { return b[j] > T(0) ? g[j] - cost : Limits::kLow; };
    this->over_rows(Limits::kLow, Larger(), exponent, [&](int i, T top) {
      mass[i] = top;
      if (kHard) f[i] = a[i] > T(0) ? -top : T(0);
    });
    if (kHard) return;
    this->over_rows(
        T(0), Plus(),
        [&](int i, int j, T cost) { return b[j] * exp2_bounded((exponent(i, j, cost) - mass[i]) * inv2); },
        [&](int i, T sum) { f[i] = a[i] > T(0) ? -c.damping * (mass[i] + to_pot * log2_of(sum)) : T(0); });
  }
  template <bool kHard>
  __device__ void update_columns() const {
    const auto exponent = [&](int i, int, T cost) { return a[i] > T(0) ? f[i] - cost : Limits::kLow; };
    this->over_columns(Limits::kLow, Larger(), exponent, [&](int j, T top) {
      y[j] = top;
      if (kHard) g[j] = b[j] > T(0) ? -top : T(0);
    });
    if (kHard) return;
    this->over_columns(
        T(0), Plus(), [&](int i, int j, T cost) { return a[i] * exp2_bounded((exponent(i, j, cost) - y[j]) * inv2); },
        [&](int j, T sum) { g[j] = b[j] > T(0) ? -c.damping * (y[j] + to_pot * log2_of(sum)) : T(0); });
  }

  // --- scalings of a fixed matrix ----------------------------------------------------------------------------------

  // Whether all costs that count are finite.
  __device__ bool load_costs() const {
    T odd = T(0);
    this->load(c.cost, c.cost_lead, [&](int, int, T cost, T) {
      odd += cost - cost;
      return cost;
    });
    return !Base::block_any(odd != T(0));
  }

  // Costs in the tile become E, with 1 where something is masked; the scalings begin at 1.
  __device__ void exponentials() const {
    this->every([&](int i, int j, T* e) {
      *e = this->live(i, j) ? exp2_flushed(((f[i] - *e) + g[j]) * inv2) : j < m ? T(1) : T(0);
    });
    each(n, [&](int i) { u[i] = T(1), x[i] = a[i]; });
    each(ld, [&](int j) { v[j] = T(1), y[j] = b[j]; });
  }

  __device__ void absorb(int size, const T* weight, const T* scaling, T* potential) const {
    each(size, [&](int i) {
      const T s = scaling[i] > Limits::kSmallest ? scaling[i] : Limits::kSmallest;
      if (weight[i] > T(0)) potential[i] += to_pot * log2_of(s);
    });
  }

  // Potentials below every cost, with a cost that they meet in each row and column: no sum of E can vanish then. The
  // scalings of the columns make up for what g is to begin with.
  __device__ void start() {
    failures = 0;
    each(ld, [&](int j) { g[j] = saved[j] = c.init && b[j] > T(0) ? c.init[q * m + j] : T(0); });
    update_rows<true>();
    update_columns<true>();
    exponentials();
    each(m, [&](int j) {
      v[j] = exp2_flushed((saved[j] - g[j]) * inv2);
      y[j] = b[j] * v[j];
    });
  }

  __device__ T scaling(T sum, T potential) {
    T s = T(1) / sum;
    if (c.unbalanced) {
      s = exp2_bounded(-c.damping * log2_of(sum) - (T(1) - c.damping) * inv2 * potential);
      hidden |= !(sum <= Limits::kHard && sum >= T(1) / Limits::kHard);
    }
    low = s < low ? s : low;
    high = s <= high ? high : s;  // a NaN too, and the last scaling is one if any before it was
    return s;
  }

  __device__ void iterate() {
    this->sweep(
        y, x,
        [&](int i, T sum, bool writes) {
          const T s = scaling(sum, f[i]), xi = a[i] * s;
          if (writes) u[i] = s, x[i] = xi;
          return xi;
        },
        [&](int j, T sum) {
          const T s = scaling(sum, g[j]);
          v[j] = s;
          y[j] = b[j] * s;
        });
  }
  __device__ bool beyond(T limit) const { return Base::block_any(!(high <= limit && low >= T(1) / limit)); }

  __device__ void iterations(int64_t count) {
    low = high = T(1), hidden = false;
    each(m, [&](int j) { saved[j] = v[j]; });
    const bool scale = failures < 3;
    for (int64_t k = 0; k < count && scale; ++k) iterate();
    const bool untrue = c.unbalanced && Base::block_any(hidden);
    if (scale && !untrue && !beyond(Limits::kSoft)) return;
    const bool lost = !scale || untrue || beyond(Limits::kHard);
    if (!lost) absorb(n, a, u, f);
    absorb(m, b, lost ? saved : v, g);
    load_costs();
    if (lost) {
      ++failures;
      for (int64_t k = 0; k < count; ++k) {
        update_rows<false>();
        update_columns<false>();
      }
    }
    exponentials();
  }

  // --- results -----------------------------------------------------------------------------------------------------

  // Sums of the plan's rows, times `factor` of each entry of the plan.
  template <class Factor>
  __device__ void plan_rows(const Factor& factor) const {
    this->over_rows(
        T(0), Plus(), [&](int i, int j, T e) { return e * y[j] * factor(i, j); },
        [&](int i, T sum) { mass[i] = sum * x[i]; });
  }
  __device__ void row_masses() const {
    plan_rows([](int, int) { return T(1); });
  }

  // L1 distance of the row masses from what they should be.
  __device__ double error() const {
    return total(n, [&](int i) {
      double wanted = double(a[i]);
      if (c.unbalanced) wanted *= exp(-(double(f[i]) + double(to_pot) * log2(double(u[i]))) / double(c.rho));
      return fabs(double(mass[i]) - wanted);
    });
  }

  __device__ double transport_cost() const {
    this->typed(c.cost, c.cost_lead, [&](const auto* cost) {
      plan_rows([&](int i, int j) {
        return this->live(i, j) ? T(up(cost[i * c.cost.stride_n + j * c.cost.stride_m])) : T(0);
      });
    });
    return total(n, [&](int i) { return double(mass[i]); });
  }

  __device__ void finish(int64_t n_iter, bool stopped) const {
    const double transport = transport_cost();
    row_masses();
    const bool late = c.stops && !stopped && !(error() <= double(c.tol));
    absorb(n, a, u, f);
    absorb(m, b, v, g);
    const double sum_a = mass_a.sum, sum_b = mass_b.sum, rho = double(c.rho);
    const double shift = c.unbalanced ? 0 : total(m, [&](int j) { return double(b[j]) * double(g[j]); }) / sum_b;
    double value = total(n, [&](int i) {
      const double w = double(a[i]), r = double(mass[i]), pot = w > 0 ? double(f[i]) + shift : 0;
      c.f[q * n + i] = T(pot);
      c.row_mass[q * n + i] = T(r);
      const double term = pot * r - double(c.eps) * r;
      return c.unbalanced && w > 0 ? term + rho * ((r > 0 ? r * log(r / w) : 0) - r + w) : term;
    });
    value += total(m, [&](int j) {
      const double w = double(b[j]), pot = w > 0 ? double(g[j]) - shift : 0;
      c.g[q * m + j] = T(pot);
      return c.unbalanced ? rho * (w - w * exp(-pot / rho)) : pot * w;
    });
    if (tid != 0) return;
    const double apart = fabs(sum_a - sum_b), larger = sum_a > sum_b ? sum_a : sum_b;
    const bool unequal = !c.unbalanced && apart > double(c.mass_tolerance) * larger;
    c.value[q] = T(value + double(c.eps) * sum_a * sum_b);
    c.transport[q] = T(transport);
    c.n_iter[q] = int32_t(n_iter);
    c.status[q] = (late ? kNotConverged : 0) | (unequal ? kUnequalMasses : 0);
  }

  // The results of a problem without a solution: zeros where there is nothing to transport, NaN where numbers are bad.
  __device__ void no_solution(bool bad) const {
    const T fill = bad ? T(NAN) : T(0);
    for (int i = tid; i < n; i += threads) c.f[q * n + i] = c.row_mass[q * n + i] = fill;
    for (int j = tid; j < m; j += threads) c.g[q * m + j] = fill;
    if (tid != 0) return;
    c.value[q] = c.transport[q] = fill;
    c.n_iter[q] = 0;
    c.status[q] = bad ? kBadNumbers : 0;
  }

  __device__ bool bad_start() const {
    bool bad = false;
    for (int j = tid; j < m && c.init; j += threads)
      bad |= b[j] > T(0) && !(fabs(double(c.init[q * m + j])) <= double(Limits::kLargest));
    return Base::block_any(bad);
  }

  __device__ void solve(int64_t problem) {
    q = problem;
    __syncthreads();  // the problem before is done with all vectors
    mass_a = this->weights(c.a, n, a, n);
    mass_b = this->weights(c.b, m, b, ld);
    const bool empty = !mass_a.any || !mass_b.any, bad = mass_a.bad || mass_b.bad || bad_start() || !load_costs();
    if (bad || empty) return no_solution(bad);
    start();
    int64_t done = 0;
    bool stopped = false;
    while (done < c.max_iter && !stopped) {
      const int64_t left = c.max_iter - done, count = left < kCheckEvery ? left : kCheckEvery;
      iterations(count);
      done += count;
      if (c.stops && done < c.max_iter) {
        row_masses();
        stopped = error() <= double(c.tol);
      }
    }
    finish(done, stopped);
  }
};

// So few registers that all problems of a batch of small ones are under way at once.
constexpr int blocks_at_once(int lanes) { return lanes == 1 ? 3 : lanes < 32 ? 2 : 1; }

template <class T, int G, int Q>
__global__ void __launch_bounds__(kOtThreads, blocks_at_once(G)) sinkhorn_solve_fwd_kernel(SinkhornCuda<T> c) {
  PYML_SHARED(double, shared);
  Solver<T, G, Q> solver(c, shared);
  solver.each_problem([&](int64_t q) { solver.solve(q); });
}

template <class T>
cudaError_t run(const SinkhornCuda<T>& c, cudaStream_t stream) {
  return launch_by_shape<true>(c, stream, [](auto lanes, auto quads) {
    return sinkhorn_solve_fwd_kernel<T, decltype(lanes)::value, decltype(quads)::value>;
  });
}

}  // namespace

cudaError_t ot_cuda_solve(const SinkhornCuda<float>& c, cudaStream_t stream) { return run(c, stream); }
cudaError_t ot_cuda_solve(const SinkhornCuda<double>& c, cudaStream_t stream) { return run(c, stream); }

}  // namespace pyml
