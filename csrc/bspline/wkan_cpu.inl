// wkan_linear and wkan_conv2d on a CPU: one spline an input, then two matrix products, without z = [base(x), s(x)] ever
// leaving the cache.
//
// Rows lie in the vector lanes, so any number of outputs fills them. The spline of an interval is a polynomial whose
// coefficients come out of registers (up to 32 intervals). wkan_conv2d is the same code: its rows are patches, read in
// place, so the copy of kh * kw values a pixel lives in the first-level cache only. At 25 -> 16 it reaches about a
// third of the FMA rate: the long dependent chains of spline and exp and the loads of the rows take the rest.

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kWkanRows = 64;  // rows in a block: four vectors of floats

template <class T>
int64_t wkan_scratch_size(const WkanParams<T>& p) {
  const int64_t R = kWkanRows, block = p.block;
  return R * (6 * block + p.outputs + p.padded_outputs()) + 256;
}

// Polynomials in u, from -1/2 to 1/2 across interval J (about its middle the terms cancel least), of the K + 1 basis
// functions that live there: piece[m][q] multiplies u^q. de Boor's recursion on polynomials.
template <class T, int K>
void wkan_pieces(const T* t, double (*piece)[K + 1]) {  // t points at t_J
  const double width = double(t[1]) - double(t[0]), middle = double(t[0]) + width / 2;
  double N[K + 2][K + 1] = {};
  N[0][0] = 1;
  for (int d = 1; d <= K; ++d) {
    double carried[K + 1] = {};
    for (int r = 0; r < d; ++r) {
      const double right = double(t[r + 1]) - middle, left = middle - double(t[1 - d + r]);
      double term[K + 1], next[K + 1];
      for (int q = 0; q <= K; ++q) term[q] = N[r][q] / (right + left);
      for (int q = 0; q <= K; ++q) {
        const double shifted = q ? width * term[q - 1] : 0;
        next[q] = left * term[q] + shifted;
        N[r][q] = carried[q] + right * term[q] - shifted;
      }
      for (int q = 0; q <= K; ++q) carried[q] = next[q];
    }
    for (int q = 0; q <= K; ++q) N[d][q] = carried[q];
  }
  for (int m = 0; m <= K; ++m)
    for (int q = 0; q <= K; ++q) piece[m][q] = N[m][q];
}

template <class T>
void wkan_power(const WkanParams<T>& p, int64_t begin, int64_t end) {
  const int64_t nb = p.spline.functions(), ld = p.power_ld();
  by_order(p.spline.order, [&](auto order) {
    constexpr int K = decltype(order)::value;
    double piece[K + 1][K + 1];
    if (p.spline.uniform) {
      T even[2 * K + 2];
      for (int j = 0; j < 2 * K + 2; ++j) even[j] = T(j - K);
      wkan_pieces<T, K>(even + K, piece);
    }
    for (int64_t i = begin; i < end; ++i) {
      const T* t = p.spline.row(i).table + K;
      T* out = p.power + i * (K + 1) * ld;
      std::memset(out, 0, size_t((K + 1) * ld) * sizeof(T));
      for (int j = 0; j < p.spline.knots - 1; ++j) {
        if (!(t[j + 1] > t[j])) continue;
        if (!p.spline.uniform) wkan_pieces<T, K>(t + j, piece);
        for (int q = 0; q <= K; ++q) {
          double total = 0;
          for (int m = 0; m <= K; ++m)
            if (j + m >= K && j + m < K + nb) total += piece[m][q] * double(p.coeff[i * nb + j + m - K]);
          out[q * ld + j] = T(total);
        }
      }
    }
  });
}

