// kan_linear on NVIDIA GPUs: see bspline_basis_cuda.cu.
#include "bspline/bspline_device.h"

namespace pyml {
namespace {

// Coefficients come as [in, functions, out]: the lanes of a warp read neighbouring outputs of one function. A warp
// works on one row at a time, so the k + 1 reads of a value are whole cache lines, and all rows of a block share them
// in L1.

constexpr int kKanRows = 4, kKanWide = 2, kKanFeatures = 8;  // rows and output groups of one thread; features at once

// Lanes that one row gets: fewer than 32 when there are fewer outputs, so that a warp takes several rows at once.
__device__ __host__ inline int kan_lanes(int64_t outs) { return outs > 16 ? 32 : (outs > 8 ? 16 : 8); }
__device__ __host__ inline int kan_rows(int64_t outs) { return kThreads / kan_lanes(outs) * kKanRows; }
__device__ __host__ inline int kan_outs(int64_t outs) { return kan_lanes(outs) * kKanWide; }

template <class C>
__global__ void __launch_bounds__(kThreads) kan_fwd_kernel(C c) {
  using A = typename C::A;
  constexpr int kLd = C::kMax + 2;
  const int lanes = kan_lanes(c.outs), rows = kan_rows(c.outs), wide = kan_outs(c.outs);
  PYML_SHARED(A, values);  // [8 features][rows][kMax + 1 values, base], then first functions
  int* firsts = reinterpret_cast<int*>(values + kKanFeatures * rows * kLd);
  const int64_t out_blocks = ceil_div(c.outs, wide);
  const int64_t row0 = block_id() / out_blocks * rows;
  const int tid = threadIdx.x, lane = tid % lanes, group = tid / lanes, nb = c.nb();
  int64_t out[kKanWide];
  PYML_UNROLL
  for (int v = 0; v < kKanWide; ++v) out[v] = block_id() % out_blocks * wide + v * lanes + lane;
  A acc[kKanRows][kKanWide] = {};
  const A *coeff = c.weights(c.coeff), *base_weight = c.weights(c.base_weight);
  for (int64_t f0 = 0; f0 < c.features; f0 += kKanFeatures) {
    for (int i = tid; i < rows * kKanFeatures; i += kThreads) {
      const int64_t r = row0 + i / kKanFeatures, f = f0 + i % kKanFeatures;
      const bool real = r < c.rows && f < c.features;
      const A value = real ? c.load(r * c.features + f) : A(0);
      auto local = c.local(value, real ? f : 0, 0);
      const int at = i % kKanFeatures * rows + i / kKanFeatures;
      local.value[0] += local.rest;  // NaN reaches every output
      PYML_UNROLL
      for (int q = 0; q <= C::kMax; ++q) values[at * kLd + q] = local.value[q];
      values[at * kLd + C::kMax + 1] = base_value(value, c.base_kind());
      firsts[at] = local.first;
    }
    __syncthreads();
    const int features = c.features - f0 < kKanFeatures ? int(c.features - f0) : kKanFeatures;
    for (int i = 0; i < features; ++i) {
      PYML_UNROLL
      for (int r = 0; r < kKanRows; ++r) {
        const int at = i * rows + group * kKanRows + r;
        const A* first = coeff + ((f0 + i) * nb + firsts[at]) * c.outs;
        PYML_UNROLL
        for (int v = 0; v < kKanWide; ++v) {
          if (out[v] >= c.outs) continue;
          PYML_UNROLL
          for (int q = 0; q <= C::kMax; ++q)
            if (q <= c.k()) acc[r][v] += values[at * kLd + q] * first[q * c.outs + out[v]];
          if (base_weight) acc[r][v] += values[at * kLd + C::kMax + 1] * base_weight[(f0 + i) * c.outs + out[v]];
        }
      }
    }
    __syncthreads();
  }
  PYML_UNROLL
  for (int r = 0; r < kKanRows; ++r) {
    const int64_t row = row0 + group * kKanRows + r;
    PYML_UNROLL
    for (int v = 0; v < kKanWide; ++v)
      if (row < c.rows && out[v] < c.outs)
        static_cast<typename C::X*>(c.y)[row * c.outs + out[v]] = down<typename C::X>(acc[r][v]);
  }
}

constexpr int kKanXRows = 32, kKanXFeatures = kThreads / kKanXRows, kKanXOuts = 32;

// A thread owns one dx: it adds up grad times each of its k + 1 coefficient rows, then weights the sums by the slopes.
template <class C>
__global__ void __launch_bounds__(kThreads) kan_bwd_x_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, grads);  // [32 rows][32 outputs + 1]: no two rows of a column share a bank
  const int64_t f_blocks = ceil_div(c.features, kKanXFeatures);
  const int64_t row0 = block_id() / f_blocks * kKanXRows;
  const int tid = threadIdx.x, r = tid % kKanXRows, nb = c.nb();
  const int64_t row = row0 + r, f = block_id() % f_blocks * kKanXFeatures + tid / kKanXRows;
  const bool real = row < c.rows && f < c.features;
  const int64_t feature = real ? f : 0;
  const A value = real ? c.load(row * c.features + f) : A(0);
  const auto local = c.local(value, feature, 1);
  const A *first = c.weights(c.coeff) + (feature * nb + local.first) * c.outs, *base_weight = c.weights(c.base_weight);
  if (base_weight) base_weight += feature * c.outs;
  A acc[C::kMax + 1] = {}, acc_base = A(0);
  for (int64_t o0 = 0; o0 < c.outs; o0 += kKanXOuts) {
    for (int i = tid; i < kKanXRows * kKanXOuts; i += kThreads) {
      const int64_t from = row0 + i / kKanXOuts, o = o0 + i % kKanXOuts;
      const bool there = from < c.rows && o < c.outs;
      grads[i / kKanXOuts * (kKanXOuts + 1) + i % kKanXOuts] = there ? c.load_grad(from * c.outs + o) : A(0);
    }
    __syncthreads();
    const int outs = c.outs - o0 < kKanXOuts ? int(c.outs - o0) : kKanXOuts;
    for (int o = 0; o < outs; ++o) {
      const A g = grads[r * (kKanXOuts + 1) + o];
      PYML_UNROLL
      for (int q = 0; q <= C::kMax; ++q)
        if (q <= c.k()) acc[q] += g * first[q * c.outs + o0 + o];
      if (base_weight) acc_base += g * base_weight[o0 + o];
    }
    __syncthreads();
  }
  A sum = local.rest;
  PYML_UNROLL
  for (int q = 0; q <= C::kMax; ++q)
    if (q <= c.k()) sum += local.value[q] * acc[q];
  if (base_weight) sum += base_slope(value, c.base_kind()) * acc_base;
  if (real) static_cast<typename C::X*>(c.dx)[row * c.features + f] = down<typename C::X>(sum);
}

