// The kernels of topk_attention against plain loops in double, on exactly sized memory: for the sanitizers.
// Queries and keys are multiples of 1/2, so that logits are exact, many are equal, and both keep the same keys.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/cpu_isa.h"
#include "setup.h"
#include "topk_attention/topk_attention_params.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

struct Shape {
  int batch, kv_heads, heads, queries, keys, depth, value_depth, mask;  // mask: 0 none, 1 bool, 2 float, 3 float [M]
  bool causal, straight_through, odd_strides;
  std::vector<int64_t> topk;  // falling
};

void expect(const Shape& s, const char* what, double got, double truth, double scale, double eps) {
  ++checks;
  if (std::abs(got - truth) <= 200 * eps * scale) return;
  if (++failures <= 20)
    std::printf(
        "FAILED %s: got %.9g, expected %.9g (B %d kv %d heads %d N %d M %d D %d Dv %d mask %d causal %d st %d)\n", what,
        got, truth, s.batch, s.kv_heads, s.heads, s.queries, s.keys, s.depth, s.value_depth, s.mask, s.causal,
        s.straight_through);
}

// Rows [batch * heads * tokens] of `depth`, or of every second of twice as many columns.
template <class T>
struct Tensor {
  int64_t step, depth;
  Memory<T> memory;
  Tensor(int64_t rows, int64_t depth, bool odd) : step(odd ? 2 : 1), depth(depth), memory(rows * depth * step) {}
  T& at(int64_t row, int64_t c) { return memory[row * depth * step + c * step]; }
  Rows rows(int64_t tokens) {
    Rows r;
    r.data = memory.get();
    r.dtype = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
    r.width = std::max<int64_t>(1, tokens);
    r.height = 1;
    r.stride_n = tokens * depth * step;
    r.stride_w = depth * step;
    r.stride_c = step;
    return r;
  }
};

// What each query keeps and the softmax over it, in double.
struct Truth {
  std::vector<bool> kept;
  std::vector<double> weight;
};

Truth softmax_over(const std::vector<double>& logits, int64_t k) {
  const int64_t n = int64_t(logits.size());
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return logits[i] > logits[j]; });
  Truth t{std::vector<bool>(n), std::vector<double>(n)};
  double total = 0;
  for (int64_t i = 0; i < std::min(k, n); ++i) {
    const int64_t j = order[i];
    if (std::isinf(logits[j])) continue;
    t.kept[j] = true;
    total += t.weight[j] = std::exp(logits[j] - logits[order[0]]);
  }
  for (double& w : t.weight) w = total > 0 ? w / total : 0;
  return t;
}

