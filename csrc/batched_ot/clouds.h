// Arguments of pairwise_cost, shared by the CPU and CUDA: what is checked.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "common/check.h"

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
};

}  // namespace pyml
