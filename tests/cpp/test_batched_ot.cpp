// The kernels of batched optimal transport against plain loops in double, on exactly sized memory: for the sanitizers.
#include <cmath>

#include "batched_ot/batched_ot.h"
#include "common/cpu_isa.h"
#include "setup.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

struct Shape {
  int batch, n, m, iterations;
  double eps, scale;
  bool zeros, unbalanced, odd_strides, half;
};

void expect(const Shape& s, const char* what, double got, double truth, double bound) {
  ++checks;
  if (std::abs(got - truth) <= bound) return;
  if (++failures <= 20)
    std::printf("FAILED %s: got %.9g, expected %.9g (B %d n %d m %d it %d eps %g zeros %d unbalanced %d strides %d)\n",
                what, got, truth, s.batch, s.n, s.m, s.iterations, s.eps, s.zeros, s.unbalanced, s.odd_strides);
}

double log_sum(const std::vector<double>& terms) {
  double top = -INFINITY, total = 0;
  for (double t : terms) top = std::max(top, t);
  for (double t : terms) total += std::exp(t - top);
  return top + std::log(total);
}

template <class T>
void test(const Shape& s, std::mt19937& random) {
  const double rho = 0.7, damp = s.unbalanced ? rho / (rho + s.eps) : 1, precision = std::numeric_limits<T>::epsilon();
  const int64_t n = s.n, m = s.m, B = s.batch, step_m = s.odd_strides ? 2 : 1, step_n = m * step_m + s.odd_strides;
  const int64_t each = (n - 1) * step_n + (m - 1) * step_m + 1;
  Memory<T> cost(s.half ? 0 : B * each), a(s.zeros ? B * n : 0), b(s.zeros ? B * m : 0);
  Memory<uint16_t> cost_half(s.half ? B * each : 0);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<int64_t> offsets, plain;
  std::vector<double> truth(size_t(B * n * m));
  for (int64_t q = 0; q < B; ++q) {
    offsets.push_back((B - 1 - q) * each);
    plain.push_back(q * n * m);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = offsets[size_t(q)] + i * step_n + j * step_m;
        float value = float(s.scale * uniform(random));
        if (s.half) {
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          cost_half[at] = uint16_t(bits >> 16);
          bits = uint32_t(cost_half[at]) << 16;
          std::memcpy(&value, &bits, 4);
        } else {
          cost[at] = T(value);
        }
        truth[size_t((q * n + i) * m + j)] = value;
      }
    if (!s.zeros) continue;
    for (int64_t i = 0; i < n; ++i) a[q * n + i] = i % 3 == 1 ? T(0) : T(1.0 / double(n - (n + 1) / 3));
    for (int64_t j = 0; j < m; ++j) b[q * m + j] = j % 3 == 1 ? T(0) : T(1.0 / double(m - (m + 1) / 3));
  }
  Memory<T> value(B), transport(B), f(B * n), g(B * m), mass(B * n), slope(B * n * m), da(B * n), db(B * m), ones(B);
  Memory<T> plan(B * n * m), df(B * n), dg(B * m);
  Memory<int32_t> n_iter(B), status(B);
  for (int64_t q = 0; q < B; ++q) ones[q] = 1;

  SinkhornParams<T> p{};
  p.batch = B, p.n = n, p.m = m;
  const DType type = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  void* data = s.half ? static_cast<void*>(cost_half.get()) : static_cast<void*>(cost.get());
  p.cost = {data, s.half ? DType::kBFloat16 : type, offsets.data(), step_n, step_m};
  p.a = s.zeros ? a.get() : nullptr;
  p.b = s.zeros ? b.get() : nullptr;
  p.eps = T(s.eps), p.rho = T(rho), p.unbalanced = s.unbalanced;
  p.max_iter = s.iterations;
  p.mass_tolerance = T(1e-4);
  p.value = value.get(), p.transport = transport.get(), p.f = f.get(), p.g = g.get(), p.row_mass = mass.get();
  p.n_iter = n_iter.get(), p.status = status.get();
  Memory<T> work(PYML_CALL_ISA(sinkhorn_scratch, p));
  const int64_t tasks = PYML_CALL_ISA(sinkhorn_tasks, p);
  PYML_CALL_ISA(sinkhorn_fwd_kernel, p, 0, tasks / 2, work.get());
  PYML_CALL_ISA(sinkhorn_fwd_kernel, p, tasks / 2, tasks, work.get());

  p.potential_f = f.get(), p.potential_g = g.get();
  p.grad_value = ones.get(), p.grad_transport = ones.get();
  p.grad_cost = {slope.get(), type, plain.data(), m, 1};
  p.grad_a = da.get(), p.grad_b = db.get();
  p.implicit = s.iterations % 2 == 0;
  Memory<T> more(PYML_CALL_ISA(sinkhorn_bwd_scratch, p));
  PYML_CALL_ISA(sinkhorn_bwd_kernel, p, 0, B, more.get());

  p.plan = {plan.get(), type, plain.data(), m, 1};
  PYML_CALL_ISA(sinkhorn_plan_fwd_kernel, p, 0, B, more.get());

  for (int64_t q = 0; q < B; ++q) {
    const double* c = truth.data() + q * n * m;
    const auto wa = [&](int64_t i) { return s.zeros ? double(a[q * n + i]) : 1.0 / double(n); };
    const auto wb = [&](int64_t j) { return s.zeros ? double(b[q * m + j]) : 1.0 / double(m); };
    std::vector<double> tf(size_t(n), 0), tg(size_t(m), 0);
    for (int k = 0; k < s.iterations; ++k) {
      for (int64_t i = 0; i < n; ++i) {
        std::vector<double> terms;
        for (int64_t j = 0; j < m; ++j)
          if (wb(j) > 0) terms.push_back(std::log(wb(j)) + (tg[size_t(j)] - c[i * m + j]) / s.eps);
        tf[size_t(i)] = wa(i) > 0 ? -damp * s.eps * log_sum(terms) : 0;
      }
      for (int64_t j = 0; j < m; ++j) {
        std::vector<double> terms;
        for (int64_t i = 0; i < n; ++i)
          if (wa(i) > 0) terms.push_back(std::log(wa(i)) + (tf[size_t(i)] - c[i * m + j]) / s.eps);
        tg[size_t(j)] = wb(j) > 0 ? -damp * s.eps * log_sum(terms) : 0;
      }
    }
    const auto kl = [](double x, double w) { return w > 0 ? (x > 0 ? x * std::log(x / w) : 0) - x + w : 0; };
    double shift = 0, spent = 0, all = 0, value_truth = 0, mass_a = 0, mass_b = 0;
    std::vector<double> columns(size_t(m), 0), slopes(size_t(m), 0);
    for (int64_t j = 0; j < m && !s.unbalanced; ++j) shift += wb(j) * tg[size_t(j)];
    const double loose = 100 * precision * (s.scale + s.eps), steep = 400 * precision * (1 + s.scale / s.eps);
    // A constant on the costs of a row or column moves a balanced potential and no mass: the implicit gradient knows,
    // if its system was solved.
    const bool linear = p.implicit && !s.unbalanced && s.eps >= 0.05;
    for (int64_t i = 0; i < n; ++i) {
      expect(s, "f", f[q * n + i], wa(i) > 0 ? tf[size_t(i)] + shift : 0, loose);
      double row = 0, slope_row = 0;
      for (int64_t j = 0; j < m; ++j) {
        const double w = wa(i) * wb(j);
        const double x = w > 0 ? w * std::exp((tf[size_t(i)] + tg[size_t(j)] - c[i * m + j]) / s.eps) : 0;
        spent += x * c[i * m + j];
        all += x;
        row += x;
        columns[size_t(j)] += x;
        if (x > 0) value_truth += x * (tf[size_t(i)] + tg[size_t(j)]) - s.eps * x;
        expect(s, "plan", plan[(q * n + i) * m + j], x, steep * (x + 1e-6 / double(n * m)));
        if (!p.implicit)
          expect(s, "gradient", slope[(q * n + i) * m + j], 2 * x, 2 * steep * (x + 1e-6 / double(n * m)));
        ++checks;
        if (!std::isfinite(slope[(q * n + i) * m + j])) ++failures;
        slope_row += slope[(q * n + i) * m + j];
        slopes[size_t(j)] += slope[(q * n + i) * m + j];
      }
      mass_a += wa(i);
      if (s.unbalanced) value_truth += rho * kl(row, wa(i));
      expect(s, "row mass", mass[q * n + i], row, steep * (row + 1e-6 / double(n)));
      if (linear) expect(s, "gradient along a row", slope_row, 2 * row, 4 * steep * (row + 1e-6 / double(n)));
    }
    for (int64_t j = 0; j < m; ++j) {
      mass_b += wb(j);
      const double column = columns[size_t(j)];
      if (s.unbalanced) value_truth += rho * kl(column, wb(j));
      if (linear)
        expect(s, "gradient along a column", slopes[size_t(j)], 2 * column, 4 * steep * (column + 1e-6 / double(m)));
    }
    value_truth += s.eps * mass_a * mass_b;
    expect(s, "value", value[q], value_truth, loose * (1 + all) + steep * 1e-3 * (spent + rho));
    for (int64_t j = 0; j < m; ++j) expect(s, "g", g[q * m + j], wb(j) > 0 ? tg[size_t(j)] - shift : 0, loose);
    expect(s, "transport cost", transport[q], spent, loose * (1 + all) + steep * 1e-3 * spent);
    expect(s, "iterations", n_iter[q], s.iterations, 0);
    expect(s, "status", status[q], 0, 0);
  }

  // The plan's gradient for an upstream gradient of ones: - P / eps to the cost.
  Memory<T> upstream(B * n * m);
  for (int64_t i = 0; i < B * n * m; ++i) upstream[i] = 1;
  p.plan = {upstream.get(), type, plain.data(), m, 1};
  p.out_f = df.get(), p.out_g = dg.get();
  PYML_CALL_ISA(sinkhorn_plan_bwd_kernel, p, 0, B, more.get());
  for (int64_t i = 0; i < B * n * m; ++i)
    expect(s, "gradient of the plan", slope[i], -double(plan[i]) / s.eps, 8 * precision * std::abs(plan[i]) / s.eps);
  for (int64_t i = 0; i < B * n; ++i) expect(s, "its f", df[i], double(mass[i]) / s.eps, 1e4 * precision / s.eps);
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const int sizes[][2] = {{1, 1},    {49, 4},  {4, 49},  {7, 3},    {16, 16}, {17, 60},
                          {196, 16}, {70, 50}, {50, 70}, {33, 100}, {100, 2}};
  int count = 0;
  for (const auto& size : sizes)
    for (double eps : {0.5, 0.1, 0.01, 0.001}) {
      ++count;
      const Shape s{
          size[0] * size[1] <= 1024 ? 19 : 2,           size[0],        size[1],        6 + count % 5, eps, 1.0,
          count % 3 == 1 && size[0] > 2 && size[1] > 2, count % 4 == 2, count % 2 == 1, false};
      test<double>(s, random);
      Shape half = s;
      half.half = count % 5 == 0;
      test<float>(half, random);
    }
  // Edges: one row, one column, masked ones, long and thin, 49 x 4 in groups that are not full, above 512 on both
  // sides.
  const Shape edges[] = {
      {3, 1, 7, 6, 0.1, 1, false, false, true, false},     {3, 9, 1, 6, 0.1, 1, false, true, false, false},
      {2, 500, 3, 8, 0.05, 1, true, false, false, false},  {2, 3, 500, 8, 0.05, 1, true, true, true, false},
      {33, 49, 4, 20, 0.1, 1, true, false, false, true},   {1, 65, 66, 10, 0.01, 1, true, false, true, false},
      {1, 515, 520, 4, 0.5, 1, false, false, false, false}};
  for (const Shape& s : edges) test<double>(s, random), test<float>(s, random);
  std::printf("%d checks, %d failures, %s\n", checks, failures, isa_name(cpu_isa()));
  return failures != 0 || checks == 0;
}
