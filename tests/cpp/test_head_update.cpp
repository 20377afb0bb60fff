// AdamW on slices and edits of heads against plain loops, on exactly sized memory: for the sanitizers.
#include <cmath>

#include "common/cpu_isa.h"
#include "head_update/adam.h"
#include "setup.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

void expect(const char* what, int64_t at, double got, double truth, double bound) {
  ++checks;
  if (std::isnan(truth) ? std::isnan(got) : got == truth || std::abs(got - truth) <= bound) return;
  if (++failures <= 20) std::printf("FAILED %s at %d: got %.9g, expected %.9g\n", what, int(at), got, truth);
}

float of_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

// [rows, columns] with gaps between rows, and between columns too: rows in place, rows gathered, short ones.
void adamw(std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (const int64_t rows : {1, 3, 70})
    for (const int64_t columns : {1, 7, 16, 65, 700})
      for (const int64_t gap : {1, 2})
        for (const bool master : {false, true})
          for (const bool half : {false, true}) {
            const int64_t pitch = columns * gap + 5, count = rows * columns;
            Memory<float> p(half ? 0 : (rows - 1) * pitch + (columns - 1) * gap + 1);
            Memory<uint16_t> p16(half ? (rows - 1) * pitch + (columns - 1) * gap + 1 : 0);
            Memory<float> g(count), m(count), v(count), w(master ? count : 0);
            std::vector<double> truth(static_cast<size_t>(count));
            AdamSlice t{};
            t.count = count;
            t.dims = 2;
            t.sizes[0] = rows, t.sizes[1] = columns;
            t.param = {
                half ? static_cast<void*>(p16.get()) : p.get(), half ? DType::kBFloat16 : DType::kFloat, {pitch, gap}};
            t.grad = {g.get(), DType::kFloat, {columns, 1}};
            t.m = {m.get(), DType::kFloat, {columns, 1}};
            t.v = {v.get(), DType::kFloat, {columns, 1}};
            if (master) t.master = {w.get(), DType::kFloat, {columns, 1}};
            t.id = 3;
            AdamParams a{};
            a.step = {0.99, 0.1, 0.9, 0.1, 1.5, 1e-3, -0.2};
            a.stochastic = half && !master;
            a.key = 0x0123456789abcdefull;
            a.number = 7;
            a.slices = &t;
            a.slice_count = 1;
            for (int64_t i = 0; i < count; ++i) {
              g[i] = normal(random), m[i] = normal(random), v[i] = std::abs(normal(random));
              const int64_t at = i / columns * pitch + i % columns * gap;
              const float start = float(int(normal(random) * 64)) / 64;
              if (half)
                p16[at] = uint16_t(bits_of(start) >> 16);
              else
                p[at] = start;
              if (half && i == 5) p16[at] = 0x7fc0;  // NaN, which no master rounds to
              float value = half ? of_bfloat16(p16[at]) : start, first = m[i], second = v[i];
              if (master && i % 3 == 0) w[i] = value + 1;                              // the parameter was written to
              if (master && i % 3 == 1) w[i] = half ? value * (1 + 0x1p-12f) : value;  // digits that bfloat16 has not
              if (master && i % 3 == 2) w[i] = half && i == 5 ? 1 : value;
              if (master && i % 3 == 1) value = w[i];
              adam(AdamNumbers<float>::of(a.step), value, g[i], first, second);
              truth[size_t(i)] = value;
              if (a.stochastic) {
                const Words words = block_words(a.key ^ kRoundingKey, i / 64, int(i % 16), t.id, a.number);
                truth[size_t(i)] = stochastic(value, words.w[i / 16 % 4], DType::kBFloat16);
              }
            }
            PYML_CALL_ISA(adamw_slices_kernel, a, 0, t.blocks());
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = i / columns * pitch + i % columns * gap;
              const double got = half ? of_bfloat16(p16[at]) : p[at];
              // Rounding to nearest is that of the kernels alone; everything else has the bits of one element.
              expect("param", i, got, truth[size_t(i)], half && master ? std::abs(truth[size_t(i)]) * 0x1p-8 : 0);
              if (master) expect("master", i, w[i], truth[size_t(i)], 0);
            }
          }
}

void rounding() {
  for (uint32_t word : {0u, 0x7fffu, 0x8000u, 0xffffu, ~0u})
    for (const DType to : {DType::kBFloat16, DType::kHalf})
      for (const float x : {0.0f, -1.0f, 1.5f, 0x1p-24f, -0x1p-15f, 65504.0f, INFINITY, NAN})
        if (to == DType::kHalf || x != 65504.0f) expect("exact", int64_t(word), stochastic(x, word, to), x, 0);
  expect("up", 0, stochastic(1 + 0x1p-9f, 0xffff, DType::kBFloat16), 1 + 0x1p-7, 0);
  expect("down", 0, stochastic(1 + 0x1p-9f, 0x1fff, DType::kBFloat16), 1, 0);
  expect("denormal", 0, stochastic(0x1.8p-24f, 0x1000, DType::kHalf), 0x1p-23, 0);
  expect("denormal", 1, stochastic(-0x1.8p-24f, 0x0fff, DType::kHalf), -0x1p-24, 0);
  expect("overflow", 0, stochastic(65519.0f, 0x1fff, DType::kHalf), 65536, 0);
}

