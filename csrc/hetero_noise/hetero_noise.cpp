// The noise ops on a CPU: threads.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/cpu_isa.h"
#include "hetero_noise/hetero_noise_op.h"

namespace pyml {
namespace {

// A call of the kernel over a list of tensors.
class Call {
 public:
  Call(const NoiseArguments& a, NoiseMode mode, double factor, size_t count) : op_(a.op), tensors_(count) {
    p_.mode = mode;
    p_.key = uint64_t(a.key.item().toLong());
    p_.step = uint32_t(a.step);
    p_.std = a.std;
    p_.factor = factor;
  }
  // Tensor n: out = f(in, noise), base where the mode has one.
  void add(size_t n, const at::Tensor& in, const at::Tensor& out, const at::Tensor& base, const at::Tensor& scale,
           const at::Tensor& columns, uint32_t id, int64_t first) {
    NoiseTensor& t = tensors_[n];
    Joined joined(out.sizes());
    joined.add(in, &t.in);
    joined.add(out, &t.out);
    if (base.defined()) joined.add(base, &t.base);
    tell_scale(scale, columns, joined, &t.scale);
    joined.into(op_, t);
    t.first = first;
    t.id = id;
    t.wide = any_double(in, base);
    t.begin = blocks_;
    blocks_ += t.blocks();
  }
  void run() {
    p_.tensors = tensors_.data();
    p_.tensor_count = int64_t(tensors_.size());
    parallel(blocks_, 2 * kPhiloxBlock,
             [&](int64_t begin, int64_t end) { PYML_CALL_ISA(hetero_noise_kernel, p_, begin, end); });
  }

  static at::Tensor sums(const at::Tensor& matrix, const at::Tensor& weights, int64_t dim) {
    const at::Tensor wide = matrix.to(at::kDouble);
    const at::Tensor by = weights.to(at::kDouble).contiguous();
    const int64_t rows = wide.size(0), columns = wide.size(1), count = dim == 0 ? columns : rows;
    const at::Tensor total = at::zeros({count}, wide.options());
    const double *m = wide.const_data_ptr<double>(), *w = by.const_data_ptr<double>();
    double* t = total.mutable_data_ptr<double>();
    parallel(count, dim == 0 ? rows : columns, [&](int64_t begin, int64_t end) {
      if (dim == 0) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = begin; c < end; ++c) t[c] += w[r] * m[r * columns + c];
      } else {
        for (int64_t r = begin; r < end; ++r)
          for (int64_t c = 0; c < columns; ++c) t[r] += w[c] * m[r * columns + c];
      }
    });
    return total;
  }

 private:
  const char* op_;
  NoiseParams p_{};
  std::vector<NoiseTensor> tensors_;
  int64_t blocks_ = 0;
};

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) { NoiseOp<Call>::implement(m); }

}  // namespace pyml
