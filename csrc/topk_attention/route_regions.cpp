// route_regions on a CPU: checks, allocation, threads.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/topk_attention.h"
#include "topk_attention/topk_attention_host.h"

#include <torch/library.h>

#include <cmath>
#include <vector>

namespace pyml {
namespace {

constexpr const char* kOp = "route_regions";
using Optional = std::optional<at::Tensor>;

at::Tensor means(RouteParams c, const at::Tensor& tokens, const Optional& mask) {
  const at::Tensor keep = mask ? mask->contiguous() : at::Tensor();
  const at::Tensor found =
      at::empty({c.batch, c.heads, tokens.size(2), c.features}, tokens.options().dtype(at::kDouble));
  c.tokens = regions_of(tokens);
  c.regions = tokens.size(2);
  c.mask = mask ? keep.const_data_ptr<bool>() : nullptr;
  c.means = found.mutable_data_ptr<double>();
  parallel(c.batch * c.heads * c.regions, tokens.size(3) * c.features / 4,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(route_means_kernel, c, begin, end); });
  return found;
}

std::tuple<at::Tensor, at::Tensor> route_regions_fwd(const at::Tensor& q, const at::Tensor& k, int64_t topk,
                                                     std::optional<double> scale, bool per_head,
                                                     const Optional& query_mask, const Optional& key_mask) {
  check_five(kOp, q, k);
  PYML_CHECK(topk >= 1 && topk <= k.size(2), kOp, "topk", c10::str("an integer from 1 to Pk = ", k.size(2)), topk);
  PYML_CHECK(!scale || std::isfinite(*scale), kOp, "scale", "a finite number or None", *scale);
  if (query_mask) check_mask(kOp, "query_mask", *query_mask, q);
  if (key_mask) check_mask(kOp, "key_mask", *key_mask, k);

  RouteParams c{};
  c.batch = q.size(0), c.heads = q.size(1), c.query_regions = q.size(2), c.key_regions = k.size(2);
  c.features = q.size(4), c.topk = topk, c.per_head = per_head;
  const int64_t heads = per_head ? c.heads : 1, length = c.features * (per_head ? 1 : c.heads);
  c.scale = scale ? *scale : 1 / std::sqrt(double(std::max<int64_t>(1, length)));
  const at::Tensor index = at::empty({c.batch, heads, c.query_regions, topk}, q.options().dtype(at::kLong));
  const at::Tensor logits = at::empty(index.sizes(), q.options().dtype(at::kFloat));
  if (index.numel() == 0) return {index, logits};

  const at::Tensor query_means = means(c, q, query_mask), key_means = means(c, k, key_mask);
  const int64_t lanes = PYML_CALL_ISA(route_lanes), padded = (c.key_regions + lanes - 1) / lanes * lanes;
  const at::Tensor columns = at::zeros({c.batch, c.heads, c.features, padded}, key_means.options());
  columns.narrow(3, 0, c.key_regions).copy_(key_means.transpose(2, 3));
  c.query_means = query_means.mutable_data_ptr<double>();
  c.key_means = columns.mutable_data_ptr<double>();
  const at::Tensor any = key_mask ? key_mask->any(-1).contiguous() : at::Tensor();
  c.key_any = key_mask ? any.const_data_ptr<bool>() : nullptr;
  c.index = index.mutable_data_ptr<int64_t>();
  c.logits = logits.mutable_data_ptr<float>();
  parallel(c.batch * heads * c.query_regions, c.key_regions * (length / 4 + 8), [&](int64_t begin, int64_t end) {
    PYML_CALL_ISA(route_kernel, c, begin, end, scratch<double>(PYML_CALL_ISA(route_scratch, c)));
  });
  return {index, logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) { m.impl("route_regions_fwd", &route_regions_fwd); }

}  // namespace pyml
