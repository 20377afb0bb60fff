// The op `topk_attention` on a CPU: checks, allocation, threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/topk_attention_params.h"

namespace pyml {
namespace {

constexpr const char* kOp = "topk_attention";
using Optional = std::optional<at::Tensor>;
using Saved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The arguments of forward and backward alike.
struct Arguments {
  const at::Tensor &q, &k, &v;
  const Optional& mask;
  at::IntArrayRef topk;
  bool causal;
  std::optional<double> scale;
  bool straight_through;

  bool float_mask() const { return mask && mask->scalar_type() != at::kBool; }
  bool is_double() const { return any_double(q, k, v, float_mask() ? *mask : at::Tensor()); }
  int64_t thresholds() const { return int64_t(topk.size()); }
  int64_t softmaxes() const { return thresholds() + (straight_through ? 1 : 0); }
  std::vector<int64_t> rows(int64_t count) const { return {q.size(0), count, q.size(1), q.size(2)}; }
  std::vector<int64_t> out_shape() const { return {q.size(0), thresholds(), q.size(1), q.size(2), v.size(3)}; }
  bool empty() const { return q.size(0) * q.size(1) * q.size(2) == 0; }

  void check() const {
    check_float(kOp, "q", q, q.device());
    check_float(kOp, "k", k, q.device());
    check_float(kOp, "v", v, q.device());
    PYML_CHECK(q.dim() == 4, kOp, "q", "shape [B, H, N, D]", q.sizes());
    PYML_CHECK(k.dim() == 4, kOp, "k", "shape [B, Hkv, M, D]", k.sizes());
    PYML_CHECK(v.dim() == 4, kOp, "v", "shape [B, Hkv, M, Dv]", v.sizes());
    check_shape(kOp, "k", k, {q.size(0), k.size(1), k.size(2), q.size(3)});
    check_shape(kOp, "v", v, {q.size(0), k.size(1), k.size(2), v.size(3)});
    PYML_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, kOp, "k", "Hkv that divides H", k.size(1));
    PYML_CHECK(k.size(2) < (int64_t(1) << 31) - 64, kOp, "k", "fewer than 2^31 - 64 keys", k.size(2));
    PYML_CHECK(!topk.empty(), kOp, "topk", "an integer >= 1 or a list of them", "none");
    for (int64_t n : topk) PYML_CHECK(n >= 1, kOp, "topk", "an integer >= 1 or a list of them", n);
    PYML_CHECK(!straight_through || topk.size() == 1, kOp, "straight_through", "False with several topk", "True");
    PYML_CHECK(!scale || std::isfinite(*scale), kOp, "scale", "a finite number or None", *scale);
    if (!mask) return;
    if (float_mask()) check_float(kOp, "mask", *mask, q.device());
    PYML_CHECK(mask->device() == q.device(), kOp, "mask", c10::str("a tensor on ", q.device()), mask->device());
    const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
    PYML_CHECK(mask->dim() == 4, kOp, "mask", "shape [B or 1, H or 1, N or 1, M or 1]", mask->sizes());
    for (int64_t d = 0; d < 4; ++d)
      PYML_CHECK(mask->size(d) == full[d] || mask->size(d) == 1, kOp, "mask", "shape [B or 1, H or 1, N or 1, M or 1]",
                 mask->sizes());
  }
};

// The rows of a tensor [B, heads, tokens, depth] with any strides.
Rows token_rows(const at::Tensor& t) {
  Rows rows;
  rows.data = const_cast<void*>(t.const_data_ptr());
  rows.dtype = dtype_of(t);
  rows.width = std::max<int64_t>(1, t.size(2));
  rows.height = std::max<int64_t>(1, t.size(1));
  rows.stride_n = t.stride(0);
  rows.stride_h = t.stride(1);
  rows.stride_w = t.stride(2);
  rows.stride_c = t.stride(3);
  return rows;
}

// The same of a mask, with stride 0 along what it is broadcast to.
Rows mask_rows(const at::Tensor& mask, int64_t queries, int64_t heads) {
  Rows rows = token_rows(mask);
  rows.width = queries;
  rows.height = heads;
  if (mask.size(0) == 1) rows.stride_n = 0;
  if (mask.size(1) == 1) rows.stride_h = 0;
  if (mask.size(2) == 1) rows.stride_w = 0;
  if (mask.size(3) == 1) rows.stride_c = 0;
  return rows;
}

// The rows of a contiguous tensor [..., depth].
Rows plain_rows(const at::Tensor& t) {
  const int64_t depth = std::max<int64_t>(1, t.size(-1));
  return matrix_rows(t.view({t.numel() / depth, depth}));
}

// Parameters that forward and backward share, and the memory behind them.
template <class T>
struct Call {
  TopkAttentionParams<T> p{};
  std::vector<int64_t> topk, output;
  at::Tensor key_tiles, value_tiles, key_rows, value_rows;

