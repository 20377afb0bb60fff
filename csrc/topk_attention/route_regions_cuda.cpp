// route_regions on CUDA: launches.
#include <torch/library.h>

#include "common/cuda_host.h"
#include "topk_attention/route_cuda.h"
#include "topk_attention/route_prepare.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> route_regions_fwd(const at::Tensor& q, const at::Tensor& k, int64_t topk,
                                                     std::optional<double> scale, bool per_head,
                                                     const Optional& query_mask, const Optional& key_mask) {
  constexpr const char* op = "route_regions";
  const OnDevice device(q);
  const auto means = [&](const RouteParams& c) {
    PYML_CHECK(c.key_regions <= kMostRegions, op, "k", c10::str("at most ", kMostRegions, " regions in a CUDA kernel"),
               c.key_regions);
    check_cuda(op, route_cuda_means(c, device.stream()));
  };
  const auto route = [&](const RouteParams& c) { check_cuda(op, route_cuda(c, device.stream())); };
  return route_regions(q, k, topk, scale, per_head, query_mask, key_mask, 1, means, route);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) { m.impl("route_regions_fwd", &route_regions_fwd); }

}  // namespace pyml