constexpr int kKanWRows = 16, kKanWColumns = 8;
__device__ __host__ inline int kan_w_outs(int64_t outs) { return outs > 32 ? 64 : (outs > 16 ? 32 : 16); }
__device__ __host__ inline int kan_w_features(int64_t outs) { return kThreads / kan_w_outs(outs); }

// A thread owns one (output, feature) and 8 functions, in registers; a block walks through one part of the rows.
template <class C>
__global__ void __launch_bounds__(kThreads) kan_bwd_coeff_kernel(C c) {
  using A = typename C::A;
  constexpr int kLd = kKanWColumns + 1;
  const int wide = kan_w_outs(c.outs), high = kan_w_features(c.outs), tid = threadIdx.x, nb = c.nb();
  PYML_SHARED(A, grads);                // [16 rows][wide]
  A* tiles = grads + kKanWRows * wide;  // [16 rows][high][8 functions, base]
  const int64_t out_blocks = ceil_div(c.outs, wide), f_blocks = ceil_div(c.features, high);
  const int64_t o0 = block_id() % out_blocks * wide, f0 = block_id() / out_blocks % f_blocks * high;
  const int c0 = int(block_id() / (out_blocks * f_blocks)) * kKanWColumns;
  const int64_t split = blockIdx.y, begin = split * c.split_size;
  const int64_t end = begin + c.split_size < c.rows ? begin + c.split_size : c.rows;
  const int o = tid % wide, i = tid / wide;
  A acc[kKanWColumns] = {}, acc_base = A(0);
  for (int64_t row0 = begin; row0 < end; row0 += kKanWRows) {
    for (int n = tid; n < kKanWRows * wide; n += kThreads) {
      const int64_t row = row0 + n / wide, out = o0 + n % wide;
      grads[n] = row < end && out < c.outs ? c.load_grad(row * c.outs + out) : A(0);
    }
    for (int n = tid; n < kKanWRows * high; n += kThreads) {
      const int64_t row = row0 + n / high, f = f0 + n % high;
      const bool real = row < end && f < c.features;
      const A value = real ? c.load(row * c.features + f) : A(0);
      const auto local = c.local(value, real ? f : 0, 0);
      A* tile = tiles + n * kLd;
      for (int column = 0; column < kKanWColumns; ++column) tile[column] = local.rest;
      PYML_UNROLL
      for (int q = 0; q <= C::kMax; ++q) {
        const int column = local.first + q - c0;
        if (q <= c.k() && column >= 0 && column < kKanWColumns) tile[column] = local.value[q];
      }
      tile[kKanWColumns] = base_value(value, c.base_kind());
    }
    __syncthreads();
    for (int r = 0; r < kKanWRows; ++r) {
      const A g = grads[r * wide + o];
      const A* tile = tiles + (r * high + i) * kLd;
      PYML_UNROLL
      for (int column = 0; column < kKanWColumns; ++column) acc[column] += g * tile[column];
      acc_base += g * tile[kKanWColumns];
    }
    __syncthreads();
  }
  const int64_t out = o0 + o, f = f0 + i;
  if (out >= c.outs || f >= c.features) return;
  const int64_t at = (split * c.outs + out) * c.features + f;
  if (c.part_coeff) {
    PYML_UNROLL
    for (int column = 0; column < kKanWColumns; ++column)
      if (c0 + column < nb) static_cast<A*>(c.part_coeff)[at * nb + c0 + column] = acc[column];
  }
  if (c.part_base && c0 == 0) static_cast<A*>(c.part_base)[at] = acc_base;
}

