// region_attention on NVIDIA GPUs, backward; region_device.h says how a block works. P is made again from lse.
//
// dQ and the gradient of the weights come by query region, as the forward; dK and dV come by key region, over one chunk
// of the list of those who chose it. Nothing is added atomically. At LSNet's size a pair costs 56 multiply-adds for dQ
// and 64 for dK and dV, and half of eight (nine) 16-byte reads of shared memory: both are bound by the FMA units and
// by the shared memory alike; two exponentials a pair take a sixth of that time.
#include "topk_attention/region_device.h"

namespace pyml {
namespace {

constexpr int kDeltaThreads = 256;

// Summed as every dP: so dP - delta is 0 where one key takes all.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) region_delta_bwd_kernel(RegionCuda<T> c) {
  const int64_t token = block_id() * kDeltaThreads + threadIdx.x;
  if (token >= c.group() * c.query_regions * c.queries) return;
  const int64_t s = token % c.queries, region = token / c.queries, p = region % c.query_regions;
  const int64_t h = region / c.query_regions % c.heads, b = region / c.query_regions / c.heads;
  const int64_t of_grad = c.grad.offset(b, h, p) + s * c.grad.stride[3];
  const int64_t of_out = c.out.offset(b, h, p) + s * c.out.stride[3];
  T sum = T(0);
  for (int64_t first = 0; first < c.value_features; first += kSumBlock) {
    const int64_t end = c.value_features - first < kSumBlock ? c.value_features : first + kSumBlock;
    T part = T(0);
    for (int64_t e = first; e < end; ++e)
      part = fused(read<T>(c.grad, of_grad + e * c.grad.stride[4]), read<T>(c.out, of_out + e * c.out.stride[4]), part);
    sum += part;
  }
  c.delta[token] = sum;
}

// What one kernel knows of a query beside its numbers: P = exp(logit - top - rest), dS = P (dP - delta).
template <class T>
struct QueryFacts {
  T top, rest, delta;
  __device__ T probability(T logit) const { return base2(exponent(logit - top, rest)); }
};
template <class T>
__device__ inline QueryFacts<T> facts_of(const RegionCuda<T>& c, int64_t token) {
  const SplitLse<T> lse(c.lse[token]);
  return {lse.top, lse.rest, c.delta[token]};
}

// The widths of the rows in a tile: known at compile time where rows are held in registers.
template <class Z>
struct BwdWidths {
  int depth, value, ld;
  PYML_HD BwdWidths(int64_t features, int64_t value_features)
      : depth(Z::kHeld ? Z::kD : whole(features)),
        value(Z::kHeld ? Z::kV : whole(value_features)),
        ld(depth + value + 4) {}
};

// The weight of a region in two factors: one of the numbers in a tile, one of the products with them. So the gradient
// of the weight is that of the tile divided by `inside`, whose square is neither near 0 nor too large.
template <class T>
struct SplitWeight {
  T inside, outside;
  __device__ explicit SplitWeight(T weight) : inside(weight), outside(T(1)) {
    const T size = weight < T(0) ? -weight : weight;
    if (!(size >= T(1e-18) && size <= T(1e18))) inside = T(1), outside = weight;
  }
};

// dq [B, H, P, S, D]; part_weight [B, H, P, query blocks, K]. kWeight: regions have weights, here and below.
template <class Z, bool kWeight>
__global__ void __launch_bounds__(kRegionThreads, 2) region_attention_bwd_kernel(RegionCuda<typename Z::T> c) {
  using T = typename Z::T;
  PYML_SHARED(T, shared);
  const auto at = region_block<Z>(block_id(), c.queries, c.query_regions, c.heads);
  const int64_t p = at.region, column = int64_t(blockIdx.y) * Z::kD;
  const BwdWidths<Z> w(c.features, c.value_features);
  Owned<Z, Z::kD> q;
  Owned<Z, Z::kV> grad;
  q.load(c.q, at, c.features, c.scale, shared);
  grad.load(c.grad, at, c.value_features, T(1), shared + w.depth * Z::kRows);
  T* tile = shared + (Z::kHeld ? 0 : (w.depth + w.value) * Z::kRows);
  const int64_t token = ((at.b * c.heads + at.h) * c.query_regions + p) * c.queries + at.first;
  QueryFacts<T> query[Z::kPer];
  PYML_UNROLL
  for (int r = 0; r < Z::kPer; ++r) {
    const int row = at.lane + r * Z::kLanes;
    query[r] = row < at.count ? facts_of(c, token + row) : QueryFacts<T>{T(INFINITY), T(0), T(0)};
  }
  T dq[Z::kPer][Z::kD] = {};

  const int64_t used = used_slots(c, at.b, at.h, p);
  T* of_weights = c.part_weight ? c.part_weight + block_id() * c.slots : nullptr;
  for (int64_t j = 0; j < used; ++j) {
    const int64_t g = c.index[c.slot(at.b, at.h, p, c.index_heads) + j];
    if (g < 0 || g >= c.key_regions) continue;
    const SplitWeight<T> weight(kWeight ? c.weight[c.slot(at.b, at.h, p, c.weight_heads) + j] : T(1));
    const int64_t keys = c.valid_keys(at.b, g);
    const int32_t* pick = c.valid ? c.valid + (at.b * c.key_regions + g) * c.keys : nullptr;
    T of_weight = T(0);
    for (int64_t first = 0; first < keys; first += Z::kTile) {
      const int count = keys - first < Z::kTile ? int(keys - first) : Z::kTile;
      __syncthreads();
      load_tile(c.k, c.k.offset(at.b, at.h, g), pick, first, count, count, 0, c.features, w.depth, weight.inside, tile,
                w.ld);
      load_tile(c.v, c.v.offset(at.b, at.h, g), pick, first, count, count, 0, c.value_features, w.value, weight.inside,
                tile + w.depth, w.ld);
      __syncthreads();
      for (int t = at.group; t < count; t += Z::kGroups) {
        const T* row = tile + t * w.ld;
        T s[Z::kPer] = {}, dp[Z::kPer] = {};
        Met<Z, Z::kD> key;
        q.dot(row, c.features, s, key);
        grad.dot(row + w.depth, c.value_features, dp);
        PYML_UNROLL
        for (int r = 0; r < Z::kPer; ++r) {
          if constexpr (kWeight) {
            const T prob = query[r].probability(s[r] * weight.outside),
                    ds = prob * (dp[r] * weight.outside - query[r].delta);
            if (at.lane + r * Z::kLanes < at.count) of_weight += ds * s[r] + prob * dp[r];
            s[r] = ds * weight.outside;
          } else {
            s[r] = query[r].probability(s[r]) * (dp[r] - query[r].delta);
          }
        }
        add_row<Z>(dq, s, row + column, c.features - column, key);
      }
    }
    if (kWeight && of_weights && column == 0) {  // over all threads, pairs first
      for (int half = kRegionThreads / 2; half > 0; half /= 2) {
        const int tid = int(threadIdx.x);
        __syncthreads();
        if (tid >= half && tid < 2 * half) tile[tid - half] = of_weight;
        __syncthreads();
        if (tid < half) of_weight += tile[tid];
      }
      if (threadIdx.x == 0) of_weights[j] = of_weight / weight.inside;
    }
  }

  add_groups<Z>(dq, at, shared);
  if (at.group > 0 || !c.dq.data) return;
  PYML_UNROLL
  for (int r = 0; r < Z::kPer; ++r) {
    const int row = at.lane + r * Z::kLanes;
    if (row >= at.count) continue;
    PYML_UNROLL
    for (int d = 0; d < Z::kD; ++d)
      if (column + d < c.features) write(c.dq, (token + row) * c.features + column + d, dq[r][d] * c.scale);
  }
}

// part_k [chunks, heads of a list, Sk, D], part_v [..., Dv]: the sums over the choosers in one chunk.
template <class Z, bool kWeight>
__global__ void __launch_bounds__(kRegionThreads, 2) region_attention_keys_bwd_kernel(RegionCuda<typename Z::T> c) {
  using T = typename Z::T;
  PYML_SHARED(T, shared);
  const int64_t shared_heads = c.heads / c.list_heads, blocks = ceil_div(c.keys, Z::kRows);
  const int64_t chunk = block_id() / blocks / shared_heads, member = block_id() / blocks % shared_heads;
  const int64_t row_of_list = c.row_of_chunk[chunk];
  if (row_of_list >= c.rows) return;
  const int64_t g = row_of_list % c.key_regions, list_head = row_of_list / c.key_regions % c.list_heads;
  const int64_t b = row_of_list / c.key_regions / c.list_heads, h = list_head * shared_heads + member;
  const auto at = region_block<Z>(((b * c.heads + h) * c.key_regions + g) * blocks + block_id() % blocks, c.keys,
                                  c.key_regions, c.heads);
  static_assert(Z::kHeld || Z::kD == Z::kV, "one column for both");
  const int64_t column = int64_t(blockIdx.y) * Z::kD;
  const BwdWidths<Z> w(c.features, c.value_features);
  Owned<Z, Z::kD> k;
  Owned<Z, Z::kV> v;
  k.load(c.k, at, c.features, T(1), shared);
  v.load(c.v, at, c.value_features, T(1), shared + w.depth * Z::kRows);
  constexpr bool kInMemory = !Z::kHeld || kWeight;  // each chooser has its own weight of the owned rows
  if constexpr (kInMemory && Z::kHeld) k.keep(at, shared), v.keep(at, shared + w.depth * Z::kRows);
  T* tile = shared + (kInMemory ? (w.depth + w.value) * Z::kRows : 0);
  T dk[Z::kPer][Z::kD] = {}, dv[Z::kPer][Z::kV] = {};

  const int64_t begin = c.first_slot[row_of_list] + (chunk - c.first_chunk[row_of_list]) * c.chunk_size;
  const int64_t last = c.first_slot[row_of_list + 1];
  const int64_t end = begin + c.chunk_size < last ? begin + c.chunk_size : last;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t slot = c.slots_of[entry], p = slot / c.slots % c.query_regions;
    const T weight = kWeight ? c.weight[c.slot(b, h, p, c.weight_heads) + slot % c.slots] : T(1);
    const int64_t token = ((b * c.heads + h) * c.query_regions + p) * c.queries;
    for (int64_t first = 0; first < c.queries; first += Z::kTile) {
      const int count = c.queries - first < Z::kTile ? int(c.queries - first) : Z::kTile;
      __syncthreads();
      if constexpr (kWeight && Z::kHeld) {
        if (first == 0) k.weigh(at, shared, weight), v.weigh(at, shared + w.depth * Z::kRows, weight);
      } else if constexpr (kWeight) {
        if (first == 0) k.load(c.k, at, c.features, weight, shared);
        if (first == 0) v.load(c.v, at, c.value_features, weight, shared + w.depth * Z::kRows);
      }
      load_tile<T>(c.q, c.q.offset(b, h, p), nullptr, first, count, count, 0, c.features, w.depth, c.scale, tile, w.ld);
      load_tile<T>(c.grad, c.grad.offset(b, h, p), nullptr, first, count, count, 0, c.value_features, w.value, T(1),
                   tile + w.depth, w.ld);
      for (int t = int(threadIdx.x); t < count; t += kRegionThreads) {
        const QueryFacts<T> query = facts_of(c, token + first + t);
        T* facts = tile + t * w.ld + w.depth + w.value;
        facts[0] = query.top, facts[1] = query.rest, facts[2] = query.delta;
      }
      __syncthreads();
      for (int t = at.group; t < count; t += Z::kGroups) {
        const T* row = tile + t * w.ld;
        const T* facts = row + w.depth + w.value;
        const QueryFacts<T> query{facts[0], facts[1], facts[2]};
        T s[Z::kPer] = {}, dp[Z::kPer] = {};
        Met<Z, Z::kD> of_q;
        Met<Z, Z::kV> of_grad;
        k.dot(row, c.features, s, of_q);
        v.dot(row + w.depth, c.value_features, dp, of_grad);
        PYML_UNROLL
        for (int r = 0; r < Z::kPer; ++r) {
          s[r] = query.probability(s[r]);
          dp[r] = s[r] * (dp[r] - query.delta);
          if constexpr (kWeight) dp[r] *= weight, s[r] *= weight;
        }
        add_row<Z>(dk, dp, row + column, c.features - column, of_q);
        add_row<Z>(dv, s, row + w.depth + column, c.value_features - column, of_grad);
      }
    }
  }

