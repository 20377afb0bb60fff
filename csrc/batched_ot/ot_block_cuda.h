// A block of threads on one problem of optimal transport: a matrix of which groups of lanes have rows, sums over its
// rows and columns, the weights.
//
// Lanes of a group take neighbouring columns, four each, so that loads of 16 bytes meet no bank twice; groups take
// every so many rows. Sums run over a lane's columns, then lanes; over a group's rows, then groups and warps: in an
// order that the size of the problem fixes. All threads of a block take the same way through the code.
#pragma once
#include <type_traits>

#include "batched_ot/ot_math_cuda.h"

namespace pyml {

template <class T>
struct alignas(16) Quad {
  T v[4];
};

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// What the weights of one side add up to, and whether they are weights.
struct OtMass {
  double sum;
  bool any, bad;
};

constexpr int kOtWords = kOtThreads / 32;  // one a warp

// G lanes share a row, each has Q quads of columns at a time.
template <class T, int G, int Q>
struct OtBlock {
  static_assert(Q == 1 || G == 32, "quads of one lane lie a warp apart");
  static constexpr int C = 4 * Q, kSpan = G * C;
  static constexpr int R = G == 1 ? 2 : 4;  // rows at once, whose sums wait for each other otherwise

  const SinkhornCuda<T>& c;
  static constexpr bool kWide = G == 32;  // rows may be wider than a span
  const int n, m, ld;
  const int tid, threads, warp, warps, lane, place, group, groups;  // place: of the lane in its group
  const T inv2, to_pot;                                             // log2 e / eps and back
  int64_t q = 0;
  double* words;   // [kOtWords]
  T* part;         // [warps][kSpan]: column sums of each warp
  T *tile, *rest;  // [held][ld] in shared memory and what it has no room for
  T* vectors;      // where those of a kernel begin
  T *a, *b;        // weights [n], [ld]

  // shared: words, part, vectors, tile.
  __device__ OtBlock(const SinkhornCuda<T>& c, double* shared)
      : c(c),
        n(int(c.n)),
        m(int(c.m)),
        ld(kWide ? int(c.shape.ld) : kSpan),
        tid(int(threadIdx.x)),
        threads(int(blockDim.x)),
        warp(tid / 32),
        warps(threads / 32),
        lane(tid % 32),
        place(lane % G),
        group(tid / G),
        groups(threads / G),
        inv2(T(kOtLog2e / double(c.eps))),
        to_pot(T(kOtLn2 * double(c.eps))),
        words(shared),
        part(reinterpret_cast<T*>(shared + kOtWords)) {
    T* memory = part + warps * kSpan;
    T* far = c.workspace + int64_t(blockIdx.x) * c.workspace_size;
    rest = far;
    vectors = c.vectors_held ? memory : far + (c.rows - c.held) * ld;
    tile = memory;
    a = row_vector();
    b = column_vector();
  }
  // As many as ot_layout_cuda.cu says; the tile is behind them.
  __device__ T* row_vector() { return next_vector((int64_t(n) + 3) / 4 * 4); }
  __device__ T* column_vector() { return next_vector(ld); }
  __device__ T* next_vector(int64_t size) {
    T* at = vectors;
    vectors += size;
    if (c.vectors_held) tile = vectors;
    return at;
  }

  __device__ T* row(int i) const { return i < c.held ? tile + int64_t(i) * ld : rest + (i - c.held) * ld; }
  // Room for the implicit gradient's factor.
  __device__ T* system() const { return c.system_held ? tile + c.held * ld : rest + c.workspace_size - c.system; }
  __device__ int column(int first, int quad) const { return first + (quad * G + place) * 4; }

  // --- sums --------------------------------------------------------------------------------------------------------

  template <class A>
  static __device__ A shuffle(A v, int distance) {
    return __shfl_xor_sync(0xffffffffu, v, distance);
  }

  __device__ double block_sum(double v) const {
    PYML_UNROLL
    for (int d = 16; d > 0; d /= 2) v += shuffle(v, d);
    if (lane == 0) words[warp] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < warps; ++w) v += words[w];
    __syncthreads();
    return v;
  }
  static __device__ bool block_any(bool some) { return __syncthreads_or(some) != 0; }