int64_t kan_w_blocks(const BsplineCuda& c) {
  return ceil_div(c.outs, kan_w_outs(c.outs)) * ceil_div(c.features, kan_w_features(c.outs)) *
         ceil_div(c.functions(), kKanWColumns);
}

}  // namespace

extern "C" {

void bspline_cuda_kan_split(const BsplineCuda* call, int64_t* count, int64_t* size) {
  Split::of(call->rows, kKanWRows, kan_w_blocks(*call), 1056).store(count, size);
}

cudaError_t bspline_cuda_kan_fwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const int64_t rows = kan_rows(c.outs), blocks = ceil_div(c.rows, rows) * ceil_div(c.outs, kan_outs(c.outs));
    const size_t shared = size_t(kKanFeatures * rows) * ((C::kMax + 2) * sizeof(typename C::A) + sizeof(int));
    return launch(kan_fwd_kernel<C>, blocks, 1, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_kan_bwd_x(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const int64_t blocks = ceil_div(c.rows, kKanXRows) * ceil_div(c.features, kKanXFeatures);
    const size_t shared = kKanXRows * (kKanXOuts + 1) * sizeof(typename C::A);
    return launch(kan_bwd_x_kernel<C>, blocks, 1, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_kan_bwd_coeff(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const int tile = kan_w_outs(c.outs) + kan_w_features(c.outs) * (kKanWColumns + 1);
    const size_t shared = size_t(kKanWRows * tile) * sizeof(typename C::A);
    return launch(kan_bwd_coeff_kernel<C>, kan_w_blocks(c), c.split_count, kThreads, shared, stream, c);
  });
}

}  // extern "C"

}  // namespace pyml
