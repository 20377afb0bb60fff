// Edits of heads over blocks of rows: rows of a head are loaded, multiplied by its matrix in registers, stored.
#pragma once
#include "common/gemm_cpu.h"
#include "common/rows_cpu.h"
#include "head_update/head_update.h"

namespace pyml {
namespace CPU_CAPABILITY {

inline Rows of_head(const HeadRows& t, int64_t head) {
  Rows rows = t.rows;
  by_dtype(rows.dtype, [&](auto tag) { rows.data = static_cast<decltype(tag)*>(rows.data) + head * t.head; });
  return rows;
}

// The first row of a block, and how many it has.
struct Block {
  int64_t first, rows;
  Block(const HeadEditParams& p, int64_t block) : first(block * kEditRows) {
    rows = p.row_count - first < kEditRows ? p.row_count - first : kEditRows;
  }
};

inline void copy_rows(const HeadEditParams& p, const Block& block) {
  by_dtype(p.in.rows.dtype, [&](auto tag) {
    using S = decltype(tag);
    for (int64_t r = block.first; r < block.first + block.rows; ++r)
      std::memcpy(static_cast<S*>(p.out.rows.data) + p.out.rows.row(r),
                  static_cast<const S*>(p.in.rows.data) + p.in.rows.row(r), size_t(p.row_bytes));
  });
}

// Head i of a block, which has all of its rows: so it may be written where it was read.
template <class T>
inline void edit_block(const HeadEditParams& p, int i, const Block& block, T* scratch) {
  const int64_t r0 = block.first, n = block.rows, D = p.dim, ld = p.padded;
  T *x = scratch, *sum = scratch + kEditRows * ld;
  const T keep = T(p.keep), strength = T(p.strength);
  if (p.matrix || keep != 0) load_rows<T>(of_head(p.in, p.heads[i]), r0, n, 0, D, x, ld);
  if (p.values.rows.data)
    load_rows<T>(of_head(p.values, i), r0, n, 0, D, sum, ld);
  else
    std::memset(sum, 0, size_t(n * ld) * sizeof(T));
  if (p.matrix) gemm_add<T>(n, ld, D, x, ld, 1, static_cast<const T*>(p.matrix) + i * D * ld, ld, sum, ld);
  if (keep != 0)
    for (int64_t j = 0; j < n * ld; ++j) sum[j] = strength * sum[j] + keep * x[j];
  else
    for (int64_t j = 0; j < n * ld; ++j) sum[j] *= strength;
  store_rows<T>(sum, ld, of_head(p.out, p.heads[i]), r0, n, 0, D);
}

// Split item % splits of head item / splits.
template <class T>
inline void matrix_split(const HeadMatrixParams& p, int64_t item, T* scratch) {
  const int64_t i = item / p.splits, split = item % p.splits, D = p.dim, ld = p.padded;
  const int64_t begin = split * p.split_rows, limit = begin + p.split_rows;
  const int64_t end = limit < p.row_count ? limit : p.row_count;
  T *g = scratch, *x = scratch + kEditRows * ld;
  T* part = static_cast<T*>(p.part) + ((split * p.part_heads + p.part_first + i) * D) * ld;
  std::memset(part, 0, size_t(D * ld) * sizeof(T));
  for (int64_t r = begin; r < end; r += kEditRows) {
    const int64_t n = end - r < kEditRows ? end - r : kEditRows;
    load_rows<T>(of_head(p.grad, p.heads[i]), r, n, 0, D, g, ld);
    load_rows<T>(of_head(p.x, p.heads[i]), r, n, 0, D, x, ld);
    gemm_add<T>(D, ld, n, g, 1, ld, x, ld, part, ld);
  }
  const T strength = T(p.strength);
  for (int64_t j = 0; j < D * ld; ++j) part[j] *= strength;
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
