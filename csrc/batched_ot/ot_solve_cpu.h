// Sinkhorn on one problem. The matrix E = exp((f + g - C) / eps) of some potentials is kept fixed and only scaled,
// which takes no exp, while the scalings are moderate; else the potentials take them up and E is made again. Five
// iterations in which a sum loses its precision are done again as true log-sum-exps. What happens depends on the
// problem alone, never on its batch-mates.
#pragma once
#include "batched_ot/ot_tiles_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Solver : Tiles<T> {
  using Base = Tiles<T>;
  using Base::at, Base::block, Base::blocks, Base::columns, Base::inv2, Base::L, Base::lane, Base::ld, Base::p, Base::q,
      Base::rows, Base::swapped, Base::tile, Base::to_pot, Base::vectors;
  const T damp;
  static constexpr T kSmallestScale = std::numeric_limits<T>::min();  // doubles are trusted far below floats
  T* saved;  // scalings of the columns before the last few iterations
  int failures = 0;

  static int64_t scratch(const SinkhornParams<T>& p) { return Base::scratch(p) + Base::padded(p.m); }
  Solver(const SinkhornParams<T>& p, int64_t q, T* memory)
      : Base(p, q, memory), damp(p.damp()), saved(memory + Base::scratch(p)) {}

  // --- log-sum-exps from costs in the tiles
  // ---------------------------------------------------------------------------

  static constexpr T kLow = std::numeric_limits<T>::lowest() / 4;

  PYML_INLINE Vec<T> exponent(int64_t v, const T* c, const Vec<T>& shift) const {
    const Vec<T> d = load<T>(lane.pot + v * L) - load<T>(c) - shift;
    return load<T>(lane.w + v * L) > T(0) ? d : splat<T>(kLow);
  }
  PYML_INLINE void set_potential(Side<T>& side, int64_t i, const Vec<T>& potential) {
    store<T>(side.pot + i, load<T>(side.w + i) > T(0) ? potential : Vec<T>{});
  }

  // Potentials of the block side from those of the lanes; kHard: only the largest term of each sum.
  template <bool kHard>
  void update_block() {
    for (int64_t k = 0; k < blocks; ++k) {
      T top[L], total[L];
      for (int i = 0; i < L; ++i) {
        Vec<T> best = splat<T>(kLow), sums = {};
        for (int64_t v = 0; v < vectors; ++v) best = max<T>(best, exponent(v, at(k, v) + i * L, Vec<T>{}));
        top[i] = kLow;
        for (int l = 0; l < L; ++l) top[i] = best[l] > top[i] ? best[l] : top[i];
        for (int64_t v = 0; v < vectors && !kHard; ++v)
          sums += load<T>(lane.w + v * L) * exp2_bounded<T>(exponent(v, at(k, v) + i * L, splat<T>(top[i])) * inv2);
        total[i] = kHard ? T(1) : sum<T>(sums);
      }
      const Vec<T> found = -(load<T>(top) + to_pot * log2_fast<T>(load<T>(total)));
      set_potential(block, k * L, kHard ? found : damp * found);
    }
  }

  template <bool kHard>
  void update_lane() {
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> best = splat<T>(kLow), total = {};
      const auto each = [&](auto&& f) {
        for (int64_t k = 0; k < blocks; ++k)
          for (int i = 0; i < L; ++i)
            if (block.w[k * L + i] > 0) f(block.pot[k * L + i] - load<T>(at(k, v) + i * L), block.w[k * L + i]);
      };
      each([&](Vec<T> d, T) { best = max<T>(best, d); });
      if (!kHard) each([&](Vec<T> d, T w) { total += w * exp2_bounded<T>((d - best) * inv2); });
      const Vec<T> found = -(best + to_pot * log2_fast<T>(kHard ? splat<T>(T(1)) : total));
      set_potential(lane, v * L, kHard ? found : damp * found);
    }
  }

  template <bool kHard>
  void log_step() {
    if (swapped) {
      update_lane<kHard>();
      update_block<kHard>();
    } else {
      update_block<kHard>();
      update_lane<kHard>();
    }
  }

  // --- scalings of a fixed matrix
  // -------------------------------------------------------------------------------------

  // Costs in the tiles become E, with 1 where something is masked; the scalings begin at 1.
  void exponentials() {
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<T> pv = load<T>(lane.pot + v * L);
        const IVec<T> live = load<T>(lane.w + v * L) > T(0);
        for (int i = 0; i < L; ++i) {
          T* e = at(k, v) + i * L;
          const Vec<T> x = ((block.pot[k * L + i] - load<T>(e)) + pv) * inv2;
          const IVec<T> here = block.w[k * L + i] > 0 ? live : IVec<T>{};
          store<T>(e, here ? exp2_flushed<T>(x) : splat<T>(T(1)));
        }
      }
    for (Side<T>* side : {&block, &lane})
      for (int64_t i = 0; i < side->padded; ++i) side->u[i] = 1, side->x[i] = side->w[i];
  }

  void absorb(Side<T>& side, const T* u) {
    for (int64_t i = 0; i < side.padded; i += L)
      set_potential(side, i,
                    load<T>(side.pot + i) + to_pot * log2_fast<T>(max<T>(splat<T>(kSmallestScale), load<T>(u + i))));
  }

  // Potentials below every cost, with a cost that they meet in each row and column: no sum of E can vanish then. The
  // scalings of the columns make up for what g is to begin with.
  void start() {
    Side<T>& side = columns();
    for (int64_t j = 0; j < side.padded; ++j)
      side.pot[j] = p.init && j < p.m && side.w[j] > 0 ? p.init[q * p.m + j] : T(0);
    std::memcpy(saved, side.pot, size_t(side.padded) * sizeof(T));
    log_step<true>();
    exponentials();
    for (int64_t j = 0; j < side.padded; j += L) {
      const Vec<T> u = exp2_flushed<T>((load<T>(saved + j) - load<T>(side.pot + j)) * inv2);
      store<T>(side.u + j, u);
      store<T>(side.x + j, load<T>(side.w + j) * u);
    }
  }

  struct Seen {
    Range<T> scalings, sums;  // the latter of unbalanced problems
  };
  template <bool kUnbalanced>
  PYML_INLINE void rescale(const Side<T>& side, int64_t i, const Vec<T>& sums, Seen& seen) const {
    Vec<T> u;
    if constexpr (kUnbalanced) {
      u = exp2_bounded<T>(-damp * log2_fast<T>(sums) - (1 - damp) * inv2 * load<T>(side.pot + i));
      seen.sums.see(sums);
    } else {
      u = reciprocal<T>(sums);
    }
    store<T>(side.u + i, u);
    store<T>(side.x + i, load<T>(side.w + i) * u);
    seen.scalings.see(u);
  }

  template <bool kUnbalanced>
  void iterate(Seen& all) {
    Seen seen = all;
    const Side<T> b = block, l = lane;  // copies: stores through their pointers could change the members
    const auto blocks_done = [&](int64_t i, Vec<T> sums) { rescale<kUnbalanced>(b, i, sums, seen); };
    const auto lanes_done = [&](int64_t v, Vec<T> sums) { rescale<kUnbalanced>(l, v, sums, seen); };
    const auto all_lanes = [&] {
      for (int64_t v = 0; v < l.padded; v += L) lanes_done(v, load<T>(l.sum + v));
    };
    if (swapped && blocks == 1) {
      blocks_done(0, Base::add_then_dot(lanes_done));
    } else if (swapped) {
      Base::add_all(b.x);
      all_lanes();
      for (int64_t k = 0; k < blocks; ++k) blocks_done(k * L, Base::dot(k, l.x));
    } else {
      Base::sweep(l.x, b.x, blocks_done);
      all_lanes();
    }
    all = seen;
  }

  void iterations(int64_t count) {
    Seen seen;
    std::memcpy(saved, columns().u, size_t(columns().padded) * sizeof(T));
    const bool scale = failures < 3;
    for (int64_t i = 0; i < count && scale; ++i) p.unbalanced ? iterate<true>(seen) : iterate<false>(seen);
    if (!scale || any<T>(seen.scalings.beyond(kHard<T>) | seen.sums.beyond(kHard<T>))) {
      ++failures;
      absorb(columns(), saved);
      Base::load_costs();
      for (int64_t i = 0; i < count; ++i) log_step<false>();
      exponentials();
    } else if (any<T>(seen.scalings.beyond(kSoft<T>))) {
      absorb(rows(), rows().u);
      absorb(columns(), columns().u);
      Base::load_costs();
      exponentials();
    }
  }

  // --- results
  // --------------------------------------------------------------------------------------------------------

  // Mass of the plan's rows into rows().sum.
  void row_masses() {
    Side<T>& r = rows();
    if (swapped) Base::add_all(block.x);
    for (int64_t i = 0; i < r.padded; i += L) {
      const Vec<T> sums = swapped ? load<T>(r.sum + i) : Base::dot(i / L, lane.x);
      store<T>(r.sum + i, sums * load<T>(r.x + i));
    }
  }

  double error() {
    double total = 0;
    const Side<T>& r = rows();
    for (int64_t i = 0; i < r.size; ++i) {
      const double f = double(r.pot[i]) + double(to_pot) * std::log2(double(r.u[i]));
      const double wanted = p.unbalanced ? double(r.w[i]) * std::exp(-f / double(p.rho)) : double(r.w[i]);
      total += std::fabs(double(r.sum[i]) - wanted);
    }
    return total;
  }

  double transport_cost() {
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      Base::read(p.cost, k);
      for (int i = 0; i < L; ++i) {
        Vec<T> part = {};
        for (int64_t v = 0; v < vectors; ++v)
          part += load<T>(at(k, v) + i * L) * load<T>(this->buffer + i * ld + v * L) * load<T>(lane.x + v * L);
        total += double(block.x[k * L + i]) * double(sum<T>(part));
      }
    }
    return total;
  }

  void finish(int64_t n_iter, bool stopped) {
    Side<T>&r = rows(), &c = columns();
    row_masses();
    const bool late = p.stops && !stopped && !(error() <= double(p.tol));
    const double transport = transport_cost();
    absorb(r, r.u);
    absorb(c, c.u);
    double shift = 0, value = 0, mass = 0;
    const double a = this->mass_a.sum, b = this->mass_b.sum, rho = double(p.rho);
    for (int64_t j = 0; j < c.size && !p.unbalanced; ++j) shift += double(c.w[j]) * double(c.pot[j]) / b;
    for (int64_t i = 0; i < r.size; ++i) {
      const double w = double(r.w[i]), x = double(r.sum[i]), f = w > 0 ? double(r.pot[i]) + shift : 0;
      p.f[q * p.n + i] = T(f);
      p.row_mass[q * p.n + i] = T(x);
      value += f * x;
      mass += x;
      if (p.unbalanced && w > 0) value += rho * ((x > 0 ? x * std::log(x / w) : 0) - x + w);
    }
    for (int64_t j = 0; j < c.size; ++j) {
      const double w = double(c.w[j]), g = w > 0 ? double(c.pot[j]) - shift : 0;
      const double x = p.unbalanced ? w * std::exp(-g / rho) : w;
      p.g[q * p.m + j] = T(g);
      value += g * x;
      if (p.unbalanced) value += -x * g + rho * (w - x);
    }
    p.value[q] = T(value + double(p.eps) * (a * b - mass));
    p.transport[q] = T(transport);
    p.n_iter[q] = int32_t(n_iter);
    p.status[q] = (late ? kNotConverged : 0) | (unequal<T>(p, this->mass_a, this->mass_b) ? kUnequalMasses : 0);
  }
};

