// Costs between clouds of points on NVIDIA GPUs, and their gradient. A cost is a sum over coordinates in an order that
// their number alone fixes, a gradient one over the points of the other cloud, by one block each: no atomics.
#include "batched_ot/ot_math_cuda.h"
#include "batched_ot/ot_points_cuda.h"

namespace pyml {
namespace {

constexpr int kPointThreads = 256;
constexpr int kTile = 64, kStep = 16, kTileLd = kTile + 4;  // points a side of a tile; terms in shared memory at once
constexpr int kPointSum = 64;                               // terms of a partial sum

// One cloud of a call: coordinate k of point i of problem q.
template <class T>
struct Cloud {
  Points points;
  Lead lead;
  const T* scale;
  int64_t size, d;

  // body(load), where load(i, k) is a coordinate of problem q, 0 outside.
  template <class Body>
  __device__ void typed(int64_t q, const Body& body) const {
    const int64_t si = points.stride_n, sk = points.stride_m, n = size, last = d;
    with_dtype(points, lead.offset(q), [&](const auto* from) {
      body([=](int64_t i, int64_t k) { return i < n && k < last ? T(up(from[i * si + k * sk])) : T(0); });
    });
  }
};
template <class T>
PYML_HD Cloud<T> cloud(const PairwiseCuda<T>& c, bool of_y) {
  return of_y ? Cloud<T>{c.y, c.y_lead, c.scale_y, c.m, c.d} : Cloud<T>{c.x, c.x_lead, c.scale_x, c.n, c.d};
}

template <class T>
__device__ T over_warp(T v) {
  PYML_UNROLL
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

template <class T>
struct OneSide {
  PairwiseCuda<T> c;
  bool of_y;
};

// The point of a cloud that this warp has; warps beyond the last one go over it again and write nothing.
template <class T>
struct PointOfWarp {
  const Cloud<T> mine;
  const int64_t all, at, point;
  const int lane;

  __device__ explicit PointOfWarp(const OneSide<T>& s)
      : mine(cloud(s.c, s.of_y)),
        all(s.c.batch * mine.size),
        at(int64_t(blockIdx.x) * (kPointThreads / 32) + threadIdx.x / 32),
        point(at < all ? at : all - 1),
        lane(int(threadIdx.x % 32)) {}
  __device__ bool writes() const { return at < all; }
  // body(load), where load(k) is a coordinate.
  template <class Body>
  __device__ void typed(const Body& body) const {
    const int64_t i = point % mine.size;
    mine.typed(point / mine.size, [&](const auto& load) { body([&](int64_t k) { return load(i, k); }); });
  }
};

template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_points_kernel(OneSide<T> s) {
  const PointOfWarp<T> w(s);
  T square = T(0), odd = T(0);
  w.typed([&](const auto& load) {
    for (int64_t k = w.lane; k < s.c.d; k += 32) {
      const T v = load(k);
      square += v * v;
      odd += v - v;
    }
  });
  square = over_warp(square);
  odd = over_warp(odd);
  T* scale = s.of_y ? s.c.scale_y : s.c.scale_x;
  if (w.lane == 0 && w.writes())
    scale[w.point] = odd != T(0) ? T(NAN) : s.c.cosine ? T(1) / sqrt(square + T(FLT_MIN)) : T(1);
}

// Sums of a tile, of which thread (row, column) of 16 x 16 has those at row + 16 a and column + 16 b.
template <class T>
struct TileSums {
  T total[4][4] = {}, part[4][4] = {};
  int row, column;

  __device__ TileSums() : row(int(threadIdx.x) / 16), column(int(threadIdx.x) % 16) {}
  // f(a, b, its row, its column).
  template <class F>
  __device__ void each(const F& f) const {
    PYML_UNROLL
    for (int a = 0; a < 4; ++a) {
      PYML_UNROLL
      for (int b = 0; b < 4; ++b) f(a, b, row + 16 * a, column + 16 * b);
    }
  }
  // Adds term(of a row, of a column, a, b) for each of the kStep terms in shared memory, [kStep][kTileLd] a side, the
  // first of which is term `first` of `terms`; a partial sum ends where that says.
  template <class Term>
  __device__ void add(const T* rows, const T* columns, int64_t first, int64_t terms, const Term& term) {
    for (int k = 0; k < kStep; ++k) {
      T of_row[4], of_column[4];
      PYML_UNROLL
      for (int a = 0; a < 4; ++a)
        of_row[a] = rows[k * kTileLd + row + 16 * a], of_column[a] = columns[k * kTileLd + column + 16 * a];
      each([&](int a, int b, int, int) { part[a][b] += term(of_row[a], of_column[b], a, b); });
    }
    const bool ends = (first + kStep) % kPointSum == 0 || first + kStep >= terms;
    each([&](int a, int b, int, int) {
      total[a][b] += ends ? part[a][b] : T(0);
      part[a][b] = ends ? T(0) : part[a][b];
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_cost_fwd_kernel(PairwiseCuda<T> c) {
  PYML_SHARED(T, shared);  // [kStep][kTileLd] of each cloud
  T *xs = shared, *ys = shared + kStep * kTileLd;
  const int64_t columns = ceil_div(c.m, kTile), rows = ceil_div(c.n, kTile), block = int64_t(blockIdx.x);
  const int64_t q = block / columns / rows, i0 = block / columns % rows * kTile, j0 = block % columns * kTile;
  const Cloud<T> x = cloud(c, false), y = cloud(c, true);
  const auto fill = [&](const Cloud<T>& from, int64_t first, int64_t k0, T* to) {
    from.typed(q, [&](const auto& load) {
      for (int t = int(threadIdx.x); t < kTile * kStep; t += kPointThreads) {
        const int k = t % kStep, i = t / kStep;
        const T v = load(first + i, k0 + k);
        to[k * kTileLd + i] = c.cosine && first + i < from.size ? v * from.scale[q * from.size + first + i] : v;
      }
    });
  };
  TileSums<T> sums;
  for (int64_t k0 = 0; k0 < c.d; k0 += kStep) {
    __syncthreads();
    fill(x, i0, k0, xs);
    fill(y, j0, k0, ys);
    __syncthreads();
    sums.add(xs, ys, k0, c.d, [&](T xv, T yv, int, int) {
      const T apart = xv - yv;
      return c.cosine ? xv * yv : apart * apart;
    });
  }
  T* cost = static_cast<T*>(c.cost.data);
  sums.each([&](int a, int b, int row, int column) {
    const int64_t i = i0 + row, j = j0 + column;
    if (i >= c.n || j >= c.m) return;
    const T sx = c.scale_x[q * c.n + i], sy = c.scale_y[q * c.m + j], sum = sums.total[a][b];
    const bool lost = sx != sx || sy != sy;
    cost[(q * c.n + i) * c.m + j] = lost ? T(NAN) : c.cosine ? T(1) - sum : sum;
  });
}

// sum_j G_ij (y_j - x_i), or G_ij y_j / |y_j| for cosines, for a tile of points and coordinates.
template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_pull_kernel(OneSide<T> s) {
  PYML_SHARED(T, shared);  // [kStep][kTileLd] of slopes and of points
  T *slopes = shared, *others = shared + kStep * kTileLd;
  const PairwiseCuda<T>& c = s.c;
  const Cloud<T> mine = cloud(c, s.of_y), theirs = cloud(c, !s.of_y);
  const int64_t columns = ceil_div(c.d, kTile), rows = ceil_div(mine.size, kTile), block = int64_t(blockIdx.x);
  const int64_t q = block / columns / rows, i0 = block / columns % rows * kTile, k0 = block % columns * kTile;
  const int tid = int(threadIdx.x);
  Cloud<T> grad{c.cost, c.cost_lead, nullptr, c.n, c.m};
  if (s.of_y) {
    grad.points.stride_n = c.cost.stride_m, grad.points.stride_m = c.cost.stride_n;
    grad.size = c.m, grad.d = c.n;
  }
  TileSums<T> sums;
  T own[4][4] = {};
  mine.typed(q, [&](const auto& load) {
    sums.each([&](int a, int b, int row, int column) { own[a][b] = c.cosine ? T(0) : load(i0 + row, k0 + column); });
  });
  for (int64_t j0 = 0; j0 < theirs.size; j0 += kStep) {
    __syncthreads();
    const auto sound = [&](int64_t j) {
      const T scale = j < theirs.size ? theirs.scale[q * theirs.size + j] : T(0);
      return scale != scale ? T(0) : scale;
    };
    grad.typed(q, [&](const auto& load) {
      for (int t = tid; t < kTile * kStep; t += kPointThreads) {
        const int j = t % kStep, i = t / kStep;
        slopes[j * kTileLd + i] = sound(j0 + j) > T(0) ? load(i0 + i, j0 + j) : T(0);
      }
    });
    theirs.typed(q, [&](const auto& load) {
      for (int t = tid; t < kTile * kStep; t += kPointThreads) {
        const int k = t % kTile, j = t / kTile;
        const T scale = sound(j0 + j);
        others[j * kTileLd + k] = scale > T(0) ? scale * load(j0 + j, k0 + k) : T(0);
      }
    });
    __syncthreads();
    sums.add(slopes, others, j0, theirs.size,
             [&](T slope, T other, int a, int b) { return slope * (other - own[a][b]); });
  }
  T* to = s.of_y ? c.sum_y : c.sum_x;
  sums.each([&](int a, int b, int row, int column) {
    const int64_t i = i0 + row, k = k0 + column;
    if (i < mine.size && k < c.d) to[(q * mine.size + i) * c.d + k] = sums.total[a][b];
  });
}

// From the sums to the gradient, in place, a warp for each point. A cosine does not see a point's length.
template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_turn_kernel(OneSide<T> s) {
  const PointOfWarp<T> w(s);
  const int64_t d = s.c.d;
  T* sums = (s.of_y ? s.c.sum_y : s.c.sum_x) + w.point * d;
  const T scale = w.mine.scale[w.point];
  const bool lost = scale != scale;
  w.typed([&](const auto& load) {
    T along = T(0);
    for (int64_t k = w.lane; k < d && s.c.cosine; k += 32) along += scale * load(k) * sums[k];
    along = over_warp(along);
    for (int64_t k = w.lane; k < d && w.writes(); k += 32) {
      const T turn = scale * (scale * load(k) * along - sums[k]);
      sums[k] = lost ? T(0) : s.c.cosine ? turn : T(-2) * sums[k];
    }
  });
}

constexpr size_t tile_bytes(size_t element) { return 2 * kStep * kTileLd * element; }

template <class T>
cudaError_t points(const PairwiseCuda<T>& c, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (const bool of_y : {false, true}) {
    const int64_t blocks = ceil_div(c.batch * (of_y ? c.m : c.n), kPointThreads / 32);
    if (error == cudaSuccess)
      error = launch(pairwise_points_kernel<T>, blocks, 1, kPointThreads, 0, stream, OneSide<T>{c, of_y});
  }
  return error;
}

template <class T>
cudaError_t costs(const PairwiseCuda<T>& c, cudaStream_t stream) {
  const int64_t blocks = c.batch * ceil_div(c.n, kTile) * ceil_div(c.m, kTile);
  return launch(pairwise_cost_fwd_kernel<T>, blocks, 1, kPointThreads, tile_bytes(sizeof(T)), stream, c);
}

template <class T>
cudaError_t pull(const PairwiseCuda<T>& c, bool of_y, cudaStream_t stream) {
  const int64_t size = of_y ? c.m : c.n, blocks = c.batch * ceil_div(size, kTile) * ceil_div(c.d, kTile);
  const OneSide<T> side{c, of_y};
  const size_t bytes = tile_bytes(sizeof(T));
  const cudaError_t error = launch(pairwise_pull_kernel<T>, blocks, 1, kPointThreads, bytes, stream, side);
  if (error != cudaSuccess) return error;
  const int64_t warps = ceil_div(c.batch * size, kPointThreads / 32);
  return launch(pairwise_turn_kernel<T>, warps, 1, kPointThreads, 0, stream, side);
}

}  // namespace

#define PYML_OT_POINTS(T)                                                                       \
  cudaError_t ot_cuda_points(const PairwiseCuda<T>& c, cudaStream_t s) { return points(c, s); } \
  cudaError_t ot_cuda_costs(const PairwiseCuda<T>& c, cudaStream_t s) { return costs(c, s); }   \
  cudaError_t ot_cuda_pull(const PairwiseCuda<T>& c, bool of_y, cudaStream_t s) { return pull(c, of_y, s); }

PYML_OT_POINTS(float)
PYML_OT_POINTS(double)

}  // namespace pyml
