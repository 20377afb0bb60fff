// The arguments of the op `topk_attention` as every torch side of it sees them: checks, sizes, what a forward returns.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"

namespace pyml {

using TopkOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What a forward leaves to the backward.
struct TopkSaved {
  const at::Tensor &out, &top, &total, &tau, &cut, &average;
};

// The arguments of forward and backward alike.
struct TopkArguments {
  static constexpr const char* kOp = "topk_attention";

  const at::Tensor &q, &k, &v;
  const std::optional<at::Tensor>& mask;
  at::IntArrayRef topk;
  bool causal;
  std::optional<double> scale;
  bool straight_through;

  bool float_mask() const { return mask && mask->scalar_type() != at::kBool; }
  bool is_double() const { return any_double(q, k, v, float_mask() ? *mask : at::Tensor()); }
  at::ScalarType wide() const { return is_double() ? at::kDouble : at::kFloat; }
  double factor() const { return scale ? *scale : 1 / std::sqrt(double(std::max<int64_t>(1, q.size(3)))); }
  int64_t thresholds() const { return int64_t(topk.size()); }
  int64_t softmaxes() const { return thresholds() + (straight_through ? 1 : 0); }
  std::vector<int64_t> rows(int64_t count) const { return {q.size(0), count, q.size(1), q.size(2)}; }
  std::vector<int64_t> out_shape() const { return {q.size(0), thresholds(), q.size(1), q.size(2), v.size(3)}; }
  bool empty() const { return q.size(0) * q.size(1) * q.size(2) == 0 || k.size(2) == 0; }

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
    PYML_CHECK(k.size(2) < (int64_t(1) << 31) - 128, kOp, "k", "fewer than 2^31 - 128 keys", k.size(2));
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

  void check_backward(const at::Tensor& grad, const TopkSaved& saved) const {
    check_float(kOp, "grad", grad, q.device());
    check_shape(kOp, "grad", grad, out_shape());
    check_shape(kOp, "out", saved.out, out_shape());
    PYML_CHECK(saved.out.scalar_type() == q.scalar_type(), kOp, "out", q.scalar_type(), saved.out.scalar_type());
    for (const auto& [name, t] :
         {std::pair{"top", saved.top}, {"total", saved.total}, {"tau", saved.tau}, {"cut", saved.cut}}) {
      check_shape(kOp, name, t, rows(softmaxes()));
      PYML_CHECK(t.scalar_type() == (t.is_same(saved.cut) ? at::kInt : wide()), kOp, name, "the dtype of the forward",
                 t.scalar_type());
      PYML_CHECK(t.device() == q.device(), kOp, name, c10::str("a tensor on ", q.device()), t.device());
    }
    const at::Tensor& average = saved.average;
    PYML_CHECK(average.scalar_type() == wide(), kOp, "average", "the dtype of the forward", average.scalar_type());
    if (average.numel() > 0) check_shape(kOp, "average", average, out_shape());
    PYML_CHECK(average.numel() > 0 || !keeps_average() || saved.out.numel() == 0, kOp, "average",
               "what the forward saved", average.sizes());
  }

  // Whether `average` is saved: `out` has fewer bits, or is not the output of the softmax that passes the gradient on.
  bool keeps_average() const { return straight_through || q.scalar_type() != wide(); }

  // out, top, total, tau, cut, average: zeros.
  TopkOutputs outputs() const {
    const auto sums = q.options().dtype(wide());
    const auto zeros = [&] { return at::zeros(rows(softmaxes()), sums); };
    const at::Tensor average = at::zeros(keeps_average() ? out_shape() : std::vector<int64_t>{q.size(0), 0}, sums);
    const at::Tensor out = at::zeros(out_shape(), q.options()), top = zeros(), total = zeros(), tau = zeros();
    return {out, top, total, tau, at::zeros(rows(softmaxes()), sums.dtype(at::kInt)), average};
  }
};

}  // namespace pyml
