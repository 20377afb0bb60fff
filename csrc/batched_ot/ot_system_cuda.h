// The linear system behind the implicit gradient on NVIDIA GPUs, a block of threads for each problem. As
// ot_system_cpu.h has it, in double: by conjugate gradients where a few steps suffice, else by a factorisation on the
// smaller side.
#pragma once
#include "batched_ot/ot_block_cuda.h"

namespace pyml {

template <class T, int G, int Q>
struct OtSystem : OtBlock<T, G, Q> {
  using Base = OtBlock<T, G, Q>;
  using Base::a, Base::b, Base::c, Base::each, Base::ld, Base::m, Base::n, Base::q, Base::threads, Base::tid,
      Base::total;
  static constexpr int kSteps = 24;
  static constexpr double kPrecision = 1e-13;
  struct Extra {
    T *mass, *h, *move;  // sums of the plan, gradient of the potentials, solution of the system
  };
  T *f, *g;
  Extra rows, columns;
  T *inverse, *x;                                  // 1 / (tau row mass); of the last sweep
  T *residual, *direction, *image, *rhs, *scaled;  // of the methods, on the columns

  __device__ OtSystem(const SinkhornCuda<T>& c, double* shared)
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

  // The plan times a vector of the columns, and its transpose times one of the rows: done(index, sum).
  template <class Done>
  __device__ void times_columns(const T* y, const Done& done) const {
    this->over_rows(T(0), Plus(), [&](int, int j, T e) { return e * y[j]; }, done);
  }
  template <class Done>
  __device__ void times_rows(const T* y, const Done& done) const {
    this->over_columns(T(0), Plus(), [&](int i, int, T e) { return e * y[i]; }, done);
  }
  __device__ T over(T mass) const { return mass > T(0) ? T(1) / (c.stretch * mass) : T(0); }

  // What rounding adds to the right hand side of a balanced problem outside of the range of the system.
  __device__ void project(int size, const T* mass, T* right) const {
    if (c.unbalanced) return;
    const double left = total(size, [&](int i) { return double(right[i]); });
    const double all = total(size, [&](int i) { return double(mass[i]); });
    each(size, [&](int i) { right[i] -= all > 0 ? T(left / all * double(mass[i])) : T(0); });
  }

  // residual / diagonal into `scaled`; their product. An entry whose plan has vanished does not move.
  __device__ double precondition() const {
    return total(m, [&](int j) {
      scaled[j] = residual[j] * over(columns.mass[j]);
      return double(residual[j]) * double(scaled[j]);
    });
  }

  // columns.move by conjugate gradients with S = tau c - P^T (tau r)^-1 P, the Schur complement on the columns, whose
  // condition is that of Sinkhorn's iteration itself. Whether they got there.
  __device__ bool iterate(int64_t steps) const {
    each(n, [&](int i) { x[i] = rows.h[i] * inverse[i]; });
    times_rows(x, [&](int j, T sum) { residual[j] = columns.mass[j] > T(0) ? columns.h[j] - sum : T(0); });
    each(ld, [&](int j) { columns.move[j] = direction[j] = T(0); });
    project(m, columns.mass, residual);
    double size = precondition();
    const double enough = kPrecision * kPrecision * size;
    each(m, [&](int j) { direction[j] = scaled[j]; });
    for (int64_t step = 0; step < steps && size > enough; ++step) {
      this->sweep(
          direction, x, [&](int i, T sum, bool) { return sum * inverse[i]; },
          [&](int j, T sum) { image[j] = c.stretch * columns.mass[j] * direction[j] - sum; });
      const double curvature = total(m, [&](int j) { return double(direction[j]) * double(image[j]); });
      if (!(curvature > 0)) return false;
      const T alpha = T(size / curvature);
      each(m, [&](int j) { columns.move[j] += alpha * direction[j], residual[j] -= alpha * image[j]; });
      const double next = precondition();
      const T beta = T(next / size);
      each(m, [&](int j) { direction[j] = scaled[j] + beta * direction[j]; });
      size = next;
    }
    return size <= enough;
  }

