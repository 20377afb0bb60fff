// CUDA launchers of batched optimal transport: plain structs, no torch. T is float or double, the type of every sum.
#pragma once
#include <cstddef>
#include <cstdint>

#include "batched_ot/batched_ot.h"
#include "common/host_device.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

constexpr int kLeadDims = 6;                         // leading dimensions that a kernel can follow
constexpr int64_t kOtMostPoints = int64_t(1) << 30;  // rows or columns of a problem

constexpr int kOtThreads = 256;  // of a block, at most
// Up to this many rows or columns, the implicit gradient's system is factorised at once, without trying another way.
constexpr int64_t kOtDirect = 64;

// Where problem q of a batch begins, in elements.
struct Lead {
  int dims = 0;
  int64_t size[kLeadDims] = {}, stride[kLeadDims] = {};

  PYML_HD int64_t offset(int64_t q) const {
    int64_t at = 0;
    PYML_UNROLL  // an index that is known at compile time keeps the arrays out of local memory
        for (int d = kLeadDims - 1; d >= 0; --d) {
      if (d >= dims) continue;
      at += q % size[d] * stride[d];
      q /= size[d];
    }
    return at;
  }
};

// How a block of threads holds one problem: by its size alone, never by the GPU, so that no bit depends on that.
struct OtShape {
  int lanes = 1;  // threads that share a row
  int quads = 1;  // of four columns, that each of them has in registers
  int threads = 32;
  int64_t ld = 4;  // of a row

  // `single`: of a kernel that has a shape for up to four columns, one lane a row.
  static OtShape of(int64_t n, int64_t m, bool is_double, bool single) {
    OtShape s;  // few shapes: each is a kernel to compile, and doubles are not there for speed
    if (is_double)
      s.lanes = m <= 16 ? 4 : 32;
    else
      s.lanes = single && m <= 4 ? 1 : m <= 16 ? 4 : m <= 64 ? 16 : 32;
    s.quads = !is_double && s.lanes == 32 ? 2 : 1;
    s.ld = (m + s.lanes * 4 - 1) / (s.lanes * 4) * (s.lanes * 4);
    const int64_t entries = s.lanes < 16 ? 32 : 16;  // of a thread
    while (s.threads < kOtThreads && s.threads * entries < n * m) s.threads *= 2;
    return s;
  }
  int64_t span() const { return int64_t(lanes) * 4 * quads; }
};

// One call. Of SinkhornParams, `offsets` is not used; the cost and, in the backward of a plan, what comes in have any
// strides, results are contiguous.
template <class T>
struct SinkhornCuda : SinkhornParams<T> {
  Lead cost_lead, plan_lead;
  T damping = 1, stretch = 1;  // damp(), tau()
  OtShape shape;
  int64_t rows = 0, held = 0;  // of the matrix: n or, where a kernel needs none, 0; how many are in shared memory
  bool vectors_held = true;    // in shared memory
  int64_t system = 0;          // numbers of the implicit gradient's factor, behind all else
  bool system_held = false;    // in shared memory
  T* workspace = nullptr;      // for what is not there: `workspace_size` numbers a block
  int64_t workspace_size = 0, blocks = 0;
  size_t shared = 0;  // bytes
};

enum class OtKernel { kSolve, kGradient, kPlan, kPlanGradient };

#define PYML_OT_CUDA(T)                                                                                       \
  /* Fills in what of the call lies where; `workspace` is then to be given. */                                \
  cudaError_t ot_cuda_layout(SinkhornCuda<T>&, OtKernel);                                                     \
  cudaError_t ot_cuda_solve(const SinkhornCuda<T>&, cudaStream_t);    /* value to status of SinkhornParams */ \
  cudaError_t ot_cuda_gradient(const SinkhornCuda<T>&, cudaStream_t); /* grad_cost, grad_a, grad_b */         \
  cudaError_t ot_cuda_plan(const SinkhornCuda<T>&, cudaStream_t);     /* plan */                              \
  cudaError_t ot_cuda_plan_gradient(const SinkhornCuda<T>&, cudaStream_t);

PYML_OT_CUDA(float)
PYML_OT_CUDA(double)
#undef PYML_OT_CUDA

}  // namespace pyml
