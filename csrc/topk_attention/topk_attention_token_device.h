// What the token-level kernels share on a GPU: the call as a kernel sees it, and tiles of logits.
//
// Every kernel makes its logits with tile_products and `logit`, each a fixed chain of operations whatever the tile: all
// see the same bits, or the backward would keep other keys than the forward.
#pragma once
#include <cmath>
#include <cstring>

#include "common/cuda.h"
#include "topk_attention/rounding_device.h"
#include "topk_attention/topk_attention_token_cuda.h"

namespace pyml {

constexpr int kTokenThreads = 256;  // of every block
constexpr int kTokenKeys = 128;     // keys of a tile; thread i has key i % 128 and half of the rows
constexpr int kDepthStep = 32;      // features that a tile has in shared memory at once
constexpr int kDepthLd = 36;        // their leading dimension: no two rows of 8 share a bank in loads of 16 bytes
constexpr int kTokenRows = 16;      // queries of a tile, in the backward

template <class A>
struct alignas(16) Four {
  A v[4];
};

template <class A>
struct Constants;
template <>
struct Constants<float> {
  using Order = int32_t;
  static constexpr float kLowest = -3.4028234663852886e38f;
  static constexpr Order kMagnitude = INT32_MAX;
};
template <>
struct Constants<double> {
  using Order = int64_t;
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr Order kMagnitude = INT64_MAX;
};
template <class A>
__device__ inline A infinity() {
  return A(INFINITY);
}

// Where the rows of one head lie.
struct Place {
  int64_t b, h, q, k, v, mask;
};

// The call as kernels see it, pointers with their types.
template <class X_, class A_>
struct Token : TokenCuda {
  using X = X_;
  using A = A_;

