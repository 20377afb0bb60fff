// The plan of given potentials and its gradient.
#pragma once
#include "batched_ot/ot_tiles_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Plan : Tiles<T> {
  using Base = Tiles<T>;
  using Base::at, Base::block, Base::blocks, Base::buffer, Base::columns, Base::inv2, Base::L, Base::lane, Base::ld,
      Base::p, Base::q, Base::rows, Base::vectors;

  Plan(const SinkhornParams<T>& p, int64_t q, T* memory) : Base(p, q, memory) {
    for (int64_t i = 0; i < rows().padded; ++i) rows().pot[i] = i < p.n ? p.potential_f[q * p.n + i] : T(0);
    for (int64_t j = 0; j < columns().padded; ++j) columns().pot[j] = j < p.m ? p.potential_g[q * p.m + j] : T(0);
  }

  // Whether the potentials are those of a problem that has a solution.
  bool found() const {
    bool all = true;
    for (int64_t i = 0; i < p.n; ++i) all &= bool(std::isfinite(p.potential_f[q * p.n + i]));
    for (int64_t j = 0; j < p.m; ++j) all &= bool(std::isfinite(p.potential_g[q * p.m + j]));
    return all;
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
    const Vec<T> w = load<T>(lane.w + v), x = ((block.pot[k] - cost) + load<T>(lane.pot + v)) * inv2;
    return w > T(0) ? (block.w[k] * w) * exp2_flushed<T>(x) : Vec<T>{};
  }

  // buffer = f(k, v, buffer) for the entries of block k.
  template <class F>
  PYML_INLINE void change(int64_t k, const F& f) {
    for (int64_t i = 0; i < this->in_block(k); ++i)
      for (int64_t v = 0; v < ld; v += L) store<T>(buffer + i * ld + v, f(k * L + i, v, load<T>(buffer + i * ld + v)));
  }

  void forward() {
    for (int64_t k = 0; k < blocks; ++k) {
      Base::read(p.cost, k);
      change(k, [&](int64_t i, int64_t v, Vec<T> c) { return plan(i, v, c); });
      Base::write(p.plan, k);
    }
  }

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
