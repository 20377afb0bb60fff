// The op `topk_attention` on a CPU, forward. A block of queries has its logits for all keys in the second-level cache;
// each row is then narrowed to its k largest, and softmax and the sum of values run over the list of these alone.
#include "topk_attention/topk_attention_bwd_cpu.inl"
#include "topk_attention/topk_logits_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {
namespace {

template <class T>
int64_t topk_fwd_scratch(const TopkAttentionParams<T>& p) {
  const int64_t rows = p.block_rows(), list = logits_ld<T>(p.keys) + kListPad;
  return rows * (p.depth_ld() + logits_ld<T>(p.keys)) + 5 * list + p.value_ld() + 64;
}

template <class T>
void topk_pack(const TopkAttentionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / p.tiles(), first = at % p.tiles() * kTileKeys, row = group * p.keys + first;
    const int64_t n = p.keys - first < kTileKeys ? p.keys - first : kTileKeys;
    if (p.key_tiles) load_columns<T>(p.k, row, n, 0, p.depth, p.key_tiles + at * p.depth * kTileKeys, kTileKeys);
    if (p.value_tiles)
      load_columns<T>(p.v, row, n, 0, p.value_depth, p.value_tiles + at * p.value_depth * kTileKeys, kTileKeys);
    if (p.key_rows) load_rows<T>(p.k, row, n, 0, p.depth, p.key_rows + row * p.depth_ld(), p.depth_ld());
    if (p.value_rows) load_rows<T>(p.v, row, n, 0, p.value_depth, p.value_rows + row * p.value_ld(), p.value_ld());
  }
}

template <class T>
T largest(const T* value, int64_t n) {
  constexpr int L = kLanes<T>;
  T best = -std::numeric_limits<T>::infinity(), part[L];
  Vec<T> most = splat<T>(best);
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    const Vec<T> v = load<T>(value + j);
    most = v > most ? v : most;
  }
  store<T>(part, most);
  for (T v : part) best = v > best ? v : best;
  for (; j < n; ++j) best = value[j] > best ? value[j] : best;
  return best;
}

// How many logits are not masked; -1 when a NaN is among them.
template <class T>
int64_t count_valid(const T* s, int64_t n) {
  constexpr int L = kLanes<T>;
  const Vec<T> least = splat<T>(std::numeric_limits<T>::lowest());
  int64_t valid = 0;
  uint32_t odd = 0;
  for (int64_t j = 0; j < n; j += L) {
    const Vec<T> v = load<T>(s + j);
    valid += __builtin_popcount(lanes<T, Compare::kNotBelow>(v, least));
    odd |= ~lanes<T, Compare::kEqual>(v, v);
  }
  return odd & ((1u << L) - 1) ? -1 : valid;
}

template <class T>
struct KeptList {
  T *value, *weight;
  int32_t* number;
  T* work;
  int64_t n;
};

// Narrows the list (or, at first, the row s) to its k largest; says from which logit and which tie on.
template <class T>
void narrow_list(KeptList<T>& list, const T* s, int64_t width, int64_t valid, int64_t k, T& tau, int32_t& cut) {
  constexpr int32_t kAll = std::numeric_limits<int32_t>::max();
  const int64_t n = s ? valid : list.n;
  if (!s && n <= k) return;
  const T* from = s ? s : list.value;
  int64_t size = s ? width : n;
  tau = n <= k ? std::numeric_limits<T>::lowest() : kth_largest<T>(from, size, k, list.work);
  cut = kAll;
  const auto keep = [&] {
    const int32_t* number = s ? nullptr : list.number;
    list.n = kept_lanes<T>(from, size, number, 0, tau, cut, [&](uint32_t bits, int64_t j, int64_t place) {
      compress<T>(list.value + place, load<T>(from + j), bits);
      compress_index<T>(list.number + place, number ? number + j : nullptr, int32_t(j), bits);
    });
    for (int i = 0; i < kLanes<T>; ++i) list.value[list.n + i] = -std::numeric_limits<T>::infinity();
  };
  keep();
  if (list.n <= k) return;
  cut = last_tie<T>(list.value, list.number, list.n, tau, k);  // in rising order of keys: the lowest stay
  from = list.value, s = nullptr, size = list.n;
  keep();
}