  __device__ Place place(int64_t b, int64_t h) const {
    const int64_t kv = h / shared;
    return {b,
            h,
            b * q_stride[0] + h * q_stride[1],
            b * k_stride[0] + kv * k_stride[1],
            b * v_stride[0] + kv * v_stride[1],
            b * mask_stride[0] + h * mask_stride[1]};
  }
  __device__ A load(const void* from, int64_t at) const { return A(up(static_cast<const X*>(from)[at])); }
  __device__ A query(const Place& p, int64_t n, int64_t d) const {
    return n < queries && d < depth ? load(q, p.q + n * q_stride[2] + d * q_stride[3]) : A(0);
  }
  __device__ A key(const Place& p, int64_t t, int64_t d) const {
    return t < keys && d < depth ? load(k, p.k + t * k_stride[2] + d * k_stride[3]) : A(0);
  }
  __device__ A value(const Place& p, int64_t t, int64_t c) const {
    return t < keys && c < value_depth ? load(v, p.v + t * v_stride[2] + c * v_stride[3]) : A(0);
  }
  __device__ A upstream(const Place& p, int64_t i, int64_t n, int64_t c) const {
    if (n >= queries || c >= value_depth) return A(0);
    return load(grad, p.b * grad_stride[0] + i * grad_stride[1] + p.h * grad_stride[2] + n * grad_stride[3] +
                          c * grad_stride[4]);
  }
  __device__ A added(int64_t at) const {
    switch (static_cast<DType>(mask_dtype)) {
      case DType::kDouble:
        return A(static_cast<const double*>(mask)[at]);
      case DType::kHalf:
        return A(up(static_cast<const __half*>(mask)[at]));
      case DType::kBFloat16:
        return A(up(static_cast<const __nv_bfloat16*>(mask)[at]));
      default:
        return A(static_cast<const float*>(mask)[at]);
    }
  }
  // The logit of query n and key t from their product; -inf where masked or outside.
  __device__ A logit(const Place& p, int64_t n, int64_t t, A product) const {
    if (n >= queries || t >= keys || (causal && t > n)) return -infinity<A>();
    const A scaled = rounded_product(product, A(scale));
    if (mask_kind == 0) return scaled;
    const int64_t at = p.mask + n * mask_stride[2] + t * mask_stride[3];
    if (mask_kind == 1) return static_cast<const bool*>(mask)[at] ? scaled : -infinity<A>();
    const A more = added(at);
    return more == -infinity<A>() ? more : scaled + more;
  }
  // Row n among `of` outputs a batch, for output i.
  __device__ int64_t row(const Place& p, int64_t i, int64_t of, int64_t n) const {
    return ((p.b * of + i) * heads + p.h) * queries + n;
  }
  // Keys, from the first one on, that any query below n may see.
  __device__ int64_t seen(int64_t n) const { return causal && n < keys ? n : keys; }
};

template <class A>
__device__ inline bool is_kept(A s, int64_t t, A tau, int32_t cut) {
  return !(s < tau) && !(s == tau && t > cut);  // a NaN is kept: it reaches all of its row
}

// Products of R rows and kTokenKeys keys over `depth` features, for this thread's key and R / 2 rows. x(r, d) and
// y(j, d) load one number; x_tile [R][kDepthLd] and y_tile [kTokenKeys][kDepthLd] are shared memory that other threads
// may still read when this starts. Long sums are made of sums of kDepthStep terms.
template <int R, class A, class LoadX, class LoadY>
__device__ void tile_products(int64_t depth, A* x_tile, A* y_tile, A (&sum)[R / 2], const LoadX& x, const LoadY& y) {
  const int tid = threadIdx.x, key = tid % kTokenKeys, row = tid / kTokenKeys * (R / 2);
  PYML_UNROLL
  for (int i = 0; i < R / 2; ++i) sum[i] = A(0);
  for (int64_t d0 = 0; d0 < depth; d0 += kDepthStep) {
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < R * kDepthStep; i += kTokenThreads)
      x_tile[i / kDepthStep * kDepthLd + i % kDepthStep] = x(i / kDepthStep, d0 + i % kDepthStep);
#pragma unroll 2
    for (int i = tid; i < kTokenKeys * kDepthStep; i += kTokenThreads)
      y_tile[i / kDepthStep * kDepthLd + i % kDepthStep] = y(i / kDepthStep, d0 + i % kDepthStep);
    __syncthreads();
    A part[R / 2] = {};
#pragma unroll 1
    for (int d = 0; d < kDepthStep; d += 4) {
      const Four<A> b = *reinterpret_cast<const Four<A>*>(y_tile + key * kDepthLd + d);
      PYML_UNROLL
      for (int i = 0; i < R / 2; ++i) {
        const Four<A> a = *reinterpret_cast<const Four<A>*>(x_tile + (row + i) * kDepthLd + d);
        PYML_UNROLL
        for (int e = 0; e < 4; ++e) part[i] += a.v[e] * b.v[e];  // an explicit fma spills here
      }
    }
    PYML_UNROLL
    for (int i = 0; i < R / 2; ++i) sum[i] += part[i];
  }
}

// Logits of this thread's key t0 + key and its rows n0 + row + i.
template <int R, class C, class A = typename C::A>
__device__ void tile_logits(const C& c, const Place& p, int64_t n0, int64_t t0, A* x_tile, A* y_tile, A (&s)[R / 2]) {
  tile_products<R>(
      c.depth, x_tile, y_tile, s, [&](int r, int64_t d) { return c.query(p, n0 + r, d); },
      [&](int j, int64_t d) { return c.key(p, t0 + j, d); });
  const int key = threadIdx.x % kTokenKeys, row = threadIdx.x / kTokenKeys * (R / 2);
  PYML_UNROLL
  for (int i = 0; i < R / 2; ++i) s[i] = c.logit(p, n0 + row + i, t0 + key, s[i]);
}

// R rows share the threads of a block: each has kLanes of them. Sums over a row, and lists of its kept keys.
template <int R>
struct RowLanes {
  static constexpr int kLanes = kTokenThreads / R;
  int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  bool odd = false;        // which of two halves of the scratch memory comes next: so one barrier a sum is enough
  unsigned char* scratch;  // 2 * kTokenThreads * 16 bytes

