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

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("adamw_slices__fwd", &adamw_slices<CpuAdam>);
  HeadEditOp<CpuEdit>::implement(m);
}

}  // namespace pyml
