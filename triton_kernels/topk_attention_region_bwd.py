"""Triton kernels of `region_attention`, backward: P is recomputed from the log-sum-exp, nothing is added atomically.

dQ and the gradient of the weights come by query region, as in the forward. dK and dV come by key region, over the list
of those who chose it; a long list is cut into chunks whose sums are added in their order.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch
from pyml.triton_kernels.topk_attention_host import Region, choosers, region
from pyml.triton_kernels.topk_attention_region import (
    exponent,
    head_row,
    load_rows,
    rounded_product,
    slopes,
    split_weight,
    used_slots,
    valid_keys,
    weigh,
)
from torch import Tensor

from pyml.reference.topk_attention import check_regions


@triton.jit
def region_delta_bwd_kernel(
    grad, out, delta, g_b, g_h, g_p, g_s, g_d, heads, P, S, Dv,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """delta [B, H, P, S] = sum over the features of grad * out."""
    blocks = tl.cdiv(S, BLOCK_M)
    region_id = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    p, h, b = region_id % P, region_id // P % heads, region_id // P // heads
    do = load_rows(grad + b * g_b + h * g_h + p * g_p, s, s < S, Dv, g_s, g_d, ACC, ACC, BLOCK_V)
    o = load_rows(out + region_id * S * Dv, s, s < S, Dv, Dv, 1, ACC, ACC, BLOCK_V)
    tl.store(delta + region_id * S + s, tl.sum(do * o, 1), mask=s < S)


@triton.jit
def split_lse(lse, at, keep, ACC: tl.constexpr):
    """lse as two numbers, so that logit - top - rest is as exact as the logit; +inf and 0 where there is no query."""
    whole = tl.load(lse + at, mask=keep, other=float("inf"))
    finite = tl.where(whole == float("inf"), 0.0, whole)
    return whole.to(ACC), (finite - finite.to(ACC).to(tl.float64)).to(ACC)


@triton.jit
def region_attention_bwd_kernel(
    q, k, v, index, counts, key_mask, weight, scale, grad, lse, delta, dq, dweight,
    q_b, q_h, q_p, q_s, q_d, k_b, k_h, k_p, k_s, k_d, v_b, v_h, v_p, v_s, v_d,
    heads, P, S, D, Pk, Sk, Dv, slots, index_heads, count_heads, weight_heads, g_b, g_h, g_p, g_s, g_d,
    HAS_COUNTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq [B, H, P, S, D]; dweight [B, H, P, query blocks, K], one part for each block of queries."""
    blocks = tl.cdiv(S, BLOCK_M)
    region_id = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    s = block * BLOCK_M + tl.arange(0, BLOCK_M)
    p, h, b = region_id % P, region_id // P % heads, region_id // P // heads
    queries = load_rows(q + b * q_b + h * q_h + p * q_p, s, s < S, D, q_s, q_d, ACC, DOT, BLOCK_D)
    do = load_rows(grad + b * g_b + h * g_h + p * g_p, s, s < S, Dv, g_s, g_d, ACC, DOT, BLOCK_V)
    top, rest = split_lse(lse, region_id * S + s, s < S, ACC)
    mean = tl.load(delta + region_id * S + s, mask=s < S, other=0.0)
    factor = tl.load(scale)
    row = head_row(b, h, p, P, index_heads) * slots
    tiles = tl.cdiv(Sk, BLOCK_N)
    used = used_slots(counts, b, h, p, P, slots, count_heads, HAS_COUNTS)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    of_weight = tl.zeros((BLOCK_M,), ACC)
    for step in range(0, used * tiles):
        j = step // tiles
        t = (step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = tl.load(index + row + j)
        there = (g >= 0) & (g < Pk)
        g = tl.where(there, g, 0)
        keep = valid_keys(key_mask, t, b, g, there, Pk, Sk, HAS_MASK)
        keys = load_rows(k + b * k_b + h * k_h + g * k_p, t, keep, D, k_s, k_d, ACC, DOT, BLOCK_D)
        values = load_rows(v + b * v_b + h * v_h + g * v_p, t, keep, Dv, v_s, v_d, ACC, DOT, BLOCK_V)
        if HAS_WEIGHT:
            w = tl.load(weight + head_row(b, h, p, P, weight_heads) * slots + j, mask=there, other=0.0).to(ACC)
            inside, outside = split_weight(w, ACC, DOT)
            keys, values = weigh(keys, inside, ACC, DOT), weigh(values, inside, ACC, DOT)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
        logits = rounded_product(logits, factor)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
        both = (s < S)[:, None] & keep[None, :]
        if HAS_WEIGHT:
            power = exponent(rounded_product(logits, outside) - top[:, None], rest[:, None])
            prob = tl.where(both, tl.exp2(power), 0.0)
            ds = slopes(prob, dp * outside, mean[:, None])
            if WANT_WEIGHT:
                part = tl.where(both, ds * logits + prob * dp, 0.0)
                of_weight = tl.where(step % tiles == 0, 0.0, of_weight) + tl.sum(part, 1)
                at = ((region_id * blocks + block) * slots) + j
                tl.store(dweight + at, tl.sum(of_weight, 0) / inside, mask=step % tiles == tiles - 1)
            ds = ds * outside
        else:
            prob = tl.exp2(exponent(logits - top[:, None], rest[:, None]))
            ds = slopes(prob, dp, mean[:, None])
        if WANT_Q:
            ds = tl.where(both, ds, 0.0)
            acc = tl.dot(ds.to(MIXED), keys.to(MIXED), acc, input_precision=PRECISION, out_dtype=ACC)
    if WANT_Q:
        c = tl.arange(0, BLOCK_D)
        at = (region_id * S + s)[:, None] * D + c[None, :]
        tl.store(dq + at, (acc * tl.load(scale)).to(dq.dtype.element_ty), mask=(s < S)[:, None] & (c < D)[None, :])


@triton.jit
def region_attention_keys_bwd_kernel(
    q, k, v, index, counts, key_mask, weight, scale, grad, lse, delta, slot_list, first_slot, first_chunk,
    row_of_chunk, part_k, part_v,
    q_b, q_h, q_p, q_s, q_d, k_b, k_h, k_p, k_s, k_d, v_b, v_h, v_p, v_s, v_d,
    heads, P, S, D, Pk, Sk, Dv, slots, index_heads, count_heads, weight_heads, g_b, g_h, g_p, g_s, g_d,
    rows, list_heads, chunk,
    HAS_COUNTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """part_k [chunks, heads / list_heads, Sk, D] and part_v [..., Dv]: the sums over the choosers in one chunk.

    Tiles are transposed, keys by queries, so that P and dS are left operands as they come.
    """
    blocks = tl.cdiv(Sk, BLOCK_N)
    shared = heads // list_heads  # heads that share a list
    chunk_id = (tl.program_id(0) // blocks // shared).to(tl.int64)
    list_row = tl.load(row_of_chunk + chunk_id)
    if list_row < rows:
        g, list_head, b = list_row % Pk, list_row // Pk % list_heads, list_row // Pk // list_heads
        member = tl.program_id(0) // blocks % shared
        h = list_head * shared + member
        t = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = valid_keys(key_mask, t, b, g, g >= 0, Pk, Sk, HAS_MASK)
        keys = load_rows(k + b * k_b + h * k_h + g * k_p, t, keep, D, k_s, k_d, ACC, DOT, BLOCK_D)
        values = load_rows(v + b * v_b + h * v_h + g * v_p, t, keep, Dv, v_s, v_d, ACC, DOT, BLOCK_V)
        factor = tl.load(scale)
        start = tl.load(first_slot + list_row) + (chunk_id - tl.load(first_chunk + list_row)) * chunk
        count = tl.minimum(chunk, tl.load(first_slot + list_row + 1) - start).to(tl.int32)
        tiles = tl.cdiv(S, BLOCK_M)
        dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv = tl.zeros((BLOCK_N, BLOCK_V), ACC)
        for step in range(0, count * tiles):
            entry = tl.load(slot_list + start + step // tiles)
            p = entry // slots % P
            s = (step % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            queries = load_rows(q + b * q_b + h * q_h + p * q_p, s, s < S, D, q_s, q_d, ACC, DOT, BLOCK_D)
            do = load_rows(grad + b * g_b + h * g_h + p * g_p, s, s < S, Dv, g_s, g_d, ACC, DOT, BLOCK_V)
            at = ((b * heads + h) * P + p) * S + s
            top, rest = split_lse(lse, at, s < S, ACC)
            own_k, own_v = keys, values
            if HAS_WEIGHT:
                w = tl.load(weight + head_row(b, h, p, P, weight_heads) * slots + entry % slots).to(ACC)
                inside, outside = split_weight(w, ACC, DOT)
                own_k, own_v = weigh(keys, inside, ACC, DOT), weigh(values, inside, ACC, DOT)
            logits = tl.dot(own_k, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
            logits = rounded_product(logits, factor)
            if HAS_WEIGHT:
                logits = rounded_product(logits, outside)
            both = keep[:, None] & (s < S)[None, :]
            prob = tl.where(both, tl.exp2(exponent(logits - top[None, :], rest[None, :])), 0.0)
            if WANT_V:
                weighted = prob
                if HAS_WEIGHT:
                    weighted = prob * w
                dv = tl.dot(weighted.to(MIXED), do.to(MIXED), dv, input_precision=PRECISION, out_dtype=ACC)
            if WANT_K:
                mean = tl.load(delta + at, mask=s < S, other=0.0)
                dp = tl.dot(own_v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
                if HAS_WEIGHT:
                    dp = dp * outside
                ds = tl.where(both, slopes(prob, dp, mean[None, :]), 0.0)
                if HAS_WEIGHT:
                    ds = ds * w
                dk = tl.dot(ds.to(MIXED), queries.to(MIXED), dk, input_precision=PRECISION, out_dtype=ACC)
        at = (chunk_id * shared + member) * Sk + t
        if WANT_K:
            c = tl.arange(0, BLOCK_D)
            tl.store(part_k + at[:, None] * D + c[None, :], dk * factor, mask=(t < Sk)[:, None] & (c < D)[None, :])
        if WANT_V:
            c = tl.arange(0, BLOCK_V)
            tl.store(part_v + at[:, None] * Dv + c[None, :], dv, mask=(t < Sk)[:, None] & (c < Dv)[None, :])


@triton.jit
def region_chunks_bwd_kernel(
    part, result, key_mask, first_chunk, heads, list_heads, Pk, Sk, width,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """result [B, H, Pk, Sk, width]: the chunks of each key region in order; 0 where nobody chose it or it is masked."""
    size = Sk * width
    blocks = tl.cdiv(size, BLOCK_E)
    key_region = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    g, h, b = key_region % Pk, key_region // Pk % heads, key_region // Pk // heads
    shared = heads // list_heads
    list_row = (b * list_heads + h // shared) * Pk + g
    acc = tl.zeros((BLOCK_E,), ACC)
    for chunk_id in range(tl.load(first_chunk + list_row), tl.load(first_chunk + list_row + 1)):
        acc += tl.load(part + (chunk_id * shared + h % shared) * size + e, mask=e < size, other=0.0)
    if HAS_MASK:
        seen = tl.load(key_mask + (b * Pk + g) * Sk + e // width, mask=e < size, other=0) != 0
        acc = tl.where(seen, acc, 0.0)
    tl.store(result + key_region * size + e, acc.to(result.dtype.element_ty), mask=e < size)


# --- host ------------------------------------------------------------------------------------------------------------


def _key_gradients(q, k, v, index, counts, grad, lse, delta, facts: Region, dk, dv) -> None:
    """Writes dk and dv; either may be None."""
    B, H, Pk, Sk = k.shape[:4]
    lists = choosers(index, counts, Pk)
    shared = H // lists.heads
    chunks = lists.row_of_chunk.numel()
    parts = [
        delta if like is None else torch.empty((chunks, shared, *like.shape[3:]), dtype=facts.wide, device=q.device)
        for like in (dk, dv)
    ]
    launch(
        region_attention_keys_bwd_kernel, (chunks * shared * triton.cdiv(Sk, facts.blocks["BLOCK_N"]),),
        *facts.tensors, grad, lse, delta, lists.slots, lists.first_slot, lists.first_chunk, lists.row_of_chunk, *parts,
        *facts.sizes, *grad.stride(), B * lists.heads * Pk, lists.heads, lists.size,
        WANT_K=dk is not None, WANT_V=dv is not None, **facts.constants, **facts.blocks,
    )  # fmt: skip
    for part, result in zip(parts, (dk, dv)):
        if result is not None:
            block = 256
            launch(
                region_chunks_bwd_kernel, (B * H * Pk * triton.cdiv(Sk * result.shape[4], block),),
                part, result, facts.tensors[5], lists.first_chunk, H, lists.heads, Pk, Sk, result.shape[4],
                HAS_MASK=facts.constants["HAS_MASK"], ACC=facts.constants["ACC"], BLOCK_E=block,
                num_warps=4, num_stages=2,
            )  # fmt: skip


def region_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None, counts: Tensor | None,
    key_mask: Tensor | None, region_weight: Tensor | None, out: Tensor, lse: Tensor, exact: Tensor, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not q.is_cuda:
        check_regions("region_attention", index, counts, k.shape[2])
    weight = q if region_weight is None else region_weight
    wanted = [*mask[:3], mask[3] and region_weight is not None]
    dq, dk, dv, dweight = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else t.new_empty(0)
        for t, want in zip((q, k, v, weight), wanted)
    )
    if grad.numel() == 0 or k.shape[2] * k.shape[3] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dweight.zero_()
    facts = region(q, k, v, index, scale, counts, key_mask, region_weight, backward=True)
    B, H, P, S, _ = q.shape
    lse = lse.contiguous()
    delta = torch.empty(lse.shape, dtype=facts.wide, device=lse.device)
    launch(
        region_delta_bwd_kernel, (B * H * P * facts.query_blocks,),
        grad, (exact if q.dtype != facts.wide else out).contiguous(), delta, *grad.stride(), H, P, S, v.shape[4],
        ACC=facts.constants["ACC"], BLOCK_M=facts.blocks["BLOCK_M"], BLOCK_V=facts.constants["BLOCK_V"],
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if wanted[0] or wanted[3]:
        parts = delta
        if wanted[3]:
            shape = (B, H, P, facts.query_blocks, index.shape[3])
            parts = torch.zeros(shape, dtype=facts.wide, device=q.device)
        launch(
            region_attention_bwd_kernel, (B * H * P * facts.query_blocks,),
            *facts.tensors, grad, lse, delta, dq if wanted[0] else delta, parts, *facts.sizes, *grad.stride(),
            WANT_Q=wanted[0], WANT_WEIGHT=wanted[3], **facts.constants, **facts.blocks,
        )  # fmt: skip
        if wanted[3]:
            total = parts.sum(3)
            dweight.copy_(total if weight.shape[1] == H else total.sum(1, keepdim=True))
    if wanted[1] or wanted[2]:
        _key_gradients(
            q, k, v, index, counts, grad, lse, delta, facts, dk if wanted[1] else None, dv if wanted[2] else None
        )
    return dq, dk, dv, dweight
