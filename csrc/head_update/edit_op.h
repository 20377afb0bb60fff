// Torch side of head_edit, shared by the CPU and CUDA: arguments, tensors as rows of heads, outputs, gradients.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/cpu.h"
#include "common/gradients.h"
#include "head_update/head_update.h"

namespace pyml {

// A tensor [..., H, D] as rows of heads: up to three leading dimensions, of more see `few`.
inline HeadRows head_rows(const at::Tensor& t) {
  HeadRows found;
  const int64_t lead = t.dim() - 2;
  const auto size = [&](int64_t back) { return lead >= back ? std::max<int64_t>(1, t.size(lead - back)) : 1; };
  const auto stride = [&](int64_t back) { return lead >= back ? t.stride(lead - back) : 0; };
  Rows& r = found.rows;
  r.data = const_cast<void*>(t.const_data_ptr());
  r.dtype = dtype_of(t);
  r.width = size(1), r.height = size(2);
  r.stride_w = stride(1), r.stride_h = stride(2), r.stride_n = stride(3);
  r.stride_c = t.stride(-1);
  found.head = t.stride(-2);
  return found;
}
// At most three leading dimensions; a copy where they do not join.
inline at::Tensor few(const at::Tensor& t) { return t.dim() > 5 ? t.flatten(0, t.dim() - 5) : t; }

struct EditArguments {
  const char* op;
  const at::Tensor& x;
  at::IntArrayRef heads;
  const std::optional<at::Tensor>&values, &matrix;
  double strength;

  int64_t count() const { return int64_t(heads.size()); }
  int64_t dim() const { return x.size(-1); }
  int64_t rows() const { return c10::multiply_integers(x.sizes().slice(0, size_t(x.dim() - 2))); }
  int64_t padded() const { return (dim() + 15) / 16 * 16; }  // whole vectors of every instruction set
  bool wide() const { return any_double(x, values.value_or(at::Tensor()), matrix.value_or(at::Tensor())); }
  at::ScalarType compute_type() const { return wide() ? at::kDouble : at::kFloat; }
  at::TensorOptions compute() const { return x.options().dtype(compute_type()); }
  std::vector<int64_t> shape_of_values() const {
    std::vector<int64_t> shape = x.sizes().vec();
    shape[shape.size() - 2] = count();
    return shape;
  }

  void check() const {
    check_float(op, "x", x, x.device());
    PYML_CHECK(x.dim() >= 2, op, "x", "shape [..., H, D]", x.sizes());
    std::vector<bool> seen(size_t(x.size(-2)));
    for (const int64_t h : heads) {
      PYML_CHECK(h >= 0 && h < x.size(-2), op, "heads", c10::str("heads in [0, ", x.size(-2), ")"), h);
      PYML_CHECK(!seen[size_t(h)], op, "heads", "heads that differ", heads);
      seen[size_t(h)] = true;
    }
    if (values) {
      check_float(op, "values", *values, x.device());
      const std::vector<int64_t> shape = shape_of_values();
      bool fits = values->dim() == x.dim();
      for (int64_t d = 0; fits && d < x.dim(); ++d) {
        const int64_t n = values->size(d);
        fits = n == shape[size_t(d)] || (n == 1 && d < x.dim() - 2);
      }
      PYML_CHECK(fits, op, "values", c10::str("a shape that broadcasts to ", at::IntArrayRef(shape)), values->sizes());
    }
    if (matrix) {
      check_float(op, "matrix", *matrix, x.device());
      check_shape(op, "matrix", *matrix, {count(), dim(), dim()});
    }
    PYML_CHECK(std::isfinite(strength), op, "strength", "a finite number", strength);
  }

