// Torch side of the CPU kernels: Rows over a tensor, scratch memory, tasks on torch's threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>

#include "common/rows.h"

namespace pyml {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      return DType::kFloat;
  }
}

// The rows of a matrix [rows, columns] with any strides.
inline Rows matrix_rows(const at::Tensor& t) {
  Rows rows;
  rows.data = const_cast<void*>(t.const_data_ptr());
  rows.dtype = dtype_of(t);
  rows.width = t.size(0) > 0 ? t.size(0) : 1;
  rows.stride_w = t.stride(0);
  rows.stride_c = t.stride(1);
  return rows;
}

// Scratch of at least `count` elements for the calling thread, kept for the next call. Kernels ask for cache blocks,
// whose size grows with the outputs and the knots but not with the batch; what is above kKeepScratch goes when a
// smaller call comes.
// PYML_POISON_SCRATCH=1 is for tests. It fills the memory with NaN every time: nothing unwritten may be read.
inline bool poisoned() {
  static const bool yes = std::getenv("PYML_POISON_SCRATCH") != nullptr;
  return yes;
}
constexpr int64_t kKeepScratch = 4 << 20;
template <class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  const int64_t bytes = (count * int64_t(sizeof(T)) + 4095) / 4096 * 4096;
  if (bytes > size || (size > kKeepScratch && bytes <= kKeepScratch)) {
    size = 0;  // first: the allocation may fail, and the next call must not believe the old size
    memory.reset();
    memory.reset(std::aligned_alloc(64, size_t(bytes)));
    TORCH_CHECK(memory != nullptr, "pyml: no memory for ", bytes, " bytes of scratch");
    size = bytes;
  }
  if (poisoned()) std::fill_n(static_cast<T*>(memory.get()), count, std::numeric_limits<T>::quiet_NaN());
  return static_cast<T*>(memory.get());
}

// Runs f(begin, end) over [0, n) on torch's threads; `work` is about the vector operations of one item, so that small
// calls stay on one thread: waking another one takes 5 us or more, 65536 operations about as long. PYML_POISON_SCRATCH
// splits every call, so that tests on small sizes see the borders between tasks.
template <class F>
void parallel(int64_t n, int64_t work, const F& f) {
  constexpr int64_t kWorthAThread = 65536;
  const int64_t grain = work >= kWorthAThread || poisoned() ? 1 : (kWorthAThread + work - 1) / (work > 0 ? work : 1);
  at::parallel_for(0, n, grain, f);
}

template <class T>
at::Tensor buffer(int64_t count, const at::Tensor& like) {
  return at::empty({count}, like.options().dtype(c10::CppTypeToScalarType<T>::value));
}

}  // namespace pyml
