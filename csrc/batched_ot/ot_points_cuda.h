// CUDA launchers of pairwise_cost: plain structs, no torch. T is float or double, the type of every sum.
#pragma once
#include "batched_ot/batched_ot_cuda.h"

namespace pyml {

// One call. Of PairwiseParams, `offsets` are not used.
template <class T>
struct PairwiseCuda : PairwiseParams<T> {
  Lead x_lead, y_lead, cost_lead;
  T *scale_x, *scale_y;  // [batch, n], [batch, m]: 1 / length for cosines, else 1; NaN for a point that is not finite
  T *sum_x, *sum_y;      // backward: [batch, n, d], [batch, m, d], sums over the points of the other cloud
};

#define PYML_OT_POINTS(T)                                                                           \
  cudaError_t ot_cuda_points(const PairwiseCuda<T>&, cudaStream_t);          /* scale_x, scale_y */ \
  cudaError_t ot_cuda_costs(const PairwiseCuda<T>&, cudaStream_t);           /* cost */             \
  cudaError_t ot_cuda_pull(const PairwiseCuda<T>&, bool of_y, cudaStream_t); /* sum and gradient of one cloud */

PYML_OT_POINTS(float)
PYML_OT_POINTS(double)
#undef PYML_OT_POINTS

}  // namespace pyml
