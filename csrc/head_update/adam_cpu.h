// AdamW over runs of elements: in place where they lie one after the other, else through a copy in the first-level
// cache. Bound by memory.
#pragma once
#include "common/philox_cpu.h"
#include "common/strided_cpu.h"
#include "head_update/adam.h"

namespace pyml {
namespace CPU_CAPABILITY {

constexpr int64_t kShortRow = 16;  // rows below that are gathered element by element

// The elements [i, i + n) of a slice, which may be a part of a row or several rows.
struct Stretch {
  const Elements& e;
  int64_t i, n;
  int64_t place[kStridedDims] = {};  // of element i

  Stretch(const Elements& e, int64_t i, int64_t n) : e(e), i(i), n(n) {
    int64_t rest = i;
    for (int d = e.dims - 1; d > 0; --d) {
      const int64_t next = rest / e.sizes[d];
      place[d] = rest - next * e.sizes[d];
      rest = next;
    }
    place[0] = rest;
  }
  int64_t row() const { return e.dims > 0 ? e.sizes[e.dims - 1] : 1; }
  int64_t step(const Strided& s) const { return e.dims > 0 ? s.strides[e.dims - 1] : 1; }
  bool gapless(const Strided& s) const {
    int64_t expected = 1;
    for (int d = e.dims - 1; d >= 0; expected *= e.sizes[d--])
      if (s.strides[d] != expected) return false;
    return true;
  }
  // f(offset in memory, first element of the stretch, how many) for every row.
  template <class F>
  void rows(const Strided& s, F&& f) const {
    int64_t at[kStridedDims], offset = 0;
    for (int d = 0; d < e.dims; ++d) offset += (at[d] = place[d]) * s.strides[d];
    const int last = e.dims - 1;
    for (int64_t done = 0; done < n;) {
      const int64_t left = e.sizes[last] - at[last], length = left < n - done ? left : n - done;
      f(offset, done, length);
      done += length;
      offset -= at[last] * s.strides[last];
      at[last] = 0;
      for (int d = last - 1; d >= 0; --d) {
        offset += s.strides[d];
        if (++at[d] < e.sizes[d]) break;
        offset -= at[d] * s.strides[d];
        at[d] = 0;
      }
    }
  }
};

// Where the elements of an operand lie as T one after the other: in memory, or in `room`. Several rows at once, so that
// the memory of the next ones is on its way while the first ones are worked on.
template <class T>
inline T* fetch(const Stretch& at, const Strided& s, T* room) {
  if (s.dtype == (sizeof(T) == 4 ? DType::kFloat : DType::kDouble) && at.gapless(s))
    return static_cast<T*>(s.data) + at.i;
  if (at.row() < kShortRow) {
    gather(at.e, s, at.i, at.n, room);
    return room;
  }
  const int64_t step = at.step(s);
  // The rows of the next stretch: each lies in a page of its own, which takes long to find.
  const int64_t later = at.e.dims > 1 ? kAdamBlock / at.row() * s.strides[at.e.dims - 2] : 0;
  by_dtype(s.dtype, [&](auto tag) {
    at.rows(s, [&](int64_t offset, int64_t first, int64_t length) {
      const auto* src = static_cast<const decltype(tag)*>(s.data) + offset;
      T* to = room + first;
      for (int64_t j = 0; j < length; j += 16) __builtin_prefetch(src + later + j);
      if (step == 1)
        for (int64_t j = 0; j < length; ++j) to[j] = T(widen(src[j]));
      else
        for (int64_t j = 0; j < length; ++j) to[j] = T(widen(src[j * step]));
    });
  });
  return room;
}

template <class T>
inline void put(const Stretch& at, const Strided& s, const T* from) {
  if (at.row() < kShortRow) return scatter(at.e, s, at.i, at.n, from);
  const int64_t step = at.step(s);
  by_dtype(s.dtype, [&](auto tag) {
    using D = decltype(tag);
    at.rows(s, [&](int64_t offset, int64_t first, int64_t length) {
      D* dst = static_cast<D*>(s.data) + offset;
      const T* values = from + first;
      if (step == 1)
        for (int64_t j = 0; j < length; ++j) dst[j] = narrow<D>(values[j]);
      else
        for (int64_t j = 0; j < length; ++j) dst[j * step] = narrow<D>(values[j]);
    });
  });
}

// The random words of the elements [i, i + n).
inline void rounding_words(const AdamParams& p, uint32_t id, int64_t i, int64_t n, uint32_t* out) {
  alignas(64) uint32_t whole[kPhiloxBlock];
  for (int64_t block = i / kPhiloxBlock; block * kPhiloxBlock < i + n; ++block) {
    const Stream stream(p.key ^ kRoundingKey, uint32_t(block >> 28), id, p.number);
    for (int lane = 0; lane < 16; lane += kFloats) {
      U32 w[4];
      stream.words(uint32_t(uint64_t(block) * 16) + uint32_t(lane), w);
      for (int j = 0; j < 4; ++j) std::memcpy(whole + 16 * j + lane, &w[j], kVecBytes);
    }
    const int64_t start = block * kPhiloxBlock, from = start > i ? start : i;
    const int64_t limit = start + kPhiloxBlock, to = limit < i + n ? limit : i + n;
    std::memcpy(out + (from - i), whole + (from - start), size_t(to - from) * sizeof(uint32_t));
  }
}

// Its own function: the restricted pointers let the loop run in vectors.
template <class T>
inline void adam_run(const AdamNumbers<T>& s, int64_t n, T* __restrict p, const T* __restrict g, T* __restrict m,
                     T* __restrict v) {
  for (int64_t i = 0; i < n; ++i) adam(s, p[i], g[i], m[i], v[i]);
}

// Masters become what their step starts from.
template <class D, class T>
inline void start_run(int64_t n, T* __restrict master, const T* __restrict param) {
  for (int64_t i = 0; i < n; ++i) master[i] = start_of(master[i], T(widen(narrow<D>(master[i]))), param[i]);
}

template <class T>
inline void adam_stretch(const AdamParams& p, const AdamNumbers<T>& numbers, const AdamSlice& t, const Stretch& at) {
  alignas(64) T room[5][kAdamBlock];
  const Strided& moved = t.master.data ? t.master : t.param;
  T* const value = fetch(at, moved, room[0]);
  const T* const g = fetch(at, t.grad, room[1]);
  T* const m = fetch(at, t.m, room[2]);
  T* const v = fetch(at, t.v, room[3]);
  if (t.master.data) {
    const T* const param = fetch(at, t.param, room[4]);
    by_dtype(t.param.dtype, [&](auto tag) { start_run<decltype(tag)>(at.n, value, param); });
  }
  adam_run(numbers, at.n, value, g, m, v);
  if (m == room[2]) put(at, t.m, m);
  if (v == room[3]) put(at, t.v, v);
  if (t.master.data) {
    if (value == room[0]) put(at, t.master, value);
    put(at, t.param, value);
  } else if (value == room[0]) {
    if (p.stochastic && rounds(t.param.dtype)) {
      uint32_t words[kAdamBlock];
      rounding_words(p, t.id, at.i, at.n, words);
      for (int64_t j = 0; j < at.n; ++j) value[j] = T(stochastic(float(value[j]), words[j], t.param.dtype));
    }
    put(at, t.param, value);
  }
}

// Elements [begin, end) of a slice.
template <class T>
inline void adam_slice(const AdamParams& p, const AdamSlice& t, int64_t begin, int64_t end) {
  const auto numbers = AdamNumbers<T>::of(p.step);
  for (int64_t i = begin; i < end; i += kAdamBlock)
    adam_stretch<T>(p, numbers, t, Stretch(t, i, end - i < kAdamBlock ? end - i : kAdamBlock));
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
