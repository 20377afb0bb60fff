// Noise and clipped sums on NVIDIA GPUs: plain parameter structs and launchers, no torch. Tables of tensors travel as
// launch arguments, so that nothing is copied before a launch; longer lists take several.
#pragma once
#include <cstdint>

#include "hetero_noise/hetero_noise.h"

#ifdef PYML_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyml {

constexpr int kNoiseTable = 30;  // launch arguments have 4 KiB

struct FlatScale {
  ScaleKind kind = ScaleKind::kNone;
  bool one;       // kElements: the same element for all
  Flat elements;  // or the factors of the rows
  Flat column;
  int64_t columns = 1;
};

// All float32, at multiples of 16 bytes and without factors; some double, so computed in double; or anything else.
enum class NoiseTypes { kFloats, kDoubles, kMixed };
constexpr int kNoiseTypes = 3;

struct NoiseCudaTensor {
  Flat in, out, base;
  FlatScale scale;
  int64_t count, first, begin;  // begin: blocks of the tensors before it in this table
  uint32_t id;
};
struct NoiseCuda {
  NoiseMode mode;
  const int64_t* key;
  uint32_t step;
  double std, factor;
  int count;
  int64_t blocks;
  NoiseCudaTensor tensors[kNoiseTable];
};

struct ClipCudaTensor {
  Flat grad;  // of the first sample
  FlatScale scale;
  Flat sum;
  int64_t count, batch_stride, begin;  // begin: clip blocks of the tensors before it, in all tables
  int group;
};
struct ClipCuda {
  int64_t samples, blocks;  // blocks: of all tensors, also those of other tables
  double* squares;          // [samples, blocks]
  int count;
  int64_t first_block, table_blocks;  // those of this table
  int groups;
  const double* factors;  // [samples, groups]; below 0: a bad sample
  ClipCudaTensor tensors[kNoiseTable];
};

static_assert(sizeof(NoiseCuda) <= 4096 && sizeof(ClipCuda) <= 4096, "launch arguments have 4 KiB");

}  // namespace pyml

extern "C" {
cudaError_t pyml_cuda_hetero_noise(const pyml::NoiseCuda* p, pyml::NoiseTypes types, cudaStream_t stream);
cudaError_t pyml_cuda_clip_norm(const pyml::ClipCuda* p, cudaStream_t stream);
cudaError_t pyml_cuda_clip_sum(const pyml::ClipCuda* p, cudaStream_t stream);
}
