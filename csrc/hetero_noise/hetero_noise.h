// Noise of any shape of scale, and clipped sums of per-sample gradients: plain structs and the kernel signatures that
// every instruction set provides. No torch here.
//
// Elements have numbers and belong to blocks of Philox counters. The noise of a block is made at once, so kernels run
// over blocks; a shard may begin and end inside of one.
#pragma once
#include <cstdint>

#include "common/philox.h"
#include "common/strided.h"

namespace pyml {

// Elements of a tensor that clip_sum takes at a time: what is held of them stays in the first-level cache.
constexpr int64_t kClipBlock = 2048;

// What multiplies the noise, or divides a gradient: a number, a tensor like the elements, or factors of rows and
// columns, where element e has row e / columns.
enum class ScaleKind : int { kNone, kNumber, kElements, kFactors };
struct Scale {
  ScaleKind kind = ScaleKind::kNone;
  double number = 1;
  Strided elements;
  Strided row, column;  // strides[0] alone
  int64_t columns = 1;
};

enum class NoiseMode : int {
  kAdd,      // out = (in + s z) * factor
  kStep,     // out = base + factor * (in + s z)
  kProduct,  // out = in * (s z): the gradient of the scale
};

struct NoiseTensor : Elements {
  int64_t first;  // number of the first element
  uint32_t id;    // of the tensor
  int64_t begin;  // blocks of the tensors before it
  bool wide;      // computes in double
  Strided in, out, base;
  Scale scale;

  int64_t first_block() const { return first / kPhiloxBlock; }
  int64_t blocks() const { return count == 0 ? 0 : (first + count - 1) / kPhiloxBlock - first_block() + 1; }
};

struct NoiseParams {
  NoiseMode mode;
  uint64_t key;
  uint32_t step;
  double std, factor;
  const NoiseTensor* tensors;
  int64_t tensor_count;
};

struct ClipTensor : Elements {
  int64_t batch_stride;
  int group;
  bool wide;      // computes in double
  int64_t begin;  // kClipBlocks of the tensors before it
  Strided grad;   // of the first sample
  Scale scale;
  void* sum;  // contiguous, in the compute type
  int64_t blocks() const { return (count + kClipBlock - 1) / kClipBlock; }
};

struct ClipParams {
  int64_t first, samples;  // those of this call
  bool last;               // no more samples follow: elements of scale 0 become 0
  const ClipTensor* tensors;
  int64_t tensor_count, blocks;
  double* squares;        // [samples, blocks]: of g / scale
  const double* factors;  // [samples, groups]; below 0: a bad sample
  int groups;
};

#define PYML_DECLARE_HETERO_NOISE(ISA)                                                     \
  namespace ISA {                                                                          \
  void hetero_noise_kernel(const NoiseParams& p, int64_t begin, int64_t end);              \
  void clip_norm_kernel(const ClipParams& p, int64_t begin, int64_t end, double* scratch); \
  void clip_sum_kernel(const ClipParams& p, int64_t begin, int64_t end, double* scratch);  \
  }
PYML_DECLARE_HETERO_NOISE(DEFAULT)
PYML_DECLARE_HETERO_NOISE(AVX2)
PYML_DECLARE_HETERO_NOISE(AVX512)

constexpr int64_t kClipScratch = 9 * kClipBlock;  // doubles that the clip kernels want: eight samples and a scale

}  // namespace pyml
