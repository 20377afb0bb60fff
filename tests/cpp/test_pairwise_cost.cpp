// Costs between points and their gradient against plain loops in double, on exactly sized memory: for the sanitizers.
#include <cmath>

#include "batched_ot/batched_ot.h"
#include "common/cpu_isa.h"
#include "setup.h"

namespace {

using namespace pyml;
using setup::Memory;

int checks = 0, failures = 0;

void expect(const char* what, int64_t n, int64_t m, int64_t d, double got, double truth, double bound) {
  ++checks;
  if (std::isnan(truth) ? std::isnan(got) : std::abs(got - truth) <= bound) return;
  if (++failures <= 20)
    std::printf("FAILED %s: got %.9g, expected %.9g (n %d m %d d %d)\n", what, got, truth, int(n), int(m), int(d));
}

// A cloud of points whose coordinates lie `step` apart, one of them not a number.
template <class T>
struct Cloud {
  int64_t size, d, step;
  Memory<T> memory;
  std::vector<int64_t> offsets;
  std::vector<double> plain, length;  // [B][size][d], [B][size]
  std::vector<bool> sound;

  Cloud(int64_t batch, int64_t size, int64_t d, int64_t step, bool odd, std::mt19937& random)
      : size(size), d(d), step(step), memory(batch * size * d * step), plain(size_t(batch * size * d)) {
    std::normal_distribution<double> normal;
    for (int64_t at = 0; at < batch * size * d; ++at) memory[at * step] = T(plain[size_t(at)] = T(normal(random)));
    if (odd && d > 0) {
      plain[size_t((size / 2) * d)] = NAN;
      memory[(size / 2) * d * step] = std::numeric_limits<T>::infinity();
    }
    for (int64_t q = 0; q < batch; ++q) offsets.push_back(q * size * d * step);
    for (int64_t i = 0; i < batch * size; ++i) {
      double total = std::numeric_limits<float>::min();
      for (int64_t k = 0; k < d; ++k) total += at(i, k) * at(i, k);
      length.push_back(std::sqrt(total));
      sound.push_back(std::isfinite(total));
    }
  }
  double at(int64_t i, int64_t k) const { return plain[size_t(i * d + k)]; }
  Points points() {
    return {memory.get(), sizeof(T) == 8 ? DType::kDouble : DType::kFloat, offsets.data(), d * step, step};
  }
};

template <class T>
void test(int64_t n, int64_t m, int64_t d, bool cosine, bool odd, std::mt19937& random) {
  const int64_t B = 2, step = odd ? 2 : 1;
  Cloud<T> x(B, n, d, step, odd, random), y(B, m, d, 1, false, random);
  Memory<T> cost(B * n * m), upstream(B * n * m), dx(B * n * d), dy(B * m * d);
  std::vector<int64_t> of_cost, of_dx, of_dy;
  for (int64_t q = 0; q < B; ++q) of_cost.push_back(q * n * m), of_dx.push_back(q * n * d), of_dy.push_back(q * m * d);
  const DType type = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  PairwiseParams<T> p{};
  p.batch = B, p.n = n, p.m = m, p.d = d, p.cosine = cosine;
  p.x = x.points(), p.y = y.points();
  p.cost = {cost.get(), type, of_cost.data(), m, 1};
  Memory<T> work(PYML_CALL_ISA(pairwise_cost_scratch, p));
  const int64_t tasks = PYML_CALL_ISA(pairwise_cost_tasks, p);
  PYML_CALL_ISA(pairwise_cost_fwd_kernel, p, 0, tasks / 2, work.get());
  PYML_CALL_ISA(pairwise_cost_fwd_kernel, p, tasks / 2, tasks, work.get());
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int64_t i = 0; i < B * n * m; ++i) upstream[i] = T(uniform(random));
  p.cost.data = upstream.get();
  p.grad_x = {dx.get(), type, of_dx.data(), d, 1};
  p.grad_y = {dy.get(), type, of_dy.data(), d, 1};
  PYML_CALL_ISA(pairwise_cost_bwd_kernel, p, false, 0, PYML_CALL_ISA(pairwise_cost_bwd_tasks, p, false), work.get());
  PYML_CALL_ISA(pairwise_cost_bwd_kernel, p, true, 0, PYML_CALL_ISA(pairwise_cost_bwd_tasks, p, true), work.get());

  const double precision = std::numeric_limits<T>::epsilon();
  std::vector<double> tx(size_t(B * n * d), 0), ty(size_t(B * m * d), 0);
  for (int64_t q = 0; q < B; ++q)
    for (int64_t i = q * n; i < (q + 1) * n; ++i)
      for (int64_t j = q * m; j < (q + 1) * m; ++j) {
        double total = 0, norms = x.length[size_t(i)] * y.length[size_t(j)];
        for (int64_t k = 0; k < d; ++k)
          total += cosine ? x.at(i, k) * y.at(j, k) / norms : (x.at(i, k) - y.at(j, k)) * (x.at(i, k) - y.at(j, k));
        const double truth = cosine ? 1 - total : total;
        const int64_t at = i * m + j - q * m;
        expect("cost", n, m, d, cost[at], truth, 40 * precision * (1 + std::abs(truth)));
        if (!x.sound[size_t(i)]) continue;
        for (int64_t k = 0; k < d; ++k) {
          const double u = x.at(i, k), v = y.at(j, k), lx = x.length[size_t(i)], ly = y.length[size_t(j)];
          tx[size_t(i * d + k)] += upstream[at] * (cosine ? (total * u / lx - v / ly) / lx : 2 * (u - v));
          ty[size_t(j * d + k)] += upstream[at] * (cosine ? (total * v / ly - u / lx) / ly : 2 * (v - u));
        }
      }
  // One point of one coordinate has a cosine that cannot turn; what is left is rounding of the length of short ones.
  const double loose = 200 * precision * std::sqrt(double(n + m)) * (cosine ? 1e3 : 1);
  for (int64_t i = 0; i < B * n * d; ++i) expect("gradient of x", n, m, d, dx[i], tx[size_t(i)], loose);
  for (int64_t j = 0; j < B * m * d; ++j) expect("gradient of y", n, m, d, dy[j], ty[size_t(j)], loose);
}

}  // namespace

int main() {
  std::mt19937 random(11);
  const int sizes[][3] = {{1, 1, 1},    {5, 3, 0},      {49, 4, 70},  {4, 49, 70}, {3, 90, 5},
                          {40, 31, 17}, {130, 129, 65}, {64, 64, 64}, {129, 1, 3}};
  for (const auto& size : sizes)
    for (const bool cosine : {false, true})
      for (const bool odd : {false, true}) {
        test<double>(size[0], size[1], size[2], cosine, odd, random);
        test<float>(size[0], size[1], size[2], cosine, odd, random);
      }
  std::printf("%d checks, %d failures, %s\n", checks, failures, isa_name(cpu_isa()));
  return failures != 0 || checks == 0;
}