  // [k, D, padded] in the compute type; entry (d, o) multiplies input d and adds to output o.
  at::Tensor packed(bool transposed) const {
    const at::Tensor whole = at::zeros({count(), dim(), padded()}, compute());
    whole.narrow(2, 0, dim()).copy_(transposed ? matrix->transpose(1, 2) : *matrix);
    return whole;
  }
};

// f(first, how many) over the heads, as many as one call of a kernel takes.
template <class Params, class F>
void by_heads(const EditArguments& a, Params& p, const F& f) {
  for (int64_t first = 0; first < a.count(); first += kEditHeads) {
    p.count = int(std::min<int64_t>(kEditHeads, a.count() - first));
    for (int i = 0; i < p.count; ++i) p.heads[i] = int32_t(a.heads[size_t(first + i)]);
    f(first);
  }
}

// The ops where Kernels runs those of a backend: edit(params, a tensor there) and matrix(params, a tensor there).
// kOwnsRows: a row may be written where it is read, with a matrix too. kCopiesRows: edit copies whole rows if asked.
template <class Kernels>
struct HeadEditOp {
  // `in` and `out` [..., H, D] with at most three leading dimensions; they may be one tensor. row_bytes: of a row of
  // both, where `out` is to become a copy of `in` first.
  static void edit(const EditArguments& a, const at::Tensor& in, const at::Tensor& out, const at::Tensor& values,
                   const at::Tensor& matrix, int64_t row_bytes = 0) {
    if (a.rows() == 0 || a.dim() == 0) return;
    HeadEditParams p{};
    p.row_bytes = row_bytes;
    p.row_count = a.rows(), p.dim = a.dim(), p.padded = a.padded();
    p.keep = 1 - a.strength, p.strength = a.strength;
    p.wide = a.wide();
    p.in = head_rows(in), p.out = head_rows(out);
    const HeadRows all = values.defined() ? head_rows(values) : HeadRows();
    by_heads(a, p, [&](int64_t first) {
      if (values.defined()) {
        p.values = all;
        p.values.rows.data = static_cast<char*>(all.rows.data) + first * all.head * values.element_size();
      }
      if (matrix.defined())
        p.matrix = static_cast<const char*>(matrix.const_data_ptr()) + first * matrix.stride(0) * matrix.element_size();
      Kernels::edit(p, out);
      p.row_bytes = 0;
    });
  }

  // A copy of `in` in new memory, with edited heads. Rows of heads without gaps are copied by the kernel that edits
  // them.
  static at::Tensor edited(const EditArguments& a, const at::Tensor& in, const at::Tensor& values,
                           const at::Tensor& matrix) {
    const at::Tensor out = at::empty(in.sizes(), in.options()), from = few(in), to = few(out);
    const int64_t heads = in.size(-2), dim = in.size(-1);
    const bool whole = Kernels::kCopiesRows && a.count() > 0 && from.stride(-1) == 1 && from.stride(-2) == dim;
    if (!whole) out.copy_(in);
    edit(a, from, to, values, matrix, whole ? heads * dim * int64_t(in.element_size()) : 0);
    return out;
  }

  static at::Tensor all_values(const EditArguments& a) {
    return a.values ? few(a.values->expand(a.shape_of_values())) : at::Tensor();
  }
  static at::Tensor all_matrices(const EditArguments& a, bool transposed) {
    return a.matrix ? a.packed(transposed) : at::Tensor();
  }

  static at::Tensor fwd(const at::Tensor& x, at::IntArrayRef heads, const std::optional<at::Tensor>& values,
                        const std::optional<at::Tensor>& matrix, double strength) {
    const EditArguments a{"head_edit", x, heads, values, matrix, strength};
    a.check();
    return edited(a, x, all_values(a), all_matrices(a, true));
  }

