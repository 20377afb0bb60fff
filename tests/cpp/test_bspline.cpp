// The B-spline CPU kernels alone, without torch: random shapes, grids and inputs (knots, in one of four calls also far
// away, infinite, NaN) against the plain double recursion. All memory is allocated to its exact size, so that
// AddressSanitizer sees every step beyond.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "bspline/bspline.h"
#include "common/cpu_isa.h"
#include "common/half_cpu.h"
#include "reference.h"
#include "setup.h"

namespace {

using namespace pyml;
using namespace setup;

// A sum in the reference and the size of its terms: what rounding may cost, with 1 where all terms are small.
struct Sum {
  double value = 0, size = 1;
  void add(double term, double more = 0) {
    value += term;
    size += std::abs(term) + std::abs(more);
  }
};

void expect(const Case& c, const char* what, double got, const Sum& truth, double eps) {
  setup::expect(c, what, got, truth.value, truth.size / 8, eps);  // 50 roundings
}

double magnitude(const std::vector<double>& b) {
  double m = 1;
  for (double v : b) m = std::max(m, std::abs(v));
  return m;
}

template <class T>
void test_basis(const Case& c, std::mt19937& random) {
  Setup<T> s(c, random);
  const int nb = s.spline.functions();
  const double eps = std::numeric_limits<T>::epsilon();
  for (int derivative = 0; derivative <= c.order; ++derivative) {
    Memory<T> out(int64_t(c.rows) * c.features * nb), dx(int64_t(c.rows) * c.features);
    auto grad = random_values<T>(out.size(), random);
    BsplineBasisParams<T> p{s.spline, derivative, s.x_rows, c.features, nullptr, out.get()};
    PYML_CALL_ISA(bspline_basis_kernel, p, 0, c.rows / 2);  // in two ranges, as two threads would
    PYML_CALL_ISA(bspline_basis_kernel, p, c.rows / 2, c.rows);
    p.grad = grad.get();
    p.out = dx.get();
    PYML_CALL_ISA(bspline_basis_kernel, p, 0, c.rows);
    for (int i = 0; i < c.rows * c.features; ++i) {
      const auto truth = reference::basis(s.grid(i % c.features), s.x[i], derivative);
      const double scale = magnitude(truth) * std::pow(2.0 * c.order * c.intervals, derivative);
      double sum = 0;
      for (int b = 0; b < nb; ++b) {
        const double got = out[int64_t(i) * nb + b];
        // Infinity times a slope is infinite, or NaN where the slope is 0, and rounding may take it away from 0.
        if (std::isfinite(truth[b]) || std::isnan(s.x[i]))
          expect(c, "basis", got, truth[b], scale, eps);
        else
          expect(c, "basis is finite", std::isfinite(got), 0, 0, 0);
        sum += truth[b] * double(grad[int64_t(i) * nb + b]);
      }
      if (std::isfinite(sum) || std::isnan(s.x[i])) expect(c, "basis contracted", dx[i], sum, 10 * scale, eps);
    }
  }
}

// What kan_linear makes of an input, and of a gradient of its output.
template <class T>
struct Kan {
  Memory<T> y, dx, dcoeff, dbase;

