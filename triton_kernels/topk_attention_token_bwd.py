"""Triton kernels of `topk_attention`, backward: logits are made again, and what is kept is known from tau and cut.

dQ comes by blocks of queries. dK and dV come by tiles of keys, in parts of the queries whose sums are added in order;
the gradient of a mask comes by its own tiles, in parts of what it is broadcast to. Nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import chunks, launch, next_power
from pyml.triton_kernels.bspline_host import partial, sum_chunks
from pyml.triton_kernels.topk_attention_region import load_rows, slopes
from pyml.triton_kernels.topk_attention_region_bwd import region_delta_bwd_kernel
from pyml.triton_kernels.topk_attention_token import locate, not_kept, seen_keys, tile_logits, tile_products
from pyml.triton_kernels.topk_attention_token_host import Token, as_list, token
from torch import Tensor


@triton.jit
def probabilities(s, t, row, keep, top, total, tau, cut):
    """Softmax over the kept logits; which are not kept."""
    highest = tl.load(top + row, mask=keep, other=0.0)
    sums = tl.load(total + row, mask=keep, other=1.0)
    low = tl.load(tau + row, mask=keep, other=float("inf"))
    last = tl.load(cut + row, mask=keep, other=0)
    gone = not_kept(s, t[None, :], low[:, None], last[:, None])
    p = tl.where(gone, 0.0, tl.exp(s - highest[:, None]) * (1.0 / sums)[:, None])
    return p, gone


@triton.jit
def tile_slopes(
    s, do, grad_rows, v_rows, n, t, row, mean_row, top, total, tau, cut, delta, N, M, Dv, g_n, g_d, v_m, v_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STEP_V: tl.constexpr, WHOLE_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits [n, t]: probability * (grad . value - delta)."""
    p, gone = probabilities(s, t, row, n < N, top, total, tau, cut)
    dp, _ = tile_products(
        do, grad_rows, v_rows, n, t, N, M, Dv, g_n, g_d, v_m, v_d, ACC, DOT, PRECISION, STEP_V, WHOLE_V
    )
    mean = tl.load(delta + mean_row, mask=n < N, other=0.0)
    return tl.where(gone, 0.0, slopes(p, dp, mean[:, None]))


