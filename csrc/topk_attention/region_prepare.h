// Torch side of region_attention, shared by the CPU and CUDA: argument checks, what the kernels are told, outputs.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/gradients.h"
#include "topk_attention/topk_attention.h"
#include "topk_attention/topk_attention_host.h"

namespace pyml {

struct RegionArguments {
  static constexpr const char* op = "region_attention";
  using Optional = std::optional<at::Tensor>;

  at::Tensor q, k, v, index;
  std::optional<double> scale;
  Optional counts, key_mask, region_weight;

  // All but the numbers in index and counts.
  void check() const {
    check_five(op, q, k);
    check_float(op, "v", v, q.device());
    PYML_CHECK(v.dim() == 5 && v.sizes().slice(0, 4) == k.sizes().slice(0, 4), op, "v",
               c10::str("shape ", k.sizes().slice(0, 4), " and Dv"), v.sizes());
    check_per_region("index", index, at::kLong, index.dim() == 4 ? index.size(3) : 0, true);
    PYML_CHECK(!scale || std::isfinite(*scale), op, "scale", "a finite number or None", *scale);
    if (counts) check_per_region("counts", *counts, at::kLong, 0, false);
    if (key_mask) check_mask(op, "key_mask", *key_mask, k);
    if (region_weight) {
      check_float(op, "region_weight", *region_weight, q.device());
      check_per_region("region_weight", *region_weight, region_weight->scalar_type(), index.size(3), true);
    }
  }

  // What a backward gets beside them.
  void check_backward(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& lse,
                      const at::Tensor& exact) const {
    check_float(op, "grad", grad, q.device());
    check_shape(op, "grad", grad, out_shape());
    check_float(op, "out", out, q.device());
    check_shape(op, "out", out, out_shape());
    for (const auto& [name, t] : {std::pair{"grad", grad}, {"out", out}})
      PYML_CHECK(t.scalar_type() == q.scalar_type(), op, name, q.scalar_type(), t.scalar_type());
    for (const auto& [name, t, type] : {std::tuple{"lse", lse, at::kDouble}, {"exact", exact, wide()}})
      PYML_CHECK(t.scalar_type() == type && t.device() == q.device(), op, name, "the one that the forward gave",
                 t.options());
    check_shape(op, "lse", lse, q.sizes().slice(0, 4));
    check_shape(op, "exact", exact, exact_shape());
  }

  // [B, 1 or H, P, K] or, without `last`, [B, 1 or H, P]
  void check_per_region(const char* name, const at::Tensor& t, at::ScalarType type, int64_t slots, bool last) const {
    PYML_CHECK(t.scalar_type() == type, op, name, type, t.scalar_type());
    PYML_CHECK(t.device() == q.device(), op, name, c10::str("a tensor on ", q.device()), t.device());
    const bool good = t.dim() == (last ? 4 : 3) && t.size(0) == q.size(0) &&
                      (t.size(1) == 1 || t.size(1) == q.size(1)) && t.size(2) == q.size(2) &&
                      (!last || t.size(3) == slots);
    PYML_CHECK(good, op, name, c10::str("shape [B, 1 or H, P", last ? ", K]" : "]"), t.sizes());
  }

  at::ScalarType wide() const {
    return any_double(q, k, v, region_weight ? *region_weight : at::Tensor()) ? at::kDouble : at::kFloat;
  }
  std::vector<int64_t> out_shape() const { return {q.size(0), q.size(1), q.size(2), q.size(3), v.size(4)}; }
  // Whether the output has fewer bits than its computation: then the backward gets it unrounded too, since the gradient
  // of the logits is a difference of two numbers of its size.
  bool rounded() const { return q.scalar_type() != wide(); }
  std::vector<int64_t> exact_shape() const { return rounded() ? out_shape() : std::vector<int64_t>{q.size(0), 0}; }
  // Without them, outputs and gradients are zeros.
  bool has_work() const {
    const int64_t outputs = q.size(0) * q.size(1) * q.size(2) * q.size(3) * v.size(4), keys = k.size(2) * k.size(3);
    return outputs > 0 && keys > 0;
  }
};

// lse is always double: P = exp(logit - lse), so rounding lse to float would cost as many bits as the logits are
// large.
struct RegionOutputs {
  at::Tensor out, lse, exact, status;

