// region_attention on a CPU. Forward: queries in the lanes, so that the softmax needs no sum across lanes and a masked
// key is just a row less.
#include "common/exp2_cpu.h"
#include "common/tile_cpu.h"
#include "topk_attention/region_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

template <class T>
void region_rows(const RegionParams<T>& c, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item % c.key_regions, h = item / c.key_regions % c.heads, b = item / c.key_regions / c.heads;
    const int64_t n = c.valid_keys(b, g);
    const int32_t* valid = c.valid ? c.valid + (b * c.key_regions + g) * c.keys : nullptr;
    const auto copy = [&](const Regions& from, int64_t width, T* to) {
      const Rows rows = from.rows(b, h, g);
      if (!valid) return load_rows<T>(rows, 0, n, 0, width, to, width);
      for (int64_t t = 0; t < n; ++t) load_rows<T>(rows, valid[t], 1, 0, width, to + t * width, width);
    };
    copy(c.k, c.features, c.key_rows + item * c.keys * c.features);
    copy(c.v, c.value_features, c.value_rows + item * c.keys * c.value_features);
  }
}

// Bound by multiply-adds: at D = 24, Dv = 6 a core with two 512-bit FMAs a cycle spends 55 % of the time on the logits
// at its full rate, the rest on exponentials and values. Keys come from the second cache in time.
//
// One block of queries [D][W] against `n` keys, NV vectors of queries at a time: logits [n][W], largest m, sum l, o
// [Dv][W].
template <class T, int NV>
PYML_INLINE void attend(const RegionParams<T>& c, const T* queries, int64_t W, const T* k, int64_t k_stride, const T* v,
                        int64_t v_stride, int64_t n, T* s, T* o, T* m, T* l) {
  constexpr int L = kLanes<T>;
  Vec<T> top[NV], factor[NV], total[NV];
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) top[i] = load<T>(m + i * L);
  const auto zero = [](int, int) { return splat<T>(0); };
  for_tile_rows<NV>(n, [&](auto rows, int64_t t) {
    tile<T, rows, NV>(c.features, k + t * k_stride, k_stride, 1, queries, W, zero, [&](int r, int i, Vec<T> logit) {
      top[i] = max<T>(logit, top[i]);  // a NaN is not the largest: it comes back with the exponentials
      store<T>(s + (t + r) * W + i * L, logit);
    });
  });
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) {
    const Vec<T> before = load<T>(m + i * L);
    store<T>(m + i * L, top[i]);
    top[i] = top[i] == kLowest ? splat<T>(0) : top[i];
    factor[i] = exp2_fast<T>(exponent<T>(before, top[i]));
    total[i] = splat<T>(0);
  }
  for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const Vec<T> p = exp2_fast<T>(exponent<T>(load<T>(s + t * W + i * L), top[i]));
      total[i] += p;
      store<T>(s + t * W + i * L, p);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) store<T>(l + i * L, load<T>(l + i * L) * factor[i] + total[i]);
  for_tile_rows<NV>(c.value_features, [&](auto rows, int64_t e) {
    tile<T, rows, NV>(n, v + e, 1, v_stride, s, W, zero, [&](int r, int i, const Vec<T>& sum) {
      T* to = o + (e + r) * W + i * L;
      store<T>(to, load<T>(to) * factor[i] + sum);
    });
  });
}

