// clip_sum on a CPU: allocation, threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/cpu_isa.h"
#include "hetero_noise/clip_sum_op.h"

namespace pyml {
namespace {

// Samples are taken a few at a time, so that their weighted sum finds in the cache what their norms have read. The sums
// are the same for any number of them.
constexpr int64_t kCacheBytes = 8 << 20;

// min(1, limit / norm); a norm of 0 has nothing to shrink.
double shrink(double limit, double norm) { return norm > limit ? limit / norm : 1; }

class Call {
 public:
  explicit Call(const ClipArguments& a) : a_(a), tensors_(a.grads.size()), groups_(int64_t(a.clip.size())) {
    int64_t bytes = 0, blocks = 0;
    bool wide = false;
    for (size_t n = 0; n < tensors_.size(); ++n) {
      const at::Tensor& g = a.grads[n];
      ClipTensor& t = tensors_[n];
      Joined joined(g.sizes().slice(1));
      joined.add(g, &t.grad, 1);
      if (a.whitened()) tell_scale(a.scales.scale_of(n), a.scales.columns_of(n), joined, &t.scale);
      joined.into(kClipOp, t);
      t.batch_stride = g.stride(0);
      t.group = a.group(n);
      t.wide = any_double(g);
      wide |= t.wide;
      t.begin = blocks;
      blocks += t.blocks();
      bytes += t.count * g.element_size();
      sums.push_back(at::zeros(g.sizes().slice(1), g.options().dtype(t.wide ? at::kDouble : at::kFloat)));
      t.sum = sums.back().mutable_data_ptr();
    }
    p_.tensors = tensors_.data();
    p_.tensor_count = int64_t(tensors_.size());
    p_.blocks = blocks;
    p_.groups = int(groups_);
    at_once_ = std::min(a.samples(), std::max<int64_t>(8, kCacheBytes / std::max<int64_t>(bytes, 1) / 8 * 8));
    squares_.resize(size_t(at_once_ * blocks));
    factors_.resize(size_t(at_once_ * groups_));
    norms = at::empty({a.samples(), groups_}, a.grads[0].options().dtype(wide ? at::kDouble : at::kFloat));
    norms64_ = at::zeros({a.samples(), groups_}, norms.options().dtype(at::kDouble));
  }

  void run() {
    int64_t broken = 0;
    p_.squares = squares_.data();
    p_.factors = factors_.data();
    for (p_.first = 0; p_.first < a_.samples(); p_.first += at_once_) {
      p_.samples = std::min(at_once_, a_.samples() - p_.first);
      p_.last = p_.first + p_.samples == a_.samples();
      over_blocks(
          [&](int64_t begin, int64_t end, double* memory) { PYML_CALL_ISA(clip_norm_kernel, p_, begin, end, memory); });
      for (int64_t b = 0; b < p_.samples; ++b) broken += !weigh(b);
      over_blocks(
          [&](int64_t begin, int64_t end, double* memory) { PYML_CALL_ISA(clip_sum_kernel, p_, begin, end, memory); });
    }
    norms.copy_(norms64_);
    bad = at::scalar_tensor(broken, norms.options().dtype(at::kLong));
  }

  std::vector<at::Tensor> sums;
  at::Tensor norms, bad;

 private:
  template <class Kernel>
  void over_blocks(const Kernel& kernel) {
    parallel(p_.blocks, p_.samples * kClipBlock / 16,
             [&](int64_t begin, int64_t end) { kernel(begin, end, scratch<double>(kClipScratch)); });
  }

  // The factors of one sample from its squares, or false where it is bad.
  bool weigh(int64_t b) {
    double* norm = norms64_.mutable_data_ptr<double>() + (p_.first + b) * groups_;
    double* factor = factors_.data() + b * groups_;
    for (const ClipTensor& t : tensors_)
      for (int64_t k = t.begin; k < t.begin + t.blocks(); ++k) norm[t.group] += squares_[size_t(b * p_.blocks + k)];
    double whole = 0;
    bool good = true;
    for (int64_t k = 0; k < groups_; ++k) {
      norm[k] = std::sqrt(norm[k]);
      if (!std::isfinite(norm[k])) good = false, norm[k] = std::numeric_limits<double>::infinity();
      factor[k] = shrink(a_.clip[size_t(k)], norm[k]);
      whole += factor[k] * norm[k] * factor[k] * norm[k];
    }
    const double all = a_.global_clip ? shrink(*a_.global_clip, std::sqrt(whole)) : 1;
    for (int64_t k = 0; k < groups_; ++k) factor[k] = good ? factor[k] * all : -1;
    return good;
  }

  const ClipArguments& a_;
  ClipParams p_{};
  std::vector<ClipTensor> tensors_;
  std::vector<double> squares_, factors_;
  at::Tensor norms64_;
  int64_t groups_, at_once_ = 1;
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) { m.impl("clip_sum_fwd", &clip_sum<Call>); }

}  // namespace pyml
