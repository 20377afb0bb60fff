// One problem on its own: its matrix as tiles in the cache, with one side in the vector lanes and blocks of the other.
//
// A tile holds kLanes entries of the block side, each a vector of the lane side, so that both products with a vector
// read the matrix in the order in which it lies: dot() sums over lanes, add() over the block side.
#pragma once
#include "batched_ot/ot_math_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Side {
  int64_t size, padded;
  T *w, *pot, *u, *x, *sum;  // weights, potentials, scalings, weights times scalings, what a product gave
};

template <class T>
struct Tiles {
  static constexpr int L = kLanes<T>;
  const SinkhornParams<T>& p;
  const int64_t q;
  const bool swapped;  // rows are in the lanes
  int64_t blocks, vectors, ld;
  T inv2, to_pot;  // log2 e / eps and back
  Side<T> block, lane;
  T *tile, *buffer;  // [blocks][vectors][L][L], [L][ld]
  Mass<T> mass_a, mass_b;
  bool masked;

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t tiles(const SinkhornParams<T>& p) { return padded(p.n) * padded(p.m); }
  // Of all but the tiles, which come last: a method that needs none has other things there.
  static int64_t vectors_and_buffer(const SinkhornParams<T>& p) {
    const int64_t n = padded(p.n), m = padded(p.m);
    return L * (p.rows_in_lanes() ? n : m) + 5 * (n + m);
  }
  static int64_t scratch(const SinkhornParams<T>& p) { return vectors_and_buffer(p) + tiles(p); }

  Tiles(const SinkhornParams<T>& p, int64_t q, T* memory)
      : p(p), q(q), swapped(p.rows_in_lanes()), inv2(T(kLog2e / double(p.eps))), to_pot(T(kLn2 * double(p.eps))) {
    const auto take = [&](int64_t count) {
      T* at = memory;
      memory += count;
      return at;
    };
    const auto side = [&](int64_t size) {
      const int64_t n = padded(size);
      return Side<T>{size, n, take(n), take(n), take(n), take(n), take(n)};
    };
    block = side(swapped ? p.m : p.n);
    lane = side(swapped ? p.n : p.m);
    ld = lane.padded;
    blocks = block.padded / L;
    vectors = ld / L;
    buffer = take(L * ld);
    tile = memory;
    mass_a = weights<T>(p.a ? p.a + q * p.n : nullptr, p.n, rows().w, rows().padded);
    mass_b = weights<T>(p.b ? p.b + q * p.m : nullptr, p.m, columns().w, columns().padded);
    masked = p.a || p.b;
  }

  Side<T>& rows() { return swapped ? lane : block; }
  Side<T>& columns() { return swapped ? block : lane; }
  int64_t in_block(int64_t k) const { return block.size - k * L < L ? block.size - k * L : L; }

  // Entries of block k of a matrix into the buffer [L][ld]; what is masked or does not exist is 0.
  void read(const Costs& c, int64_t k) {
    const int64_t n = in_block(k);
    const Rows by_block = matrix(c, q, swapped);
    if (by_block.stride_c != 1 && by_block.stride_w == 1)
      load_columns<T>(matrix(c, q, !swapped), 0, lane.size, k * L, n, buffer, ld);
    else
      load_rows<T>(by_block, k * L, n, 0, lane.size, buffer, ld);
    for (int64_t i = 0; i < L; ++i) {
      if (i >= n || block.w[k * L + i] == 0) {
        std::memset(buffer + i * ld, 0, size_t(ld) * sizeof(T));
      } else if (masked) {
        for (int64_t v = 0; v < ld; v += L)
          store<T>(buffer + i * ld + v, load<T>(lane.w + v) > T(0) ? load<T>(buffer + i * ld + v) : Vec<T>{});
      }
    }
  }

  // The buffer to block k of a matrix.
  void write(const Costs& c, int64_t k) const {
    const Rows r = matrix(c, q);
    if (swapped)
      store_columns<T>(buffer, ld, r, 0, lane.size, k * L, in_block(k));
    else
      store_rows<T>(buffer, ld, r, k * L, in_block(k), 0, lane.size);
  }

  T* at(int64_t k, int64_t v) const { return tile + (k * vectors + v) * L * L; }