  Kan(const Setup<T>& s, Memory<T>& coeff, Memory<T>& base, Memory<T>& grad)
      : y(int64_t(s.c.rows) * s.c.outputs),
        dx(int64_t(s.c.rows) * s.c.features),
        dcoeff(coeff.size()),
        dbase(base.size()) {
    const Case& c = s.c;
    const int in = c.features, out = c.outputs;
    const bool with_base = c.base != Base::kNone;
    KanLinearParams<T> p{};
    p.spline = s.spline;
    p.base = c.base;
    p.x = s.x_rows;
    p.y = matrix(y, c.rows, out);
    p.dx = matrix(dx, c.rows, in);
    p.features = in;
    p.outputs = out;
    p.rows = c.rows;
    p.coeff = coeff.get();
    p.base_weight = with_base ? base.get() : nullptr;
    const int64_t unit = 64 / int64_t(sizeof(T));
    p.tile = out <= unit ? unit : out <= 2 * unit ? 2 * unit : 4 * unit;
    Memory<T> packed(p.packed_size());
    p.packed = packed.get();
    Memory<T> scratch(PYML_CALL_ISA(kan_linear_scratch, p));
    PYML_CALL_ISA(kan_linear_pack_kernel, p, 0, in);
    PYML_CALL_ISA(kan_linear_fwd_kernel, p, 0, c.rows / 3, scratch.get());
    PYML_CALL_ISA(kan_linear_fwd_kernel, p, c.rows / 3, c.rows, scratch.get());
    p.y = matrix(grad, c.rows, out);
    p.rows_per_split = std::max(1, c.rows / 2);
    Memory<T> partial(p.splits() * p.packed_size());
    p.partial = partial.get();
    p.want_x = p.want_weights = true;
    PYML_CALL_ISA(kan_linear_bwd_kernel, p, 0, p.splits() * p.blocks(), scratch.get());
    p.dcoeff = dcoeff.get();
    p.dbase = with_base ? dbase.get() : nullptr;
    PYML_CALL_ISA(kan_linear_reduce_kernel, p, 0, in / 2);
    PYML_CALL_ISA(kan_linear_reduce_kernel, p, in / 2, in);
  }
};

template <class T>
void test_kan(const Case& c, std::mt19937& random) {
  Setup<T> s(c, random);
  const int nb = s.spline.functions(), in = c.features, out = c.outputs;
  const double eps = std::numeric_limits<T>::epsilon();
  auto coeff = random_values<T>(int64_t(out) * in * nb, random), base = random_values<T>(int64_t(out) * in, random);
  auto grad = random_values<T>(int64_t(c.rows) * out, random);
  const bool with_base = c.base != Base::kNone;
  Kan<T> got(s, coeff, base, grad);
  std::vector<Sum> dcoeff(int64_t(out) * in * nb), dbase(int64_t(out) * in);
  bool all_tame = true;
  for (int r = 0; r < c.rows; ++r) {
    if (!s.tame(r)) {
      all_tame = false;
      continue;
    }
    std::vector<double> sum(out), size(out, 1);
    for (int i = 0; i < in; ++i) {
      const double x = s.x[r * in + i];
      const auto b0 = reference::basis(s.grid(i), x, 0), b1 = reference::basis(s.grid(i), x, 1);
      const double lever = reference::lever(s.grid(i), x) * 2 * c.intervals * c.order;
      double slope = 0, slope_size = 1;
      for (int o = 0; o < out; ++o) {
        const double g = grad[int64_t(r) * out + o], w = with_base ? double(base[int64_t(o) * in + i]) : 0;
        sum[o] += w * reference::base(c.base, x, false);
        slope += g * w * reference::base(c.base, x, true);
        dbase[int64_t(o) * in + i].add(g * reference::base(c.base, x, false));
        size[o] += std::abs(w * x);
        for (int b = 0; b < nb; ++b) {
          const double k = coeff[(int64_t(o) * in + i) * nb + b];
          sum[o] += k * b0[b];
          slope += g * k * b1[b];
          dcoeff[(int64_t(o) * in + i) * nb + b].add(g * b0[b], g * lever);
          size[o] += std::abs(k * b0[b]);
          slope_size += std::abs(g * k * b1[b]) + 2.0 * c.intervals * c.order * std::abs(g * k * b0[b]);
        }
      }
      expect(c, "kan dx", got.dx[int64_t(r) * in + i], slope, slope_size, eps);
    }
    for (int o = 0; o < out; ++o) expect(c, "kan y", got.y[int64_t(r) * out + o], sum[o], size[o], eps);
  }
  if (!all_tame) return;
  for (int64_t edge = 0; edge < int64_t(out) * in; ++edge) {
    for (int b = 0; b < nb; ++b) expect(c, "kan dcoeff", got.dcoeff[edge * nb + b], dcoeff[edge * nb + b], eps);
    if (with_base) expect(c, "kan dbase", got.dbase[edge], dbase[edge], eps);
  }
}

// One input that is NaN or infinite: what it must reach, and that it reaches nothing else.
template <class T>
void test_odd(int order, Extrapolation mode, double bad, std::mt19937& random) {
  const int in = 5, out = 19, rows = 40, row = 7, feature = 2, at = row * in + feature;
  const Case c{order, 5, int(random() % 4), in, out, rows, random() % 2 == 0, false, mode, Base::kNone};
  Setup<T> s(c, random);
  const int nb = s.spline.functions();
  const double eps = std::numeric_limits<T>::epsilon(), nan = std::nan("");
  auto coeff = random_values<T>(int64_t(out) * in * nb, random), base = random_values<T>(int64_t(out) * in, random);
  auto grad = random_values<T>(int64_t(rows) * out, random);
  s.store(at, 0.1);
  Kan<T> clean(s, coeff, base, grad);
  s.store(at, bad);
  Kan<T> got(s, coeff, base, grad);
  const bool spoiled = std::isnan(bad) || mode == Extrapolation::kLinear;
  for (int64_t i = 0; i < got.y.size(); ++i) {
    if (i / out != row) expect(c, "y of another row", got.y[i], clean.y[i], 1, eps);
    if (i / out == row) expect(c, "y is NaN", std::isnan(got.y[i]), spoiled, 0, 0);
  }
  const auto slopes = reference::basis(s.grid(feature), bad, 1);
  double slope = 0;
  for (int o = 0; o < out; ++o)
    for (int b = 0; b < nb; ++b) slope += double(grad[row * out + o] * coeff[(o * in + feature) * nb + b]) * slopes[b];
  for (int64_t i = 0; i < got.dx.size(); ++i) {
    if (i != at) expect(c, "dx of another input", got.dx[i], clean.dx[i], 100, eps);
    if (i == at && !(order == 1 && std::isnan(bad)))  // there the slope is the same everywhere, known or NaN
      expect(c, "dx of an odd input", got.dx[i], slope, 100, eps);
  }
  for (int64_t i = 0; i < got.dcoeff.size(); ++i) {
    const bool own = i / nb % in == feature;
    if (!own) expect(c, "dcoeff of another feature", got.dcoeff[i], clean.dcoeff[i], 1, eps);
    if (own && spoiled) expect(c, "dcoeff", got.dcoeff[i], nan, 0, 0);
    if (own && !spoiled) expect(c, "dcoeff is finite", std::isfinite(got.dcoeff[i]), 1, 0, 0);
  }
}

// Every half as bits, and halfway between each two: to the nearest, ties to even.
void test_half() {
  using namespace pyml::CPU_CAPABILITY;
  const Case c{};
  const auto value = [](int h) {
    return h < 0x400 ? std::ldexp(h, -24) : std::ldexp(0x400 + h % 0x400, h / 0x400 - 25);
  };
  const auto bits = [](float f) { return narrow<HalfBits>(f).bits; };
  for (int h = 0; h <= 0x7c00; ++h) {  // the last is infinity
    const float low = h < 0x7c00 ? float(value(h)) : std::numeric_limits<float>::infinity();
    expect(c, "half to float", widen(HalfBits{uint16_t(h)}), low, 0, 0);
    expect(c, "minus half to float", widen(HalfBits{uint16_t(h | 0x8000)}), -low, 0, 0);
    expect(c, "float to half", bits(low), h, 0, 0);
    expect(c, "minus float to half", bits(-low), h | 0x8000, 0, 0);
    if (h == 0x7c00) break;
    const float middle = float((value(h) + value(h + 1)) / 2);
    expect(c, "tie", bits(middle), h + h % 2, 0, 0);
    expect(c, "below a tie", bits(std::nextafter(middle, 0.0f)), h, 0, 0);
    expect(c, "above a tie", bits(std::nextafter(middle, 1e6f)), h + 1, 0, 0);
  }
  expect(c, "huge to half", bits(1e30f), 0x7c00, 0, 0);
  expect(c, "NaN to half", widen(HalfBits{bits(std::nanf(""))}), std::nan(""), 0, 0);
}

// A matrix of rows, or (patch > 0) every patch x patch window of an image with one channel.
template <class T>
void test_wkan(Case c, int patch, std::mt19937& random) {
  const int side = 7, window = side - patch + 1;
  if (patch) {
    c.features = patch * patch;
    c.rows = 2 * window * window;
    c.half = false;
    c.shared = true;
  }
  Case image_case = c;
  if (patch) image_case.features = 1, image_case.rows = 2 * side * side;
  Setup<T> s(image_case, random);
  const int nb = s.spline.functions(), in = c.features, out = c.outputs;
  const double eps = std::numeric_limits<T>::epsilon();
  auto coeff = random_values<T>(int64_t(in) * nb, random), base = random_values<T>(int64_t(out) * in, random);
  auto scaler = random_values<T>(int64_t(out) * in, random), grad = random_values<T>(int64_t(c.rows) * out, random);
  Memory<T> y(int64_t(c.rows) * out), dx(s.x.size());
  std::vector<int64_t> columns;
  for (int i = 0; i < in && patch; ++i) columns.push_back(i / patch * side + i % patch);
  const auto window_rows = [&](Memory<T>& m) {
    Rows r = matrix(m, window, 1);
    r.height = window;
    r.stride_h = side;
    r.stride_n = side * side;
    r.columns = columns.data();
    return r;
  };
  const auto at = [&](int r, int i) {  // where column i of row r lies in s.x
    return patch ? int64_t(r / (window * window)) * side * side + r / window % window * side + r % window + columns[i]
                 : int64_t(r) * in + i;
  };
  WkanParams<T> p{};
  p.spline = s.spline;
  p.base = c.base;
  p.x = patch ? window_rows(s.x_memory) : s.x_rows;
  p.y = matrix(y, c.rows, out);
  p.features = in;
  p.outputs = out;
  p.rows = c.rows;
  p.coeff = coeff.get();
  p.base_weight = c.base == Base::kNone ? nullptr : base.get();
  p.scaler = scaler.get();
  p.block = patch ? in : kWkanBlock;
  Memory<T> power(in * (c.order + 1) * p.power_ld());
  p.power = power.get();
  PYML_CALL_ISA(wkan_power_kernel, p, 0, in);
  Memory<T> scratch(PYML_CALL_ISA(wkan_scratch, p));
  PYML_CALL_ISA(wkan_fwd_kernel, p, 0, c.rows / 3, scratch.get());
  PYML_CALL_ISA(wkan_fwd_kernel, p, c.rows / 3, c.rows, scratch.get());
  p.y = matrix(grad, c.rows, out);
  p.dx = patch ? window_rows(dx) : matrix(dx, c.rows, in);
  if (patch) std::fill(dx.get(), dx.get() + dx.size(), T(0));
  p.add_dx = patch > 0;
  p.want_x = p.want_weights = true;
  p.rows_per_split = patch ? window * window : std::max(1, c.rows / 2);
  Memory<T> partial(p.splits() * in * p.partial_ld());
  p.partial = partial.get();
  PYML_CALL_ISA(wkan_bwd_kernel, p, 0, p.splits() * p.blocks(), scratch.get());

  std::vector<double> slopes(s.x.size()), sizes(s.x.size(), 1);
  std::vector<Sum> dscaler(int64_t(out) * in), dbase(int64_t(out) * in), dcoeff(int64_t(in) * nb);
  bool all_tame = true;
  for (size_t i = 0; i < s.x.size(); ++i) all_tame = all_tame && std::abs(s.x[i]) < 1e3;
  if (!all_tame) return;  // ran without a step out of bounds, which is what such inputs are for
  for (int r = 0; r < c.rows; ++r) {
    std::vector<double> sum(out), size(out, 1);
    for (int i = 0; i < in; ++i) {
      const double x = s.x[at(r, i)];
      const auto &grid = s.grid(i), &g = grid;
      const auto b0 = reference::basis(g, x, 0), b1 = reference::basis(g, x, 1);
      const double lever = reference::lever(g, x) * 2 * c.intervals * c.order;
      double spline = 0, slope = 0, magnitude = 0;
      for (int b = 0; b < nb; ++b) {
        spline += coeff[int64_t(i) * nb + b] * b0[b];
        slope += coeff[int64_t(i) * nb + b] * b1[b];
        magnitude += std::abs(coeff[int64_t(i) * nb + b]) *
                     (std::abs(b1[b]) + 2.0 * c.intervals * c.order * (1 + std::abs(b0[b])));
      }
      for (int o = 0; o < out; ++o) {
        const double w = p.base_weight ? double(base[int64_t(o) * in + i]) : 0, e = scaler[int64_t(o) * in + i];
        const double up = grad[int64_t(r) * out + o];
        sum[o] += w * reference::base(c.base, x, false) + e * spline;
        size[o] += std::abs(w * x) + std::abs(e) * magnitude;
        slopes[at(r, i)] += up * (w * reference::base(c.base, x, true) + e * slope);
        sizes[at(r, i)] += std::abs(up) * (std::abs(w) + std::abs(e) * magnitude);
        dbase[int64_t(o) * in + i].add(up * reference::base(c.base, x, false));
        for (int b = 0; b < nb; ++b) {
          const double k = coeff[int64_t(i) * nb + b];
          dscaler[int64_t(o) * in + i].add(up * k * b0[b], up * k * lever);
          dcoeff[int64_t(i) * nb + b].add(up * e * b0[b], up * e * lever);
        }
      }
    }
    for (int o = 0; o < out; ++o) expect(c, "wkan y", y[int64_t(r) * out + o], sum[o], size[o], eps);
  }
  for (size_t i = 0; i < s.x.size(); ++i)
    if (!patch || sizes[i] > 1) expect(c, "wkan dx", dx[i], slopes[i], sizes[i], eps);
  for (int i = 0; i < in; ++i) {
    std::vector<double> total(p.partial_ld());  // gradients of the scaler, of the base weight, moments of the spline
    for (int64_t split = 0; split < p.splits(); ++split)
      for (int64_t k = 0; k < p.partial_ld(); ++k) total[k] += partial[(split * in + i) * p.partial_ld() + k];
    for (int o = 0; o < out; ++o) {
      expect(c, "wkan dscaler", total[o], dscaler[int64_t(o) * in + i], eps);
      if (p.base_weight) expect(c, "wkan dbase", total[p.padded_outputs() + o], dbase[int64_t(o) * in + i], eps);
    }
    std::vector<double> moments(nb);
    for (int j = 0; j < s.spline.knots - 1; ++j)
      for (int m = 0; m <= c.order; ++m)
        if (j + m >= c.order && j + m < c.order + nb)
          moments[j + m - c.order] += total[2 * p.padded_outputs() + j * (c.order + 1) + m];
    for (int b = 0; b < nb; ++b) expect(c, "wkan dcoeff", moments[b], dcoeff[int64_t(i) * nb + b], eps);
  }
}

template <class T>
void run(int count, std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
  for (int n = 0; n < count; ++n) {
    Case c;
    c.order = pick({1, 2, 3, 3, 3, 4, 5});
    c.intervals = pick({1, 2, 5, 20, 40, 70});
    c.kind = pick({0, 0, 1, 2, 3, 4});
    c.features = pick({1, 2, 5, 17, 33});
    c.outputs = pick({1, 3, 16, 33, 65});
    c.rows = pick({1, 7, 16, 33, 65, 300});
    c.shared = random() % 2;
    c.half = random() % 4 == 0;
    c.extrapolation = Extrapolation(random() % 3);
    c.base = Base(random() % 5);
    c.wild = random() % 4 == 0;
    test_basis<T>(c, random);
    test_kan<T>(c, random);
    test_wkan<T>(c, 0, random);
    test_wkan<T>(c, pick({1, 3, 5}), random);
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (int order = 1; order <= 5; ++order)
    for (int mode = 0; mode < 3; ++mode)
      for (double bad : {std::nan(""), kInfinity, -kInfinity}) test_odd<T>(order, Extrapolation(mode), bad, random);
  // Blocks of 256 and of 1024 rows, more than one of them in a part.
  for (const Case& c : {Case{3, 40, 1, 2, 3, 600, true, false, Extrapolation::kLinear, Base::kSilu},
                        Case{3, 200, 0, 1, 3, 2100, true, false, Extrapolation::kZero, Base::kSilu}}) {
    test_kan<T>(c, random);
    test_wkan<T>(c, 0, random);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  test_half();
  run<float>(100, random);
  run<double>(100, random);
  std::printf("%s: %d checks, %d failed\n", isa_name(cpu_isa()), checks, failures);
  return failures ? 1 : 0;
}
