"""Triton kernels of `clip_sum`: squares of a block of a sample, and sums over the samples in order. Bound by memory."""

import triton
import triton.language as tl


@triton.jit
def scale_of(scale, columns, i, inside, count, KIND: tl.constexpr, ACC: tl.constexpr):
    if KIND == 0:
        s = tl.load(scale).to(ACC) + tl.zeros_like(i).to(ACC)
    elif KIND == 1:
        s = tl.load(scale + i, mask=inside, other=1.0).to(ACC)
    else:
        s = tl.load(scale + i // count, mask=inside, other=1.0).to(ACC)
        s = s * tl.load(columns + i % count, mask=inside, other=1.0).to(ACC)
    return s


@triton.jit
def clip_norm_kernel(
    g, part, scale, columns, size, stride, column_count, blocks, KIND: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, sample); KIND below 0: no scale."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    v = tl.load(g + b * stride + i, mask=inside, other=0.0).to(tl.float64)
    if KIND >= 0:
        s = scale_of(scale, columns, i, inside, column_count, KIND, ACC).to(tl.float64)
        v = tl.where(s == 0, 0.0, v / tl.where(s == 0, 1.0, s))
    tl.store(part + b * blocks + block, tl.sum(v * v, 0))


@triton.jit
def clip_sum_kernel(
    g, total, scale, columns, factors, size, stride, column_count, samples, KIND: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: a block of elements over all samples; a factor below 0 is that of a bad sample."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    sum = tl.zeros([BLOCK], ACC)
    for b in range(samples):
        factor = tl.load(factors + b)
        v = tl.load(g + tl.cast(b, tl.int64) * stride + i, mask=inside, other=0.0).to(ACC)
        sum = tl.where(factor >= 0, tl.fma(v, tl.zeros_like(v) + factor.to(ACC), sum), sum)
    if KIND >= 0:
        sum = tl.where(scale_of(scale, columns, i, inside, column_count, KIND, ACC) == 0, 0.0, sum)
    tl.store(total + i, sum.to(total.dtype.element_ty), mask=inside)
