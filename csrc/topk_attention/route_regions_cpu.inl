// route_regions on a CPU. Means and logits are float32, rounded from sums in double: the same on every machine,
// whatever the order of the sums. Bound by one read of q and k.
#include <limits>

#include "common/rows_cpu.h"
#include "common/tile_cpu.h"
#include "topk_attention/topk_attention.h"
#include "topk_attention/topk_select_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

// Orders as torch.sort does, descending, from small to large: NaN first, -0 = +0; below, the index breaks ties.
PYML_INLINE uint64_t falling_key(float logit, int64_t index) {
  uint32_t bits;
  logit += 0.0f;
  std::memcpy(&bits, &logit, 4);
  bits = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(~bits) << 32 | uint64_t(index);
}

// The `count` smallest of n keys, in order, to the front: a heap of them, then sorted by taking from it.
inline void smallest_first(uint64_t* keys, int64_t n, int64_t count) {
  const auto sink = [&](int64_t at, int64_t size) {
    const uint64_t key = keys[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && keys[child + 1] > keys[child]) ++child;
      if (keys[child] <= key) break;
      keys[at] = keys[child];
    }
    keys[at] = key;
  };
  for (int64_t i = count / 2; i-- > 0;) sink(i, count);
  for (int64_t i = count; i < n; ++i)
    if (keys[i] < keys[0]) {
      const uint64_t out = keys[0];
      keys[0] = keys[i];
      keys[i] = out;
      sink(0, count);
    }
  for (int64_t size = count; size-- > 1;) {
    const uint64_t largest = keys[0];
    keys[0] = keys[size];
    keys[size] = largest;
    sink(0, size);
  }
}

// The keys of the `count` largest of n logits, in order, to the front of `keys`, which has room for n. `work` has
// 2 * (n + kFew) entries.
inline void largest_first(const float* logits, int64_t n, int64_t count, bool nan, uint64_t* keys, float* work) {
  if (nan || count == n) {
    for (int64_t g = 0; g < n; ++g) keys[g] = falling_key(logits[g], g);
    return smallest_first(keys, n, count);
  }
  const float last = kth_largest<float>(logits, n, count, work);
  int64_t ties = count, found = 0;  // ties: how many of those equal to the last one are among the first
  for (int64_t g = 0; g < n; ++g) ties -= logits[g] > last;
  for (int64_t g = 0; g < n; ++g) {  // without a branch, which nothing could foresee
    const bool equal = logits[g] == last;
    keys[found] = falling_key(logits[g], g);
    found += (logits[g] > last) | (equal & (ties > 0));
    ties -= equal;
  }
  if (count > kFew) return smallest_first(keys, count, count);
  uint64_t sorted[kFew];
  for (int64_t i = 0; i < count; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < count; ++j) rank += keys[j] < keys[i];
    sorted[rank] = keys[i];
  }
  std::memcpy(keys, sorted, size_t(count) * sizeof(uint64_t));
}

constexpr int64_t kRouteRows = 6;  // query regions for which the means of the keys are read once

}  // namespace

void route_means_kernel(const RouteParams& c, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t r = item % c.regions, h = item / c.regions % c.heads, b = item / c.regions / c.heads;
    const Rows rows = c.tokens.rows(b, h, r);
    const bool* mask = c.mask ? c.mask + (b * c.regions + r) * c.tokens.tokens : nullptr;
    double* mean = c.means + item * c.features;
    for (int64_t d = 0; d < c.features; ++d) mean[d] = 0;
    int64_t count = 0;
    by_dtype(rows.dtype, [&](auto tag) {
      const auto* data = static_cast<const decltype(tag)*>(rows.data);
      for (int64_t t = 0; t < c.tokens.tokens; ++t) {
        if (mask && !mask[t]) continue;
        ++count;
        const auto* from = data + t * rows.stride_w;
        if (rows.stride_c == 1)
          for (int64_t d = 0; d < c.features; ++d) mean[d] += double(widen(from[d]));
        else
          for (int64_t d = 0; d < c.features; ++d) mean[d] += double(widen(from[d * rows.stride_c]));
      }
    });
    for (int64_t d = 0; d < c.features; ++d) mean[d] = double(float(mean[d] / double(count > 0 ? count : 1)));
  }
}

// The logits of some query regions by a product of tiles, the means of the keys [D][Pk padded] in the lanes.
void route_kernel(const RouteParams& c, int64_t begin, int64_t end, double* scratch) {
  constexpr int L = kLanes<double>;
  const int64_t heads = c.per_head ? c.heads : 1, joined = c.per_head ? 1 : c.heads, Pk = c.key_regions;
  const int64_t W = (Pk + L - 1) / L * L, D = c.features;
  double* products = scratch;                                               // [kRouteRows][W]
  uint64_t* keys = reinterpret_cast<uint64_t*>(products + kRouteRows * W);  // [W]
  float* logits = reinterpret_cast<float*>(keys + W);                       // [W], then what kth_largest needs
  for (int64_t item = begin, count = 0; item < end; item += count) {
    const int64_t p = item % c.query_regions, h = item / c.query_regions % heads, b = item / c.query_regions / heads;
    count = end - item < c.query_regions - p ? end - item : c.query_regions - p;
    count = count < kRouteRows ? count : kRouteRows;
    for (int64_t i = 0; i < count * W; ++i) products[i] = 0;
    for (int64_t j = h * joined; j < h * joined + joined; ++j) {
      const int64_t bh = b * c.heads + j;
      const double *q = c.query_means + (bh * c.query_regions + p) * D, *k = c.key_means + bh * D * W;
      for_tile_columns(W / L, [&](auto vectors, int64_t v) {
        for_tile_rows<vectors>(count, [&](auto rows, int64_t r) {
          double* to = products + r * W + v * L;
          tile<double, rows, vectors>(
              D, q + r * D, D, 1, k + v * L, W, [&](int m, int i) { return load<double>(to + m * W + i * L); },
              [&](int m, int i, const Vec<double>& sum) { store<double>(to + m * W + i * L, sum); });
        });
      });
    }
    for (int64_t r = 0; r < count; ++r) {
      const double* row = products + r * W;
      bool nan = false;
      for (int64_t g = 0; g < Pk; ++g) {
        const bool any = !c.key_any || c.key_any[b * Pk + g];
        logits[g] = any ? float(row[g] * c.scale) : -std::numeric_limits<float>::infinity();
        nan |= logits[g] != logits[g];
      }
      largest_first(logits, Pk, c.topk, nan, keys, logits + W);
      for (int64_t k = 0; k < c.topk; ++k) {
        const int64_t g = int64_t(keys[k] & 0xffffffffu), at = (item + r) * c.topk + k;
        c.index[at] = g;
        c.logits[at] = logits[g];
      }
    }
  }
}

int64_t route_scratch(const RouteParams& c) {
  constexpr int64_t L = kLanes<double>;
  const int64_t W = (c.key_regions + L - 1) / L * L;
  return (kRouteRows + 1) * W + (3 * W + 2 * kFew) / 2;
}

int64_t route_lanes() { return kLanes<double>; }

}  // namespace CPU_CAPABILITY
}  // namespace pyml
