// Torch side of route_regions, shared by the CPU and CUDA: argument checks, allocation, the two steps.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "topk_attention/topk_attention_host.h"

namespace pyml {

// `means(c)` and `route(c)` run the kernels of these names over all their items; key means are padded to a multiple of
// `lanes` regions.
template <class Means, class Route>
std::tuple<at::Tensor, at::Tensor> route_regions(const at::Tensor& q, const at::Tensor& k, int64_t topk,
                                                 std::optional<double> scale, bool per_head,
                                                 const std::optional<at::Tensor>& query_mask,
                                                 const std::optional<at::Tensor>& key_mask, int64_t lanes,
                                                 const Means& means, const Route& route) {
  constexpr const char* op = "route_regions";
  check_five(op, q, k);
  PYML_CHECK(topk >= 1 && topk <= k.size(2), op, "topk", c10::str("an integer from 1 to Pk = ", k.size(2)), topk);
  PYML_CHECK(!scale || std::isfinite(*scale), op, "scale", "a finite number or None", *scale);
  if (query_mask) check_mask(op, "query_mask", *query_mask, q);
  if (key_mask) check_mask(op, "key_mask", *key_mask, k);

  RouteParams c{};
  c.batch = q.size(0), c.heads = q.size(1), c.query_regions = q.size(2), c.key_regions = k.size(2);
  c.features = q.size(4), c.topk = topk, c.per_head = per_head;
  const int64_t heads = per_head ? c.heads : 1, length = c.features * (per_head ? 1 : c.heads);
  c.scale = scale ? *scale : 1 / std::sqrt(double(std::max<int64_t>(1, length)));
  const at::Tensor index = at::empty({c.batch, heads, c.query_regions, topk}, q.options().dtype(at::kLong));
  const at::Tensor logits = at::empty(index.sizes(), q.options().dtype(at::kFloat));
  if (index.numel() == 0) return {index, logits};

  const auto means_of = [&](RouteParams task, const at::Tensor& tokens, const std::optional<at::Tensor>& mask) {
    const at::Tensor keep = mask ? mask->contiguous() : at::Tensor();
    const at::Tensor found =
        at::empty({c.batch, c.heads, tokens.size(2), c.features}, tokens.options().dtype(at::kDouble));
    task.tokens = regions_of(tokens);
    task.regions = tokens.size(2);
    task.mask = mask ? keep.const_data_ptr<bool>() : nullptr;
    task.means = found.mutable_data_ptr<double>();
    means(task);
    return found;
  };
  const at::Tensor query_means = means_of(c, q, query_mask), key_means = means_of(c, k, key_mask);
  const int64_t padded = (c.key_regions + lanes - 1) / lanes * lanes;
  const at::Tensor columns = at::zeros({c.batch, c.heads, c.features, padded}, key_means.options());
  columns.narrow(3, 0, c.key_regions).copy_(key_means.transpose(2, 3));
  c.query_means = query_means.mutable_data_ptr<double>();
  c.key_means = columns.mutable_data_ptr<double>();
  const at::Tensor any = key_mask ? key_mask->any(-1).contiguous() : at::Tensor();
  c.key_any = key_mask ? any.const_data_ptr<bool>() : nullptr;
  c.index = index.mutable_data_ptr<int64_t>();
  c.logits = logits.mutable_data_ptr<float>();
  route(c);
  return {index, logits};
}

}  // namespace pyml
