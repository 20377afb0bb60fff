// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words of every counter
// of four words, under a key of two. One function for GPUs and for whatever a CPU does one at a time; static,
// so that no instruction set's copy of it serves another.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace pyml {

constexpr uint32_t kPhiloxMultiply0 = 0xD2511F53u, kPhiloxMultiply1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t w[4];
};

static PYML_HD Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  PYML_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMultiply0) * c0, p1 = uint64_t(kPhiloxMultiply1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Element e of a tensor belongs to block e / 64 of 16 counters.
constexpr int kPhiloxBlock = 64;

// The words of the elements 64 block + lane, + 16, + 32, + 48.
static PYML_HD Words block_words(uint64_t key, int64_t block, int lane, uint32_t id, uint32_t step) {
  const uint64_t count = uint64_t(block) * 16 + uint64_t(lane);
  return philox(key, uint32_t(count), uint32_t(count >> 32), id, step);
}

}  // namespace pyml
