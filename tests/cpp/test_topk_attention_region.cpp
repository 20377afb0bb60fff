// The kernels of region_attention and route_regions against plain loops in double, on exactly sized memory: for the
// sanitizers. Random shapes, ragged and repeated indices, masks, region weights, splits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/cpu_isa.h"
#include "setup.h"
#include "topk_attention/topk_attention.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

struct Shape {
  int batch, heads, regions, queries, key_regions, keys, slots, depth, value_depth, splits;
  bool per_head, counts, masked, weighted, half;
};

void expect(const Shape& s, const char* what, double got, double truth, double scale, double eps) {
  ++checks;
  if (std::abs(got - truth) <= 300 * eps * scale || got == truth) return;
  if (++failures <= 20)
    std::printf(
        "FAILED %s: got %.9g, expected %.9g (B %d H %d P %d S %d Pk %d Sk %d K %d D %d Dv %d splits %d per head %d "
        "counts %d mask %d weight %d half %d)\n",
        what, got, truth, s.batch, s.heads, s.regions, s.queries, s.key_regions, s.keys, s.slots, s.depth,
        s.value_depth, s.splits, s.per_head, s.counts, s.masked, s.weighted, s.half);
}

// A dense tensor [B, H, regions, tokens, width]; as bfloat16 beside it where `half`.
template <class T>
struct Five {
  int64_t heads, regions, tokens, width;
  Memory<T> memory;
  Memory<uint16_t> bits;
  bool half;
  Five(int64_t b, int64_t h, int64_t r, int64_t t, int64_t w, bool half)
      : heads(h),
        regions(r),
        tokens(t),
        width(w),
        memory(b * h * r * t * w),
        bits(half ? b * h * r * t * w : 0),
        half(half) {}
  int64_t at(int64_t b, int64_t h, int64_t r, int64_t t, int64_t c) const {
    return (((b * heads + h) * regions + r) * tokens + t) * width + c;
  }
  double value(int64_t i) { return double(memory[i]); }
  void fill(std::mt19937& random, double spread) {
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < memory.size(); ++i) {
      float v = float(normal(random));
      uint32_t word;
      std::memcpy(&word, &v, 4);
      word &= 0xffff0000u;  // a bfloat16, so that both hold the same number
      if (half) bits[i] = uint16_t(word >> 16);
      std::memcpy(&v, &word, 4);
      memory[i] = T(v);
    }
  }
  Regions view() {
    Regions r;
    r.data = half ? static_cast<void*>(bits.get()) : static_cast<void*>(memory.get());
    r.dtype = half ? DType::kBFloat16 : sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
    r.tokens = tokens;
    r.stride[4] = 1, r.stride[3] = width, r.stride[2] = tokens * width;
    r.stride[1] = regions * r.stride[2], r.stride[0] = heads * r.stride[1];
    return r;
  }
};

