// region_attention on a CPU: checks, allocation, threads.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/topk_attention.h"
#include "topk_attention/topk_attention_host.h"

#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cmath>

namespace pyml {
namespace {

constexpr const char* kOp = "region_attention";
constexpr double kLog2e = 1.4426950408889634074;
using Optional = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Arguments {
  at::Tensor q, k, v, index;
  std::optional<double> scale;
  Optional counts, key_mask, region_weight;

  void check() const {
    check_five(kOp, q, k);
    check_float(kOp, "v", v, q.device());
    PYML_CHECK(v.dim() == 5 && v.sizes().slice(0, 4) == k.sizes().slice(0, 4), kOp, "v",
               c10::str("shape ", k.sizes().slice(0, 4), " and Dv"), v.sizes());
    check_per_region("index", index, at::kLong, index.dim() == 4 ? index.size(3) : 0, true);
    PYML_CHECK(!scale || std::isfinite(*scale), kOp, "scale", "a finite number or None", *scale);
    if (counts) check_per_region("counts", *counts, at::kLong, 0, false);
    if (key_mask) check_mask(kOp, "key_mask", *key_mask, k);
    if (region_weight) {
      check_float(kOp, "region_weight", *region_weight, q.device());
      check_per_region("region_weight", *region_weight, region_weight->scalar_type(), index.size(3), true);
    }
    check_numbers();
  }

  // [B, 1 or H, P, K] or, without `last`, [B, 1 or H, P]
  void check_per_region(const char* name, const at::Tensor& t, at::ScalarType type, int64_t slots, bool last) const {
    PYML_CHECK(t.scalar_type() == type, kOp, name, type, t.scalar_type());
    PYML_CHECK(t.device() == q.device(), kOp, name, c10::str("a tensor on ", q.device()), t.device());
    const bool good = t.dim() == (last ? 4 : 3) && t.size(0) == q.size(0) &&
                      (t.size(1) == 1 || t.size(1) == q.size(1)) && t.size(2) == q.size(2) &&
                      (!last || t.size(3) == slots);
    PYML_CHECK(good, kOp, name, c10::str("shape [B, 1 or H, P", last ? ", K]" : "]"), t.sizes());
  }

  // Before anything is read through them.
  void check_numbers() const {
    const at::Tensor chosen = index.contiguous(), used = counts ? counts->contiguous() : at::Tensor();
    const int64_t *ids = chosen.const_data_ptr<int64_t>(), *count = counts ? used.const_data_ptr<int64_t>() : nullptr;
    const int64_t slots = index.size(3), P = index.size(2), regions = k.size(2);
    for (int64_t i = 0; count && i < used.numel(); ++i)
      PYML_CHECK(count[i] >= 0 && count[i] <= slots, kOp, "counts", c10::str("numbers from 0 to K = ", slots),
                 count[i]);
    const int64_t heads = std::max(index.size(1), counts ? counts->size(1) : 1);
    for (int64_t b = 0; b < index.size(0); ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t p = 0; p < P; ++p) {
          const int64_t* row = ids + ((b * index.size(1) + (index.size(1) > 1 ? h : 0)) * P + p) * slots;
          const int64_t n = count ? count[(b * used.size(1) + (used.size(1) > 1 ? h : 0)) * P + p] : slots;
          for (int64_t j = 0; j < n; ++j)
            PYML_CHECK(row[j] >= -1 && row[j] < regions, kOp, "index",
                       c10::str("regions from 0 to ", regions - 1, " or -1 for none"), row[j]);
        }
  }

  at::Tensor weight_or_undefined() const { return region_weight ? *region_weight : at::Tensor(); }
  bool wide() const { return any_double(q, k, v, weight_or_undefined()); }
  std::vector<int64_t> out_shape() const { return {q.size(0), q.size(1), q.size(2), q.size(3), v.size(4)}; }
  // Whether the output has fewer bits than its computation: then the backward gets it unrounded too, since the gradient
  // of the logits is a difference of two numbers of its size.
  bool rounded() const { return q.scalar_type() != (wide() ? at::kDouble : at::kFloat); }
  std::vector<int64_t> exact_shape() const { return rounded() ? out_shape() : std::vector<int64_t>{q.size(0), 0}; }
  bool no_keys() const { return k.size(2) * k.size(3) == 0; }
};

// What forward and backward share: the parameters, and the tensors they point into.
template <class T>
struct Call {
  RegionParams<T> c{};
  at::Tensor index, counts, weight, mask;
  std::vector<int32_t> valid, valid_count;

  explicit Call(const Arguments& a) {
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
    const double scale = a.scale ? *a.scale : 1 / std::sqrt(double(std::max<int64_t>(1, c.features)));
    c.grad_scale = T(scale);
    c.scale = T(scale * kLog2e);
    if (a.key_mask) list_valid(*a.key_mask);
  }

