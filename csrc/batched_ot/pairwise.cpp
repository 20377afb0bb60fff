// Costs between clouds of points on a CPU: checks, allocation, threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "batched_ot/clouds.h"
#include "batched_ot/matrices.h"
#include "common/check.h"
#include "common/cpu.h"
#include "common/cpu_isa.h"
#include "common/gradients.h"

namespace pyml {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

// Parameters of a call and what they point to.
template <class T>
struct Call {
  PairwiseParams<T> p{};
  std::vector<int64_t> of_x, of_y, of_cost;

  Call(const Clouds& c, const at::Tensor& cost)
      : of_x(offsets_of(c.x)), of_y(offsets_of(c.y)), of_cost(offsets_of(cost)) {
    p.batch = int64_t(of_x.size());
    p.n = c.x.size(-2), p.m = c.y.size(-2), p.d = c.x.size(-1);
    p.cosine = c.cosine;
    p.x = costs_of(c.x, of_x);
    p.y = costs_of(c.y, of_y);
    p.cost = costs_of(cost, of_cost);
  }
  template <class Kernel>
  void run(int64_t tasks, int64_t points, const Kernel& kernel) const {
    const int64_t work = std::min<int64_t>(points, 128) * std::max(p.n, p.m) * p.d / 8 + 1;
    parallel(tasks, work, [&](int64_t begin, int64_t end) {
      kernel(begin, end, scratch<T>(PYML_CALL_ISA(pairwise_cost_scratch, p)));
    });
  }
};

at::Tensor pairwise_cost_fwd(const at::Tensor& x, const at::Tensor& y, c10::string_view kind) {
  const Clouds c(x, y, kind);
  return in_compute_type(any_double(x, y), [&](auto tag) {
    using T = decltype(tag);
    const at::Tensor cost = at::empty(c.shape(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
    if (cost.numel() == 0) return cost;
    const Call<T> call(c, cost);
    const auto& p = call.p;
    call.run(PYML_CALL_ISA(pairwise_cost_tasks, p), std::min(p.n, p.m), [&](int64_t begin, int64_t end, T* memory) {
      PYML_CALL_ISA(pairwise_cost_fwd_kernel, p, begin, end, memory);
    });
    return cost;
  });
}

Two pairwise_cost_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, c10::string_view kind,
                      std::array<bool, 2> mask) {
  const Clouds c(x, y, kind);
  check_float(Clouds::op, "grad", grad, x.device());
  check_shape(Clouds::op, "grad", grad, c.shape());
  if (grad.numel() == 0) return zero_gradients(mask, x, y);
  return in_compute_type(any_double(x, y), [&](auto tag) {
    using T = decltype(tag);
    const auto made = [](bool wanted, const at::Tensor& like) {
      return wanted ? at::empty(like.sizes(), like.options()) : no_gradient(like);
    };
    const at::Tensor dx = made(mask[0], x), dy = made(mask[1], y);
    Call<T> call(c, grad);
    auto& p = call.p;
    const auto pull = [&](bool of_y, const at::Tensor& found, Points& to) {
      const auto offsets = offsets_of(found);
      to = costs_of(found, offsets);
      call.run(PYML_CALL_ISA(pairwise_cost_bwd_tasks, p, of_y), of_y ? p.m : p.n,
               [&](int64_t begin, int64_t end, T* memory) {
                 PYML_CALL_ISA(pairwise_cost_bwd_kernel, p, of_y, begin, end, memory);
               });
    };
    if (mask[0]) pull(false, dx, p.grad_x);
    if (mask[1]) pull(true, dy, p.grad_y);
    return Two{dx, dy};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pyml, CPU, m) {
  m.impl("pairwise_cost_fwd", &pairwise_cost_fwd);
  m.impl("pairwise_cost_bwd", &pairwise_cost_bwd);
}

}  // namespace pyml
