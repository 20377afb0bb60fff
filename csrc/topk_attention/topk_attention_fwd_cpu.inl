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

// How many of n logits are not masked; -1 when a NaN is among them.
template <class T>
int64_t count_valid(const T* s, int64_t n) {
  constexpr int L = kLanes<T>;
  // Most rows are all finite: x - x is 0 then, and NaN otherwise.
  Vec<T> odd[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<T> v = load<T>(s + j + i * L);
      odd[i] += v - v;
    }
  T total = sum<T>((odd[0] + odd[1]) + (odd[2] + odd[3]));
  for (int64_t i = j; i < n; ++i) total += s[i] - s[i];
  if (total == 0) return n;
  int64_t valid = 0, nans = 0;
  for (j = 0; j < n; ++j) {
    valid += s[j] >= std::numeric_limits<T>::lowest();
    nans += s[j] != s[j];
  }
  return nans ? -1 : valid;
}

template <class T>
struct KeptList {
  T *value, *weight;
  int32_t* number;
  T* work;
  int64_t n;
};

// Lists what is not below tau, equal ones up to number `cut`: of the row s [0, n) or, without it, of the list itself.
template <class T>
void keep(KeptList<T>& list, const T* s, int64_t n, T tau, int32_t cut) {
  const T* from = s ? s : list.value;
  const int32_t* number = s ? nullptr : list.number;
  list.n = kept_lanes<T>(from, s ? n : list.n, number, 0, tau, cut, [&](uint32_t bits, int64_t j, int64_t place) {
    compress<T>(list.value + place, load<T>(from + j), bits);
    compress_index<T>(list.number + place, number ? number + j : nullptr, int32_t(j), bits);
  });
  for (int i = 0; i < kLanes<T>; ++i) list.value[list.n + i] = -std::numeric_limits<T>::infinity();
}

// Narrows the list (at first: the row s, of which `valid` are not masked) to its k largest; says from which logit and
// which tie on.
template <class T>
void narrow(KeptList<T>& list, const T* s, int64_t width, int64_t valid, int64_t k, T& tau, int32_t& cut) {
  constexpr int32_t kAll = std::numeric_limits<int32_t>::max();
  if ((s ? valid : list.n) <= k) {
    if (s) keep<T>(list, s, width, tau, cut);
    return;
  }
  if (s && k < valid / 8) {  // first to a few more than k, so that what follows runs over these alone
    T pivot[2];
    sample_pivots<T>(s, width, k, 2.2, pivot);
    keep<T>(list, s, width, pivot[1] > tau ? pivot[1] : tau, kAll);
    if (list.n >= k) s = nullptr;  // else the sample misled
  }
  tau = kth_largest<T>(s ? s : list.value, s ? width : list.n, k, list.work);
  cut = kAll;
  keep<T>(list, s, width, tau, cut);
  if (list.n <= k) return;
  cut = last_tie<T>(list.value, list.number, list.n, tau, k);  // in rising order of keys: the lowest stay
  keep<T>(list, nullptr, 0, tau, cut);
}

template <class T>
void topk_fwd_row(const TopkAttentionParams<T>& p, int64_t row, const T* s, int64_t width, KeptList<T>& list, T* o) {
  const int64_t group = row / p.group_rows(), Dv = p.value_depth, ld = p.value_ld();
  const int64_t valid = count_valid<T>(s, reach(p, row));
  const T* values = p.value_rows + group * p.keys * ld;
  T tau = std::numeric_limits<T>::lowest();
  int32_t cut = std::numeric_limits<int32_t>::max();
  const int64_t dense = p.straight_through ? 1 : 0;
  for (int64_t i = 0; i < p.softmaxes(); ++i) {
    const int64_t where = i < dense ? p.thresholds : p.output[i - dense], k = i < dense ? p.keys : p.topk[i - dense];
    const auto finish = [&](T top, T total) {
      const int64_t out = p.place(i < dense ? 0 : where, row, p.thresholds), at = p.place(where, row, p.softmaxes());
      if (i >= dense) store_rows<T>(o, ld, p.out, out, 1, 0, Dv);
      if (p.average && (i < dense || !dense)) std::memcpy(p.average + out * Dv, o, size_t(Dv) * sizeof(T));
      p.top[at] = top;
      p.total[at] = total;
      p.tau[at] = tau;
      p.cut[at] = cut;
    };
    if (valid <= 0) {  // a NaN reaches all of the row; a query without keys gives 0
      const T fill = valid ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t c = 0; c < ld; ++c) o[c] = fill;
      finish(fill, T(1));
      continue;
    }
    narrow<T>(list, i ? nullptr : s, width, valid, k, tau, cut);
    if (list.n == 1) tau = list.value[0];  // tells the backward
    const T top = largest<T>(list.value, list.n);
    const T total = exponentials<T>(list.value, list.n, top, list.weight);
    std::memset(o, 0, size_t(ld) * sizeof(T));
    weighted_sum<T>(list.n, list.weight, list.number, values, ld, o);
    for (int64_t c = 0; c < ld; ++c) o[c] /= total;
    finish(top, total);
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