template <class T, bool kWeighted>
void region_fwd(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {
  constexpr int L = kLanes<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const Blocks blocks(c.queries, L);
  const int64_t W = blocks.padded, D = c.features, Dv = c.value_features;
  T* queries = scratch;
  T* s = queries + D * W;
  T* o = s + kBlock * W;
  T* m = o + Dv * W;
  T* l = m + W;
  T* weighted = l + W;  // keys and values times the region's weight: [kBlock][D], [kBlock][Dv]
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks.count * blocks.length, region = item / blocks.count;
    const int64_t p = region % c.query_regions, h = region / c.query_regions % c.heads,
                  b = region / c.query_regions / c.heads;
    const int64_t count = least(blocks.length, c.queries - first);
    load_columns<T>(c.q.rows(b, h, p), first, count, 0, D, queries, W);
    for (int64_t i = 0; i < D * W; i += L) store<T>(queries + i, load<T>(queries + i) * c.scale);
    for (int64_t i = 0; i < W; i += L) store<T>(m + i, splat<T>(-kInfinity)), store<T>(l + i, splat<T>(0));
    for (int64_t i = 0; i < Dv * W; i += L) store<T>(o + i, splat<T>(0));
    for_chosen(c, b, h, p, [&](int64_t, int64_t g, T weight) {
      const T* k = c.key_rows + b * c.key_stride[0] + h * c.key_stride[1] + g * c.key_stride[2];
      const T* v = c.value_rows + b * c.value_stride[0] + h * c.value_stride[1] + g * c.value_stride[2];
      const Blocks part(c.valid_keys(b, g), 1);
      for (int64_t t = 0; t < part.count; ++t) {
        const int64_t from = t * part.length, n = least(part.length, c.valid_keys(b, g) - from);
        const T *keys = k + from * c.key_stride[3], *values = v + from * c.value_stride[3];
        if constexpr (kWeighted) {
          weigh(keys, c.key_stride[3], n, D, weight, weighted);
          weigh(values, c.value_stride[3], n, Dv, weight, weighted + kBlock * D);
          keys = weighted, values = weighted + kBlock * D;
        }
        for_tile_columns(W / L, [&](auto vectors, int64_t i) {
          attend<T, vectors>(c, queries + i * L, W, keys, kWeighted ? D : c.key_stride[3], values,
                             kWeighted ? Dv : c.value_stride[3], n, s + i * L, o + i * L, m + i * L, l + i * L);
        });
      }
    });
    double* lse = c.lse + region * c.queries + first;
    for (int64_t i = 0; i < W; i += L) {
      const Vec<T> total = load<T>(l + i), top = load<T>(m + i);
      const auto none = (top == -kInfinity) & (total == total);  // no key, or logits of -infinity only
      const Vec<T> inverse = none ? splat<T>(0) : T(1) / total;
      for (int64_t e = 0; e < Dv; ++e) store<T>(o + e * W + i, load<T>(o + e * W + i) * inverse);
      store<T>(l + i, none ? splat<T>(0) : total);
    }
    for (int64_t i = 0; i < count; ++i)
      lse[i] = l[i] == 0 ? double(kInfinity) : double(m[i]) + __builtin_log(double(l[i]));
    store_columns<T>(o, W, c.out.rows(b, h, p), first, count, 0, Dv);
    if (c.exact.data) store_columns<T>(o, W, c.exact.rows(b, h, p), first, count, 0, Dv);
  }
}

}  // namespace

#define PYML_REGION_DEFINE(T)                                                                                      \
  void region_rows_kernel(const RegionParams<T>& c, int64_t begin, int64_t end) { region_rows<T>(c, begin, end); } \
  void region_fwd_kernel(const RegionParams<T>& c, int64_t begin, int64_t end, T* scratch) {                       \
    c.weight ? region_fwd<T, true>(c, begin, end, scratch) : region_fwd<T, false>(c, begin, end, scratch);         \
  }                                                                                                                \
  int64_t region_fwd_scratch(const RegionParams<T>& c) {                                                           \
    return (c.features + kBlock + c.value_features + 2) * Blocks(c.queries, kLanes<T>).padded +                    \
           (c.weight ? kBlock * (c.features + c.value_features) : 0);                                              \
  }                                                                                                                \
  int64_t region_lanes(const RegionParams<T>&) { return kLanes<T>; }

PYML_REGION_DEFINE(float)
PYML_REGION_DEFINE(double)
#undef PYML_REGION_DEFINE

}  // namespace CPU_CAPABILITY
}  // namespace pyml
