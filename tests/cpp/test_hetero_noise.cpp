// Noise and clipped sums against plain loops, on exactly sized memory: for the sanitizers.
#include <cmath>

#include "common/cpu_isa.h"
#include "hetero_noise/hetero_noise.h"
#include "hetero_noise/normal.h"
#include "setup.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

void expect(const char* what, int64_t at, double got, double truth, double bound) {
  ++checks;
  if (std::isnan(truth) ? std::isnan(got) : std::abs(got - truth) <= bound) return;
  if (++failures <= 20) std::printf("FAILED %s at %d: got %.9g, expected %.9g\n", what, int(at), got, truth);
}

void known_answers() {
  const Words zero = philox(0, 0, 0, 0, 0), ones = philox(~0ull, ~0u, ~0u, ~0u, ~0u);
  const uint32_t of_zero[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  const uint32_t of_ones[4] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
  for (int i = 0; i < 4; ++i) {
    expect("philox", i, zero.w[i], of_zero[i], 0);
    expect("philox", i, ones.w[i], of_ones[i], 0);
  }
  expect("largest normal", 0, radius_in_tail(0, 0), std::sqrt(130 * std::log(2.0)), 1e-5);
  expect("smallest radius", 0, radius(~0u), std::sqrt(-2 * std::log1p(-0x1p-33)), 1e-11);
}

double normal_of(uint64_t key, uint32_t id, uint32_t step, int64_t element) {
  double four[4];
  four_normals<double>(key, element / 64, int(element % 16), id, step, four);
  return four[element / 16 % 4];
}

// Tensors of odd sizes and places, without gaps (elements and numbers as scales) and with (factors).
void noise(std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (const int64_t first : {int64_t(0), int64_t(1), int64_t(63), int64_t(64) << 28, (int64_t(64) << 28) - 70})
    for (const int64_t count : {1, 15, 64, 65, 200, 333})
      for (const int kind : {0, 1, 2}) {
        const int64_t gap = kind == 2 ? 3 : 1;
        Memory<float> in(count * gap), out(count), base(count), scale(count), rows(count);
        std::vector<float> kept(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
          in[i * gap] = kept[size_t(i)] = normal(random);
          base[i] = normal(random);
          scale[i] = 1.5f;
          rows[i] = float(i % 5);
        }
        NoiseTensor t{};
        t.count = t.sizes[0] = count;
        t.dims = 1;
        t.first = first;
        t.id = 7;
        t.in = {in.get(), DType::kFloat, {gap}};
        t.out = {out.get(), DType::kFloat, {1}};
        t.base = {base.get(), DType::kFloat, {1}};
        t.scale.kind = kind == 0 ? ScaleKind::kNumber : kind == 1 ? ScaleKind::kElements : ScaleKind::kFactors;
        t.scale.number = 1.5;
        t.scale.elements = {scale.get(), DType::kFloat, {1}};
        t.scale.row = {rows.get(), DType::kFloat, {1}};
        float one = 2;
        t.scale.column = {&one, DType::kFloat, {1}};
        for (const NoiseMode mode : {NoiseMode::kAdd, NoiseMode::kStep, NoiseMode::kProduct}) {
          const NoiseParams p{mode, 0x123456789abcdefull, 5, 0.5, 0.25, &t, 1};
          PYML_CALL_ISA(hetero_noise_kernel, p, 0, t.blocks());
          for (int64_t i = 0; i < count; ++i) {
            const double s = 0.5 * (kind == 2 ? 2.0 * double(i % 5) : 1.5),
                         z = normal_of(p.key, t.id, p.step, first + i);
            const double noisy = double(kept[size_t(i)]) + s * z;
            const double truth = mode == NoiseMode::kAdd    ? noisy * 0.25
                                 : mode == NoiseMode::kStep ? double(base[i]) + 0.25 * noisy
                                                            : double(kept[size_t(i)]) * s * z;
            expect("noise", first + i, out[i], truth, 1e-5);
          }
        }
      }
}

void clip(std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (const int64_t count : {1, 31, 2048, 2049, 5000})
    for (const int64_t samples : {1, 3, 4, 9})
      for (const bool whitened : {false, true}) {
        const int64_t stride = count + 3, blocks = (count + kClipBlock - 1) / kClipBlock;
        Memory<float> g((samples - 1) * stride + count), sum(count), scale(count);
        Memory<double> squares(samples * blocks), factors(samples), memory(kClipScratch);
        for (int64_t b = 0; b < samples; ++b)
          for (int64_t i = 0; i < count; ++i) g[b * stride + i] = normal(random);
        for (int64_t i = 0; i < count; ++i) sum[i] = 0, scale[i] = i % 3 == 0 ? 0 : 2;
        ClipTensor t{};
        t.count = t.sizes[0] = count;
        t.dims = 1;
        t.batch_stride = stride;
        t.grad = {g.get(), DType::kFloat, {1}};
        t.sum = sum.get();
        t.scale.kind = whitened ? ScaleKind::kElements : ScaleKind::kNone;
        t.scale.elements = {scale.get(), DType::kFloat, {1}};
        for (int64_t b = 0; b < samples; ++b) factors[b] = b == 2 ? -1 : 0.5;
        ClipParams p{};
        p.samples = samples;
        p.last = true;
        p.tensors = &t;
        p.tensor_count = p.groups = 1;
        p.blocks = blocks;
        p.squares = squares.get();
        p.factors = factors.get();
        PYML_CALL_ISA(clip_norm_kernel, p, 0, blocks, memory.get());
        PYML_CALL_ISA(clip_sum_kernel, p, 0, blocks, memory.get());
        for (int64_t b = 0; b < samples; ++b) {
          double truth = 0, got = 0;
          for (int64_t i = 0; i < count; ++i) {
            const double v = double(g[b * stride + i]) / (whitened ? 2 : 1);
            truth += whitened && i % 3 == 0 ? 0 : v * v;
          }
          for (int64_t k = 0; k < blocks; ++k) got += squares[b * blocks + k];
          expect("squares", b, got, truth, 1e-6 * (truth + 1));
        }
        for (int64_t i = 0; i < count; ++i) {
          double truth = 0;
          for (int64_t b = 0; b < samples; ++b) truth += b == 2 ? 0 : 0.5 * double(g[b * stride + i]);
          expect("sum", i, sum[i], whitened && i % 3 == 0 ? 0 : truth, 1e-5);
        }
      }
}

}  // namespace

int main() {
  std::mt19937 random(3);
  known_answers();
  noise(random);
  clip(random);
  std::printf("%s: %d checks, %d failures\n", isa_name(cpu_isa()), checks, failures);
  return failures ? 1 : 0;
}
