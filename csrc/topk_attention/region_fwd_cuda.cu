// region_attention on NVIDIA GPUs, forward; region_device.h says how a block works.
//
// At LSNet's size (D = 24, Dv = 6, taken as 8) a pair of a query and a key costs 32 multiply-adds, one exponential
// and about five more instructions, and a quarter of eight 16-byte reads of shared memory: the FMA units and the shared
// memory are both busy for 32 of about 38 cycles, the exponential unit for 8. Keys and values come from the
// second-level cache once for 64 queries. What is left on the table is the matrix units, which have no exact float32.
#include "topk_attention/region_device.h"

namespace pyml {
namespace {

template <class T>
struct Lowest;
template <>
struct Lowest<float> {
  static constexpr float value = -3.4028234663852886e38f;
};
template <>
struct Lowest<double> {
  static constexpr double value = -1.7976931348623157e308;
};

// A row's running softmax: o = sum of 2^exponent(logit, top) value, total = that sum without values. `top` is the
// largest logit so far, or a lower bound of all: NaN is not larger, and comes back with the exponentials.
template <class T, int kWidth>
__device__ inline void raise(T higher, T& top, T& total, T (&o)[kWidth]) {
  const T factor = base2(exponent(top, higher));
  top = higher;
  total *= factor;
  PYML_UNROLL
  for (int d = 0; d < kWidth; ++d) o[d] *= factor;
}

// kWeight: regions have weights. They multiply keys and values, and the products are rounded, as those of gathered
// rows.
template <class Z, bool kWeight>
__global__ void __launch_bounds__(kRegionThreads, Z::kHeld ? 3 : 2)
    region_attention_fwd_kernel(RegionCuda<typename Z::T> c) {
  using T = typename Z::T;
  constexpr int kV = Z::kV;
  PYML_SHARED(T, shared);
  const auto at = region_block<Z>(block_id(), c.queries, c.query_regions, c.heads);
  const int64_t p = at.region, column = int64_t(blockIdx.y) * kV;
  const int depth = Z::kHeld ? Z::kD : whole(c.features), ld = depth + kV + 4;
  T* tile = shared + (Z::kHeld ? 0 : depth * Z::kRows);
  Owned<Z, Z::kD> q;
  q.load(c.q, at, c.features, c.scale, shared);
  T o[Z::kPer][kV] = {}, top[Z::kPer], total[Z::kPer] = {};
  PYML_UNROLL
  for (int r = 0; r < Z::kPer; ++r) top[r] = Lowest<T>::value;

  const int64_t used = used_slots(c, at.b, at.h, p);
  bool wrong = used != c.chosen(at.b, at.h, p);
  for (int64_t j = 0; j < used; ++j) {
    const int64_t g = c.index[c.slot(at.b, at.h, p, c.index_heads) + j];
    wrong = wrong || g < -1 || g >= c.key_regions;
    if (g < 0 || g >= c.key_regions) continue;
    const T weight = kWeight ? c.weight[c.slot(at.b, at.h, p, c.weight_heads) + j] : T(1);
    const int64_t keys = c.valid_keys(at.b, g);
    const int32_t* pick = c.valid ? c.valid + (at.b * c.key_regions + g) * c.keys : nullptr;
    for (int64_t first = 0; first < keys; first += Z::kTile) {
      const int count = keys - first < Z::kTile ? int(keys - first) : Z::kTile;
      constexpr int kRound = Z::kGroups * Z::kStep;
      const int rows = (count + kRound - 1) / kRound * kRound;
      __syncthreads();
      load_tile(c.k, c.k.offset(at.b, at.h, g), pick, first, count, rows, 0, c.features, depth, weight, tile, ld);
      load_tile(c.v, c.v.offset(at.b, at.h, g), pick, first, count, rows, column, c.value_features, kV, weight,
                tile + depth, ld);
      __syncthreads();
      for (int t = at.group; t < count; t += kRound) {
        T s[Z::kStep][Z::kPer] = {};
        PYML_UNROLL
        for (int u = 0; u < Z::kStep; ++u) {
          q.dot(tile + (t + u * Z::kGroups) * ld, c.features, s[u]);
          PYML_UNROLL
          for (int r = 0; r < Z::kPer; ++r) s[u][r] = t + u * Z::kGroups < count ? s[u][r] : -T(INFINITY);
        }
        PYML_UNROLL
        for (int r = 0; r < Z::kPer; ++r) {
          T higher = s[0][r];
          PYML_UNROLL
          for (int u = 1; u < Z::kStep; ++u) higher = higher > s[u][r] ? higher : s[u][r];
          if (higher > top[r]) raise(higher, top[r], total[r], o[r]);
        }
        PYML_UNROLL
        for (int u = 0; u < Z::kStep; ++u) {
          PYML_UNROLL
          for (int r = 0; r < Z::kPer; ++r) {
            s[u][r] = base2(exponent(s[u][r], top[r]));
            total[r] += s[u][r];
          }
          add_row<Z>(o, s[u], tile + (t + u * Z::kGroups) * ld + depth, kV);
        }
      }
    }
  }
  if (wrong && threadIdx.x == 0) *c.status = 1;  // all blocks that see one write the same

  for (int half = Z::kGroups / 2; half > 0; half /= 2) {  // as add_groups
    __syncthreads();
    const bool gives = at.group >= half && at.group < 2 * half;
    T* place = shared + (gives ? at.group - half : at.group) * Z::kRows * (kV + 2) + at.lane;
    PYML_UNROLL
    for (int r = 0; r < Z::kPer; ++r) {
      if (!gives) continue;
      T* to = place + r * (kV + 2) * Z::kLanes;
      to[0] = top[r];
      to[Z::kLanes] = total[r];
      PYML_UNROLL
      for (int d = 0; d < kV; ++d) to[(d + 2) * Z::kLanes] = o[r][d];
    }
    __syncthreads();
    PYML_UNROLL
    for (int r = 0; r < Z::kPer; ++r) {
      if (at.group >= half) continue;
      const T* from = place + r * (kV + 2) * Z::kLanes;
      if (from[0] > top[r]) raise(from[0], top[r], total[r], o[r]);
      const T factor = base2(exponent(from[0], top[r]));
      total[r] += factor * from[Z::kLanes];
      PYML_UNROLL
      for (int d = 0; d < kV; ++d) o[r][d] += factor * from[(d + 2) * Z::kLanes];
    }
  }
  if (at.group > 0) return;
  PYML_UNROLL
  for (int r = 0; r < Z::kPer; ++r) {
    const int row = at.lane + r * Z::kLanes;
    if (row >= at.count) continue;
    const bool none = total[r] == T(0);  // no key, or logits of -infinity only; NaN is not 0
    const T inverse = none ? T(0) : T(1) / total[r];
    const int64_t token = ((at.b * c.heads + at.h) * c.query_regions + p) * c.queries + at.first + row;
    if (column == 0) c.lse[token] = none ? double(INFINITY) : double(top[r]) + log(double(total[r]));
    PYML_UNROLL
    for (int d = 0; d < kV; ++d) {
      if (column + d >= c.value_features) continue;
      const T value = none ? T(0) : o[r][d] * inverse;
      write(c.out, token * c.value_features + column + d, value);
      if (c.exact.data) static_cast<T*>(c.exact.data)[token * c.value_features + column + d] = value;
    }
  }
}

template <class Z>
size_t fwd_bytes(const RegionCuda<typename Z::T>& c) {
  const int64_t depth = Z::kHeld ? Z::kD : whole(c.features);
  return memory_bytes<Z>(depth, Z::kV, depth, Z::kV + 2);
}

template <class Z>
cudaError_t fwd(const RegionCuda<typename Z::T>& c, cudaStream_t stream) {
  const int64_t columns = ceil_div(c.value_features, Z::kV);
  const int64_t blocks = c.group() * c.query_regions * ceil_div(c.queries, Z::kRows);
  const auto kernel = c.weight ? region_attention_fwd_kernel<Z, true> : region_attention_fwd_kernel<Z, false>;
  return launch(kernel, blocks, columns, kRegionThreads, fwd_bytes<Z>(c), stream, c);
}

}  // namespace

cudaError_t region_cuda_fwd(const RegionCuda<float>& c, cudaStream_t stream) {
  if (c.features <= Narrow::kD && c.value_features <= Narrow::kV) return fwd<Narrow>(c, stream);
  if (c.features <= Medium::kD && c.value_features <= Medium::kV) return fwd<Medium>(c, stream);
  return fwd_bytes<Wide>(c) <= kWideBytes ? fwd<Wide>(c, stream) : fwd<Widest>(c, stream);
}
cudaError_t region_cuda_fwd(const RegionCuda<double>& c, cudaStream_t stream) {
  return fwd_bytes<WideDouble>(c) <= kWideBytes ? fwd<WideDouble>(c, stream) : fwd<WidestDouble>(c, stream);
}

}  // namespace pyml
