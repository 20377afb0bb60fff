// topk_attention on NVIDIA GPUs, backward: the logits are made again, and what is kept is known from tau and cut.
//
// dQ comes by blocks of queries, over lists of the kept keys. dK and dV come by tiles of keys, in parts of the queries;
// the gradient of a mask by its own tiles, in parts of what it is broadcast to. The parts are added up in order.
#include "topk_attention/topk_attention_token_device.h"

namespace pyml {
namespace {

constexpr int kHalfRows = kTokenRows / 2;  // of a tile, for each thread
constexpr int kBwdColumns = 8;             // of dQ, for each thread

// One softmax of one query: probability = exp(logit - top) * inverse.
template <class A>
struct RowState {
  A top, inverse, tau, delta;
  int32_t cut;
  bool alone;  // one key is kept: its probability is 1 whatever its logit

  __device__ A probability(A s, int64_t t) const { return is_kept(s, t, tau, cut) ? exp(s - top) * inverse : A(0); }
  __device__ A slope(A s, int64_t t, A product) const {
    return is_kept(s, t, tau, cut) && !alone ? exp(s - top) * inverse * (product - delta) : A(0);
  }
};

// States of softmax `softmax` with the delta of output i for rows n0, ...; between two barriers.
template <class C, class A = typename C::A>
__device__ void load_states(const C& c, const Place& p, int64_t n0, int64_t softmax, int64_t i, RowState<A>* states) {
  __syncthreads();
  const int64_t n = n0 + threadIdx.x;
  if (threadIdx.x < kTokenRows) {
    RowState<A> state{A(0), A(1), infinity<A>(), A(0), 0, false};  // keeps nothing
    if (n < c.queries) {
      const int64_t at = c.row(p, softmax, c.softmaxes, n);
      const A total = static_cast<const A*>(c.total)[at];
      state = {static_cast<const A*>(c.top)[at],
               1 / total,
               static_cast<const A*>(c.tau)[at],
               static_cast<const A*>(c.delta)[c.row(p, i, c.thresholds, n)],
               c.cut[at],
               false};
      state.alone = state.top == state.tau && total == 1;
    }
    states[threadIdx.x] = state;
  }
  __syncthreads();
}

// Shared memory of a tile of the backward.
template <class A>
struct Tile {
  A *x, *y, *slope, *probability;
  RowState<A>*states, *hard;
  unsigned char* end;

  static constexpr size_t kBytes = ((kTokenRows + kTokenKeys) * kDepthLd + 2 * kTokenRows * kTokenKeys) * sizeof(A) +
                                   2 * kTokenRows * sizeof(RowState<A>);