  void list_valid(const at::Tensor& key_mask) {
    mask = key_mask.contiguous();
    const bool* keep = mask.const_data_ptr<bool>();
    valid.assign(mask.numel(), 0);
    valid_count.assign(c.batch * c.key_regions, 0);
    for (int64_t r = 0; r < c.batch * c.key_regions; ++r)
      for (int64_t t = 0; t < c.keys; ++t)
        if (keep[r * c.keys + t]) valid[r * c.keys + valid_count[r]++] = int32_t(t);
    c.valid = valid.data();
    c.valid_count = valid_count.data();
  }

  int64_t key_regions() const { return c.group() * c.key_regions; }
  // About the vector operations between one query region and the keys it chose.
  int64_t pair_work() const { return c.slots * c.keys * (c.queries + 15) / 16 * (c.features + c.value_features + 12); }
};

// Keys (or values) as rows of T: the tensor itself where it is that, else a copy.
template <class T>
at::Tensor as_rows(const at::Tensor& t, bool copy, T*& data, int64_t (&stride)[4]) {
  const bool usable =
      !copy && t.scalar_type() == c10::CppTypeToScalarType<T>::value && (t.stride(4) == 1 || t.size(4) <= 1);
  const at::Tensor rows = usable ? t : at::empty(t.sizes(), t.options().dtype(c10::CppTypeToScalarType<T>::value));
  data = static_cast<T*>(const_cast<void*>(rows.const_data_ptr()));
  for (int i = 0; i < 4; ++i) stride[i] = rows.stride(i);
  return usable ? at::Tensor() : rows;
}

template <class T>
Outputs forward(const Arguments& a) {
  Call<T> call(a);
  auto& c = call.c;
  const auto wide = a.q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const at::Tensor out = at::empty(a.out_shape(), a.q.options());
  const at::Tensor lse = at::empty(a.q.sizes().slice(0, 4), wide);
  const at::Tensor exact = at::empty(a.exact_shape(), wide);
  c.out = regions_of(out);
  if (a.rounded()) c.exact = regions_of(exact);
  c.lse = lse.template mutable_data_ptr<T>();
  const bool masked = a.key_mask.has_value();
  at::Tensor keys = as_rows<T>(a.k, masked, c.key_rows, c.key_stride);
  at::Tensor values = as_rows<T>(a.v, masked, c.value_rows, c.value_stride);
  if (keys.defined() != values.defined()) {  // the copy is made for both
    keys = as_rows<T>(a.k, true, c.key_rows, c.key_stride);
    values = as_rows<T>(a.v, true, c.value_rows, c.value_stride);
  }
  if (keys.defined())
    parallel(call.key_regions(), c.keys * (c.features + c.value_features) / 4,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_rows_kernel, c, begin, end); });
  const int64_t lanes = PYML_CALL_ISA(region_lanes, c), blocks = Blocks(c.queries, lanes).count;
  parallel(c.group() * c.query_regions * blocks, call.pair_work() / std::max<int64_t>(1, blocks),
           [&](int64_t begin, int64_t end) {
             PYML_CALL_ISA(region_fwd_kernel, c, begin, end, scratch<T>(PYML_CALL_ISA(region_fwd_scratch, c)));
           });
  return {out, lse, exact, at::zeros({1}, a.q.options().dtype(at::kInt))};
}

// How many splits of the query regions: enough tasks for many cores within 16 MiB of partial sums, by shape alone.
int64_t split_count(int64_t group, int64_t query_regions, int64_t bytes) {
  const int64_t by_tasks = (32 + group - 1) / group, by_memory = (16 << 20) / std::max<int64_t>(1, bytes);
  return std::max<int64_t>(1, std::min({by_tasks, by_memory, query_regions}));
}

