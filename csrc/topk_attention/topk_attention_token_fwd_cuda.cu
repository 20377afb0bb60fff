// topk_attention on NVIDIA GPUs, forward. A block has a few queries of one head. Where the logits of all keys fit the
// shared memory they are made once and stay there, else they are made again, a tile at a time, for every count.
//
// The k largest are found by narrowing an interval of the ordered logits: three pivots split it in four, and the counts
// of the logits that are not below them say which quarter has the k-th largest. It ends when exactly k lie above its
// lower end or when one number is left, of which the first keys stay. Then the kept keys of each tile become a list,
// and only their values are read.
#include "topk_attention/topk_attention_token_device.h"

namespace pyml {
namespace {

constexpr int kValueSteps = 10;  // pivots by the mean of two logits; then by their bits, which always ends

template <class C>
struct Forward : C {
  int64_t ld;  // logits of a row in shared memory: all keys, or one tile
  bool resident;
};

// An integer that orders as x does; both zeros are 0.
template <class A, class Order = typename Constants<A>::Order>
__device__ inline Order order_of(A x) {
  Order bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? -(bits & Constants<A>::kMagnitude) : bits;
}
template <class A, class Order = typename Constants<A>::Order>
__device__ inline A number_of(Order order) {
  const Order size = order < 0 ? -order : order;
  A x;
  memcpy(&x, &size, sizeof(x));
  return order < 0 ? -x : x;
}

struct Counts {
  int of[3];
};
struct Facts {
  int valid, nans;
};
template <class A>
struct Range {
  A high, low;
};

// The interval that still holds the k-th largest logit: at least k are not below low, fewer are not below high.
template <class A>
struct Search {
  using Order = typename Constants<A>::Order;
  Order low, high, pivot[3];
  int at_low, at_high;

  __device__ void choose(bool by_value) {
    const A a = number_of<A>(low), b = number_of<A>(high);
    const Order quarter = (high >> 2) - (low >> 2);
    Order by_bits = low;
    PYML_UNROLL
    for (int i = 0; i < 3; ++i) {
      const A part = A(0.25) * A(i + 1);
      by_bits += quarter;
      Order guess = by_value ? order_of<A>(a * (1 - part) + b * part) : by_bits;
      guess = guess > low ? guess : low + 1;
      pivot[i] = guess < high ? guess : high - 1;
    }
  }
  __device__ void narrow(const Counts& count, int64_t want) {
    PYML_UNROLL
    for (int i = 0; i < 3; ++i) {
      if (count.of[i] >= want && pivot[i] > low) low = pivot[i], at_low = count.of[i];
      if (count.of[i] < want && pivot[i] < high) high = pivot[i], at_high = count.of[i];
    }
  }
  __device__ bool split(int64_t want) const { return at_low > want && high > low + 1; }
};

template <class C, int R>
__global__ void __launch_bounds__(kTokenThreads) token_fwd_kernel(Forward<C> c) {
  using A = typename C::A;
  using Lanes = RowLanes<R>;
  constexpr int kFwdColumns = 128 / Lanes::kLanes;  // of the values, for each thread
  PYML_SHARED(A, logits);                           // [R][ld]
  A *x_tile = logits + R * c.ld, *y_tile = x_tile + R * kDepthLd;
  Lanes lanes(y_tile + kTokenKeys * kDepthLd);
  const int64_t blocks = ceil_div(c.queries, R), block = static_cast<int64_t>(blockIdx.x);
  const int64_t n0 = block % blocks * R, n = n0 + lanes.row;
  const Place p = c.place(block / blocks / c.heads, block / blocks % c.heads);
  const int64_t tiles = ceil_div(c.seen(n0 + R), kTokenKeys);

  const auto make = [&](int64_t tile) {
    __syncthreads();
    A s[R / 2];
    tile_logits<R>(c, p, n0, tile * kTokenKeys, x_tile, y_tile, s);
    A* to = logits + threadIdx.x / kTokenKeys * (R / 2) * c.ld + (c.resident ? tile * kTokenKeys : 0);
    PYML_UNROLL
    for (int i = 0; i < R / 2; ++i) to[i * c.ld + threadIdx.x % kTokenKeys] = s[i];
    __syncthreads();
  };
  // Calls f(logits of this thread's row in a tile, number of its first key) for every tile.
  bool made = false;
  const auto sweep = [&](const auto& f) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (!c.resident || !made) make(tile);
      f(logits + lanes.row * c.ld + (c.resident ? tile * kTokenKeys : 0), tile * kTokenKeys);
    }
  };
  Facts facts{0, 0};
  Range<A> range{-infinity<A>(), infinity<A>()};
  sweep([&](const A* s, int64_t) {
    for (int j = lanes.lane; j < kTokenKeys; j += Lanes::kLanes) {
      const A v = s[j];
      facts.nans += v != v;
      if (v == -infinity<A>()) continue;
      ++facts.valid;
      range.high = v > range.high ? v : range.high;
      range.low = v < range.low ? v : range.low;
    }
  });
  made = true;
  facts = lanes.reduce(facts, [](Facts a, Facts b) { return Facts{a.valid + b.valid, a.nans + b.nans}; });
  range = lanes.reduce(range, [](Range<A> a, Range<A> b) {
    return Range<A>{a.high > b.high ? a.high : b.high, a.low < b.low ? a.low : b.low};
  });
  const auto add = [](Counts a, Counts b) { return Counts{{a.of[0] + b.of[0], a.of[1] + b.of[1], a.of[2] + b.of[2]}}; };
  const bool odd = facts.nans > 0 || facts.valid == 0;  // NaN reaches all of its row; a query without keys gives 0
  const A top = facts.nans > 0 ? A(NAN) : facts.valid == 0 ? A(0) : range.high;