  add_groups<Z>(dk, at, shared);
  add_groups<Z>(dv, at, shared);
  if (at.group > 0) return;
  PYML_UNROLL
  for (int r = 0; r < Z::kPer; ++r) {
    const int row = at.lane + r * Z::kLanes;
    if (row >= at.count) continue;
    const int64_t t = at.first + row, place = (chunk * shared_heads + member) * c.keys + t;
    const bool masked = c.mask && !c.mask[(b * c.key_regions + g) * c.keys + t];  // whatever it holds, NaN too
    PYML_UNROLL
    for (int d = 0; d < Z::kD; ++d)
      if (c.part_k && column + d < c.features) c.part_k[place * c.features + column + d] = masked ? T(0) : dk[r][d];
    PYML_UNROLL
    for (int d = 0; d < Z::kV; ++d)
      if (c.part_v && column + d < c.value_features)
        c.part_v[place * c.value_features + column + d] = masked ? T(0) : dv[r][d];
  }
}

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) region_chunks_bwd_kernel(RegionChunks<T> c) {
  const int64_t size = c.keys * c.width, e = block_id() * kDeltaThreads + threadIdx.x;
  if (e >= c.batch * c.heads * c.key_regions * size) return;
  const int64_t region = e / size, g = region % c.key_regions, h = region / c.key_regions % c.heads;
  const int64_t b = region / c.key_regions / c.heads, members = c.heads / c.list_heads;
  const int64_t row = (b * c.list_heads + h / members) * c.key_regions + g;
  T sum = T(0);
  for (int64_t chunk = c.first_chunk[row]; chunk < c.first_chunk[row + 1]; ++chunk)
    sum += c.part[(chunk * members + h % members) * size + e % size];
  write(c.result, e, sum);
}

