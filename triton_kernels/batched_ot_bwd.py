"""Triton kernel of the gradients of solved problems: the envelope, and through the potentials by a Schur complement.
The maths is that of csrc/batched_ot/ot_bwd_cpu.h.

A program has one problem. Its plan is a tile in registers, or is made again block by block in each product. The system
of the implicit gradient is eliminated where its smaller side and the plan are in registers; else conjugate gradients
solve it.
"""

import triton
import triton.language as tl
from pyml.triton_kernels.batched_ot_math import (
    LOG2E,
    entries,
    mass,
    not_finite,
    nothing_left,
    pairs,
    plan_of,
    start_of,
    store_entries,
    weights,
)
from pyml.triton_kernels.batched_ot_plan import plan_block
from pyml.triton_kernels.batched_ot_solve import exchange

MOST_ELIMINATED: tl.constexpr = tl.constexpr(64)  # of the smaller side, in registers


@triton.jit
def block_sums(
    at, a, b, f, g, x, out, q, n, m, stride_n, stride_m, inv2,
    AXIS: tl.constexpr, PAID: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = P x (AXIS 1) or P^T x (AXIS 0), entries of P times their costs where PAID; x, out in global memory."""
    D, S = (n, m) if AXIS == 1 else (m, n)
    for d0 in range(0, D, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), ACC)
        for s0 in range(0, S, BLOCK):
            s = s0 + tl.arange(0, BLOCK)
            i, j = (d, s) if AXIS == 1 else (s, d)
            p, c = plan_block(at, a, b, f, g, q, i, j, n, m, stride_n, stride_m, inv2, HAS_A, HAS_B, ACC)
            if PAID:
                p = p * c
            xs = tl.load(x + s, mask=s < S, other=0.0)
            if AXIS == 1:
                total += tl.sum(p * xs[None, :], 1)
            else:
                total += tl.sum(p * xs[:, None], 0)
        tl.store(out + d, total, mask=d < D)
    tl.debug_barrier()


@triton.jit
def product(
    tile, x, at, a, b, f, g, room, q, n, m, stride_n, stride_m, inv2,
    AXIS: tl.constexpr, PAID: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, SINGLE: tl.constexpr,
    ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P x or P^T x as a vector; `room` [n + m] is for what blocks exchange."""
    if SINGLE:
        return tl.sum(tile * x[None, :], 1) if AXIS == 1 else tl.sum(tile * x[:, None], 0)
    else:
        i, j = tl.arange(0, N), tl.arange(0, M)
        if AXIS == 1:
            exchange(room + n + j, x, j < m)
            block_sums(at, a, b, f, g, room + n, room, q, n, m, stride_n, stride_m, inv2, AXIS, PAID, HAS_A, HAS_B,
                       ACC, BLOCK)  # fmt: skip
            return tl.load(room + i, mask=i < n, other=0.0)
        else:
            exchange(room + i, x, i < n)
            block_sums(at, a, b, f, g, room, room + n, q, n, m, stride_n, stride_m, inv2, AXIS, PAID, HAS_A, HAS_B,
                       ACC, BLOCK)  # fmt: skip
            return tl.load(room + n + j, mask=j < m, other=0.0)


@triton.jit
def eliminate(tile, h_many, h_few, many_sums, few_sums, tau, many, few, UNBALANCED: tl.constexpr):
    """The part of the solution on the few columns of a plan, by Gauss and Jordan on its Schur complement.

    A pivot below the rounding of what the system was made from leaves its direction undetermined: it gets 0.
    """
    i, j = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    over = tl.where(many_sums > 0, 1.0 / (tau * tl.where(many_sums > 0, many_sums, 1.0)), 0.0)
    x = tl.where(few_sums > 0, h_few - tl.sum(tile * (h_many * over)[:, None], 0), 0.0)
    diagonal = tau * few_sums
    left = tl.where(j[:, None] == j[None, :], diagonal[:, None], 0.0)
    for at in range(0, many):
        row = tl.sum(tl.where((i == at)[:, None], tile, 0.0), 0)
        left -= tl.sum(tl.where(i == at, over, 0.0)) * row[:, None] * row[None, :]
    if not UNBALANCED:  # what rounding adds outside of the range; the free direction: some multiple is as good
        total = tl.sum(few_sums)
        total = tl.where(total > 0, total, 1.0)
        x -= tl.sum(x) / total * few_sums
        left += few_sums[:, None] * few_sums[None, :] / total
    for at in range(0, few):
        here = j == at
        column = tl.sum(tl.where(here[None, :], left, 0.0), 1)
        pivot = tl.sum(tl.where(here, column, 0.0))
        good = pivot > 1e-13 * tl.sum(tl.where(here, diagonal, 0.0))
        factor = tl.where(good, 1.0 / tl.where(good, pivot, 1.0), 0.0)
        row = factor * tl.sum(tl.where(here[:, None], left, 0.0), 0)
        found = factor * tl.sum(tl.where(here, x, 0.0))
        left = tl.where(here[:, None], row[None, :], left - column[:, None] * row[None, :])
        x = tl.where(here, found, x - column * found)
    return x


@triton.jit
def dot(x, y):
    return tl.sum(x.to(tl.float64) * y.to(tl.float64))


@triton.jit
def through(weight, sums, move, given, tau, eps):
    """What the potentials' answer adds to the gradient of the weights, in float64."""
    found = eps * (tau * sums.to(tl.float64) * move.to(tl.float64) - given.to(tl.float64))
    return tl.where(weight > 0, found / tl.where(weight > 0, weight, 1.0).to(tl.float64), 0.0)


@triton.jit
def sinkhorn_solve_bwd_kernel(
    cost, a, b, eps_at, rho_at, f_at, g_at, grad_value, grad_transport, grad_f, grad_g, dcost, da, db, scratch,
    inner, outer_stride, inner_stride, stride_n, stride_m, n, m, scratch_size,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, UNBALANCED: tl.constexpr, IMPLICIT: tl.constexpr,
    WANT_COST: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr, SINGLE: tl.constexpr, ACC: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, N), tl.arange(0, M)
    at = start_of(cost, q, inner, outer_stride, inner_stride)
    room = scratch + q * scratch_size
    eps, rho = tl.load(eps_at), tl.load(rho_at)
    inv2 = LOG2E / eps
    tau = 1.0 + eps / rho if UNBALANCED else tl.full((), 1.0, ACC)
    wa, wrong_a = weights(a, q, i, n, HAS_A, ACC)
    wb, wrong_b = weights(b, q, j, m, HAS_B, ACC)
    f = tl.load(f_at + q * n + i, mask=i < n, other=0.0)
    g = tl.load(g_at + q * m + j, mask=j < m, other=0.0)
    lost = (wrong_a + wrong_b + not_finite(f, ACC) > 0) | nothing_left(wa, wb)
    f, g = tl.where(lost, 0.0, f), tl.where(lost, 0.0, g)  # no gradient: nothing counts then
    wa, wb = tl.where(lost, 0.0, wa), tl.where(lost, 0.0, wb)
    by_value = tl.where(lost, 0.0, tl.load(grad_value + q))
    by_cost = tl.where(lost, 0.0, tl.load(grad_transport + q))
    tile, costs = eps, eps
    if SINGLE:
        costs = entries(at, i, j, pairs(wa, wb), stride_n, stride_m, ACC)
        tile = plan_of(costs, f, g, wa, wb, inv2, ACC)
    row_sums, column_sums = wa, wb
    if IMPLICIT or (UNBALANCED and WANT_A):
        row_sums = product(tile, tl.full((M,), 1.0, ACC), at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                           inv2, 1, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
    row_move, column_move = tl.zeros((N,), ACC), tl.zeros((M,), ACC)
    apart = tl.zeros((), tl.float64)
    given_f, given_g = row_move, column_move
    if IMPLICIT:
        given_f = tl.load(grad_f + q * n + i, mask=wa > 0, other=0.0)
        given_g = tl.load(grad_g + q * m + j, mask=wb > 0, other=0.0)
        column_sums = product(tile, tl.full((N,), 1.0, ACC), at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                              inv2, 0, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
        spent = tile * costs
        h_rows = product(spent, tl.full((M,), 1.0, ACC), at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                         inv2, 1, True, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
        h_columns = product(spent, tl.full((N,), 1.0, ACC), at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                            inv2, 0, True, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
        # Gradients of the potentials, and their part along the direction in which balanced ones are free.
        h_rows = by_cost / eps * h_rows + given_f
        h_columns = by_cost / eps * h_columns + given_g
        if not UNBALANCED:
            apart = tl.where(lost, 0.0, tl.sum(h_rows.to(tl.float64)) - tl.sum(h_columns.to(tl.float64)))
            whole = tl.where(lost, 1.0, mass(wb, HAS_B))
            h_columns += (wb.to(tl.float64) * apart / whole).to(ACC)
        inverse = tl.where(row_sums > 0, 1.0 / (tau * tl.where(row_sums > 0, row_sums, 1.0)), 0.0)
        if SINGLE and M <= N and M <= MOST_ELIMINATED:
            column_move = eliminate(tile, h_rows, h_columns, row_sums, column_sums, tau, n, m, UNBALANCED)
            row_move = (h_rows - tl.sum(tile * column_move[None, :], 1)) * inverse
        elif SINGLE and N < M and N <= MOST_ELIMINATED:
            row_move = eliminate(tl.trans(tile), h_columns, h_rows, column_sums, row_sums, tau, m, n, UNBALANCED)
            over = tl.where(column_sums > 0, 1.0 / (tau * tl.where(column_sums > 0, column_sums, 1.0)), 0.0)
            column_move = (h_columns - tl.sum(tile * row_move[:, None], 0)) * over
        else:
            # Conjugate gradients with S = tau c - P^T (tau r)^-1 P, the Schur complement on the columns. What rounding
            # has left over is solved for once more.
            back = product(tile, h_rows * inverse, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                           inv2, 0, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
            right = tl.where(wb > 0, h_columns - back, 0.0)
            diagonal = tau * column_sums
            moves = (wb > 0) & (column_sums > 0)  # an entry whose plan has vanished does not
            safe = tl.where(moves, diagonal, 1.0)
            residual = right
            first = tl.zeros((), tl.float64)
            for _ in range(0, 2):
                if not UNBALANCED:  # what rounding adds outside of the range of S
                    total = tl.sum(column_sums.to(tl.float64))
                    off = tl.sum(residual.to(tl.float64)) / tl.where(total > 0, total, 1.0)
                    residual -= (off * column_sums.to(tl.float64)).to(ACC)
                direction = tl.where(moves, residual / safe, 0.0)
                size = dot(residual, direction)
                first = tl.maximum(first, size)
                step = 0
                while (step < 2 * m + 20) & (size > 1e-26 * first):
                    part = product(tile, direction, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                                   inv2, 1, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
                    back = product(tile, part * inverse, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                                   inv2, 0, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
                    image = diagonal * direction - back
                    curvature = dot(direction, image)
                    good = curvature > 0
                    alpha = tl.where(good, size / tl.where(good, curvature, 1.0), 0.0).to(ACC)
                    column_move += alpha * direction
                    residual -= alpha * image
                    scaled = tl.where(moves, residual / safe, 0.0)
                    following = dot(residual, scaled)
                    beta = tl.where(good, following / size, 0.0).to(ACC)
                    direction = scaled + beta * direction
                    size = tl.where(good, following, 0.0)
                    step += 1
                part = product(tile, column_move, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                               inv2, 1, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
                back = product(tile, part * inverse, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                               inv2, 0, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
                residual = tl.where(wb > 0, right - (diagonal * column_move - back), 0.0)
            part = product(tile, column_move, at, a, b, f_at, g_at, room, q, n, m, stride_n, stride_m,
                           inv2, 1, False, HAS_A, HAS_B, SINGLE, ACC, N, M, BLOCK)  # fmt: skip
            row_move = (h_rows - part) * inverse
        if not UNBALANCED:  # as sum b g = 0 fixes the potentials, it fixes the solution
            shift = ((apart / whole + dot(wb, column_move)) / whole).to(ACC)
            column_move -= shift
            row_move += shift
    if WANT_COST:
        if SINGLE:
            slope = by_value + by_cost - by_cost / eps * costs + row_move[:, None] + column_move[None, :]
            slope = slope if IMPLICIT else by_value + by_cost
            store_entries(dcost, q, i, j, n, m, tile * slope)
        else:
            exchange(room + i, row_move, i < n)
            exchange(room + n + j, column_move, j < m)
            for i0 in range(0, n, BLOCK):
                for j0 in range(0, m, BLOCK):
                    bi, bj = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
                    p, c = plan_block(at, a, b, f_at, g_at, q, bi, bj, n, m, stride_n, stride_m, inv2, HAS_A, HAS_B,
                                      ACC)  # fmt: skip
                    slope = by_value + by_cost + tl.zeros((BLOCK, BLOCK), ACC)
                    if IMPLICIT:
                        slope -= by_cost / eps * c
                        slope += tl.load(room + bi, mask=bi < n, other=0.0)[:, None]
                        slope += tl.load(room + n + bj, mask=bj < m, other=0.0)[None, :]
                    store_entries(dcost, q, bi, bj, n, m, tl.where(lost, 0.0, p * slope))
    eps64, value64, tau64 = eps.to(tl.float64), by_value.to(tl.float64), tau.to(tl.float64)
    mass_a, mass_b = mass(wa, HAS_A), mass(wb, HAS_B)
    uneven = tl.zeros((), tl.float64)
    if IMPLICIT and not UNBALANCED:  # the answer of what fixes the free direction to masses that move apart
        uneven = apart * eps64 / (whole * whole)
    if WANT_A:
        share = row_sums.to(tl.float64) / tl.where(wa > 0, wa, 1.0).to(tl.float64)
        slope_a = f.to(tl.float64) + eps64 * (mass_b - 1)
        if UNBALANCED:
            slope_a = eps64 * (mass_b - share) + rho.to(tl.float64) * (1 - share)
        slope_a = slope_a * value64
        if IMPLICIT:
            slope_a += through(wa, row_sums, row_move, given_f, tau64, eps64) - uneven * share
        tl.store(da + q * n + i, tl.where(wa > 0, slope_a, 0.0).to(ACC), mask=i < n)
    if WANT_B:
        share = column_sums.to(tl.float64) / tl.where(wb > 0, wb, 1.0).to(tl.float64)
        slope_b = g.to(tl.float64) + eps64 * (mass_a - 1)
        if UNBALANCED:
            kept = tl.exp(-g.to(tl.float64) / rho.to(tl.float64))
            slope_b = eps64 * (mass_a - kept) + rho.to(tl.float64) * (1 - kept)
        slope_b = slope_b * value64
        if IMPLICIT:
            slope_b += through(wb, column_sums, column_move, given_g, tau64, eps64) + uneven * share
            if not UNBALANCED:
                slope_b += apart * (g.to(tl.float64) - eps64) / whole
        tl.store(db + q * m + j, tl.where(wb > 0, slope_b, 0.0).to(ACC), mask=j < m)
