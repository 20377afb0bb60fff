// Scales of short stretches of elements, in any of their forms.
#pragma once
#include "common/strided_cpu.h"
#include "hetero_noise/hetero_noise.h"

namespace pyml {
namespace CPU_CAPABILITY {

template <class T>
inline T one_of(const Strided& s, int64_t i) {
  T found = 0;
  by_dtype(s.dtype, [&](auto tag) { found = T(widen(static_cast<const decltype(tag)*>(s.data)[i * s.strides[0]])); });
  return found;
}

// The scale of the elements [i0, i0 + n).
template <class T>
inline void gather_scale(const Elements& e, const Scale& scale, int64_t i0, int64_t n, T* dst) {
  switch (scale.kind) {
    case ScaleKind::kNone:
    case ScaleKind::kNumber:
      for (int64_t i = 0; i < n; ++i) dst[i] = T(scale.number);
      return;
    case ScaleKind::kElements:
      return gather(e, scale.elements, i0, n, dst);
    case ScaleKind::kFactors: {
      int64_t row = i0 / scale.columns, column = i0 % scale.columns;
      for (int64_t i = 0; i < n;) {
        const T factor = one_of<T>(scale.row, row);
        const int64_t left = scale.columns - column, length = left < n - i ? left : n - i;
        by_dtype(scale.column.dtype, [&](auto tag) {
          const auto* src = static_cast<const decltype(tag)*>(scale.column.data);
          const int64_t step = scale.column.strides[0];
          if (step == 1)
            for (int64_t j = 0; j < length; ++j) dst[i + j] = factor * T(widen(src[column + j]));
          else
            for (int64_t j = 0; j < length; ++j) dst[i + j] = factor * T(widen(src[(column + j) * step]));
        });
        i += length;
        column = 0;
        ++row;
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
