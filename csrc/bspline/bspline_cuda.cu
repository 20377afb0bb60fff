// B-spline kernels for NVIDIA GPUs in exact float32 (float64 for double): local support, so only k + 1 functions a
// value.
//
// The basis lives in registers and shared memory only. Sums over rows are made in parts (common/cuda.h, Split) and
// added in order: no atomics, the same bits on every run. X is the dtype of x, A that of all arithmetic, kOrder a fixed
// order (the cubic) or 0 for any. All offsets are 64-bit.
#include "bspline/bspline_cuda.h"

#include "bspline/basis.h"
#include "common/cuda.h"

namespace pyml {
namespace {

constexpr int kThreads = 256;

// The call as kernels see it: constants folded in, pointers with their types.
template <class X_, class A_, int kOrder>
struct Call : BsplineCuda {
  using X = X_;
  using A = A_;
  static constexpr int kMax = kOrder ? kOrder : kMaxOrder;
  __device__ int k() const { return kOrder ? kOrder : int(order); }
  __device__ int nb() const { return int(count) - k() - 1; }
  __device__ Base base_kind() const { return static_cast<Base>(base); }
  __device__ Local<A, kMax> local(A value, int64_t feature, int deriv) const {
    const A* knots = static_cast<const A*>(grid) + feature * grid_row;
    return nonzero<kMax>(value, knots, int(count), k(), deriv, static_cast<Extrapolation>(extrapolation));
  }
  __device__ A load(int64_t at) const { return A(up(static_cast<const X*>(x)[at])); }
  __device__ A load_grad(int64_t at) const { return A(up(static_cast<const X*>(grad)[at])); }
  __device__ const A* weights(const void* p) const { return static_cast<const A*>(p); }
  __device__ int64_t pixel(int64_t r) const {  // offset of output pixel r in x
    if (map.pixels == 1) return r * map.image;
    const int64_t p = r % map.pixels;
    return r / map.pixels * map.image + p / map.width * map.step_h + p % map.width * map.step_w;
  }
  __device__ int64_t tap(int64_t f) const {  // offset of feature f in x
    if (map.taps == 1) return f * map.plane;
    const int64_t t = f % map.taps;
    return f / map.taps * map.plane + t / map.kernel_w * map.tap_h + t % map.kernel_w * map.tap_w;
  }
  __device__ int64_t
  output(int64_t r) const {  // offset of output 0 of row r in y and grad; outputs lie map.pixels apart
    if (map.pixels == 1) return r * outs;
    return r / map.pixels * outs * map.pixels + r % map.pixels;
  }
};

__device__ inline int64_t block_id() { return static_cast<int64_t>(blockIdx.x); }

// --- basis
// ------------------------------------------------------------------------------------------------------------

constexpr int kBasisElements = 64;

// A block evaluates 64 inputs once, then all its threads write the columns side by side.
template <class C>
__global__ void __launch_bounds__(kThreads) basis_fwd_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, values);  // [64][kMax + 2], then the first function of each as int
  constexpr int kLd = C::kMax + 2;
  int* firsts = reinterpret_cast<int*>(values + kBasisElements * kLd);
  const int64_t start = block_id() * kBasisElements, size = c.rows * c.features;
  const int tid = threadIdx.x, nb = c.nb();
  if (tid < kBasisElements && start + tid < size) {
    const auto local = c.local(c.load(start + tid), (start + tid) % c.features, int(c.derivative));
    for (int q = 0; q <= C::kMax; ++q) values[tid * kLd + q] = local.value[q];
    values[tid * kLd + C::kMax + 1] = local.rest;
    firsts[tid] = local.first;
  }
  __syncthreads();
  for (int64_t i = tid; i < int64_t(kBasisElements) * nb; i += kThreads) {
    const int e = int(i / nb), q = int(i % nb) - firsts[e];
    if (start + e >= size) break;
    const A value = values[e * kLd + (q >= 0 && q <= c.k() ? q : C::kMax + 1)];
    static_cast<typename C::X*>(c.y)[start * nb + i] = down<typename C::X>(value);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) basis_bwd_kernel(C c) {
  using A = typename C::A;
  const int64_t e = block_id() * kThreads + threadIdx.x;
  if (e >= c.rows * c.features) return;
  const int nb = c.nb();
  const auto local = c.local(c.load(e), e % c.features, int(c.derivative));
  A sum = local.rest;
  PYML_UNROLL
  for (int q = 0; q <= C::kMax; ++q)
    if (q <= c.k()) sum += local.value[q] * c.load_grad(e * nb + function_at(local, q, nb));
  static_cast<typename C::X*>(c.dx)[e] = down<typename C::X>(sum);
}

// --- KAN
// --------------------------------------------------------------------------------------------------------------
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
        const int first = firsts[at];
        PYML_UNROLL
        for (int v = 0; v < kKanWide; ++v) {
          if (out[v] >= c.outs) continue;
          PYML_UNROLL
          for (int q = 0; q <= C::kMax; ++q) {
            if (q > c.k()) continue;
            int fn = first + q;
            fn = fn < 0 ? 0 : (fn >= nb ? nb - 1 : fn);  // a function that does not exist has the value 0
            acc[r][v] += values[at * kLd + q] * coeff[((f0 + i) * nb + fn) * c.outs + out[v]];
          }
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
  const A *coeff = c.weights(c.coeff) + feature * nb * c.outs, *base_weight = c.weights(c.base_weight);
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
        if (q <= c.k()) acc[q] += g * coeff[function_at(local, q, nb) * c.outs + o0 + o];
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

// --- WKAN
// ------------------------------------------------------------------------------------------------------------- z =
// [base(x), s(x)] goes to shared memory and from there into register tiles, as in any matrix product.

constexpr int kWkanRows = 64, kWkanFeatures = 8, kSide = 16;  // 16 x 16 threads

// kWide: outputs of one thread, 16 apart.
template <class C, int kWide>
__global__ void __launch_bounds__(kThreads) wkan_fwd_kernel(C c) {
  using A = typename C::A;
  constexpr int kOuts = kSide * kWide, kTall = kWkanRows / kSide, kColumns = 2 * kWkanFeatures, kLd = kWkanRows + 1;
  PYML_SHARED(A, z);          // [16 columns: base and spline of 8 features][64 rows + 1]
  A* w = z + kColumns * kLd;  // [16 columns][kOuts + 1]
  const int64_t out_blocks = ceil_div(c.outs, kOuts);
  const int64_t row0 = block_id() / out_blocks * kWkanRows, o0 = block_id() % out_blocks * kOuts;
  const int tid = threadIdx.x, across = tid % kSide, down_ = tid / kSide;
  const A *base_weight = c.weights(c.base_weight), *scaler = c.weights(c.scaler);
  A acc[kTall][kWide] = {};
  for (int64_t f0 = 0; f0 < c.features; f0 += kWkanFeatures) {
    for (int n = tid; n < kWkanRows * kWkanFeatures; n += kThreads) {
      const int r = n / kWkanFeatures, i = n % kWkanFeatures;
      const bool real = row0 + r < c.rows && f0 + i < c.features;
      const int64_t f = real ? f0 + i : 0;
      const A value = real ? c.load(c.pixel(row0 + r) + c.tap(f)) : A(0);
      z[2 * i * kLd + r] = base_weight ? base_value(value, c.base_kind()) : A(0);
      const auto local = c.local(value, f, 0);
      z[(2 * i + 1) * kLd + r] = contract(local, c.weights(c.coeff) + f * c.nb(), c.nb(), c.k());
    }
    for (int n = tid; n < kOuts * kWkanFeatures; n += kThreads) {
      const int64_t o = o0 + n / kWkanFeatures, f = f0 + n % kWkanFeatures;
      const bool real = o < c.outs && f < c.features;
      const int at = 2 * (n % kWkanFeatures) * (kOuts + 1) + n / kWkanFeatures;
      w[at] = real && base_weight ? base_weight[o * c.features + f] : A(0);
      w[at + kOuts + 1] = real ? scaler[o * c.features + f] : A(0);
    }
    __syncthreads();
    // Columns past the last feature are left out: their z is not 0, and 0 * z would turn an overflow into NaN.
    const int columns = c.features - f0 < kWkanFeatures ? int(2 * (c.features - f0)) : kColumns;
    for (int column = 0; column < columns; ++column) {
      A a[kTall], b[kWide];
      PYML_UNROLL
      for (int t = 0; t < kTall; ++t) a[t] = z[column * kLd + down_ + t * kSide];
      PYML_UNROLL
      for (int v = 0; v < kWide; ++v) b[v] = w[column * (kOuts + 1) + across + v * kSide];
      PYML_UNROLL
      for (int t = 0; t < kTall; ++t) {
        PYML_UNROLL
        for (int v = 0; v < kWide; ++v) acc[t][v] += a[t] * b[v];
      }
    }
    __syncthreads();
  }
  PYML_UNROLL
  for (int t = 0; t < kTall; ++t) {
    const int64_t row = row0 + down_ + t * kSide;
    if (row >= c.rows) continue;
    PYML_UNROLL
    for (int v = 0; v < kWide; ++v) {
      const int64_t o = o0 + across + v * kSide;
      if (o < c.outs)
        static_cast<typename C::X*>(c.y)[c.output(row) + o * c.map.pixels] = down<typename C::X>(acc[t][v]);
    }
  }
}

constexpr int kZFunctions = 16, kZOuts = 16, kZTall = kWkanRows / kSide;

// Gradient of z by a product over the outputs; then dx, and the coefficient sums of one part of the rows. Each thread
// adds into sums of its own in shared memory ([function][thread]: no conflicts), which are added in order at the end.
template <class C>
__global__ void __launch_bounds__(kThreads) wkan_bwd_z_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, sums);                      // [16 functions][256 threads]
  A* grads = sums + kZFunctions * kThreads;  // [16 outputs][64 rows + 1]
  A* ws = grads + kZOuts * (kWkanRows + 1);  // scaler and base weight, [16 outputs][16 features] each
  A* wb = ws + kZOuts * kSide;
  const int64_t f_blocks = ceil_div(c.features, kSide);
  const int64_t f0 = block_id() % f_blocks * kSide;
  const int c0 = int(block_id() / f_blocks) * kZFunctions;
  const int tid = threadIdx.x, i = tid % kSide, group = tid / kSide, nb = c.nb();
  const bool want_x = c.dx && c0 == 0, has_base = c.base_weight && want_x;
  const int64_t split = blockIdx.y, begin = split * c.split_size;
  const int64_t end = begin + c.split_size < c.rows ? begin + c.split_size : c.rows;
  const int64_t f = f0 + i, feature = f < c.features ? f : 0;
  const A* coeff = c.weights(c.coeff) + feature * nb;
  for (int n = 0; n < kZFunctions; ++n) sums[n * kThreads + tid] = A(0);
  for (int64_t row0 = begin; row0 < end; row0 += kWkanRows) {
    A gs[kZTall] = {}, gb[kZTall] = {};
    for (int64_t o0 = 0; o0 < c.outs; o0 += kZOuts) {
      for (int n = tid; n < kZOuts * kWkanRows; n += kThreads) {
        // Linear layers have neighbouring outputs side by side, images neighbouring pixels.
        const int o = c.map.pixels == 1 ? n % kZOuts : n / kWkanRows,
                  r = c.map.pixels == 1 ? n / kZOuts : n % kWkanRows;
        const bool real = row0 + r < end && o0 + o < c.outs;
        const A g = real ? c.load_grad(c.output(row0 + r) + (o0 + o) * c.map.pixels) : A(0);
        grads[o * (kWkanRows + 1) + r] = g;
      }
      const int64_t o = o0 + group;  // 16 groups, 16 outputs
      const bool real = o < c.outs && f < c.features;
      ws[group * kSide + i] = real ? c.weights(c.scaler)[o * c.features + f] : A(0);
      wb[group * kSide + i] = real && has_base ? c.weights(c.base_weight)[o * c.features + f] : A(0);
      __syncthreads();
      for (int n = 0; n < kZOuts; ++n) {
        PYML_UNROLL
        for (int t = 0; t < kZTall; ++t) {
          const A g = grads[n * (kWkanRows + 1) + group + t * kSide];
          gs[t] += g * ws[n * kSide + i];
          gb[t] += g * wb[n * kSide + i];
        }
      }
      __syncthreads();
    }
    for (int t = 0; t < kZTall; ++t) {
      const int64_t row = row0 + group + t * kSide;
      if (row >= end || f >= c.features) continue;
      const int64_t at = c.pixel(row) + c.tap(f);
      const A value = c.load(at);
      A g = gs[0], g_base = gb[0];
      PYML_UNROLL
      for (int u = 1; u < kZTall; ++u) {
        g = t == u ? gs[u] : g;  // registers have no run-time index
        g_base = t == u ? gb[u] : g_base;
      }
      if (c.part_coeff) {
        const auto local = c.local(value, feature, 0);
        if (local.rest != A(0))  // NaN reaches every function
          for (int n = 0; n < kZFunctions; ++n) sums[n * kThreads + tid] += local.rest * g;
        PYML_UNROLL
        for (int q = 0; q <= C::kMax; ++q) {
          const int n = local.first + q - c0;
          if (q <= c.k() && n >= 0 && n < kZFunctions) sums[n * kThreads + tid] += local.value[q] * g;
        }
      }
      if (want_x) {
        A sum = contract(c.local(value, feature, 1), coeff, nb, c.k()) * g;
        if (has_base) sum += base_slope(value, c.base_kind()) * g_base;
        static_cast<typename C::X*>(c.dx)[at] = down<typename C::X>(sum);
      }
    }
  }
  __syncthreads();
  if (!c.part_coeff) return;
  const int n = group;  // 16 functions x 16 features: one thread each
  if (f >= c.features || c0 + n >= nb) return;
  A total = A(0);
  for (int g = 0; g < kSide; ++g) total += sums[n * kThreads + g * kSide + i];
  static_cast<A*>(c.part_coeff)[(split * c.features + f) * nb + c0 + n] = total;
}

constexpr int kWOuts = 64, kWRows = 16, kWWide = kWOuts / kSide;

// Gradients of scaler and base weight over one part of the rows: 64 outputs x 16 features a block.
template <class C>
__global__ void __launch_bounds__(kThreads) wkan_bwd_weight_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, grads);                  // [16 rows][64 outputs + 1]
  A* zb = grads + kWRows * (kWOuts + 1);  // base and spline, [16 rows][16 features] each
  A* zs = zb + kWRows * kSide;
  const int64_t out_blocks = ceil_div(c.outs, kWOuts);
  const int64_t o0 = block_id() % out_blocks * kWOuts, f0 = block_id() / out_blocks * kSide;
  const int tid = threadIdx.x, i = tid % kSide, group = tid / kSide;
  const int64_t split = blockIdx.y, begin = split * c.split_size;
  const int64_t end = begin + c.split_size < c.rows ? begin + c.split_size : c.rows;
  const int64_t f = f0 + i;
  A acc_base[kWWide] = {}, acc[kWWide] = {};
  for (int64_t row0 = begin; row0 < end; row0 += kWRows) {
    for (int n = tid; n < kWRows * kWOuts; n += kThreads) {
      const bool images = c.map.pixels != 1;
      const int o = images ? n / kWRows : n % kWOuts, r = images ? n % kWRows : n / kWOuts;
      const bool real = row0 + r < end && o0 + o < c.outs;
      grads[r * (kWOuts + 1) + o] = real ? c.load_grad(c.output(row0 + r) + (o0 + o) * c.map.pixels) : A(0);
    }
    const int64_t row = row0 + group;  // 16 rows x 16 features: one thread each
    const bool real = row < end && f < c.features;
    const A value = real ? c.load(c.pixel(row) + c.tap(f)) : A(0);
    const int64_t feature = real ? f : 0;
    zb[group * kSide + i] = real && c.part_base ? base_value(value, c.base_kind()) : A(0);
    zs[group * kSide + i] = A(0);
    if (real && c.part_scaler)
      zs[group * kSide + i] =
          contract(c.local(value, feature, 0), c.weights(c.coeff) + feature * c.nb(), c.nb(), c.k());
    __syncthreads();
    for (int r = 0; r < kWRows; ++r) {
      PYML_UNROLL
      for (int v = 0; v < kWWide; ++v) {
        const A g = grads[r * (kWOuts + 1) + group + v * kSide];
        acc_base[v] += g * zb[r * kSide + i];
        acc[v] += g * zs[r * kSide + i];
      }
    }
    __syncthreads();
  }
  if (f >= c.features) return;
  PYML_UNROLL
  for (int v = 0; v < kWWide; ++v) {
    const int64_t o = o0 + group + v * kSide;
    if (o >= c.outs) continue;
    const int64_t at = (split * c.outs + o) * c.features + f;
    if (c.part_base) static_cast<A*>(c.part_base)[at] = acc_base[v];
    if (c.part_scaler) static_cast<A*>(c.part_scaler)[at] = acc[v];
  }
}

// dx of a convolution, gathered: a thread owns an input pixel and asks each of its taps which output pixel used it
// there. No two threads add to one address, and no patch is stored.
template <class C>
__global__ void __launch_bounds__(kThreads) conv2d_bwd_x_kernel(C c) {
  using A = typename C::A;
  const Conv2d& v = c.conv;
  const int64_t area = v.height * v.width, at = block_id() * kThreads + threadIdx.x;
  if (at >= v.images * v.channels * area) return;
  const int64_t image = at / (v.channels * area), channel = at / area % v.channels;
  const int64_t h = at % area / v.width, w = at % v.width, pixels = v.out_height * v.out_width;
  const int nb = c.nb();
  const A value = c.load(at), slope = base_slope(value, c.base_kind());
  const A *scaler = c.weights(c.scaler), *base_weight = c.weights(c.base_weight);
  A sum = A(0);
  for (int64_t tap = 0; tap < v.kernel_h * v.kernel_w; ++tap) {
    const int64_t y = h - tap / v.kernel_w * v.dilation_h, x = w - tap % v.kernel_w * v.dilation_w;
    if (y < 0 || x < 0 || y % v.stride_h || x % v.stride_w) continue;
    if (y / v.stride_h >= v.out_height || x / v.stride_w >= v.out_width) continue;
    const int64_t f = channel * v.kernel_h * v.kernel_w + tap;
    const int64_t from = image * c.outs * pixels + y / v.stride_h * v.out_width + x / v.stride_w;
    A gs = A(0), gb = A(0);
    for (int64_t o = 0; o < c.outs; ++o) {
      const A g = c.load_grad(from + o * pixels);
      gs += g * scaler[o * c.features + f];
      if (base_weight) gb += g * base_weight[o * c.features + f];
    }
    sum += contract(c.local(value, f, 1), c.weights(c.coeff) + f * nb, nb, c.k()) * gs + slope * gb;
  }
  static_cast<typename C::X*>(c.dx)[at] = down<typename C::X>(sum);
}

template <class A>
struct SumParams {
  const A* part;
  A* out;
  int64_t count, size;
};

template <class A>
__global__ void __launch_bounds__(kThreads) sum_kernel(SumParams<A> p) {
  const int64_t e = block_id() * kThreads + threadIdx.x;
  if (e >= p.size) return;
  A sum = A(0);
  for (int64_t s = 0; s < p.count; ++s) sum += p.part[s * p.size + e];
  p.out[e] = sum;
}

// --- launchers
// --------------------------------------------------------------------------------------------------------

// Calls f with the Call type of this dtype and order: a cubic of its own, any other order (and double) by one that
// loops.
template <class F>
cudaError_t dispatch(const BsplineCuda& call, F f) {
  if (call.order < 1 || call.order > kMaxOrder || call.count < 2 * call.order + 2 || call.count >= (1 << 24))
    return cudaErrorInvalidValue;
  switch (static_cast<DType>(call.dtype)) {
    case DType::kDouble:
      return f(Call<double, double, 0>{call});
    case DType::kFloat:
      return call.order == 3 ? f(Call<float, float, 3>{call}) : f(Call<float, float, 0>{call});
    case DType::kHalf:
      return call.order == 3 ? f(Call<__half, float, 3>{call}) : f(Call<__half, float, 0>{call});
    case DType::kBFloat16:
      return call.order == 3 ? f(Call<__nv_bfloat16, float, 3>{call}) : f(Call<__nv_bfloat16, float, 0>{call});
  }
  return cudaErrorInvalidValue;
}

int64_t kan_w_blocks(const BsplineCuda& c) {
  return ceil_div(c.outs, kan_w_outs(c.outs)) * ceil_div(c.features, kan_w_features(c.outs)) *
         ceil_div(c.functions(), kKanWColumns);
}
int64_t wkan_z_blocks(const BsplineCuda& c) {
  return ceil_div(c.features, kSide) * (c.part_coeff ? ceil_div(c.functions(), kZFunctions) : 1);
}
int64_t wkan_w_blocks(const BsplineCuda& c) { return ceil_div(c.outs, kWOuts) * ceil_div(c.features, kSide); }

}  // namespace

extern "C" {

void bspline_cuda_split(int64_t kernel, const BsplineCuda* call, int64_t* count, int64_t* size) {
  Split split;
  switch (static_cast<CoeffKernel>(kernel)) {
    case CoeffKernel::kKan:
      split = Split::of(call->rows, kKanWRows, kan_w_blocks(*call), 1056);
      break;
    case CoeffKernel::kWkanCoeff:
      split = Split::of(call->rows, 4 * kWkanRows, wkan_z_blocks(*call), 4096);
      break;
    case CoeffKernel::kWkanWeight:
      split = Split::of(call->rows, kWRows, wkan_w_blocks(*call), 1056);
      break;
  }
  *count = split.count;
  *size = split.size;
}

cudaError_t bspline_cuda_basis_fwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared = kBasisElements * ((C::kMax + 2) * sizeof(typename C::A) + sizeof(int));
    return launch(basis_fwd_kernel<C>, ceil_div(c.rows * c.features, kBasisElements), 1, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_basis_bwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    return launch(basis_bwd_kernel<C>, ceil_div(c.rows * c.features, kThreads), 1, kThreads, 0, stream, c);
  });
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

