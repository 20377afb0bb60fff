// CPU kernels of the B-spline family over ranges: raw pointers, no Tensor, no threads. Included once for each
// instruction set. bspline_basis is in basis_rows_cpu.h, the layers are in kan_cpu.inl and wkan_cpu.inl.
#include "bspline/basis_cpu.h"
#include "bspline/basis_rows_cpu.h"
#include "bspline/bspline.h"
#include "common/gemm_cpu.h"
#include "common/rows_cpu.h"

#include "bspline/kan_cpu.inl"
#include "bspline/wkan_cpu.inl"

namespace pyml {
namespace CPU_CAPABILITY {

#define PYML_BSPLINE_DEFINE(T)                                                                                         \
  void bspline_basis_kernel(const BsplineBasisParams<T>& p, int64_t begin, int64_t end) {                              \
    by_order(p.spline.order, [&](auto order) { basis_rows<T, decltype(order)::value>(p, begin, end); });               \
  }                                                                                                                    \
  void kan_linear_pack_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end) { kan_pack<T>(p, begin, end); } \
  void kan_linear_fwd_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {                    \
    kan_fwd<T>(p, begin, end, scratch);                                                                                \
  }                                                                                                                    \
  void kan_linear_bwd_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {                    \
    kan_bwd<T>(p, begin, end, scratch);                                                                                \
  }                                                                                                                    \
  void kan_linear_reduce_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end) {                             \
    kan_reduce<T>(p, begin, end);                                                                                      \
  }                                                                                                                    \
  int64_t kan_linear_scratch(const KanLinearParams<T>& p) { return kan_scratch<T>(p); }                                \
  void wkan_power_kernel(const WkanParams<T>& p, int64_t begin, int64_t end) { wkan_power<T>(p, begin, end); }         \
  void wkan_fwd_kernel(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {                               \
    wkan_fwd<T>(p, begin, end, scratch);                                                                               \
  }                                                                                                                    \
  void wkan_bwd_kernel(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {                               \
    wkan_bwd<T>(p, begin, end, scratch);                                                                               \
  }                                                                                                                    \
  int64_t wkan_scratch(const WkanParams<T>& p) { return wkan_scratch_size<T>(p); }

PYML_BSPLINE_DEFINE(float)
PYML_BSPLINE_DEFINE(double)

}  // namespace CPU_CAPABILITY
}  // namespace pyml
