// What the kernels of region_attention share on a GPU: the shape of a block, rows that a thread owns, tiles.
//
// A block owns some rows of one region (queries; keys for dK and dV) and walks over tiles of the rows that they meet,
// which lie in shared memory. Its threads stand in kGroups groups of kLanes: lane i owns rows i, i + kLanes, ..., and
// group n meets every kGroups-th row of a tile, so that a loaded number serves kPer rows and no thread waits for
// another one within a tile. At the end the groups are added up in a fixed order.
#pragma once
#include <cmath>
#include <type_traits>

#include "common/cuda.h"
#include "topk_attention/region_cuda.h"
#include "topk_attention/rounding_device.h"

namespace pyml {
namespace {

constexpr int kRegionThreads = 128;  // of every block
constexpr int kSumBlock = 32;        // features that are added up before they join the sum: rounding grows with both

__device__ inline int64_t block_id() { return static_cast<int64_t>(blockIdx.x); }

__device__ inline double base2(double x) { return exp2(x); }
__device__ inline float base2(float x) {
#ifdef PYML_CUDA_EMULATION
  return std::exp2(x);
#else
  float y;  // 2 ulp as exp2f, but numbers below 2^-126 become 0: two instructions less
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

template <class T>
constexpr T kLog2E = T(1.4426950408889634074);

// What a power of 2 gets of a logit less `shift`: exactly 0 where they are equal, and log2 e rounds the difference
// alone.
template <class T>
__device__ inline T exponent(T logit, T shift) {
  return (logit - shift) * kLog2E<T>;
}

// kHeld: the rows that a thread owns lie in its registers, kD and kV numbers each (the missing ones are 0). Else they
// are too wide and lie in shared memory, and kD and kV are how many columns of a result one block makes.
template <class T_, bool kHeld_, int kD_, int kV_, int kPer_, int kLanes_, int kTile_>
struct BlockShape {
  using T = T_;
  static constexpr bool kHeld = kHeld_;
  static constexpr int kD = kD_, kV = kV_, kPer = kPer_, kLanes = kLanes_, kTile = kTile_;
  static constexpr int kGroups = kRegionThreads / kLanes, kRows = kLanes * kPer;
  // Keys that the forward takes at a time.
  static constexpr int kStep = kTile >= 2 * kGroups ? 2 : 1;
  static_assert(kTile % (kGroups * kStep) == 0, "a round of keys fits in a tile");
  static_assert(!kHeld || (kD <= kSumBlock && kV <= kSumBlock), "a held row is one block of its sums");
};
// LSNet's heads (24 and 6) and BiFormer's (32 and 32): register tiles in which a load of 16 bytes serves 16 (8)
// multiply-adds a thread, as many as the shared memory can feed. Backward kernels hold more numbers a row.
using Narrow = BlockShape<float, true, 24, 8, 4, 16, 64>;
using NarrowBwd = BlockShape<float, true, 24, 8, 2, 32, 64>;
using Medium = BlockShape<float, true, 32, 32, 2, 32, 64>;
using MediumBwd = BlockShape<float, true, 32, 32, 1, 64, 64>;
using Wide = BlockShape<float, false, 32, 32, 2, 32, 16>;
using Widest = BlockShape<float, false, 32, 32, 1, 16, 8>;
using WideDouble = BlockShape<double, false, 16, 16, 1, 32, 8>;
using WidestDouble = BlockShape<double, false, 16, 16, 1, 8, 16>;

constexpr size_t kWideBytes = 64 << 10;  // of shared memory, above which a block owns fewer rows

PYML_HD int whole(int64_t n) { return int(n + 3) / 4 * 4; }

// Bytes of shared memory: the owned rows unless they are in registers alone, then a tile, whose rows hold `first` and
// `second` numbers and three facts. The sums of the groups (`sums` a row) take the place of both.
template <class Z>
size_t memory_bytes(int64_t first, int64_t second, int64_t owned, int64_t sums, bool in_memory = !Z::kHeld) {
  const int64_t held = in_memory ? owned * Z::kRows : 0, tile = Z::kTile * (first + second + 4);
  const int64_t total = Z::kGroups / 2 * Z::kRows * sums;
  return size_t(held + tile > total ? held + tile : total) * sizeof(typename Z::T);
}

template <class T>
struct alignas(16) Quad {
  T v[4];
};
template <class T>
__device__ inline Quad<T> quad(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}

// Calls f with a pointer of the right type. In a call in float no tensor is double.
template <class T, class F>
__device__ inline void by_pointer(void* data, DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(data));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(data));
    case DType::kHalf:
      return f(static_cast<__half*>(data));
    case DType::kDouble:
      if constexpr (sizeof(T) == 8) f(static_cast<double*>(data));
  }
}
template <class T>
__device__ inline T read(const Regions& t, int64_t at) {
  T value = T(0);
  by_pointer<T>(t.data, t.dtype, [&](const auto* p) { value = T(up(p[at])); });
  return value;
}
template <class To, class T>
__device__ inline To narrow(T value) {
  if constexpr (sizeof(To) == 2) {
    return down<To>(float(value));
  } else {
    return down<To>(value);
  }
}
template <class T>
__device__ inline void write(const Regions& t, int64_t at, T value) {
  by_pointer<T>(t.data, t.dtype, [&](auto* p) { p[at] = narrow<std::remove_reference_t<decltype(*p)>>(value); });
}

