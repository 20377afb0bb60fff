// Scalar B-spline maths for one input, on a GPU or a CPU: the k + 1 functions that are not zero at x, by the recursion
// of de Boor. Edge rules are those of pyml/reference/bspline.py. No torch here.
//
// In the interval of x no denominator vanishes except on grids without any interval, so repeated knots need no case of
// their own.
#pragma once
#include <cmath>
#include <cstdint>

#include "bspline/bspline.h"
#include "common/host_device.h"

namespace pyml {

constexpr int kMaxOrder = 5;

// Values of the functions first .. first + order, all of which exist. All other functions have the value `rest`: 0, or
// NaN where the reference has NaN.
template <class A, int kMax>
struct Local {
  int first;
  A rest;
  A value[kMax + 1];
};

// Number of knots at or below x, strictly below when `strict`.
template <class A>
PYML_HD int knots_below(A x, const A* knots, int count, bool strict) {
  int low = 0, high = count;  // the answer lies in [low, high]
  while (low < high) {
    const int middle = (low + high) / 2;
    const A t = knots[middle];
    if (x > t || (x == t && !strict))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// kMax >= order; order is a constant where the caller fixes it, and then all loops unroll.
template <int kMax, class A>
PYML_HD Local<A, kMax> nonzero(A x, const A* knots, int count, int order, int derivative, Extrapolation mode) {
  Local<A, kMax> out;
  const bool linear = mode == Extrapolation::kLinear && derivative == 0;
  const int edge = mode == Extrapolation::kZero ? 0 : order;
  const A low = knots[edge], high = knots[count - 1 - edge];
  A near = x, start = A(1), beyond = A(0);
  if (mode == Extrapolation::kZero) {
    const bool inside = (x >= low && x < high) || (x == high && high == knots[count - 2]) || x != x;
    if (!inside) {  // an infinite x must not turn 0 * x into NaN
      near = low;
      start = A(0);
    }
  } else {
    near = x < low ? low : (x > high ? high : x);
    if (derivative > (mode == Extrapolation::kLinear ? 1 : 0) && x != near && x == x) start = A(0);
    if (linear && x != near) beyond = x - near;
  }
  const A at = near == near ? near : low;
  int j = knots_below(at, knots, count, at >= high) - 1;
  j = j < 0 ? 0 : (j > count - 2 ? count - 2 : j);
  if (!(low < high)) {  // an inner grid of no width has no functions to continue
    j = 0;
    start = A(0);
  }

  out.value[0] = start;
  PYML_UNROLL
  for (int r = 1; r <= kMax; ++r) {
    if (r > order) break;
    A carry = A(0), slope = A(0);
    PYML_UNROLL
    for (int q = 0; q < r; ++q) {
      int l = j + 1 - r + q, h = j + 1 + q;
      l = l < 0 ? 0 : l;
      h = h > count - 1 ? count - 1 : h;
      const A left = knots[l], right = knots[h], width = right - left;
      const A term = width == A(0) ? A(0) : out.value[q] / width;
      if (r > order - derivative) {
        out.value[q] = carry - A(r) * term;
        carry = A(r) * term;
      } else {
        A value = carry + (right - near) * term;
        if (linear && r == order) {
          value += beyond * (slope - A(r) * term);
          slope = A(r) * term;
        }
        out.value[q] = value;
        carry = (near - left) * term;
      }
    }
    if (linear && r == order) carry += beyond * slope;
    out.value[r] = carry;
  }
  out.rest = beyond * A(0) + (derivative < order ? near * A(0) : A(0));
  // Near the ends some of the functions j - order .. j do not exist: move the window to those that do.
  const int last = count - 2 * order - 2;  // first function of the last window
  out.first = j - order;
  for (; out.first < 0; ++out.first) {  // one step at a time: a second copy of the values would not stay in registers
    PYML_UNROLL
    for (int q = 0; q <= kMax; ++q) out.value[q] = q < order && q < kMax ? out.value[q < kMax ? q + 1 : q] : A(0);
  }
  for (; out.first > last; --out.first) {
    PYML_UNROLL
    for (int q = kMax; q >= 0; --q) out.value[q] = q > 0 && q <= order ? out.value[q > 0 ? q - 1 : q] : A(0);
  }
  PYML_UNROLL
  for (int q = 0; q <= kMax; ++q)
    if (q > order) out.value[q] = A(0);
  return out;
}

// sum_c coeff[c] * function c.
template <int kMax, class A>
PYML_HD A contract(const Local<A, kMax>& local, const A* coeff, int order) {
  A total = local.rest;
  PYML_UNROLL
  for (int q = 0; q <= kMax; ++q)
    if (q <= order) total += local.value[q] * coeff[local.first + q];
  return total;
}

template <class A>
PYML_HD A base_value(A x, Base base) {
  switch (base) {
    case Base::kSilu:
      return x / (A(1) + std::exp(-x));
    case Base::kRelu:
      return x <= A(0) ? A(0) : x;  // NaN stays NaN
    case Base::kTanh:
      return std::tanh(x);
    case Base::kIdentity:
      return x;
    default:
      return A(0);
  }
}

template <class A>
PYML_HD A base_slope(A x, Base base) {
  switch (base) {
    case Base::kSilu: {
      const A s = A(1) / (A(1) + std::exp(-x));
      return s * (A(1) + x * (A(1) - s));
    }
    case Base::kRelu:
      return x <= A(0) ? A(0) : A(1);
    case Base::kTanh: {
      const A t = std::tanh(x);
      return A(1) - t * t;
    }
    case Base::kIdentity:
      return A(1);
    default:
      return A(0);
  }
}

}  // namespace pyml
