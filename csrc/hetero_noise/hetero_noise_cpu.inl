// CPU kernels of hetero_noise over ranges of blocks: raw pointers, no Tensor, no threads. Included once for each
// instruction set.
#include "hetero_noise/clip_cpu.h"
#include "hetero_noise/noise_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

// f(tensor, block of it) for the blocks [begin, end) of all tensors; runs of one tensor at once.
template <class Tensor, class F>
inline void by_tensor(const Tensor* tensors, int64_t count, int64_t begin, int64_t end, F&& f) {
  for (const Tensor* t = tensor_of(tensors, count, begin); begin < end; ++t) {
    const int64_t limit = t->begin + t->blocks(), next = limit < end ? limit : end;
    if (next > begin) f(*t, begin, next);
    begin = next > begin ? next : begin;
  }
}

void hetero_noise_kernel(const NoiseParams& p, int64_t begin, int64_t end) {
  by_tensor(p.tensors, p.tensor_count, begin, end,
            [&](const NoiseTensor& t, int64_t from, int64_t to) { noise_blocks(p, t, from - t.begin, to - t.begin); });
}

// Normals in registers only: what generating them alone takes, for the benchmarks (common/machine.cpp).
constexpr int64_t kMachineGroups = 4096;
float machine_normals_block(float seed) {
  const Source from(uint64_t(seed), 0, 1, 2);
  F32 total = {};
  for (int64_t group = 0; group < kMachineGroups; group += 2) {
    F32 z[8];
    normals<2>(from, group, z);
    for (const F32& each : z) total += each;
  }
  return sum<float>(total);
}
double machine_normals_count() { return 4.0 * kFloats * kMachineGroups; }

// f(the block of a tensor, in its compute type, and scratch of that type).
template <class F>
inline void by_clip_block(const ClipParams& p, int64_t begin, int64_t end, double* scratch, F&& f) {
  by_tensor(p.tensors, p.tensor_count, begin, end, [&](const ClipTensor& t, int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block)
      t.wide ? f(Clip<double>(p, t, block), scratch, block)
             : f(Clip<float>(p, t, block), reinterpret_cast<float*>(scratch), block);
  });
}
void clip_norm_kernel(const ClipParams& p, int64_t begin, int64_t end, double* scratch) {
  by_clip_block(p, begin, end, scratch, [&](const auto& clip, auto* memory, int64_t block) {
    clip.norms(memory, p.squares + block, p.blocks);
  });
}
void clip_sum_kernel(const ClipParams& p, int64_t begin, int64_t end, double* scratch) {
  by_clip_block(p, begin, end, scratch, [&](const auto& clip, auto* memory, int64_t) { clip.sums(memory); });
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