  __device__ explicit RowLanes(void* memory) : scratch(static_cast<unsigned char*>(memory)) {}

  // op over the numbers of all lanes of the row, in order; ends with every thread of the block past a barrier.
  template <class V, class F>
  __device__ V reduce(const V& mine, const F& op) {
    V* all = share(mine);
    V total = all[row * kLanes];
#pragma unroll 4
    for (int l = 1; l < kLanes; ++l) total = op(total, all[row * kLanes + l]);
    return total;
  }
  // Whether any thread of the block says so; only the first lane of a row is asked.
  __device__ bool any(bool mine) {
    const int* all = share(int(mine));
    int found = 0;
    for (int r = 0; r < R; ++r) found |= all[r * kLanes];
    return found != 0;
  }
  // The sum over the lanes before this one, and over all.
  __device__ int before(int mine, int* total) {
    const int* all = share(mine) + row * kLanes;
    int less = 0, sum = 0;
#pragma unroll 4
    for (int l = 0; l < kLanes; ++l) {
      less += l < lane ? all[l] : 0;
      sum += all[l];
    }
    *total = sum;
    return less;
  }

 private:
  template <class V>
  __device__ V* share(const V& mine) {
    static_assert(sizeof(V) <= 16);
    V* all = reinterpret_cast<V*>(scratch + (odd ? kTokenThreads * 16 : 0));
    odd = !odd;
    all[threadIdx.x] = mine;
    __syncthreads();
    return all;
  }
};
constexpr size_t kRowScratch = 2 * kTokenThreads * 16;

// Kept keys of one row and tile: weights and numbers, up to kTokenKeys of each a row.
template <class A>
struct Kept {
  A* weight;
  int* number;
  int n;
};

// Lists the keys of a tile for which take(j, weight) says yes, in order, and leaves the threads past a barrier. The
// list is in memory that nobody else reads until the next barrier but one.
template <int R, class A, class Take>
__device__ Kept<A> list_kept(RowLanes<R>& lanes, A* weights, int* numbers, const Take& take) {
  constexpr int kEach = kTokenKeys / RowLanes<R>::kLanes;
  A weight[kEach] = {};
  bool kept[kEach];
  int mine = 0;
  PYML_UNROLL
  for (int i = 0; i < kEach; ++i) {
    kept[i] = take(lanes.lane * kEach + i, weight[i]);
    mine += kept[i];
  }
  Kept<A> list{weights + lanes.row * kTokenKeys, numbers + lanes.row * kTokenKeys, 0};
  int at = lanes.before(mine, &list.n);
  PYML_UNROLL
  for (int i = 0; i < kEach; ++i)
    if (kept[i]) {
      list.weight[at] = weight[i];
      list.number[at++] = lanes.lane * kEach + i;
    }
  __syncthreads();
  return list;
}

// sum[i] += weight * load(number, column c0 + lane + i * lanes) over the list.
template <int R, int kColumns, class A, class Load>
__device__ void add_kept(const RowLanes<R>& lanes, const Kept<A>& list, int64_t c0, int64_t columns, A (&sum)[kColumns],
                         const Load& load) {
  A part[kColumns] = {};
#pragma unroll 2
  for (int e = 0; e < list.n; ++e) {
    const A weight = list.weight[e];
    PYML_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = c0 + lanes.lane + i * RowLanes<R>::kLanes;
      if (column < columns) part[i] += weight * load(list.number[e], column);
    }
  }
  PYML_UNROLL
  for (int i = 0; i < kColumns; ++i) sum[i] += part[i];
}

// Calls f with the Token type of this dtype.
template <class F>
inline cudaError_t dispatch(const TokenCuda& call, const F& f) {
  switch (static_cast<DType>(call.dtype)) {
    case DType::kDouble:
      return f(Token<double, double>{call});
    case DType::kFloat:
      return f(Token<float, float>{call});
    case DType::kHalf:
      return f(Token<__half, float>{call});
    case DType::kBFloat16:
      return f(Token<__nv_bfloat16, float>{call});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyml
