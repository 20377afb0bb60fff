// wkan_linear and wkan_conv2d on NVIDIA GPUs: see bspline_basis_cuda.cu.
#include "bspline/bspline_device.h"

namespace pyml {
namespace {

// z = [base(x), s(x)] goes to shared memory and from there into register tiles, as in any matrix product.

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
      z[(2 * i + 1) * kLd + r] = contract(local, c.weights(c.coeff) + f * c.nb(), c.k());
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
        A sum = contract(c.local(value, feature, 1), coeff, c.k()) * g;
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
      zs[group * kSide + i] = contract(c.local(value, feature, 0), c.weights(c.coeff) + feature * c.nb(), c.k());
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
    sum += contract(c.local(value, f, 1), c.weights(c.coeff) + f * nb, c.k()) * gs + slope * gb;
  }
  static_cast<typename C::X*>(c.dx)[at] = down<typename C::X>(sum);
}

int64_t wkan_z_blocks(const BsplineCuda& c) {
  return ceil_div(c.features, kSide) * (c.part_coeff ? ceil_div(c.functions(), kZFunctions) : 1);
}
int64_t wkan_w_blocks(const BsplineCuda& c) { return ceil_div(c.outs, kWOuts) * ceil_div(c.features, kSide); }

}  // namespace

extern "C" {

void bspline_cuda_wkan_coeff_split(const BsplineCuda* call, int64_t* count, int64_t* size) {
  Split::of(call->rows, 4 * kWkanRows, wkan_z_blocks(*call), 4096).store(count, size);
}

void bspline_cuda_wkan_weight_split(const BsplineCuda* call, int64_t* count, int64_t* size) {
  Split::of(call->rows, kWRows, wkan_w_blocks(*call), 1056).store(count, size);
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

}  // extern "C"

}  // namespace pyml
