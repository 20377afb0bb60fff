// Torch side of pairwise_cost, shared by the CPU and CUDA: arguments, outputs, gradients.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "batched_ot/batched_ot.h"
#include "common/check.h"
#include "common/gradients.h"

namespace pyml {

struct Clouds {
  static constexpr const char* op = "pairwise_cost";
  const at::Tensor &x, &y;
  const bool cosine;

  Clouds(const at::Tensor& x, const at::Tensor& y, c10::string_view kind) : x(x), y(y), cosine(kind == "cosine") {
    check_float(op, "x", x, x.device());
    check_float(op, "y", y, x.device());
    PYML_CHECK(x.dim() >= 2, op, "x", "shape [..., points, d]", x.sizes());
    PYML_CHECK(y.dim() == x.dim(), op, "y", "as many dimensions as x", y.sizes());
    std::vector<int64_t> expected = x.sizes().vec();
    expected[expected.size() - 2] = y.size(-2);
    check_shape(op, "y", y, expected);
    PYML_CHECK(cosine || kind == "sqeuclidean", op, "kind", "one of sqeuclidean, cosine", std::string(kind));
  }
  std::vector<int64_t> shape() const {
    std::vector<int64_t> of_cost = x.sizes().vec();
    of_cost.back() = y.size(-2);
    return of_cost;
  }
  template <class T>
  void tell(PairwiseParams<T>& p) const {
    p.batch = c10::multiply_integers(x.sizes().slice(0, size_t(x.dim() - 2)));
    p.n = x.size(-2), p.m = y.size(-2), p.d = x.size(-1);
    p.cosine = cosine;
  }
};

// The op where a Call runs the kernels of a backend. Call<T> computes in T; it is made of the clouds and of the costs,
// or of the gradient that comes in for them, with costs() and gradient(of_y, the cloud).
template <template <class> class Call>
struct PairwiseOp {
  using Two = std::tuple<at::Tensor, at::Tensor>;

  static at::Tensor fwd(const at::Tensor& x, const at::Tensor& y, c10::string_view kind) {
    const Clouds c(x, y, kind);
    return in_compute_type(any_double(x, y), [&](auto tag) {
      using T = decltype(tag);
      const at::Tensor cost = at::empty(c.shape(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
      if (cost.numel() > 0) Call<T>(c, cost).costs();
      return cost;
    });
  }

  static Two bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, c10::string_view kind,
                 std::array<bool, 2> mask) {
    const Clouds c(x, y, kind);
    check_float(Clouds::op, "grad", grad, x.device());
    check_shape(Clouds::op, "grad", grad, c.shape());
    if (grad.numel() == 0 || x.size(-1) == 0) return zero_gradients(mask, x, y);
    return in_compute_type(any_double(x, y), [&](auto tag) {
      Call<decltype(tag)> call(c, grad);
      return Two{mask[0] ? call.gradient(false, x) : no_gradient(x), mask[1] ? call.gradient(true, y) : no_gradient(y)};
    });
  }
};

}  // namespace pyml