// The spline of one feature at a located point, and its slope when asked for; `table` is the feature's `power`.
template <class T, int K, bool kSlope>
PYML_INLINE Vec<T> wkan_spline(const Spline<T>& s, const KnotRow<T>& row, const T* table, int64_t ld,
                               const Located<T>& at, Vec<T>* slope) {
  Vec<T> u = at.u, inverse = splat<T>(row.inverse_step);
  if (!s.uniform) {
    const Vec<T> start = knot(row, s, at.interval);
    inverse = T(1) / (knot(row, s, at.interval + 1) - start);
    u = (at.x - start) * inverse;
  }
  u -= T(0.5);
  Vec<T> value = lookup<T>(table + K * ld, at.interval, s.knots - 1), rate = value;
#pragma GCC unroll 5
  for (int q = K - 1; q >= 0; --q) {
    if (q < K - 1) rate = rate * u + value;  // Horner's rule for both at once
    value = value * u + lookup<T>(table + q * ld, at.interval, s.knots - 1);
  }
  const Vec<T> zero = splat<T>(0);
  if (kSlope || s.extrapolation == Extrapolation::kLinear) rate = rate * inverse;
  if (s.extrapolation == Extrapolation::kLinear) value += at.shift * rate;
  if constexpr (kSlope) {
    if (s.extrapolation == Extrapolation::kClamp) rate = at.beyond ? zero : rate;
    *slope = at.outside ? zero : rate;
  }
  value = at.outside ? zero : value;
  return s.extrapolation == Extrapolation::kLinear ? value + at.shift * T(0) : value;  // for infinities: see basis()
}

template <class T>
void wkan_fwd(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t R = kWkanRows, I = p.features, ld = p.power_ld();
  const Spline<T> s = p.spline;  // copies: no store can change them, so the loop keeps them in registers
  const Base kind = p.base;
  by_order(p.spline.order, [&](auto order) {
    constexpr int K = decltype(order)::value, L = kLanes<T>;
    T* x = scratch;                  // [block][R]
    T* spline = x + p.block * R;     // [block][R]
    T* base = spline + p.block * R;  // [block][R]
    T* y = base + p.block * R;       // [out][R]
    for (int64_t r0 = begin; r0 < end; r0 += R) {
      const int64_t n = end - r0 < R ? end - r0 : R;
      std::memset(y, 0, size_t(p.outputs * R) * sizeof(T));
      for (int64_t i0 = 0; i0 < I; i0 += p.block) {
        const int64_t ni = I - i0 < p.block ? I - i0 : p.block;
        load_columns<T>(p.x, r0, n, i0, ni, x, R);
        for (int64_t i = 0; i < ni; ++i) {
          const KnotRow<T> row = s.row(i0 + i);
          const T* table = p.power + (i0 + i) * (K + 1) * ld;
          // Two loops: both chains are long, and the shorter the body, the more vectors are under way at once.
          for (int64_t r = 0; r < R; r += L) {
            const Vec<T> v = load<T>(x + i * R + r);
            store<T>(spline + i * R + r, wkan_spline<T, K, false>(s, row, table, ld, locate<T, K>(s, row, v), nullptr));
          }
          if (p.base_weight)
            for (int64_t r = 0; r < R; r += L) store<T>(base + i * R + r, base_value<T>(kind, load<T>(x + i * R + r)));
        }
        gemm_add<T>(p.outputs, R, ni, p.scaler + i0, I, 1, spline, R, y, R);
        if (p.base_weight) gemm_add<T>(p.outputs, R, ni, p.base_weight + i0, I, 1, base, R, y, R);
      }
      store_columns<T>(y, R, p.y, r0, n, 0, p.outputs);
    }
  });
}

// Row r0 + r, column c += src[(c - c0) * ld + r], in Rows of dtype T: patches overlap.
template <class T>
void add_columns(const T* src, int64_t ld, const Rows& dst, int64_t r0, int64_t n, int64_t c0, int64_t nc) {
  for_runs(dst, r0, n, [&](int64_t first, int64_t length, int64_t offset) {
    for (int64_t c = 0; c < nc; ++c) {
      T* to = static_cast<T*>(dst.data) + offset + dst.column(c0 + c);
      for (int64_t i = 0; i < length; ++i) to[i * dst.stride_w] += src[c * ld + first + i];
    }
  });
}

// moments[interval of lane l][m] += N[m] of lane l. Lanes may share an interval, so they are added one after the other;
// for cubics in floats the four numbers of a lane are brought together first and added at once.
template <class T, int K>
PYML_INLINE void add_moments(const Vec<T>* N, const IVec<T>& interval, T* moments) {
  constexpr int L = kLanes<T>;
  Int<T> at[L];
  store_int<T>(at, interval);
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (K == 3 && std::is_same_v<T, float>) {
    float lane[4][L];  // lane[q][4 g ...] are the moments of lane 4 g + q
    const Vec<T> low01 = interleave_low(N[0], N[1]), high01 = interleave_high(N[0], N[1]);
    const Vec<T> low23 = interleave_low(N[2], N[3]), high23 = interleave_high(N[2], N[3]);
    store<T>(lane[0], interleave_low_pairs(low01, low23));
    store<T>(lane[1], interleave_high_pairs(low01, low23));
    store<T>(lane[2], interleave_low_pairs(high01, high23));
    store<T>(lane[3], interleave_high_pairs(high01, high23));
    for (int l = 0; l < L; ++l) {
      float* to = moments + at[l] * 4;
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_loadu_ps(lane[l % 4] + l / 4 * 4)));
    }
    return;
  }
