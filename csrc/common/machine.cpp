// torch.ops.pyml.machine_fma, machine_exp, machine_normals: arithmetic ceilings of this machine, for the benchmarks
// (benchmarks/ceilings.py).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "common/cpu_isa.h"

namespace pyml {

#define PYML_MACHINE(isa)             \
  namespace isa {                     \
  float machine_fma_block(float);     \
  double machine_fma_flops();         \
  float machine_exp_block(float);     \
  double machine_exp_count();         \
  float machine_normals_block(float); \
  double machine_normals_count();     \
  }
PYML_MACHINE(DEFAULT)
#if defined(__x86_64__)
PYML_MACHINE(AVX2)
PYML_MACHINE(AVX512)
#endif

namespace {

std::atomic<float> sink{0};  // results end here, or a compiler could drop the loops

// Runs `repeats` blocks on every thread of torch's pool and returns how many operations that was.
double on_every_thread(int64_t repeats, float (*block)(float), double operations) {
  TORCH_CHECK(repeats >= 1, "machine: repeats: expected an integer >= 1, got ", repeats);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    float total = 0;
    for (int64_t n = begin; n < end; ++n)
      for (int64_t r = 0; r < repeats; ++r) total += block(float(r & 7));
    sink.store(total, std::memory_order_relaxed);
  });
  return operations * double(threads) * double(repeats);
}

float fma_block(float seed) { return PYML_CALL_ISA(machine_fma_block, seed); }
float exp_block(float seed) { return PYML_CALL_ISA(machine_exp_block, seed); }
float normals_block(float seed) { return PYML_CALL_ISA(machine_normals_block, seed); }
double machine_fma(int64_t repeats) { return on_every_thread(repeats, fma_block, PYML_CALL_ISA(machine_fma_flops)); }
double machine_exp(int64_t repeats) { return on_every_thread(repeats, exp_block, PYML_CALL_ISA(machine_exp_count)); }
double machine_normals(int64_t repeats) {
  return on_every_thread(repeats, normals_block, PYML_CALL_ISA(machine_normals_count));
}

}  // namespace
}  // namespace pyml

TORCH_LIBRARY_FRAGMENT(pyml, m) {
  m.def("machine_fma(int repeats) -> float", &pyml::machine_fma);
  m.def("machine_exp(int repeats) -> float", &pyml::machine_exp);
  m.def("machine_normals(int repeats) -> float", &pyml::machine_normals);
}