  // f(k, i, v, entry of the buffer) -> entry of the tiles, for every vector.
  template <class F>
  PYML_INLINE void fill(int64_t k, const F& f) {
    for (int64_t v = 0; v < vectors; ++v)
      for (int i = 0; i < L; ++i) store<T>(at(k, v) + i * L, f(k * L + i, v * L, load<T>(buffer + i * ld + v * L)));
  }

  // Costs into the tiles; whether all that count are finite.
  bool load_costs() {
    Vec<T> odd = {};
    for (int64_t k = 0; k < blocks; ++k) {
      read(p.cost, k);
      fill(k, [&](int64_t, int64_t, Vec<T> c) {
        odd += c - c;
        return c;
      });
    }
    return !any<T>(odd != T(0));
  }

  // Rows [kFirst, kFirst + kCount) of a tile column times y, on top of `sums`.
  template <int kFirst, int kCount>
  static PYML_INLINE void dot_rows(const T* e, const Vec<T>& y, Vec<T>* sums) {
#pragma GCC unroll 16
    for (int i = kFirst; i < kFirst + kCount; ++i) sums[i] += load<T>(e + i * L) * y;
  }
  static PYML_INLINE Vec<T> across(const Vec<T>* sums) {
    T part[L * L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store<T>(part + i * L, sums[i]);
    return sum_each<T>(part);
  }
  PYML_INLINE Vec<T> dot(int64_t k, const T* y) const {
    Vec<T> sums[L] = {};
    const T* e = at(k, 0);
    for (const T* end = y + ld; y < end; y += L, e += L * L) dot_rows<0, L>(e, load<T>(y), sums);
    return across(sums);
  }

  PYML_INLINE void add(int64_t k, const T* x, T* t) const {
    Vec<T> xs[L];
    splats(x + k * L, xs);
    const T* e = at(k, 0);
    for (const T* end = t + ld; t < end; t += L, e += L * L) store<T>(t, combine(e, xs, load<T>(t)));
  }
  static PYML_INLINE void splats(const T* x, Vec<T>* xs) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) xs[i] = splat<T>(x[i]);
  }
  // The column of a tile, weighted, on top of `start`.
  static PYML_INLINE Vec<T> combine(const T* e, const Vec<T>* xs, const Vec<T>& start) {
    Vec<T> even = start, odd = {};
#pragma GCC unroll 8
    for (int i = 0; i < L; i += 2) {
      even += xs[i] * load<T>(e + i * L);
      odd += xs[i + 1] * load<T>(e + (i + 1) * L);
    }
    return even + odd;
  }

  // A single block: sums over it for each lane, which `finish(first lane, sums)` turns into lane.x; the block's
  // products with these come back. Half of its rows go along with the first sweep, as far as registers reach.
  template <class Finish>
  PYML_INLINE Vec<T> add_then_dot(const Finish& finish) {
    Vec<T> xs[L], sums[L] = {};
    splats(block.x, xs);
    const T *e = tile, *x = lane.x;
    const int64_t count = vectors;
    for (int64_t v = 0; v < count; ++v) {
      finish(v * L, combine(e + v * L * L, xs, Vec<T>{}));
      dot_rows<0, L / 2>(e + v * L * L, load<T>(x + v * L), sums);
    }
    for (int64_t v = 0; v < count; ++v) dot_rows<L / 2, L / 2>(e + v * L * L, load<T>(x + v * L), sums);
    return across(sums);
  }

  // lane.sum = sum over blocks of x times their entries.
  PYML_INLINE void add_all(const T* x) {
    std::memset(lane.sum, 0, size_t(ld) * sizeof(T));
    for (int64_t k = 0; k < blocks; ++k) add(k, x, lane.sum);
  }

  // For each block: dot with y, what `finish(first, sums)` writes to x, and its part of lane.sum, in one sweep.
  template <class Finish>
  PYML_INLINE void sweep(const T* y, const T* x, const Finish& finish) {
    std::memset(lane.sum, 0, size_t(ld) * sizeof(T));
    Vec<T> sums = dot(0, y);
    for (int64_t k = 0; k < blocks; ++k) {
      finish(k * L, sums);
      if (k + 1 < blocks) sums = dot(k + 1, y);  // while the end of the last one is still under way
      add(k, x, lane.sum);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
