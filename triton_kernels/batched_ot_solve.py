"""Triton kernel of `sinkhorn_solve`, forward: a program solves one problem from the first iteration to the last.

A problem of up to 16384 entries, padded to powers of two, is one tile in registers: E = exp((f + g - C) / eps) of some
potentials is only scaled while the scalings are moderate; then the potentials take them up, or five iterations are done
again as log-sum-exps, as on a CPU (csrc/batched_ot/ot_solve_cpu.h). A larger one takes log-sum-exps block by block, and
its vectors meet in global memory.
"""

import triton
import triton.language as tl
from pyml.triton_kernels.batched_ot_math import (
    LN2,
    LOG2E,
    LOW,
    SMALLEST,
    entries,
    exp2_bounded,
    exp2_flushed,
    exponents,
    mass,
    not_finite,
    nothing_left,
    pairs,
    start_of,
    weights,
)
from pyml.triton_kernels.batched_ot_plan import plan_block


@triton.jit
def row_error(w, f, rows, rho, UNBALANCED: tl.constexpr):
    """L1 distance of the row masses from what they should be, in float64."""
    wanted = w.to(tl.float64)
    if UNBALANCED:
        wanted = wanted * tl.exp(-f.to(tl.float64) / rho.to(tl.float64))
    return tl.sum(tl.abs(rows.to(tl.float64) - wanted))


# --- one tile -------------------------------------------------------------------------------------------------------


@triton.jit
def scaling(sums, potential, damp, inv2, UNBALANCED: tl.constexpr, ACC: tl.constexpr):
    if UNBALANCED:
        return exp2_bounded(-damp * tl.log2(sums) - (1 - damp) * inv2 * potential, ACC)
    else:
        return 1.0 / sums


@triton.jit
def beyond(low, high, limit):
    """How many scalings have left the range; a NaN counts."""
    return tl.sum(((high <= limit) & (low >= 1.0 / limit)).to(tl.int32) ^ 1)


@triton.jit
def absorb(potential, w, scale, to_pot):
    least = SMALLEST if tl.float32 == scale.dtype else 2.2250738585072014e-308  # doubles are trusted far below floats
    return potential + tl.where(w > 0, to_pot * tl.log2(tl.maximum(scale, least)), 0.0)


@triton.jit
def log_update(cost, potential, w_from, w_to, damp, inv2, to_pot, ACC: tl.constexpr):
    """Potentials of the first axis as log-sum-exps over the second."""
    d, top = exponents(cost, potential, w_from)
    total = tl.sum(w_from[None, :] * exp2_bounded((d - top[:, None]) * inv2, ACC), 1)
    return tl.where(w_to > 0, -damp * (top + to_pot * tl.log2(total)), 0.0)


@triton.jit
def exponentials(cost, f, g, wa, wb, inv2, ACC: tl.constexpr):
    """E, with 1 where something is masked or does not exist: no sum vanishes."""
    return tl.where(pairs(wa, wb), exp2_flushed(((f[:, None] - cost) + g[None, :]) * inv2, ACC), 1.0)


