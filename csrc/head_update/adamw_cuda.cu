// AdamW on slices on NVIDIA GPUs: a thread for each Philox counter of the rounding, that is for four elements 16 apart,
// so that each of its loads lies beside those of its neighbours. The bits are those of the CPU, see adam.h. Bound by
// memory.
#include "common/cuda.h"
#include "common/flat_cuda.h"
#include "head_update/adam.h"
#include "head_update/head_update_cuda.h"

namespace pyml {
namespace {

constexpr int kThreads = 256, kCounters = 16;

struct AdamPlace {
  int64_t r, c;
  __device__ int64_t of(const AdamOperand& o) const { return r * o.row + c * o.column; }
};
template <class T>
__device__ inline T value_at(const AdamOperand& o, uint8_t type, const AdamPlace& at) {
  return load_flat<T>(Flat{o.data, DType(type)}, at.of(o));
}
template <class T>
__device__ inline void put_at(const AdamOperand& o, uint8_t type, const AdamPlace& at, T v) {
  store_flat<T>(Flat{o.data, DType(type)}, at.of(o), v);
}

template <class T>
__device__ inline void adam_element(const AdamCuda& p, const AdamNumbers<T>& numbers, const AdamCudaSlice& t,
                                    const AdamPlace& at, uint32_t word) {
  const bool kept = t.master.data != nullptr;
  T value = value_at<T>(t.param, t.param_type, at);
  if (kept) {
    const T master = value_at<T>(t.master, t.master_type, at);
    value = start_of(master, rounded_to(DType(t.param_type), master), value);
  }
  T m = value_at<T>(t.m, t.m_type, at), v = value_at<T>(t.v, t.v_type, at);
  adam(numbers, value, value_at<T>(t.grad, t.grad_type, at), m, v);
  put_at(t.m, t.m_type, at, m);
  put_at(t.v, t.v_type, at, v);
  if (kept) put_at(t.master, t.master_type, at, value);
  if (p.key != nullptr && rounds(DType(t.param_type))) value = T(stochastic(float(value), word, DType(t.param_type)));
  put_at(t.param, t.param_type, at, value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) adamw_slices_kernel(AdamCuda p) {
  const AdamNumbers<T> numbers = AdamNumbers<T>::of(p.step);
  const uint64_t key = p.key == nullptr ? 0 : uint64_t(*p.key) ^ kRoundingKey;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < p.blocks * kCounters; at += step) {
    const int64_t block = at / kCounters;
    const int lane = int(at % kCounters);
    const AdamCudaSlice& t = tensor_at(p.slices, p.count, block);
    const int64_t number = block - t.begin;
    Words words = {};
    if (p.key != nullptr && rounds(DType(t.param_type))) words = block_words(key, number, lane, t.id, p.number);
    PYML_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t i = number * kPhiloxBlock + j * kCounters + lane;
      if (i >= t.count) break;
      // 64-bit division takes ten times as long as a 32-bit one.
      AdamPlace place;
      if (t.count <= INT32_MAX) {
        const uint32_t row = uint32_t(i) / uint32_t(t.columns);
        place = {int64_t(row), int64_t(uint32_t(i) - row * uint32_t(t.columns))};
      } else {
        place = {i / t.columns, i % t.columns};
      }
      adam_element<T>(p, numbers, t, place, words.w[j]);
    }
  }
}

}  // namespace
}  // namespace pyml

extern "C" cudaError_t pyml_cuda_adamw_slices(const pyml::AdamCuda* p, int64_t wide, cudaStream_t stream) {
  using namespace pyml;
  const int64_t wanted = ceil_div(p->blocks * kCounters, kThreads), blocks = wanted < (1 << 20) ? wanted : 1 << 20;
  return launch(wide ? adamw_slices_kernel<double> : adamw_slices_kernel<float>, blocks, 1, kThreads, 0, stream, *p);
}
