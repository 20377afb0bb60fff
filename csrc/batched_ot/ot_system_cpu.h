// The linear system behind the implicit gradient, [tau r, P; P^T, tau c] (x; y) = h, through its Schur complement on
// the smaller side. All in double: where Sinkhorn converges slowly the system is nearly singular, and it is consistent
// only as far as the sums r and c are those of P.
#pragma once
#include "batched_ot/ot_plan_cpu.h"
#include "common/gemm_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

// A symmetric matrix by its upper triangle, kept negated, so that what is taken away is added: rows of `ld` numbers.
// Its Cholesky factor takes its place.
struct Cholesky {
  static constexpr int L = kLanes<double>;
  static constexpr int64_t kPanel = 32;
  int64_t size, ld;
  double *s, *inverse,
      *diagonal;  // [size][ld]; of the factor's diagonal; of the matrix, before anything was taken away

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t scratch(int64_t size) { return (size + 2) * padded(size); }
  Cholesky(int64_t size, double* memory) : size(size), ld(padded(size)), s(memory) {
    inverse = s + size * ld;
    diagonal = inverse + ld;
    std::memset(s, 0, size_t(size * ld) * sizeof(double));
  }
  double* row(int64_t i) const { return s + i * ld; }

  // The matrix less W^T W, from row `from` on; W is [count][ld].
  void take(const double* w, int64_t count, int64_t from = 0) const {
    for (int64_t i = from; i < size; i += kPanel)
      gemm_add<double>(size - i < kPanel ? size - i : kPanel, ld - i, count, w + i, 1, ld, w + i, ld, row(i) + i, ld);
  }

  // A pivot below the rounding of what the system was made from leaves its direction undetermined: it gets 0.
  void factorise(double rounding) const {
    for (int64_t p = 0; p < size; p += kPanel) {
      const int64_t end = size - p < kPanel ? size : p + kPanel;
      for (int64_t j = p; j < end; ++j) {
        const double pivot = -row(j)[j];
        inverse[j] = pivot > rounding * diagonal[j] ? 1 / std::sqrt(pivot) : 0;
        scale_row(j, -inverse[j]);
        std::memset(row(j) + j / L * L, 0, size_t(j % L) * sizeof(double));  // below the diagonal
        for (int64_t i = j + 1; i < end; ++i) add_row(j, row(j)[i], row(i), i);
      }
      take(row(p), end - p, end);
    }
  }
  void scale_row(int64_t j, double factor) const {
    for (int64_t i = j / L * L; i < ld; i += L) store<double>(row(j) + i, load<double>(row(j) + i) * factor);
  }
  void add_row(int64_t j, double factor, double* to, int64_t from) const {
    for (int64_t i = from / L * L; i < ld; i += L)
      store<double>(to + i, load<double>(to + i) + factor * load<double>(row(j) + i));
  }

  // x = the solution for the right hand side that stands there; zeros beyond `size`.
  void solve(double* x) const {
    for (int64_t j = 0; j < size; ++j) {
      const double z = x[j] * inverse[j];
      add_row(j, -z, x, j);
      x[j] = z;
    }
    for (int64_t j = size - 1; j >= 0; --j) {
      double rest = x[j];
      for (int64_t i = j + 1; i < size; ++i) rest -= row(j)[i] * x[i];
      x[j] = rest * inverse[j];
    }
  }
};

template <class T>
struct System : Plan<T> {
  using Base = Plan<T>;
  using Base::at, Base::block, Base::blocks, Base::buffer, Base::L, Base::lane, Base::ld, Base::p, Base::q, Base::rows,
      Base::swapped, Base::vectors;
  static constexpr int kWide = kLanes<double>, kParts = L / kWide;
  static constexpr int64_t kStrip = 64, kSteps = 24, kMostSteps = 500;
  struct Extra {
    double *mass, *h, *move;  // sums of the plan, right hand side, solution; [padded]
  } of_block, of_lane;
  const double tau;
  const bool lanes_few;  // the smaller side is in the lanes
  double* memory;        // of the methods

