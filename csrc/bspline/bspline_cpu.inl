// CPU kernels of the B-spline family over ranges: raw pointers, no Tensor, no threads. Included once for each
// instruction set. bspline_basis is here; the layers are in kan_cpu.inl and wkan_cpu.inl.
#include "bspline/basis_cpu.h"
#include "bspline/bspline.h"
#include "common/gemm_cpu.h"
#include "common/rows_cpu.h"

#include "bspline/kan_cpu.inl"
#include "bspline/wkan_cpu.inl"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

// Bound by the store of nb numbers an input (and their load in the contracted form): rows in the lanes, so that one
// feature's knots serve the whole vector.
template <class T>
void basis_rows(const BasisParams<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const Spline<T>& s = p.spline;
  const int nb = s.functions(), K = s.order;
  for (int64_t r0 = begin; r0 < end; r0 += L) {
    const int n = int(end - r0 < L ? end - r0 : L);
    for (int64_t i = 0; i < p.features; ++i) {
      T x[L], value[6][L];
      Int<T> interval[L];
      load_columns<T>(p.x, r0, n, i, 1, x, L);
      Vec<T> N[6];
      store_int<T>(interval, basis_derivative<T>(s, s.row(i), load<T>(x), p.derivative, N));
      for (int m = 0; m <= K; ++m) store<T>(value[m], N[m]);
      for (int l = 0; l < n; ++l) {
        const int64_t at = (r0 + l) * p.features + i;
        const int first = int(interval[l]) - K;
        if (p.grad) {
          T total = 0;
          for (int m = 0; m <= K; ++m)
            if (first + m >= 0 && first + m < nb) total += value[m][l] * p.grad[at * nb + first + m];
          p.out[at] = total;
        } else {
          T* out = p.out + at * nb;
          for (int b = 0; b < nb; ++b) out[b] = x[l] != x[l] ? x[l] : T(0);
          for (int m = 0; m <= K; ++m)
            if (first + m >= 0 && first + m < nb) out[first + m] = value[m][l];
        }
      }
    }
  }
}

}  // namespace

#define PYML_BSPLINE_DEFINE(T)                                                                                      \
  void basis_kernel(const BasisParams<T>& p, int64_t begin, int64_t end) { basis_rows<T>(p, begin, end); }          \
  void kan_pack_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end) { kan_pack<T>(p, begin, end); }     \
  void kan_linear_fwd_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {                 \
    kan_fwd<T>(p, begin, end, scratch);                                                                             \
  }                                                                                                                 \
  void kan_linear_bwd_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end, T* scratch) {                 \
    kan_bwd<T>(p, begin, end, scratch);                                                                             \
  }                                                                                                                 \
  void kan_reduce_kernel(const KanLinearParams<T>& p, int64_t begin, int64_t end) { kan_reduce<T>(p, begin, end); } \
  int64_t kan_linear_scratch(const KanLinearParams<T>& p) { return kan_scratch<T>(p); }                             \
  void wkan_power_kernel(const WkanParams<T>& p, int64_t begin, int64_t end) { wkan_power<T>(p, begin, end); }      \
  void wkan_fwd_kernel(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {                            \
    wkan_fwd<T>(p, begin, end, scratch);                                                                            \
  }                                                                                                                 \
  void wkan_bwd_kernel(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {                            \
    wkan_bwd<T>(p, begin, end, scratch);                                                                            \
  }                                                                                                                 \
  int64_t wkan_scratch(const WkanParams<T>& p) { return wkan_scratch_size<T>(p); }

PYML_BSPLINE_DEFINE(float)
PYML_BSPLINE_DEFINE(double)

}  // namespace CPU_CAPABILITY
}  // namespace pyml