  static void inplace(const at::Tensor& x, at::IntArrayRef heads, const std::optional<at::Tensor>& values,
                      const std::optional<at::Tensor>& matrix, double strength) {
    const EditArguments a{"head_edit_", x, heads, values, matrix, strength};
    a.check();
    for (const auto& [name, read] : {std::pair{"values", &values}, std::pair{"matrix", &matrix}})
      if (*read) check_apart_from(a.op, name, **read, x);
    const at::Tensor where = few(x);  // a copy, if its leading dimensions do not join
    const bool home = where.const_data_ptr() == x.const_data_ptr();
    const at::Tensor from = a.matrix && !Kernels::kOwnsRows ? where.clone() : where;
    edit(a, from, where, all_values(a), all_matrices(a, true));
    if (!home) x.copy_(where.view(x.sizes()));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(const at::Tensor& grad, const at::Tensor& x,
                                                            at::IntArrayRef heads,
                                                            const std::optional<at::Tensor>& values,
                                                            const std::optional<at::Tensor>& matrix, double strength,
                                                            std::array<bool, 3> mask) {
    const EditArguments a{"head_edit", x, heads, values, matrix, strength};
    a.check();
    check_float(a.op, "grad", grad, x.device());
    check_shape(a.op, "grad", grad, x.sizes());
    at::Tensor of_x = no_gradient(x), of_values = no_gradient(values.value_or(grad));
    at::Tensor of_matrix = no_gradient(matrix.value_or(grad));
    if (mask[0]) of_x = edited(a, grad, at::Tensor(), all_matrices(a, false)).to(x.scalar_type());
    if (mask[1]) {
      std::vector<at::Tensor> chosen;  // and no index on the device, which would wait for the host
      for (const int64_t h : heads) chosen.push_back(grad.narrow(-2, h, 1));
      if (chosen.empty()) chosen.push_back(grad.narrow(-2, 0, 0));
      at::Tensor own = at::cat(chosen, -2).to(a.compute_type());
      std::vector<int64_t> shared;
      for (int64_t d = 0; d < x.dim() - 2; ++d)
        if (values->size(d) == 1 && x.size(d) != 1) shared.push_back(d);
      if (!shared.empty()) own = own.sum(shared, true);
      of_values = own.mul(strength).to(values->scalar_type()).contiguous();
    }
    if (mask[2]) of_matrix = matrix_gradient(a, few(grad), few(x)).to(matrix->scalar_type());
    return {of_x, of_values, of_matrix};
  }

  static at::Tensor matrix_gradient(const EditArguments& a, const at::Tensor& grad, const at::Tensor& x) {
    const int64_t rows = a.rows(), D = a.dim(), ld = a.padded();
    if (rows == 0 || D == 0 || a.count() == 0) return at::zeros({a.count(), D, D}, a.compute());
    HeadMatrixParams p{};
    p.grad = head_rows(grad), p.x = head_rows(x);
    p.row_count = rows, p.dim = D, p.padded = ld;
    const int64_t element = a.wide() ? 8 : 4;
    p.splits = row_splits(rows, 2 * a.count() * D * element, a.count(), a.count() * D * ld * element);
    p.split_rows = (rows + p.splits - 1) / p.splits;
    p.splits = (rows + p.split_rows - 1) / p.split_rows;
    const at::Tensor part = at::empty({p.splits, a.count(), D, ld}, a.compute());
    p.part = part.mutable_data_ptr();
    p.part_heads = a.count();
    p.strength = a.strength;
    p.wide = a.wide();
    by_heads(a, p, [&](int64_t first) {
      p.part_first = first;
      Kernels::matrix(p, part);
    });
    return (p.splits == 1 ? part.select(0, 0) : part.sum(0)).narrow(2, 0, D).contiguous();
  }

  static void check_apart_from(const char* op, const char* name, const at::Tensor& read, const at::Tensor& x) {
    const bool apart = read.numel() == 0 || x.numel() == 0 || !read.storage().is_alias_of(x.storage());
    PYML_CHECK(apart, op, name, "memory apart from x, which is written to", "a view of the same memory");
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("head_edit_fwd", &fwd);
    m.impl("head_edit_bwd", &bwd);
    m.impl("head_edit__fwd", &inplace);
  }
};

}  // namespace pyml
