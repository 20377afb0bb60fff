// What the backward of every op does beside its kernel: gradients that nobody wants or that are zero, their dtype, and
// how the rows of a batch are split for sums over them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

namespace pyml {

inline at::Tensor no_gradient(const at::Tensor& like) { return at::empty({0}, like.options()); }

// `found` in the dtype of its input, or an empty tensor.
inline at::Tensor gradient_or_empty(bool wanted, const at::Tensor& found, const at::Tensor& like) {
  return wanted ? found.to(like.scalar_type()) : no_gradient(like);
}

inline at::Tensor zeros_or_empty(bool wanted, const at::Tensor& like) {
  return wanted ? at::zeros(like.sizes(), like.options()) : no_gradient(like);
}

// The gradients of an empty call: one tensor for each of `like`.
template <size_t N, class... Tensors, size_t... I>
auto zero_gradients(const std::array<bool, N>& mask, std::index_sequence<I...>, const Tensors&... like) {
  return std::tuple{zeros_or_empty(mask[I], like)...};
}
template <size_t N, class... Tensors>
auto zero_gradients(const std::array<bool, N>& mask, const Tensors&... like) {
  static_assert(N == sizeof...(Tensors));
  return zero_gradients(mask, std::make_index_sequence<N>(), like...);
}

// How many parts the rows are split into, where `blocks` parts of the columns are tasks already: enough tasks for many
// cores, at least 512 rows each, partial sums (`bytes` each) of at most 32 MiB in all and of no more than the rows have
// (`row_bytes` each). By shape alone, so that the sums are the same for every number of threads.
inline int64_t row_splits(int64_t rows, int64_t row_bytes, int64_t blocks, int64_t bytes) {
  const int64_t by_tasks = (64 + blocks - 1) / blocks, by_rows = (rows + 511) / 512;
  const int64_t by_memory = std::min<int64_t>(32 << 20, rows * row_bytes) / bytes;
  return std::max<int64_t>(1, std::min({by_tasks, by_rows, by_memory}));
}

// f(T()) with the type that an op computes in.
template <class F>
auto in_compute_type(bool wide, const F& f) {
  return wide ? f(double()) : f(float());
}

}  // namespace pyml
