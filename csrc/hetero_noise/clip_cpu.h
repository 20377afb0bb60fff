// clip_sum over blocks of kClipBlock elements, of some samples at a time: their norms, then, while they are in the
// cache, their weighted sum. Bound by memory: each gradient comes from it once where the samples of a call stay in the
// cache.
#pragma once
#include "hetero_noise/strided_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
struct Clip {
  const ClipParams& p;
  const ClipTensor& t;
  const int64_t i0, n;

  Clip(const ClipParams& p, const ClipTensor& t, int64_t block)
      : p(p), t(t), i0((block - t.begin) * kClipBlock), n(t.count - i0 < kClipBlock ? t.count - i0 : kClipBlock) {}

  // This block of a sample: where it lies, or a copy of it.
  const T* sample(int64_t b, T* memory) const {
    Strided at = t.grad;
    by_dtype(at.dtype, [&](auto tag) { at.data = static_cast<decltype(tag)*>(at.data) + b * t.batch_stride; });
    if (const T* there = direct<T>(t, at, i0)) return there;
    gather(t, at, i0, n, memory);
    return memory;
  }

  // Sums in double: squares of large gradients do not overflow, and the order is the same for every number of threads.
  template <class Value>
  static double squares(int64_t n, const Value& value) {
    constexpr int kSums = 32;
    double part[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
      for (int k = 0; k < kSums; ++k) part[k] += value(i + k) * value(i + k);
    for (int k = 0; i < n; ++i, ++k) part[k] += value(i) * value(i);
    double total = 0;
    for (double x : part) total += x;
    return total;
  }

  void norms(T* memory, double* out, int64_t stride) const {
    double* inverse = reinterpret_cast<double*>(memory) + 2 * kClipBlock;  // in double: one of a tiny scale is finite
    const bool whitened = t.scale.kind != ScaleKind::kNone;
    if (whitened) {
      gather_scale(t, t.scale, i0, n, memory);
      for (int64_t i = 0; i < n; ++i) inverse[i] = memory[i] == 0 ? 0.0 : 1.0 / double(memory[i]);
    }
    for (int64_t b = 0; b < p.samples; ++b) {
      const T* g = sample(p.first + b, memory);
      if (whitened)
        out[b * stride] = squares(n, [&](int64_t i) { return inverse[i] == 0 ? 0.0 : double(g[i]) * inverse[i]; });
      else
        out[b * stride] = squares(n, [&](int64_t i) { return double(g[i]); });
    }
  }

  void sums(T* memory) const {
    T* sum = static_cast<T*>(t.sum) + i0;
    const T* g[4];
    T c[4];
    int held = 0;
    auto add = [&] {
      switch (held) {
        case 4:
          return added<4>(sum, g, c);
        case 3:
          return added<3>(sum, g, c);
        case 2:
          return added<2>(sum, g, c);
        case 1:
          return added<1>(sum, g, c);
      }
    };
    for (int64_t b = 0; b < p.samples; ++b) {
      const double factor = p.factors[b * p.groups + t.group];
      if (factor < 0) continue;  // a bad sample
      g[held] = sample(p.first + b, memory + held * kClipBlock);
      c[held] = T(factor);
      if (++held == 4) add(), held = 0;
    }
    add();
    if (t.scale.kind == ScaleKind::kNone) return;
    gather_scale(t, t.scale, i0, n, memory);
    for (int64_t i = 0; i < n; ++i) sum[i] = memory[i] == 0 ? T(0) : sum[i];
  }

  // One sample after the other into each element, so that no bit depends on how many are added at once.
  template <int kSamples>
  PYML_INLINE void added(T* __restrict sum, const T* const* g, const T* c) const {
    const T *g0 = g[0], *g1 = kSamples > 1 ? g[1] : g0, *g2 = kSamples > 2 ? g[2] : g0, *g3 = kSamples > 3 ? g[3] : g0;
    const T c0 = c[0], c1 = c[kSamples > 1 ? 1 : 0], c2 = c[kSamples > 2 ? 2 : 0], c3 = c[kSamples > 3 ? 3 : 0];
    for (int64_t i = 0; i < n; ++i) {
      T s = sum[i] + c0 * g0[i];
      if (kSamples > 1) s += c1 * g1[i];
      if (kSamples > 2) s += c2 * g2[i];
      if (kSamples > 3) s += c3 * g3[i];
      sum[i] = s;
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
