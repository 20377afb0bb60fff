// Costs between two clouds of points, and their gradient. Both clouds are packed coordinate by coordinate, so that the
// lanes of a vector are points. Every sum runs over blocks of kSumBlock terms in order: it depends on their number
// alone (of coordinates in a cost, of points in a gradient), and its rounding grows slowly with it.
#pragma once
#include <algorithm>

#include "batched_ot/ot_math_cpu.h"
#include "common/tile_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

constexpr int64_t kPointRows = 128;  // points of a task
constexpr int64_t kPointLanes = 64;  // points of the other cloud at a time; whole vectors
constexpr int64_t kSumBlock = 64;    // terms of one partial sum

// Points of one cloud: `at` is [d][ld].
template <class T>
struct Packed {
  T *at, *scale, *sound;  // `scale`, `sound`: [ld]; 1 / length and 1 or 0, where asked for
  int64_t ld;

  Packed(T*& memory, int64_t d, int64_t ld) : ld(ld) {
    at = memory;
    scale = at + d * ld;
    sound = scale + ld;
    memory = sound + ld;
  }
  static int64_t scratch(int64_t d, int64_t ld) { return (d + 2) * ld; }

  // Points [first, first + count) of problem q, zeros up to ld; of length 1 for cosines. One with a NaN or an infinity
  // becomes NaN, or 0 where `mend`.
  void take(const Points& c, int64_t q, int64_t first, int64_t count, int64_t d, bool cosine, bool mend) {
    load_columns<T>(matrix(c, q), first, count, 0, d, at, ld);
    for (int64_t i = 0; i < ld; i += kLanes<T>) {
      Vec<T> total = {}, odd = {};
      for (int64_t k0 = 0; k0 < d; k0 += kSumBlock) {
        Vec<T> part = {};
        for (int64_t k = k0; k < std::min(d, k0 + kSumBlock); ++k) {
          const Vec<T> v = load<T>(at + k * ld + i);
          part += v * v;
          odd += v - v;
        }
        total += part;
      }
      T length[kLanes<T>];
      store<T>(length, total + T(kSmallest));
      for (T& l : length) l = T(1) / std::sqrt(l);
      const Vec<T> factor = cosine ? load<T>(length) : splat<T>(T(1));
      const IVec<T> lost = odd != T(0);  // a NaN too
      store<T>(scale + i, factor);
      store<T>(sound + i, lost ? Vec<T>{} : splat<T>(T(1)));
      if (!cosine && !any<T>(lost)) continue;
      const Vec<T> instead = mend ? Vec<T>{} : splat<T>(std::numeric_limits<T>::quiet_NaN());
      for (int64_t k = 0; k < d; ++k) {
        T* v = at + k * ld + i;
        store<T>(v, lost ? instead : load<T>(v) * factor);
      }
    }
  }
};

struct SquaredDifference {
  template <class V>
  PYML_INLINE V operator()(const V& acc, const V& a, const V& b, int, int) const {
    const V apart = a - b;
    return acc + apart * apart;
  }
};

// A gradient times how far the other point is from the own one, in this coordinate.
template <class T>
struct WeightedDifference {
  const T* own;
  PYML_INLINE Vec<T> operator()(const Vec<T>& acc, const Vec<T>& other, const Vec<T>& g, int k, int v) const {
    return acc + g * (other - load<T>(own + k * kPointRows + v * kLanes<T>));
  }
};

// total[m][v] += the sum of K terms of a(m, k) and b(k, v), for `rows` x `vectors` of them.
template <class T, class Term>
PYML_INLINE void add_terms(int64_t rows, int64_t vectors, int64_t K, const T* a, int64_t am, int64_t ak, const T* b,
                           int64_t ldb, T* total, int64_t ld, const Term& term_at) {
  constexpr int L = kLanes<T>;
  for_tile_columns(vectors, [&](auto width, int64_t v0) {
    constexpr int NV = decltype(width)::value;
    for_tile_rows<NV>(rows, [&](auto height, int64_t m0) {
      constexpr int MR = decltype(height)::value;
      T* const to = total + m0 * ld + v0 * L;
      tile<T, MR, NV>(
          K, a + m0 * am, am, ak, b + v0 * L, ldb, [](int, int) { return Vec<T>{}; },
          [&](int m, int v, const Vec<T>& sum) { store<T>(to + m * ld + v * L, load<T>(to + m * ld + v * L) + sum); },
          term_at(m0, v0));
    });
  });
}

inline int64_t pairwise_blocks(int64_t points) { return (points + kPointRows - 1) / kPointRows; }
inline int64_t up_to(int64_t size, int64_t first, int64_t most) { return std::min(size - first, most); }

template <class T>
int64_t pairwise_scratch(const PairwiseParams<T>& p) {
  const int64_t each = Packed<T>::scratch(p.d, kPointRows) + Packed<T>::scratch(p.d, kPointLanes);
  return each + std::max(kPointRows * kPointLanes, p.d * kPointRows + kSumBlock * kPointRows);
}

