// clip_sum over blocks of kClipBlock elements, of some samples at a time: their norms, then, while they are in the
// cache, their weighted sum. Bound by memory: each gradient comes from it once where the samples of a call stay in the
// cache.
#pragma once
#include "hetero_noise/scale_cpu.h"

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

  // Doubles from T.
  static PYML_INLINE Vec<double> in_double(const T* from) {
    if constexpr (sizeof(T) == 8) {
      return load<double>(from);
    } else {
      typedef float Half __attribute__((vector_size(kVecBytes / 2)));
      Half half;
      std::memcpy(&half, from, sizeof half);
      return __builtin_convertvector(half, Vec<double>);
    }
  }

  // Squares of some samples at once, to out[0], out[stride], ...: several streams from memory overlap their waits,
  // which takes a third off the time of one (and fetching ahead a tenth). In double: squares of large gradients do not
  // overflow. The order within a sample is the same for any number of samples and threads.
  template <int kSamples, bool kWhitened>
  void squares(const T* const* g, const double* inverse, double* out, int64_t stride) const {
    constexpr int kSums = 32, kParts = kSums / kLanes<double>, kLine = 64 / int(sizeof(T)), kAhead = 512;
    Vec<double> part[kSamples][kParts] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
#pragma GCC unroll 4
      for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 4
        for (int k = 0; k < kSums; k += kLine) __builtin_prefetch(g[s] + i + k + kAhead);
#pragma GCC unroll 16
        for (int k = 0; k < kParts; ++k) {
          Vec<double> x = in_double(g[s] + i + k * kLanes<double>);
          if (kWhitened) {
            const Vec<double> w = load<double>(inverse + i + k * kLanes<double>);
            x = w == 0 ? Vec<double>{} : x * w;  // not 0 times a NaN
          }
          part[s][k] += x * x;
        }
      }
    }
    for (int s = 0; s < kSamples; ++s) {
      double sums[kSums];
      std::memcpy(sums, part[s], sizeof sums);
      for (int64_t j = i; j < n; ++j) {
        const double x = !kWhitened ? double(g[s][j]) : inverse[j] == 0 ? 0.0 : double(g[s][j]) * inverse[j];
        sums[j - i] += x * x;
      }
      for (int half = kSums / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
      out[s * stride] = sums[0];
    }
  }

  template <bool kWhitened>
  void squares_of_all(T* memory, const double* inverse, double* out, int64_t stride) const {
    constexpr int kAtOnce = kRegisters >= 32 ? 4 : 1;  // all sums stay in registers
    const T* g[4];
    int64_t b = 0;
    for (; b + kAtOnce <= p.samples; b += kAtOnce) {
      for (int s = 0; s < kAtOnce; ++s) g[s] = sample(p.first + b + s, memory + s * kClipBlock);
      squares<kAtOnce, kWhitened>(g, inverse, out + b * stride, stride);
    }
    for (; b < p.samples; ++b) {
      g[0] = sample(p.first + b, memory);
      squares<1, kWhitened>(g, inverse, out + b * stride, stride);
    }
  }

  void norms(T* memory, double* out, int64_t stride) const {
    if (t.scale.kind == ScaleKind::kNone) return squares_of_all<false>(memory, nullptr, out, stride);
    double* inverse =
        reinterpret_cast<double*>(memory) + kAdded * kClipBlock;  // in double: one of a tiny scale is finite
    gather_scale(t, t.scale, i0, n, memory);
    for (int64_t i = 0; i < n; ++i) inverse[i] = memory[i] == 0 ? 0.0 : 1.0 / double(memory[i]);
    squares_of_all<true>(memory, inverse, out, stride);
  }

  // The weighted sum, kAdded samples at once: so the sum is read and written less often.
  static constexpr int kAdded = 8;
  void sums(T* memory) const {
    T* sum = static_cast<T*>(t.sum) + i0;
    const T* g[kAdded];
    T c[kAdded];
    int held = 0;
    for (int64_t b = 0; b < p.samples; ++b) {
      const double factor = p.factors[b * p.groups + t.group];
      if (factor < 0) continue;  // a bad sample
      g[held] = sample(p.first + b, memory + held * kClipBlock);
      c[held] = T(factor);
      if (++held == kAdded) added<kAdded>(sum, g, c), held = 0;
    }
    int done = 0;
    for (; done + 4 <= held; done += 4) added<4>(sum, g + done, c + done);
    for (; done < held; ++done) added<1>(sum, g + done, c + done);
    if (t.scale.kind == ScaleKind::kNone || !p.last) return;
    gather_scale(t, t.scale, i0, n, memory);
    for (int64_t i = 0; i < n; ++i) sum[i] = memory[i] == 0 ? T(0) : sum[i];
  }

  // One sample after the other into each element, so that no bit depends on how many are added at once.
  template <int kSamples>
  PYML_INLINE void added(T* __restrict sum, const T* const* g, const T* c) const {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      Vec<T> s = load<T>(sum + i);
#pragma GCC unroll 8
      for (int k = 0; k < kSamples; ++k) s += splat<T>(c[k]) * load<T>(g[k] + i);
      store<T>(sum + i, s);
    }
    for (; i < n; ++i)
      for (int k = 0; k < kSamples; ++k) sum[i] += c[k] * g[k][i];
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace pyml
