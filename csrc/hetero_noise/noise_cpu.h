// hetero_noise over blocks of 64 elements. Bound by the arithmetic of the normals, which is about nine tenths of it;
// the elements stream by.
#pragma once
#include "hetero_noise/normal_cpu.h"
#include "hetero_noise/scale_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

// Elements between what is asked for and what is worked on: the core looks only two blocks ahead by itself, less than
// memory takes. A fifth of the time where tensors come from memory.
constexpr int64_t kAhead = 1024;

template <NoiseMode kMode>
PYML_INLINE F32 changed(F32 in, F32 s, F32 z, F32 base, F32 factor) {
  if constexpr (kMode == NoiseMode::kAdd)
    return once(s, z, in) * factor;
  else if constexpr (kMode == NoiseMode::kStep)
    return once(factor, once(s, z, in), base);
  else
    return in * (s * z);
}

// Whole blocks [begin, end) of float tensors without gaps. prepare(i0, blocks) comes before blocks that begin with
// element i0, scale(i) gives std * scale of the elements from i on.
template <NoiseMode kMode, class Prepare, class ScaleOf>
PYML_INLINE void whole_blocks(const NoiseParams& p, const NoiseTensor& t, int64_t begin, int64_t end,
                              const Prepare& prepare, const ScaleOf& scale) {
  const Source from(p.key, begin, t.id, p.step);
  const F32 factor = splat<float>(float(p.factor));
  const float *in = static_cast<const float*>(t.in.data), *base = static_cast<const float*>(t.base.data);
  float* out = static_cast<float*>(t.out.data);
  const auto groups = [&](int64_t at, auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    const int64_t first = Group(at).block * kPhiloxBlock - t.first;
    if (Group(at).lane == 0) prepare(first, (kCount + kGroups - 1) / kGroups);
    F32 z[4 * kCount];
    normals<kCount>(from, at, z);
#pragma GCC unroll 8
    for (int n = 0; n < 4 * kCount; ++n) {
      const Group g(at + n / 4);
      const int64_t i = g.block * kPhiloxBlock - t.first + 16 * (n % 4) + g.lane;
      __builtin_prefetch(in + i + kAhead);
      if (kMode == NoiseMode::kStep) __builtin_prefetch(base + i + kAhead);
      const F32 old = kMode == NoiseMode::kStep ? load<float>(base + i) : F32{};
      store<float>(out + i, changed<kMode>(load<float>(in + i), scale(i), z[n], old, factor));
    }
  };
  int64_t at = begin * kGroups;
  for (; at + 2 <= end * kGroups; at += 2) groups(at, std::integral_constant<int, 2>());
  if (at < end * kGroups) groups(at, std::integral_constant<int, 1>());
}

// The same for any dtype, stride and scale, and for parts of a block.
template <class T>
inline void part_of_block(const NoiseParams& p, const NoiseTensor& t, int64_t block) {
  const int64_t start = block * kPhiloxBlock;
  const int64_t from = start > t.first ? start : t.first;
  const int64_t last = start + kPhiloxBlock, limit = t.first + t.count, to = last < limit ? last : limit;
  const int64_t i0 = from - t.first, n = to - from;
  alignas(64) T z[kPhiloxBlock], in[kPhiloxBlock], s[kPhiloxBlock], base[kPhiloxBlock];
  if constexpr (std::is_same_v<T, float>) {
    const Source source(p.key, block, t.id, p.step);
    for (int64_t g = 0; g < kGroups; ++g) {
      F32 four[4];
      normals<1>(source, block * kGroups + g, four);
      for (int j = 0; j < 4; ++j) store<float>(z + 16 * j + g * kFloats, four[j]);
    }
  } else {
    for (int lane = 0; lane < 16; ++lane) {
      double four[4];
      four_normals<double>(p.key, block, lane, t.id, p.step, four);
      for (int j = 0; j < 4; ++j) z[16 * j + lane] = four[j];
    }
  }
  const T* noise = z + (from - start);
  gather(t, t.in, i0, n, in);
  if (p.mode == NoiseMode::kStep) gather(t, t.base, i0, n, base);
  gather_scale(t, t.scale, i0, n, s);
  const T std = T(p.std), factor = T(p.factor);
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = s[i] * std;
    if (p.mode == NoiseMode::kAdd)
      in[i] = std::fma(scaled, noise[i], in[i]) * factor;
    else if (p.mode == NoiseMode::kStep)
      in[i] = std::fma(factor, std::fma(scaled, noise[i], in[i]), base[i]);
    else
      in[i] *= scaled * noise[i];
  }
  scatter(t, t.out, i0, n, in);
}

template <NoiseMode kMode>
inline void fast_blocks(const NoiseParams& p, const NoiseTensor& t, int64_t begin, int64_t end) {
  const F32 std = splat<float>(float(p.std)), number = splat<float>(float(t.scale.number)) * std;
  const auto nothing = [](int64_t, int) {};
  if (t.scale.kind == ScaleKind::kNumber) {
    whole_blocks<kMode>(p, t, begin, end, nothing, [&](int64_t) { return number; });
  } else if (t.scale.kind == ScaleKind::kElements) {
    const float* s = static_cast<const float*>(t.scale.elements.data);
    whole_blocks<kMode>(p, t, begin, end, nothing, [&](int64_t i) {
      __builtin_prefetch(s + i + kAhead);
      return load<float>(s + i) * std;
    });
  } else {
    alignas(64) float s[2 * kPhiloxBlock];
    int64_t from = 0;
    whole_blocks<kMode>(
        p, t, begin, end,
        [&](int64_t i0, int blocks) {
          from = i0;
          gather_scale(t, t.scale, i0, blocks * kPhiloxBlock, s);
        },
        [&](int64_t i) { return load<float>(s + (i - from)) * std; });
  }
}

// Blocks [begin, end) of one tensor, counted from its own first.
inline void noise_blocks(const NoiseParams& p, const NoiseTensor& t, int64_t begin, int64_t end) {
  const int64_t first = t.first_block();
  begin += first, end += first;
  const bool steps = p.mode == NoiseMode::kStep;
  const bool fast = !t.wide && direct<float>(t, t.in, 0) && direct<float>(t, t.out, 0) &&
                    (!steps || direct<float>(t, t.base, 0)) &&
                    (t.scale.kind != ScaleKind::kElements || direct<float>(t, t.scale.elements, 0));
  // Counters whose upper word differs need another stream: that is every 2^28 blocks.
  for (int64_t next; begin < end; begin = next) {
    next = ((begin >> 28) + 1) << 28;
    next = next < end ? next : end;
    int64_t low = begin, high = next;
    if (low * kPhiloxBlock < t.first) ++low;
    if (high * kPhiloxBlock > t.first + t.count) --high;
    if (!fast || low >= high) low = high = next;
    auto parts = [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; ++block)
        t.wide ? part_of_block<double>(p, t, block) : part_of_block<float>(p, t, block);
    };
    parts(begin, low);
    if (low < high) {
      if (p.mode == NoiseMode::kAdd)
        fast_blocks<NoiseMode::kAdd>(p, t, low, high);
      else if (steps)
        fast_blocks<NoiseMode::kStep>(p, t, low, high);
      else
        fast_blocks<NoiseMode::kProduct>(p, t, low, high);
    }
    parts(high, next);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