#endif
  T weighted[K + 1][L];
  for (int m = 0; m <= K; ++m) store<T>(weighted[m], N[m]);
  for (int l = 0; l < L; ++l)
    for (int m = 0; m <= K; ++m) moments[at[l] * (K + 1) + m] += weighted[m][l];
}

template <class T>
void wkan_bwd(const WkanParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t R = kWkanRows, I = p.features, O = p.outputs, padded = p.padded_outputs(), ld = p.partial_ld();
  const Spline<T> s = p.spline;
  const Base kind = p.base;
  by_order(p.spline.order, [&](auto order) {
    constexpr int K = decltype(order)::value, L = kLanes<T>;
    T* x = scratch;  // [block][R], as are the next five; dx takes the place of x
    T* spline = x + p.block * R;
    T* base = spline + p.block * R;
    T* dspline = base + p.block * R;
    T* dbase = dspline + p.block * R;
    T* g = dbase + p.block * R;  // [out][R]
    T* g_rows = g + O * R;       // [R][padded]
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / p.blocks(), i0 = task % p.blocks() * p.block;
      const int64_t ni = I - i0 < p.block ? I - i0 : p.block;
      const int64_t first = split * p.rows_per_split;
      const int64_t last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
      T* partial = p.partial + (split * I + i0) * ld;
      if (p.want_weights) std::memset(partial, 0, size_t(ni * ld) * sizeof(T));
      for (int64_t r0 = first; r0 < last; r0 += R) {
        const int64_t n = last - r0 < R ? last - r0 : R;
        load_columns<T>(p.x, r0, n, i0, ni, x, R);
        load_columns<T>(p.y, r0, n, 0, O, g, R);
        std::memset(dspline, 0, size_t(2 * p.block * R) * sizeof(T));  // and dbase behind it
        gemm_add<T>(ni, R, O, p.scaler + i0, 1, I, g, R, dspline, R);
        if (p.base_weight && p.want_x) gemm_add<T>(ni, R, O, p.base_weight + i0, 1, I, g, R, dbase, R);
        for (int64_t i = 0; i < ni; ++i) {
          const KnotRow<T> row = s.row(i0 + i);
          const T* table = p.power + (i0 + i) * (K + 1) * p.power_ld();
          T* moments = partial + i * ld + 2 * padded;
          for (int64_t r = 0; r < R; r += L) {
            const Vec<T> v = load<T>(x + i * R + r), ds = load<T>(dspline + i * R + r);
            Vec<T> spline_slope, base_slope = splat<T>(0);
            const Located<T> at = locate<T, K>(s, row, v);
            store<T>(spline + i * R + r, wkan_spline<T, K, true>(s, row, table, p.power_ld(), at, &spline_slope));
            Vec<T> dx = ds * spline_slope;
            if (p.base_weight) {
              store<T>(base + i * R + r, base_value<T>(kind, v, &base_slope));
              dx += load<T>(dbase + i * R + r) * base_slope;
            }
            store<T>(x + i * R + r, dx);
            if (!p.want_weights) continue;
            Vec<T> N[K + 1];
            basis<T, K, false>(s, row, at, N, nullptr);
#pragma GCC unroll 6
            for (int m = 0; m <= K; ++m) N[m] *= ds;
            add_moments<T, K>(N, at.interval, moments);
          }
        }
        if (p.want_x) {
          if (p.add_dx)
            add_columns<T>(x, R, p.dx, r0, n, i0, ni);
          else
            store_columns<T>(x, R, p.dx, r0, n, i0, ni);
        }
        if (!p.want_weights) continue;
        load_rows<T>(p.y, r0, n, 0, O, g_rows, padded);
        gemm_add<T>(ni, padded, n, spline, R, 1, g_rows, padded, partial, ld);
        if (p.base_weight) gemm_add<T>(ni, padded, n, base, R, 1, g_rows, padded, partial + padded, ld);
      }
    }
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace pyml
