// B-splines by the plain double recursion, one number at a time: what the C++ kernel tests compare with.
#pragma once
#include <cmath>
#include <vector>

#include "bspline/bspline.h"

namespace reference {

struct Grid {
  std::vector<double> t;  // G + 2K + 1 knots
  int order;
  pyml::Extrapolation extrapolation;
  int count() const { return int(t.size()) - order - 1; }
};

// The interval that holds x, or -1: half-open, zero widths never chosen, the last knot closed only where it is
// repeated. NaN counts as in the first.
inline int interval(const Grid& g, double x) {
  const int last = int(g.t.size()) - 2;
  const bool zero = g.extrapolation == pyml::Extrapolation::kZero;
  int low = zero ? 0 : g.order, high = zero ? last : last - g.order;
  while (low < high && !(g.t[low + 1] > g.t[low])) ++low;
  while (high > low && !(g.t[high + 1] > g.t[high])) --high;
  if (!(g.t[low + 1] > g.t[low])) return -1;
  const bool closed = x == g.t.back() && g.t[last] == g.t[last + 1];
  if (zero && !closed && (x < g.t.front() || x >= g.t.back())) return -1;
  int j = -1;
  while (j + 1 < int(g.t.size()) && x >= g.t[j + 1]) ++j;
  return std::min(std::max(j, low), high);
}

inline double over(double a, double b) { return b == 0 ? 0 : a / b; }

// Derivative of degree d of function i of order k at x in interval j.
inline double value(const Grid& g, int i, int k, int d, double x, int j) {
  if (j < i || j > i + k) return 0;  // not its support
  if (k == 0) return d == 0 && i == j ? 1 : 0;
  const double left = g.t[i + k] - g.t[i], right = g.t[i + k + 1] - g.t[i + 1];
  if (d > 0)
    return k * (over(value(g, i, k - 1, d - 1, x, j), left) - over(value(g, i + 1, k - 1, d - 1, x, j), right));
  return over((x - g.t[i]) * value(g, i, k - 1, 0, x, j), left) +
         over((g.t[i + k + 1] - x) * value(g, i + 1, k - 1, 0, x, j), right);
}

// All functions at x, by the rules of pyml/reference/bspline.py.
inline std::vector<double> basis(const Grid& g, double x, int d) {
  const bool zero = g.extrapolation == pyml::Extrapolation::kZero,
             linear = g.extrapolation == pyml::Extrapolation::kLinear;
  const bool spoiled = std::isnan(x) && d < g.order;  // the highest derivative does not depend on where x is
  const bool endless = linear && d == 0 && std::isinf(x);
  std::vector<double> out(g.count(), spoiled || endless ? std::nan("") : 0.0);
  const int j = interval(g, x);
  if (spoiled || j < 0) return out;
  const double low = g.t[g.order], high = g.t[g.t.size() - 1 - g.order];
  const double nearest = zero || std::isnan(x) ? x : std::fmin(std::fmax(x, low), high);
  if (nearest != x && !std::isnan(x) && d > (linear ? 1 : 0)) return out;
  for (int i = 0; i < g.count(); ++i) {
    out[i] = value(g, i, g.order, d, nearest, j);
    if (linear && d == 0 && nearest != x) out[i] += (x - nearest) * value(g, i, g.order, 1, nearest, j);
  }
  return out;
}

// How far x lies beyond the inner grid where the spline goes on: what rounding of a slope is multiplied by.
inline double lever(const Grid& g, double x) {
  if (g.extrapolation != pyml::Extrapolation::kLinear) return 0;
  return std::abs(x - std::fmin(std::fmax(x, g.t[g.order]), g.t[g.t.size() - 1 - g.order]));
}

inline double base(pyml::Base kind, double x, bool slope) {
  const double s = 1 / (1 + std::exp(-x)), h = std::tanh(x);
  switch (kind) {
    case pyml::Base::kNone:
      return 0;
    case pyml::Base::kSilu:
      return slope ? s * (1 + x * (1 - s)) : x * s;
    case pyml::Base::kRelu:
      return slope ? (x <= 0 ? 0 : 1) : (x <= 0 ? 0 : x);  // NaN stays, with slope 1
    case pyml::Base::kTanh:
      return slope ? 1 - h * h : h;
    case pyml::Base::kIdentity:
      return slope ? 1 : x;
  }
  return 0;
}

}  // namespace reference