template <class Z>
size_t bwd_bytes(const RegionCuda<typename Z::T>& c, bool in_memory = !Z::kHeld) {
  const BwdWidths<Z> w(c.features, c.value_features);
  return memory_bytes<Z>(w.depth, w.value, w.depth + w.value, Z::kD > Z::kV ? Z::kD : Z::kV, in_memory);
}

// Calls f with the shape of the blocks: by the sizes alone.
template <class F>
auto by_shape(const RegionCuda<float>& c, const F& f) {
  if (c.features <= NarrowBwd::kD && c.value_features <= NarrowBwd::kV) return f(NarrowBwd());
  if (c.features <= MediumBwd::kD && c.value_features <= MediumBwd::kV) return f(MediumBwd());
  return bwd_bytes<Wide>(c) <= kWideBytes ? f(Wide()) : f(Widest());
}
template <class F>
auto by_shape(const RegionCuda<double>& c, const F& f) {
  return bwd_bytes<WideDouble>(c) <= kWideBytes ? f(WideDouble()) : f(WidestDouble());
}

template <class T>
int64_t query_blocks(const RegionCuda<T>& c) {
  return by_shape(c, [&](auto z) { return ceil_div(c.queries, decltype(z)::kRows); });
}

template <class T>
cudaError_t bwd_query(const RegionCuda<T>& c, cudaStream_t stream) {
  return by_shape(c, [&](auto z) {
    using Z = decltype(z);
    const int64_t columns = c.features > 0 ? ceil_div(c.features, Z::kD) : 1;
    const int64_t blocks = c.group() * c.query_regions * ceil_div(c.queries, Z::kRows);
    const auto kernel = c.weight ? region_attention_bwd_kernel<Z, true> : region_attention_bwd_kernel<Z, false>;
    return launch(kernel, blocks, columns, kRegionThreads, bwd_bytes<Z>(c), stream, c);
  });
}

