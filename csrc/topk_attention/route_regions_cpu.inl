// route_regions on a CPU. Means and logits are float32, rounded from sums in double: the same on every machine,
// whatever the order of the sums. Bound by one read of q and k.
#include <limits>

#include "common/rows_cpu.h"
#include "common/tile_cpu.h"
#include "topk_attention/topk_attention.h"

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

// The logits of one query region by a product of tiles, the means of the keys [D][Pk padded] in the lanes.
void route_kernel(const RouteParams& c, int64_t begin, int64_t end, double* scratch) {
  constexpr int L = kLanes<double>;
  const int64_t heads = c.per_head ? c.heads : 1, joined = c.per_head ? 1 : c.heads, Pk = c.key_regions;
  const int64_t W = (Pk + L - 1) / L * L, D = c.features;
  double* logits = scratch;                                  // [W]
  uint64_t* keys = reinterpret_cast<uint64_t*>(logits + W);  // [Pk]
  for (int64_t item = begin; item < end; ++item) {
    const int64_t p = item % c.query_regions, h = item / c.query_regions % heads, b = item / c.query_regions / heads;
    for (int64_t i = 0; i < W; ++i) logits[i] = 0;
    for (int64_t j = h * joined; j < h * joined + joined; ++j) {
      const int64_t bh = b * c.heads + j;
      const double* q = c.query_means + (bh * c.query_regions + p) * D;
      for_tile_columns(W / L, [&](auto vectors, int64_t v) {
        tile<double, 1, vectors>(
            D, q, 0, 1, c.key_means + bh * D * W + v * L, W,
            [&](int, int i) { return load<double>(logits + (v + i) * L); },
            [&](int, int i, const Vec<double>& sum) { store<double>(logits + (v + i) * L, sum); });
      });
    }
    for (int64_t g = 0; g < Pk; ++g) {
      const bool any = !c.key_any || c.key_any[b * Pk + g];
      const float logit = any ? float(logits[g] * c.scale) : -std::numeric_limits<float>::infinity();
      logits[g] = double(logit);
      keys[g] = falling_key(logit, g);
    }
    smallest_first(keys, Pk, c.topk);
    for (int64_t k = 0; k < c.topk; ++k) {
      const int64_t g = int64_t(keys[k] & 0xffffffffu);
      c.index[item * c.topk + k] = g;
      c.logits[item * c.topk + k] = float(logits[g]);
    }
  }
}

int64_t route_scratch(const RouteParams& c) {
  constexpr int64_t L = kLanes<double>;
  return 2 * ((c.key_regions + L - 1) / L * L);
}

int64_t route_lanes() { return kLanes<double>; }

}  // namespace CPU_CAPABILITY
}  // namespace pyml
