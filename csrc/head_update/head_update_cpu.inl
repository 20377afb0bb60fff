// CPU kernels of head_update over ranges: raw pointers, no Tensor, no threads. Included once for each instruction set.
#include "head_update/adam_cpu.h"
#include "head_update/edit_cpu.h"

namespace pyml {
namespace CPU_CAPABILITY {

void adamw_slices_kernel(const AdamParams& p, int64_t begin, int64_t end) {
  for (const AdamSlice* t = tensor_of(p.slices, p.slice_count, begin); begin < end; ++t) {
    const int64_t limit = t->begin + t->blocks(), next = limit < end ? limit : end;
    if (next <= begin) continue;
    const int64_t from = (begin - t->begin) * kAdamBlock, whole = (next - t->begin) * kAdamBlock;
    const int64_t to = whole < t->count ? whole : t->count;
    t->wide ? adam_slice<double>(p, *t, from, to) : adam_slice<float>(p, *t, from, to);
    begin = next;
  }
}

// Where rows are copied an item is a block of rows with all of its heads, which finds its rows in the cache; elsewhere
// it is such a block of one head.
void head_edit_kernel(const HeadEditParams& p, int64_t begin, int64_t end, double* scratch) {
  const auto edit = [&](int i, const Block& block) {
    p.wide ? edit_block<double>(p, i, block, scratch)
           : edit_block<float>(p, i, block, reinterpret_cast<float*>(scratch));
  };
  const int64_t blocks = edit_blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    const Block block(p, item % blocks);
    if (p.row_bytes == 0) {
      edit(int(item / blocks), block);
      continue;
    }
    copy_rows(p, block);
    for (int i = 0; i < p.count; ++i) edit(i, block);
  }
}

void head_edit_matrix_kernel(const HeadMatrixParams& p, int64_t begin, int64_t end, double* scratch) {
  for (int64_t item = begin; item < end; ++item)
    p.wide ? matrix_split<double>(p, item, scratch) : matrix_split<float>(p, item, reinterpret_cast<float*>(scratch));
}

}  // namespace CPU_CAPABILITY
}  // namespace pyml