template <class T>
void test(const Shape& s, std::mt19937& random) {
  const double eps = std::numeric_limits<T>::epsilon();
  const int64_t groups = s.batch * s.kv_heads, H = s.kv_heads * s.heads, all = int64_t(s.batch) * H * s.queries;
  const int64_t M = s.keys, L = int64_t(s.topk.size()), S = L + s.straight_through;
  Tensor<T> q(all, s.depth, s.odd_strides), k(groups * M, s.depth, s.odd_strides), v(groups * M, s.value_depth, false);
  Tensor<T> grad(all * L, s.value_depth, false), out(all * L, s.value_depth, false);
  std::normal_distribution<double> normal;
  for (int64_t r = 0; r < all; ++r)
    for (int64_t c = 0; c < s.depth; ++c) q.at(r, c) = T(0.5 * (int(random() % 5) - 2));
  for (int64_t r = 0; r < groups * M; ++r) {
    for (int64_t c = 0; c < s.depth; ++c) k.at(r, c) = T(0.5 * (int(random() % 5) - 2));
    for (int64_t c = 0; c < s.value_depth; ++c) v.at(r, c) = T(normal(random));
  }
  for (int64_t r = 0; r < all * L; ++r)
    for (int64_t c = 0; c < s.value_depth; ++c) grad.at(r, c) = T(normal(random));
  const int64_t mask_rows = s.mask == 3 ? 1 : all;
  Tensor<T> mask(s.mask >= 2 ? mask_rows : 0, M, s.odd_strides);
  Memory<uint8_t> mask_bool(s.mask == 1 ? all * M : 0);
  std::vector<double> added(size_t(mask_rows * M), 0);
  for (int64_t i = 0; s.mask && i < mask_rows * M; ++i) {
    const bool masked = random() % 4 == 0;
    added[i] = masked ? -INFINITY : s.mask == 1 ? 0 : 0.25 * int(random() % 9);
    if (s.mask == 1)
      mask_bool[i] = !masked;
    else
      mask.at(i / M, i % M) = T(added[i]);
  }
  std::vector<int64_t> output(L);
  for (int64_t i = 0; i < L; ++i) output[i] = L - 1 - i;  // the outputs are in another order than the thresholds

  TopkAttentionParams<T> p{};
  p.batch = s.batch;
  p.groups = groups;
  p.heads = s.heads;
  p.queries = s.queries;
  p.keys = M;
  p.depth = s.depth;
  p.value_depth = s.value_depth;
  p.thresholds = L;
  p.topk = s.topk.data();
  p.output = output.data();
  p.scale = T(0.5);
  p.causal = s.causal;
  p.straight_through = s.straight_through;
  p.q = q.rows(all), p.k = k.rows(groups * M), p.v = v.rows(groups * M);
  if (s.mask == 1) {
    p.mask_bool = reinterpret_cast<const bool*>(mask_bool.get());
    p.mask.width = all, p.mask.stride_w = M;
  } else if (s.mask) {
    p.mask = mask.rows(all);
    if (s.mask == 3) p.mask.stride_w = 0;
  }
  p.mask_batch = s.mask == 3 ? 1 : s.batch;
  p.mask_heads = s.mask == 3 ? 1 : H;
  p.mask_queries = s.mask == 3 ? 1 : s.queries;
  p.mask_keys = M;
  Memory<T> key_tiles(groups * p.tiles() * kTileKeys * s.depth);
  Memory<T> value_tiles(groups * p.tiles() * kTileKeys * s.value_depth);
  Memory<T> key_rows(groups * M * p.depth_ld()), value_rows(groups * M * p.value_ld());
  p.key_tiles = key_tiles.get(), p.value_tiles = value_tiles.get();
  p.key_rows = key_rows.get(), p.value_rows = value_rows.get();
  Memory<T> top(all * S), total(all * S), tau(all * S), average(all * L * s.value_depth), delta(all * L);
  Memory<int32_t> cut(all * S);
  p.out = out.rows(all * L), p.top = top.get(), p.total = total.get(), p.tau = tau.get(), p.cut = cut.get(),
  p.average = average.get();
  p.rows_per_split = 32;
  Memory<T> scratch(PYML_CALL_ISA(topk_attention_scratch, p));
  PYML_CALL_ISA(topk_pack_kernel, p, 0, groups * p.tiles());
  const int64_t blocks = groups * p.blocks();
  PYML_CALL_ISA(topk_attention_fwd_kernel, p, 0, blocks / 2, scratch.get());
  PYML_CALL_ISA(topk_attention_fwd_kernel, p, blocks / 2, blocks, scratch.get());

  p.grad = grad.rows(all * L), p.result = p.out, p.delta = delta.get();
  p.want_q = p.want_k = p.want_v = true;
  Memory<T> dq(all * p.depth_ld()), dk(p.splits() * groups * M * p.depth_ld());
  Memory<T> dv(p.splits() * groups * M * p.value_ld()), dmask(mask_rows * M);
  Tensor<T> dk_out(groups * M, s.depth, false), dv_out(groups * M, s.value_depth, false);
  p.dq = dq.get(), p.dk = dk.get(), p.dv = dv.get(), p.dmask = dmask.get();
  p.dk_rows = dk_out.rows(groups * M), p.dv_rows = dv_out.rows(groups * M);
  PYML_CALL_ISA(topk_delta_kernel, p, 0, all * L, scratch.get());
  PYML_CALL_ISA(topk_attention_bwd_kernel, p, 0, groups * p.splits(), scratch.get());
  PYML_CALL_ISA(topk_reduce_kernel, p, 0, groups * p.chunks());
  if (s.mask >= 2)
    PYML_CALL_ISA(topk_mask_bwd_kernel, p, 0, p.mask_batch * p.mask_heads * p.mask_blocks(), scratch.get());

  std::vector<double> true_dk(groups * M * s.depth), true_dv(groups * M * s.value_depth), true_dmask(mask_rows * M);
  for (int64_t row = 0; row < all; ++row) {
    const int64_t group = row / p.group_rows();
    std::vector<double> logits(M), slopes(M), true_dq(s.depth);
    for (int64_t j = 0; j < M; ++j) {
      for (int64_t c = 0; c < s.depth; ++c) logits[j] += 0.5 * q.at(row, c) * k.at(group * M + j, c);
      logits[j] += s.mask ? added[(s.mask == 3 ? 0 : row * M) + j] : 0;
      if (s.causal && j > row % s.queries) logits[j] = -INFINITY;
    }
    for (int64_t t = 0; t < L; ++t) {
      const int64_t at = p.place(output[t], row, L);
      const Truth hard = softmax_over(logits, s.topk[t]), soft = s.straight_through ? softmax_over(logits, M) : hard;
      double mean = 0;
      for (int64_t c = 0; c < s.value_depth; ++c) {
        double sum = 0;
        for (int64_t j = 0; j < M; ++j) {
          sum += hard.weight[j] * v.at(group * M + j, c);
          mean += soft.weight[j] * v.at(group * M + j, c) * grad.at(at, c);
          true_dv[(group * M + j) * s.value_depth + c] += hard.weight[j] * grad.at(at, c);
        }
        expect(s, "out", out.at(at, c), sum, 4, eps);
      }
      for (int64_t j = 0; j < M; ++j) {
        double product = -mean;
        for (int64_t c = 0; c < s.value_depth; ++c) product += grad.at(at, c) * v.at(group * M + j, c);
        slopes[j] += soft.weight[j] * product;
      }
    }
    for (int64_t j = 0; j < M; ++j) {
      true_dmask[(s.mask == 3 ? 0 : row * M) % (mask_rows * M) + j] += slopes[j];
      for (int64_t c = 0; c < s.depth; ++c) {
        true_dq[c] += 0.5 * slopes[j] * k.at(group * M + j, c);
        true_dk[(group * M + j) * s.depth + c] += 0.5 * slopes[j] * q.at(row, c);
      }
    }
    for (int64_t c = 0; c < s.depth; ++c) expect(s, "dq", dq[row * p.depth_ld() + c], true_dq[c], 20, eps);
  }
  for (int64_t r = 0; r < groups * M; ++r) {
    for (int64_t c = 0; c < s.depth; ++c) expect(s, "dk", dk_out.at(r, c), true_dk[r * s.depth + c], 100, eps);
    for (int64_t c = 0; c < s.value_depth; ++c)
      expect(s, "dv", dv_out.at(r, c), true_dv[r * s.value_depth + c], 100, eps);
  }
  for (int64_t i = 0; s.mask >= 2 && i < mask_rows * M; ++i) expect(s, "dmask", dmask[i], true_dmask[i], 100, eps);
}

template <class T>
void run(int count, std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
  for (int n = 0; n < count; ++n) {
    Shape s;
    s.batch = pick({1, 2});
    s.kv_heads = pick({1, 2});
    s.heads = pick({1, 1, 3});
    s.queries = pick({1, 5, 16, 17, 40});
    s.keys = pick({1, 7, 64, 65, 130, 256, 300});
    s.depth = pick({1, 3, 16, 20, 33});
    s.value_depth = pick({1, 6, 16, 31, 70});
    s.mask = int(random() % 4);
    s.causal = random() % 3 == 0;
    s.straight_through = random() % 4 == 0;
    s.odd_strides = random() % 3 == 0;
    for (int t = s.straight_through ? 1 : pick({1, 1, 2, 3}); t; --t)
      s.topk.push_back(1 + int(random() % (s.keys + 5)));
    std::sort(s.topk.rbegin(), s.topk.rend());
    test<T>(s, random);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  run<float>(80, random);
  run<double>(60, random);
  std::printf("%s: %d checks, %d failed\n", isa_name(cpu_isa()), checks, failures);
  return failures ? 1 : 0;
}
