// pairwise_cost on a CPU: threads.
#include <torch/library.h>

#include <algorithm>

#include "batched_ot/matrices.h"
#include "batched_ot/pairwise_op.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"

namespace pyml {
namespace {

template <class T>
struct CpuCall {
  PairwiseParams<T> p{};
  std::vector<int64_t> of_x, of_y, of_cost;

  CpuCall(const Clouds& c, const at::Tensor& cost)
      : of_x(offsets_of(c.x)), of_y(offsets_of(c.y)), of_cost(offsets_of(cost)) {
    c.tell(p);
    p.x = costs_of(c.x, of_x);
    p.y = costs_of(c.y, of_y);
    p.cost = costs_of(cost, of_cost);
  }
  template <class Kernel>
  void run(int64_t tasks, int64_t points, const Kernel& kernel) const {
    const int64_t work = std::min<int64_t>(points, 128) * std::max(p.n, p.m) * p.d / 8 + 1;
    parallel(tasks, work, [&](int64_t begin, int64_t end) {
      kernel(begin, end, scratch<T>(PYML_CALL_ISA(pairwise_cost_scratch, p)));
    });
  }

  void costs() const {
    run(PYML_CALL_ISA(pairwise_cost_tasks, p), std::min(p.n, p.m),
        [&](int64_t begin, int64_t end, T* memory) { PYML_CALL_ISA(pairwise_cost_fwd_kernel, p, begin, end, memory); });
  }
  at::Tensor gradient(bool of_y, const at::Tensor& points) {
    const at::Tensor found = at::empty(points.sizes(), points.options());
    const auto offsets = offsets_of(found);
    (of_y ? p.grad_y : p.grad_x) = costs_of(found, offsets);
    run(PYML_CALL_ISA(pairwise_cost_bwd_tasks, p, of_y), of_y ? p.m : p.n, [&](int64_t begin, int64_t end, T* memory) {
      PYML_CALL_ISA(pairwise_cost_bwd_kernel, p, of_y, begin, end, memory);
    });
    return found;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("pairwise_cost_fwd", &PairwiseOp<CpuCall>::fwd);
  m.impl("pairwise_cost_bwd", &PairwiseOp<CpuCall>::bwd);
}

}  // namespace pyml
