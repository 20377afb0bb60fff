// Where the kernels of optimal transport keep what: in shared memory, or in a workspace that stays in the second-level
// cache. It decides no bit: sums are the same wherever their terms lie.
#include <algorithm>

#include "batched_ot/ot_block_cuda.h"

namespace pyml {
namespace {

constexpr int64_t kMostBlocks = 264;  // that need a workspace; they take several problems each

// Vectors of a kernel, weights among them.
struct Vectors {
  int64_t rows, columns;
};
constexpr Vectors vectors_of(OtKernel kernel) {
  return kernel == OtKernel::kSolve ? Vectors{5, 5} : kernel == OtKernel::kGradient ? Vectors{7, 10} : Vectors{2, 2};
}

cudaError_t shared_limit(int64_t* bytes) {
#ifdef PYML_CUDA_EMULATION
  *bytes = int64_t(emulation::held_bytes(emulation::kSharedLimit));
  return cudaSuccess;
#else
  int device = 0, found = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = found;
  return error;
#endif
}

template <class T>
cudaError_t lay_out(SinkhornCuda<T>& c, OtKernel kernel) {
  int64_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  c.shape = OtShape::of(c.n, c.m, sizeof(T) == 8, kernel == OtKernel::kSolve);
  const bool matrix = kernel == OtKernel::kSolve || kernel == OtKernel::kPlanGradient ||
                      (kernel == OtKernel::kGradient && (c.implicit || (c.unbalanced && c.grad_a)));
  const Vectors need = vectors_of(kernel);
  const int64_t vectors = need.rows * ceil_div(c.n, 4) * 4 + need.columns * c.shape.ld;
  const int64_t fixed = kOtWords * int64_t(sizeof(double)) + c.shape.threads / 32 * c.shape.span() * int64_t(sizeof(T));
  int64_t room = std::max<int64_t>(0, limit - fixed) / int64_t(sizeof(T));
  c.vectors_held = vectors <= room;
  if (c.vectors_held) room -= vectors;
  // Larger factors are seldom made, so that the plan goes first.
  const int64_t few = std::min(c.n, c.m);
  const bool factor = kernel == OtKernel::kGradient && c.implicit && few <= kDenseSystem;
  c.system = factor ? ceil_div(few * (few + 1) / 2, 4) * 4 : 0;
  c.system_held = few <= kOtDirect && c.system <= room;
  if (c.system_held) room -= c.system;
  c.rows = matrix ? c.n : 0;
  c.held = std::min(c.rows, room / c.shape.ld);
  const int64_t held = (c.vectors_held ? vectors : 0) + (c.system_held ? c.system : 0) + c.held * c.shape.ld;
  c.shared = size_t(fixed) + size_t(held) * sizeof(T);
  c.workspace_size = (c.rows - c.held) * c.shape.ld + (c.vectors_held ? 0 : vectors) + (c.system_held ? 0 : c.system);
  int64_t most = kMostBlocks;
#ifdef PYML_CUDA_EMULATION
  most = emulation::programs(most);
#endif
  c.blocks = c.workspace_size > 0 ? std::min(c.batch, most) : c.batch;
  return cudaSuccess;
}

}  // namespace

cudaError_t ot_cuda_layout(SinkhornCuda<float>& c, OtKernel kernel) { return lay_out(c, kernel); }
cudaError_t ot_cuda_layout(SinkhornCuda<double>& c, OtKernel kernel) { return lay_out(c, kernel); }

}  // namespace pyml
