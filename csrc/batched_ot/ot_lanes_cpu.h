// As many small problems as a vector has lanes, one in each: weights and costs come in, potentials go out.
#pragma once
#include "batched_ot/ot_math_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Lanes {
  static constexpr int L = kLanes<T>;
  const SinkhornParams<T>& p;
  const int64_t first, count, n, m;
  const T inv2, to_pot, damp;
  const bool masked;
  T *cost, *e;                   // [n][m][L]
  T *a, *f, *u, *r;              // [n][L]: weights, potentials, scalings, row sums of the plan
  T *b, *g, *v, *y, *t;          // [m][L]; y = b v
  IVec<T> done = {}, lost = {};  // reached the tolerance; left to Solver
  T iterations[L];
  double mass_a[L], mass_b[L], values[L];
  bool bad[L] = {}, empty[L] = {}, apart[L] = {};

  static int64_t scratch(const SinkhornParams<T>& p) { return L * (2 * p.n * p.m + 4 * p.n + 5 * p.m); }

  Lanes(const SinkhornParams<T>& p, int64_t first, int64_t count, T* memory)
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
      const Mass<T> x = weights<T, L>(real && p.a ? p.a + q * n : nullptr, n, a + l, n);
      const Mass<T> z = weights<T, L>(real && p.b ? p.b + q * m : nullptr, m, b + l, m);
      mass_a[l] = x.sum, mass_b[l] = z.sum;
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
    for (int64_t l = 0; l < count && p.init; ++l) bad[l] |= !sound_start<T>(p.init + (first + l) * m, b + l, m, L);
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
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
