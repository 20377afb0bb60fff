// The op `topk_attention` on CUDA: allocation, launches. Kernels: topk_attention_token_*_cuda.cu; checks and saved
// tensors are those of the CPU.
#include "topk_attention/topk_attention_token_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/cpu.h"
#include "common/cuda_parts.h"
#include "common/gradients.h"
#include "topk_attention/topk_attention_arguments.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// One op call: its tensors as the kernels want them. q, k, v and grad keep a dtype that they share, else they become
// float32 or float64; all are read by their strides. What is converted lives here until the launch.
struct TokenCall : CudaParts<TokenCuda> {
  const TopkArguments& a;
  at::ScalarType io;
  std::vector<at::Tensor> kept;

  explicit TokenCall(const TopkArguments& a) : CudaParts(a.kOp, a.q, a.wide()), a(a), io(a.wide()) {
    const auto type = a.q.scalar_type();
    if (io == at::kFloat && type == a.k.scalar_type() && type == a.v.scalar_type()) io = type;
    p.batch = a.q.size(0), p.heads = a.q.size(1), p.shared = p.heads / a.k.size(1);
    p.queries = a.q.size(2), p.keys = a.k.size(2), p.depth = a.q.size(3), p.value_depth = a.v.size(3);
    p.thresholds = a.thresholds(), p.softmaxes = a.softmaxes();
    p.causal = a.causal;
    p.scale = a.factor();
    p.q = take(a.q, p.q_stride), p.k = take(a.k, p.k_stride), p.v = take(a.v, p.v_stride);
    p.dtype = int64_t(dtype_of(kept.front()));
    if (!a.mask) return;
    p.mask_kind = a.float_mask() ? 2 : 1;
    p.mask_dtype = int64_t(dtype_of(*a.mask));
    p.mask = a.mask->const_data_ptr();
    for (int d = 0; d < 4; ++d) {
      p.mask_size[d] = a.mask->size(d);
      p.mask_stride[d] = p.mask_size[d] == 1 ? 0 : a.mask->stride(d);
    }
  }

  // The tensor in the dtype of the kernels.
  template <size_t N>
  const void* take(const at::Tensor& t, int64_t (&stride)[N]) {
    kept.push_back(t.to(io));
    for (size_t d = 0; d < N; ++d) stride[d] = kept.back().stride(int64_t(d));
    return kept.back().const_data_ptr();
  }
  // What the forward saved, as it was then.
  void* dense(const at::Tensor& t) {
    kept.push_back(t.contiguous());
    return const_cast<void*>(kept.back().const_data_ptr());
  }
  at::Tensor wide(at::IntArrayRef shape) const { return at::empty(shape, sums); }
};

TopkOutputs topk_attention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& mask,
                               at::IntArrayRef topk, bool causal, std::optional<double> scale, bool straight_through) {
  const TopkArguments a{q, k, v, mask, topk, causal, scale, straight_through};
  a.check();
  TopkOutputs found = a.outputs();
  if (a.empty()) return found;
  TokenCall call(a);
  auto& p = call.p;
  at::Tensor& out = std::get<0>(found);
  if (call.io != q.scalar_type()) out = out.to(call.io);
  p.out = out.mutable_data_ptr();
  p.top = std::get<1>(found).mutable_data_ptr();
  p.total = std::get<2>(found).mutable_data_ptr();
  p.tau = std::get<3>(found).mutable_data_ptr();
  p.cut = std::get<4>(found).mutable_data_ptr<int32_t>();
  p.average = a.keeps_average() ? std::get<5>(found).mutable_data_ptr() : nullptr;
  for (p.first = 0; p.first < p.softmaxes; p.first += kTokenWants) {
    p.count = std::min<int64_t>(kTokenWants, p.softmaxes - p.first);
    for (int64_t i = 0; i < p.count; ++i)
      p.want[i] = p.first + i < p.thresholds ? std::min(p.keys, topk[p.first + i]) : p.keys;
    call.run(token_cuda_fwd);
  }
  out = out.to(q.scalar_type());
  return found;
}

Gradients topk_attention_bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const Optional& mask, at::IntArrayRef topk, bool causal, std::optional<double> scale,
                             bool straight_through, const at::Tensor& out, const at::Tensor& top,
                             const at::Tensor& total, const at::Tensor& tau, const at::Tensor& cut,
                             const at::Tensor& average, std::array<bool, 4> wanted) {
  const TopkArguments a{q, k, v, mask, topk, causal, scale, straight_through};
  a.check();
  a.check_backward(grad, {out, top, total, tau, cut, average});
  wanted[3] = wanted[3] && a.float_mask();
  const at::Tensor& like = mask ? *mask : q;
  if (a.empty()) return zero_gradients(wanted, q, k, v, like);
  TokenCall call(a);
  auto& p = call.p;
  p.grad = call.take(grad, p.grad_stride);
  p.top = call.dense(top), p.total = call.dense(total), p.tau = call.dense(tau);
  p.cut = static_cast<int32_t*>(call.dense(cut));
  p.result = call.dense(average.numel() > 0 ? average : out);
  const at::Tensor delta = call.wide({p.batch, p.thresholds, p.heads, p.queries});
  p.delta = delta.mutable_data_ptr();
  call.run(token_cuda_delta);
  Gradients found{no_gradient(q), no_gradient(k), no_gradient(v), no_gradient(like)};
  if (wanted[0]) {
    const at::Tensor dq = at::empty(q.sizes(), q.options().dtype(call.io));
    p.dq = dq.mutable_data_ptr();
    call.run(token_cuda_bwd_q);
    std::get<0>(found) = dq.to(q.scalar_type());
  }
  if (wanted[1] || wanted[2]) {
    call.split(token_cuda_keys_split);
    at::Tensor part_k, part_v;
    if (wanted[1]) p.part_k = (part_k = call.parts(k)).mutable_data_ptr();
    if (wanted[2]) p.part_v = (part_v = call.parts(v)).mutable_data_ptr();
    call.run(token_cuda_bwd_keys);
    if (wanted[1]) std::get<1>(found) = call.total(part_k, k);
    if (wanted[2]) std::get<2>(found) = call.total(part_v, v);
  }
  if (wanted[3]) {
    call.split(token_cuda_mask_split);
    const at::Tensor part = call.parts(like);
    p.part_mask = part.mutable_data_ptr();
    call.run(token_cuda_bwd_mask);
    std::get<3>(found) = call.total(part, like);
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("topk_attention_fwd", &topk_attention_fwd);
  m.impl("topk_attention_bwd", &topk_attention_bwd);
}

}  // namespace pyml