template <class T>
Gradients backward(const at::Tensor& grad, const Arguments& a, const at::Tensor& out, const at::Tensor& lse,
                   std::array<bool, 4> mask) {
  Call<T> call(a);
  auto& c = call.c;
  const at::Tensor kept = lse.contiguous();
  c.out = regions_of(out);
  c.grad = regions_of(grad);
  c.lse = const_cast<T*>(kept.template const_data_ptr<T>());
  const auto gradient = [&](bool wanted, const at::Tensor& like, Regions& to) {
    const at::Tensor t = wanted ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options());
    if (wanted) to = regions_of(t);
    return t;
  };
  const at::Tensor dq = gradient(mask[0], a.q, c.dq), dk = gradient(mask[1], a.k, c.dk);
  const at::Tensor dv = gradient(mask[2], a.v, c.dv);
  at::Tensor dweight = at::empty({0}, (a.region_weight ? *a.region_weight : grad).options());
  c.want_q = mask[0];
  c.want_kv = mask[1] || mask[2];

  const int64_t lanes = PYML_CALL_ISA(region_lanes, c), regions = call.key_regions();
  const Blocks keys(c.keys, lanes);
  const int64_t columns = regions * keys.count * keys.padded * (c.features + c.value_features);
  const at::Tensor packed = buffer<T>(columns, a.q);
  const at::Tensor rows = buffer<T>(regions * keys.count * PYML_CALL_ISA(region_row_size, c), a.q);
  c.packed = packed.template mutable_data_ptr<T>();
  c.packed_rows = rows.template mutable_data_ptr<T>();
  parallel(regions, c.keys * (2 * c.features + c.value_features) / 4,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_pack_kernel, c, begin, end); });

  c.splits = split_count(c.group(), c.query_regions, columns * int64_t(sizeof(T)));
  const at::Tensor partial = buffer<T>(c.want_kv ? c.splits * columns : 0, a.q);
  const at::Tensor touched = at::zeros({c.splits * regions}, a.q.options().dtype(at::kByte));
  c.partial = partial.template mutable_data_ptr<T>();
  c.touched = touched.mutable_data_ptr<uint8_t>();
  at::Tensor dweights;  // [B, H, P, K]
  if (mask[3]) {
    dweights = at::empty({c.batch, c.heads, c.query_regions, c.slots}, call.weight.options());
    c.dweight = dweights.template mutable_data_ptr<T>();
  }
  const auto work = [&] { return scratch<T>(PYML_CALL_ISA(region_bwd_scratch, c)); };
  parallel(c.group() * c.splits, 3 * call.pair_work() * c.query_regions / c.splits,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_bwd_kernel, c, begin, end, work()); });
  if (c.want_kv)
    parallel(regions, c.keys * (c.features + c.value_features) * c.splits / 16,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_reduce_kernel, c, begin, end, work()); });
  if (mask[3]) {
    at::Tensor sum = dweights;
    if (c.weight_heads != c.heads) {  // in the order of the heads
      sum = dweights.select(1, 0).clone();
      for (int64_t h = 1; h < c.heads; ++h) sum.add_(dweights.select(1, h));
      sum = sum.unsqueeze(1);
    }
    dweight = sum.to(a.region_weight->scalar_type());
  }
  return {dq, dk, dv, dweight};
}

Outputs region_attention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& index,
                             std::optional<double> scale, const Optional& counts, const Optional& key_mask,
                             const Optional& region_weight) {
  const Arguments a{q, k, v, index, scale, counts, key_mask, region_weight};
  a.check();
  const auto shape = a.out_shape();
  if (q.numel() == 0 && q.size(4) > 0) {  // no queries
    const auto wide = q.options().dtype(a.wide() ? at::kDouble : at::kFloat);
    return {at::zeros(shape, q.options()), at::empty(q.sizes().slice(0, 4), wide), at::empty(a.exact_shape(), wide),
            at::zeros({1}, q.options().dtype(at::kInt))};
  }
  return a.wide() ? forward<double>(a) : forward<float>(a);
}

Gradients region_attention_bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& index, std::optional<double> scale, const Optional& counts,
                               const Optional& key_mask, const Optional& region_weight, const at::Tensor& out,
                               const at::Tensor& lse, const at::Tensor& exact, std::array<bool, 4> mask) {
  const Arguments a{q, k, v, index, scale, counts, key_mask, region_weight};
  a.check();
  check_float(kOp, "grad", grad, q.device());
  check_shape(kOp, "grad", grad, a.out_shape());
  check_float(kOp, "out", out, q.device());
  check_shape(kOp, "out", out, a.out_shape());
  for (const auto& [name, t] : {std::pair{"lse", lse}, {"exact", exact}})
    PYML_CHECK(t.scalar_type() == (a.wide() ? at::kDouble : at::kFloat) && t.device() == q.device(), kOp, name,
               "the one that the forward gave", t.options());
  check_shape(kOp, "lse", lse, q.sizes().slice(0, 4));
  check_shape(kOp, "exact", exact, a.exact_shape());
  mask[3] = mask[3] && region_weight.has_value();
  if (grad.numel() == 0 || a.no_keys()) {
    const auto zeros = [](bool wanted, const at::Tensor& t) {
      return wanted ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
    };
    return {zeros(mask[0], q), zeros(mask[1], k), zeros(mask[2], v),
            zeros(mask[3], region_weight ? *region_weight : q)};
  }
  const at::Tensor& unrounded = a.rounded() ? exact : out;
  return a.wide() ? backward<double>(grad, a, unrounded, lse, mask) : backward<float>(grad, a, unrounded, lse, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("region_attention_fwd", &region_attention_fwd);
  m.impl("region_attention_bwd", &region_attention_bwd);
}

}  // namespace pyml