HeadRows rows_of(Memory<float>& m, int64_t heads, int64_t dim) {
  HeadRows t;
  t.rows.data = m.get();
  t.rows.width = 1 << 20;
  t.rows.stride_w = heads * dim;
  t.head = dim;
  return t;
}

void edits(std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t heads = 3, chosen[2] = {2, 0};
  for (const int64_t rows : {1, 31, 32, 33, 100})
    for (const int64_t dim : {1, 15, 16, 64, 70})
      for (const int maps : {0, 1, 2, 3}) {
        const int64_t padded = (dim + 15) / 16 * 16, splits = rows > 40 ? 2 : 1;
        Memory<float> x(rows * heads * dim), out(rows * heads * dim), values(rows * 2 * dim), matrix(2 * dim * padded);
        Memory<float> part(splits * 2 * dim * padded);
        Memory<double> scratch(edit_scratch(padded));
        for (int64_t i = 0; i < rows * heads * dim; ++i) x[i] = out[i] = normal(random);
        for (int64_t i = 0; i < rows * 2 * dim; ++i) values[i] = normal(random);
        for (int64_t i = 0; i < 2 * dim * padded; ++i) matrix[i] = i % padded < dim ? normal(random) : 0;
        HeadEditParams p{};
        p.in = rows_of(x, heads, dim), p.out = rows_of(out, heads, dim);
        if (maps & 1) p.values = rows_of(values, 2, dim);
        if (maps & 2) p.matrix = matrix.get();
        p.count = 2, p.heads[0] = 2, p.heads[1] = 0;
        p.row_count = rows, p.dim = dim, p.padded = padded;
        p.keep = 0.25, p.strength = 0.75;
        PYML_CALL_ISA(head_edit_kernel, p, 0, 2 * edit_blocks(p), scratch.get());
        Memory<float> whole(rows * heads * dim);  // the same with the other heads copied on the way
        HeadEditParams c = p;
        c.out = rows_of(whole, heads, dim), c.row_bytes = heads * dim * int64_t(sizeof(float));
        PYML_CALL_ISA(head_edit_kernel, c, 0, edit_blocks(c), scratch.get());
        for (int64_t i = 0; i < rows * heads * dim; ++i) expect("copied", i, whole[i], out[i], 0);
        HeadMatrixParams q{};
        q.grad = p.out, q.x = p.in;
        q.count = 2, q.heads[0] = 2, q.heads[1] = 0;
        q.row_count = rows, q.dim = dim, q.padded = padded;
        q.splits = splits, q.split_rows = (rows + splits - 1) / splits;
        q.part = part.get(), q.part_heads = 2, q.strength = 0.5;
        PYML_CALL_ISA(head_edit_matrix_kernel, q, 0, 2 * splits, scratch.get());
        for (int64_t i = 0; i < 2; ++i)
          for (int64_t o = 0; o < dim; ++o) {
            for (int64_t r = 0; r < rows; ++r) {
              const float* row = x.get() + (r * heads + chosen[i]) * dim;
              double truth = maps & 1 ? values[(r * 2 + i) * dim + o] : 0;
              for (int64_t d = 0; d < dim && (maps & 2); ++d)
                truth += double(row[d]) * matrix[(i * dim + d) * padded + o];
              truth = 0.25 * row[o] + 0.75 * truth;
              expect("edit", r, out[(r * heads + chosen[i]) * dim + o], truth, 1e-4);
            }
            for (int64_t d = 0; d < dim; ++d) {
              double truth = 0, got = 0;
              for (int64_t r = 0; r < rows; ++r)
                truth += 0.5 * double(out[(r * heads + chosen[i]) * dim + o]) * x[(r * heads + chosen[i]) * dim + d];
              for (int64_t s = 0; s < splits; ++s) got += part[((s * 2 + i) * dim + o) * padded + d];
              expect("matrix", d, got, truth, 1e-4 * double(rows + dim));
            }
          }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < dim; ++d)
            expect("kept", r, out[(r * heads + 1) * dim + d], x[(r * heads + 1) * dim + d], 0);
      }
}

}  // namespace

int main() {
  std::mt19937 random(3);
  adamw(random);
  rounding();
  edits(random);
  std::printf("%s: %d checks, %d failures\n", isa_name(cpu_isa()), checks, failures);
  return failures ? 1 : 0;
}
