// The head ops on a CPU: threads.
#include <torch/library.h>

#include "common/cpu_isa.h"
#include "head_update/adamw_op.h"
#include "head_update/edit_op.h"

namespace pyml {
namespace {

class CpuAdam {
 public:
  explicit CpuAdam(const AdamArguments& a) : a_(a), slices_(a.count()) {
    p_.step = a.numbers();
    p_.number = uint32_t(a.step);
    p_.stochastic = a.key.has_value();
    p_.key = a.key ? uint64_t(a.key->item().toLong()) : 0;
  }
  void add(size_t n, const at::Tensor& param, const at::Tensor& grad, const at::Tensor& m, const at::Tensor& v,
           const at::Tensor& master) {
    AdamSlice& t = slices_[n];
    Joined joined(param.sizes());
    joined.add(param, &t.param);
    joined.add(grad, &t.grad);
    joined.add(m, &t.m);
    joined.add(v, &t.v);
    if (master.defined()) joined.add(master, &t.master);
    joined.into(kAdamOp, t);
    t.wide = any_double(param, grad, m, v, master);
    t.id = a_.id(n);
    t.begin = blocks_;
    blocks_ += t.blocks();
  }
  void run() {
    p_.slices = slices_.data();
    p_.slice_count = int64_t(slices_.size());
    parallel(blocks_, 4 * kAdamBlock,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(adamw_slices_kernel, p_, begin, end); });
  }

 private:
  const AdamArguments& a_;
  AdamParams p_{};
  std::vector<AdamSlice> slices_;
  int64_t blocks_ = 0;
};

struct CpuEdit {
  static constexpr bool kOwnsRows = true, kCopiesRows = true;
  static void edit(const HeadEditParams& p, const at::Tensor&) {
    const int64_t a_head = kEditRows * p.padded / 8 * (p.matrix ? p.dim : 1);
    const bool copies = p.row_bytes > 0;
    const int64_t items = edit_blocks(p) * (copies ? 1 : p.count);
    const int64_t work = copies ? p.count * a_head + kEditRows * p.row_bytes / 32 : a_head;
    parallel(items, work, [&](int64_t begin, int64_t end) {
      double* memory = scratch<double>(edit_scratch(p.padded));
      PYML_CALL_ISA(head_edit_kernel, p, begin, end, memory);
    });
  }
  static void matrix(const HeadMatrixParams& p, const at::Tensor&) {
    parallel(p.count * p.splits, p.split_rows * p.dim * p.padded / 8, [&](int64_t begin, int64_t end) {
      double* memory = scratch<double>(edit_scratch(p.padded));
      PYML_CALL_ISA(head_edit_matrix_kernel, p, begin, end, memory);
    });
  }
};

// For kernels without a C++ launcher: of tensors on any device.
void check_slices_apart(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                        at::TensorList exp_avg_sqs, at::TensorList masters) {
  std::vector<Listed> all;
  const auto list = [&](const char* name, at::TensorList tensors) {
    for (size_t n = 0; n < tensors.size(); ++n)
      if (tensors[n].numel() > 0) all.emplace_back(tensors[n], name, n, tensors.data() != grads.data());
  };
  list("params", params), list("grads", grads), list("exp_avgs", exp_avgs), list("exp_avg_sqs", exp_avg_sqs);
  list("masters", masters);
  check_places_apart(all);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyml, m) {
  m.def(
      "check_slices_apart(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
      "Tensor[] masters) -> ()");
}
TORCH_LIBRARY_IMPL(pyml, CompositeExplicitAutograd, m) { m.impl("check_slices_apart", &check_slices_apart); }

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("adamw_slices__fwd", &adamw_slices<CpuAdam>);
  HeadEditOp<CpuEdit>::implement(m);
}

}  // namespace pyml
