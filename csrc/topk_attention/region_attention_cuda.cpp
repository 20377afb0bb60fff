// region_attention on CUDA: allocation, launches, the inverted index. Kernels: region_*_cuda.cu; checks: those of the
// CPU but for the numbers in index and counts, which stay on the GPU: there, an entry out of range counts as -1 and
// sets the status word, which pyml/ops/topk_attention.py reads.
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "common/cuda_host.h"
#include "topk_attention/region_cuda.h"
#include "topk_attention/region_prepare.h"

namespace pyml {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct OnCuda {
  static void check_numbers(const RegionArguments&) {}  // the kernels do
  template <class T>
  static Four forward(const RegionArguments& a, const RegionOutputs& made);
  template <class T>
  static Four backward(const at::Tensor& grad, const RegionArguments& a, const at::Tensor& out, const at::Tensor& lse,
                       std::array<bool, 4> wanted);
};

template <class T>
struct CudaCall : RegionCall<T> {
  OnDevice device;
  RegionCuda<T> p{};
  at::Tensor mask, valid, valid_count;

  explicit CudaCall(const RegionArguments& a) : RegionCall<T>(a), device(a.q) {
    static_cast<RegionParams<T>&>(p) = this->c;
    const int64_t widest = region_cuda_widest(sizeof(T) == 8);
    for (const auto& [name, t] : {std::pair{"q", a.q}, {"v", a.v}})
      PYML_CHECK(t.size(4) <= widest, a.op, name,
                 c10::str("at most ", widest, " features in a CUDA kernel in ", a.wide()), t.size(4));
    if (!a.key_mask) return;
    mask = a.key_mask->contiguous();
    p.mask = mask.const_data_ptr<bool>();
    valid = at::argsort(mask.to(at::kByte), /*stable=*/true, -1, /*descending=*/true).to(at::kInt);
    valid_count = mask.sum(-1, false, at::kInt);
    p.valid = valid.const_data_ptr<int32_t>();
    p.valid_count = valid_count.const_data_ptr<int32_t>();
  }

  template <class Params>
  void run(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) const {
    check_cuda(RegionArguments::op, launcher(params, device.stream()));
  }
};

// Who chose each key region: the index inverted by a stable sort. All shapes follow from the arguments' shapes, so
// nothing waits for the GPU. Chunks are as long as the mean row, so they are at most twice as many as key regions:
// memory does not grow with K, and a region that all chose is still shared by many blocks.
struct Choosers {
  at::Tensor slots, first_slot, first_chunk, row_of_chunk;
  int64_t heads, rows, chunks, size;

  explicit Choosers(const RegionArguments& a) {
    const int64_t B = a.q.size(0), P = a.q.size(2), K = a.index.size(3), regions = a.k.size(2);
    heads = std::max(a.index.size(1), a.counts ? a.counts->size(1) : 1);
    rows = B * heads * regions;
    size = std::max<int64_t>(16, (P * K + regions - 1) / regions);
    chunks = std::min(B * heads * P * K, rows) + B * heads * P * K / size;
    const auto like = a.index.options();
    const at::Tensor index = a.index.expand({B, heads, P, K});
    at::Tensor good = index.ge(0).logical_and_(index.lt(regions));
    if (a.counts) good = good.logical_and_(at::arange(K, like).lt(a.counts->unsqueeze(-1)));
    const at::Tensor group = at::arange(B * heads, like).view({B, heads, 1, 1}).mul_(regions);
    const auto kind = rows < INT32_MAX ? at::kInt : at::kLong;
    const at::Tensor row = at::where(good, index.add(group), rows).to(kind).flatten();
    at::Tensor sorted;
    std::tie(sorted, slots) = at::sort(row, /*stable=*/true, 0, /*descending=*/false);
    first_slot = at::searchsorted(sorted, at::arange(rows + 1, like.dtype(kind)));
    const at::Tensor length = first_slot.slice(0, 1).sub(first_slot.slice(0, 0, rows));
    const at::Tensor many = at::cumsum(length.add(size - 1).floor_divide(size), 0);
    first_chunk = at::cat({at::zeros({1}, like), many});
    row_of_chunk = at::searchsorted(many, at::arange(chunks, like), false, /*right=*/true);
  }

