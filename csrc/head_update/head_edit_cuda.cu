// Edits of heads on NVIDIA GPUs: tiles of a matrix product in shared memory, for the edit itself and for the gradient
// of its matrices. Heads are narrow and few, so the product is small beside the projection that follows.
#include "common/cuda.h"
#include "common/flat_cuda.h"
#include "head_update/head_update_cuda.h"

namespace pyml {
namespace {

constexpr int kThreads = 128, kTileM = 16, kTileN = 64, kTileK = 32;
constexpr int kEach = kTileM * kTileN / kThreads;  // rows of a thread in its column

__device__ inline int64_t row_at(const Rows& rows, int64_t r) {
  const int64_t w = r % rows.width, h = r / rows.width;
  return h / rows.height * rows.stride_n + h % rows.height * rows.stride_h + w * rows.stride_w;
}
template <class T>
__device__ inline T load_head(const HeadRows& t, int64_t head, int64_t r, int64_t c) {
  return load_flat<T>(Flat{t.rows.data, t.rows.dtype}, row_at(t.rows, r) + head * t.head + c * t.rows.stride_c);
}

// acc[e] = sum over k of A(m0 + e-th row of the thread, k) B(k, n0 + column of the thread), k in [begin, end) in order.
// A and B give 0 where a tile goes beyond the matrix in m or n.
template <class T, class A, class B>
__device__ inline void tile_product(int64_t begin, int64_t end, const A& a, const B& b, T* acc) {
  PYML_SHARED(T, shared);
  T *as = shared, *bs = shared + kTileK * kTileM;  // [k][m] and [k][n]
  const int column = int(threadIdx.x) % kTileN, first = int(threadIdx.x) / kTileN * kEach;
  PYML_UNROLL
  for (int e = 0; e < kEach; ++e) acc[e] = 0;
  for (int64_t k0 = begin; k0 < end; k0 += kTileK) {
    for (int i = int(threadIdx.x); i < kTileK * kTileM; i += kThreads)
      as[i] = k0 + i / kTileM < end ? a(i % kTileM, k0 + i / kTileM) : T(0);
    for (int i = int(threadIdx.x); i < kTileK * kTileN; i += kThreads)
      bs[i] = k0 + i / kTileN < end ? b(k0 + i / kTileN, i % kTileN) : T(0);
    __syncthreads();
    for (int k = 0; k < kTileK; ++k) {
      const T right = bs[k * kTileN + column];
      PYML_UNROLL
      for (int e = 0; e < kEach; ++e) acc[e] += as[k * kTileM + first + e] * right;
    }
    __syncthreads();
  }
}

// Block (tile of rows and columns, head).
template <class T>
__global__ void __launch_bounds__(kThreads) head_edit_kernel(HeadEditParams p) {
  const int64_t tiles = ceil_div(p.dim, kTileN), i = blockIdx.y;
  const int64_t m0 = int64_t(blockIdx.x) / tiles * kTileM, n0 = int64_t(blockIdx.x) % tiles * kTileN;
  const int32_t head = p.heads[i];
  const T* matrix = static_cast<const T*>(p.matrix);
  T acc[kEach] = {};
  if (matrix != nullptr)
    tile_product<T>(
        0, p.dim, [&](int m, int64_t k) { return m0 + m < p.row_count ? load_head<T>(p.in, head, m0 + m, k) : T(0); },
        [&](int64_t k, int n) { return n0 + n < p.dim ? matrix[(i * p.dim + k) * p.padded + n0 + n] : T(0); }, acc);
  const int64_t c = n0 + int64_t(threadIdx.x) % kTileN;
  const T keep = T(p.keep), strength = T(p.strength);
  PYML_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const int64_t r = m0 + int64_t(threadIdx.x) / kTileN * kEach + e;
    if (r >= p.row_count || c >= p.dim) continue;
    T value = acc[e];
    if (p.values.rows.data != nullptr) value += load_head<T>(p.values, i, r, c);
    value *= strength;
    if (keep != 0) value += keep * load_head<T>(p.in, head, r, c);
    store_flat<T>(Flat{p.out.rows.data, p.out.rows.dtype},
                  row_at(p.out.rows, r) + head * p.out.head + c * p.out.rows.stride_c, value);
  }
}

// Block (tile of outputs and inputs, head and split).
template <class T>
__global__ void __launch_bounds__(kThreads) head_edit_matrix_kernel(HeadMatrixParams p) {
  const int64_t tiles = ceil_div(p.dim, kTileN), i = blockIdx.y % p.count, split = blockIdx.y / p.count;
  const int64_t m0 = int64_t(blockIdx.x) / tiles * kTileM, n0 = int64_t(blockIdx.x) % tiles * kTileN;
  const int64_t begin = split * p.split_rows, limit = begin + p.split_rows;
  const int64_t end = limit < p.row_count ? limit : p.row_count;
  const int32_t head = p.heads[i];
  T acc[kEach];
  tile_product<T>(
      begin, end, [&](int m, int64_t k) { return m0 + m < p.dim ? load_head<T>(p.grad, head, k, m0 + m) : T(0); },
      [&](int64_t k, int n) { return n0 + n < p.dim ? load_head<T>(p.x, head, k, n0 + n) : T(0); }, acc);
  T* part = static_cast<T*>(p.part) + (split * p.part_heads + p.part_first + i) * p.dim * p.padded;
  const int64_t c = n0 + int64_t(threadIdx.x) % kTileN;
  PYML_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const int64_t r = m0 + int64_t(threadIdx.x) / kTileN * kEach + e;
    if (r < p.dim && c < p.padded) part[r * p.padded + c] = T(p.strength) * acc[e];
  }
}

constexpr int64_t kShared = kTileK * (kTileM + kTileN);

}  // namespace
}  // namespace pyml

extern "C" cudaError_t pyml_cuda_head_edit(const pyml::HeadEditParams* p, cudaStream_t stream) {
  using namespace pyml;
  const int64_t tiles = ceil_div(p->row_count, kTileM) * ceil_div(p->dim, kTileN);
  const size_t shared = size_t(kShared) * (p->wide ? sizeof(double) : sizeof(float));
  return launch(p->wide ? head_edit_kernel<double> : head_edit_kernel<float>, tiles, p->count, kThreads, shared, stream,
                *p);
}
extern "C" cudaError_t pyml_cuda_head_edit_matrix(const pyml::HeadMatrixParams* p, cudaStream_t stream) {
  using namespace pyml;
  const int64_t tiles = ceil_div(p->dim, kTileM) * ceil_div(p->dim, kTileN);
  const size_t shared = size_t(kShared) * (p->wide ? sizeof(double) : sizeof(float));
  return launch(p->wide ? head_edit_matrix_kernel<double> : head_edit_matrix_kernel<float>, tiles, p->count * p->splits,
                kThreads, shared, stream, *p);
}
