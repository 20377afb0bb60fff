// Costs between clouds of points on NVIDIA GPUs, and their gradient. A cost is a sum over coordinates in an order that
// their number alone fixes, a gradient one over the points of the other cloud, by one block each: no atomics.
#include <cmath>
#include <type_traits>

#include "batched_ot/ot_points_cuda.h"
#include "common/cuda.h"

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
    const int64_t at = lead.offset(q), si = points.stride_n, sk = points.stride_m, n = size, last = d;
    const auto with = [&](const auto* from) {
      body([=](int64_t i, int64_t k) { return i < n && k < last ? T(up(from[at + i * si + k * sk])) : T(0); });
    };
    if (points.dtype == DType::kDouble) with(static_cast<const double*>(points.data));
    if (points.dtype == DType::kFloat) with(static_cast<const float*>(points.data));
    if (points.dtype == DType::kHalf) with(static_cast<const __half*>(points.data));
    if (points.dtype == DType::kBFloat16) with(static_cast<const __nv_bfloat16*>(points.data));
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

// A warp for each point.
template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_points_kernel(OneSide<T> s) {
  const Cloud<T> mine = cloud(s.c, s.of_y);
  const int64_t all = s.c.batch * mine.size, at = int64_t(blockIdx.x) * (kPointThreads / 32) + threadIdx.x / 32;
  const int64_t point = at < all ? at : all - 1;
  const int lane = int(threadIdx.x % 32);
  T square = T(0), odd = T(0);
  mine.typed(point / mine.size, [&](const auto& load) {
    for (int64_t k = lane; k < s.c.d; k += 32) {
      const T v = load(point % mine.size, k);
      square += v * v;
      odd += v - v;
    }
  });
  square = over_warp(square);
  odd = over_warp(odd);
  T* scale = s.of_y ? s.c.scale_y : s.c.scale_x;
  if (lane == 0 && at < all)
    scale[point] = odd != T(0) ? T(NAN) : s.c.cosine ? T(1) / sqrt(square + T(1.17549435e-38)) : T(1);
}