  explicit Call(const Arguments& a) : topk(a.topk.size()), output(a.topk.size()) {
    std::iota(output.begin(), output.end(), 0);
    std::stable_sort(output.begin(), output.end(), [&](int64_t i, int64_t j) { return a.topk[i] > a.topk[j]; });
    for (size_t i = 0; i < topk.size(); ++i) topk[i] = a.topk[output[i]];
    p.batch = a.q.size(0);
    p.groups = p.batch * a.k.size(1);
    p.heads = a.q.size(1) / a.k.size(1);
    p.queries = a.q.size(2);
    p.keys = a.k.size(2);
    p.depth = a.q.size(3);
    p.value_depth = a.v.size(3);
    p.thresholds = a.thresholds();
    p.topk = topk.data();
    p.output = output.data();
    p.scale = T(a.scale ? *a.scale : 1 / std::sqrt(double(std::max<int64_t>(1, p.depth))));
    p.causal = a.causal;
    p.straight_through = a.straight_through;
    p.q = token_rows(a.q);
    p.k = token_rows(a.k);
    p.v = token_rows(a.v);
    p.rows_per_split = p.group_rows();
    if (a.mask) {
      p.mask = mask_rows(*a.mask, p.queries, a.q.size(1));
      if (!a.float_mask()) p.mask_bool = static_cast<const bool*>(p.mask.data), p.mask.data = nullptr;
      p.mask_batch = a.mask->size(0);
      p.mask_heads = a.mask->size(1);
      p.mask_queries = a.mask->size(2);
      p.mask_keys = a.mask->size(3);
    }
  }

  void pack(const at::Tensor& like, bool backward, bool want_q) {
    const auto make = [&](bool wanted, int64_t count, at::Tensor& memory) -> T* {
      if (!wanted) return nullptr;
      memory = buffer<T>(count, like);
      return memory.template mutable_data_ptr<T>();
    };
    const int64_t tile_keys = p.groups * p.tiles() * kTileKeys, keys = p.groups * p.keys;
    p.key_tiles = make(true, tile_keys * p.depth, key_tiles);
    p.value_tiles = make(backward, tile_keys * p.value_depth, value_tiles);
    p.key_rows = make(want_q, keys * p.depth_ld(), key_rows);
    p.value_rows = make(!backward || p.few(p.topk[p.thresholds - 1]), keys * p.value_ld(), value_rows);
    parallel(p.groups * p.tiles(), (p.depth + p.value_depth) * 8,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_pack_kernel, p, begin, end); });
  }

  T* work() const { return scratch<T>(PYML_CALL_ISA(topk_attention_scratch, p)); }
  int64_t row_work() const { return p.keys * (p.depth + p.value_depth + 8) / 8; }
};