template <class T>
void test_region(const Shape& s, std::mt19937& random) {
  const double eps = std::numeric_limits<T>::epsilon();
  const int B = s.batch, H = s.heads, P = s.regions, S = s.queries, Pk = s.key_regions, Sk = s.keys, K = s.slots,
            D = s.depth, Dv = s.value_depth, ih = s.per_head ? H : 1;
  Five<T> q(B, H, P, S, D, s.half), k(B, H, Pk, Sk, D, s.half), v(B, H, Pk, Sk, Dv, s.half);
  Five<T> grad(B, H, P, S, Dv, false), out(B, H, P, S, Dv, false), exact(B, H, P, S, Dv, false);
  Five<T> dq(B, H, P, S, D, false), dk(B, H, Pk, Sk, D, false), dv(B, H, Pk, Sk, Dv, false);
  q.fill(random, 1), k.fill(random, 1), v.fill(random, 1), grad.fill(random, 1);
  Memory<int64_t> index(B * ih * P * K), counts(B * ih * P);
  Memory<T> weight(B * ih * P * K), dweight(B * H * P * K);
  Memory<double> lse(B * H * P * S);
  Memory<int32_t> valid(B * Pk * Sk), valid_count(B * Pk);
  std::vector<bool> keep(B * Pk * Sk, true);
  for (int64_t i = 0; i < index.size(); ++i) {
    index[i] = int64_t(random() % (Pk + 1)) - 1;
    weight[i] = T(s.weighted ? double(random() % 9) / 4 - 0.5 : 1.0);
  }
  for (int64_t r = 0; r < counts.size(); ++r) {
    counts[r] = s.counts ? int64_t(random() % (K + 1)) : K;
    for (int64_t j = counts[r]; j < K; ++j) index[r * K + j] = int64_t(1) << 60;  // must not be read through
  }
  for (int64_t r = 0; r < B * Pk; ++r) {
    valid_count[r] = 0;
    for (int t = 0; t < Sk; ++t) {
      valid[r * Sk + t] = -1;
      keep[r * Sk + t] = !s.masked || random() % 3 > 0;
      if (keep[r * Sk + t]) valid[r * Sk + valid_count[r]++] = t;
    }
  }

  const double scale = 0.4;
  RegionParams<T> c{};
  c.batch = B, c.heads = H, c.query_regions = P, c.queries = S, c.key_regions = Pk, c.keys = Sk, c.slots = K;
  c.features = D, c.value_features = Dv;
  c.q = q.view(), c.k = k.view(), c.v = v.view(), c.out = out.view(), c.exact = exact.view();
  c.index = index.get(), c.index_heads = ih;
  if (s.counts) c.counts = counts.get(), c.count_heads = ih;
  if (s.weighted) c.weight = weight.get(), c.weight_heads = ih;
  if (s.masked) c.valid = valid.get(), c.valid_count = valid_count.get();
  c.scale = T(scale), c.lse = lse.get();
  Memory<T> key_rows(B * H * Pk * Sk * D), value_rows(B * H * Pk * Sk * Dv);
  c.key_rows = key_rows.get(), c.value_rows = value_rows.get();
  for (int i = 0; i < 4; ++i) c.key_stride[i] = k.view().stride[i], c.value_stride[i] = v.view().stride[i];
  const int64_t key_items = int64_t(B) * H * Pk;
  PYML_CALL_ISA(region_rows_kernel, c, 0, key_items / 2);
  PYML_CALL_ISA(region_rows_kernel, c, key_items / 2, key_items);
  const int64_t lanes = PYML_CALL_ISA(region_lanes, c), items = int64_t(B) * H * P * Blocks(S, lanes).count;
  {
    Memory<T> scratch(PYML_CALL_ISA(region_fwd_scratch, c));
    PYML_CALL_ISA(region_fwd_kernel, c, 0, items / 3, scratch.get());  // in two ranges, as two threads would
    PYML_CALL_ISA(region_fwd_kernel, c, items / 3, items, scratch.get());
  }

  const Blocks blocks(Sk, lanes);
  const int64_t columns = key_items * blocks.count * blocks.padded * (D + Dv);
  Memory<T> packed(columns), rows(key_items * blocks.count * PYML_CALL_ISA(region_row_size, c)),
      partial(s.splits * columns);
  Memory<uint8_t> touched(s.splits * key_items);
  std::fill(touched.get(), touched.get() + touched.size(), uint8_t(0));
  c.packed = packed.get(), c.packed_rows = rows.get(), c.partial = partial.get(), c.touched = touched.get();
  c.splits = s.splits, c.want_q = c.want_kv = true;
  c.out = exact.view(), c.grad = grad.view(), c.dq = dq.view(), c.dk = dk.view(), c.dv = dv.view();
  c.dweight = s.weighted ? dweight.get() : nullptr;
  PYML_CALL_ISA(region_pack_kernel, c, 0, key_items);
  {
    Memory<T> scratch(PYML_CALL_ISA(region_bwd_scratch, c));
    PYML_CALL_ISA(region_bwd_kernel, c, 0, 1, scratch.get());
    PYML_CALL_ISA(region_bwd_kernel, c, 1, int64_t(B) * H * s.splits, scratch.get());
    PYML_CALL_ISA(region_reduce_kernel, c, 0, key_items, scratch.get());
  }

  std::vector<double> true_dk(dk.memory.size()), true_dv(dv.memory.size());
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h)
      for (int p = 0; p < P; ++p) {
        const int64_t row = (int64_t(b) * ih + (s.per_head ? h : 0)) * P + p;
        std::vector<double> true_dw(K);
        for (int i = 0; i < S; ++i) {
          std::vector<int> slot, region, token;
          std::vector<double> plain, logit, chance;
          double top = -1e300, total = 0, size = 1;
          for (int j = 0; j < counts[row]; ++j) {
            const int64_t g = index[row * K + j];
            for (int t = 0; g >= 0 && t < Sk; ++t) {
              if (!keep[(b * Pk + g) * Sk + t]) continue;
              double dot = 0;
              for (int d = 0; d < D; ++d) dot += q.value(q.at(b, h, p, i, d)) * k.value(k.at(b, h, g, t, d));
              slot.push_back(j), region.push_back(int(g)), token.push_back(t);
              plain.push_back(scale * dot), logit.push_back(plain.back() * double(weight[row * K + j]));
              top = std::max(top, logit.back());
              size = std::max(size, std::abs(plain.back()));
            }
          }
          for (double l : logit) chance.push_back(std::exp(l - top)), total += chance.back();
          std::vector<double> y(Dv), from(D);
          for (size_t n = 0; n < chance.size(); ++n) {
            chance[n] /= total;
            for (int e = 0; e < Dv; ++e)
              y[e] += chance[n] * double(weight[row * K + slot[n]]) * v.value(v.at(b, h, region[n], token[n], e));
          }
          double delta = 0;
          for (int e = 0; e < Dv; ++e) {
            expect(s, "out", out.value(out.at(b, h, p, i, e)), y[e], 3 * size, eps);
            delta += y[e] * grad.value(grad.at(b, h, p, i, e));
          }
          for (size_t n = 0; n < chance.size(); ++n) {
            const double w = double(weight[row * K + slot[n]]);
            double dp = 0;
            for (int e = 0; e < Dv; ++e) {
              const double up = grad.value(grad.at(b, h, p, i, e));
              const int64_t at = v.at(b, h, region[n], token[n], e);
              dp += up * v.value(at);
              true_dv[at] += chance[n] * w * up;
            }
            const double ds = chance[n] * (dp * w - delta);
            true_dw[slot[n]] += ds * plain[n] + chance[n] * dp;
            for (int d = 0; d < D; ++d) {
              from[d] += scale * ds * w * k.value(k.at(b, h, region[n], token[n], d));
              true_dk[k.at(b, h, region[n], token[n], d)] += scale * ds * w * q.value(q.at(b, h, p, i, d));
            }
          }
          for (int d = 0; d < D; ++d) expect(s, "dq", dq.value(dq.at(b, h, p, i, d)), from[d], 10 * Dv * size, eps);
        }
        const int64_t weights = ((int64_t(b) * H + h) * P + p) * K;
        for (int j = 0; s.weighted && j < K; ++j)
          expect(s, "dweight", dweight[weights + j], true_dw[j], 30.0 * S * Dv, eps);
      }
  for (int64_t i = 0; i < dk.memory.size(); ++i) expect(s, "dk", dk.value(i), true_dk[i], 10.0 * P * S * Dv, eps);
  for (int64_t i = 0; i < dv.memory.size(); ++i) expect(s, "dv", dv.value(i), true_dv[i], 10.0 * P * S, eps);
}

