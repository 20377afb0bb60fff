// The op `topk_attention` on a CPU: checks, allocation, threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/topk_attention_arguments.h"
#include "topk_attention/topk_attention_params.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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

  explicit Call(const TopkArguments& a) : topk(a.topk.size()), output(a.topk.size()) {
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
    p.scale = T(a.factor());
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
TopkOutputs forward(const TopkArguments& a) {
  const TopkOutputs found = a.outputs();
  if (a.empty()) return found;
  const auto& [out, top, total, tau, cut, average] = found;
  Call<T> call(a);
  auto& p = call.p;
  call.pack(a.q, false, false);
  p.out = plain_rows(out);
  p.top = top.template mutable_data_ptr<T>();
  p.total = total.template mutable_data_ptr<T>();
  p.tau = tau.template mutable_data_ptr<T>();
  p.cut = cut.template mutable_data_ptr<int32_t>();
  p.average = a.keeps_average() ? average.template mutable_data_ptr<T>() : nullptr;
  parallel(p.groups * p.blocks(), p.block_rows() * call.row_work(),
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(topk_attention_fwd_kernel, p, begin, end, call.work()); });
  return found;
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
Gradients backward(const at::Tensor& grad, const TopkArguments& a, const TopkSaved& saved, std::array<bool, 4> mask) {
  const auto zeros = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  at::Tensor dq = zeros(mask[0], a.q), dk = zeros(mask[1], a.k), dv = zeros(mask[2], a.v);
  at::Tensor dmask = zeros(mask[3], a.mask ? *a.mask : a.q);
  if (a.empty()) return {dq, dk, dv, dmask};
  Call<T> call(a);
  auto& p = call.p;
  call.pack(a.q, true, mask[0]);
  // Rows hold four dimensions; with several thresholds a strided gradient is copied.
  const at::Tensor g = p.thresholds == 1 ? grad.squeeze(1) : grad.contiguous();
  p.grad = p.thresholds == 1 ? token_rows(g) : plain_rows(g);
  const at::Tensor result = saved.out.contiguous(), m = saved.top.contiguous(), s = saved.total.contiguous();
  const at::Tensor t = saved.tau.contiguous(), c = saved.cut.contiguous(), full = saved.average.contiguous();
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

TopkOutputs topk_attention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& mask,
                               at::IntArrayRef topk, bool causal, std::optional<double> scale, bool straight_through) {
  const TopkArguments a{q, k, v, mask, topk, causal, scale, straight_through};
  a.check();
  return a.is_double() ? forward<double>(a) : forward<float>(a);
}

Gradients topk_attention_bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const Optional& mask, at::IntArrayRef topk, bool causal, std::optional<double> scale,
                             bool straight_through, const at::Tensor& out, const at::Tensor& top,
                             const at::Tensor& total, const at::Tensor& tau, const at::Tensor& cut,
                             const at::Tensor& average, std::array<bool, 4> wanted) {
  const TopkArguments a{q, k, v, mask, topk, causal, scale, straight_through};
  const TopkSaved saved{out, top, total, tau, cut, average};
  a.check();
  a.check_backward(grad, saved);
  wanted[3] = wanted[3] && a.float_mask();
  return a.is_double() ? backward<double>(grad, a, saved, wanted) : backward<float>(grad, a, saved, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("topk_attention_fwd", &topk_attention_fwd);
  m.impl("topk_attention_bwd", &topk_attention_bwd);
}

}  // namespace pyml
