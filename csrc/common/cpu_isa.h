// Picks, once, which of the instruction-set variants of the CPU kernels runs. PYML_CPU_ISA=default|avx2|avx512 forces a
// smaller one (tests run all of them); more than the machine has means the best that it has.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyml {

enum class Isa { kDefault, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) noexcept {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default";
}

// The value of PYML_CPU_ISA where it names no variant, else null. The import says so: a misspelt one would time or test
// another variant than its user thinks.
inline const char* unknown_isa() noexcept {
  const char* forced = std::getenv("PYML_CPU_ISA");
  if (!forced || !*forced) return nullptr;
  for (Isa isa : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512})
    if (std::strcmp(forced, isa_name(isa)) == 0) return nullptr;
  return forced;
}

inline Isa detect_isa() noexcept {
  Isa best = Isa::kDefault;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  best = avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kDefault;
#endif
  if (const char* forced = std::getenv("PYML_CPU_ISA")) {
    if (std::strcmp(forced, "default") == 0) return Isa::kDefault;
    if (std::strcmp(forced, "avx2") == 0 && best != Isa::kDefault) return Isa::kAvx2;
  }
  return best;
}

inline Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace pyml

// Calls the variant of a kernel for this machine: every CPU kernel exists in three namespaces named after at::vec's
// CPU_CAPABILITY. On other architectures only DEFAULT is built.
#if defined(__x86_64__)
#define PYML_CALL_ISA(kernel, ...)                                                 \
  (::pyml::cpu_isa() == ::pyml::Isa::kAvx512 ? ::pyml::AVX512::kernel(__VA_ARGS__) \
   : ::pyml::cpu_isa() == ::pyml::Isa::kAvx2 ? ::pyml::AVX2::kernel(__VA_ARGS__)   \
                                             : ::pyml::DEFAULT::kernel(__VA_ARGS__))
#else
#define PYML_CALL_ISA(kernel, ...) ::pyml::DEFAULT::kernel(__VA_ARGS__)
#endif
