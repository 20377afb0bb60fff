// B-spline family: plain parameter structs and the kernel signatures that every instruction set provides. No torch
// here.
//
// Words: order K (cubic = 3); `intervals` = knots - 1 = G + 2K; basis functions nb = G + K. Kernels address
// coefficients by padded row J + m, where J is the knot interval and m = 0..K: padded row p holds coefficient p - K,
// and the K rows on either side are zero. So no kernel has to test whether a basis function exists.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace pyml {

enum class Extrapolation { kZero, kClamp, kLinear };
enum class Base { kNone, kSilu, kRelu, kTanh, kIdentity };

// One row of knots, prepared: `table` holds the knots with K more on each side (so t_j is table[j + K]) and is readable
// up to kMinTable entries beyond its first K; [first, last] are the intervals that may be chosen.
constexpr int kMinTable = 32;
template <class T>
struct KnotRow {
  const T* table;
  T begin, end;         // zero mode: outside [begin, end) the basis is 0
  T low, high;          // clamp, linear: the inner interval [t_K, t_-K-1]
  T inverse_step;       // uniform grids: 1 / h
  int32_t first, last;  // first and last interval of positive width that may be chosen
  bool closed, empty;   // end belongs to the last interval; no interval has positive width
};

template <class T>
struct Spline {
  const KnotRow<T>* rows;  // one for each feature, or one shared
  int64_t row_step;        // 1, or 0 when shared
  int32_t knots;           // G + 2K + 1
  int32_t order;
  bool uniform;
  Extrapolation extrapolation;
  int32_t functions() const { return knots - order - 1; }
  int32_t padded() const { return knots - 1 + order; }  // padded coefficient rows
  int32_t table() const { return knots + 2 * order; }
  const KnotRow<T>& row(int64_t feature) const { return rows[feature * row_step]; }
};

// Features in one block of a backward over weights: with the split of the rows it fixes which partial sums exist, so it
// depends on nothing but the shape.
constexpr int64_t kKanBlock = 16;
constexpr int64_t kWkanBlock = 32;

// bspline_basis: out [rows, in, nb] (contiguous, T) = derivative-th derivative of the basis; with grad it is
// contracted, out [rows, in] = sum_b grad[.., b] * N_b^(derivative).
template <class T>
struct BsplineBasisParams {
  Spline<T> spline;
  int32_t derivative;
  Rows x;
  int64_t features;
  const T* grad;  // [rows, in, nb] or null
  T* out;
};

// kan_linear. `packed` is [tile][in][padded + 1][tile] (the last row of a feature is its base weight), made by
// kan_linear_pack_kernel.
template <class T>
struct KanLinearParams {
  Spline<T> spline;
  Base base;
  Rows x, y;  // forward; in the backward y is the gradient of the output
  Rows dx;    // backward, over rows
  int64_t features, outputs;
  const T* coeff;        // [out, in, nb]
  const T* base_weight;  // [out, in] or null
  T* packed;
  int64_t tile;  // outputs in a tile: 16, 32 or 64 floats, half as many doubles
  int64_t rows;
  bool want_x, want_weights;
  int64_t rows_per_split;  // backward: rows of one partial sum; a task is a split times kKanBlock features
  T* partial;              // [split][tile][in][padded + 1][tile]
  T *dcoeff, *dbase;       // [out, in, nb], [out, in] or null: what kan_linear_reduce_kernel makes of them
  int64_t blocks() const { return (features + kKanBlock - 1) / kKanBlock; }
  int64_t splits() const { return (rows + rows_per_split - 1) / rows_per_split; }
  int64_t packed_size() const { return tiles() * features * (spline.padded() + 1) * tile; }
  int64_t tiles() const { return (outputs + tile - 1) / tile; }
};

// wkan_linear and wkan_conv2d (its Rows are patches). `power` is [in][K + 1][power_ld()], the spline of each interval
// as a polynomial in u = (x - t_J) / width - 1/2, made by wkan_power_kernel.
template <class T>
struct WkanParams {
  Spline<T> spline;
  Base base;
  Rows x, y, dx;
  int64_t features, outputs, rows;
  const T* coeff;        // [in, nb]
  const T* base_weight;  // [out, in] or null
  const T* scaler;       // [out, in]
  T* power;
  // Backward: one task is one split of the rows times one block of features.
  bool want_x, want_weights;
  bool add_dx;    // wkan_conv2d: patches overlap, so dx (of dtype T, zeroed) is added to
  int64_t block;  // features in a block; wkan_conv2d: whole channels, so that no two tasks share a pixel of dx
  int64_t rows_per_split;
  T* partial;  // [split][in][partial_ld()]: gradients of scaler, base weight, moments of the coefficients
  int64_t blocks() const { return (features + block - 1) / block; }
  int64_t splits() const { return (rows + rows_per_split - 1) / rows_per_split; }
  int64_t power_ld() const { return spline.knots - 1 < kMinTable ? kMinTable : spline.knots - 1; }
  int64_t padded_outputs() const { return (outputs + 15) / 16 * 16; }
  int64_t partial_ld() const { return 2 * padded_outputs() + int64_t(spline.knots - 1) * (spline.order + 1); }
};

// Each kernel works on the range [begin, end) of what its comment names and uses `scratch`, whose size in elements the
// function <kernel>_scratch gives.
#define PYML_BSPLINE_KERNELS(T)                                                                                       \
  void bspline_basis_kernel(const BsplineBasisParams<T>&, int64_t begin, int64_t end);           /* rows */           \
  void kan_linear_pack_kernel(const KanLinearParams<T>&, int64_t begin, int64_t end);            /* features */       \
  void kan_linear_fwd_kernel(const KanLinearParams<T>&, int64_t begin, int64_t end, T* scratch); /* rows */           \
  void kan_linear_bwd_kernel(const KanLinearParams<T>&, int64_t begin, int64_t end, T* scratch); /* (split, block) */ \
  void kan_linear_reduce_kernel(const KanLinearParams<T>&, int64_t begin, int64_t end);          /* features */       \
  int64_t kan_linear_scratch(const KanLinearParams<T>&);                                                              \
  void wkan_power_kernel(const WkanParams<T>&, int64_t begin, int64_t end);           /* features */                  \
  void wkan_fwd_kernel(const WkanParams<T>&, int64_t begin, int64_t end, T* scratch); /* rows */                      \
  void wkan_bwd_kernel(const WkanParams<T>&, int64_t begin, int64_t end, T* scratch); /* (split, block) */            \
  int64_t wkan_scratch(const WkanParams<T>&);

#define PYML_BSPLINE_VARIANT(isa) \
  namespace isa {                 \
  PYML_BSPLINE_KERNELS(float)     \
  PYML_BSPLINE_KERNELS(double)    \
  }

PYML_BSPLINE_VARIANT(DEFAULT)
#if defined(__x86_64__)
PYML_BSPLINE_VARIANT(AVX2)
PYML_BSPLINE_VARIANT(AVX512)
#endif

}  // namespace pyml
