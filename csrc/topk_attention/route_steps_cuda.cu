// route_regions on NVIDIA GPUs. Means and logits are float32, rounded from sums in double, as on the CPU. Bound by one
// read of q and k; the logits and the sort of one row take a block a few microseconds.
#include <cmath>
#include <cstring>

#include "common/cuda.h"
#include "topk_attention/route_cuda.h"

namespace pyml {
namespace {

constexpr int kRouteThreads = 128;

__device__ inline int64_t block_id() { return static_cast<int64_t>(blockIdx.x); }

template <class X>
__device__ inline double token_sum(const X* from, int64_t stride, const bool* mask, int64_t first, int64_t step,
                                   int64_t end, double& count) {
  double sum = 0;
  for (int64_t t = first; t < end; t += step) {
    if (mask && !mask[t]) continue;
    count += 1;
    sum += double(up(from[t * stride]));
  }
  return sum;
}

// A block makes the means of one region: neighbouring threads take neighbouring features, groups of them every so many
// tokens.
__global__ void __launch_bounds__(kRouteThreads) route_regions_means_kernel(RouteParams c) {
  PYML_SHARED(double, sums);  // [threads], then the counts
  const int64_t r = block_id() % c.regions, h = block_id() / c.regions % c.heads, b = block_id() / c.regions / c.heads;
  const int wide = c.features < kRouteThreads ? int(c.features) : kRouteThreads, groups = kRouteThreads / wide;
  const int tid = int(threadIdx.x), group = tid / wide;
  const bool* mask = c.mask ? c.mask + (b * c.regions + r) * c.tokens.tokens : nullptr;
  for (int64_t first = 0; first < c.features; first += wide) {
    const int64_t d = first + tid % wide, at = c.tokens.offset(b, h, r) + d * c.tokens.stride[4];
    double sum = 0, count = 0;
    if (d < c.features && group < groups) {
      const auto add = [&](const auto* data) {
        sum = token_sum(data + at, c.tokens.stride[3], mask, group, groups, c.tokens.tokens, count);
      };
      if (c.tokens.dtype == DType::kDouble) add(static_cast<const double*>(c.tokens.data));
      if (c.tokens.dtype == DType::kFloat) add(static_cast<const float*>(c.tokens.data));
      if (c.tokens.dtype == DType::kHalf) add(static_cast<const __half*>(c.tokens.data));
      if (c.tokens.dtype == DType::kBFloat16) add(static_cast<const __nv_bfloat16*>(c.tokens.data));
    }
    sums[tid] = sum;
    sums[kRouteThreads + tid] = count;
    __syncthreads();
    if (group == 0 && d < c.features) {
      for (int i = 1; i < groups; ++i) {
        sum += sums[tid + i * wide];
        count += sums[kRouteThreads + tid + i * wide];
      }
      c.means[block_id() * c.features + d] = double(float(sum / (count > 0 ? count : 1)));
    }
    __syncthreads();
  }
}

// Orders from small to large as torch.sort does from large to small: NaN first, -0 = +0; below, the index breaks ties.
__device__ inline uint64_t falling_key(float logit, int64_t region) {
  uint32_t bits;
  logit += 0.0f;
  memcpy(&bits, &logit, 4);
  bits = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(~bits) << 32 | uint64_t(region);
}
__device__ inline float logit_of(uint64_t key) {
  uint32_t bits = ~uint32_t(key >> 32);
  bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  float logit;
  memcpy(&logit, &bits, 4);
  return logit;
}

PYML_HD int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// A block makes the logits of one query region and sorts all of them: a bitonic network in shared memory.
__global__ void __launch_bounds__(kRouteThreads) route_regions_fwd_kernel(RouteParams c) {
  PYML_SHARED(uint64_t, keys);  // [a power of two]
  const int64_t heads = c.per_head ? c.heads : 1, joined = c.per_head ? 1 : c.heads, Pk = c.key_regions;
  const int64_t p = block_id() % c.query_regions, h = block_id() / c.query_regions % heads;
  const int64_t b = block_id() / c.query_regions / heads, size = power_of_two(Pk);
  const int tid = int(threadIdx.x);
  for (int64_t g = tid; g < size; g += kRouteThreads) {
    double sum = 0;
    for (int64_t head = h * joined; g < Pk && head < h * joined + joined; ++head) {
      const int64_t bh = b * c.heads + head;
      const double* query = c.query_means + (bh * c.query_regions + p) * c.features;
      const double* key = c.key_means + bh * c.features * Pk + g;
      for (int64_t d = 0; d < c.features; ++d) sum += query[d] * key[d * Pk];
    }
    const bool any = g < Pk && (!c.key_any || c.key_any[b * Pk + g]);
    keys[g] = g < Pk ? falling_key(any ? float(sum * c.scale) : -INFINITY, g) : ~uint64_t(0);
  }
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int64_t i = tid; i < size / 2; i += kRouteThreads) {
        const int64_t low = i / step * 2 * step + i % step, high = low + step;
        const uint64_t first = keys[low], second = keys[high];
        if ((first > second) == ((low & run) == 0)) {
          keys[low] = second;
          keys[high] = first;
        }
      }
    }
  }
  __syncthreads();
  for (int64_t i = tid; i < c.topk; i += kRouteThreads) {
    c.index[block_id() * c.topk + i] = int64_t(keys[i] & 0xffffffffu);
    c.logits[block_id() * c.topk + i] = logit_of(keys[i]);
  }
}

}  // namespace

cudaError_t route_cuda_means(const RouteParams& c, cudaStream_t stream) {
  if (c.features == 0) return cudaSuccess;
  const size_t shared = 2 * kRouteThreads * sizeof(double);
  return launch(route_regions_means_kernel, c.batch * c.heads * c.regions, 1, kRouteThreads, shared, stream, c);
}

cudaError_t route_cuda(const RouteParams& c, cudaStream_t stream) {
  const int64_t rows = c.batch * (c.per_head ? c.heads : 1) * c.query_regions;
  const size_t shared = size_t(power_of_two(c.key_regions)) * sizeof(uint64_t);
  return launch(route_regions_fwd_kernel, rows, 1, kRouteThreads, shared, stream, c);
}

}  // namespace pyml
