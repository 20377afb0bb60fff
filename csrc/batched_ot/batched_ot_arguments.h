// Arguments of the family's ops, shared by the CPU and CUDA: what is checked, and what follows from shapes and dtypes.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "batched_ot/batched_ot.h"
#include "common/check.h"

namespace pyml {

inline double largest_epsilon(const std::optional<at::Tensor>& t) {
  if (!t) return 0;
  return t->scalar_type() == at::kBFloat16 ? 0x1p-7 : t->scalar_type() == at::kHalf ? 0x1p-10 : 0;
}

// What all calls of the family share.
struct Arguments {
  const char* op;
  const at::Tensor& cost;
  const std::optional<at::Tensor>&a, &b;
  double eps;

  bool is_double() const { return any_double(cost, a ? *a : at::Tensor(), b ? *b : at::Tensor()); }
  at::IntArrayRef lead() const { return cost.sizes().slice(0, size_t(cost.dim() - 2)); }
  std::vector<int64_t> shape(std::initializer_list<int64_t> last) const {
    std::vector<int64_t> all = lead().vec();
    all.insert(all.end(), last);
    return all;
  }
  int64_t batch() const { return c10::multiply_integers(lead()); }
  int64_t n() const { return cost.size(-2); }
  int64_t m() const { return cost.size(-1); }

  // How far two masses may be apart, relatively: what rounding to the dtype of the weights explains.
  double mass_tolerance() const { return std::max({1e-4, 2 * largest_epsilon(a), 2 * largest_epsilon(b)}); }

  void check_one(const char* name, const at::Tensor& t, std::initializer_list<int64_t> last) const {
    check_float(op, name, t, cost.device());
    check_shape(op, name, t, shape(last));
  }
  void check_potentials(const at::Tensor& f, const at::Tensor& g) const {
    check_one("f", f, {n()});
    check_one("g", g, {m()});
  }
  void check() const {
    check_float(op, "cost", cost, cost.device());
    PYML_CHECK(cost.dim() >= 2, op, "cost", "shape [..., n, m]", cost.sizes());
    if (a) check_one("a", *a, {n()});
    if (b) check_one("b", *b, {m()});
    PYML_CHECK(std::isfinite(eps) && eps > 0, op, "eps", "a finite number > 0", eps);
  }
};

struct SolveOptions {
  int64_t max_iter;
  std::optional<double> tol, rho;

  void check(const char* op) const {
    PYML_CHECK(max_iter >= 1 && max_iter <= 1000000, op, "max_iter", "an integer from 1 to 1000000", max_iter);
    PYML_CHECK(!tol || (std::isfinite(*tol) && *tol >= 0), op, "tol", "a finite number >= 0 or None", *tol);
    PYML_CHECK(!rho || (std::isfinite(*rho) && *rho > 0), op, "rho", "a finite number > 0 or None", *rho);
  }
  template <class T>
  void give(SinkhornParams<T>& p) const {
    p.max_iter = max_iter;
    p.stops = tol.has_value();
    p.tol = T(tol.value_or(0));
    p.unbalanced = rho.has_value();
    p.rho = T(rho.value_or(1));
  }
};

}  // namespace pyml
