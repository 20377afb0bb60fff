"""Triton kernels of `sinkhorn_plan`: the plan of given potentials, and its gradient. Bound by memory."""

import triton
import triton.language as tl
from pyml.triton_kernels.batched_ot_math import (
    LOG2E,
    block_of,
    entries,
    not_finite,
    pairs,
    plan_of,
    start_of,
    store_entries,
    weights,
    within,
)


@triton.jit
def plan_block(
    at, a, b, f, g, q, i, j, n, m, stride_n, stride_m, inv2, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Plan and cost [i, j] of problem q, whose costs begin at `at`."""
    wa, _ = weights(a, q, i, n, HAS_A, ACC)
    wb, _ = weights(b, q, j, m, HAS_B, ACC)
    fi = tl.load(f + q * n + i, mask=i < n, other=0.0)
    gj = tl.load(g + q * m + j, mask=j < m, other=0.0)
    c = entries(at, i, j, pairs(wa, wb), stride_n, stride_m, ACC)
    return plan_of(c, fi, gj, wa, wb, inv2, ACC), c


@triton.jit
def any_lost(potential, q, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """How many potentials of problem q are not finite."""
    lost = 0
    for k0 in range(0, size, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        lost += not_finite(tl.load(potential + q * size + k, mask=k < size, other=0.0), ACC)
    return lost


@triton.jit
def moved_block(
    at, a, b, f, g, grad_at, lost, q, i, j, n, m, stride_n, stride_m, grad_stride_n, grad_stride_m, inv2,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Plan times gradient [i, j]; a problem without a plan has no gradient."""
    p, _ = plan_block(at, a, b, f, g, q, i, j, n, m, stride_n, stride_m, inv2, HAS_A, HAS_B, ACC)
    moved = p * entries(grad_at, i, j, within(i, n, j, m), grad_stride_n, grad_stride_m, ACC)
    return tl.where((p > 0) & (lost == 0), moved, 0.0)


@triton.jit
def sinkhorn_plan_fwd_kernel(
    cost, a, b, f, g, eps, plan, inner, outer_stride, inner_stride, stride_n, stride_m, n, m,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    q, i, j = block_of(n, m, BLOCK_N, BLOCK_M)
    at = start_of(cost, q, inner, outer_stride, inner_stride)
    inv2 = LOG2E / tl.load(eps)
    p, _ = plan_block(at, a, b, f, g, q, i, j, n, m, stride_n, stride_m, inv2, HAS_A, HAS_B, ACC)
    lost = any_lost(f, q, n, ACC, BLOCK_N) + any_lost(g, q, m, ACC, BLOCK_M)
    live = pairs(weights(a, q, i, n, HAS_A, ACC)[0], weights(b, q, j, m, HAS_B, ACC)[0])
    store_entries(plan, q, i, j, n, m, tl.where(live & (lost > 0), float("nan"), p))


@triton.jit
def give_sums(total, w, k, q, size, eps, to_weight, to_potential, WEIGHT: tl.constexpr, POTENTIAL: tl.constexpr):
    if WEIGHT:
        share = tl.where(w > 0, total / tl.where(w > 0, w, 1.0), 0.0)
        tl.store(to_weight + q * size + k, share, mask=k < size)
    if POTENTIAL:
        tl.store(to_potential + q * size + k, total / eps, mask=k < size)


@triton.jit
def sinkhorn_plan_bwd_kernel(
    cost, a, b, f, g, eps_at, grad, dcost, da, db, df, dg,
    inner, outer_stride, inner_stride, stride_n, stride_m,
    grad_inner, grad_outer_stride, grad_inner_stride, grad_stride_n, grad_stride_m, n, m,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, WANT_COST: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr,
    WANT_F: tl.constexpr, WANT_G: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums of plan times gradient over rows, then over columns."""
    q = tl.program_id(0).to(tl.int64)
    at = start_of(cost, q, inner, outer_stride, inner_stride)
    grad_at = start_of(grad, q, grad_inner, grad_outer_stride, grad_inner_stride)
    eps = tl.load(eps_at)
    inv2 = LOG2E / eps
    lost = any_lost(f, q, n, ACC, BLOCK_N) + any_lost(g, q, m, ACC, BLOCK_M)
    if WANT_COST or WANT_A or WANT_F:
        for i0 in range(0, n, BLOCK_N):
            i = i0 + tl.arange(0, BLOCK_N)
            total = tl.zeros((BLOCK_N,), ACC)
            for j0 in range(0, m, BLOCK_M):
                j = j0 + tl.arange(0, BLOCK_M)
                moved = moved_block(at, a, b, f, g, grad_at, lost, q, i, j, n, m, stride_n, stride_m, grad_stride_n,
                                    grad_stride_m, inv2, HAS_A, HAS_B, ACC)  # fmt: skip
                total += tl.sum(moved, 1)
                if WANT_COST:
                    store_entries(dcost, q, i, j, n, m, -moved / eps)
            give_sums(total, weights(a, q, i, n, HAS_A, ACC)[0], i, q, n, eps, da, df, WANT_A, WANT_F)
    if WANT_B or WANT_G:
        for j0 in range(0, m, BLOCK_M):
            j = j0 + tl.arange(0, BLOCK_M)
            total = tl.zeros((BLOCK_M,), ACC)
            for i0 in range(0, n, BLOCK_N):
                i = i0 + tl.arange(0, BLOCK_N)
                moved = moved_block(at, a, b, f, g, grad_at, lost, q, i, j, n, m, stride_n, stride_m, grad_stride_n,
                                    grad_stride_m, inv2, HAS_A, HAS_B, ACC)  # fmt: skip
                total += tl.sum(moved, 0)
            give_sums(total, weights(b, q, j, m, HAS_B, ACC)[0], j, q, m, eps, db, dg, WANT_B, WANT_G)