void test_route(const Shape& s, std::mt19937& random) {
  const int B = s.batch, H = s.heads, P = s.regions, Pk = s.key_regions, D = s.depth, topk = 1 + int(random() % Pk);
  Five<float> q(B, H, P, s.queries, D, s.half), k(B, H, Pk, s.keys, D, s.half);
  q.fill(random, 1), k.fill(random, 1);
  RouteParams c{};
  c.batch = B, c.heads = H, c.query_regions = P, c.key_regions = Pk, c.features = D, c.topk = topk;
  c.per_head = s.per_head, c.scale = 0.5;
  const int64_t lanes = PYML_CALL_ISA(route_lanes), padded = (Pk + lanes - 1) / lanes * lanes;
  Memory<double> query_means(B * H * P * D), key_means(B * H * Pk * D), columns(B * H * D * padded);
  c.tokens = q.view(), c.regions = P, c.means = query_means.get();
  PYML_CALL_ISA(route_means_kernel, c, 0, B * H * P);
  c.tokens = k.view(), c.regions = Pk, c.means = key_means.get();
  PYML_CALL_ISA(route_means_kernel, c, 0, B * H * Pk);
  for (int bh = 0; bh < B * H; ++bh)
    for (int d = 0; d < D; ++d)
      for (int g = 0; g < padded; ++g)
        columns[(bh * D + d) * padded + g] = g < Pk ? key_means[(bh * Pk + g) * D + d] : 0;
  c.query_means = query_means.get(), c.key_means = columns.get();
  const int heads = s.per_head ? H : 1;
  Memory<int64_t> index(B * heads * P * topk);
  Memory<float> logits(B * heads * P * topk);
  Memory<double> scratch(PYML_CALL_ISA(route_scratch, c));
  c.index = index.get(), c.logits = logits.get();
  PYML_CALL_ISA(route_kernel, c, 0, B * heads * P, scratch.get());
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < heads; ++h)
      for (int p = 0; p < P; ++p) {
        std::vector<double> logit(Pk);
        for (int g = 0; g < Pk; ++g)
          for (int j = s.per_head ? h : 0; j < (s.per_head ? h + 1 : H); ++j)
            for (int d = 0; d < D; ++d) {
              double a = 0, z = 0;
              for (int t = 0; t < s.queries; ++t) a += q.value(q.at(b, j, p, t, d)) / s.queries;
              for (int t = 0; t < s.keys; ++t) z += k.value(k.at(b, j, g, t, d)) / s.keys;
              logit[g] += 0.5 * a * z;
            }
        std::vector<int> order(Pk);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return logit[x] > logit[y]; });
        const int64_t row = ((int64_t(b) * heads + h) * P + p) * topk;
        for (int n = 0; n < topk; ++n) {  // the n-th largest, whichever of two near ones it is
          expect(s, "route logit", logits[row + n], logit[order[n]], D * H, 1.2e-7);
          expect(s, "route index", logit[index[row + n]], logit[order[n]], D * H, 1.2e-7);
          for (int m = 0; m < n; ++m) expect(s, "route twice", index[row + m] == index[row + n], 0, 0, 0);
        }
      }
}

template <class T>
void run(int count, std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
  for (int n = 0; n < count; ++n) {
    Shape s;
    s.batch = pick({1, 1, 2});
    s.heads = pick({1, 2, 3});
    s.regions = pick({1, 2, 5, 9});
    s.queries = pick({1, 5, 16, 33, 49, 64, 65});
    s.key_regions = pick({1, 2, 6, 17});
    s.keys = pick({1, 3, 16, 31, 49, 64, 70});
    s.slots = pick({0, 1, 2, 4});
    s.depth = pick({1, 4, 16, 24, 37});
    s.value_depth = pick({1, 6, 8, 19});
    s.splits = std::min(s.regions, pick({1, 1, 2, 4}));
    s.per_head = random() % 2, s.counts = random() % 2, s.masked = random() % 2, s.weighted = random() % 2;
    s.half = random() % 4 == 0;
    test_region<T>(s, random);
    test_route(s, random);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  run<float>(60, random);
  run<double>(40, random);
  std::printf("%s: %d checks, %d failed\n", isa_name(cpu_isa()), checks, failures);
  return failures ? 1 : 0;
}
