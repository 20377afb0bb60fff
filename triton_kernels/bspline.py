"""Triton kernels of the B-spline family: `bspline_basis` and `kan_linear`; WKAN is in bspline_wkan.py, bspline_conv.py.

The basis never reaches memory. A KAN program makes the basis of BLOCK_F features in registers, spreads it over BLOCK_C
columns each, and feeds the tile [rows, BLOCK_F * BLOCK_C] to a dot. Wide bases take several column blocks, so the work
grows with G + k and nothing is padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch, next_power
from pyml.triton_kernels.bspline_conv import wkan_conv2d_bwd, wkan_conv2d_fwd
from pyml.triton_kernels.bspline_host import chunks, partial, setup, sum_chunks, tiles
from pyml.triton_kernels.bspline_math import BASES, base_slope, base_value, dense, nonzero
from pyml.triton_kernels.bspline_wkan import linear_geometry, weight_gradients, wkan_linear_bwd, wkan_linear_fwd
from torch import Tensor

# Block shapes by kernel and kind of dot (bspline_host.Setup), from compute capability 80 on; a table under a higher
# number replaces them from there. Chosen by the compiler's report for sm_90: no spilled registers at 16384x1024->1024.
# Loops that gather knots beside a dot have one stage: pipelining a chain of dependent gathers spilled kilobytes.
_SCALAR = {
    "fwd": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_F": 4, "BLOCK_C": 8, "BLOCK_B": 16, "num_warps": 4, "num_stages": 2},
    "bwd_x": {"BLOCK_M": 32, "BLOCK_O": 16, "BLOCK_F": 16, "BLOCK_C": 4, "num_warps": 4, "num_stages": 2},
    "bwd_coeff": {"BLOCK_O": 32, "BLOCK_R": 16, "BLOCK_F": 8, "BLOCK_C": 8, "num_warps": 8, "num_stages": 1},
}
_IEEE = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 4, "BLOCK_C": 8, "BLOCK_B": 16, "num_warps": 4, "num_stages": 2},
    "bwd_x": {"BLOCK_M": 64, "BLOCK_O": 16, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 2},
    "bwd_coeff": {"BLOCK_O": 64, "BLOCK_R": 16, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 1},
}
_CORE16 = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_F": 8, "BLOCK_C": 8, "BLOCK_B": 32, "num_warps": 8, "num_stages": 3},
    "bwd_x": {"BLOCK_M": 64, "BLOCK_O": 32, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 3},
    "bwd_coeff": {"BLOCK_O": 64, "BLOCK_R": 16, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 1},
}
_CORE32 = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_F": 4, "BLOCK_C": 8, "BLOCK_B": 32, "num_warps": 8, "num_stages": 2},
    "bwd_x": {"BLOCK_M": 64, "BLOCK_O": 16, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 2},
    "bwd_coeff": {"BLOCK_O": 64, "BLOCK_R": 16, "BLOCK_F": 16, "BLOCK_C": 8, "num_warps": 8, "num_stages": 1},
}
TILES = {80: {"scalar": _SCALAR, "ieee": _IEEE, "core16": _CORE16, "core32": _CORE32}}


# --- basis -----------------------------------------------------------------------------------------------------------


@triton.jit
def basis_of_block(
    x, grid, size, features, count, grid_row,
    ORDER: tl.constexpr, DERIVATIVE: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The elements e of this program, over rows and features, and the functions that are not 0 there."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_E
    e = start + tl.arange(0, BLOCK_E)
    feature = ((start % features).to(tl.int32) + tl.arange(0, BLOCK_E)) % features
    value = tl.load(x + e, mask=e < size, other=0.0).to(ACC)
    knots = grid + feature.to(tl.int64) * grid_row
    first, values, rest = nonzero(value[:, None], knots[:, None], count, ORDER, DERIVATIVE, MODE, STEPS)
    return e, first, values, rest


@triton.jit
def bspline_basis_fwd_kernel(
    x, grid, y, size, features, functions, count, grid_row,
    ORDER: tl.constexpr, DERIVATIVE: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[e, c] = function c of x[e]."""
    e, first, values, rest = basis_of_block(
        x, grid, size, features, count, grid_row, ORDER, DERIVATIVE, MODE, STEPS, ACC, BLOCK_E
    )
    for c0 in range(0, functions, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        tile = tl.reshape(dense(first, values, rest, c, functions, ORDER), (BLOCK_E, BLOCK_C))
        keep = (e[:, None] < size) & (c[None, :] < functions)
        tl.store(y + e[:, None] * functions + c[None, :], tile.to(y.dtype.element_ty), mask=keep)


@triton.jit
def bspline_basis_bwd_kernel(
    grad, x, grid, dx, size, features, functions, count, grid_row,
    ORDER: tl.constexpr, DERIVATIVE: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[e] = sum_c grad[e, c] * function c of x[e], where DERIVATIVE is one more than in the forward."""
    e, first, values, rest = basis_of_block(
        x, grid, size, features, count, grid_row, ORDER, DERIVATIVE, MODE, STEPS, ACC, BLOCK_E
    )
    acc = tl.zeros((BLOCK_E, BLOCK_C), ACC)
    for c0 in range(0, functions, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        tile = tl.reshape(dense(first, values, rest, c, functions, ORDER), (BLOCK_E, BLOCK_C))
        keep = (e[:, None] < size) & (c[None, :] < functions)
        acc += tile * tl.load(grad + e[:, None] * functions + c[None, :], mask=keep, other=0.0).to(ACC)
    tl.store(dx + e, tl.sum(acc, 1).to(dx.dtype.element_ty), mask=e < size)


def _basis(kernel, sources, grid, order, derivative, extrapolation, out):
    x = sources[-1]
    facts = setup("bspline_basis", x, grid, order, extrapolation)
    block = {"BLOCK_E": 128, "BLOCK_C": 8, "num_warps": 4, "num_stages": 2}
    launch(
        kernel, (triton.cdiv(x.numel(), block["BLOCK_E"]),),
        *sources[:-1], x, facts.knots, out, x.numel(), x.shape[-1], facts.functions, facts.count, facts.grid_row,
        DERIVATIVE=derivative, **facts.constants, **block,
    )  # fmt: skip
    return out


def bspline_basis_fwd(x: Tensor, grid: Tensor, order: int, derivative: int, extrapolation: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty((*x.shape, grid.shape[-1] - order - 1), dtype=x.dtype, device=x.device)
    return _basis(bspline_basis_fwd_kernel, (x,), grid, order, derivative, extrapolation, y)


def bspline_basis_bwd(
    grad: Tensor, x: Tensor, grid: Tensor, order: int, derivative: int, extrapolation: str, mask: list[bool]
) -> Tensor:
    if not mask[0]:
        return x.new_empty(0)
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    if derivative >= order:  # the highest derivative is constant between knots
        return dx.zero_()
    return _basis(bspline_basis_bwd_kernel, (grad, x), grid, order, derivative + 1, extrapolation, dx)


# --- KAN -------------------------------------------------------------------------------------------------------------


@triton.jit
def kan_linear_fwd_kernel(
    x, grid, packed, base_weight, y, rows, features, outs, functions, count, grid_row,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """y [rows, outs] from x [rows, features]; packed is the coefficients as [features, functions, outs]."""
    blocks = tl.cdiv(outs, BLOCK_N)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if HAS_BASE:
        for f0 in range(0, features, BLOCK_B):
            f = f0 + tl.arange(0, BLOCK_B)
            keep = (m[:, None] < rows) & (f[None, :] < features)
            xb = tl.load(x + m[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC)
            keep = (n[:, None] < outs) & (f[None, :] < features)
            w = tl.load(base_weight + n[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            z = base_value(xb, BASE).to(DOT)
            acc = tl.dot(z, tl.trans(w), acc, input_precision=PRECISION, out_dtype=ACC)
    k = tl.arange(0, BLOCK_F * BLOCK_C)
    for f0 in range(0, features, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        real = (m[:, None] < rows) & (f[None, :] < features)
        xs = tl.load(x + m[:, None] * features + f[None, :], mask=real, other=0.0).to(ACC)
        knots = grid + tl.minimum(f, features - 1).to(tl.int64)[None, :] * grid_row
        first, values, rest = nonzero(xs, knots, count, ORDER, 0, MODE, STEPS)
        for c0 in range(0, functions, BLOCK_C):
            tile = dense(first, values, rest, c0 + tl.arange(0, BLOCK_C), functions, ORDER)
            b = tl.reshape(tile, (BLOCK_M, BLOCK_F * BLOCK_C)).to(DOT)
            kf, kc = f0 + k // BLOCK_C, c0 + k % BLOCK_C
            there = ((kf < features) & (kc < functions))[:, None] & (n[None, :] < outs)
            at = (kf.to(tl.int64) * functions + kc)[:, None] * outs + n[None, :]
            c = tl.load(packed + at, mask=there, other=0.0)
            acc = tl.dot(b, c, acc, input_precision=PRECISION, out_dtype=ACC)
    keep = (m[:, None] < rows) & (n[None, :] < outs)
    tl.store(y + m[:, None] * outs + n[None, :], acc.to(y.dtype.element_ty), mask=keep)


@triton.jit
def kan_linear_bwd_x_kernel(
    grad, x, grid, packed, base_weight, dx, rows, features, outs, functions, count, grid_row,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [rows, features]: grad times the coefficients of every column, then times the derivative of its function."""
    blocks = tl.cdiv(features, BLOCK_F)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    f0 = (tl.program_id(0) % blocks) * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    own = (m[:, None] < rows) & (f[None, :] < features)
    xs = tl.load(x + m[:, None] * features + f[None, :], mask=own, other=0.0).to(ACC)
    knots = grid + tl.minimum(f, features - 1).to(tl.int64)[None, :] * grid_row
    first, values, rest = nonzero(xs, knots, count, ORDER, 1, MODE, STEPS)
    result = tl.zeros((BLOCK_M, BLOCK_F), ACC)
    if HAS_BASE:
        for o0 in range(0, outs, BLOCK_O):
            o = (o0 + tl.arange(0, BLOCK_O)).to(tl.int64)
            keep = (m[:, None] < rows) & (o[None, :] < outs)
            g = tl.load(grad + m[:, None] * outs + o[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            keep = (o[:, None] < outs) & (f[None, :] < features)
            w = tl.load(base_weight + o[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            result = tl.dot(g, w, result, input_precision=PRECISION, out_dtype=ACC)
        result = result * base_slope(xs, BASE)
    k = tl.arange(0, BLOCK_F * BLOCK_C)
    for c0 in range(0, functions, BLOCK_C):
        kf, kc = f0 + k // BLOCK_C, c0 + k % BLOCK_C
        column = (kf < features) & (kc < functions)
        at = (kf.to(tl.int64) * functions + kc) * outs
        acc = tl.zeros((BLOCK_M, BLOCK_F * BLOCK_C), ACC)
        for o0 in range(0, outs, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            keep = (m[:, None] < rows) & (o[None, :] < outs)
            g = tl.load(grad + m[:, None] * outs + o[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            w = tl.load(packed + at[:, None] + o[None, :], mask=column[:, None] & (o[None, :] < outs), other=0.0)
            acc = tl.dot(g, tl.trans(w), acc, input_precision=PRECISION, out_dtype=ACC)
        tile = dense(first, values, rest, c0 + tl.arange(0, BLOCK_C), functions, ORDER)
        result += tl.sum(tile * tl.reshape(acc, (BLOCK_M, BLOCK_F, BLOCK_C)), 2)
    tl.store(dx + m[:, None] * features + f[None, :], result.to(dx.dtype.element_ty), mask=own)


@triton.jit
def kan_linear_bwd_coeff_kernel(
    grad, x, grid, part, rows, features, outs, functions, count, grid_row, chunk,
    ORDER: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[s, outs, features, functions]: sum over the rows of chunk s of grad times function."""
    o_blocks, f_blocks = tl.cdiv(outs, BLOCK_O), tl.cdiv(features, BLOCK_F)
    tile_id = tl.program_id(0)
    o = (tile_id % o_blocks).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    f0 = (tile_id // o_blocks % f_blocks) * BLOCK_F
    c0 = (tile_id // (o_blocks * f_blocks)) * BLOCK_C
    f = f0 + tl.arange(0, BLOCK_F)
    knots = grid + tl.minimum(f, features - 1).to(tl.int64)[None, :] * grid_row
    s = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_O, BLOCK_F * BLOCK_C), ACC)
    for r0 in range(0, chunk, BLOCK_R):
        m = s * chunk + r0 + tl.arange(0, BLOCK_R)
        keep = (m[:, None] < rows) & (o[None, :] < outs)
        g = tl.load(grad + m[:, None] * outs + o[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
        keep = (m[:, None] < rows) & (f[None, :] < features)
        xs = tl.load(x + m[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC)
        first, values, rest = nonzero(xs, knots, count, ORDER, 0, MODE, STEPS)
        tile = dense(first, values, rest, c0 + tl.arange(0, BLOCK_C), functions, ORDER)
        b = tl.reshape(tile, (BLOCK_R, BLOCK_F * BLOCK_C)).to(DOT)
        acc = tl.dot(tl.trans(g), b, acc, input_precision=PRECISION, out_dtype=ACC)
    k = tl.arange(0, BLOCK_F * BLOCK_C)
    kf, kc = f0 + k // BLOCK_C, c0 + k % BLOCK_C
    keep = (o[:, None] < outs) & ((kf < features) & (kc < functions))[None, :]
    at = ((s * outs + o)[:, None] * features + kf[None, :]) * functions + kc[None, :]
    tl.store(part + at, acc.to(part.dtype.element_ty), mask=keep)


def _packed(coeff: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients [out, in, G + k] as [in, G + k, out]: neighbouring threads then read neighbouring outputs."""
    out, features, functions = coeff.shape
    return torch.empty((features, functions, out), dtype=dtype, device=coeff.device).copy_(coeff.permute(1, 2, 0))


def kan_linear_fwd(
    x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None, order: int, base: str, extrapolation: str
) -> Tensor:
    outs, features, functions = coeff.shape
    y = torch.empty((*x.shape[:-1], outs), dtype=x.dtype, device=x.device)
    if y.numel() == 0 or features == 0:
        return y.zero_()
    x = x.contiguous()
    weights = x if base_weight is None else base_weight.contiguous()
    rows = x.numel() // features
    facts = setup("kan_linear", x, grid, order, extrapolation, coeff, base_weight)
    block = tiles(TILES, x, facts.kind, "fwd")
    block["BLOCK_N"] = min(block["BLOCK_N"], max(16, next_power(outs)))
    launch(
        kan_linear_fwd_kernel, (triton.cdiv(rows, block["BLOCK_M"]) * triton.cdiv(outs, block["BLOCK_N"]),),
        x, facts.knots, _packed(coeff, facts.dot), weights, y,
        rows, features, outs, functions, facts.count, facts.grid_row,
        BASE=BASES[base], HAS_BASE=base_weight is not None, **facts.constants, **facts.dots, **block,
    )  # fmt: skip
    return y


def kan_linear_bwd(
    grad: Tensor, x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None,
    order: int, base: str, extrapolation: str, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outs, features, functions = coeff.shape
    x, grad = x.contiguous(), grad.contiguous()
    weights = x if base_weight is None else base_weight.contiguous()
    want_base = mask[2] and base_weight is not None
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    dcoeff = coeff.new_empty(coeff.shape) if mask[1] else coeff.new_empty(0)
    dbase = torch.empty_like(weights) if want_base else weights.new_empty(0)
    if x.numel() == 0 or outs == 0:
        return dx.zero_(), dcoeff.zero_(), dbase.zero_()
    rows = x.numel() // features
    facts = setup("kan_linear", x, grid, order, extrapolation, coeff, base_weight)
    sizes = (rows, features, outs, functions, facts.count, facts.grid_row)
    if mask[0]:
        block = tiles(TILES, x, facts.kind, "bwd_x")
        launch(
            kan_linear_bwd_x_kernel, (triton.cdiv(rows, block["BLOCK_M"]) * triton.cdiv(features, block["BLOCK_F"]),),
            grad, x, facts.knots, _packed(coeff, facts.dot), weights, dx, *sizes,
            BASE=BASES[base], HAS_BASE=base_weight is not None, **facts.constants, **facts.dots, **block,
        )  # fmt: skip
    if mask[1]:
        block = tiles(TILES, x, facts.kind, "bwd_coeff")
        block["BLOCK_O"] = min(block["BLOCK_O"], max(16, next_power(outs)))
        count = triton.cdiv(outs, block["BLOCK_O"]) * triton.cdiv(features, block["BLOCK_F"])
        count *= triton.cdiv(functions, block["BLOCK_C"])
        splits, chunk = chunks(rows, block["BLOCK_R"], count)
        part = partial(dcoeff, splits, facts.acc)
        launch(
            kan_linear_bwd_coeff_kernel, (count, splits), grad, x, facts.knots, part, *sizes, chunk,
            **facts.constants, **facts.dots, **block,
        )  # fmt: skip
        sum_chunks(part, dcoeff, facts.acc)
    if want_base:
        geometry = linear_geometry(rows, features)
        weight_gradients(grad, x, geometry, facts, x, dbase, None, base, (outs, features))
    return dx, dcoeff, dbase


__all__ = [
    "bspline_basis_bwd",
    "bspline_basis_fwd",
    "kan_linear_bwd",
    "kan_linear_fwd",
    "wkan_conv2d_bwd",
    "wkan_conv2d_fwd",
    "wkan_linear_bwd",
    "wkan_linear_fwd",
]