template <class T>
void topk_fwd_row(const TopkAttentionParams<T>& p, int64_t row, const T* s, int64_t width, KeptList<T>& list, T* o) {
  const int64_t group = row / p.group_rows(), Dv = p.value_depth, ld = p.value_ld();
  const int64_t valid = count_valid<T>(s, width);
  const T* values = p.value_rows + group * p.keys * ld;
  T tau = std::numeric_limits<T>::lowest();
  int32_t cut = std::numeric_limits<int32_t>::max();
  const int64_t dense = p.straight_through ? 1 : 0;
  for (int64_t i = 0; i < p.softmaxes(); ++i) {
    const int64_t where = i < dense ? p.thresholds : p.output[i - dense], k = i < dense ? p.keys : p.topk[i - dense];
    const auto finish = [&](T lse) {
      const int64_t out = p.place(i < dense ? 0 : where, row, p.thresholds), at = p.place(where, row, p.softmaxes());
      if (i >= dense) store_rows<T>(o, ld, p.out, out, 1, 0, Dv);
      if (p.average && (i < dense || !dense)) std::memcpy(p.average + out * Dv, o, size_t(Dv) * sizeof(T));
      p.lse[at] = lse;
      p.tau[at] = tau;
      p.cut[at] = cut;
    };
    if (valid <= 0) {  // a NaN reaches all of the row; a query without keys gives 0
      const T fill = valid ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t c = 0; c < ld; ++c) o[c] = fill;
      finish(fill);
      continue;
    }
    narrow_list<T>(list, i ? nullptr : s, width, valid, k, tau, cut);
    if (list.n == 1) tau = list.value[0];  // tells the backward
    const T top = largest<T>(list.value, list.n);
    const T total = exponentials<T>(list.value, list.n, top, list.weight);
    std::memset(o, 0, size_t(ld) * sizeof(T));
    weighted_sum<T>(list.n, list.weight, list.number, values, ld, o);
    for (int64_t c = 0; c < ld; ++c) o[c] /= total;
    finish(top + std::log(total));
  }
}

template <class T>
void topk_fwd(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t R = p.block_rows(), lds = logits_ld<T>(p.keys), entries = lds + kListPad;
  T *q = scratch, *s = q + R * p.depth_ld(), *o = s + R * lds, *value = o + p.value_ld();
  KeptList<T> list{value, value + entries, reinterpret_cast<int32_t*>(value + 2 * entries), value + 3 * entries, 0};
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at % p.blocks() * R, left = p.group_rows() - first, n = left < R ? left : R;
    const int64_t row = at / p.blocks() * p.group_rows() + first, width = farthest(p, row, n);
    load_rows<T>(p.q, row, n, 0, p.depth, q, p.depth_ld());
    block_logits<T>(p, row, n, 0, width, q, s, lds, value);
    for (int64_t r = 0; r < n; ++r)
      topk_fwd_row<T>(p, row + r, s + r * lds, (width + kTileKeys - 1) / kTileKeys * kTileKeys, list, o);
  }
}

}  // namespace

#define PYML_TOPK_DEFINE(T)                                                                                           \
  int64_t topk_attention_scratch(const TopkAttentionParams<T>& p) {                                                   \
    const int64_t fwd = topk_fwd_scratch<T>(p), bwd = topk_bwd_scratch<T>(p);                                         \
    return fwd > bwd ? fwd : bwd;                                                                                     \
  }                                                                                                                   \
  void topk_pack_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end) { topk_pack<T>(p, begin, end); } \
  void topk_attention_fwd_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {           \
    topk_fwd<T>(p, begin, end, scratch);                                                                              \
  }                                                                                                                   \
  void topk_delta_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {                   \
    topk_delta<T>(p, begin, end, scratch);                                                                            \
  }                                                                                                                   \
  void topk_attention_bwd_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {           \
    topk_bwd<T>(p, begin, end, scratch);                                                                              \
  }                                                                                                                   \
  void topk_reduce_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end) {                              \
    topk_reduce<T>(p, begin, end);                                                                                    \
  }                                                                                                                   \
  void topk_mask_bwd_kernel(const TopkAttentionParams<T>& p, int64_t begin, int64_t end, T* scratch) {                \
    topk_mask_bwd<T>(p, begin, end, scratch);                                                                         \
  }

PYML_TOPK_DEFINE(float)
PYML_TOPK_DEFINE(double)

}  // namespace CPU_CAPABILITY
}  // namespace pyml
