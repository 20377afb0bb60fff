// region_attention on a CPU: what only a CPU checks, allocation, threads.
#include <torch/library.h>

#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "topk_attention/region_prepare.h"

namespace pyml {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct OnCpu {
  static void check_numbers(const RegionArguments& a);
  template <class T>
  static Four forward(const RegionArguments& a, const RegionOutputs& made);
  template <class T>
  static Four backward(const at::Tensor& grad, const RegionArguments& a, const at::Tensor& out, const at::Tensor& lse,
                       std::array<bool, 4> mask);
};

// Before anything is read through them.
void OnCpu::check_numbers(const RegionArguments& a) {
  const at::Tensor chosen = a.index.contiguous(), used = a.counts ? a.counts->contiguous() : at::Tensor();
  const int64_t* ids = chosen.const_data_ptr<int64_t>();
  const int64_t* count = a.counts ? used.const_data_ptr<int64_t>() : nullptr;
  const int64_t slots = chosen.size(3), P = chosen.size(2), regions = a.k.size(2);
  for (int64_t i = 0; count && i < used.numel(); ++i)
    PYML_CHECK(count[i] >= 0 && count[i] <= slots, a.op, "counts", c10::str("numbers from 0 to K = ", slots), count[i]);
  const int64_t heads = std::max(chosen.size(1), count ? used.size(1) : 1);
  for (int64_t b = 0; b < chosen.size(0); ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t p = 0; p < P; ++p) {
        const int64_t* row = ids + ((b * chosen.size(1) + (chosen.size(1) > 1 ? h : 0)) * P + p) * slots;
        const int64_t n = count ? count[(b * used.size(1) + (used.size(1) > 1 ? h : 0)) * P + p] : slots;
        for (int64_t j = 0; j < n; ++j)
          PYML_CHECK(row[j] >= -1 && row[j] < regions, a.op, "index",
                     c10::str("regions from 0 to ", regions - 1, " or -1 for none"), row[j]);
      }
}

// The call with the valid keys listed.
template <class T>
struct Call : RegionCall<T> {
  using RegionCall<T>::c;
  at::Tensor mask;
  std::vector<int32_t> valid, valid_count;

  explicit Call(const RegionArguments& a) : RegionCall<T>(a) {
    if (a.key_mask) list_valid(*a.key_mask);
  }

  void list_valid(const at::Tensor& key_mask) {
    mask = key_mask.contiguous();
    const bool* keep = mask.const_data_ptr<bool>();
    valid.assign(mask.numel(), 0);
    valid_count.assign(c.batch * c.key_regions, 0);
    for (int64_t r = 0; r < c.batch * c.key_regions; ++r)
      for (int64_t t = 0; t < c.keys; ++t)
        if (keep[r * c.keys + t]) valid[r * c.keys + valid_count[r]++] = int32_t(t);
    c.valid = valid.data();
    c.valid_count = valid_count.data();
  }

  int64_t key_regions() const { return c.group() * c.key_regions; }
  // About the vector operations between one query region and the keys it chose.
  int64_t pair_work() const { return c.slots * c.keys * (c.queries + 15) / 16 * (c.features + c.value_features + 12); }
};

// Keys (or values) as rows of T: the tensor itself where it is that, else a copy.
template <class T>
at::Tensor as_rows(const at::Tensor& t, bool copy, T*& data, int64_t (&stride)[4]) {
  const bool usable =
      !copy && t.scalar_type() == c10::CppTypeToScalarType<T>::value && (t.stride(4) == 1 || t.size(4) <= 1);
  const at::Tensor rows = usable ? t : at::empty(t.sizes(), t.options().dtype(c10::CppTypeToScalarType<T>::value));
  data = static_cast<T*>(const_cast<void*>(rows.const_data_ptr()));
  for (int i = 0; i < 4; ++i) stride[i] = rows.stride(i);
  return usable ? at::Tensor() : rows;
}

template <class T>
Four OnCpu::forward(const RegionArguments& a, const RegionOutputs& made) {
  Call<T> call(a);
  auto& c = call.c;
  c.out = regions_of(made.out);
  if (a.rounded()) c.exact = regions_of(made.exact);
  c.lse = made.lse.mutable_data_ptr<double>();
  const bool masked = a.key_mask.has_value();
  at::Tensor keys = as_rows<T>(a.k, masked, c.key_rows, c.key_stride);
  at::Tensor values = as_rows<T>(a.v, masked, c.value_rows, c.value_stride);
  if (keys.defined() != values.defined()) {  // the copy is made for both
    keys = as_rows<T>(a.k, true, c.key_rows, c.key_stride);
    values = as_rows<T>(a.v, true, c.value_rows, c.value_stride);
  }
  if (keys.defined())
    parallel(call.key_regions(), c.keys * (c.features + c.value_features) / 4,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_rows_kernel, c, begin, end); });
  const int64_t lanes = PYML_CALL_ISA(region_lanes, c), blocks = Blocks(c.queries, lanes).count;
  parallel(c.group() * c.query_regions * blocks, call.pair_work() / std::max<int64_t>(1, blocks),
           [&](int64_t begin, int64_t end) {
             PYML_CALL_ISA(region_fwd_kernel, c, begin, end, scratch<T>(PYML_CALL_ISA(region_fwd_scratch, c)));
           });
  return made.done();
}

