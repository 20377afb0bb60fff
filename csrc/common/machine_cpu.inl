// What the arithmetic units of one core can do, in registers only: the ceilings that benchmarks are measured against.
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

// One block of fused multiply-adds on as many independent accumulators as hide the latency: returns a value that
// depends on all of them, so that nothing can be left out.
float machine_fma_block(float seed) {
  constexpr int kChains = kRegisters - 4;
  Vec<float> a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = splat<float>(seed + float(i));
  const Vec<float> scale = splat<float>(0.999f), add = splat<float>(0.001f);
  for (int step = 0; step < 4096; ++step)
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) a[i] = a[i] * scale + add;
  Vec<float> total = a[0];
  for (int i = 1; i < kChains; ++i) total += a[i];
  return sum<float>(total);
}
double machine_fma_flops() { return 2.0 * 4096 * (kRegisters - 4) * kLanes<float>; }

// Exponentials as the kernels compute them (common/vec.h), enough in flight to hide their latency.
float machine_exp_block(float seed) {
  constexpr int kChains = kRegisters / 4;
  Vec<float> a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = splat<float>(-0.1f * seed - 0.1f * float(i));
  for (int step = 0; step < 4096; ++step)
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) a[i] = exp<float>(-a[i]);
  Vec<float> total = a[0];
  for (int i = 1; i < kChains; ++i) total += a[i];
  return sum<float>(total);
}
double machine_exp_count() { return 4096.0 * (kRegisters / 4) * kLanes<float>; }

}  // namespace CPU_CAPABILITY
}  // namespace pyml
