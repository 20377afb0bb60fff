// CUDA launchers of the B-spline family: plain structs, no torch. All tensors are contiguous.
#pragma once
#include <cstdint>

#include "bspline/bspline.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

// Where taps lie: tap f = (channel, tap row, tap column) of output pixel r lies at offset(r) +
// offset(f) in x. A linear layer is a convolution over images of one pixel.
struct PixelMap {
  int64_t pixels = 1, width = 1;              // output pixels of one image; of one row
  int64_t image = 0, step_h = 0, step_w = 0;  // elements between images, output rows, output columns
  int64_t taps = 1, kernel_w = 1;             // taps of one channel; of one kernel row
  int64_t plane = 1, tap_h = 0, tap_w = 0;    // elements between channels, kernel rows, kernel columns
};

// A convolution as its gradient of x sees it.
struct Conv2d {
  int64_t images = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
};

// One call. `dtype` is that of x, y, grad and dx; everything else is double when dtype is double, else float.
struct BsplineCuda {
  int64_t dtype = 0;                    // DType
  int64_t base = 0, extrapolation = 0;  // Base (kNone: no base branch), Extrapolation
  int64_t order = 3, derivative = 0;
  int64_t count = 0, grid_row = 0;           // knots in a row; elements between rows, 0 for one shared row
  int64_t rows = 0, features = 0, outs = 0;  // rows: of x, or output pixels of all images
  PixelMap map;
  Conv2d conv;
  const void* grid = nullptr;  // [in, count] or [count]
  const void* x = nullptr;
  const void* grad = nullptr;         // gradient of the output
  const void* coeff = nullptr;        // kan: [in, functions, out] (see kan_linear); wkan: [in, functions]
  const void* base_weight = nullptr;  // kan: [in, out]; wkan: [out, in]
  const void* scaler = nullptr;       // wkan: [out, in]
  void* y = nullptr;
  void* dx = nullptr;          // null: not wanted
  void* part_coeff = nullptr;  // [split, ...] sums of one part of the rows; null: not wanted
  void* part_base = nullptr;
  void* part_scaler = nullptr;
  int64_t split_count = 1, split_size = 0;  // from bspline_cuda_*_split
  int64_t functions() const { return count - order - 1; }
};

extern "C" {
// How many parts the sums over rows have, and of how many rows: depends on the shape alone.
void bspline_cuda_kan_split(const BsplineCuda* call, int64_t* count, int64_t* size);
void bspline_cuda_wkan_coeff_split(const BsplineCuda* call, int64_t* count, int64_t* size);
void bspline_cuda_wkan_weight_split(const BsplineCuda* call, int64_t* count, int64_t* size);

cudaError_t bspline_cuda_basis_fwd(const BsplineCuda* call, cudaStream_t stream);  // y [rows, in, functions]
cudaError_t bspline_cuda_basis_bwd(const BsplineCuda* call, cudaStream_t stream);  // dx, by `derivative` functions
cudaError_t bspline_cuda_kan_fwd(const BsplineCuda* call, cudaStream_t stream);    // y [rows, out]
cudaError_t bspline_cuda_kan_bwd_x(const BsplineCuda* call, cudaStream_t stream);  // dx [rows, in]
cudaError_t bspline_cuda_kan_bwd_coeff(const BsplineCuda* call,
                                       cudaStream_t stream);  // parts [out, in, functions], [out, in]
cudaError_t bspline_cuda_wkan_fwd(const BsplineCuda* call, cudaStream_t stream);  // y [images, out, pixels]
cudaError_t bspline_cuda_wkan_bwd_z(const BsplineCuda* call,
                                    cudaStream_t stream);  // dx (linear), parts [in, functions]
cudaError_t bspline_cuda_wkan_bwd_weight(const BsplineCuda* call, cudaStream_t stream);  // parts [out, in] twice
cudaError_t bspline_cuda_conv2d_bwd_x(const BsplineCuda* call, cudaStream_t stream);     // dx [images, channels, h, w]
}

}  // namespace pyml
