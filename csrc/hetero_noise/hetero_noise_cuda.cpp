// The noise ops on CUDA: tables of tensors, launches. Kernels: noise_step_cuda.cu, clip_sum_cuda.cu.
#include "hetero_noise/hetero_noise_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/cuda_host.h"
#include "hetero_noise/clip_sum_op.h"
#include "hetero_noise/hetero_noise_op.h"

namespace pyml {
namespace {

// A tensor where it lies, or a copy without gaps, which `kept` holds.
Flat flat(const at::Tensor& t, std::vector<at::Tensor>& kept) {
  kept.push_back(t.contiguous());
  return {const_cast<void*>(kept.back().const_data_ptr()), dtype_of(t)};
}

FlatScale flat_scale(const at::Tensor& scale, const at::Tensor& columns, std::vector<at::Tensor>& kept) {
  FlatScale found;
  found.kind = ScaleKind::kElements;
  found.one = scale.dim() == 0;
  found.elements = flat(scale, kept);
  if (columns.defined() && columns.dim() > 0) {
    found.kind = ScaleKind::kFactors;
    found.column = flat(columns, kept);
    found.columns = std::max<int64_t>(1, columns.numel());
  }
  return found;
}

class CudaNoise {
 public:
  CudaNoise(const NoiseArguments& a, NoiseMode mode, double factor, size_t) : op_(a.op), device_(a.key) {
    p_.mode = mode;
    kept_.push_back(a.key.contiguous());
    p_.key = kept_.back().const_data_ptr<int64_t>();
    p_.step = uint32_t(a.step);
    p_.std = a.std;
    p_.factor = factor;
  }
  void add(size_t, const at::Tensor& in, const at::Tensor& out, const at::Tensor& base, const at::Tensor& scale,
           const at::Tensor& columns, uint32_t id, int64_t first) {
    if (out.numel() == 0) return;
    NoiseCudaTensor t{};
    t.in = flat(in, kept_);
    t.out = flat(out, kept_);
    if (!out.is_contiguous()) written_.emplace_back(out, kept_.back());
    if (base.defined()) t.base = flat(base, kept_);
    t.scale = flat_scale(scale, columns, kept_);
    t.count = out.numel();
    t.first = first;
    t.id = id;
    bool plain = t.scale.kind != ScaleKind::kFactors && t.first % 4 == 0;
    for (const Flat* f : {&t.in, &t.out, &t.base, &t.scale.elements})
      plain = plain && f->dtype == DType::kFloat && reinterpret_cast<uintptr_t>(f->data) % 16 == 0;
    const NoiseTypes types = any_double(in, base) ? NoiseTypes::kDoubles
                             : plain              ? NoiseTypes::kFloats
                                                  : NoiseTypes::kMixed;
    tensors_[size_t(types)].push_back(t);
  }
  void run() {
    for (int types = 0; types < kNoiseTypes; ++types) launch_all(tensors_[types], NoiseTypes(types));
    for (const auto& [to, from] : written_) to.copy_(from);
  }
  static at::Tensor sums(const at::Tensor& matrix, const at::Tensor& weights, int64_t dim) {
    const at::Tensor by = weights.to(at::kDouble);
    return matrix.to(at::kDouble).mul(dim == 0 ? by.unsqueeze(1) : by).sum(dim);
  }

 private:
  void launch_all(const std::vector<NoiseCudaTensor>& tensors, NoiseTypes types) {
    for (size_t from = 0; from < tensors.size(); from += kNoiseTable) {
      p_.count = int(std::min<size_t>(kNoiseTable, tensors.size() - from));
      p_.blocks = 0;
      for (int n = 0; n < p_.count; ++n) {
        NoiseCudaTensor& t = p_.tensors[n] = tensors[from + size_t(n)];
        t.begin = p_.blocks;
        p_.blocks += (t.first + t.count - 1) / kPhiloxBlock - t.first / kPhiloxBlock + 1;
      }
      check_cuda(op_, pyml_cuda_hetero_noise(&p_, types, device_.stream()));
    }
  }