  // f(i) for every row or column of this thread; ends with a barrier.
  template <class F>
  __device__ void each(int size, const F& f) const {
    for (int i = tid; i < size; i += threads) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ double total(int size, const F& term) const {
    double sum = 0;
    for (int i = tid; i < size; i += threads) sum += term(i);
    return block_sum(sum);
  }
  // f(q) for every problem of this block.
  template <class F>
  __device__ void each_problem(const F& f) const {
    for (int64_t problem = int64_t(blockIdx.x); problem < c.batch; problem += int64_t(gridDim.x)) f(problem);
  }

  // done(i, value(i, j, entry) taken together over j), in one thread.
  template <class Value, class Op, class Done>
  __device__ void over_rows(T identity, const Op& op, const Value& value, const Done& done) const {
    for (int i0 = 0; i0 < n; i0 += groups) {
      const int i = i0 + group;
      T all = identity;
      if (i < n) entries(i, [&](int j, T e) { all = op(all, value(i, j, e)); });
      PYML_UNROLL
      for (int d = 1; d < G; d *= 2) all = op(all, shuffle(all, d));
      if (i < n && place == 0) done(i, all);
    }
    __syncthreads();
  }
  // f(j, entry) for this lane's columns of row i, padding included.
  template <class F>
  __device__ void entries(int i, const F& f) const {
    const T* from = row(i);
    for (int first = 0; first < ld; first += kSpan) {
      PYML_UNROLL
      for (int quad = 0; quad < Q; ++quad) {
        const int j = column(first, quad);
        if (Q > 1 && j >= ld) break;
        const Quad<T> e = *reinterpret_cast<const Quad<T>*>(from + j);
        PYML_UNROLL
        for (int k = 0; k < 4; ++k) f(j + k, e.v[k]);
      }
    }
  }

  // done(j, value(i, j, entry) taken together over i), in one thread.
  template <class Value, class Op, class Done>
  __device__ void over_columns(T identity, const Op& op, const Value& value, const Done& done) const {
    for (int first = 0; first < ld; first += kSpan) {
      T all[C];
      PYML_UNROLL
      for (int k = 0; k < C; ++k) all[k] = identity;
      for (int i = group; i < n; i += groups) {
        PYML_UNROLL
        for (int quad = 0; quad < Q; ++quad) {
          const int j = column(first, quad);
          if (Q > 1 && j >= ld) break;
          const Quad<T> e = *reinterpret_cast<const Quad<T>*>(row(i) + j);
          PYML_UNROLL
          for (int k = 0; k < 4; ++k) all[quad * 4 + k] = op(all[quad * 4 + k], value(i, j + k, e.v[k]));
        }
      }
      finish_columns(first, all, op, done);
    }
  }

  template <class Op, class Done>
  __device__ void finish_columns(int first, T* all, const Op& op, const Done& done) const {
    T* mine = part + warp * kSpan;
    if constexpr (Q > 1) {
      PYML_UNROLL
      for (int k = 0; k < C; ++k) mine[column(0, k / 4) + k % 4] = all[k];
    } else {
      constexpr int kLeft = 32 / G >= C ? 1 : C * G / 32;
      const int at = place * C + halve<16, C>(all, op);
      PYML_UNROLL
      for (int k = 0; k < kLeft; ++k) mine[at + k] = all[k];
    }
    __syncthreads();
    for (int j = tid; j < kSpan && first + j < m; j += threads) {
      T sum = part[j];
      for (int w = 1; w < warps; ++w) sum = op(sum, part[w * kSpan + j]);
      done(first + j, sum);
    }
    __syncthreads();
  }
  // Takes N columns together over the groups of a warp, lanes D apart first: each half of them keeps half of the
  // columns while there are several. Returns the first that this lane has kept.
  template <int D, int N, class Op>
  __device__ int halve(T* all, const Op& op) const {
    if constexpr (D < G) {
      return 0;
    } else if constexpr (N > 1) {
      const bool upper = (lane & D) != 0;
      PYML_UNROLL
      for (int k = 0; k < N / 2; ++k) {
        const T low = all[k], high = all[k + N / 2];
        all[k] = op(upper ? high : low, shuffle(upper ? low : high, D));
      }
      return (upper ? N / 2 : 0) + halve<D / 2, N / 2>(all, op);
    } else {
      all[0] = op(all[0], shuffle(all[0], D));
      return halve<D / 2, 1>(all, op);
    }
  }

  // y -> x -> column sums: x_i = row_done(i, sum_j E_ij y_j, whether this thread is to write), then
  // column_done(j, sum_i E_ij x_i), which may write y. Reads the matrix once while a lane can hold its part of a row.
  // `x` [n] is for wider ones.
  template <class RowDone, class ColumnDone>
  __device__ void sweep(const T* y, T* x, const RowDone& row_done, const ColumnDone& column_done) const {
    if (kWide && ld > kSpan) {
      over_rows(
          T(0), Plus(), [&](int, int j, T e) { return e * y[j]; },
          [&](int i, T sum) { x[i] = row_done(i, sum, true); });
      over_columns(T(0), Plus(), [&](int i, int, T e) { return e * x[i]; }, column_done);
      return;
    }
    T ys[C], all[C] = {};
    PYML_UNROLL
    for (int k = 0; k < C; ++k) ys[k] = Q == 1 || column(0, k / 4) < ld ? y[column(0, k / 4) + k % 4] : T(0);
    for (int i0 = group; i0 < n + group; i0 += R * groups) {
      Quad<T> e[R][Q];
      T sum[R] = {};
      PYML_UNROLL
      for (int r = 0; r < R; ++r) {
        PYML_UNROLL
        for (int quad = 0; quad < Q; ++quad) {
          const int i = i0 + r * groups, j = column(0, quad);
          e[r][quad] = i < n && (Q == 1 || j < ld) ? *reinterpret_cast<const Quad<T>*>(row(i) + j) : Quad<T>{};
          PYML_UNROLL
          for (int k = 0; k < 4; ++k) sum[r] += e[r][quad].v[k] * ys[quad * 4 + k];
        }
      }
      PYML_UNROLL
      for (int d = 1; d < G; d *= 2) {
        PYML_UNROLL
        for (int r = 0; r < R; ++r) sum[r] += shuffle(sum[r], d);
      }
      PYML_UNROLL
      for (int r = 0; r < R; ++r) {
        const int i = i0 + r * groups;
        const T found = i < n ? row_done(i, sum[r], place == 0) : T(0);
        PYML_UNROLL
        for (int k = 0; k < C; ++k) all[k] += found * e[r][k / 4].v[k % 4];
      }
    }
    finish_columns(0, all, Plus(), column_done);
  }

  // --- in and out --------------------------------------------------------------------------------------------------

  // body(pointer to the first element of this problem, of its type).
  template <class Body>
  __device__ void typed(const Costs& t, const Lead& lead, const Body& body) const {
    with_dtype(t, lead.offset(q), body);
  }

  // f(i, j, where the entry is in the tile) for all entries, padding included; ends with a barrier.
  template <class F>
  __device__ void every(const F& f) const {
    for (int i = group; i < n; i += groups) {
      T* to = row(i);
      for (int first = 0; first < ld; first += kSpan) {
        PYML_UNROLL
        for (int k = 0; k < C; ++k) {
          const int j = column(first, k / 4) + k % 4;
          if (j < ld) f(i, j, to + j);
        }
      }
    }
    __syncthreads();
  }
  __device__ bool live(int i, int j) const { return a[i] > T(0) && b[j] > T(0); }

  // tile = change(i, j, entry of t, tile before) where that counts, else 0: what is masked is not read.
  template <class Change>
  __device__ void load(const Costs& t, const Lead& lead, const Change& change) const {
    typed(t, lead, [&](const auto* from) {
      every([&](int i, int j, T* to) {
        *to = live(i, j) ? change(i, j, T(up(from[i * t.stride_n + j * t.stride_m])), *to) : T(0);
      });
    });
  }
  // entry of t = value(i, j, entry of the cost) where that counts, else 0. No tile is needed.
  template <class Value>
  __device__ void write(const Costs& t, const Value& value) const {
    typed(c.cost, c.cost_lead, [&](const auto* from) {
      using S = std::decay_t<decltype(*from)>;
      S* to = static_cast<S*>(t.data) + q * n * m;  // results have the dtype of the cost
      for (int i = group; i < n; i += groups)
        for (int j = place; j < m; j += G)
          to[int64_t(i) * m + j] =
              narrow<S>(live(i, j) ? value(i, j, T(up(from[i * c.cost.stride_n + j * c.cost.stride_m]))) : T(0));
    });
  }

  // Weights of one side into `to`, zeros up to `padded`. Ends with a barrier.
  __device__ OtMass weights(const T* given, int size, T* to, int padded) const {
    double sum = 0;
    bool any = false, bad = false;
    for (int i = tid; i < padded; i += threads) {
      T w = T(0);
      if (i < size) {
        w = given ? given[q * size + i] : T(1) / T(size);
        const bool counts = !(fabs(double(w)) < double(FLT_MIN));
        bad |= counts && !(w > T(0) && w <= Trust<T>::kLargest);
        any |= counts;
        w = counts ? w : T(0);
        sum += double(w);
      }
      to[i] = w;
    }
    any = block_any(any);
    bad = block_any(bad);
    sum = block_sum(sum);
    return {given ? sum : 1.0, any, bad};
  }

  // P from an entry of the cost and the potentials.
  __device__ T plan(const T* f, const T* g, int i, int j, T cost) const {
    return (a[i] * b[j]) * exp2_flushed(((f[i] - cost) + g[j]) * inv2);
  }
};

// --- launches ------------------------------------------------------------------------------------------------------

// Calls body(G, Q as integral constants) of a shape; kSingle: it has one for a single lane.
template <class T, bool kSingle, class Body>
auto by_shape(const OtShape& s, const Body& body) {
  using std::integral_constant;
  if constexpr (sizeof(T) == 8) {
    return s.lanes == 4 ? body(integral_constant<int, 4>(), integral_constant<int, 1>())
                        : body(integral_constant<int, 32>(), integral_constant<int, 1>());
  } else {
    if constexpr (kSingle)
      if (s.lanes == 1) return body(integral_constant<int, 1>(), integral_constant<int, 1>());
    if (s.lanes == 4) return body(integral_constant<int, 4>(), integral_constant<int, 1>());
    if (s.lanes == 16) return body(integral_constant<int, 16>(), integral_constant<int, 1>());
    return body(integral_constant<int, 32>(), integral_constant<int, 2>());
  }
}

// Launches the kernel that pick(G, Q) is.
template <bool kSingle, class T, class Pick>
cudaError_t launch_by_shape(const SinkhornCuda<T>& c, cudaStream_t stream, const Pick& pick) {
  return by_shape<T, kSingle>(c.shape, [&](auto lanes, auto quads) {
    return launch(pick(lanes, quads), c.blocks, 1, c.shape.threads, c.shared, stream, c);
  });
}

}  // namespace pyml
