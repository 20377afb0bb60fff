"""Triton kernels of `topk_attention`, forward. The matrix of logits is never in memory.

Two kernels walk over the keys. The first finds, for each query and threshold, the smallest logit that is kept and the
last key among ties, and with them the largest logit and the sum of the exponentials. It holds a block of rows of
logits in registers where they fit, else makes them again for each count. The second adds up the kept values.

Both, and the backward, take their logits from `tile_logits` in one tile shape, so that all see the same bits: a logit
that differs by one rounding would be kept here and not there.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch
from pyml.triton_kernels.topk_attention_region import load_rows, rounded_product
from pyml.triton_kernels.topk_attention_token_host import as_list, token
from torch import Tensor

VALUE_STEPS = tl.constexpr(20)  # by the mean of two logits; then of their bits, which always ends
AT_ONCE = 4  # thresholds that one launch looks for in the same logits

# --- logits ----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_products(
    x, x_rows, y_rows, n, t, N, M, depth, x_n, x_d, y_m, y_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Products [n, t] of rows x_rows[n] and y_rows[t], and the first BLOCK features of y; x has those of x_rows."""
    y = load_rows(y_rows, t, t < M, depth, y_m, y_d, ACC, DOT, BLOCK)
    products = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)
    if not WHOLE:
        x_step, y_step = tl.full((), 0, tl.int64) + x_d, tl.full((), 0, tl.int64) + y_d
        for d in range(BLOCK, depth, BLOCK):
            more_x = load_rows(x_rows + d * x_step, n, n < N, depth - d, x_n, x_d, ACC, DOT, BLOCK)
            more_y = load_rows(y_rows + d * y_step, t, t < M, depth - d, y_m, y_d, ACC, DOT, BLOCK)
            products = tl.dot(more_x, tl.trans(more_y), products, input_precision=PRECISION, out_dtype=ACC)
    return products, y


@triton.jit
def tile_logits(
    queries, n, t, at,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STEP_D: tl.constexpr, WHOLE_D: tl.constexpr,
):  # fmt: skip
    """Logits [n, t], -inf where masked or outside; and the first features of the keys. `at` is from `locate`."""
    q_rows, k_rows, mask_rows, q_n, q_d, k_m, k_d, m_n, m_m, N, M, D, factor = at
    products, keys = tile_products(
        queries, q_rows, k_rows, n, t, N, M, D, q_n, q_d, k_m, k_d, ACC, DOT, PRECISION, STEP_D, WHOLE_D
    )
    logits = rounded_product(products, factor)
    keep = (n < N)[:, None] & (t < M)[None, :]
    if CAUSAL:
        keep = keep & (t[None, :] <= n[:, None])
    if MASK > 0:
        place = mask_rows + n.to(tl.int64)[:, None] * m_n + t.to(tl.int64)[None, :] * m_m
    if MASK == 1:
        keep = keep & (tl.load(place, mask=keep, other=0) != 0)
    if MASK == 2:
        added = tl.load(place, mask=keep, other=float("-inf")).to(ACC)
        logits = tl.where(added == float("-inf"), float("-inf"), logits + added)
    return tl.where(keep, logits, float("-inf")), keys


@triton.jit
def locate(
    q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D,
):  # fmt: skip
    """Where the rows of one head lie."""
    k_rows = k + b * k_b + h // shared * k_h
    q_rows, mask_rows = q + b * q_b + h * q_h, mask + b * m_b + h * m_h
    return q_rows, k_rows, mask_rows, q_n, q_d, k_m, k_d, m_n, m_m, N, M, D, tl.load(scale)


@triton.jit
def not_kept(s, t, tau, cut):
    """Logits below tau, and ties behind the last one that is kept. A NaN is kept: it reaches all of its row."""
    return (s < tau) | ((s == tau) & (t > cut))