  const char* op_;
  OnDevice device_;
  NoiseCuda p_{};
  std::vector<NoiseCudaTensor> tensors_[kNoiseTypes];
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;  // copies to bring home
};

// Norms of every sample, factors made of them by a few torch ops on the GPU, sums.
class CudaClip {
 public:
  explicit CudaClip(const ClipArguments& a) : a_(a), device_(a.grads[0]) {
    const auto doubles = a.grads[0].options().dtype(at::kDouble);
    int64_t blocks = 0;
    bool wide = false;
    for (size_t n = 0; n < a.grads.size(); ++n) {
      const at::Tensor& g = a.grads[n];
      ClipCudaTensor t{};
      // Samples without gaps, at any distance from each other.
      const bool rows = g.numel() == 0 || g[0].is_contiguous();
      kept_.push_back(rows ? g : g.contiguous());
      t.grad = {const_cast<void*>(kept_.back().const_data_ptr()), dtype_of(g)};
      t.batch_stride = kept_.back().stride(0);
      if (a.whitened()) t.scale = flat_scale(a.scales.scale_of(n), a.scales.columns_of(n), kept_);
      t.group = a.group(n);
      t.count = c10::multiply_integers(g.sizes().slice(1));
      t.begin = blocks;
      begins_.push_back(blocks);
      blocks += (t.count + kClipBlock - 1) / kClipBlock;
      const bool own_wide = any_double(g);
      wide |= own_wide;
      sums.push_back(at::zeros(g.sizes().slice(1), g.options().dtype(own_wide ? at::kDouble : at::kFloat)));
      t.sum = {sums.back().mutable_data_ptr(), dtype_of(sums.back())};
      if (t.count > 0) tensors_.push_back(t);
    }
    begins_.push_back(blocks);
    p_.samples = a.samples();
    p_.blocks = blocks;
    p_.groups = int(a.clip.size());
    norms = at::empty({a.samples(), int64_t(a.clip.size())}, doubles.dtype(wide ? at::kDouble : at::kFloat));
    squares_ = at::zeros({a.samples(), blocks}, doubles);
    p_.squares = squares_.mutable_data_ptr<double>();
  }

  void run() {
    by_table([&] { check_cuda(kClipOp, pyml_cuda_clip_norm(&p_, device_.stream())); });
    const at::Tensor wide = at::zeros(norms.sizes(), squares_.options());
    for (size_t n = 0; n < a_.grads.size(); ++n)
      wide.select(1, a_.group(n)).add_(squares_.narrow(1, begins_[n], begins_[n + 1] - begins_[n]).sum(1));
    wide.sqrt_().nan_to_num_(INFINITY, INFINITY);
    norms.copy_(wide);
    const at::Tensor broken = wide.isfinite().all(1).logical_not();
    at::Tensor limits = at::empty({int64_t(a_.clip.size())}, wide.options().device(at::kCPU));
    std::copy(a_.clip.begin(), a_.clip.end(), limits.mutable_data_ptr<double>());
    limits = limits.to(wide.device());
    // min(1, limit / norm); 0 / 0 has nothing to shrink.
    const auto shrink = [](const at::Tensor& ratio) { return ratio.clamp_max(1).nan_to_num(1); };
    at::Tensor factors = shrink(limits.div(wide));
    if (a_.global_clip) {
      const at::Tensor whole = factors.mul(wide).nan_to_num().square().sum(1, true).sqrt();
      factors = factors.mul(shrink(whole.reciprocal().mul(*a_.global_clip)));
    }
    factors = factors.masked_fill(broken.unsqueeze(1), -1).contiguous();
    p_.factors = factors.const_data_ptr<double>();
    by_table([&] { check_cuda(kClipOp, pyml_cuda_clip_sum(&p_, device_.stream())); });
    bad = broken.sum();
  }

  std::vector<at::Tensor> sums;
  at::Tensor norms, bad;

 private:
  template <class F>
  void by_table(const F& f) {
    for (size_t from = 0; from < tensors_.size(); from += kNoiseTable) {
      p_.count = int(std::min<size_t>(kNoiseTable, tensors_.size() - from));
      std::copy_n(tensors_.begin() + int64_t(from), p_.count, p_.tensors);
      const ClipCudaTensor& last = p_.tensors[p_.count - 1];
      p_.first_block = p_.tensors[0].begin;
      p_.table_blocks = last.begin + (last.count + kClipBlock - 1) / kClipBlock - p_.first_block;
      f();
    }
  }

  const ClipArguments& a_;
  OnDevice device_;
  ClipCuda p_{};
  std::vector<ClipCudaTensor> tensors_;
  std::vector<int64_t> begins_;
  std::vector<at::Tensor> kept_;
  at::Tensor squares_;
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  NoiseOp<CudaNoise>::implement(m);
  m.impl("clip_sum_fwd", &clip_sum<CudaClip>);
}

}  // namespace pyml