  // Whether `plan_and_sums` may be called: it needs the tiles.
  static bool with_tiles(const SinkhornParams<T>& p) { return p.implicit || (p.unbalanced && p.grad_a); }
  static int64_t scratch(const SinkhornParams<T>& p) {
    const int64_t n = Base::padded(p.n), m = Base::padded(p.m), few = n < m ? n : m;
    const int64_t dense = Cholesky::scratch(few) + kStrip * Cholesky::padded(few);
    const int64_t doubles = 5 * (n + m) + 4 * few + (p.implicit && few <= kDenseSystem + L ? dense : 0);
    return Base::scratch(p, with_tiles(p)) + doubles * int64_t(sizeof(double) / sizeof(T));
  }
  System(const SinkhornParams<T>& p, int64_t q, T* given)
      : Base(p, q, given), tau(double(p.tau())), lanes_few(lane.size <= block.size) {
    memory = reinterpret_cast<double*>(given + Base::scratch(p, with_tiles(p)));
    const auto take = [&](int64_t n) {
      double* at = memory;
      memory += n;
      return at;
    };
    of_block = {take(block.padded), take(block.padded), take(block.padded)};
    of_lane = {take(ld), take(ld), take(ld)};
  }
  Extra& of_rows() { return swapped ? of_lane : of_block; }
  Extra& of_columns() { return swapped ? of_block : of_lane; }
  Extra& of_few() { return lanes_few ? of_lane : of_block; }
  Extra& of_many() { return lanes_few ? of_block : of_lane; }
  const Side<T>& few() const { return lanes_few ? lane : block; }
  const Side<T>& many() const { return lanes_few ? block : lane; }

  // The plan into the tiles, its sums into mass, those of plan times cost into h.
  void plan_and_sums() {
    for (double* t : {of_lane.mass, of_lane.h}) std::memset(t, 0, size_t(ld) * sizeof(double));
    const auto more = [](double* sum, const Vec<double>& v) { store<double>(sum, load<double>(sum) + v); };
    for (int64_t k = 0; k < blocks; ++k) {
      this->read(p.cost, k);
      for (int64_t i = 0; i < L; ++i) {
        Vec<double> mass = {}, spent = {};
        for (int64_t v = 0; v < vectors; ++v) {
          const T* cost = buffer + i * ld + v * L;
          T* plan = at(k, v) + i * L;
          store<T>(plan, this->plan(k * L + i, v * L, load<T>(cost)));
          for (int h = 0; h < L; h += kWide) {
            const Vec<double> x = widened<T>(plan + h), paid = x * widened<T>(cost + h);
            mass += x, spent += paid;
            more(of_lane.mass + v * L + h, x), more(of_lane.h + v * L + h, paid);
          }
        }
        of_block.mass[k * L + i] = sum<double>(mass);
        of_block.h[k * L + i] = sum<double>(spent);
      }
    }
  }

