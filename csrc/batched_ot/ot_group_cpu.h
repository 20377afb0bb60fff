// Sinkhorn on as many small problems as a vector has lanes, one in each: no sums across lanes, no empty ones. The
// arithmetic of a lane is that problem's alone. What one matrix E of scalings cannot solve goes to Solver.
#pragma once
#include "batched_ot/ot_solve_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Group {
  static constexpr int L = kLanes<T>;
  const SinkhornParams<T>& p;
  const int64_t first, count, n, m;
  const T inv2, to_pot, damp;
  const bool masked;
  T *cost, *e;           // [n][m][L]
  T *a, *f, *u, *r;      // [n][L]: weights, potentials, scalings, row sums of the plan
  T *b, *g, *v, *y, *t;  // [m][L]; y = b v
  T mass_a[L], mass_b[L];
  IVec<T> done = {}, lost = {};  // reached the tolerance; left to Solver
  T iterations[L];
  bool bad[L] = {}, empty[L] = {}, apart[L] = {};

  static int64_t scratch(const SinkhornParams<T>& p) { return L * (2 * p.n * p.m + 4 * p.n + 5 * p.m); }

  Group(const SinkhornParams<T>& p, int64_t first, int64_t count, T* memory)
      : p(p),
        first(first),
        count(count),
        n(p.n),
        m(p.m),
        inv2(T(kLog2e / double(p.eps))),
        to_pot(T(kLn2 * double(p.eps))),
        damp(p.damp()),
        masked(p.a || p.b) {
    const auto take = [&](int64_t size) {
      T* at = memory;
      memory += size * L;
      return at;
    };
    cost = take(n * m), e = take(n * m);
    a = take(n), f = take(n), u = take(n), r = take(n);
    b = take(m), g = take(m), v = take(m), y = take(m), t = take(m);
  }

  // --- in and out
  // -----------------------------------------------------------------------------------------------------

  // to[i * L + lane] = from[lane * size + i], or back; nothing beyond `count` lanes is touched in `from`.
  void gather(const T* from, int64_t size, T* to) const {
    for (int64_t i = 0; i < size; i += L)
      transpose_tile<T>(from + i, size, to + i * L, L, int(count), int(size - i < L ? size - i : L));
  }
  void scatter(const T* from, int64_t size, T* to) const {
    for (int64_t i = 0; i < size; i += L)
      transpose_tile<T>(from + i * L, L, to + i, size, int(size - i < L ? size - i : L), int(count));
  }

  void load_weights() {
    if (!masked) {
      for (int64_t i = 0; i < n; ++i) store<T>(a + i * L, splat<T>(T(1) / T(n)));
      for (int64_t j = 0; j < m; ++j) store<T>(b + j * L, splat<T>(T(1) / T(m)));
      for (int64_t l = 0; l < L; ++l) mass_a[l] = mass_b[l] = 1;
      return;
    }
    for (int64_t l = 0; l < L; ++l) {  // lanes without a problem: uniform, of cost 0
      const int64_t q = first + l;
      const bool real = l < count;
      const Mass<T> x = weights<T>(real && p.a ? p.a + q * n : nullptr, n, a + l, n, L);
      const Mass<T> z = weights<T>(real && p.b ? p.b + q * m : nullptr, m, b + l, m, L);
      mass_a[l] = T(x.sum), mass_b[l] = T(z.sum);
      bad[l] = x.bad || z.bad;
      empty[l] = !x.any || !z.any;
      apart[l] = unequal<T>(p, x, z);
    }
  }

  template <class S>
  void copy_cost(const S* from, T* to) const {
    for (int64_t i = 0; i < n; ++i, from += p.cost.stride_n, to += m)
      if (p.cost.stride_m == 1)
        for (int64_t j = 0; j < m; ++j) to[j] = T(widen(from[j]));
      else
        for (int64_t j = 0; j < m; ++j) to[j] = T(widen(from[j * p.cost.stride_m]));
  }

  void load_costs() {
    by_dtype(p.cost.dtype, [&](auto tag) {
      using S = decltype(tag);
      for (int64_t l = 0; l < count; ++l) {
        const S* from = static_cast<const S*>(p.cost.data) + p.cost.offsets[first + l];
        T* to = e + l * n * m;
        if (std::is_same_v<S, T> && p.cost.stride_m == 1 && p.cost.stride_n == m)
          std::memcpy(to, from, size_t(n * m) * sizeof(T));
        else
          copy_cost(from, to);
      }
    });
    if (count < L) std::memset(cost, 0, size_t(n * m * L) * sizeof(T));
    gather(e, n * m, cost);
    Vec<T> odd = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        T* c = cost + (i * m + j) * L;
        if (masked) store<T>(c, live(i, j) ? load<T>(c) : Vec<T>{});
        odd += load<T>(c) - load<T>(c);
      }
    for (int l = 0; l < L; ++l) bad[l] |= odd[l] != 0;
    for (int l = 0; l < L; ++l) {
      if (!bad[l] && !empty[l]) continue;
      for (int64_t i = 0; i < n; ++i) a[i * L + l] = T(1) / T(n);  // harmless; the results are written over
      for (int64_t j = 0; j < m; ++j) b[j * L + l] = T(1) / T(m);
      for (int64_t k = 0; k < n * m; ++k) cost[k * L + l] = 0;
    }
  }

  PYML_INLINE IVec<T> live(int64_t i, int64_t j) const {
    return (load<T>(a + i * L) > T(0)) & (load<T>(b + j * L) > T(0));
  }

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
      gather(p.init + first * m, m, y);
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

  // kPlain: balanced, and no problem stops before the others.
  template <bool kPlain>
  PYML_INLINE Vec<T> scaling(const Vec<T>& sums, const T* potential, const T* before) const {
    if (kPlain) return reciprocal<T>(sums);
    const Vec<T> found = p.unbalanced
                             ? exp2_bounded<T>(-damp * log2_fast<T>(sums) - (1 - damp) * inv2 * load<T>(potential))
                             : reciprocal<T>(sums);
    return done ? load<T>(before) : found;
  }

  // Few columns: each entry of E is loaded once, for the row's sum and for what the row adds to the columns'.
  template <int M, bool kPlain>
  PYML_INLINE void few_columns() {
    const T *ei = e, *ai = a, *fi = f;
    T* ui = u;
    Vec<T> ys[M], all[M] = {};
    for (int j = 0; j < M; ++j) ys[j] = load<T>(y + j * L);
    for (int64_t left = n; left > 0; left -= 32) {  // sums of sums: fewer roundings
      Vec<T> ts[M] = {};
#pragma GCC unroll 2
      for (int64_t i = left < 32 ? left : 32; i > 0; --i, ei += M * L, ai += L, fi += L, ui += L) {
        Vec<T> es[M], sums = {};
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) es[j] = load<T>(ei + j * L);
        if constexpr (M == 4)
          sums = (es[0] * ys[0] + es[1] * ys[1]) + (es[2] * ys[2] + es[3] * ys[3]);
        else
#pragma GCC unroll 4
          for (int j = 0; j < M; ++j) sums += es[j] * ys[j];
        const Vec<T> found = scaling<kPlain>(sums, fi, ui), x = load<T>(ai) * found;
        store<T>(ui, found);
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) ts[j] += es[j] * x;
      }
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) all[j] += ts[j];
    }
    for (int j = 0; j < M; ++j) store<T>(t + j * L, all[j]);
  }

  // Rows [i, i + R): their scalings, and what they add to t.
  template <int R, bool kPlain>
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
      const Vec<T> found = scaling<kPlain>(x[r], f + (i + r) * L, u + (i + r) * L);
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

  template <int M, bool kPlain>
  void iterate() {
    if constexpr (M > 0) {
      few_columns<M, kPlain>();
    } else {
      int64_t i = 0;
      std::memset(t, 0, size_t(m * L) * sizeof(T));
      for (; i + 4 <= n; i += 4) some_rows<4, kPlain>(i);
      for (; i < n; ++i) some_rows<1, kPlain>(i);
    }
    for (int64_t j = 0; j < m; ++j) set_column(j, scaling<kPlain>(load<T>(t + j * L), g + j * L, v + j * L));
  }
  template <bool kPlain>
  void iterate_by_size() {
    switch (m) {
      case 1:
        return iterate<1, kPlain>();
      case 2:
        return iterate<2, kPlain>();
      case 3:
        return iterate<3, kPlain>();
      case 4:
        return iterate<4, kPlain>();
      default:
        return iterate<0, kPlain>();
    }
  }

  // Puts large scalings into the potentials; gives up on a lane where they are past trust.
  void keep_in_range() {
    Range<T> range;
    for (int64_t i = 0; i < n; ++i) range.see(load<T>(u + i * L));
    for (int64_t j = 0; j < m; ++j) range.see(load<T>(v + j * L));
    lost |= range.beyond(kHard<T>);
    const IVec<T> soft = range.beyond(kSoft<T>) & ~lost;
    if (!any<T>(soft)) return;
    absorb(soft, a, u, f, n);
    absorb(soft, b, v, g, m);
    exponentials(soft);
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
      plain ? iterate_by_size<true>() : iterate_by_size<false>();
      if (k < kCheckEvery || k % kCheckEvery == kCheckEvery - 1 || k == p.max_iter - 1) keep_in_range();
    }
  }

  // --- results
  // --------------------------------------------------------------------------------------------------------

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
    const bool balanced = !p.unbalanced;
    const Vec<T> ma = load<T>(mass_a), mb = load<T>(mass_b);
    const T rho = p.rho, scale = T(-kLog2e / double(p.rho)), ln2 = T(kLn2);
    const Vec<T> shift =
        balanced ? total(m, [&](int64_t j) { return load<T>(b + j * L) * load<T>(g + j * L); }) / mb : Vec<T>{};
    const Vec<T> mass = total(n, [&](int64_t i) { return load<T>(r + i * L); });
    Vec<T> value = total(n, [&](int64_t i) {
      const Vec<T> w = load<T>(a + i * L), x = load<T>(r + i * L);
      const Vec<T> pot = w > T(0) ? load<T>(f + i * L) + shift : Vec<T>{};
      store<T>(f + i * L, pot);
      if (balanced) return pot * x;
      const Vec<T> kl = (w > T(0)) & (x > T(kSmallest)) ? x * ln2 * log2_fast<T>(x / w) : Vec<T>{};
      return pot * x + rho * (kl - x + w);
    });
    value += total(m, [&](int64_t j) {
      const Vec<T> w = load<T>(b + j * L), pot = w > T(0) ? load<T>(g + j * L) - shift : Vec<T>{};
      store<T>(g + j * L, pot);
      return balanced ? pot * w : rho * (w - w * exp2_bounded<T>(pot * scale));
    });
    value += p.eps * (ma * mb - mass);
    scatter(f, n, p.f + first * n);
    scatter(r, n, p.row_mass + first * n);
    scatter(g, m, p.g + first * m);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t q = first + l;
      p.value[q] = value[l];
      p.transport[q] = transport[l];
      p.n_iter[q] = int32_t(iterations[l]);
      const bool late = p.stops && !done[l] && !(error[l] <= p.tol);
      p.status[q] = (late ? kNotConverged : 0) | (apart[l] ? kUnequalMasses : 0);
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