  for (int64_t which = 0; which < c.count; ++which) {
    const int64_t want = c.want[which];
    const bool search = facts.nans == 0 && facts.valid > want;
    Search<A> at{order_of<A>(range.low), order_of<A>(range.high) + 1, {}, facts.valid, 0};
    for (int step = 0; lanes.any(search && at.split(want)); ++step) {
      const bool open = search && at.split(want);
      at.choose(step < kValueSteps);
      const A x0 = number_of<A>(at.pivot[0]), x1 = number_of<A>(at.pivot[1]), x2 = number_of<A>(at.pivot[2]);
      Counts mine{{0, 0, 0}};
      sweep([&](const A* s, int64_t) {
        for (int j = lanes.lane; j < kTokenKeys; j += Lanes::kLanes) {
          const A v = s[j];
          mine.of[0] += v >= x0;
          mine.of[1] += v >= x1;
          mine.of[2] += v >= x2;
        }
      });
      mine = lanes.reduce(mine, add);
      if (open) at.narrow(mine, want);
    }
    const A bound = search ? number_of<A>(at.low) : Constants<A>::kLowest;
    const bool tied = search && at.at_low > want;
    // The number of the last tie that is kept: the smallest with enough ties up to it.
    int low = -1, high = int(c.keys) - 1;
    while (lanes.any(tied && high > low + 1)) {
      const bool open = tied && high > low + 1;
      int pivot[3];
      PYML_UNROLL
      for (int i = 0; i < 3; ++i) {
        const int guess = low + int((int64_t(high) - low) * (i + 1) / 4);
        pivot[i] = guess > low ? guess : low + 1;
      }
      Counts mine{{0, 0, 0}};
      sweep([&](const A* s, int64_t t0) {
        for (int j = lanes.lane; j < kTokenKeys; j += Lanes::kLanes) {
          const bool tie = s[j] == bound;
          PYML_UNROLL
          for (int i = 0; i < 3; ++i) mine.of[i] += tie && t0 + j <= pivot[i];
        }
      });
      mine = lanes.reduce(mine, add);
      PYML_UNROLL
      for (int i = 0; i < 3; ++i) {
        if (!open) continue;
        const bool enough = mine.of[i] >= want - at.at_high;
        if (enough && pivot[i] < high) high = pivot[i];
        if (!enough && pivot[i] > low) low = pivot[i];
      }
    }
    const int32_t cut = tied ? high : INT32_MAX;

    const int64_t softmax = c.first + which;
    const bool dense = softmax == c.thresholds;
    for (int64_t c0 = 0; c0 == 0 || c0 < c.value_depth; c0 += Lanes::kLanes * kFwdColumns) {
      A sum[kFwdColumns] = {}, total = A(0), smallest = infinity<A>();
      sweep([&](const A* s, int64_t t0) {
        A part = A(0);
        const Kept<A> list =
            list_kept<R>(lanes, y_tile, reinterpret_cast<int*>(y_tile + R * kTokenKeys), [&](int j, A& weight) {
              if (!is_kept(s[j], t0 + j, bound, cut)) return false;
              weight = exp(s[j] - top);
              part += weight;
              smallest = s[j] < smallest ? s[j] : smallest;
              return true;
            });
        total += part;
        add_kept<R, kFwdColumns>(lanes, list, c0, c.value_depth, sum,
                                 [&](int j, int64_t column) { return c.value(p, t0 + j, column); });
      });
      const Range<A> all = lanes.reduce(Range<A>{total, smallest}, [](Range<A> a, Range<A> b) {
        return Range<A>{a.high + b.high, a.low < b.low ? a.low : b.low};
      });
      total = odd ? A(1) : all.high;
      if (n >= c.queries) continue;
      const int64_t to = c.row(p, softmax, c.softmaxes, n), out = c.row(p, dense ? 0 : softmax, c.thresholds, n);
      if (c0 == 0 && lanes.lane == 0) {
        static_cast<A*>(c.top)[to] = top;
        static_cast<A*>(c.total)[to] = total;
        static_cast<A*>(c.tau)[to] = odd ? Constants<A>::kLowest : all.low;
        c.cut[to] = cut;
      }
      PYML_UNROLL
      for (int i = 0; i < kFwdColumns; ++i) {
        const int64_t column = c0 + lanes.lane + i * Lanes::kLanes, place = out * c.value_depth + column;
        if (column >= c.value_depth) continue;
        const A result = sum[i] / total;
        if (!dense) static_cast<typename C::X*>(c.out)[place] = down<typename C::X>(result);
        if (c.average && dense == c.straight_through()) static_cast<A*>(c.average)[place] = result;
      }
    }
  }
}