@triton.jit
def output_rows(
    grad, b, i, h, n, N, Dv, thresholds, softmaxes, heads, g_b, g_t, g_h, g_n, g_d,
    ACC: tl.constexpr, DOT: tl.constexpr, STEP_V: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of output i of one head: where the rows of its gradient start, their first values, the places of the rows of the
    softmax that passes the gradient on, and those of delta."""
    grad_rows = grad + b * g_b + i * (tl.full((), 0, tl.int64) + g_t) + h * g_h
    do = load_rows(grad_rows, n, n < N, Dv, g_n, g_d, ACC, DOT, STEP_V)
    row = ((b * softmaxes + (thresholds if STRAIGHT else i)) * heads + h) * N + n
    return grad_rows, do, row, ((b * thresholds + i) * heads + h) * N + n


@triton.jit
def topk_attention_bwd_kernel(
    q, k, v, mask, scale, grad, top, total, tau, cut, delta, dq, thresholds, softmaxes, g_b, g_t, g_h, g_n, g_d,
    q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d, m_b, m_h, m_n, m_m, heads, shared, N, M, D, Dv,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP_D: tl.constexpr,
    STEP_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, STRAIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, heads, N, D]; a program has one block of queries and BLOCK_D features."""
    blocks = tl.cdiv(N, BLOCK_M)
    row_id = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = block * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_D
    h, b = row_id % heads, row_id // heads
    at = locate(q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D)
    queries = load_rows(at[0], n, n < N, D, q_n, q_d, ACC, DOT, STEP_D)
    v_rows = v + b * v_b + h // shared * v_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for i in range(0, thresholds):
        grad_rows, do, row, mean_row = output_rows(
            grad, b, i, h, n, N, Dv, thresholds, softmaxes, heads, g_b, g_t, g_h, g_n, g_d, ACC, DOT, STEP_V, STRAIGHT
        )
        for tile in range(0, tl.cdiv(seen_keys(block, M, CAUSAL, BLOCK_M), BLOCK_N)):
            t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            s, keys = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
            ds = tile_slopes(
                s, do, grad_rows, v_rows, n, t, row, mean_row, top, total, tau, cut, delta, N, M, Dv, g_n, g_d,
                v_m, v_d, ACC, DOT, PRECISION, STEP_V, WHOLE_V,
            )  # fmt: skip
            if not WHOLE_D:
                columns = at[1] + start * (tl.full((), 0, tl.int64) + k_d)
                keys = load_rows(columns, t, t < M, D - start, k_m, k_d, ACC, DOT, BLOCK_D)
            acc = tl.dot(ds.to(MIXED), keys.to(MIXED), acc, input_precision=PRECISION, out_dtype=ACC)
    c = start + tl.arange(0, BLOCK_D)
    to = (row_id * N + n)[:, None] * D + c[None, :]
    tl.store(dq + to, (acc * tl.load(scale)).to(dq.dtype.element_ty), mask=(n < N)[:, None] & (c < D)[None, :])


@triton.jit
def topk_attention_keys_bwd_kernel(
    q, k, v, mask, scale, grad, top, total, tau, cut, delta, part_k, part_v, thresholds, softmaxes, items, size,
    groups, g_b, g_t, g_h, g_n, g_d,
    q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d, m_b, m_h, m_n, m_m, heads, shared, N, M, D, Dv,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP_D: tl.constexpr,
    STEP_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, STRAIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """part_k [splits, B * kv heads, M, D] and part_v [..., Dv]. A program has one tile of keys, a part of the blocks
    of queries (`size` of `items`, over all heads that share the keys), and BLOCK_D and BLOCK_V columns."""
    tiles, blocks = tl.cdiv(M, BLOCK_N), tl.cdiv(N, BLOCK_M)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split, step = tl.program_id(1), tl.program_id(2)
    b, kv = group // (heads // shared), group % (heads // shared)
    v_rows = v + b * v_b + kv * v_h
    q_start, g_start = step * (tl.full((), BLOCK_D, tl.int64) * q_d), step * (tl.full((), BLOCK_V, tl.int64) * g_d)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    for i in range(0, thresholds):
        for item in range(split * size, tl.minimum(items, (split + 1) * size)):
            h = kv * shared + item // blocks
            n = (item % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            if seen_keys(item % blocks, M, CAUSAL, BLOCK_M) > (tl.program_id(0) % tiles) * BLOCK_N:
                at = locate(
                    q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D
                )
                queries = load_rows(at[0], n, n < N, D, q_n, q_d, ACC, DOT, STEP_D)
                s, _ = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
                grad_rows, do, row, mean_row = output_rows(
                    grad, b, i, h, n, N, Dv, thresholds, softmaxes, heads, g_b, g_t, g_h, g_n, g_d, ACC, DOT, STEP_V,
                    STRAIGHT,
                )  # fmt: skip
                if WANT_K:
                    ds = tile_slopes(
                        s, do, grad_rows, v_rows, n, t, row, mean_row, top, total, tau, cut, delta, N, M, Dv, g_n,
                        g_d, v_m, v_d, ACC, DOT, PRECISION, STEP_V, WHOLE_V,
                    )  # fmt: skip
                    if not WHOLE_D:
                        queries = load_rows(at[0] + q_start, n, n < N, D - step * BLOCK_D, q_n, q_d, ACC, DOT, BLOCK_D)
                    dk = tl.dot(tl.trans(ds.to(MIXED)), queries.to(MIXED), dk, input_precision=PRECISION, out_dtype=ACC)
                if WANT_V:
                    row = ((b * softmaxes + i) * heads + h) * N + n
                    p, _ = probabilities(s, t, row, n < N, top, total, tau, cut)
                    if not WHOLE_V:
                        do = load_rows(grad_rows + g_start, n, n < N, Dv - step * BLOCK_V, g_n, g_d, ACC, DOT, BLOCK_V)
                    dv = tl.dot(tl.trans(p.to(MIXED)), do.to(MIXED), dv, input_precision=PRECISION, out_dtype=ACC)
    to = (split.to(tl.int64) * groups + group) * M + t
    if WANT_K:
        c = step * BLOCK_D + tl.arange(0, BLOCK_D)
        dk = (dk * tl.load(scale)).to(part_k.dtype.element_ty)
        tl.store(part_k + to[:, None] * D + c[None, :], dk, mask=(t < M)[:, None] & (c < D)[None, :])
    if WANT_V:
        c = step * BLOCK_V + tl.arange(0, BLOCK_V)
        dv = dv.to(part_v.dtype.element_ty)
        tl.store(part_v + to[:, None] * Dv + c[None, :], dv, mask=(t < M)[:, None] & (c < Dv)[None, :])


@triton.jit
def topk_attention_mask_bwd_kernel(
    q, k, v, mask, scale, grad, top, total, tau, cut, delta, part, thresholds, softmaxes, items, size,
    batches, mask_heads, mask_queries, mask_keys, all_heads, g_b, g_t, g_h, g_n, g_d,
    q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d, m_b, m_h, m_n, m_m, heads, shared, N, M, D, Dv,
    OWN_N: tl.constexpr, OWN_M: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP_D: tl.constexpr,
    STEP_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, STRAIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """part [splits, *mask]. A program has one tile of the mask and `size` of the `items` that it is broadcast to:
    batches, heads, blocks of queries and tiles of keys, as far as the mask has one of them for all."""
    tiles, blocks = tl.cdiv(M, BLOCK_N), tl.cdiv(N, BLOCK_M)
    own_tiles, own_blocks = (tiles if OWN_M else 1), (blocks if OWN_N else 1)
    all_tiles, all_blocks = (1 if OWN_M else tiles), (1 if OWN_N else blocks)
    place, split = tl.program_id(0), tl.program_id(1)
    slab = (place // own_tiles // own_blocks).to(tl.int64)
    own_h, own_b = slab % mask_heads, slab // mask_heads
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(0, thresholds):
        for item in range(split * size, tl.minimum(items, (split + 1) * size)):
            tile = place % own_tiles + item % all_tiles
            block = place // own_tiles % own_blocks + item // all_tiles % all_blocks
            h = own_h + item // all_tiles // all_blocks % all_heads
            b = own_b + item // all_tiles // all_blocks // all_heads
            n, t = block * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
            at = locate(
                q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D
            )
            queries = load_rows(at[0], n, n < N, D, q_n, q_d, ACC, DOT, STEP_D)
            s, _ = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
            grad_rows, do, row, mean_row = output_rows(
                grad, b, i, h, n, N, Dv, thresholds, softmaxes, heads, g_b, g_t, g_h, g_n, g_d, ACC, DOT, STEP_V,
                STRAIGHT,
            )  # fmt: skip
            acc += tile_slopes(
                s, do, grad_rows, v + b * v_b + h // shared * v_h, n, t, row, mean_row, top, total, tau, cut, delta,
                N, M, Dv, g_n, g_d, v_m, v_d, ACC, DOT, PRECISION, STEP_V, WHOLE_V,
            )  # fmt: skip
    first_n = place // own_tiles % own_blocks * BLOCK_M
    first_t = place % own_tiles * BLOCK_N
    to = part + (split.to(tl.int64) * batches * mask_heads + slab) * mask_queries * mask_keys
    n, t = first_n + tl.arange(0, BLOCK_M).to(tl.int64), first_t + tl.arange(0, BLOCK_N)
    kind = part.dtype.element_ty
    if OWN_N and OWN_M:
        keep = (n < mask_queries)[:, None] & (t < mask_keys)[None, :]
        tl.store(to + n[:, None] * mask_keys + t[None, :], acc.to(kind), mask=keep)
    elif OWN_N:
        tl.store(to + n, tl.sum(acc, 1).to(kind), mask=n < mask_queries)
    elif OWN_M:
        tl.store(to + t, tl.sum(acc, 0).to(kind), mask=t < mask_keys)
    else:
        tl.store(to, tl.sum(tl.sum(acc, 1), 0).to(kind))


# --- host ------------------------------------------------------------------------------------------------------------


def _key_gradients(k: Tensor, v: Tensor, facts: Token, arguments, counts, strides, options, wanted) -> list[Tensor]:
    """dk and dv; one that is not wanted comes back empty."""
    items = facts.heads // facts.kv_heads * facts.tiles("N")
    programs, steps = facts.kv_heads * facts.tiles("M"), max(facts.steps("D"), facts.steps("V"))
    splits, size = chunks(items, 1, programs * steps)
    found = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if w else t.new_empty(0) for t, w in zip((k, v), wanted)
    ]
    parts = [partial(g, splits, facts.wide) if w else g for g, w in zip(found, wanted)]
    launch(
        topk_attention_keys_bwd_kernel, (programs, splits, steps),
        *arguments, *parts, *counts, items, size, facts.kv_heads, *strides, *facts.sizes,
        WANT_K=wanted[0], WANT_V=wanted[1], **options,
    )  # fmt: skip
    for part, gradient, want in zip(parts, found, wanted):
        if want and gradient.numel():
            sum_chunks(part, gradient, facts.wide)
    return found


def _mask_gradient(mask: Tensor, q: Tensor, facts: Token, arguments, counts, strides, options) -> Tensor:
    own_n, own_m = mask.shape[2] > 1, mask.shape[3] > 1
    blocks, tiles = facts.tiles("N"), facts.tiles("M")
    own = mask.shape[0] * mask.shape[1] * (blocks if own_n else 1) * (tiles if own_m else 1)
    items = facts.heads * blocks * tiles // own
    heads = q.shape[1] if mask.shape[1] == 1 else 1  # that share a head of the mask
    splits, size = chunks(items, 1, own)
    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    part = partial(dmask, splits, facts.wide)
    launch(
        topk_attention_mask_bwd_kernel, (own, splits),
        *arguments, part, *counts, items, size, *mask.shape, heads, *strides, *facts.sizes,
        OWN_N=own_n, OWN_M=own_m, **options,
    )  # fmt: skip
    sum_chunks(part, dmask, facts.wide)
    return dmask


def topk_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, topk: int | list[int], causal: bool,
    scale: float | None, straight_through: bool, out: Tensor, top: Tensor, total: Tensor, tau: Tensor, cut: Tensor,
    average: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wanted = [*wanted[:3], wanted[3] and mask is not None and mask.dtype != torch.bool]
    inputs = (q, k, v, q if mask is None else mask)
    if grad.numel() == 0 or k.shape[2] == 0:
        none = [torch.zeros_like(t) if w else t.new_empty(0) for t, w in zip(inputs, wanted)]
        return none[0], none[1], none[2], none[3]
    facts = token(q, k, v, mask, causal, scale, backward=True)
    (B, H, N, _), Dv, thresholds = q.shape, v.shape[3], len(as_list(topk))
    top, total, tau, cut = (t.contiguous() for t in (top, total, tau, cut))
    delta = torch.empty((B, thresholds, H, N), dtype=facts.wide, device=q.device)
    columns = next_power(Dv)
    rows = max(1, min(64, 4096 // columns))
    launch(
        region_delta_bwd_kernel, (B * thresholds * H * triton.cdiv(N, rows),),
        grad, (average if average.numel() else out).contiguous(), delta, *grad.stride(), thresholds, H, N, Dv,
        ACC=facts.constants["ACC"], BLOCK_M=rows, BLOCK_V=columns, num_warps=4, num_stages=2,
    )  # fmt: skip
    arguments = (*facts.tensors, grad, top, total, tau, cut, delta)
    counts, strides = (thresholds, thresholds + straight_through), grad.stride()
    options = {**facts.constants, "STRAIGHT": straight_through, **facts.blocks}
    dq, dk, dv, dmask = (t.new_empty(0) for t in inputs)
    if wanted[0]:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        launch(
            topk_attention_bwd_kernel, (facts.heads * facts.tiles("N"), facts.steps("D")),
            *arguments, dq, *counts, *strides, *facts.sizes, **options,
        )  # fmt: skip
    if wanted[1] or wanted[2]:
        dk, dv = _key_gradients(k, v, facts, arguments, counts, strides, options, wanted[1:3])
    if wanted[3] and mask is not None:
        dmask = _mask_gradient(mask, q, facts, arguments, counts, strides, options)
    return dq, dk, dv, dmask
