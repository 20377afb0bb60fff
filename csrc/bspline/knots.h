// One row of knots made ready for the kernels. No torch: the C++ tests use it too.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bspline/bspline.h"

namespace pyml {

// Elements of a row's table: K more knots on each side, and what a vector load may read beyond.
inline int64_t knot_table_size(int64_t knots, int64_t order) {
  return std::max<int64_t>(knots + 2 * order, kMinTable) + order + 1;
}

// Equally spaced to within a few rounding errors of a step: the kernels then work on exactly equal steps, and what they
// ignore is of the size of the other rounding errors. Finer or far-away grids, whose knots are rounded more coarsely
// than that, take the general path.
template <class T>
bool uniform_knots(const T* t, int64_t n) {
  const double step = (double(t[n - 1]) - double(t[0])) / double(n - 1);
  if (!(step > 0) || !std::isfinite(step)) return false;
  const double most = 20 * std::numeric_limits<T>::epsilon() * step;  // [-1, 1] in 20 float steps needs 16
  for (int64_t j = 0; j < n; ++j)
    if (!(std::abs(double(t[0]) + double(j) * step - double(t[j])) <= most)) return false;
  return true;
}

// Ascending, and no further from 0 than a quarter of the largest number: then no difference between knots overflows,
// those that prepare_knots adds among them.
template <class T>
bool ascending_knots(const T* t, int64_t n) {
  constexpr T most = std::numeric_limits<T>::max() / 4;
  for (int64_t j = 1; j < n; ++j)
    if (!(t[j] >= t[j - 1])) return false;
  return t[0] >= -most && t[n - 1] <= most;
}

// Fills `table` (knot_table_size elements, zeroed) and `row` from n knots.
template <class T>
void prepare_knots(const T* t, int64_t n, int64_t order, Extrapolation extrapolation, T* table, KnotRow<T>& row) {
  const T step = (t[n - 1] - t[0]) / T(n - 1), outer = step > 0 ? step : T(1);
  for (int64_t j = -order; j < n + order; ++j)  // knots further out exist for the recursion only
    table[j + order] = j < 0 ? t[0] + T(j) * outer : j < n ? t[j] : t[n - 1] + T(j - n + 1) * outer;
  T* inner = table + order;
  for (int64_t j = 1; j < n; ++j)  // gaps too small to divide by are repeated knots
    if (!(inner[j] - inner[j - 1] > 4 / std::numeric_limits<T>::max())) inner[j] = inner[j - 1];
  t = inner;
  const bool zero = extrapolation == Extrapolation::kZero;
  int64_t first = zero ? 0 : order, last = zero ? n - 2 : n - 2 - order;
  while (first < last && !(t[first + 1] > t[first])) ++first;
  while (last > first && !(t[last + 1] > t[last])) --last;
  row.table = table;
  row.begin = t[0];
  row.end = t[n - 1];
  row.low = t[order];
  row.high = t[n - 1 - order];
  row.inverse_step = T(1) / outer;
  row.first = int32_t(first);
  row.last = int32_t(last);
  row.closed = t[n - 1] == t[n - 2];
  row.empty = !(t[first + 1] > t[first]);
}

}  // namespace pyml