template <int R, class C>
cudaError_t run_fwd(const C& c, int64_t ld, bool resident, cudaStream_t stream) {
  using A = typename C::A;
  const size_t shared = (R * ld + (R + kTokenKeys) * kDepthLd) * sizeof(A) + kRowScratch;
  return launch(token_fwd_kernel<C, R>, c.batch * c.heads * ceil_div(c.queries, R), 1, kTokenThreads, shared, stream,
                Forward<C>{c, ld, resident});
}

}  // namespace

extern "C" {

cudaError_t token_cuda_fwd(const TokenCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using A = typename decltype(c)::A;
    size_t bytes = sizeof(A) == 4 ? 64 << 10 : 48 << 10;  // for logits; with the tiles less than 99 KiB
#ifdef PYML_CUDA_EMULATION
    bytes = emulation::held_bytes(bytes);
#endif
    const int64_t ld = ceil_div(c.keys, kTokenKeys) * kTokenKeys, fits = int64_t(bytes / sizeof(A));
    if (16 * ld <= fits) return run_fwd<16>(c, ld, true, stream);
    if (8 * ld <= fits) return run_fwd<8>(c, ld, true, stream);
    return run_fwd<16>(c, kTokenKeys, false, stream);
  });
}

}  // extern "C"

}  // namespace pyml