// Thread (row, column) of 16 x 16 has points row + 16 a and column + 16 b of a tile.
template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_cost_fwd_kernel(PairwiseCuda<T> c) {
  PYML_SHARED(T, shared);  // [kStep][kTileLd] of each cloud
  T *xs = shared, *ys = shared + kStep * kTileLd;
  const int64_t columns = ceil_div(c.m, kTile), rows = ceil_div(c.n, kTile), block = int64_t(blockIdx.x);
  const int64_t q = block / columns / rows, i0 = block / columns % rows * kTile, j0 = block % columns * kTile;
  const int tid = int(threadIdx.x), row = tid / 16, column = tid % 16;
  const Cloud<T> x = cloud(c, false), y = cloud(c, true);
  const auto fill = [&](const Cloud<T>& from, int64_t first, int64_t k0, T* to) {
    from.typed(q, [&](const auto& load) {
      for (int t = tid; t < kTile * kStep; t += kPointThreads) {
        const int k = t % kStep, i = t / kStep;
        const T v = load(first + i, k0 + k);
        to[k * kTileLd + i] = c.cosine && first + i < from.size ? v * from.scale[q * from.size + first + i] : v;
      }
    });
  };
  T total[4][4] = {}, part[4][4] = {};
  for (int64_t k0 = 0; k0 < c.d; k0 += kStep) {
    __syncthreads();
    fill(x, i0, k0, xs);
    fill(y, j0, k0, ys);
    __syncthreads();
    for (int k = 0; k < kStep; ++k) {
      T xv[4], yv[4];
      PYML_UNROLL
      for (int a = 0; a < 4; ++a) xv[a] = xs[k * kTileLd + row + 16 * a], yv[a] = ys[k * kTileLd + column + 16 * a];
      PYML_UNROLL
      for (int a = 0; a < 4; ++a) {
        PYML_UNROLL
        for (int b = 0; b < 4; ++b) {
          const T apart = xv[a] - yv[b];
          part[a][b] += c.cosine ? xv[a] * yv[b] : apart * apart;
        }
      }
    }
    const bool ends = (k0 + kStep) % kPointSum == 0 || k0 + kStep >= c.d;
    PYML_UNROLL
    for (int a = 0; a < 4; ++a) {
      PYML_UNROLL
      for (int b = 0; b < 4; ++b) {
        total[a][b] += ends ? part[a][b] : T(0);
        part[a][b] = ends ? T(0) : part[a][b];
      }
    }
  }
  T* cost = static_cast<T*>(c.cost.data);
  PYML_UNROLL
  for (int a = 0; a < 4; ++a) {
    PYML_UNROLL
    for (int b = 0; b < 4; ++b) {
      const int64_t i = i0 + row + 16 * a, j = j0 + column + 16 * b;
      if (i >= c.n || j >= c.m) continue;
      const T sx = c.scale_x[q * c.n + i], sy = c.scale_y[q * c.m + j];
      const bool lost = sx != sx || sy != sy;
      cost[(q * c.n + i) * c.m + j] = lost ? T(NAN) : c.cosine ? T(1) - total[a][b] : total[a][b];
    }
  }
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
  const int tid = int(threadIdx.x), row = tid / 16, column = tid % 16;
  Cloud<T> grad{c.cost, c.cost_lead, nullptr, c.n, c.m};
  if (s.of_y) {
    grad.points.stride_n = c.cost.stride_m, grad.points.stride_m = c.cost.stride_n;
    grad.size = c.m, grad.d = c.n;
  }
  T own[4][4] = {}, total[4][4] = {}, part[4][4] = {};
  mine.typed(q, [&](const auto& load) {
    PYML_UNROLL
    for (int a = 0; a < 4; ++a) {
      PYML_UNROLL
      for (int b = 0; b < 4; ++b) own[a][b] = c.cosine ? T(0) : load(i0 + row + 16 * a, k0 + column + 16 * b);
    }
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
    for (int j = 0; j < kStep; ++j) {
      T slope[4], other[4];
      PYML_UNROLL
      for (int a = 0; a < 4; ++a)
        slope[a] = slopes[j * kTileLd + row + 16 * a], other[a] = others[j * kTileLd + column + 16 * a];
      PYML_UNROLL
      for (int a = 0; a < 4; ++a) {
        PYML_UNROLL
        for (int b = 0; b < 4; ++b) part[a][b] += slope[a] * (other[b] - own[a][b]);
      }
    }
    const bool ends = (j0 + kStep) % kPointSum == 0 || j0 + kStep >= theirs.size;
    PYML_UNROLL
    for (int a = 0; a < 4; ++a) {
      PYML_UNROLL
      for (int b = 0; b < 4; ++b) {
        total[a][b] += ends ? part[a][b] : T(0);
        part[a][b] = ends ? T(0) : part[a][b];
      }
    }
  }
  T* sums = s.of_y ? c.sum_y : c.sum_x;
  PYML_UNROLL
  for (int a = 0; a < 4; ++a) {
    PYML_UNROLL
    for (int b = 0; b < 4; ++b) {
      const int64_t i = i0 + row + 16 * a, k = k0 + column + 16 * b;
      if (i < mine.size && k < c.d) sums[(q * mine.size + i) * c.d + k] = total[a][b];
    }
  }
}

// From the sums to the gradient, in place, a warp for each point. A cosine does not see a point's length.
template <class T>
__global__ void __launch_bounds__(kPointThreads) pairwise_turn_kernel(OneSide<T> s) {
  const Cloud<T> mine = cloud(s.c, s.of_y);
  const int64_t all = s.c.batch * mine.size, at = int64_t(blockIdx.x) * (kPointThreads / 32) + threadIdx.x / 32;
  const int64_t point = at < all ? at : all - 1, d = s.c.d;
  const int lane = int(threadIdx.x % 32);
  T* sums = (s.of_y ? s.c.sum_y : s.c.sum_x) + point * d;
  const T scale = mine.scale[point];
  const bool lost = scale != scale;
  mine.typed(point / mine.size, [&](const auto& load) {
    T along = T(0);
    for (int64_t k = lane; k < d && s.c.cosine; k += 32) along += scale * load(point % mine.size, k) * sums[k];
    along = over_warp(along);
    for (int64_t k = lane; k < d && at < all; k += 32) {
      const T turn = scale * (scale * load(point % mine.size, k) * along - sums[k]);
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