  // `move` of both sides by the Cholesky factor of the Schur complement on the smaller one, its lower triangle row by
  // row. A pivot below the rounding of what the system was made from leaves its direction undetermined: it gets 0.
  __device__ void eliminate() const {
    const bool narrow = m <= n;
    const int few = narrow ? m : n, many = narrow ? n : m;
    const auto side = [&](bool of_columns) {  // by value: a reference to one of them would put all into local memory
      return Extra{of_columns ? columns.mass : rows.mass, of_columns ? columns.h : rows.h,
                   of_columns ? columns.move : rows.move};
    };
    const Extra of = side(narrow), other = side(!narrow);
    T *const weight = narrow ? inverse : image, *const spread = narrow ? x : direction, *const pivots = scaled;
    T* const s = this->system();
    const auto row_of = [](int i) { return int64_t(i) * (i + 1) / 2; };
    const auto entry = [&](int i, int t) { return narrow ? this->row(t)[i] : this->row(i)[t]; };
    each(narrow ? n : ld, [&](int t) {  // rows of the plan are read with their padding
      weight[t] = t < many ? over(other.mass[t]) : T(0);
      spread[t] = t < many ? other.h[t] * weight[t] : T(0);
    });
    const auto right = [&](int i, T sum) { rhs[i] = of.mass[i] > T(0) ? of.h[i] - sum : T(0); };
    narrow ? times_rows(spread, right) : times_columns(spread, right);
    project(few, of.mass, rhs);
    const double all = c.unbalanced ? 0 : total(few, [&](int i) { return double(of.mass[i]); });
    for (int at = tid; at < few * few; at += threads) {
      const int i = at / few, j = at % few;
      if (j > i) continue;
      T sum = i == j ? c.stretch * of.mass[i] : T(0);
      for (int t = 0; t < many; ++t) sum -= entry(i, t) * weight[t] * entry(j, t);
      if (all > 0) sum += of.mass[i] * of.mass[j] / T(all);  // the free direction: some multiple is as good
      s[row_of(i) + j] = sum;
    }
    __syncthreads();
    for (int j = 0; j < few; ++j) {
      const T pivot = s[row_of(j) + j], least = T(kPrecision) * c.stretch * of.mass[j];
      const T root = pivot > least ? T(1) / sqrt(pivot) : T(0);
      __syncthreads();  // all have read it
      if (tid == 0) pivots[j] = root;
      for (int i = j + tid; i < few; i += threads) s[row_of(i) + j] *= root;
      __syncthreads();
      const int left = few - j - 1;
      for (int at = tid; at < left * left; at += threads) {
        const int i = j + 1 + at / left, k = j + 1 + at % left;
        if (k <= i) s[row_of(i) + k] -= s[row_of(i) + j] * s[row_of(k) + j];
      }
      __syncthreads();
    }
    const auto substitute = [&](int j, int first, int last, bool down) {
      const T found = rhs[j] * pivots[j];
      __syncthreads();
      if (tid == 0) rhs[j] = found;
      for (int i = first + tid; i < last; i += threads) rhs[i] -= (down ? s[row_of(i) + j] : s[row_of(j) + i]) * found;
      __syncthreads();
    };
    for (int j = 0; j < few; ++j) substitute(j, j + 1, few, true);
    for (int j = few - 1; j >= 0; --j) substitute(j, 0, j, false);
    each(narrow ? ld : n, [&](int i) { of.move[i] = i < few ? rhs[i] : T(0); });
    const auto others = [&](int t, T sum) { other.move[t] = (other.h[t] - sum) * weight[t]; };
    narrow ? times_columns(of.move, others) : times_rows(of.move, others);
  }

  // Solves [tau r, P; P^T, tau c] (x; y) = h for `move` on both sides.
  __device__ void solve_system() const {
    const int few = n < m ? n : m;
    const bool dense = few <= kDenseSystem;
    each(n, [&](int i) { inverse[i] = over(rows.mass[i]); });
    if (!(dense && few <= kOtDirect) && (iterate(dense ? kSteps : 2 * int64_t(m) + 20) || !dense))
      times_columns(columns.move, [&](int i, T sum) { rows.move[i] = (rows.h[i] - sum) * inverse[i]; });
    else
      eliminate();
  }
};

}  // namespace pyml
