// AdamW on slices of weights, and edits of attention heads: plain structs and the kernel signatures that every
// instruction set provides. No torch here.
#pragma once
#include <cstdint>

#include "common/strided.h"

namespace pyml {

// Elements that AdamW takes at a time: what is held of them stays in the first-level cache.
constexpr int64_t kAdamBlock = 512;
// The words that round are those of the key xor this: a noise of the same key has others.
constexpr uint64_t kRoundingKey = 0x2545F4914F6CDD1Dull;

struct AdamSlice : Elements {
  Strided param, grad, m, v, master;  // master.data is null where there is none
  int64_t begin;                      // blocks of the slices before it
  uint32_t id;
  bool wide;  // computes in double
  int64_t blocks() const { return (count + kAdamBlock - 1) / kAdamBlock; }
};

// The numbers of a step as the formula takes them, see pyml/reference/head_update.py.
struct AdamStep {
  double decay;            // 1 - lr weight_decay
  double to_grad;          // 1 - beta1
  double kept, to_square;  // beta2, 1 - beta2
  double root;             // 1 / sqrt(1 - beta2^step)
  double eps, rate;        // rate: -lr / (1 - beta1^step)
};

struct AdamParams {
  AdamStep step;
  bool stochastic;  // 16-bit parameters are rounded by the words of key, number of the step, id and element
  uint64_t key;
  uint32_t number;
  const AdamSlice* slices;
  int64_t slice_count;
};

// Heads of one call; longer lists take several.
constexpr int kEditHeads = 256;
// Rows of a head that a CPU takes at a time.
constexpr int64_t kEditRows = 32;

// Row r of head h of a tensor [..., H, D]: row r of `rows`, h * head elements on.
struct HeadRows {
  Rows rows;
  int64_t head = 0;
};

// out[r, heads[i]] = keep in[r, heads[i]] + strength (in[r, heads[i]] matrix[i] + values[r, i]), all of D elements.
struct HeadEditParams {
  HeadRows in, out, values;  // values.rows.data is null where there are none
  int count;                 // of heads
  int32_t heads[kEditHeads];
  int64_t row_count, dim, padded;  // padded: D up to whole vectors
  int64_t row_bytes;               // of all heads of a row, copied from in to out before the edit; 0: out has them
  const void* matrix;              // [count, D, padded] in the compute type, or null
  double keep, strength;
  bool wide;  // computes in double
};

// part[s, i, o, d] = strength * sum over the rows of split s of grad[r, heads[i], o] x[r, heads[i], d].
struct HeadMatrixParams {
  HeadRows grad, x;
  int count;
  int32_t heads[kEditHeads];
  int64_t row_count, dim, padded;
  int64_t splits, split_rows;
  void* part;          // [splits, all heads, D, padded] in the compute type
  int64_t part_heads;  // all heads
  int64_t part_first;  // where those of this call begin
  double strength;
  bool wide;
};

#define PYML_DECLARE_HEAD_UPDATE(ISA)                                                                   \
  namespace ISA {                                                                                       \
  void adamw_slices_kernel(const AdamParams& p, int64_t begin, int64_t end);                            \
  void head_edit_kernel(const HeadEditParams& p, int64_t begin, int64_t end, double* scratch);          \
  void head_edit_matrix_kernel(const HeadMatrixParams& p, int64_t begin, int64_t end, double* scratch); \
  }
PYML_DECLARE_HEAD_UPDATE(DEFAULT)
PYML_DECLARE_HEAD_UPDATE(AVX2)
PYML_DECLARE_HEAD_UPDATE(AVX512)

static inline int64_t edit_blocks(const HeadEditParams& p) { return (p.row_count + kEditRows - 1) / kEditRows; }
// Doubles that the kernels of edits want: two blocks of rows.
inline int64_t edit_scratch(int64_t padded) { return 2 * kEditRows * padded; }

}  // namespace pyml