@triton.jit
def seen_keys(block, M, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many keys, from the first one on, any query of a block may see."""
    seen = M
    if CAUSAL:
        seen = tl.minimum(M, (block + 1) * BLOCK_M)
    return seen


# --- selection -------------------------------------------------------------------------------------------------------


@triton.jit
def order_of(x, KEY: tl.constexpr, MAGNITUDE: tl.constexpr):
    """An integer that orders as x does; both zeros are 0."""
    bits = x.to(KEY, bitcast=True)
    return tl.where(bits < 0, -(bits & MAGNITUDE), bits)


@triton.jit
def number_of(order, ACC: tl.constexpr):
    size = tl.abs(order).to(ACC, bitcast=True)
    return tl.where(order < 0, -size, size)


@triton.jit
def pivot_between(
    low, high, step, QUARTERS: tl.constexpr, ACC: tl.constexpr, KEY: tl.constexpr, MAGNITUDE: tl.constexpr
):  # fmt: skip
    """An order strictly between two, at so many quarters of the way."""
    part: tl.constexpr = QUARTERS * 0.25
    by_value = order_of(number_of(low, ACC) * (1 - part) + number_of(high, ACC) * part, KEY, MAGNITUDE)
    by_order = low + ((high >> 2) - (low >> 2)) * QUARTERS
    guess = tl.where(step < VALUE_STEPS, by_value, by_order)
    return tl.minimum(tl.maximum(guess, low + 1), high - 1)


@triton.jit
def narrow(low, high, at_low, at_high, pivot, count, want, unsettled):
    """Takes the pivot as an end of the search, where `count` logits are not below it."""
    up = unsettled & (count >= want) & (pivot > low)
    down = unsettled & (count < want) & (pivot < high)
    low, at_low = tl.where(up, pivot, low), tl.where(up, count, at_low)
    return low, tl.where(down, pivot, high), at_low, tl.where(down, count, at_high)


@triton.jit
def sum_held(x):
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def topk_attention_select_fwd_kernel(
    q, k, v, mask, scale, top, total, tau, cut, want_0, want_1, want_2, want_3, first, count, softmaxes,
    q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d, m_b, m_h, m_n, m_m, heads, shared, N, M, D, Dv,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP_D: tl.constexpr,
    STEP_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, HELD: tl.constexpr, LOWEST: tl.constexpr,
    KEY: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """top, total, tau, cut [B, softmaxes, heads, N] of softmaxes first, ..., first + count - 1, which keep want_i keys.

    The search narrows an interval of the ordered logits until exactly `want` lie above its lower end, or until only
    one number is left in it: then ties decide, and of these the first keys stay.
    """
    blocks = tl.cdiv(N, BLOCK_M)
    row_id = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = block * BLOCK_M + tl.arange(0, BLOCK_M)
    h, b = row_id % heads, row_id // heads
    at = locate(q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D)
    queries = load_rows(at[0], n, n < N, D, q_n, q_d, ACC, DOT, STEP_D)
    tiles = tl.cdiv(seen_keys(block, M, CAUSAL, BLOCK_M), BLOCK_N)
    column = tl.arange(0, BLOCK_N)

    if HELD > 0:
        slot = tl.arange(0, HELD)
        held = tl.full((BLOCK_M, HELD, BLOCK_N), float("-inf"), ACC)
    valid_part = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    nan_part = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    high_part = tl.full((BLOCK_M, BLOCK_N), float("-inf"), ACC)
    low_part = tl.full((BLOCK_M, BLOCK_N), float("inf"), ACC)
    for tile in range(0, tiles):
        s, _ = tile_logits(queries, n, tile * BLOCK_N + column, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
        masked = s == float("-inf")
        valid_part += (~masked).to(tl.int32)
        nan_part += (s != s).to(tl.int32)
        high_part = tl.maximum(high_part, s)
        low_part = tl.minimum(low_part, tl.where(masked, float("inf"), s))
        if HELD > 0:
            held = tl.where((slot == tile)[None, :, None], s[:, None, :], held)
    valid, nans = tl.sum(valid_part, 1), tl.sum(nan_part, 1)
    highest, lowest = tl.max(high_part, 1), tl.min(low_part, 1)

    odd = (nans > 0) | (valid == 0)  # a NaN reaches all of its row; a query without keys gives 0
    shift = tl.where(odd, 0.0, highest)
    for i in range(0, count):
        want = tl.where(i == 0, want_0, tl.where(i == 1, want_1, tl.where(i == 2, want_2, want_3)))
        search = (valid > want) & (nans == 0)
        low, high = order_of(lowest, KEY, MAGNITUDE), order_of(highest, KEY, MAGNITUDE) + 1
        at_low, at_high = valid, valid * 0  # logits that are not below the ends
        unsettled = search & (high > low + 1)
        step = 0
        while tl.max(unsettled.to(tl.int32), 0) > 0:
            p2 = pivot_between(low, high, step, 2, ACC, KEY, MAGNITUDE)
            if HELD > 0:
                found = sum_held((held >= number_of(p2, ACC)[:, None, None]).to(tl.int32))
                low, high, at_low, at_high = narrow(low, high, at_low, at_high, p2, found, want, unsettled)
            else:
                p1 = pivot_between(low, high, step, 1, ACC, KEY, MAGNITUDE)
                p3 = pivot_between(low, high, step, 3, ACC, KEY, MAGNITUDE)
                x1, x2, x3 = number_of(p1, ACC)[:, None], number_of(p2, ACC)[:, None], number_of(p3, ACC)[:, None]
                c1 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                c2 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                c3 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                for tile in range(0, tiles):
                    s, _ = tile_logits(
                        queries, n, tile * BLOCK_N + column, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D
                    )
                    c1 += (s >= x1).to(tl.int32)
                    c2 += (s >= x2).to(tl.int32)
                    c3 += (s >= x3).to(tl.int32)
                low, high, at_low, at_high = narrow(low, high, at_low, at_high, p1, tl.sum(c1, 1), want, unsettled)
                low, high, at_low, at_high = narrow(low, high, at_low, at_high, p2, tl.sum(c2, 1), want, unsettled)
                low, high, at_low, at_high = narrow(low, high, at_low, at_high, p3, tl.sum(c3, 1), want, unsettled)
            unsettled = search & (at_low > want) & (high > low + 1)
            step += 1
        bound = tl.where(search, number_of(low, ACC), LOWEST)
        tied = search & (at_low > want)
        last = tl.full((BLOCK_M,), 2147483647, tl.int32)
        if tl.max(tied.to(tl.int32), 0) > 0:
            place = want - at_high  # the tie with this number, counted from 1, is the last one
            before = tl.zeros((BLOCK_M,), tl.int32)
            for tile in range(0, tiles):
                t = tile * BLOCK_N + column
                s, _ = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
                tie = ((s == bound[:, None]) & tied[:, None]).to(tl.int32)
                hit = (tie > 0) & (before[:, None] + tl.cumsum(tie, 1) == place[:, None])
                last = tl.minimum(last, tl.min(tl.where(hit, t[None, :], 2147483647), 1))
                before += tl.sum(tie, 1)
        sum_part = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        low_kept = tl.full((BLOCK_M, BLOCK_N), float("inf"), ACC)
        for tile in range(0, tiles):
            t = tile * BLOCK_N + column
            s, _ = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
            gone = not_kept(s, t[None, :], bound[:, None], last[:, None])
            sum_part += tl.where(gone, 0.0, tl.exp(s - shift[:, None]))
            low_kept = tl.minimum(low_kept, tl.where(gone, float("inf"), s))
        sums, smallest = tl.sum(sum_part, 1), tl.min(low_kept, 1)
        to = ((b * softmaxes + first + i) * heads + h) * N + n
        real = n < N
        tl.store(top + to, tl.where(nans > 0, float("nan"), shift), mask=real)
        tl.store(total + to, tl.where(odd, 1.0, sums), mask=real)
        tl.store(tau + to, tl.where(odd, LOWEST, smallest), mask=real)
        tl.store(cut + to, last, mask=real)


# --- output ----------------------------------------------------------------------------------------------------------


@triton.jit
def topk_attention_fwd_kernel(
    q, k, v, mask, scale, top, total, tau, cut, out, average, thresholds, softmaxes,
    q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d, m_b, m_h, m_n, m_m, heads, shared, N, M, D, Dv,
    STRAIGHT: tl.constexpr, HAS_AVERAGE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, MIXED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP_D: tl.constexpr,
    STEP_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, thresholds, heads, N, Dv]; average: the same before rounding or, for straight-through, of the dense
    softmax. A program has one block of queries, one softmax and BLOCK_V columns."""
    blocks = tl.cdiv(N, BLOCK_M)
    row_id = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = block * BLOCK_M + tl.arange(0, BLOCK_M)
    which, c = tl.program_id(1), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    h, b = row_id % heads, row_id // heads
    at = locate(q, k, mask, scale, b, h, q_b, q_h, q_n, q_d, k_b, k_h, k_m, k_d, m_b, m_h, m_n, m_m, shared, N, M, D)
    queries = load_rows(at[0], n, n < N, D, q_n, q_d, ACC, DOT, STEP_D)
    start = tl.program_id(2) * BLOCK_V
    v_rows = v + b * v_b + h // shared * v_h + (tl.full((), 0, tl.int64) + start) * v_d
    row = ((b * softmaxes + which) * heads + h) * N + n
    shift = tl.load(top + row, mask=n < N, other=0.0)
    low = tl.load(tau + row, mask=n < N, other=float("inf"))
    last = tl.load(cut + row, mask=n < N, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    for tile in range(0, tl.cdiv(seen_keys(block, M, CAUSAL, BLOCK_M), BLOCK_N)):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        s, _ = tile_logits(queries, n, t, at, CAUSAL, MASK, ACC, DOT, PRECISION, STEP_D, WHOLE_D)
        e = tl.where(not_kept(s, t[None, :], low[:, None], last[:, None]), 0.0, tl.exp(s - shift[:, None]))
        values = load_rows(v_rows, t, t < M, Dv - start, v_m, v_d, ACC, MIXED, BLOCK_V)
        acc = tl.dot(e.to(MIXED), values, acc, input_precision=PRECISION, out_dtype=ACC)
    result = acc / tl.load(total + row, mask=n < N, other=1.0)[:, None]
    dense = which == thresholds
    to = ((b * thresholds + tl.where(dense, 0, which)) * heads + h) * N + n
    to = to[:, None] * Dv + c[None, :]
    real = (n < N)[:, None]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=real & (c < tl.where(dense, 0, Dv))[None, :])
    if STRAIGHT:
        tl.store(average + to, result, mask=real & (c < tl.where(dense, Dv, 0))[None, :])
    elif HAS_AVERAGE:
        tl.store(average + to, result, mask=real & (c < Dv)[None, :])


def topk_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, topk: int | list[int], causal: bool, scale: float | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    facts = token(q, k, v, mask, causal, scale, backward=False)
    (B, H, N, _), M, Dv = q.shape, k.shape[2], v.shape[3]
    kept = as_list(topk)
    # Keys that each softmax keeps: one a threshold and, for straight_through, the dense one last.
    wants = [min(count, M) for count in kept] + [M] * straight_through
    out = torch.empty((B, len(kept), H, N, Dv), dtype=q.dtype, device=q.device)
    rows = (B, len(wants), H, N)
    top, total, tau = (torch.empty(rows, dtype=facts.wide, device=q.device) for _ in range(3))
    cut = torch.empty(rows, dtype=torch.int32, device=q.device)
    has_average = straight_through or q.dtype != facts.wide
    average = torch.empty(out.shape if has_average else (B, 0), dtype=facts.wide, device=q.device)
    if top.numel() == 0 or M == 0:
        return out.zero_(), top.zero_(), total.zero_(), tau.zero_(), cut.zero_(), average.zero_()
    programs = facts.heads * facts.tiles("N")
    for first in range(0, len(wants), AT_ONCE):
        some = wants[first : first + AT_ONCE]
        launch(
            topk_attention_select_fwd_kernel, (programs,),
            *facts.tensors, top, total, tau, cut, *some, *[M] * (AT_ONCE - len(some)), first, len(some), len(wants),
            *facts.sizes, **facts.constants, **facts.order, **facts.search,
        )  # fmt: skip
    if Dv > 0:
        launch(
            topk_attention_fwd_kernel, (programs, len(wants), facts.steps("V")),
            *facts.tensors, top, total, tau, cut, out, average if has_average else out, len(kept), len(wants),
            *facts.sizes, STRAIGHT=straight_through, HAS_AVERAGE=has_average, **facts.constants, **facts.blocks,
        )  # fmt: skip
    return out, top, total, tau, cut, average
