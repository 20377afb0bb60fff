// Exactly sized memory, random grids and inputs for the B-spline kernel tests.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bspline/bspline.h"
#include "bspline/knots.h"
#include "reference.h"

namespace setup {

using namespace pyml;
inline int failures = 0, checks = 0;

// Exactly `n` elements, filled with NaN: what a kernel forgets to write shows.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t n) : size_(n), data_(static_cast<T*>(std::malloc(std::max<size_t>(1, n * sizeof(T))))) {
    std::fill(data_.get(), data_.get() + n, std::numeric_limits<T>::quiet_NaN());
  }
  T* get() { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<T, Free> data_;
};

struct Case {
  int order, intervals, kind, features, outputs, rows;
  bool shared, half;
  Extrapolation extrapolation;
  Base base;
  bool wild = false;  // some inputs are huge, infinite or NaN
  std::string text() const {
    char buffer[200];
    std::snprintf(buffer, sizeof buffer, "order %d G %d kind %d in %d out %d rows %d shared %d half %d mode %d base %d",
                  order, intervals, kind, features, outputs, rows, shared, half, int(extrapolation), int(base));
    return buffer;
  }
};

inline void expect(const Case& c, const char* what, double got, double truth, double scale, double eps) {
  ++checks;
  const bool same =
      std::isnan(truth) ? std::isnan(got) : got == truth || std::abs(got - truth) <= 400 * eps * scale + 1e-30;
  if (same) return;
  if (++failures <= 20) std::printf("FAILED %s: %s: got %.9g, expected %.9g\n", c.text().c_str(), what, got, truth);
}

// kinds: 0 uniform, 1 uneven, 2 one inner knot twice, 3 ends k + 1 times, 4 all knots equal
inline std::vector<double> knots(const Case& c, std::mt19937& random) {
  const int n = c.intervals + 2 * c.order + 1;
  std::vector<double> t(n);
  std::uniform_real_distribution<double> gap(0.3, 1.0);
  for (int j = 0; j < n; ++j)
    t[j] = c.kind == 1 || c.kind == 2 ? (j ? t[j - 1] + gap(random) : -2.0) : -1 + 2.0 / c.intervals * (j - c.order);
  if (c.kind == 2) t[c.order + c.intervals / 2 + 1] = t[c.order + c.intervals / 2];
  if (c.kind == 3)
    for (int j = 0; j < c.order; ++j) t[j] = t[c.order], t[n - 1 - j] = t[n - 1 - c.order];
  if (c.kind == 4) std::fill(t.begin(), t.end(), 0.25);
  return t;
}

template <class T>
struct Setup {
  Case c;
  std::vector<reference::Grid> grids;
  std::vector<KnotRow<T>> rows;
  std::vector<std::unique_ptr<Memory<T>>> tables;
  Spline<T> spline;
  std::vector<double> x;  // as the kernel sees it, [row, feature]
  Memory<T> x_memory;
  Memory<uint16_t> x_half;
  Rows x_rows;

  Setup(const Case& c, std::mt19937& random)
      : c(c),
        x(c.rows * c.features),
        x_memory(c.half ? 0 : c.rows * c.features),
        x_half(c.half ? c.rows * c.features : 0) {
    const int count = c.shared ? 1 : c.features, n = c.intervals + 2 * c.order + 1;
    rows.resize(count);
    spline = {rows.data(), c.shared ? 0 : 1, n, c.order, true, c.extrapolation};
    for (int r = 0; r < count; ++r) {
      std::vector<T> t;
      for (double v : knots(c, random)) t.push_back(T(v));
      tables.push_back(std::make_unique<Memory<T>>(knot_table_size(n, c.order)));
      std::fill(tables[r]->get(), tables[r]->get() + tables[r]->size(), T(0));
      prepare_knots(t.data(), int64_t(n), int64_t(c.order), c.extrapolation, tables[r]->get(), rows[r]);
      spline.uniform = spline.uniform && uniform_knots(t.data(), int64_t(n));
      grids.push_back({std::vector<double>(t.begin(), t.end()), c.order, c.extrapolation});
    }
    fill(random);
  }

  const reference::Grid& grid(int feature) const { return grids[c.shared ? 0 : feature]; }

  void fill(std::mt19937& random) {
    std::normal_distribution<double> normal(0, 1.2);
    std::uniform_int_distribution<int> choice(0, 99);
    for (int i = 0; i < c.rows * c.features; ++i) {
      const auto& t = grid(i % c.features).t;
      const int kind = choice(random);
      double v = normal(random);
      if (kind < 15) v = t[random() % t.size()];  // exactly on a knot
      if (kind == 15) v = 1e-40;
      if (kind > 15 && kind < 21 && c.wild) {
        constexpr double kInfinity = std::numeric_limits<double>::infinity();
        constexpr double kWild[] = {1e4, -1e30, kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN()};
        v = kWild[kind - 16];
      }
      store(i, v);
    }
    x_rows.data = c.half ? static_cast<void*>(x_half.get()) : static_cast<void*>(x_memory.get());
    x_rows.dtype = c.half ? DType::kBFloat16 : sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
    x_rows.width = c.rows;
    x_rows.stride_w = c.features;
  }

  void store(int i, double v) {
    if (c.half) {
      const float f = float(v);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      x_half[i] = uint16_t(bits >> 16);
      bits = uint32_t(x_half[i]) << 16;
      float back;
      std::memcpy(&back, &bits, 4);
      x[i] = back;
    } else {
      x_memory[i] = T(v);
      x[i] = double(T(v));
    }
  }

  // An input whose terms overflow or cancel says nothing about rounding.
  bool tame(int row) const {
    for (int i = 0; i < c.features; ++i)
      if (!(std::abs(x[row * c.features + i]) <= 1e3)) return false;
    return true;
  }
};

template <class T>
Memory<T> random_values(int64_t n, std::mt19937& random) {
  std::normal_distribution<double> normal(0, 1);
  Memory<T> m(n);
  for (int64_t i = 0; i < n; ++i) m[i] = T(normal(random));
  return m;
}

template <class T>
Rows matrix(Memory<T>& m, int64_t rows, int64_t columns) {
  Rows r;
  r.data = m.get();
  r.dtype = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  r.width = rows;
  r.stride_w = columns;
  return r;
}

}  // namespace setup