  __device__ explicit Tile(A* memory) {
    x = memory, y = x + kTokenRows * kDepthLd, slope = y + kTokenKeys * kDepthLd;
    probability = slope + kTokenRows * kTokenKeys;
    states = reinterpret_cast<RowState<A>*>(probability + kTokenRows * kTokenKeys), hard = states + kTokenRows;
    end = reinterpret_cast<unsigned char*>(hard + kTokenRows);
  }
};

// Products of the gradient of output i and the values, for this thread's key and rows.
template <class C, class A = typename C::A>
__device__ void tile_upstream(const C& c, const Place& p, int64_t i, int64_t n0, int64_t t0, const Tile<A>& tile,
                              A (&product)[kHalfRows]) {
  tile_products<kTokenRows>(
      c.value_depth, tile.x, tile.y, product, [&](int r, int64_t d) { return c.upstream(p, i, n0 + r, d); },
      [&](int j, int64_t d) { return c.value(p, t0 + j, d); });
}

__device__ inline int own_key() { return int(threadIdx.x) % kTokenKeys; }
__device__ inline int own_row() { return int(threadIdx.x) / kTokenKeys * kHalfRows; }

// delta = grad . result, one number for each row. It is summed and contracted as the products of tile_products are, a
// part for each lane: so their difference is 0 where one key takes all.
template <class C>
__global__ void __launch_bounds__(kTokenThreads) token_delta_kernel(C c) {
  using A = typename C::A;
  using Lanes = RowLanes<kTokenRows>;
  PYML_SHARED(unsigned char, scratch);
  Lanes lanes(scratch);
  const int64_t rows = c.batch * c.thresholds * c.heads * c.queries;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTokenRows + lanes.row, slab = row / c.queries;
  const int64_t i = slab / c.heads % c.thresholds, n = row % c.queries;
  const Place p = c.place(slab / c.heads / c.thresholds, slab % c.heads);
  const A* result = static_cast<const A*>(c.result) + row * c.value_depth;
  A sum = A(0);
  for (int64_t first = 0; first < c.value_depth; first += Lanes::kLanes * kDepthStep) {
    const int64_t begin = first + lanes.lane * kDepthStep, left = c.value_depth - begin;
    const int64_t end = row >= rows ? begin : begin + (left < kDepthStep ? left : kDepthStep);
    A part = A(0);
    for (int64_t d = begin; d < end; ++d) part += c.upstream(p, i, n, d) * result[d];
    sum = lanes.reduce(lanes.lane == 0 ? sum + part : part, [](A a, A b) { return a + b; });
  }
  if (row < rows && lanes.lane == 0) static_cast<A*>(c.delta)[row] = sum;
}

template <class C>
__global__ void __launch_bounds__(kTokenThreads) token_bwd_q_kernel(C c) {
  using A = typename C::A;
  using Lanes = RowLanes<kTokenRows>;
  PYML_SHARED(A, memory);
  const Tile<A> tile(memory);
  Lanes lanes(tile.end);
  const int64_t blocks = ceil_div(c.queries, kTokenRows), block = static_cast<int64_t>(blockIdx.x);
  const int64_t n0 = block % blocks * kTokenRows, n = n0 + lanes.row;
  const Place p = c.place(block / blocks / c.heads, block / blocks % c.heads);
  for (int64_t c0 = 0; c0 < c.depth; c0 += Lanes::kLanes * kBwdColumns) {
    A sum[kBwdColumns] = {};
    for (int64_t i = 0; i < c.thresholds; ++i) {
      load_states(c, p, n0, c.straight_through() ? c.thresholds : i, i, tile.states);
      for (int64_t t0 = 0; t0 < c.seen(n0 + kTokenRows); t0 += kTokenKeys) {
        A s[kHalfRows], product[kHalfRows];
        tile_logits<kTokenRows>(c, p, n0, t0, tile.x, tile.y, s);
        tile_upstream(c, p, i, n0, t0, tile, product);
        PYML_UNROLL
        for (int r = 0; r < kHalfRows; ++r)
          tile.slope[(own_row() + r) * kTokenKeys + own_key()] =
              tile.states[own_row() + r].slope(s[r], t0 + own_key(), product[r]);
        __syncthreads();
        const A* slopes = tile.slope + lanes.row * kTokenKeys;
        const Kept<A> list = list_kept<kTokenRows>(
            lanes, tile.y, reinterpret_cast<int*>(tile.y + kTokenRows * kTokenKeys), [&](int j, A& weight) {
              weight = slopes[j];
              return weight != A(0);  // so is NaN
            });
        add_kept<kTokenRows, kBwdColumns>(lanes, list, c0, c.depth, sum,
                                          [&](int j, int64_t column) { return c.key(p, t0 + j, column); });
      }
    }
    if (n >= c.queries) continue;
    PYML_UNROLL
    for (int i = 0; i < kBwdColumns; ++i) {
      const int64_t column = c0 + lanes.lane + i * Lanes::kLanes;
      if (column >= c.depth) continue;
      const int64_t to = ((p.b * c.heads + p.h) * c.queries + n) * c.depth + column;
      static_cast<typename C::X*>(c.dq)[to] = down<typename C::X>(sum[i] * A(c.scale));
    }
  }
}

// Columns of dK, and of dV, that a block adds up: a thread has all of them for one key and one of the two.
template <class A>
constexpr int kKeyColumns = sizeof(A) == 4 ? 64 : 32;

template <class C>
PYML_HD int64_t key_steps(const C& c) {
  const int64_t widest = c.depth > c.value_depth ? c.depth : c.value_depth;
  return ceil_div(widest > 0 ? widest : 1, kKeyColumns<typename C::A>);
}

template <class C>
__global__ void __launch_bounds__(kTokenThreads) token_bwd_keys_kernel(C c) {
  using A = typename C::A;
  constexpr int kWide = kKeyColumns<A>, kGroup = 8;
  PYML_SHARED(A, memory);
  const Tile<A> tile(memory);
  A* rows = reinterpret_cast<A*>(tile.end);  // [2][kTokenRows][kWide]: columns of the queries, of the gradients
  const int64_t tiles = ceil_div(c.keys, kTokenKeys), blocks = ceil_div(c.queries, kTokenRows), steps = key_steps(c);
  const int64_t block = static_cast<int64_t>(blockIdx.x), group = block / steps / tiles, kv_heads = c.heads / c.shared;
  const int64_t t0 = block / steps % tiles * kTokenKeys, c0 = block % steps * kWide;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * c.split_size, items = c.shared * blocks;
  const int64_t end = begin + c.split_size < items ? begin + c.split_size : items;
  const bool for_value = threadIdx.x >= kTokenKeys;
  const int64_t columns = for_value ? c.value_depth : c.depth;
  const A *weights = for_value ? tile.probability : tile.slope, *of_rows = rows + (for_value ? kTokenRows * kWide : 0);
  A sum[kWide] = {};
  for (int64_t i = 0; i < c.thresholds; ++i)
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n0 = item % blocks * kTokenRows;
      if (c.seen(n0 + kTokenRows) <= t0) continue;
      const Place p = c.place(group / kv_heads, group % kv_heads * c.shared + item / blocks);
      load_states(c, p, n0, c.straight_through() ? c.thresholds : i, i, tile.states);
      if (c.straight_through()) load_states(c, p, n0, i, i, tile.hard);
      const RowState<A>* hard = c.straight_through() ? tile.hard : tile.states;
      A s[kHalfRows], product[kHalfRows];
      tile_logits<kTokenRows>(c, p, n0, t0, tile.x, tile.y, s);
      tile_upstream(c, p, i, n0, t0, tile, product);
      PYML_UNROLL
      for (int r = 0; r < kHalfRows; ++r) {
        const int row = own_row() + r, at = row * kTokenKeys + own_key();
        tile.slope[at] = tile.states[row].slope(s[r], t0 + own_key(), product[r]);
        tile.probability[at] = hard[row].probability(s[r], t0 + own_key());
      }
      for (int e = threadIdx.x; e < kTokenRows * kWide; e += kTokenThreads) {
        rows[e] = c.query(p, n0 + e / kWide, c0 + e % kWide);
        rows[kTokenRows * kWide + e] = c.upstream(p, i, n0 + e / kWide, c0 + e % kWide);
      }
      __syncthreads();
      for (int r = 0; r < kTokenRows; ++r) {
        const A weight = weights[r * kTokenKeys + own_key()];
        if (weight == A(0)) continue;
        PYML_UNROLL
        for (int g = 0; g < kWide; g += kGroup) {
          if (c0 + g >= columns) continue;
          PYML_UNROLL
          for (int e = 0; e < kGroup; ++e) sum[g + e] += weight * of_rows[r * kWide + g + e];
        }
      }
    }
  const int64_t t = t0 + own_key();
  A* to = static_cast<A*>(for_value ? c.part_v : c.part_k);
  if (t >= c.keys || to == nullptr) return;
  to += ((static_cast<int64_t>(blockIdx.y) * c.batch * kv_heads + group) * c.keys + t) * columns;
  PYML_UNROLL
  for (int e = 0; e < kWide; ++e)
    if (c0 + e < columns) to[c0 + e] = for_value ? sum[e] : sum[e] * A(c.scale);
}

// What a mask has of its own along queries and keys; the rest is what it is broadcast to.
struct MaskTiles {
  int64_t blocks, tiles, own_blocks, own_tiles, own, items;
};
PYML_HD MaskTiles mask_tiles(const TokenCuda& c) {
  MaskTiles m{};
  m.blocks = ceil_div(c.queries, kTokenRows), m.tiles = ceil_div(c.keys, kTokenKeys);
  m.own_blocks = c.mask_size[2] > 1 ? m.blocks : 1, m.own_tiles = c.mask_size[3] > 1 ? m.tiles : 1;
  m.own = c.mask_size[0] * c.mask_size[1] * m.own_blocks * m.own_tiles;
  m.items = c.batch * c.heads * m.blocks * m.tiles / m.own;
  return m;
}

template <class C>
__global__ void __launch_bounds__(kTokenThreads) token_bwd_mask_kernel(C c) {
  using A = typename C::A;
  PYML_SHARED(A, memory);
  const Tile<A> tile(memory);
  const MaskTiles m = mask_tiles(c);
  const int64_t block = static_cast<int64_t>(blockIdx.x), slab = block / m.own_tiles / m.own_blocks;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * c.split_size;
  const int64_t end = begin + c.split_size < m.items ? begin + c.split_size : m.items;
  const int64_t tile0 = block % m.own_tiles, block0 = block / m.own_tiles % m.own_blocks;
  const int64_t all_tiles = m.tiles / m.own_tiles, all_blocks = m.blocks / m.own_blocks;
  const int64_t all_heads = c.mask_size[1] > 1 ? 1 : c.heads;
  A sum[kHalfRows] = {};
  for (int64_t i = 0; i < c.thresholds; ++i)
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t0 = (tile0 + item % all_tiles) * kTokenKeys, outer = item / all_tiles / all_blocks;
      const int64_t n0 = (block0 + item / all_tiles % all_blocks) * kTokenRows;
      if (c.seen(n0 + kTokenRows) <= t0) continue;
      const Place p = c.place(slab / c.mask_size[1] + outer / all_heads, slab % c.mask_size[1] + outer % all_heads);
      load_states(c, p, n0, c.straight_through() ? c.thresholds : i, i, tile.states);
      A s[kHalfRows], product[kHalfRows];
      tile_logits<kTokenRows>(c, p, n0, t0, tile.x, tile.y, s);
      tile_upstream(c, p, i, n0, t0, tile, product);
      PYML_UNROLL
      for (int r = 0; r < kHalfRows; ++r) sum[r] += tile.states[own_row() + r].slope(s[r], t0 + own_key(), product[r]);
    }
  PYML_UNROLL
  for (int r = 0; r < kHalfRows; ++r) tile.slope[(own_row() + r) * kTokenKeys + own_key()] = sum[r];
  __syncthreads();
  // Rows and keys of the mask in this tile; along a broadcast dimension one number takes the sum of all.
  const bool by_row = c.mask_size[2] > 1, by_key = c.mask_size[3] > 1;
  const int64_t n0 = block0 * kTokenRows, t0 = tile0 * kTokenKeys;
  const int high = by_row ? kTokenRows : 1, wide = by_key ? kTokenKeys : 1;
  A* to = static_cast<A*>(c.part_mask);
  to += (static_cast<int64_t>(blockIdx.y) * c.mask_size[0] * c.mask_size[1] + slab) * c.mask_size[2] * c.mask_size[3];
  for (int e = threadIdx.x; e < high * wide; e += kTokenThreads) {
    const int64_t n = n0 + e / wide, t = t0 + e % wide;
    if (n >= c.mask_size[2] || t >= c.mask_size[3]) continue;
    A total = A(0);
    for (int r = by_row ? e / wide : 0; r < (by_row ? e / wide + 1 : kTokenRows); ++r)
      for (int j = by_key ? e % wide : 0; j < (by_key ? e % wide + 1 : kTokenKeys); ++j)
        total += tile.slope[r * kTokenKeys + j];
    to[n * c.mask_size[3] + t] = total;
  }
}

