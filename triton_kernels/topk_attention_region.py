"""Triton kernel of `region_attention`, forward: keys and values of the chosen regions are read where they lie.

A program owns a block of queries of one region and head and walks over the tiles of all regions that it chose, with a
running maximum and sum. The backward is in topk_attention_region_bwd.py.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch
from pyml.triton_kernels.topk_attention_host import region
from torch import Tensor

from pyml.reference.topk_attention import check_regions

LOG2E = tl.constexpr(1.4426950408889634074)


@triton.jit
def rounded_product(a, b):
    """a * b for a block and a number. A fused product with 0, which no compiler can contract with what follows: so a
    logit is the same rounded number in every kernel."""
    zero = tl.zeros_like(a)
    return tl.fma(a, zero + b, zero)


@triton.jit
def exponent(logits, shift):
    """What a power of 2 gets of logits less `shift`: exactly 0 where they are equal, and log2 e rounds the difference
    alone."""
    return (logits - shift) * LOG2E


@triton.jit
def slopes(prob, dp, mean):
    """Gradients of logits, prob * (dp - mean). A key that takes all has none: dp and mean are then one sum in two
    orders, and their difference is rounding alone."""
    return tl.where(prob == 1.0, 0.0, prob * (dp - mean))


@triton.jit
def load_rows(
    base, rows, keep, depth, row_stride, stride, ACC: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK], 0 beyond `depth` and where a row is not kept."""
    c = tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * stride
    return tl.load(base + at, mask=keep[:, None] & (c[None, :] < depth), other=0.0).to(ACC).to(DOT)


@triton.jit
def split_weight(weight, ACC: tl.constexpr, DOT: tl.constexpr):
    """The weight of a region in two factors: one of its keys and values, which rounds them as gathered rows are, and
    one of the products with them. The gradient of the weight is divided by the first.

    That is 1 where its square would be near 0 or too large, and for rows that tensor cores take in 16 bits.
    """
    size = tl.abs(weight)
    by_row = (size >= 1e-18) & (size <= 1e18)
    if DOT != ACC:
        by_row = size < 0
    return tl.where(by_row, weight, 1.0), tl.where(by_row, 1.0, weight)


@triton.jit
def weigh(rows, inside, ACC: tl.constexpr, DOT: tl.constexpr):
    """Keys or values times the first factor of `split_weight`."""
    if DOT == ACC:
        rows = rows * inside
    return rows


@triton.jit
def head_row(b, h, p, regions, heads):
    """Row of a tensor [B, 1 or heads, regions, ...], int64."""
    return (b * heads + tl.where(heads > 1, h, 0)) * regions + p


@triton.jit
def used_slots(counts, b, h, p, P, slots, count_heads, HAS_COUNTS: tl.constexpr):
    """How many slots of a row of the index count; the promise is 0 to `slots`, and it is kept whatever comes."""
    used = slots
    if HAS_COUNTS:
        asked = tl.load(counts + head_row(b, h, p, P, count_heads))
        used = tl.minimum(tl.maximum(asked, 0), slots).to(tl.int32)
    return used


@triton.jit
def valid_keys(key_mask, t, b, g, there, Pk, Sk, HAS_MASK: tl.constexpr):
    """Which of the keys t of region g exist and may be seen; none unless `there`."""
    keep = t < tl.where(there, Sk, 0)
    if HAS_MASK:
        keep = keep & (tl.load(key_mask + (b * Pk + g) * Sk + t, mask=keep, other=0) != 0)
    return keep