  template <class T>
  void tell(RegionCuda<T>& p) const {
    p.slots_of = slots.const_data_ptr<int64_t>();
    p.first_slot = first_slot.const_data_ptr<int64_t>();
    p.first_chunk = first_chunk.const_data_ptr<int64_t>();
    p.row_of_chunk = row_of_chunk.const_data_ptr<int64_t>();
    p.rows = rows, p.list_heads = heads, p.chunks = chunks, p.chunk_size = size;
  }
};

template <class T>
Four OnCuda::forward(const RegionArguments& a, const RegionOutputs& made) {
  CudaCall<T> call(a);
  auto& p = call.p;
  p.out = regions_of(made.out);
  if (a.rounded()) p.exact = regions_of(made.exact);
  p.lse = made.lse.mutable_data_ptr<double>();
  p.status = made.status.mutable_data_ptr<int32_t>();
  call.template run<RegionCuda<T>>(region_cuda_fwd, p);
  return made.done();
}

template <class T>
Four OnCuda::backward(const at::Tensor& grad, const RegionArguments& a, const at::Tensor& out, const at::Tensor& lse,
                      std::array<bool, 4> wanted) {
  CudaCall<T> call(a);
  auto& p = call.p;
  const at::Tensor kept = lse.contiguous(), delta = at::empty(lse.sizes(), a.q.options().dtype(a.wide()));
  p.out = regions_of(out);
  p.grad = regions_of(grad);
  p.lse = const_cast<double*>(kept.const_data_ptr<double>());
  p.delta = delta.mutable_data_ptr<T>();
  const at::Tensor dq = region_gradient(wanted[0], a.q, p.dq), dk = region_gradient(wanted[1], a.k, p.dk);
  const at::Tensor dv = region_gradient(wanted[2], a.v, p.dv);
  at::Tensor dweight = no_gradient(a.region_weight ? *a.region_weight : grad);
  call.template run<RegionCuda<T>>(region_cuda_delta, p);
  if (wanted[0] || wanted[3]) {
    at::Tensor parts;
    if (wanted[3]) {
      parts = at::zeros({p.batch, p.heads, p.query_regions, region_cuda_query_blocks(p), p.slots}, delta.options());
      p.part_weight = parts.mutable_data_ptr<T>();
    }
    call.template run<RegionCuda<T>>(region_cuda_bwd_query, p);
    if (wanted[3]) dweight = region_weight_gradient(parts.sum(3), *a.region_weight);
  }
  if (!wanted[1] && !wanted[2]) return {dq, dk, dv, dweight};

  const Choosers list(a);
  list.tell(p);
  const auto parts = [&](bool want, int64_t width) {
    return at::empty({want ? list.chunks : 0, p.heads / list.heads, p.keys, width}, delta.options());
  };
  const at::Tensor part_k = parts(wanted[1], p.features), part_v = parts(wanted[2], p.value_features);
  if (wanted[1]) p.part_k = part_k.mutable_data_ptr<T>();
  if (wanted[2]) p.part_v = part_v.mutable_data_ptr<T>();
  call.template run<RegionCuda<T>>(region_cuda_bwd_key, p);
  const auto add_up = [&](bool want, const T* part, const Regions& to, int64_t width) {
    const RegionChunks<T> sum{part, to, p.first_chunk, p.batch, p.heads, list.heads, p.key_regions, p.keys, width};
    if (want) call.template run<RegionChunks<T>>(region_cuda_chunks, sum);
  };
  add_up(wanted[1], p.part_k, p.dk, p.features);
  add_up(wanted[2], p.part_v, p.dv, p.value_features);
  return {dq, dk, dv, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("region_attention_fwd", &RegionOp<OnCuda>::fwd);
  m.impl("region_attention_bwd", &RegionOp<OnCuda>::bwd);
}

}  // namespace pyml