template <class C>
int64_t key_blocks(const C& c) {
  return c.batch * (c.heads / c.shared) * ceil_div(c.keys, kTokenKeys) * key_steps(c);
}

}  // namespace

extern "C" {

cudaError_t token_cuda_delta(const TokenCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    const int64_t rows = c.batch * c.thresholds * c.heads * c.queries;
    return launch(token_delta_kernel<decltype(c)>, ceil_div(rows, kTokenRows), 1, kTokenThreads, kRowScratch, stream,
                  c);
  });
}

cudaError_t token_cuda_bwd_q(const TokenCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared = Tile<typename C::A>::kBytes + kRowScratch;
    const int64_t blocks = c.batch * c.heads * ceil_div(c.queries, kTokenRows);
    return launch(token_bwd_q_kernel<C>, blocks, 1, kTokenThreads, shared, stream, c);
  });
}

void token_cuda_keys_split(const TokenCuda* call, int64_t* count, int64_t* size) {
  dispatch(*call, [&](auto c) {
    Split::of(c.shared * ceil_div(c.queries, kTokenRows), 1, key_blocks(c), 1056).store(count, size);
    return cudaSuccess;
  });
}

cudaError_t token_cuda_bwd_keys(const TokenCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    using A = typename C::A;
    const size_t shared = Tile<A>::kBytes + 2 * kTokenRows * kKeyColumns<A> * sizeof(A);
    return launch(token_bwd_keys_kernel<C>, key_blocks(c), c.split_count, kTokenThreads, shared, stream, c);
  });
}

void token_cuda_mask_split(const TokenCuda* call, int64_t* count, int64_t* size) {
  const MaskTiles m = mask_tiles(*call);
  Split::of(m.items, 1, m.own, 1056).store(count, size);
}

cudaError_t token_cuda_bwd_mask(const TokenCuda* call, cudaStream_t stream) {
  return dispatch(*call, [&](auto c) {
    using C = decltype(c);
    const size_t shared = Tile<typename C::A>::kBytes;
    return launch(token_bwd_mask_kernel<C>, mask_tiles(c).own, c.split_count, kTokenThreads, shared, stream, c);
  });
}

}  // extern "C"

}  // namespace pyml