cudaError_t bspline_cuda_wkan_fwd(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const auto run = [&](auto kernel, int64_t outs) {
      const size_t shared = 2 * kWkanFeatures * (kWkanRows + 1 + outs + 1) * sizeof(typename C::A);
      return launch(kernel, ceil_div(c.rows, kWkanRows) * ceil_div(c.outs, outs), 1, kThreads, shared, stream, c);
    };
    return c.outs <= kSide ? run(wkan_fwd_kernel<C, 1>, kSide) : run(wkan_fwd_kernel<C, 4>, 4 * kSide);
  });
}

cudaError_t bspline_cuda_wkan_bwd_z(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared =
        (kZFunctions * kThreads + kZOuts * (kWkanRows + 1) + 2 * kZOuts * kSide) * sizeof(typename C::A);
    return launch(wkan_bwd_z_kernel<C>, wkan_z_blocks(c), c.split_count, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_wkan_bwd_weight(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared = (kWRows * (kWOuts + 1) + 2 * kWRows * kSide) * sizeof(typename C::A);
    return launch(wkan_bwd_weight_kernel<C>, wkan_w_blocks(c), c.split_count, kThreads, shared, stream, c);
  });
}

cudaError_t bspline_cuda_conv2d_bwd_x(const BsplineCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const int64_t size = c.conv.images * c.conv.channels * c.conv.height * c.conv.width;
    return launch(conv2d_bwd_x_kernel<C>, ceil_div(size, kThreads), 1, kThreads, 0, stream, c);
  });
}

cudaError_t bspline_cuda_sum(const void* part, void* out, int64_t count, int64_t size, int64_t is_double,
                             cudaStream_t stream) {
  const int64_t blocks = ceil_div(size, kThreads);
  if (is_double) {
    const SumParams<double> p{static_cast<const double*>(part), static_cast<double*>(out), count, size};
    return launch(sum_kernel<double>, blocks, 1, kThreads, 0, stream, p);
  }
  const SumParams<float> p{static_cast<const float*>(part), static_cast<float*>(out), count, size};
  return launch(sum_kernel<float>, blocks, 1, kThreads, 0, stream, p);
}

}  // extern "C"

}  // namespace pyml