// How many splits of the query regions: enough tasks for many cores within 16 MiB of partial sums, by shape alone.
int64_t split_count(int64_t group, int64_t query_regions, int64_t bytes) {
  const int64_t by_tasks = (32 + group - 1) / group, by_memory = (16 << 20) / std::max<int64_t>(1, bytes);
  return std::max<int64_t>(1, std::min({by_tasks, by_memory, query_regions}));
}

template <class T>
Four OnCpu::backward(const at::Tensor& grad, const RegionArguments& a, const at::Tensor& out, const at::Tensor& lse,
                     std::array<bool, 4> mask) {
  Call<T> call(a);
  auto& c = call.c;
  const at::Tensor kept = lse.contiguous();
  c.out = regions_of(out);
  c.grad = regions_of(grad);
  c.lse = const_cast<double*>(kept.const_data_ptr<double>());
  const at::Tensor dq = region_gradient(mask[0], a.q, c.dq), dk = region_gradient(mask[1], a.k, c.dk);
  const at::Tensor dv = region_gradient(mask[2], a.v, c.dv);
  c.want_q = mask[0];
  c.want_kv = mask[1] || mask[2];

  const int64_t lanes = PYML_CALL_ISA(region_lanes, c), regions = call.key_regions();
  const Blocks keys(c.keys, lanes);
  const int64_t columns = regions * keys.count * keys.padded * (c.features + c.value_features);
  const at::Tensor packed = buffer<T>(columns, a.q);
  const at::Tensor rows = buffer<T>(regions * keys.count * PYML_CALL_ISA(region_row_size, c), a.q);
  c.packed = packed.template mutable_data_ptr<T>();
  c.packed_rows = rows.template mutable_data_ptr<T>();
  parallel(regions, c.keys * (2 * c.features + c.value_features) / 4,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_pack_kernel, c, begin, end); });

  c.splits = split_count(c.group(), c.query_regions, columns * int64_t(sizeof(T)));
  const at::Tensor partial = buffer<T>(c.want_kv ? c.splits * columns : 0, a.q);
  const at::Tensor touched = at::zeros({c.splits * regions}, a.q.options().dtype(at::kByte));
  c.partial = partial.template mutable_data_ptr<T>();
  c.touched = touched.mutable_data_ptr<uint8_t>();
  at::Tensor dweights;  // [B, H, P, K]
  if (mask[3]) {
    dweights = at::empty({c.batch, c.heads, c.query_regions, c.slots}, call.weight.options());
    c.dweight = dweights.template mutable_data_ptr<T>();
  }
  const auto work = [&] { return scratch<T>(PYML_CALL_ISA(region_bwd_scratch, c)); };
  parallel(c.group() * c.splits, 3 * call.pair_work() * c.query_regions / c.splits,
           [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_bwd_kernel, c, begin, end, work()); });
  if (c.want_kv)
    parallel(regions, c.keys * (c.features + c.value_features) * c.splits / 16,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(region_reduce_kernel, c, begin, end, work()); });
  if (mask[3]) return {dq, dk, dv, region_weight_gradient(dweights, *a.region_weight)};
  return {dq, dk, dv, no_gradient(a.region_weight ? *a.region_weight : grad)};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("region_attention_fwd", &RegionOp<OnCpu>::fwd);
  m.impl("region_attention_bwd", &RegionOp<OnCpu>::bwd);
}

}  // namespace pyml
