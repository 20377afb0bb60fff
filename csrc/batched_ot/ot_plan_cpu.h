// The plan of given potentials and its gradient.
#pragma once
#include "batched_ot/ot_tiles_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Plan : Tiles<T> {
  using Base = Tiles<T>;
  using Base::at, Base::block, Base::blocks, Base::buffer, Base::columns, Base::inv2, Base::L, Base::lane, Base::ld,
      Base::masked, Base::p, Base::q, Base::rows, Base::vectors;

  // Rows of the plan that `write_plan` has in hand at once, and room for them, and for the columns and a vector.
  static int64_t at_once(const SinkhornParams<T>& p) {
    int64_t rows = 1;  // no division: it would take as long as a small problem's row
    while (rows < p.n && 2 * rows * p.m <= 512) rows *= 2;
    return rows < p.n ? rows : p.n;
  }
  static int64_t room(const SinkhornParams<T>& p) { return Base::padded(at_once(p) * p.m) + 2 * L; }
  static int64_t scratch(const SinkhornParams<T>& p, bool with_tiles = false) {
    const int64_t n = Base::padded(p.n), m = Base::padded(p.m), a_block = L * (p.rows_in_lanes() ? n : m);
    const int64_t least = a_block > 5 * room(p) ? a_block : 5 * room(p), tiles = with_tiles ? Base::tiles(p) : 0;
    return Base::vectors_and_buffer(p) + (tiles > least ? tiles : least);
  }

  Plan(const SinkhornParams<T>& p, int64_t q, T* memory) : Base(p, q, memory) {
    const auto take = [](const Side<T>& s, const T* from) {
      store<T>(s.pot + s.padded - L, Vec<T>{});
      copy_row<T>(from, s.pot, s.size);
    };
    take(rows(), p.potential_f + q * p.n);
    take(columns(), p.potential_g + q * p.m);
  }

  // Whether the potentials are those of a problem that has a solution.
  bool found() const {
    Vec<T> odd = {};
    for (const Side<T>* s : {&block, &lane})
      for (int64_t i = 0; i < s->padded; i += L) odd += load<T>(s->pot + i) - load<T>(s->pot + i);
    return !any<T>(odd != T(0));
  }

  // Gradients of a problem without one.
  void nothing() {
    std::memset(buffer, 0, size_t(L * ld) * sizeof(T));
    for (int64_t k = 0; k < blocks && p.grad_cost.data; ++k) Base::write(p.grad_cost, k);
    for (T* t : {p.grad_a, p.out_f})
      for (int64_t i = 0; i < p.n && t; ++i) t[q * p.n + i] = 0;
    for (T* t : {p.grad_b, p.out_g})
      for (int64_t j = 0; j < p.m && t; ++j) t[q * p.m + j] = 0;
  }

  // P at block entry k and lanes v, from the cost there; 0 where something is masked.
  PYML_INLINE Vec<T> plan(int64_t k, int64_t v, const Vec<T>& cost) const {
    if (!(block.w[k] > 0)) return Vec<T>{};
    // The row's potential first, whichever side lies in lanes: these are the bits of `write_rows`.
    const Vec<T> w = load<T>(lane.w + v), other = load<T>(lane.pot + v);
    const Vec<T> x = p.rows_in_lanes() ? (other - cost) + block.pot[k] : (block.pot[k] - cost) + other;
    return w > T(0) ? (block.w[k] * w) * exp2_flushed<T>(x * inv2) : Vec<T>{};
  }

  // buffer = f(k, v, buffer) for the entries of block k.
  template <class F>
  PYML_INLINE void change(int64_t k, const F& f) {
    for (int64_t i = 0; i < this->in_block(k); ++i)
      for (int64_t v = 0; v < ld; v += L) store<T>(buffer + i * ld + v, f(k * L + i, v, load<T>(buffer + i * ld + v)));
  }

  // Rows [i0, i0 + count) of the cost, one behind the other.
  void read_rows(int64_t i0, int64_t count, T* to) {
    const int64_t m = columns().size, entries = count * m;
    if (p.cost.stride_m == 1 && p.cost.stride_n == m)
      by_dtype(p.cost.dtype, [&](auto tag) {
        copy_row<T>(static_cast<const decltype(tag)*>(p.cost.data) + p.cost.offsets[q] + i0 * m, to, entries);
      });
    else if (p.cost.stride_m != 1 && p.cost.stride_n == 1)
      load_columns<T>(matrix(p.cost, q, true), 0, m, i0, count, to, m);
    else
      load_rows<T>(matrix(p.cost, q), i0, count, 0, m, to, m);
  }

  // The plan times a factor to a dense matrix. No tiles: rows follow each other without a gap, so that a few columns
  // fill vectors too.
  void write_plan(const Costs& to, T factor) { masked ? write_rows<true>(to, factor) : write_rows<false>(to, factor); }

  template <bool kMasked>
  void write_rows(const Costs& to, T factor) {
    const Side<T>&r = rows(), &c = columns();
    const int64_t m = c.size, most = at_once(p), size = room(p), step = m < L ? L % int(m) : L;
    T *cost = this->tile, *f = cost + size, *a = f + size, *g = a + size, *b = g + size;
    // Columns again and again, for a vector that begins at any of them; of a row its entries are the same. What is
    // written behind the end, the next one writes over.
    const auto columns_to = [&](const T* from, T* at) {
      for (const T* const end = at + m + L; at < end; at += m)
        for (int64_t v = 0; v < m && at + v < end; v += L) store<T>(at + v, load<T>(from + v));
    };
    const auto rows_to = [&](const T* from, int64_t count, T* at) {
      for (int64_t i = 0; i < count; ++i, at += m)
        if (m <= 4) {
          const T four[4] = {from[i], from[i], from[i], from[i]};
          std::memcpy(at, four, sizeof four);
        } else {
          for (int64_t v = 0; v < m; v += L) store<T>(at + v, splat<T>(from[i]));
        }
    };
    columns_to(c.pot, g);
    if (kMasked) columns_to(c.w, b);
    const Vec<T> uniform = splat<T>(factor * (r.w[0] * c.w[0]));
    for (int64_t i0 = 0; i0 < r.size; i0 += most) {
      const int64_t count = r.size - i0 < most ? r.size - i0 : most, entries = count * m;
      read_rows(i0, count, cost);
      rows_to(r.pot + i0, count, f);
      if (kMasked) rows_to(r.w + i0, count, a);
      for (int64_t k = 0, j = 0; k < entries; k += L) {
        const Vec<T> e = exp2_flushed<T>(((load<T>(f + k) - load<T>(cost + k)) + load<T>(g + j)) * inv2);
        if constexpr (kMasked) {
          const Vec<T> w = load<T>(a + k) * load<T>(b + j);
          store<T>(cost + k, w > T(0) ? (factor * w) * e : Vec<T>{});
        } else {
          store<T>(cost + k, uniform * e);
        }
        j += step;
        j = j < m ? j : j - m;
      }
      by_dtype(to.dtype, [&](auto tag) {
        copy_row<T>(cost, static_cast<decltype(tag)*>(to.data) + to.offsets[q] + i0 * m, entries);
      });
    }
  }

  void forward() { write_plan(p.plan, found() ? T(1) : std::numeric_limits<T>::quiet_NaN()); }

  void backward() {
    if (!found()) return nothing();
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

}  // namespace CPU_CAPABILITY
}  // namespace pyml
