// The head ops on CUDA: tables of slices, launches. Kernels: adamw_cuda.cu, head_edit_cuda.cu.
#include "head_update/head_update_cuda.h"

#include <torch/library.h>

#include "common/cuda_host.h"
#include "common/philox.h"
#include "head_update/adamw_op.h"
#include "head_update/edit_op.h"

namespace pyml {
namespace {

class CudaAdam {
 public:
  explicit CudaAdam(const AdamArguments& a) : a_(a), device_(a.params[0]) {
    p_.step = a.numbers();
    p_.number = uint32_t(a.step);
    if (a.key) {
      kept_.push_back(a.key->contiguous());
      p_.key = kept_.back().const_data_ptr<int64_t>();
    }
  }

  void add(size_t n, const at::Tensor& param, const at::Tensor& grad, const at::Tensor& m, const at::Tensor& v,
           const at::Tensor& master) {
    if (param.numel() == 0) return;
    std::array<at::Tensor, 5> tensors = {param, grad, m, v, master};
    std::array<Strided, 5> where;
    Elements e = joined(tensors, where);
    if (e.dims > 2) {  // copies without gaps, of which the written ones are brought home
      for (size_t i = 0; i < tensors.size(); ++i) {
        if (!tensors[i].defined() || tensors[i].is_contiguous()) continue;
        const at::Tensor flat = tensors[i].contiguous();
        if (i != 1) written_.emplace_back(tensors[i], flat);
        kept_.push_back(flat);
        tensors[i] = flat;
      }
      e = joined(tensors, where);
    }
    AdamCudaSlice t{};
    t.count = e.count;
    t.columns = e.dims > 0 ? e.sizes[e.dims - 1] : 1;
    t.id = a_.id(n);
    AdamOperand* const operands[5] = {&t.param, &t.grad, &t.m, &t.v, &t.master};
    uint8_t* const types[5] = {&t.param_type, &t.grad_type, &t.m_type, &t.v_type, &t.master_type};
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].defined()) continue;
      const int64_t column = e.dims > 0 ? where[i].strides[e.dims - 1] : 1;
      *operands[i] = {where[i].data, e.dims == 2 ? where[i].strides[0] : 0, column};
      *types[i] = uint8_t(where[i].dtype);
    }
    (any_double(param, grad, m, v, master) ? wide_ : narrow_).push_back(t);
  }

  void run() {
    launch_all(narrow_, false);
    launch_all(wide_, true);
    for (const auto& [to, from] : written_) to.copy_(from);
  }

 private:
  static Elements joined(const std::array<at::Tensor, 5>& tensors, std::array<Strided, 5>& where) {
    Elements e;
    Joined all(tensors[0].sizes());
    for (size_t i = 0; i < tensors.size(); ++i) {
      where[i] = Strided();
      if (tensors[i].defined()) all.add(tensors[i], &where[i]);
    }
    all.into(kAdamOp, e);
    return e;
  }

  void launch_all(const std::vector<AdamCudaSlice>& slices, bool wide) {
    const auto go = [&] {
      if (p_.count > 0) check_cuda(kAdamOp, pyml_cuda_adamw_slices(&p_, wide, device_.stream()));
      p_.count = 0, p_.blocks = 0;
    };
    go();
    for (const AdamCudaSlice& t : slices) {
      const int64_t blocks = (t.count + kPhiloxBlock - 1) / kPhiloxBlock;
      PYML_CHECK(blocks <= INT32_MAX, kAdamOp, "params", "slices of at most 2^37 elements", t.count);
      if (p_.count == kAdamTable || p_.blocks + blocks > INT32_MAX) go();
      p_.slices[p_.count] = t;
      p_.slices[p_.count++].begin = int32_t(p_.blocks);
      p_.blocks += blocks;
    }
    go();
  }

  const AdamArguments& a_;
  OnDevice device_;
  AdamCuda p_{};
  std::vector<AdamCudaSlice> narrow_, wide_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

struct CudaEdit {
  static constexpr bool kOwnsRows = false, kCopiesRows = false;  // a row of outputs has several blocks
  static void edit(const HeadEditParams& p, const at::Tensor& there) {
    OnDevice device(there);
    check_cuda("head_edit", pyml_cuda_head_edit(&p, device.stream()));
  }
  static void matrix(const HeadMatrixParams& p, const at::Tensor& there) {
    OnDevice device(there);
    check_cuda("head_edit", pyml_cuda_head_edit_matrix(&p, device.stream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, PYML_CUDA_KEY, m) {
  m.impl("adamw_slices__fwd", &adamw_slices<CudaAdam>);
  HeadEditOp<CudaEdit>::implement(m);
}

}  // namespace pyml