@triton.jit
def solve_tile(
    cost, wa, wb, init, eps, rho, tol, damp, max_iter,
    UNBALANCED: tl.constexpr, STOPS: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """f, g, row masses, transport cost, iterations and whether the tolerance was reached."""
    inv2, to_pot = LOG2E / eps, LN2 * eps
    SOFT: tl.constexpr = 16777216.0 if tl.float32 == ACC else 1.766847064778384e72
    HARD: tl.constexpr = 17179869184.0 if tl.float32 == ACC else 2.037035976334486e90
    # Potentials below every cost, with a cost that they meet in each row and column: no sum of E can vanish then. The
    # scalings of the columns make up for what g is to begin with.
    _raised, top = exponents(cost, init, wb)
    f = tl.where(wa > 0, -top, 0.0)
    _raised, top = exponents(tl.trans(cost), f, wa)
    g = tl.where(wb > 0, -top, 0.0)
    e = exponentials(cost, f, g, wa, wb, inv2, ACC)
    u = tl.full((N,), 1.0, ACC)
    v = exp2_flushed((init - g) * inv2, ACC)
    done = 0
    failures = 0
    stopped = 0
    while (done < max_iter) & (stopped == 0):
        count = tl.minimum(max_iter - done, 5)
        saved = v
        low_u = tl.full((N,), 1.0, ACC)
        high_u = low_u
        low_v = tl.full((M,), 1.0, ACC)
        high_v = low_v
        hidden = 0  # sums of unbalanced problems, which their scalings do not show
        if failures < 3:
            for _step in range(0, count):
                sums = tl.sum(e * (wb * v)[None, :], 1)
                u = scaling(sums, f, damp, inv2, UNBALANCED, ACC)
                if UNBALANCED:
                    hidden += beyond(sums, sums, HARD)
                back = tl.sum(e * (wa * u)[:, None], 0)
                v = scaling(back, g, damp, inv2, UNBALANCED, ACC)
                if UNBALANCED:
                    hidden += beyond(back, back, HARD)
                low_u, low_v = tl.minimum(low_u, u), tl.minimum(low_v, v)
                high_u, high_v = tl.where(u <= high_u, high_u, u), tl.where(v <= high_v, high_v, v)
        lost = (failures >= 3) | (beyond(low_u, high_u, HARD) + beyond(low_v, high_v, HARD) + hidden > 0)
        large = beyond(low_u, high_u, SOFT) + beyond(low_v, high_v, SOFT) > 0
        if lost:
            failures += 1
            g = absorb(g, wb, saved, to_pot)
            for _step in range(0, count):
                f = log_update(cost, g, wb, wa, damp, inv2, to_pot, ACC)
                g = log_update(tl.trans(cost), f, wa, wb, damp, inv2, to_pot, ACC)
        elif large:
            f = absorb(f, wa, u, to_pot)
            g = absorb(g, wb, v, to_pot)
        if lost | large:
            e = exponentials(cost, f, g, wa, wb, inv2, ACC)
            u = tl.full((N,), 1.0, ACC)
            v = tl.full((M,), 1.0, ACC)
        done += count
        if STOPS:  # noqa: SIM102 - decided when the kernel is compiled; what follows, when it runs
            if done < max_iter:
                rows = wa * u * tl.sum(e * (wb * v)[None, :], 1)
                error = row_error(wa, absorb(f, wa, u, to_pot), rows, rho, UNBALANCED)
                stopped = (error <= tol).to(tl.int32)
    x, y = wa * u, wb * v
    rows = x * tl.sum(e * y[None, :], 1)
    spent = tl.sum((x * tl.sum(e * y[None, :] * cost, 1)).to(tl.float64))
    return absorb(f, wa, u, to_pot), absorb(g, wb, v, to_pot), rows, spent, done, stopped


# --- many blocks ----------------------------------------------------------------------------------------------------


@triton.jit
def exchange(at, value, keep):
    """Puts a vector where blocks can read it; what was there has been read."""
    tl.debug_barrier()
    tl.store(at, value, mask=keep)
    tl.debug_barrier()


@triton.jit
def log_sums(
    cost, d_stride, s_stride, D, S, potential, w, out, inv2, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[d] = log2 of sum_s w_s exp((potential_s - C_ds) / eps)."""
    for d0 in range(0, D, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), LOW, ACC)
        total = tl.zeros((BLOCK,), ACC)
        for s0 in range(0, S, BLOCK):
            s = s0 + tl.arange(0, BLOCK)
            ws = tl.load(w + s, mask=s < S, other=0.0)
            keep = (d < D)[:, None] & (ws > 0)[None, :]
            c = entries(cost, d, s, keep, d_stride, s_stride, ACC)
            x = tl.where(keep, (tl.load(potential + s, mask=s < S, other=0.0)[None, :] - c) * inv2, LOW)
            higher = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp2(top - higher) + tl.sum(ws[None, :] * tl.exp2(x - higher[:, None]), 1)
            top = higher
        tl.store(out + d, top + tl.log2(total), mask=d < D)
    tl.debug_barrier()


@triton.jit
def plan_sums(
    cost, stride_n, stride_m, n, m, f, g, wa, wb, out, spent, inv2, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = sum_j P_ij, spent[i] = sum_j P_ij C_ij."""
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), ACC)
        paid = tl.zeros((BLOCK,), ACC)
        for j0 in range(0, m, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            p, c = plan_block(cost, wa, wb, f, g, 0, i, j, n, m, stride_n, stride_m, inv2, True, True, ACC)
            total += tl.sum(p, 1)
            paid += tl.sum(p * c, 1)
        tl.store(out + i, total, mask=i < n)
        tl.store(spent + i, paid, mask=i < n)
    tl.debug_barrier()


@triton.jit
def odd_costs(cost, stride_n, stride_m, n, m, wa, wb, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """How many costs that count are not finite."""
    odd = 0
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        wi = tl.load(wa + i, mask=i < n, other=0.0)
        for j0 in range(0, m, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            keep = pairs(wi, tl.load(wb + j, mask=j < m, other=0.0))
            odd += not_finite(entries(cost, i, j, keep, stride_n, stride_m, ACC), ACC)
    return odd


@triton.jit
def solve_blocks(
    cost, stride_n, stride_m, n, m, wa, wb, init, eps, rho, tol, damp, max_iter, room,
    UNBALANCED: tl.constexpr, STOPS: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As solve_tile. `room` has weights, potentials and sums of rows [4 n], then of columns [3 m]."""
    inv2, to_pot = LOG2E / eps, LN2 * eps
    i, j = tl.arange(0, N), tl.arange(0, M)
    a, f_at, r_at, spent_at = room, room + n, room + 2 * n, room + 3 * n
    b = room + 4 * n
    g_at, c_at = b + m, b + 2 * m
    f = tl.zeros((N,), ACC)
    g = init
    exchange(g_at + j, g, j < m)
    done = 0
    stopped = 0
    while (done < max_iter) & (stopped == 0):
        log_sums(cost, stride_n, stride_m, n, m, g_at, b, r_at, inv2, ACC, BLOCK)
        f = tl.where(wa > 0, -damp * to_pot * tl.load(r_at + i, mask=i < n, other=0.0), 0.0)
        exchange(f_at + i, f, i < n)
        log_sums(cost, stride_m, stride_n, m, n, f_at, a, c_at, inv2, ACC, BLOCK)
        g = tl.where(wb > 0, -damp * to_pot * tl.load(c_at + j, mask=j < m, other=0.0), 0.0)
        exchange(g_at + j, g, j < m)
        done += 1
        if STOPS:  # noqa: SIM102 - decided when the kernel is compiled; what follows, when it runs
            if (done < max_iter) & (done % 5 == 0):
                plan_sums(cost, stride_n, stride_m, n, m, f_at, g_at, a, b, r_at, spent_at, inv2, ACC, BLOCK)
                rows = tl.load(r_at + i, mask=i < n, other=0.0)
                stopped = (row_error(wa, f, rows, rho, UNBALANCED) <= tol).to(tl.int32)
                tl.debug_barrier()
    plan_sums(cost, stride_n, stride_m, n, m, f_at, g_at, a, b, r_at, spent_at, inv2, ACC, BLOCK)
    rows = tl.load(r_at + i, mask=i < n, other=0.0)
    spent = tl.sum(tl.load(spent_at + i, mask=i < n, other=0.0).to(tl.float64))
    return f, g, rows, spent, done, stopped


# --- both -----------------------------------------------------------------------------------------------------------


@triton.jit
def sinkhorn_solve_fwd_kernel(
    cost, a, b, init, eps_at, rho_at, tol_at, value, transport, f_out, g_out, mass_out, n_iter, status, scratch,
    inner, outer_stride, inner_stride, stride_n, stride_m, n, m, max_iter, scratch_size, mass_tolerance,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_INIT: tl.constexpr, UNBALANCED: tl.constexpr, STOPS: tl.constexpr,
    SINGLE: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, N), tl.arange(0, M)
    at = start_of(cost, q, inner, outer_stride, inner_stride)
    room = scratch + q * scratch_size
    eps, rho, tol = tl.load(eps_at), tl.load(rho_at), tl.load(tol_at).to(tl.float64)
    wa, wrong_a = weights(a, q, i, n, HAS_A, ACC)
    wb, wrong_b = weights(b, q, j, m, HAS_B, ACC)
    start = tl.zeros((M,), ACC)
    if HAS_INIT:
        start = tl.load(init + q * m + j, mask=wb > 0, other=0.0).to(ACC)
    odd = wrong_a + wrong_b + not_finite(start, ACC)
    if SINGLE:
        costs = entries(at, i, j, pairs(wa, wb), stride_n, stride_m, ACC)
        odd += not_finite(costs, ACC)
    else:
        exchange(room + i, wa, i < n)
        exchange(room + 4 * n + j, wb, j < m)
        odd += odd_costs(at, stride_n, stride_m, n, m, room, room + 4 * n, ACC, BLOCK)
    if (odd > 0) | nothing_left(wa, wb):  # zeros where there is nothing to transport, NaN where numbers are bad
        nothing = tl.where(odd > 0, float("nan"), 0.0).to(ACC)
        tl.store(f_out + q * n + i, nothing + tl.zeros((N,), ACC), mask=i < n)
        tl.store(mass_out + q * n + i, nothing + tl.zeros((N,), ACC), mask=i < n)
        tl.store(g_out + q * m + j, nothing + tl.zeros((M,), ACC), mask=j < m)
        tl.store(value + q, nothing)
        tl.store(transport + q, nothing)
        tl.store(n_iter + q, 0)
        tl.store(status + q, tl.where(odd > 0, 4, 0))
    else:
        damp = tl.full((), 1.0, ACC)
        if UNBALANCED:
            damp = rho / (rho + eps)
        if SINGLE:
            f, g, rows, spent, done, stopped = solve_tile(
                costs, wa, wb, start, eps, rho, tol, damp, max_iter, UNBALANCED, STOPS, ACC, N, M
            )
        else:
            f, g, rows, spent, done, stopped = solve_blocks(
                at, stride_n, stride_m, n, m, wa, wb, start, eps, rho, tol, damp, max_iter, room,
                UNBALANCED, STOPS, ACC, N, M, BLOCK,
            )  # fmt: skip
        mass_a, mass_b = mass(wa, HAS_A), mass(wb, HAS_B)
        word = tl.zeros((), tl.int32)
        if STOPS:
            late = (stopped == 0) & ~(row_error(wa, f, rows, rho, UNBALANCED) <= tol)
            word += late.to(tl.int32)
        f, g, r = f.to(tl.float64), g.to(tl.float64), rows.to(tl.float64)
        a64, b64 = wa.to(tl.float64), wb.to(tl.float64)
        if UNBALANCED:
            price = rho.to(tl.float64)
            ratio = tl.where((a64 > 0) & (r > 0), r / tl.where(a64 > 0, a64, 1.0), 1.0)
            total = tl.sum(f * r + price * (r * tl.log(ratio) - r + a64))
            total += tl.sum(price * (b64 - b64 * tl.exp(-g / price)))
        else:
            shift = tl.sum(b64 * g) / mass_b  # so that sum b g = 0
            f = tl.where(wa > 0, f + shift, 0.0)
            g = tl.where(wb > 0, g - shift, 0.0)
            total = tl.sum(f * r) + tl.sum(g * b64)
            apart = tl.abs(mass_a - mass_b) > mass_tolerance * tl.maximum(mass_a, mass_b)
            word += 2 * apart.to(tl.int32)
        total += eps.to(tl.float64) * (mass_a * mass_b - tl.sum(r))
        tl.store(f_out + q * n + i, f.to(ACC), mask=i < n)
        tl.store(g_out + q * m + j, g.to(ACC), mask=j < m)
        tl.store(mass_out + q * n + i, rows, mask=i < n)
        tl.store(value + q, total.to(ACC))
        tl.store(transport + q, spent.to(ACC))
        tl.store(n_iter + q, done)
        tl.store(status + q, word)