  explicit RegionOutputs(const RegionArguments& a)
      : out(at::empty(a.out_shape(), a.q.options())),
        lse(at::empty(a.q.sizes().slice(0, 4), a.q.options().dtype(at::kDouble))),
        exact(at::empty(a.exact_shape(), a.q.options().dtype(a.wide()))),
        status(at::zeros({1}, a.q.options().dtype(at::kInt))) {}
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> done() const { return {out, lse, exact, status}; }
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> zeros() const {
    out.zero_(), exact.zero_(), lse.fill_(std::numeric_limits<double>::infinity());
    return done();
  }
};

// What forward and backward tell the kernels, and the tensors it points into.
template <class T>
struct RegionCall {
  RegionParams<T> c{};
  at::Tensor index, counts, weight;

  explicit RegionCall(const RegionArguments& a) {
    c.batch = a.q.size(0), c.heads = a.q.size(1), c.query_regions = a.q.size(2), c.queries = a.q.size(3);
    c.features = a.q.size(4), c.key_regions = a.k.size(2), c.keys = a.k.size(3), c.value_features = a.v.size(4);
    c.slots = a.index.size(3);
    c.q = regions_of(a.q), c.k = regions_of(a.k), c.v = regions_of(a.v);
    index = a.index.contiguous();
    c.index = index.const_data_ptr<int64_t>();
    c.index_heads = index.size(1);
    if (a.counts) {
      counts = a.counts->contiguous();
      c.counts = counts.const_data_ptr<int64_t>();
      c.count_heads = counts.size(1);
    }
    if (a.region_weight) {
      weight = a.region_weight->to(c10::CppTypeToScalarType<T>::value).contiguous();
      c.weight = weight.template const_data_ptr<T>();
      c.weight_heads = weight.size(1);
    }
    c.scale = T(a.scale ? *a.scale : 1 / std::sqrt(double(std::max<int64_t>(1, c.features))));
  }
};

// A gradient of `like` that a kernel will write, seen through `to`; empty when nobody wants it.
inline at::Tensor region_gradient(bool wanted, const at::Tensor& like, Regions& to) {
  const at::Tensor t = wanted ? at::empty(like.sizes(), like.options()) : no_gradient(like);
  if (wanted) to = regions_of(t);
  return t;
}

// The gradient of region_weight from what every head found, [B, H, P, K].
inline at::Tensor region_weight_gradient(const at::Tensor& found, const at::Tensor& weight) {
  at::Tensor sum = found;
  if (weight.size(1) != found.size(1)) {  // in the order of the heads
    sum = found.select(1, 0).clone();
    for (int64_t h = 1; h < found.size(1); ++h) sum.add_(found.select(1, h));
    sum = sum.unsqueeze(1);
  }
  return sum.to(weight.scalar_type());
}

inline auto region_zero_gradients(const std::array<bool, 4>& mask, const RegionArguments& a) {
  return zero_gradients(mask, a.q, a.k, a.v, a.region_weight ? *a.region_weight : a.q);
}

// The two ops as backend B runs them. B::check_numbers reads index and counts where kernels cannot guard against them;
// B::forward<T> and B::backward<T> compute in T.
template <class B>
struct RegionOp {
  using Optional = std::optional<at::Tensor>;
  using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static Four fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& index,
                  std::optional<double> scale, const Optional& counts, const Optional& key_mask,
                  const Optional& region_weight) {
    const RegionArguments a{q, k, v, index, scale, counts, key_mask, region_weight};
    a.check();
    B::check_numbers(a);
    const RegionOutputs made(a);
    if (!a.has_work()) return made.zeros();
    return in_compute_type(a.wide() == at::kDouble,
                           [&](auto tag) { return B::template forward<decltype(tag)>(a, made); });
  }

  static Four bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& index, std::optional<double> scale, const Optional& counts,
                  const Optional& key_mask, const Optional& region_weight, const at::Tensor& out, const at::Tensor& lse,
                  const at::Tensor& exact, std::array<bool, 4> mask) {
    const RegionArguments a{q, k, v, index, scale, counts, key_mask, region_weight};
    a.check();
    B::check_numbers(a);
    a.check_backward(grad, out, lse, exact);
    mask[3] = mask[3] && region_weight.has_value();
    if (!a.has_work()) return region_zero_gradients(mask, a);
    const at::Tensor& unrounded = a.rounded() ? exact : out;
    return in_compute_type(a.wide() == at::kDouble, [&](auto tag) {
      return B::template backward<decltype(tag)>(grad, a, unrounded, lse, mask);
    });
  }
};

}  // namespace pyml
