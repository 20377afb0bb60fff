// CPU kernels of batched optimal transport over ranges: raw pointers, no Tensor, no threads. Included once for each
// instruction set.
#include "batched_ot/ot_bwd_cpu.h"
#include "batched_ot/ot_group_cpu.h"
#include "batched_ot/pairwise_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

#define PYML_OT_DEFINE(T)                                                                                        \
  int64_t sinkhorn_tasks(const SinkhornParams<T>& p) {                                                           \
    return p.grouped() ? (p.batch + kLanes<T> - 1) / kLanes<T> : p.batch;                                        \
  }                                                                                                              \
  int64_t sinkhorn_scratch(const SinkhornParams<T>& p) {                                                         \
    const int64_t one = Solver<T>::scratch(p), group = p.grouped() ? Group<T>::scratch(p) : 0;                   \
    return one > group ? one : group;                                                                            \
  }                                                                                                              \
  void sinkhorn_fwd_kernel(const SinkhornParams<T>& p, int64_t begin, int64_t end, T* scratch) {                 \
    for (int64_t at = begin; at < end; ++at)                                                                     \
      p.grouped() ? solve_group<T>(p, at, scratch) : solve_one<T>(p, at, scratch);                               \
  }                                                                                                              \
  int64_t sinkhorn_bwd_scratch(const SinkhornParams<T>& p) { return Gradient<T>::scratch(p); }                   \
  void sinkhorn_bwd_kernel(const SinkhornParams<T>& p, int64_t begin, int64_t end, T* scratch) {                 \
    for (int64_t q = begin; q < end; ++q) Gradient<T>(p, q, scratch).run();                                      \
  }                                                                                                              \
  void sinkhorn_plan_fwd_kernel(const SinkhornParams<T>& p, int64_t begin, int64_t end, T* scratch) {            \
    for (int64_t q = begin; q < end; ++q) Plan<T>(p, q, scratch).forward();                                      \
  }                                                                                                              \
  void sinkhorn_plan_bwd_kernel(const SinkhornParams<T>& p, int64_t begin, int64_t end, T* scratch) {            \
    for (int64_t q = begin; q < end; ++q) Plan<T>(p, q, scratch).backward();                                     \
  }                                                                                                              \
  int64_t pairwise_cost_tasks(const PairwiseParams<T>& p) {                                                      \
    return p.batch * pairwise_blocks(p.x_in_lanes() ? p.m : p.n);                                                \
  }                                                                                                              \
  int64_t pairwise_cost_scratch(const PairwiseParams<T>& p) { return pairwise_scratch<T>(p); }                   \
  void pairwise_cost_fwd_kernel(const PairwiseParams<T>& p, int64_t begin, int64_t end, T* scratch) {            \
    for (int64_t at = begin; at < end; ++at) pairwise_costs<T>(p, at, scratch);                                  \
  }                                                                                                              \
  int64_t pairwise_cost_bwd_tasks(const PairwiseParams<T>& p, bool of_y) {                                       \
    return p.batch * pairwise_blocks(of_y ? p.m : p.n);                                                          \
  }                                                                                                              \
  void pairwise_cost_bwd_kernel(const PairwiseParams<T>& p, bool of_y, int64_t begin, int64_t end, T* scratch) { \
    for (int64_t at = begin; at < end; ++at) pairwise_gradient<T>(p, of_y, at, scratch);                         \
  }

PYML_OT_DEFINE(float)
PYML_OT_DEFINE(double)

}  // namespace CPU_CAPABILITY
}  // namespace pyml