template <class T>
Saved forward(const Arguments& a) {
  const auto wide = a.q.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor out = at::zeros(a.out_shape(), a.q.options());
  at::Tensor top = at::zeros(a.rows(a.softmaxes()), wide), total = at::zeros(a.rows(a.softmaxes()), wide);
  at::Tensor tau = at::zeros(a.rows(a.softmaxes()), wide);
  at::Tensor cut = at::zeros(a.rows(a.softmaxes()), wide.dtype(at::kInt));
  const bool keep_average = a.straight_through || a.q.scalar_type() != wide.dtype().toScalarType();
  at::Tensor average = keep_average ? at::zeros(a.out_shape(), wide) : at::zeros({a.q.size(0), 0}, wide);
  if (a.empty() || a.k.size(2) == 0) return {out, top, total, tau, cut, average};
  Call<T> call(a);
  auto& p = call.p;
  call.pack(a.q, false, false);
  p.out = plain_rows(out);
  p.top = top.template mutable_data_ptr<T>();
  p.total = total.template mutable_data_ptr<T>();
  p.tau = tau.template mutable_data_ptr<T>();
  p.cut = cut.template mutable_data_ptr<int32_t>();
  p.average = keep_average ? average.template mutable_data_ptr<T>() : nullptr;
  parallel(p.groups * p.blocks(), p.block_rows() * call.row_work(),
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_attention_fwd_kernel, p, begin, end, call.work()); });
  return {out, top, total, tau, cut, average};
}

// Tasks of a backward: enough for many cores, at least 64 rows each, partial sums of at most 32 MiB, by shape alone.
template <class T>
int64_t rows_per_split(const TopkAttentionParams<T>& p) {
  const int64_t bytes = p.groups * p.keys * (p.depth_ld() + p.value_ld()) * int64_t(sizeof(T));
  const int64_t by_tasks = (16 + p.groups - 1) / p.groups, by_rows = (p.group_rows() + 63) / 64;
  const int64_t splits =
      std::max<int64_t>(1, std::min({by_tasks, by_rows, (int64_t(32) << 20) / std::max<int64_t>(1, bytes)}));
  const int64_t rows = (p.group_rows() + splits - 1) / splits;
  return (rows + kQueryRows - 1) / kQueryRows * kQueryRows;
}

template <class T>
Gradients backward(const at::Tensor& grad, const Arguments& a, const at::Tensor& out, const at::Tensor& top,
                   const at::Tensor& total, const at::Tensor& tau, const at::Tensor& cut, const at::Tensor& average,
                   std::array<bool, 4> mask) {
  const auto zeros = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  at::Tensor dq = zeros(mask[0], a.q), dk = zeros(mask[1], a.k), dv = zeros(mask[2], a.v);
  at::Tensor dmask = zeros(mask[3], a.mask ? *a.mask : a.q);
  if (a.empty() || a.k.size(2) == 0) return {dq, dk, dv, dmask};
  Call<T> call(a);
  auto& p = call.p;
  call.pack(a.q, true, mask[0]);
  // Rows hold four dimensions; with several thresholds a strided gradient is copied.
  const at::Tensor g = p.thresholds == 1 ? grad.squeeze(1) : grad.contiguous();
  p.grad = p.thresholds == 1 ? token_rows(g) : plain_rows(g);
  const at::Tensor result = out.contiguous(), m = top.contiguous(), s = total.contiguous(), t = tau.contiguous(),
                   c = cut.contiguous();
  const at::Tensor full = average.contiguous();
  p.result = plain_rows(result);
  p.top = const_cast<T*>(m.template const_data_ptr<T>());
  p.total = const_cast<T*>(s.template const_data_ptr<T>());
  p.tau = const_cast<T*>(t.template const_data_ptr<T>());
  p.cut = const_cast<int32_t*>(c.template const_data_ptr<int32_t>());
  p.average = full.numel() > 0 ? const_cast<T*>(full.template const_data_ptr<T>()) : nullptr;
  const at::Tensor delta = buffer<T>(p.thresholds * p.all_rows(), a.q);
  p.delta = delta.template mutable_data_ptr<T>();
  parallel(p.thresholds * p.all_rows(), p.value_depth / 2,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_delta_kernel, p, begin, end, call.work()); });
  p.want_q = mask[0], p.want_k = mask[1], p.want_v = mask[2];
  if (p.want_q || p.want_k || p.want_v) {
    p.rows_per_split = rows_per_split(p);
    const int64_t parts = p.splits() * p.groups * p.keys;
    const at::Tensor q_memory = buffer<T>(p.want_q ? p.all_rows() * p.depth_ld() : 0, a.q);
    const at::Tensor k_memory = buffer<T>(p.want_k ? parts * p.depth_ld() : 0, a.q);
    const at::Tensor v_memory = buffer<T>(p.want_v ? parts * p.value_ld() : 0, a.q);
    p.dq = q_memory.template mutable_data_ptr<T>();
    p.dk = k_memory.template mutable_data_ptr<T>();
    p.dv = v_memory.template mutable_data_ptr<T>();
    parallel(p.groups * p.splits(), 2 * p.rows_per_split * call.row_work(),
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_attention_bwd_kernel, p, begin, end, call.work()); });
    if (p.want_q) dq.copy_(q_memory.view({p.all_rows(), p.depth_ld()}).narrow(1, 0, p.depth).view_as(a.q));
    if (p.want_k) p.dk_rows = token_rows(dk);
    if (p.want_v) p.dv_rows = token_rows(dv);
    if (p.want_k || p.want_v)
      parallel(p.groups * p.chunks(), p.splits() * (p.depth + p.value_depth) * kChunkKeys / 8,
               [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_reduce_kernel, p, begin, end); });
  }
  if (mask[3]) {
    const at::Tensor sums = at::empty(a.mask->sizes(), delta.options());
    p.dmask = sums.template mutable_data_ptr<T>();
    parallel(p.mask_batch * p.mask_heads * p.mask_blocks(), 2 * kQueryRows * call.row_work(),
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_mask_bwd_kernel, p, begin, end, call.work()); });
    dmask.copy_(sums);
  }
  return {dq, dk, dv, dmask};
}