// The results of a problem without a solution: zeros where there is nothing to transport, NaN where numbers are bad.
template <class T>
void no_solution(const SinkhornParams<T>& p, int64_t q, bool bad) {
  const T fill = bad ? std::numeric_limits<T>::quiet_NaN() : T(0);
  for (int64_t i = 0; i < p.n; ++i) p.f[q * p.n + i] = p.row_mass[q * p.n + i] = fill;
  for (int64_t j = 0; j < p.m; ++j) p.g[q * p.m + j] = fill;
  p.value[q] = p.transport[q] = fill;
  p.n_iter[q] = 0;
  p.status[q] = bad ? kBadNumbers : 0;
}

template <class T>
void solve_one(const SinkhornParams<T>& p, int64_t q, T* memory) {
  Solver<T> s(p, q, memory);
  const bool empty = !s.mass_a.any || !s.mass_b.any;
  const bool started = !p.init || sound_start<T>(p.init + q * p.m, s.columns().w, p.m);
  const bool bad = s.mass_a.bad || s.mass_b.bad || !started || !s.load_costs();
  if (bad || empty) return no_solution<T>(p, q, bad);
  s.start();
  int64_t done = 0;
  bool stopped = false;
  while (done < p.max_iter && !stopped) {
    const int64_t count = p.max_iter - done < kCheckEvery ? p.max_iter - done : kCheckEvery;
    s.iterations(count);
    done += count;
    if (p.stops && done < p.max_iter) {
      s.row_masses();
      stopped = s.error() <= double(p.tol);
    }
  }
  s.finish(done, stopped);
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
