"""What the Triton kernels of optimal transport share: weights, entries of the cost, scalings, plans."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634074)
LN2 = tl.constexpr(0.69314718055994530942)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # a weight below it counts as zero
LOW = tl.constexpr(-8e37)  # the exponent of what is masked


@triton.jit
def highest(ACC: tl.constexpr):
    """The largest finite number."""
    return 3.4028234663852886e38 if tl.float32 == ACC else 1.7976931348623157e308


@triton.jit
def finite(x, ACC: tl.constexpr):
    return tl.abs(x) <= highest(ACC)


@triton.jit
def not_finite(x, ACC: tl.constexpr):
    """How many numbers are not finite."""
    return tl.sum(finite(x, ACC).to(tl.int32) ^ 1)


@triton.jit
def weights(given, q, i, size, HAS: tl.constexpr, ACC: tl.constexpr):
    """Weights i of problem q, zero beyond `size`; how many of them are none."""
    if HAS:
        w = tl.load(given + q * size + i, mask=i < size, other=0.0).to(ACC)
        counts = (tl.abs(w) >= SMALLEST) | (w != w)
        wrong = counts & ((w <= 0) | (w != w) | (w > highest(ACC)))
        w = tl.where(counts, w, 0.0)
    else:
        share = 1.0 / (size + tl.zeros((1,), ACC))
        w = tl.where(i < size, share, 0.0)
        wrong = w < 0
    return w, tl.sum(wrong.to(tl.int32))


@triton.jit
def mass(w, HAS: tl.constexpr):
    """What weights add up to, in float64."""
    total = tl.sum(w.to(tl.float64))
    return total if HAS else tl.full((), 1.0, tl.float64)


@triton.jit
def nothing_left(wa, wb):
    """Whether the weights of a side are all zero."""
    return (tl.sum((wa > 0).to(tl.int32)) == 0) | (tl.sum((wb > 0).to(tl.int32)) == 0)


@triton.jit
def pairs(wa, wb):
    """Which entries count."""
    return (wa > 0)[:, None] & (wb > 0)[None, :]


@triton.jit
def within(i, n, j, m):
    """Which entries [i, j] exist."""
    return (i < n)[:, None] & (j < m)[None, :]


@triton.jit
def block_of(n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Problem, rows and columns of this program, where each has a block of a matrix [batch, n, m]."""
    rows, columns = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    q = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    i = tl.program_id(0) // columns % rows * BLOCK_N + tl.arange(0, BLOCK_N)
    return q, i, tl.program_id(0) % columns * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def start_of(base, q, inner, outer_stride, inner_stride):
    """Pointer to the first entry of problem q."""
    return base + (q // inner) * outer_stride + (q % inner) * inner_stride


@triton.jit
def entries(at, i, j, keep, stride_i, stride_j, ACC: tl.constexpr):
    """[i, j] of a matrix of any strides, 0 where not kept: that is not read."""
    place = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(at + place, mask=keep, other=0.0).to(ACC)


@triton.jit
def store_entries(to, q, i, j, n, m, value):
    """Into a dense [batch, n, m]."""
    place = (q * n + i.to(tl.int64)[:, None]) * m + j.to(tl.int64)[None, :]
    if to.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(to + place, value.to(to.dtype.element_ty), mask=within(i, n, j, m))


@triton.jit
def exp2_bounded(x, ACC: tl.constexpr):
    return tl.exp2(tl.minimum(x, 120.0 if tl.float32 == ACC else 1000.0))


@triton.jit
def exp2_flushed(x, ACC: tl.constexpr):
    """Nothing is kept of what is beyond the precision of a sum with scalings that are trusted."""
    return tl.where(x < (-96.0 if tl.float32 == ACC else -800.0), 0.0, exp2_bounded(x, ACC))


@triton.jit
def plan_of(cost, f, g, a, b, inv2, ACC: tl.constexpr):
    """P = a b exp((f + g - C) / eps), 0 where a weight is."""
    x = ((f[:, None] - cost) + g[None, :]) * inv2
    return tl.where(pairs(a, b), (a[:, None] * b[None, :]) * exp2_flushed(x, ACC), 0.0)


@triton.jit
def exponents(cost, potential, w):
    """Of the sums over the last axis, and the largest; LOW where masked."""
    d = tl.where((w > 0)[None, :], potential[None, :] - cost, LOW)
    return d, tl.max(d, 1)