// Costs of a block of the points that are not in the lanes.
template <class T>
void pairwise_costs(const PairwiseParams<T>& p, int64_t task, T* memory) {
  constexpr int L = kLanes<T>;
  const bool swapped = p.x_in_lanes();
  const int64_t side = swapped ? p.m : p.n, others = swapped ? p.n : p.m, blocks = pairwise_blocks(side);
  const int64_t q = task / blocks, first = task % blocks * kPointRows, rows = up_to(side, first, kPointRows);
  Packed<T> mine(memory, p.d, kPointRows), theirs(memory, p.d, kPointLanes);
  T* const total = memory;  // [kPointRows][kPointLanes]
  mine.take(swapped ? p.y : p.x, q, first, rows, p.d, p.cosine, false);
  for (int64_t j0 = 0; j0 < others; j0 += kPointLanes) {
    const int64_t count = up_to(others, j0, kPointLanes), vectors = (count + L - 1) / L;
    theirs.take(swapped ? p.x : p.y, q, j0, count, p.d, p.cosine, false);
    std::memset(total, 0, size_t(rows * kPointLanes) * sizeof(T));
    for (int64_t k0 = 0; k0 < p.d; k0 += kSumBlock) {
      const int64_t K = up_to(p.d, k0, kSumBlock);
      const T *a = mine.at + k0 * mine.ld, *b = theirs.at + k0 * theirs.ld;
      const auto add = [&](const auto& term) {
        add_terms<T>(rows, vectors, K, a, 1, mine.ld, b, theirs.ld, total, kPointLanes,
                     [&](int64_t, int64_t) { return term; });
      };
      p.cosine ? add(Product{}) : add(SquaredDifference{});
    }
    for (int64_t v = 0; v < rows * kPointLanes && p.cosine; v += L) store<T>(total + v, T(1) - load<T>(total + v));
    if (swapped)
      store_columns<T>(total, kPointLanes, matrix(p.cost, q), j0, count, first, rows);
    else
      store_rows<T>(total, kPointLanes, matrix(p.cost, q), first, rows, j0, count);
  }
}

// Gradient of a block of points of one cloud: sums over the points of the other, by this task alone.
template <class T>
void pairwise_gradient(const PairwiseParams<T>& p, bool of_y, int64_t task, T* memory) {
  constexpr int L = kLanes<T>;
  const int64_t side = of_y ? p.m : p.n, others = of_y ? p.n : p.m, blocks = pairwise_blocks(side);
  const int64_t q = task / blocks, first = task % blocks * kPointRows, count = up_to(side, first, kPointRows);
  const int64_t vectors = (count + L - 1) / L, ld = kPointRows;
  Packed<T> mine(memory, p.d, kPointRows), theirs(memory, p.d, kPointLanes);
  T *const slope = memory, *const total = slope + kSumBlock * ld;  // [kSumBlock others][ld], [d][ld]
  mine.take(of_y ? p.y : p.x, q, first, count, p.d, p.cosine, true);
  std::memset(total, 0, size_t(p.d * ld) * sizeof(T));
  for (int64_t j0 = 0; j0 < others; j0 += kSumBlock) {
    const int64_t n = up_to(others, j0, kSumBlock);
    theirs.take(of_y ? p.x : p.y, q, j0, n, p.d, p.cosine, true);
    if (of_y)
      load_rows<T>(matrix(p.cost, q), j0, n, first, count, slope, ld);
    else
      load_columns<T>(matrix(p.cost, q), first, count, j0, n, slope, ld);
    for (int64_t j = 0; j < n; ++j)
      if (theirs.sound[j] == 0) std::memset(slope + j * ld, 0, size_t(ld) * sizeof(T));
    const auto add = [&](const auto& term_at) {
      add_terms<T>(p.d, vectors, n, theirs.at, theirs.ld, 1, slope, ld, total, ld, term_at);
    };
    if (p.cosine)
      add([](int64_t, int64_t) { return Product{}; });
    else
      add([&](int64_t k0, int64_t v0) { return WeightedDifference<T>{mine.at + k0 * ld + v0 * L}; });
  }
  for (int64_t i = 0; i < vectors * L; i += L) {
    Vec<T> along = {};  // the part of a cosine's gradient that would change the point's length
    for (int64_t k = 0; k < p.d && p.cosine; ++k) along += load<T>(mine.at + k * ld + i) * load<T>(total + k * ld + i);
    const IVec<T> sound = load<T>(mine.sound + i) > T(0);
    for (int64_t k = 0; k < p.d; ++k) {
      T* t = total + k * ld + i;
      const Vec<T> sum = load<T>(t), turn = load<T>(mine.scale + i) * (load<T>(mine.at + k * ld + i) * along - sum);
      store<T>(t, sound ? (p.cosine ? turn : T(-2) * sum) : Vec<T>{});
    }
  }
  store_columns<T>(total, ld, matrix(of_y ? p.grad_y : p.grad_x, q), first, count, 0, p.d);
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
