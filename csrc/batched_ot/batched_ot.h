// Batched optimal transport: plain parameter structs and the kernel signatures that every instruction set provides. No
// torch here.
//
// Words: a problem has n rows (weights a, potential f) and m columns (weights b, potential g). Its plan is
// P = a_i b_j exp((f_i + g_j - C_ij) / eps). One iteration updates f, then g. A weight of zero means masked.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace pyml {

// Bits of a status, as in pyml/reference/batched_ot.py.
constexpr int32_t kNotConverged = 1, kUnequalMasses = 2, kBadNumbers = 4;
constexpr int64_t kCheckEvery = 5;  // iterations between two looks at the marginal error
// Up to this many rows or columns, the implicit gradient's system can be factorised.
constexpr int64_t kDenseSystem = 512;

// The costs of a batch of problems: entry (i, j) of problem q is at offsets[q] + i * stride_n + j * stride_m.
struct Costs {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  const int64_t* offsets = nullptr;
  int64_t stride_n = 0, stride_m = 0;
};

template <class T>
struct SinkhornParams {
  int64_t batch, n, m;
  Costs cost;
  const T *a, *b;  // [batch, n], [batch, m]; null: 1 / n, 1 / m
  const T* init;   // [batch, m]: g to start from; null: 0
  T eps, rho;      // rho counts in unbalanced problems only
  bool unbalanced;
  int64_t max_iter;
  bool stops;             // at marginal error `tol`
  T tol, mass_tolerance;  // how far two masses may be apart, relatively

  // Forward: results [batch], [batch, n], [batch, m].
  T *value, *transport, *f, *g, *row_mass;
  int32_t *n_iter, *status;  // backward: a status only where the system above kDenseSystem was not solved

  // Backward, of solve and of plan: what is given and what is wanted.
  const T *potential_f, *potential_g;  // [batch, n], [batch, m]
  const T *grad_value, *grad_transport, *grad_f, *grad_g;
  bool implicit;       // the plan and the potentials move with cost and weights
  Costs plan;          // sinkhorn_plan: its result, or the gradient that comes in
  Costs grad_cost;     // without data: not wanted
  T *grad_a, *grad_b;  // null: not wanted
  T *out_f, *out_g;    // sinkhorn_plan: gradients of the potentials; null: not wanted

  T damp() const { return unbalanced ? rho / (rho + eps) : T(1); }  // of a potential's update
  T tau() const { return unbalanced ? T(1) + eps / rho : T(1); }
  // Problems side by side in the lanes of a vector, each with its matrix in the cache: where one problem alone would
  // leave lanes empty or wait for sums across lanes.
  bool grouped() const { return n * m <= 1024 || ((n <= 4 || m <= 4) && n * m <= 4096); }
  // Lanes run over rows instead of columns: columns are few.
  bool rows_in_lanes() const { return m < n && m < 48; }
};

// The points of a batch of clouds: coordinate k of point i of problem q is at offsets[q] + i * stride_n + k * stride_m.
using Points = Costs;

template <class T>
struct PairwiseParams {
  int64_t batch, n, m, d;
  bool cosine;
  Points x, y;            // [batch, n, d], [batch, m, d]
  Costs cost;             // [batch, n, m]: the result, or the gradient that comes in
  Points grad_x, grad_y;  // without data: not wanted

  // The points of y are too few to fill vectors; those of x are not.
  bool x_in_lanes() const { return m < n && m < 32; }
};

// Each kernel works on the range [begin, end) of what its comment names, with scratch of <kernel>_scratch elements.
#define PYML_OT_KERNELS(T)                                                                                     \
  int64_t sinkhorn_tasks(const SinkhornParams<T>&);                                                            \
  int64_t sinkhorn_scratch(const SinkhornParams<T>&);                                                          \
  void sinkhorn_fwd_kernel(const SinkhornParams<T>&, int64_t begin, int64_t end, T* scratch); /* tasks */      \
  int64_t sinkhorn_bwd_scratch(const SinkhornParams<T>&);                                                      \
  void sinkhorn_bwd_kernel(const SinkhornParams<T>&, int64_t begin, int64_t end, T* scratch); /* problems */   \
  void sinkhorn_plan_fwd_kernel(const SinkhornParams<T>&, int64_t begin, int64_t end, T* scratch);             \
  void sinkhorn_plan_bwd_kernel(const SinkhornParams<T>&, int64_t begin, int64_t end, T* scratch);             \
  int64_t pairwise_cost_tasks(const PairwiseParams<T>&);                                                       \
  int64_t pairwise_cost_scratch(const PairwiseParams<T>&);                                                     \
  void pairwise_cost_fwd_kernel(const PairwiseParams<T>&, int64_t begin, int64_t end, T* scratch); /* tasks */ \
  int64_t pairwise_cost_bwd_tasks(const PairwiseParams<T>&, bool of_y);                                        \
  void pairwise_cost_bwd_kernel(const PairwiseParams<T>&, bool of_y, int64_t begin, int64_t end, T* scratch);

#define PYML_OT_VARIANT(isa) \
  namespace isa {            \
  PYML_OT_KERNELS(float)     \
  PYML_OT_KERNELS(double)    \
  }

PYML_OT_VARIANT(DEFAULT)
#if defined(__x86_64__)
PYML_OT_VARIANT(AVX2)
PYML_OT_VARIANT(AVX512)
#endif

}  // namespace pyml
