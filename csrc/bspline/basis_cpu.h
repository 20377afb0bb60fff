// The B-spline basis of one feature for a vector of rows: interval search, de Boor's local recursion, extrapolation.
// Everything above it (basis, KAN, WKAN kernels) gets its numbers here.
#pragma once
#include "bspline/bspline.h"
#include "common/vec.h"

namespace pyml {
namespace CPU_CAPABILITY {

// Where a vector of inputs lies: the interval, the point that the polynomials are evaluated at, and who is outside.
template <class T>
struct Located {
  IVec<T> interval;
  IVec<T> outside;  // all ones where the basis is 0 ("zero")
  IVec<T> beyond;   // all ones where the point was moved to the inner interval ("clamp", "linear")
  Vec<T> x;         // the point
  Vec<T> shift;     // how far it was moved ("linear")
  Vec<T> u;         // uniform grids: where in the interval, 0 to 1
};

template <class T>
PYML_INLINE Vec<T> knot(const KnotRow<T>& row, const Spline<T>& s, IVec<T> index) {
  return lookup<T>(row.table, index + Int<T>(s.order), s.table());
}

// K is the order where it is known, else 0. A point within rounding of a knot may get the interval beside it: the
// pieces of a spline of order 3 or more, and its slope, meet there too smoothly to tell. Lower orders and other
// derivatives get the interval of the knots' own rounding.
template <class T, int K = 0>
PYML_INLINE Located<T> locate(const Spline<T>& s, const KnotRow<T>& row, Vec<T> x) {
  Located<T> at;
  at.shift = splat<T>(0);
  at.beyond = IVec<T>{};
  at.x = x;
  if (s.extrapolation == Extrapolation::kZero) {
    at.outside = (x < row.begin) | (x >= row.end);
    if (row.closed) at.outside &= (IVec<T>)(x != row.end);
    if (row.empty) at.outside = (IVec<T>)(x == x);
    at.x = min<T>(splat<T>(row.end), max<T>(splat<T>(row.begin), x));  // NaN stays
  } else {
    at.outside = IVec<T>{};
    if (row.empty) at.outside = (IVec<T>)(x == x);
    at.x = min<T>(splat<T>(row.high), max<T>(splat<T>(row.low), x));
    at.beyond = (IVec<T>)(at.x != x) & (IVec<T>)(x == x);
    at.shift = at.beyond ? x - at.x : at.shift;
  }
  IVec<T> j;
  if (s.uniform) {
    Vec<T> t = (at.x - row.begin) * row.inverse_step;
    t = min<T>(max<T>(t, splat<T>(T(row.first))), splat<T>(T(row.last)));  // NaN becomes `first`
    j = __builtin_convertvector(t, IVec<T>);
    const Vec<T> start = lookup<T>(row.table + s.order, j, s.knots);
    if constexpr (K > 2) {
      at.u = (at.x - start) * row.inverse_step;
      at.interval = j;
      return at;
    }
    // The quotient put right by at most one: t_j <= x < t_j+1.
    const Vec<T> stop = lookup<T>(row.table + s.order + 1, j, s.knots - 1);
    const IVec<T> below = (at.x < start) & (j > Int<T>(row.first)), above = (at.x >= stop) & (j < Int<T>(row.last));
    j += below - above;
    at.u = (at.x - (above ? stop : start)) * row.inverse_step;
    at.u = below ? at.u + T(1) : at.u;
  } else {
    j = IVec<T>{} - 1;
    const T* t = row.table + s.order;
    for (int q = 0; q < s.knots; ++q) j -= (IVec<T>)(at.x >= t[q]);
  }
  j = j < Int<T>(row.first) ? IVec<T>{} + Int<T>(row.first) : j;
  at.interval = j > Int<T>(row.last) ? IVec<T>{} + Int<T>(row.last) : j;
  return at;
}

// N[m] = value of basis function J - K + m at the point, for m = 0..K; D[m] its first derivative when kSlope. No step
// divides by zero: every width spans interval J, which is not empty.
template <class T, int K, bool kSlope>
PYML_INLINE void de_boor(const Spline<T>& s, const KnotRow<T>& row, const Located<T>& at, Vec<T>* N, Vec<T>* D) {
  Vec<T> term[K];
  N[0] = splat<T>(1);
  if constexpr (K == 3) {
    if (s.uniform) {  // the same four cubics, multiplied out
      const Vec<T> u = at.u, w = T(1) - u, uu = u * u, ww = w * w;
      constexpr T kTwoThirds = T(2.0 / 3), kSixth = T(1.0 / 6);
      N[0] = ww * (w * kSixth);
      N[1] = uu * (u * T(0.5) - T(1)) + kTwoThirds;
      N[2] = ww * (w * T(0.5) - T(1)) + kTwoThirds;
      N[3] = uu * (u * kSixth);
      if constexpr (kSlope) {
        const T h = row.inverse_step;
        D[0] = ww * (T(-0.5) * h);
        D[1] = u * (u * T(1.5) - T(2)) * h;
        D[2] = w * (T(2) - w * T(1.5)) * h;
        D[3] = uu * (T(0.5) * h);
      }
      return;
    }
  }
  if (s.uniform) {
    const Vec<T> u = at.u;
#pragma GCC unroll 5
    for (int d = 1; d <= K; ++d) {
      Vec<T> carried = splat<T>(0);
#pragma GCC unroll 5
      for (int r = 0; r < d; ++r) {
        term[r] = N[r] * T(1.0 / d);
        N[r] = carried + (T(r + 1) - u) * term[r];
        carried = (u + T(d - r - 1)) * term[r];
      }
      N[d] = carried;
    }
    if constexpr (kSlope) {
      const T scale = T(K) * row.inverse_step;
      D[0] = -term[0] * scale;
#pragma GCC unroll 5
      for (int m = 1; m < K; ++m) D[m] = (term[m - 1] - term[m]) * scale;
      D[K] = term[K - 1] * scale;
    }
    return;
  }
  Vec<T> left[K + 1], right[K + 1];  // left[d] = x - t_{J+1-d}, right[d] = t_{J+d} - x
#pragma GCC unroll 5
  for (int d = 1; d <= K; ++d) {
    left[d] = at.x - knot(row, s, at.interval + Int<T>(1 - d));
    right[d] = knot(row, s, at.interval + Int<T>(d)) - at.x;
    Vec<T> carried = splat<T>(0);
#pragma GCC unroll 5
    for (int r = 0; r < d; ++r) {
      term[r] = N[r] / (right[r + 1] + left[d - r]);
      N[r] = carried + right[r + 1] * term[r];
      carried = left[d - r] * term[r];
    }
    N[d] = carried;
  }
  if constexpr (kSlope) {
    D[0] = -term[0] * T(K);
#pragma GCC unroll 5
    for (int m = 1; m < K; ++m) D[m] = (term[m - 1] - term[m]) * T(K);
    D[K] = term[K - 1] * T(K);
  }
}

// Basis (and slope) with extrapolation applied; the padded coefficient row of N[m] is at.interval + m.
template <class T, int K, bool kSlope>
PYML_INLINE void basis(const Spline<T>& s, const KnotRow<T>& row, const Located<T>& at, Vec<T>* N, Vec<T>* D) {
  const Vec<T> zero = splat<T>(0);
  if (s.extrapolation == Extrapolation::kLinear) {
    Vec<T> slope[K + 1];
    de_boor<T, K, true>(s, row, at, N, slope);
#pragma GCC unroll 6
    for (int m = 0; m <= K; ++m) N[m] = at.beyond ? N[m] + at.shift * slope[m] : N[m];
    if constexpr (kSlope)
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) D[m] = slope[m];
  } else {
    de_boor<T, K, kSlope>(s, row, at, N, D);
    if constexpr (kSlope)
#pragma GCC unroll 6
      for (int m = 0; m <= K; ++m) D[m] = at.beyond ? zero : D[m];
  }
#pragma GCC unroll 6
  for (int m = 0; m <= K; ++m) {
    N[m] = at.outside ? zero : N[m];
    if constexpr (kSlope) D[m] = at.outside ? zero : D[m];
  }
  if (s.extrapolation == Extrapolation::kLinear)
    N[0] += at.shift * T(0);  // an infinite input gives NaN: the functions that are 0 here are 0 * infinity
}

// Any derivative: the basis of order K - derivative by the recursion, then that many differences. `rest` is what all
// other functions have: 0, or NaN where 0 times a term with x in it is NaN.
template <class T, int kOrder = 0>
PYML_INLINE IVec<T> basis_derivative(const Spline<T>& s, const KnotRow<T>& row, Vec<T> x, int derivative, Vec<T>* N,
                                     Vec<T>* rest) {
  Located<T> at = locate<T>(s, row, x);
  if (row.empty) at.outside = IVec<T>{} - 1;
  const int K = kOrder ? kOrder : s.order;
  const Vec<T> zero = splat<T>(0);
  auto t = [&](int offset) { return knot(row, s, at.interval + Int<T>(offset)); };
  auto evaluate = [&](int degree, Vec<T>* out) {
    out[0] = splat<T>(1);
    for (int d = 1; d <= K - degree; ++d) {
      Vec<T> carried = splat<T>(0);
      for (int r = 0; r < d; ++r) {
        const Vec<T> right = t(r + 1) - at.x, left = at.x - t(1 - d + r), term = out[r] / (right + left);
        out[r] = carried + right * term;
        carried = left * term;
      }
      out[d] = carried;
    }
    for (int q = K - degree + 1; q <= K; ++q) {
      Vec<T> before = splat<T>(0);
      for (int m = 0; m <= q; ++m) {
        const Vec<T> here = m < q ? out[m] / (t(m + 1) - t(m + 1 - q)) : splat<T>(0);
        out[m] = (before - here) * T(q);
        before = here;
      }
    }
  };
  evaluate(derivative, N);
  const int survives = s.extrapolation == Extrapolation::kLinear ? 1 : 0;
  Vec<T> slope[6];
  const bool straight = s.extrapolation == Extrapolation::kLinear && derivative == 0;
  if (straight) evaluate(1, slope);
  *rest = zero;
  if (derivative < K) *rest = x != x ? x : zero;  // the highest derivative does not depend on where x is
  if (straight) *rest += at.shift * T(0);
  for (int m = 0; m <= K; ++m) {
    if (straight) N[m] = at.beyond ? N[m] + at.shift * slope[m] : N[m];
    if (derivative > survives) N[m] = at.beyond ? zero : N[m];
    N[m] = at.outside ? *rest : N[m];
    if (derivative < K) N[m] = x != x ? x : N[m];
  }
  return at.interval;
}

// Relative error of a few ulp everywhere: 1 - exp(-2|x|) cancels near 0, so a series takes over there.
template <class T>
PYML_INLINE Vec<T> tanh(std::common_type_t<Vec<T>> x) {
  constexpr int kTerms = std::is_same_v<T, float> ? 5 : 8;  // the next one is below an eighth of an ulp at 1/8
  constexpr double kSeries[8] = {1.0,         -1.0 / 3,         2.0 / 15,          -17.0 / 315,
                                 62.0 / 2835, -1382.0 / 155925, 21844.0 / 6081075, -929569.0 / 638512875};
  const Vec<T> zero = splat<T>(0), one = splat<T>(1);
  const Vec<T> size = x < zero ? -x : x, e = exp<T>(size * T(-2));
  const Vec<T> far = (one - e) * reciprocal<T>(one + e), s = x * x;
  Vec<T> series = splat<T>(T(kSeries[kTerms - 1]));
#pragma GCC unroll 8
  for (int q = kTerms - 2; q >= 0; --q) series = series * s + T(kSeries[q]);
  return size < splat<T>(T(0.125)) ? x * series : (x < zero ? -far : far);
}

// The base branch and its derivative.
template <class T>
PYML_INLINE Vec<T> base_value(Base base, Vec<T> x, Vec<T>* slope = nullptr) {
  const Vec<T> one = splat<T>(1), zero = splat<T>(0);
  switch (base) {
    case Base::kSilu: {
      Vec<T> sigmoid = reciprocal<T>(one + exp<T>(-x));
      sigmoid = x < kExpLow<T> ? zero : sigmoid;  // exp is clamped there, and x may be huge
      const Vec<T> value = x * sigmoid;
      if (slope) *slope = sigmoid + value * (one - sigmoid);  // in this form right for huge x
      return value;
    }
    case Base::kTanh: {
      const Vec<T> value = tanh<T>(x);
      if (slope) *slope = one - value * value;
      return value;
    }
    case Base::kRelu:
      if (slope) *slope = x <= zero ? zero : one;  // 1 at NaN, as in torch
      return x <= zero ? zero : x;
    default:
      if (slope) *slope = one;
      return x;
  }
}

// Calls f(std::integral_constant<int, K>) for the spline's order.
template <class F>
PYML_INLINE void by_order(int order, F&& f) {
  switch (order) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 3>{});
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