// Where the rows of a block lie.
struct RegionBlock {
  int64_t b, h, region;
  int64_t first;  // row
  int count;      // rows; this thread has row lane + r * kLanes while below
  int lane, group;
};
// Regions of `tokens` rows, cut into blocks that are all about as long; `id` counts regions, then their blocks.
template <class Z>
__device__ inline RegionBlock region_block(int64_t id, int64_t tokens, int64_t regions, int64_t heads) {
  const int64_t blocks = ceil_div(tokens, Z::kRows), length = ceil_div(tokens, blocks);
  const int64_t item = id / blocks, first = id % blocks * length;
  const int64_t left = tokens - first;
  const int tid = int(threadIdx.x);
  return {item / regions / heads, item / regions % heads, item % regions, first, int(left < length ? left : length),
          tid % Z::kLanes,        tid / Z::kLanes};
}

// A row of a tile in registers.
template <class Z, int kWidth>
struct Met {
  typename Z::T number[Z::kHeld ? kWidth : 1];
};

// One kind of owned rows: kWidth numbers each in registers, or [width][kRows] in shared memory. Those that do not exist
// are 0.
template <class Z, int kWidth>
struct Owned {
  using T = typename Z::T;
  T held[Z::kHeld ? Z::kPer : 1][Z::kHeld ? kWidth : 1];
  const T* shared;

  // `to` is memory for wide rows; it is complete after the next barrier.
  __device__ inline void load(const Regions& t, const RegionBlock& at, int64_t width, T factor, T* to) {
    const int64_t start = t.offset(at.b, at.h, at.region) + at.first * t.stride[3];
    shared = to + at.lane;
    by_pointer<T>(t.data, t.dtype, [&](const auto* from) {
      if constexpr (Z::kHeld) {
        PYML_UNROLL
        for (int r = 0; r < Z::kPer; ++r) {
          const int row = at.lane + r * Z::kLanes;
          PYML_UNROLL
          for (int d = 0; d < kWidth; ++d)
            held[r][d] =
                row < at.count && d < width ? T(up(from[start + row * t.stride[3] + d * t.stride[4]])) * factor : T(0);
        }
      } else {
        for (int i = int(threadIdx.x); i < whole(width) * Z::kRows; i += kRegionThreads) {
          const int row = i / whole(width), d = i % whole(width);
          const bool real = row < at.count && d < width;
          to[d * Z::kRows + row] = real ? T(up(from[start + row * t.stride[3] + d * t.stride[4]])) * factor : T(0);
        }
      }
    });
  }

  // Held rows to memory [kWidth][kRows], complete after the next barrier; and from there, times the weight of a region.
  __device__ inline void keep(const RegionBlock& at, T* to) const {
    if (at.group > 0) return;  // all groups hold the same rows
    PYML_UNROLL
    for (int r = 0; r < Z::kPer; ++r) {
      PYML_UNROLL
      for (int d = 0; d < kWidth; ++d) to[d * Z::kRows + at.lane + r * Z::kLanes] = held[r][d];
    }
  }
  __device__ inline void weigh(const RegionBlock& at, const T* from, T weight) {
    PYML_UNROLL
    for (int r = 0; r < Z::kPer; ++r) {
      PYML_UNROLL
      for (int d = 0; d < kWidth; ++d) held[r][d] = from[d * Z::kRows + at.lane + r * Z::kLanes] * weight;
    }
  }

  // sum[r] += owned row r times `row`. One fixed chain of multiply-adds: every kernel gets the same bits. Held rows are
  // short enough to keep `row`, too, for add_row: the shared memory is read once.
  __device__ inline void dot(const T* row, int64_t width, T (&sum)[Z::kPer], Met<Z, kWidth>& met) const {
    if constexpr (Z::kHeld) {
      PYML_UNROLL
      for (int d = 0; d < kWidth; d += 4) {
        const Quad<T> four = quad(row + d);
        PYML_UNROLL
        for (int i = 0; i < 4; ++i) {
          met.number[d + i] = four.v[i];
          PYML_UNROLL
          for (int r = 0; r < Z::kPer; ++r) sum[r] = fused(held[r][d + i], four.v[i], sum[r]);
        }
      }
    } else {
      for (int first = 0; first < whole(width); first += kSumBlock) {
        T part[Z::kPer] = {};
        const int end = whole(width) - first < kSumBlock ? whole(width) : first + kSumBlock;
        for (int d = first; d < end; d += 4) {
          const Quad<T> four = quad(row + d);
          PYML_UNROLL
          for (int i = 0; i < 4; ++i) {
            PYML_UNROLL
            for (int r = 0; r < Z::kPer; ++r)
              part[r] = fused(shared[(d + i) * Z::kRows + r * Z::kLanes], four.v[i], part[r]);
          }
        }
        PYML_UNROLL
        for (int r = 0; r < Z::kPer; ++r) sum[r] += part[r];
      }
    }
  }
  __device__ inline void dot(const T* row, int64_t width, T (&sum)[Z::kPer]) const {
    Met<Z, kWidth> met;
    dot(row, width, sum, met);
  }
};

