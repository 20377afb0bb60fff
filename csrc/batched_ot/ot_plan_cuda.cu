// The plan of given potentials and its gradient on NVIDIA GPUs: a block of threads for each problem. Bound by memory.
#include "batched_ot/ot_block_cuda.h"

namespace pyml {
namespace {

template <class T, int G, int Q>
struct Plan : OtBlock<T, G, Q> {
  using Base = OtBlock<T, G, Q>;
  using Base::a, Base::b, Base::c, Base::m, Base::n, Base::q;
  T *f, *g;   // potentials
  bool lost;  // some are not finite: there is no plan, and no gradient

  __device__ Plan(const SinkhornCuda<T>& c, double* shared)
      : Base(c, shared), f(this->row_vector()), g(this->column_vector()) {}

  __device__ void begin(int64_t problem) {
    q = problem;
    __syncthreads();  // the problem before is done with all vectors
    bool odd = false;
    const auto take = [&](const T* from, int size, T* to) {
      for (int i = this->tid; i < size; i += this->threads) {
        to[i] = from[q * size + i];
        odd |= !(fabs(double(to[i])) <= double(Trust<T>::kLargest));
      }
    };
    take(c.potential_f, n, f);
    take(c.potential_g, m, g);
    lost = Base::block_any(odd);
    this->weights(c.a, n, a, n);
    this->weights(c.b, m, b, this->ld);
  }
  __device__ T plan_at(int i, int j, T cost) const { return lost ? T(NAN) : this->plan(f, g, i, j, cost); }

  __device__ void forward(int64_t problem) {
    begin(problem);
    this->write(c.plan, [&](int i, int j, T cost) { return plan_at(i, j, cost); });
  }

  __device__ void backward(int64_t problem) {
    begin(problem);
    this->load(c.cost, c.cost_lead, [&](int i, int j, T cost, T) { return plan_at(i, j, cost); });
    this->load(c.plan, c.plan_lead, [&](int, int, T grad, T plan) { return lost ? T(0) : plan * grad; });
    if (c.grad_cost.data) this->write(c.grad_cost, [&](int i, int j, T) { return this->row(i)[j] * (T(-1) / c.eps); });
    const auto entry = [](int, int, T e) { return e; };
    const auto give = [&](int64_t at, T sum, T weight, T* to_weight, T* to_potential) {
      if (to_weight) to_weight[at] = weight > T(0) ? sum / weight : T(0);
      if (to_potential) to_potential[at] = sum / c.eps;
    };
    if (c.grad_a || c.out_f)
      this->over_rows(T(0), Plus(), entry, [&](int i, T sum) { give(q * n + i, sum, a[i], c.grad_a, c.out_f); });
    if (c.grad_b || c.out_g)
      this->over_columns(T(0), Plus(), entry, [&](int j, T sum) { give(q * m + j, sum, b[j], c.grad_b, c.out_g); });
  }
};

template <class T, int G, int Q>
__global__ void __launch_bounds__(kOtThreads) sinkhorn_plan_fwd_kernel(SinkhornCuda<T> c) {
  PYML_SHARED(double, shared);
  Plan<T, G, Q> plan(c, shared);
  plan.each_problem([&](int64_t q) { plan.forward(q); });
}

template <class T, int G, int Q>
__global__ void __launch_bounds__(kOtThreads) sinkhorn_plan_bwd_kernel(SinkhornCuda<T> c) {
  PYML_SHARED(double, shared);
  Plan<T, G, Q> plan(c, shared);
  plan.each_problem([&](int64_t q) { plan.backward(q); });
}

template <class T>
cudaError_t run(const SinkhornCuda<T>& c, bool backward, cudaStream_t stream) {
  return launch_by_shape<false>(c, stream, [&](auto lanes, auto quads) {
    constexpr int G = decltype(lanes)::value, Q = decltype(quads)::value;
    return backward ? sinkhorn_plan_bwd_kernel<T, G, Q> : sinkhorn_plan_fwd_kernel<T, G, Q>;
  });
}

}  // namespace

#define PYML_OT_PLAN(T)                                                                                     \
  cudaError_t ot_cuda_plan(const SinkhornCuda<T>& c, cudaStream_t stream) { return run(c, false, stream); } \
  cudaError_t ot_cuda_plan_gradient(const SinkhornCuda<T>& c, cudaStream_t stream) { return run(c, true, stream); }

PYML_OT_PLAN(float)
PYML_OT_PLAN(double)

}  // namespace pyml
