// sinkhorn_solve and sinkhorn_plan on a CPU: threads.
#include "batched_ot/batched_ot.h"

#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "batched_ot/batched_ot_op.h"
#include "batched_ot/matrices.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"

namespace pyml {
namespace {

template <class T>
struct CpuCall : SinkhornCall<T, SinkhornParams<T>> {
  using Base = SinkhornCall<T, SinkhornParams<T>>;
  using Base::p;
  static constexpr bool kImplicitInDouble = false;  // its sums are in double already
  std::vector<int64_t> of_cost, of_plan, of_dense;

  explicit CpuCall(const Arguments& c) : Base(c), of_cost(offsets_of(c.cost)), of_dense(of_cost.size()) {
    p.cost = costs_of(c.cost, of_cost);
    for (size_t q = 0; q < of_dense.size(); ++q) of_dense[q] = int64_t(q) * p.n * p.m;
    this->dense = of_dense.data();
  }
  void take_plan(const at::Tensor& t) {
    of_plan = offsets_of(t);
    p.plan = costs_of(t, of_plan);
  }

  int64_t work(int64_t sweeps) const { return sweeps * std::max<int64_t>(4, p.n * p.m / 8); }
  // f(memory); what a large problem took goes at once, so that its gradient need not lie beside it.
  template <class F>
  static void with_scratch(int64_t count, const F& f) {
    f(scratch<T>(count));
    scratch<T>(1);
  }
  // kernel(begin, end, scratch) over all problems.
  template <class Kernel>
  void each_problem(int64_t sweeps, const Kernel& kernel) const {
    parallel(p.batch, work(sweeps), [&](int64_t begin, int64_t end) {
      with_scratch(PYML_CALL_ISA(sinkhorn_bwd_scratch, p), [&](T* memory) { kernel(begin, end, memory); });
    });
  }

  void solve() const {
    const int64_t tasks = PYML_CALL_ISA(sinkhorn_tasks, p), lanes = (p.batch + tasks - 1) / tasks;
    parallel(tasks, lanes * work(p.max_iter), [&](int64_t begin, int64_t end) {
      with_scratch(PYML_CALL_ISA(sinkhorn_scratch, p),
                   [&](T* memory) { PYML_CALL_ISA(sinkhorn_fwd_kernel, p, begin, end, memory); });
    });
  }
  void gradient() {
    const bool large = p.implicit && std::min(p.n, p.m) > kDenseSystem;
    std::vector<int32_t> status(size_t(large ? p.batch : 0), 0);
    p.status = status.data();
    each_problem(p.implicit ? 64 : 16, [&](int64_t begin, int64_t end, T* memory) {
      PYML_CALL_ISA(sinkhorn_bwd_kernel, p, begin, end, memory);
    });
    if (const auto left = std::count(status.begin(), status.end(), kNotConverged))
      TORCH_WARN("sinkhorn: implicit gradient: expected conjugate gradients to solve the system of each problem, got ",
                 left, " of ", p.batch, " that they did not: their plans are too far from full for it; raise eps");
  }
  void plan() const {
    each_problem(8, [&](int64_t begin, int64_t end, T* memory) {
      PYML_CALL_ISA(sinkhorn_plan_fwd_kernel, p, begin, end, memory);
    });
  }
  void plan_gradient() const {
    each_problem(8, [&](int64_t begin, int64_t end, T* memory) {
      PYML_CALL_ISA(sinkhorn_plan_bwd_kernel, p, begin, end, memory);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("sinkhorn_solve_fwd", &SinkhornOp<CpuCall>::solve_fwd);
  m.impl("sinkhorn_solve_bwd", &SinkhornOp<CpuCall>::solve_bwd);
  m.impl("sinkhorn_plan_fwd", &SinkhornOp<CpuCall>::plan_fwd);
  m.impl("sinkhorn_plan_bwd", &SinkhornOp<CpuCall>::plan_bwd);
}

}  // namespace pyml