template <class T>
cudaError_t bwd_key(const RegionCuda<T>& c, cudaStream_t stream) {
  return by_shape(c, [&](auto z) {
    using Z = decltype(z);
    const int64_t widest = c.features > c.value_features ? c.features : c.value_features;
    const int64_t columns = Z::kHeld ? 1 : ceil_div(widest, Z::kD);
    const int64_t blocks = c.chunks * (c.heads / c.list_heads) * ceil_div(c.keys, Z::kRows);
    const auto kernel =
        c.weight ? region_attention_keys_bwd_kernel<Z, true> : region_attention_keys_bwd_kernel<Z, false>;
    return launch(kernel, blocks, columns, kRegionThreads, bwd_bytes<Z>(c, !Z::kHeld || c.weight), stream, c);
  });
}

}  // namespace

#define PYML_REGION_DEFINE(T)                                                                                     \
  int64_t region_cuda_query_blocks(const RegionCuda<T>& c) { return query_blocks(c); }                            \
  cudaError_t region_cuda_delta(const RegionCuda<T>& c, cudaStream_t stream) {                                    \
    const int64_t blocks = ceil_div(c.group() * c.query_regions * c.queries, kDeltaThreads);                      \
    return launch(region_delta_bwd_kernel<T>, blocks, 1, kDeltaThreads, 0, stream, c);                            \
  }                                                                                                               \
  cudaError_t region_cuda_bwd_query(const RegionCuda<T>& c, cudaStream_t stream) { return bwd_query(c, stream); } \
  cudaError_t region_cuda_bwd_key(const RegionCuda<T>& c, cudaStream_t stream) { return bwd_key(c, stream); }     \
  cudaError_t region_cuda_chunks(const RegionChunks<T>& c, cudaStream_t stream) {                                 \
    const int64_t blocks = ceil_div(c.batch * c.heads * c.key_regions * c.keys * c.width, kDeltaThreads);         \
    return launch(region_chunks_bwd_kernel<T>, blocks, 1, kDeltaThreads, 0, stream, c);                           \
  }

PYML_REGION_DEFINE(float)
PYML_REGION_DEFINE(double)
#undef PYML_REGION_DEFINE

}  // namespace pyml