  // The plan times a vector of the lane side, and its transpose times one of the block side.
  void times_lane(const double* x, double* to) const {
    for (int64_t k = 0; k < blocks; ++k)
      for (int i = 0; i < L; i += 4) {
        Vec<double> sums[4] = {};
        for (int64_t v = 0; v < vectors; ++v)
          for (int h = 0; h < L; h += kWide) {
            const Vec<double> xs = load<double>(x + v * L + h);
#pragma GCC unroll 4
            for (int r = 0; r < 4 && r < L; ++r)
              if (i + r < L) sums[r] += widened<T>(at(k, v) + (i + r) * L + h) * xs;
          }
        for (int r = 0; r < 4 && i + r < L; ++r) to[k * L + i + r] = sum<double>(sums[r]);
      }
  }
  void times_block(const double* x, double* to) const {
    std::memset(to, 0, size_t(ld) * sizeof(double));
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t v = 0; v < vectors; ++v)
        for (int h = 0; h < L; h += kWide) {
          Vec<double> sums = load<double>(to + v * L + h);
          for (int i = 0; i < L; ++i) sums += x[k * L + i] * widened<T>(at(k, v) + i * L + h);
          store<double>(to + v * L + h, sums);
        }
  }
  void to_many(const double* x, double* to) const { lanes_few ? times_lane(x, to) : times_block(x, to); }
  void to_few(const double* x, double* to) const { lanes_few ? times_block(x, to) : times_lane(x, to); }

  // 1 / (tau mass), where there is some.
  double over(double mass) const { return mass > 0 ? 1 / (tau * mass) : 0; }
  double product(const double* x, const double* y) const {
    double total = 0;
    for (int64_t i = 0; i < few().size; ++i) total += x[i] * y[i];
    return total;
  }

  // Conjugate gradients for the right hand side b, preconditioned by the diagonal: few steps where Sinkhorn itself
  // converges. Whether it got there.
  bool iterate(const double* b, int64_t steps, double* x) {
    const int64_t n = few().padded;
    double *residual = memory, *ready = residual + n, *direction = ready + n, *image = direction + n, *wide = image + n;
    const double* mass = of_few().mass;
    constexpr double kPrecision = std::is_same_v<T, float> ? 1e-9 : 1e-13;
    std::memcpy(residual, b, size_t(n) * sizeof(double));
    std::memset(x, 0, size_t(n) * sizeof(double));
    const auto prepare = [&] {
      for (int64_t i = 0; i < n; ++i) ready[i] = residual[i] * over(mass[i]);
      return product(residual, ready);
    };
    double size = prepare();
    const double enough = kPrecision * kPrecision * size;
    std::memcpy(direction, ready, size_t(n) * sizeof(double));
    for (int64_t step = 0; step < steps && size > enough; ++step) {
      to_many(direction, wide);
      for (int64_t i = 0; i < many().padded; ++i) wide[i] *= over(of_many().mass[i]);
      to_few(wide, image);
      for (int64_t i = 0; i < n; ++i) image[i] = tau * mass[i] * direction[i] - image[i];
      const double curvature = product(direction, image);
      if (!(curvature > 0)) return false;
      const double alpha = size / curvature;
      for (int64_t i = 0; i < n; ++i) x[i] += alpha * direction[i], residual[i] -= alpha * image[i];
      const double next = prepare();
      for (int64_t i = 0; i < n; ++i) direction[i] = ready[i] + next / size * direction[i];
      size = next;
    }
    return size <= enough;
  }

  // Rows [first, first + count) of W: the plan divided by the roots of tau and of the sums over the smaller side.
  void fill(int64_t first, int64_t count, double* strip, const Cholesky& c) const {
    double factor[kStrip];
    for (int64_t i = 0; i < count; ++i) factor[i] = std::sqrt(over((lanes_few ? of_block : of_lane).mass[first + i]));
    if (lanes_few) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < c.ld; j += kWide)
          store<double>(strip + i * c.ld + j,
                        factor[i] * widened<T>(at((first + i) / L, j / L) + (first + i) % L * L + j % L));
      return;
    }
    std::memset(strip, 0, size_t(count * c.ld) * sizeof(double));
    for (int64_t i = 0; i < count; i += L)
      for (int64_t j = 0; j < c.size; ++j) {
        const T* e = at(j / L, (first + i) / L) + j % L * L;
        for (int l = 0; l < L; ++l) strip[(i + l) * c.ld + j] = factor[i + l] * double(e[l]);
      }
  }

  // The same by factorisation.
  void eliminate(const double* b, double* x) {
    const double* mass = of_few().mass;
    Cholesky c(few().size, memory);
    double *strip = memory + Cholesky::scratch(few().size), all = 0;
    for (int64_t i = 0; i < c.size; ++i) all += mass[i];
    for (int64_t i = 0; i < c.size; ++i) {
      c.row(i)[i] = -(c.diagonal[i] = tau * mass[i]);
      if (p.unbalanced || !(all > 0)) continue;  // the free direction of a balanced problem: some multiple is as good
      for (int64_t j = i; j < c.size; ++j) c.row(i)[j] -= mass[i] * mass[j] / all;
    }
    for (int64_t first = 0; first < many().padded; first += kStrip) {
      const int64_t count = many().padded - first < kStrip ? many().padded - first : kStrip;
      fill(first, count, strip, c);
      c.take(strip, count);
    }
    c.factorise(std::is_same_v<T, float> ? 1e-6 : 1e-13);
    double* const work = strip;
    std::memset(work, 0, size_t(c.ld) * sizeof(double));
    std::memcpy(work, b, size_t(c.size) * sizeof(double));
    c.solve(work);
    std::memset(x, 0, size_t(few().padded) * sizeof(double));
    std::memcpy(x, work, size_t(c.size) * sizeof(double));
  }

  // `move` on both sides. False where neither way led to the end: only above kDenseSystem.
  bool solve() {
    Extra &x = of_few(), &y = of_many();
    double *const b = memory, *const wide = b + few().padded;
    memory = wide + many().padded;
    for (int64_t i = 0; i < many().padded; ++i) wide[i] = y.h[i] * over(y.mass[i]);
    to_few(wide, b);
    double left = 0, all = 0;
    for (int64_t i = 0; i < few().padded; ++i) {
      b[i] = x.mass[i] > 0 ? x.h[i] - b[i] : 0;
      left += b[i], all += x.mass[i];
    }
    for (int64_t i = 0; i < few().padded && !p.unbalanced && all > 0; ++i) b[i] -= left / all * x.mass[i];
    const bool dense = few().size <= kDenseSystem;
    bool solved = !(dense && few().size <= kStrip) && iterate(b, dense ? kSteps : kMostSteps, x.move);
    if (!solved && dense) {
      eliminate(b, x.move);
      solved = true;
    }
    to_many(x.move, wide);
    for (int64_t i = 0; i < many().padded; ++i) y.move[i] = (y.h[i] - wide[i]) * over(y.mass[i]);
    return solved;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