// acc[r] += factor[r] * row; where rows are wide, only `left` columns of them are there.
template <class Z, int kWidth>
__device__ inline void add_row(typename Z::T (&acc)[Z::kPer][kWidth], const typename Z::T (&factor)[Z::kPer],
                               const typename Z::T* row, int64_t left) {
  using T = typename Z::T;
  PYML_UNROLL
  for (int d = 0; d < kWidth; d += 4) {
    if (!Z::kHeld && d >= left) break;
    const Quad<T> four = quad(row + d);
    PYML_UNROLL
    for (int i = 0; i < 4; ++i) {
      PYML_UNROLL
      for (int r = 0; r < Z::kPer; ++r) acc[r][d + i] += factor[r] * four.v[i];
    }
  }
}

// The same with a row that a dot has met.
template <class Z, int kWidth>
__device__ inline void add_row(typename Z::T (&acc)[Z::kPer][kWidth], const typename Z::T (&factor)[Z::kPer],
                               const typename Z::T* row, int64_t left, const Met<Z, kWidth>& met) {
  if constexpr (Z::kHeld) {
    PYML_UNROLL
    for (int d = 0; d < kWidth; ++d) {
      PYML_UNROLL
      for (int r = 0; r < Z::kPer; ++r) acc[r][d] += factor[r] * met.number[d];
    }
  } else {
    add_row<Z>(acc, factor, row, left);
  }
}

// `count` rows to shared memory, `to` [rows][ld], columns [column, column + padded) of them times `factor`; zeros where
// there are none. `pick`, if any, lists the rows.
template <class T>
__device__ inline void load_tile(const Regions& t, int64_t start, const int32_t* pick, int64_t first, int count,
                                 int rows, int64_t column, int64_t width, int padded, T factor, T* to, int ld) {
  by_pointer<T>(t.data, t.dtype, [&](const auto* from) {
    for (int i = int(threadIdx.x); i < rows * padded; i += kRegionThreads) {
      const int row = i / padded, c = i % padded;
      T value = T(0);
      if (row < count && column + c < width) {
        const int64_t token = pick ? pick[first + row] : first + row;
        value = T(up(from[start + token * t.stride[3] + (column + c) * t.stride[4]])) * factor;
      }
      to[row * ld + c] = value;
    }
  });
}

// Adds the sums of all groups into group 0: pairs first, always the same ones. All threads call it.
template <class Z, int kWidth>
__device__ inline void add_groups(typename Z::T (&acc)[Z::kPer][kWidth], const RegionBlock& at, typename Z::T* shared) {
  for (int half = Z::kGroups / 2; half > 0; half /= 2) {
    __syncthreads();
    const bool gives = at.group >= half && at.group < 2 * half;
    const int slot = gives ? at.group - half : at.group;
    typename Z::T* place = shared + slot * Z::kRows * kWidth + at.lane;
    if (gives) {
      PYML_UNROLL
      for (int r = 0; r < Z::kPer; ++r) {
        PYML_UNROLL
        for (int d = 0; d < kWidth; ++d) place[(r * kWidth + d) * Z::kLanes] = acc[r][d];
      }
    }
    __syncthreads();
    if (at.group < half) {
      PYML_UNROLL
      for (int r = 0; r < Z::kPer; ++r) {
        PYML_UNROLL
        for (int d = 0; d < kWidth; ++d) acc[r][d] += place[(r * kWidth + d) * Z::kLanes];
      }
    }
  }
}

// How many slots of its row query region p uses: the promise is 0 to K, and it is kept whatever comes.
template <class T>
__device__ inline int64_t used_slots(const RegionCuda<T>& c, int64_t b, int64_t h, int64_t p) {
  const int64_t asked = c.chosen(b, h, p);
  return asked < 0 ? 0 : asked > c.slots ? c.slots : asked;
}

// lse as two numbers of T, so that logit - top - rest is as exact as the logit.
template <class T>
struct SplitLse {
  T top, rest;
  __device__ explicit SplitLse(double lse) : top(T(lse)), rest(T(0)) {
    const double left = lse - double(top);  // NaN for an infinity
    if (left == left) rest = T(left);
  }
};

}  // namespace
}  // namespace pyml
