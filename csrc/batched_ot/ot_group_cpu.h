// Sinkhorn on as many small problems as a vector has lanes, one in each: no sums across lanes, no empty ones. The
// arithmetic of a lane is that problem's alone. What one matrix E of scalings cannot solve goes to Solver.
#pragma once
#include "batched_ot/ot_lanes_cpu.h"
#include "batched_ot/ot_solve_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Group : Lanes<T> {
  using Base = Lanes<T>;
  using Base::a, Base::b, Base::cost, Base::count, Base::damp, Base::done, Base::e, Base::f, Base::first, Base::g,
      Base::inv2, Base::iterations, Base::L, Base::live, Base::lost, Base::m, Base::masked, Base::n, Base::p, Base::r,
      Base::t, Base::to_pot, Base::u, Base::v, Base::values, Base::y;
  using Base::Base;

  // --- scalings
  // -------------------------------------------------------------------------------------------------------

  // E from the potentials, in the lanes of `which`; their scalings begin at 1.
  void exponentials(const IVec<T>& which) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = (i * m + j) * L;
        Vec<T> x = exp2_flushed<T>(((load<T>(f + i * L) - load<T>(cost + at)) + load<T>(g + j * L)) * inv2);
        if (masked) x = live(i, j) ? x : splat<T>(T(1));
        store<T>(e + at, which ? x : load<T>(e + at));
      }
    for (int64_t i = 0; i < n; ++i) store<T>(u + i * L, which ? splat<T>(T(1)) : load<T>(u + i * L));
    for (int64_t j = 0; j < m; ++j) set_column(j, which ? splat<T>(T(1)) : load<T>(v + j * L));
  }
  PYML_INLINE void set_column(int64_t j, const Vec<T>& scaling) {
    store<T>(v + j * L, scaling);
    store<T>(y + j * L, load<T>(b + j * L) * scaling);
  }

  // As Solver::start.
  void start() {
    if (p.init) {
      std::memset(y, 0, size_t(m * L) * sizeof(T));
      Base::gather(p.init + first * m, m, y);
    }
    const T far = std::numeric_limits<T>::max() / 4;
    for (int64_t j = 0; j < m; ++j) {
      const Vec<T> wanted = p.init ? load<T>(y + j * L) : Vec<T>{};
      store<T>(t + j * L, load<T>(b + j * L) > T(0) ? wanted : Vec<T>{});
      store<T>(g + j * L, splat<T>(far));
    }
    for (int64_t i = 0; i < n; ++i) {
      Vec<T> least = splat<T>(far);
      for (int64_t j = 0; j < m; ++j) {
        const Vec<T> d = load<T>(cost + (i * m + j) * L) - load<T>(t + j * L);
        least = min<T>(least, masked ? (live(i, j) ? d : splat<T>(far)) : d);
      }
      least = load<T>(a + i * L) > T(0) ? least : Vec<T>{};
      store<T>(f + i * L, least);
      for (int64_t j = 0; j < m; ++j) {
        const Vec<T> d = load<T>(cost + (i * m + j) * L) - least;
        store<T>(g + j * L, min<T>(load<T>(g + j * L), masked ? (live(i, j) ? d : splat<T>(far)) : d));
      }
    }
    for (int64_t j = 0; j < m; ++j) store<T>(g + j * L, load<T>(b + j * L) > T(0) ? load<T>(g + j * L) : Vec<T>{});
    exponentials(~IVec<T>{});
    for (int64_t j = 0; j < m; ++j) set_column(j, exp2_flushed<T>((load<T>(t + j * L) - load<T>(g + j * L)) * inv2));
  }

  // kPlain: balanced, and no problem stops before the others; kUniform: the rows also weigh the same.
  enum Kind { kAny, kPlain, kUniform };

  template <Kind kind>
  PYML_INLINE Vec<T> scaling(const Vec<T>& sums, const T* potential, const T* before) const {
    if (kind != kAny) return reciprocal<T>(sums);
    const Vec<T> found = p.unbalanced
                             ? exp2_bounded<T>(-damp * log2_fast<T>(sums) - (1 - damp) * inv2 * load<T>(potential))
                             : reciprocal<T>(sums);
    return done ? load<T>(before) : found;
  }

  // Few columns: each entry of E is loaded once, for the row's sum and for what the row adds to the columns'. Two rows
  // share one reciprocal: where sums are trusted, so is their product.
  template <int M, Kind kind>
  PYML_INLINE void few_columns() {
    const T *ei = e, *ai = a, *fi = f;
    T* ui = u;
    Vec<T> ys[M], all[M] = {};
    for (int j = 0; j < M; ++j) ys[j] = load<T>(y + j * L);
    const auto row_sum = [&](Vec<T>* es) {
      Vec<T> sums = {};
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) es[j] = load<T>(ei + j * L);
      if constexpr (M == 4) return (es[0] * ys[0] + es[1] * ys[1]) + (es[2] * ys[2] + es[3] * ys[3]);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sums += es[j] * ys[j];
      return sums;
    };
    for (int64_t left = n; left > 0; left -= 32) {  // sums of sums: fewer roundings
      Vec<T> ts[M] = {};
      const auto give = [&](const Vec<T>* es, const Vec<T>& found) {
        const Vec<T> x = kind == kUniform ? found : load<T>(ai) * found;
        store<T>(ui, found);
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) ts[j] += es[j] * x;
        ai += L, fi += L, ui += L;
      };
      int64_t i = left < 32 ? left : 32;
      for (; i > 1 && kind != kAny; i -= 2) {
        Vec<T> es[M], next[M];
        const Vec<T> one = row_sum(es);
        ei += M * L;
        const Vec<T> two = row_sum(next), both = reciprocal<T>(one * two);
        ei += M * L;
        give(es, both * two);
        give(next, both * one);
      }
      for (; i > 0; --i) {
        Vec<T> es[M];
        const Vec<T> sums = row_sum(es);
        ei += M * L;
        give(es, scaling<kind>(sums, fi, ui));
      }
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) all[j] += ts[j];
    }
    const Vec<T> weight = kind == kUniform ? load<T>(a) : splat<T>(T(1));
    for (int j = 0; j < M; ++j) store<T>(t + j * L, all[j] * weight);
  }

  // Rows [i, i + R): their scalings, and what they add to t.
  template <int R, Kind kind>
  PYML_INLINE void some_rows(int64_t i) {
    Vec<T> x[R] = {};
    const T *row = e + i * m * L, *yj = y;
    T* tj = t;
    for (int64_t first = 0; first < m; first += 64) {
      Vec<T> part[R] = {};
      const int64_t last = m - first < 64 ? m : first + 64;
      for (int64_t j = first; j < last; ++j) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) part[r] += load<T>(row + (r * m + j) * L) * load<T>(yj + j * L);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] += part[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> found = scaling<kind>(x[r], f + (i + r) * L, u + (i + r) * L);
      store<T>(u + (i + r) * L, found);
      x[r] = load<T>(a + (i + r) * L) * found;
    }
    for (int64_t j = 0; j < m; ++j) {
      Vec<T> part = {};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) part += load<T>(row + (r * m + j) * L) * x[r];
      store<T>(tj + j * L, load<T>(tj + j * L) + part);
    }
  }

  template <int M, Kind kind>
  void iterate() {
    if constexpr (M > 0) {
      few_columns<M, kind>();
    } else {
      int64_t i = 0;
      std::memset(t, 0, size_t(m * L) * sizeof(T));
      for (; i + 4 <= n; i += 4) some_rows<4, kind>(i);
      for (; i < n; ++i) some_rows<1, kind>(i);
    }
    for (int64_t j = 0; j < m; ++j) set_column(j, scaling<kind>(load<T>(t + j * L), g + j * L, v + j * L));
  }
  template <Kind kind>
  void iterate_by_size() {
    switch (m) {
      case 1:
        return iterate<1, kind>();
      case 2:
        return iterate<2, kind>();
      case 3:
        return iterate<3, kind>();
      case 4:
        return iterate<4, kind>();
      default:
        return iterate<0, kind>();
    }
  }

  // Puts large scalings into the potentials; gives up on a lane where they are past trust.
  void keep_in_range() {
    Range<T> range;
    for (int64_t i = 0; i < n; ++i) range.see(load<T>(u + i * L));
    for (int64_t j = 0; j < m; ++j) range.see(load<T>(v + j * L));
    lost |= range.beyond(kHard<T>);
    if (p.unbalanced) lost |= sums_beyond(n, u, f) | sums_beyond(m, v, g);
    const IVec<T> soft = range.beyond(kSoft<T>) & ~lost;
    if (!any<T>(soft)) return;
    absorb(soft, a, u, f, n);
    absorb(soft, b, v, g, m);
    exponentials(soft);
  }
  // Whether the sums behind the scalings of an unbalanced problem are past trust.
  IVec<T> sums_beyond(int64_t size, const T* scaling, const T* potential) const {
    const T most = std::log2(kHard<T>) * damp;
    Vec<T> low = {}, high = {};
    for (int64_t i = 0; i < size; ++i) {
      const Vec<T> x = log2_fast<T>(load<T>(scaling + i * L)) + (1 - damp) * inv2 * load<T>(potential + i * L);
      low = min<T>(low, x), high = max<T>(high, x);
    }
    return ~((high <= most) & (low >= -most));
  }
  void absorb(const IVec<T>& which, const T* weight, const T* scaling, T* potential, int64_t size) const {
    for (int64_t i = 0; i < size; ++i) {
      const Vec<T> before = load<T>(potential + i * L),
                   after = before + to_pot * log2_fast<T>(load<T>(scaling + i * L));
      store<T>(potential + i * L, which & (load<T>(weight + i * L) > T(0)) ? after : before);
    }
  }

  // Sums of sums: fewer roundings.
  template <class F>
  PYML_INLINE Vec<T> total(int64_t size, const F& f) const {
    Vec<T> all = {}, part = {};
    for (int64_t i = 0; i < size; ++i) {
      part += f(i);
      if (i % 16 == 15) all += part, part = Vec<T>{};
    }
    return all + part;
  }

  // Row sums of the plan into r; their L1 distance from what they should be.
  Vec<T> row_error() {
    return total(n, [&](int64_t i) {
      Vec<T> sums = {};
      for (int64_t j = 0; j < m; ++j) sums += load<T>(e + (i * m + j) * L) * load<T>(y + j * L);
      const Vec<T> w = load<T>(a + i * L), ui = load<T>(u + i * L), mass = w * ui * sums;
      store<T>(r + i * L, mass);
      Vec<T> wanted = w;
      if (p.unbalanced) {
        const Vec<T> pot = load<T>(f + i * L) + to_pot * log2_fast<T>(ui);
        wanted = w * exp2_bounded<T>(pot * T(-kLog2e / double(p.rho)));
      }
      const Vec<T> d = mass - wanted;
      return d < T(0) ? -d : d;
    });
  }

  void run() {
    for (T& k : iterations) k = T(p.max_iter);
    const bool plain = !p.unbalanced && !p.stops;
    for (int64_t k = 0; k < p.max_iter; ++k) {
      if (p.stops && k > 0 && k % kCheckEvery == 0) {
        const IVec<T> stop = (row_error() <= p.tol) & ~done;
        for (int l = 0; l < L; ++l) iterations[l] = stop[l] ? T(k) : iterations[l];
        done |= stop;
        if (!any<T>(~(done | lost))) break;
      }
      const Kind kind = !plain ? kAny : p.a ? kPlain : kUniform;
      kind == kAny ? iterate_by_size<kAny>() : kind == kPlain ? iterate_by_size<kPlain>() : iterate_by_size<kUniform>();
      if (k < kCheckEvery || k % kCheckEvery == kCheckEvery - 1 || k == p.max_iter - 1) keep_in_range();
    }
  }

  // --- results
  // --------------------------------------------------------------------------------------------------------

  // Potentials with their gauge, and the value, summed in double.
  void settle() {
    constexpr int W = kLanes<double>;
    const double rho = double(p.rho), eps = double(p.eps);
    for (int at = 0; at < L; at += W) {
      const auto wide = [&](const T* from, int64_t i) { return widened<T>(from + i * L + at); };
      const auto kl = [&](const Vec<double>& x, const Vec<double>& w, const Vec<double>& log2_ratio) {
        return rho * ((x > kSmallest ? x * kLn2 * log2_ratio : Vec<double>{}) - x + w);
      };
      const Vec<double> mass_a = load<double>(this->mass_a + at), mass_b = load<double>(this->mass_b + at);
      Vec<double> shift = {}, mass = {}, value = {};
      for (int64_t j = 0; j < m && !p.unbalanced; ++j) shift += wide(b, j) * wide(g, j) / mass_b;
      for (int64_t i = 0; i < n; ++i) {
        const Vec<double> w = wide(a, i), x = wide(r, i), pot = w > 0 ? wide(f, i) + shift : Vec<double>{};
        narrowed<T>(pot, f + i * L + at);
        value += pot * x, mass += x;
        if (p.unbalanced) value += w > 0 ? kl(x, w, log2_fast<double>(x / w)) : Vec<double>{};
      }
      for (int64_t j = 0; j < m; ++j) {
        const Vec<double> w = wide(b, j), pot = w > 0 ? wide(g, j) - shift : Vec<double>{};
        narrowed<T>(pot, g + j * L + at);
        const Vec<double> log2_ratio = pot * (-kLog2e / rho);
        value += p.unbalanced ? rho * (w - w * exp2_bounded<double>(log2_ratio)) : pot * w;
      }
      value += eps * (mass_a * mass_b - mass);
      store<double>(values + at, value);
    }
  }

  void finish() {
    const Vec<T> error = row_error();
    const IVec<T> all = ~IVec<T>{};
    Vec<T> transport = {};
    for (int64_t i = 0; i < n; ++i) {
      Vec<T> row = {};
      for (int64_t j = 0; j < m; ++j)
        row += load<T>(e + (i * m + j) * L) * load<T>(cost + (i * m + j) * L) * load<T>(y + j * L);
      transport += row * (load<T>(a + i * L) * load<T>(u + i * L));
    }
    absorb(all, a, u, f, n);
    absorb(all, b, v, g, m);
    settle();
    Base::scatter(f, n, p.f + first * n);
    Base::scatter(r, n, p.row_mass + first * n);
    Base::scatter(g, m, p.g + first * m);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t q = first + l;
      p.value[q] = T(values[l]);
      p.transport[q] = transport[l];
      p.n_iter[q] = int32_t(iterations[l]);
      const bool late = p.stops && !done[l] && !(error[l] <= p.tol);
      p.status[q] = (late ? kNotConverged : 0) | (this->apart[l] ? kUnequalMasses : 0);
    }
  }
};

template <class T>
void solve_group(const SinkhornParams<T>& p, int64_t task, T* memory) {
  const int64_t first = task * kLanes<T>, left = p.batch - first, count = left < kLanes<T> ? left : kLanes<T>;
  Group<T> s(p, first, count, memory);
  s.load_weights();
  s.load_costs();
  s.start();
  s.run();
  s.finish();
  for (int64_t l = 0; l < count; ++l) {
    if (s.bad[l] || s.empty[l])
      no_solution<T>(p, first + l, s.bad[l]);
    else if (s.lost[l])
      solve_one<T>(p, first + l, memory);  // of the group's scratch nothing is needed any more
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
