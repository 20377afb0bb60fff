// route_regions on a CPU: threads.
#include <torch/library.h>

#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/route_prepare.h"

namespace pyml {
namespace {

using Optional = std::optional<at::Tensor>;

void means(const RouteParams& c) {
  parallel(c.batch * c.heads * c.regions, c.tokens.tokens * c.features / 4,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(route_means_kernel, c, begin, end); });
}

void route(const RouteParams& c) {
  const int64_t heads = c.per_head ? c.heads : 1;
  parallel(c.batch * heads * c.query_regions, c.key_regions * (c.features * c.heads / heads / 4 + 8),
           [&](int64_t begin, int64_t end) {
             PYML_CALL_ISA(route_kernel, c, begin, end, scratch<double>(PYML_CALL_ISA(route_scratch, c)));
           });
}

std::tuple<at::Tensor, at::Tensor> route_regions_fwd(const at::Tensor& q, const at::Tensor& k, int64_t topk,
                                                     std::optional<double> scale, bool per_head,
                                                     const Optional& query_mask, const Optional& key_mask) {
  return route_regions(q, k, topk, scale, per_head, query_mask, key_mask, PYML_CALL_ISA(route_lanes), means, route);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) { m.impl("route_regions_fwd", &route_regions_fwd); }

}  // namespace pyml