@triton.jit
def region_attention_fwd_kernel(
    q, k, v, index, counts, key_mask, weight, scale, out, exact, lse, status,
    q_b, q_h, q_p, q_s, q_d, k_b, k_h, k_p, k_s, k_d, v_b, v_h, v_p, v_s, v_d,
    heads, P, S, D, Pk, Sk, Dv, slots, index_heads, count_heads, weight_heads,
    HAS_COUNTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_EXACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [B, H, P, S, Dv], lse [B, H, P, S] (+inf where no key is valid), exact: out before rounding.

    lse is float64: P = exp(logit - lse), so in float32 it would cost as many bits as the logits are large.
    """
    blocks = tl.cdiv(S, BLOCK_M)
    region_id = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    p, h, b = region_id % P, region_id // P % heads, region_id // P // heads
    queries = load_rows(q + b * q_b + h * q_h + p * q_p, s, s < S, D, q_s, q_d, ACC, DOT, BLOCK_D)
    factor = tl.load(scale)
    row = head_row(b, h, p, P, index_heads) * slots
    tiles = tl.cdiv(Sk, BLOCK_N)
    used = used_slots(counts, b, h, p, P, slots, count_heads, HAS_COUNTS)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    wrong = region_id * 0  # positive once an entry is out of range
    for step in range(0, used * tiles):
        j = step // tiles
        t = (step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = tl.load(index + row + j)
        there = (g >= 0) & (g < Pk)
        wrong = tl.maximum(wrong, tl.maximum(g - Pk + 1, -1 - g))
        g = tl.where(there, g, 0)
        keep = valid_keys(key_mask, t, b, g, there, Pk, Sk, HAS_MASK)
        keys = load_rows(k + b * k_b + h * k_h + g * k_p, t, keep, D, k_s, k_d, ACC, DOT, BLOCK_D)
        if HAS_WEIGHT:
            w = tl.load(weight + head_row(b, h, p, P, weight_heads) * slots + j, mask=there, other=0.0).to(ACC)
            inside, outside = split_weight(w, ACC, DOT)
            keys = weigh(keys, inside, ACC, DOT)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
        logits = rounded_product(logits, factor)
        if HAS_WEIGHT:
            logits = rounded_product(logits, outside)
        logits = tl.where(keep[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        e = tl.exp2(exponent(logits, shift[:, None]))
        old = tl.exp2(exponent(top, shift))
        total = total * old + tl.sum(e, 1)
        values = load_rows(v + b * v_b + h * v_h + g * v_p, t, keep, Dv, v_s, v_d, ACC, MIXED, BLOCK_V)
        if HAS_WEIGHT:
            e = e * outside
            values = weigh(values, inside, ACC, DOT)
        acc = tl.dot(e.to(MIXED), values, acc * old[:, None], input_precision=PRECISION, out_dtype=ACC)
        top = higher
    none = total == 0  # NaN is not 0
    result = acc / tl.where(none, 1.0, total)[:, None]
    if HAS_COUNTS:
        asked = tl.load(counts + head_row(b, h, p, P, count_heads))
        wrong = tl.maximum(wrong, tl.maximum(asked - slots, -asked))
    tl.store(status, 1, mask=wrong > 0)  # all programs that see one write the same word
    at = region_id * S + s
    log_total = tl.log(tl.where(none, 1.0, total).to(tl.float64))
    tl.store(lse + at, tl.where(none, float("inf"), top.to(tl.float64) + log_total), mask=s < S)
    c = tl.arange(0, BLOCK_V)
    keep = (s < S)[:, None] & (c < Dv)[None, :]
    tl.store(out + at[:, None] * Dv + c[None, :], result.to(out.dtype.element_ty), mask=keep)
    if HAS_EXACT:
        tl.store(exact + at[:, None] * Dv + c[None, :], result, mask=keep)


def region_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None, counts: Tensor | None,
    key_mask: Tensor | None, region_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """On a GPU an index out of range counts as -1 and sets the status word; on a CPU it is refused here."""
    if not q.is_cuda:
        check_regions("region_attention", index, counts, k.shape[2])
    facts = region(q, k, v, index, scale, counts, key_mask, region_weight, backward=False)
    out = torch.empty((*q.shape[:4], v.shape[4]), dtype=q.dtype, device=q.device)
    rounded = q.dtype != facts.wide
    exact = torch.empty(out.shape if rounded else (q.shape[0], 0), dtype=facts.wide, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float64, device=q.device)
    status = torch.zeros(1, dtype=torch.int32, device=q.device)
    if out.numel() == 0 or k.shape[2] * k.shape[3] == 0:
        return out.zero_(), lse.fill_(torch.inf), exact.zero_(), status
    B, H, P = q.shape[:3]
    launch(
        region_attention_fwd_kernel, (B * H * P * facts.query_blocks,),
        *facts.tensors, out, exact if rounded else out, lse, status, *facts.sizes,
        HAS_EXACT=rounded, **facts.constants, **facts.blocks,
    )  # fmt: skip
    return out, lse, exact, status