Saved topk_attention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& mask,
                         at::IntArrayRef topk, bool causal, std::optional<double> scale, bool straight_through) {
  const Arguments a{q, k, v, mask, topk, causal, scale, straight_through};
  a.check();
  return a.is_double() ? forward<double>(a) : forward<float>(a);
}

Gradients topk_attention_bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const Optional& mask, at::IntArrayRef topk, bool causal, std::optional<double> scale,
                             bool straight_through, const at::Tensor& out, const at::Tensor& top,
                             const at::Tensor& total, const at::Tensor& tau, const at::Tensor& cut,
                             const at::Tensor& average, std::array<bool, 4> wanted) {
  const Arguments a{q, k, v, mask, topk, causal, scale, straight_through};
  a.check();
  wanted[3] = wanted[3] && a.float_mask();
  check_float(kOp, "grad", grad, q.device());
  check_shape(kOp, "grad", grad, a.out_shape());
  check_shape(kOp, "out", out, a.out_shape());
  const auto type = a.is_double() ? at::kDouble : at::kFloat;
  for (const auto& [name, t] : {std::pair{"top", top}, {"total", total}, {"tau", tau}, {"cut", cut}}) {
    check_shape(kOp, name, t, a.rows(a.softmaxes()));
    PYML_CHECK(t.scalar_type() == (t.is_same(cut) ? at::kInt : type), kOp, name, "the dtype of the forward",
               t.scalar_type());
  }
  PYML_CHECK(average.scalar_type() == type, kOp, "average", "the dtype of the forward", average.scalar_type());
  if (average.numel() > 0) check_shape(kOp, "average", average, a.out_shape());
  PYML_CHECK(average.numel() > 0 || !straight_through || out.numel() == 0, kOp, "average", "what the forward saved",
             average.sizes());
  return a.is_double() ? backward<double>(grad, a, out, top, total, tau, cut, average, wanted)
                       : backward<float>(grad, a, out, top, total, tau, cut, average, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("topk_attention_fwd", &topk_attention_fwd);
  m.impl("topk_attention_bwd", &topk_attention_bwd);
}

}  // namespace pyml
