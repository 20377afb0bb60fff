// Just enough CUDA to run the repo's .cu files on a CPU, so that kernels are known to be right before a GPU sees them:
//   g++ -x c++ -DPYML_CUDA_EMULATION -include tests/cpp/cuda_emulation.h -shared -fPIC csrc/<family>/<family>_cuda.cu
// Every thread of a block is a fiber of one OS thread; __syncthreads() hands over to the next. The order in which
// threads run between two barriers can be turned round or shuffled: results that change with it show a missing barrier.
// Shared memory starts as NaN. A shuffle hands over to the next thread of the warp, until the warp is at the block's
// next barrier. Not emulated: atomics, memory ordering, limits of registers.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __syncthreads() emulation::barrier()
#define PYML_SHARED(T, name) T* name = reinterpret_cast<T*>(emulation::shared_memory())

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- 16-bit types: stored as bits, converted by rounding to nearest even, no arithmetic ---

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (std::isnan(v)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }

namespace emulation {

constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedLimit = 99 << 10;  // what every GPU since compute capability 8.0 gives one block
constexpr size_t kGuard = 64;              // bytes behind the shared memory that no thread may touch

enum class Order { kForward, kBackward, kShuffled };

struct Block {
  ucontext_t scheduler{};
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> waiting, done;
  std::vector<uint64_t>
      words[4];  // what each thread shows the others; two of a kind, so that no one overtakes a reader
  std::vector<char> turn;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
  unsigned current = 0;
  Order order = Order::kForward;
  int64_t barriers = 0;
};
inline Block block;

// PYML_EMULATION_PROGRAMS=1 makes one part of all rows, so that small inputs too go through the loops over rows.
inline int64_t programs(int64_t wanted) {
  const char* few = std::getenv("PYML_EMULATION_PROGRAMS");
  return few ? std::atoll(few) : wanted;
}

// Then kernels also hold nothing in shared memory that they could make again.
inline size_t held_bytes(size_t wanted) { return std::getenv("PYML_EMULATION_PROGRAMS") ? 0 : wanted; }

inline void* shared_memory() { return block.shared.data(); }

enum Wait : char { kRuns, kForBlock, kForWarp };

inline void barrier(Wait wait = kForBlock) {
  block.waiting[block.current] = wait;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

// Shows one's value to all threads of the warp or block; `read` gets that of a thread.
template <class T, class Read>
T exchange(T value, Wait wait, const Read& read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned self = block.current;
  block.turn[self] ^= wait;
  std::vector<uint64_t>& words = block.words[2 * (wait - 1) + ((block.turn[self] & wait) != 0)];
  std::memcpy(&words[self], &value, sizeof(T));
  barrier(wait);
  return read([&](unsigned thread) {
    T found;
    std::memcpy(&found, &words[thread], sizeof(T));
    return found;
  });
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s (block %u, %u)\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}

inline void enter() {
  (*block.body)();
  block.done[block.current] = 1;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

// Runs every thread of the current block from barrier to barrier.
inline void run_block(unsigned threads, std::mt19937& random) {
  std::fill(block.shared.begin(), block.shared.end(), 0xff);
  std::vector<unsigned> turns(threads);
  for (unsigned t = 0; t < threads; ++t) {
    turns[t] = block.order == Order::kBackward ? threads - 1 - t : t;
    block.waiting[t] = block.done[t] = block.turn[t] = 0;
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack = {block.stacks[t].get(), 0, kStack};
    block.fibers[t].uc_link = nullptr;
    makecontext(&block.fibers[t], enter, 0);
  }
  for (size_t finished = 0; finished < threads;) {
    if (block.order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    const auto resume = [&](unsigned t) {
      block.current = t;
      threadIdx.x = t;
      block.waiting[t] = kRuns;
      swapcontext(&block.scheduler, &block.fibers[t]);
      finished += block.done[t];
    };
    for (const unsigned t : turns)
      if (!block.done[t]) resume(t);
    for (const unsigned t : turns)
      while (block.waiting[t] == kForWarp)
        for (const unsigned other : turns) {
          if (other / 32 != t / 32) continue;
          if (block.waiting[other] != kForWarp) fail("some threads of a warp shuffle while others do not");
          resume(other);
        }
    const size_t stopped = threads - finished;
    if (stopped && finished) fail("some threads ended while others wait at __syncthreads()");
    if (stopped) ++block.barriers;
  }
  for (size_t i = block.shared.size() - kGuard; i < block.shared.size(); ++i)
    if (block.shared[i] != 0xff) fail("a thread wrote behind the shared memory");
}

inline cudaError_t launch(const std::function<void()>& body, int64_t blocks, int64_t splits, int threads,
                          size_t shared) {
  if (shared > kSharedLimit || threads > 1024 || splits > 65535) return cudaErrorInvalidConfiguration;
  block.body = &body;
  block.shared.resize(shared + kGuard);
  block.fibers.resize(threads);
  block.waiting.resize(threads);
  block.done.resize(threads);
  block.turn.resize(threads);
  for (auto& words : block.words) words.resize(threads);
  while (block.stacks.size() < size_t(threads)) block.stacks.push_back(std::make_unique<char[]>(kStack));
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  gridDim.y = unsigned(splits);
  std::mt19937 random(0);
  const char* order = std::getenv("PYML_EMULATION_ORDER");  // forward, backward, shuffled
  block.order = !order || order[0] == 'f' ? Order::kForward : order[0] == 'b' ? Order::kBackward : Order::kShuffled;
  for (int64_t y = 0; y < splits; ++y)
    for (int64_t x = 0; x < blocks; ++x) {
      blockIdx.x = unsigned(x);
      blockIdx.y = unsigned(y);
      run_block(unsigned(threads), random);
    }
  return cudaSuccess;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  const unsigned other = emulation::block.current ^ unsigned(lanes);
  return emulation::exchange(value, emulation::kForWarp, [&](const auto& of) { return of(other); });
}
inline int __syncthreads_or(int predicate) {
  return emulation::exchange(predicate, emulation::kForBlock, [](const auto& of) {
    int any = 0;
    for (unsigned t = 0; t < blockDim.x; ++t) any |= of(t);
    return any;
  });
}
