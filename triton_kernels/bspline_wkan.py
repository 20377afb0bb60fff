"""Triton kernels of `wkan_linear`, shared with `wkan_conv2d`: y = base(x) Wb^T + s(x) Ws^T, one spline s_i an input.

z = [base(x), s(x)] is formed in registers and goes into two dots. A convolution is the same map: tap i of output pixel
r lies at (offset of r) + (offset of i), and a linear layer is a convolution over images of one pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch, next_power
from pyml.triton_kernels.bspline_host import Setup, chunks, partial, setup, sum_chunks, tiles
from pyml.triton_kernels.bspline_math import BASES, base_slope, base_value, contract, dense, nonzero
from torch import Tensor

# Block shapes by kernel and kind of dot: see bspline.py. The loop of "bwd_z" over outputs has no gathers: it pipelines.
_SCALAR = {
    "fwd": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_F": 16, "num_warps": 4, "num_stages": 1},
    "bwd_z": {"BLOCK_M": 16, "BLOCK_O": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": 2},
    "bwd_weight": {"BLOCK_O": 32, "BLOCK_R": 16, "BLOCK_F": 32, "num_warps": 4, "num_stages": 1},
}
_IEEE = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 16, "num_warps": 4, "num_stages": 1},
    "bwd_z": {"BLOCK_M": 32, "BLOCK_O": 16, "BLOCK_F": 16, "num_warps": 8, "num_stages": 2},
    "bwd_weight": {"BLOCK_O": 64, "BLOCK_R": 16, "BLOCK_F": 32, "num_warps": 4, "num_stages": 1},
}
_CORE = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_F": 16, "num_warps": 4, "num_stages": 1},
    "bwd_z": {"BLOCK_M": 32, "BLOCK_O": 32, "BLOCK_F": 16, "num_warps": 8, "num_stages": 2},
    "bwd_weight": {"BLOCK_O": 64, "BLOCK_R": 32, "BLOCK_F": 32, "num_warps": 4, "num_stages": 1},
}
TILES = {80: {"scalar": _SCALAR, "ieee": _IEEE, "core16": _CORE, "core32": _CORE}}


@dataclass(frozen=True)
class Geometry:
    """Where the value of tap i of output pixel r lies; `args` are the integers that kernels take, in order."""

    rows: int  # output pixels of all images
    pixels: int  # output pixels of one image
    width: int  # output width
    image: int  # elements between images
    step_h: int  # elements between output rows
    step_w: int
    taps: int  # kh * kw
    kw: int
    plane: int  # elements between channels
    tap_h: int  # elements between kernel rows
    tap_w: int

    @property
    def args(self) -> tuple[int, ...]:
        return (
            self.rows, self.pixels, self.width, self.image, self.step_h, self.step_w,
            self.taps, self.kw, self.plane, self.tap_h, self.tap_w,
        )  # fmt: skip


@triton.jit
def pixel_offset(m, pixels, width, image, step_h, step_w):
    """Offset in x of output pixel m, int64."""
    p = m % pixels
    return (m // pixels) * image + (p // width) * step_h + (p % width) * step_w


@triton.jit
def tap_offset(f, taps, kw, plane, tap_h, tap_w):
    """Offset in x of feature f = (channel, tap), int64."""
    t = f % taps
    return (f // taps).to(tl.int64) * plane + (t // kw) * tap_h + (t % kw) * tap_w


@triton.jit
def wkan_fwd_kernel(
    x, grid, coeff, base_weight, scaler, y,
    rows, pixels, width, image, step_h, step_w, taps, kw, plane, tap_h, tap_w,
    features, outs, functions, count, grid_row,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y [images, outs, pixels] (for a linear layer: [rows, outs])."""
    blocks = tl.cdiv(outs, BLOCK_N)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    from_row = pixel_offset(m, pixels, width, image, step_h, step_w)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for f0 in range(0, features, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        real = tl.minimum(f, features - 1)
        at = from_row[:, None] + tap_offset(real, taps, kw, plane, tap_h, tap_w)[None, :]
        xs = tl.load(x + at, mask=(m[:, None] < rows) & (f[None, :] < features), other=0.0).to(ACC)
        real = real.to(tl.int64)[None, :]
        first, values, rest = nonzero(xs, grid + real * grid_row, count, ORDER, 0, MODE, STEPS)
        s = contract(first, values, rest, coeff + real * functions, functions, ORDER)
        keep = (n[:, None] < outs) & (f[None, :] < features)
        w = tl.load(scaler + n[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
        acc = tl.dot(s.to(DOT), tl.trans(w), acc, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BASE:
            w = tl.load(base_weight + n[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            z = base_value(xs, BASE).to(DOT)
            acc = tl.dot(z, tl.trans(w), acc, input_precision=PRECISION, out_dtype=ACC)
    at = ((m // pixels) * outs * pixels + m % pixels)[:, None] + n[None, :] * pixels
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < outs))


@triton.jit
def wkan_bwd_z_kernel(
    grad, x, grid, coeff, base_weight, scaler, dx, part,
    rows, pixels, width, image, step_h, step_w, taps, kw, plane, tap_h, tap_w,
    features, outs, functions, count, grid_row, chunk,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WANT_X: tl.constexpr, WANT_COEFF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of z by dots over the outputs, then dx (linear layers only) and the chunk's part of the coefficient sum.

    part [s, features, functions]. A program owns BLOCK_F features, BLOCK_C functions and the rows of one chunk.
    """
    f_blocks = tl.cdiv(features, BLOCK_F)
    f = (tl.program_id(0) % f_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    c = (tl.program_id(0) // f_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = tl.minimum(f, features - 1)
    from_tap = tap_offset(real, taps, kw, plane, tap_h, tap_w)
    real = real.to(tl.int64)[None, :]
    s = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_F, BLOCK_C), ACC)
    for r0 in range(0, chunk, BLOCK_M):
        m = s * chunk + r0 + tl.arange(0, BLOCK_M)
        from_row = (m // pixels) * outs * pixels + m % pixels
        gs = tl.zeros((BLOCK_M, BLOCK_F), ACC)
        gb = tl.zeros((BLOCK_M, BLOCK_F), ACC)
        for o0 in range(0, outs, BLOCK_O):
            o = (o0 + tl.arange(0, BLOCK_O)).to(tl.int64)
            keep = (m[:, None] < rows) & (o[None, :] < outs)
            g = tl.load(grad + from_row[:, None] + o[None, :] * pixels, mask=keep, other=0.0).to(ACC).to(DOT)
            keep = (o[:, None] < outs) & (f[None, :] < features)
            w = tl.load(scaler + o[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
            gs = tl.dot(g, w, gs, input_precision=PRECISION, out_dtype=ACC)
            if HAS_BASE and WANT_X:
                w = tl.load(base_weight + o[:, None] * features + f[None, :], mask=keep, other=0.0).to(ACC).to(DOT)
                gb = tl.dot(g, w, gb, input_precision=PRECISION, out_dtype=ACC)
        own = (m[:, None] < rows) & (f[None, :] < features)
        at = pixel_offset(m, pixels, width, image, step_h, step_w)[:, None] + from_tap[None, :]
        xs = tl.load(x + at, mask=own, other=0.0).to(ACC)
        if WANT_COEFF:
            first, values, rest = nonzero(xs, grid + real * grid_row, count, ORDER, 0, MODE, STEPS)
            acc += dense(first, values, rest, c, functions, ORDER) * gs[:, :, None]
        if WANT_X:
            first, values, rest = nonzero(xs, grid + real * grid_row, count, ORDER, 1, MODE, STEPS)
            result = contract(first, values, rest, coeff + real * functions, functions, ORDER) * gs
            if HAS_BASE:
                result += base_slope(xs, BASE) * gb
            writer = tl.full((BLOCK_M, BLOCK_F), tl.program_id(0), tl.int32) < f_blocks  # has the first functions
            tl.store(dx + at, result.to(dx.dtype.element_ty), mask=own & writer)
    if WANT_COEFF:
        at = (s * features + f.to(tl.int64))[:, None] * functions + c[None, :]
        keep = (f[:, None] < features) & (c[None, :] < functions)
        tl.store(part + at, tl.sum(acc, 0).to(part.dtype.element_ty), mask=keep)


@triton.jit
def wkan_bwd_weight_kernel(
    grad, x, grid, coeff, part_base, part_scaler,
    rows, pixels, width, image, step_h, step_w, taps, kw, plane, tap_h, tap_w,
    features, outs, functions, count, grid_row, chunk,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    WANT_BASE: tl.constexpr, WANT_SCALER: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """part[s, outs, features] = sum over the rows of chunk s of grad times base(x), and of grad times s(x)."""
    o_blocks = tl.cdiv(outs, BLOCK_O)
    o = (tl.program_id(0) % o_blocks).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    f = (tl.program_id(0) // o_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    real = tl.minimum(f, features - 1)
    from_tap = tap_offset(real, taps, kw, plane, tap_h, tap_w)
    real = real.to(tl.int64)[None, :]
    s = tl.program_id(1).to(tl.int64)
    acc_b = tl.zeros((BLOCK_O, BLOCK_F), ACC)
    acc_s = tl.zeros((BLOCK_O, BLOCK_F), ACC)
    for r0 in range(0, chunk, BLOCK_R):
        m = s * chunk + r0 + tl.arange(0, BLOCK_R)
        at = ((m // pixels) * outs * pixels + m % pixels)[:, None] + o[None, :] * pixels
        g = tl.load(grad + at, mask=(m[:, None] < rows) & (o[None, :] < outs), other=0.0).to(ACC).to(DOT)
        at = pixel_offset(m, pixels, width, image, step_h, step_w)[:, None] + from_tap[None, :]
        xs = tl.load(x + at, mask=(m[:, None] < rows) & (f[None, :] < features), other=0.0).to(ACC)
        if WANT_BASE:
            z = base_value(xs, BASE).to(DOT)
            acc_b = tl.dot(tl.trans(g), z, acc_b, input_precision=PRECISION, out_dtype=ACC)
        if WANT_SCALER:
            first, values, rest = nonzero(xs, grid + real * grid_row, count, ORDER, 0, MODE, STEPS)
            z = contract(first, values, rest, coeff + real * functions, functions, ORDER).to(DOT)
            acc_s = tl.dot(tl.trans(g), z, acc_s, input_precision=PRECISION, out_dtype=ACC)
    at = (s * outs + o)[:, None] * features + f[None, :]
    keep = (o[:, None] < outs) & (f[None, :] < features)
    if WANT_BASE:
        tl.store(part_base + at, acc_b.to(part_base.dtype.element_ty), mask=keep)
    if WANT_SCALER:
        tl.store(part_scaler + at, acc_s.to(part_scaler.dtype.element_ty), mask=keep)


# --- host ------------------------------------------------------------------------------------------------------------


def linear_geometry(rows: int, features: int) -> Geometry:
    return Geometry(rows, 1, 1, features, 0, 0, 1, 1, 1, 0, 0)


def forward(x, geometry, facts: Setup, coeff, base_weight, scaler, base, y):
    outs, features = scaler.shape
    block = tiles(TILES, x, facts.kind, "fwd")
    block["BLOCK_N"] = min(block["BLOCK_N"], max(16, next_power(outs)))
    launch(
        wkan_fwd_kernel, (triton.cdiv(geometry.rows, block["BLOCK_M"]) * triton.cdiv(outs, block["BLOCK_N"]),),
        x, facts.knots, coeff, scaler if base_weight is None else base_weight, scaler, y, *geometry.args,
        features, outs, facts.functions, facts.count, facts.grid_row,
        BASE=BASES[base], HAS_BASE=base_weight is not None, **facts.constants, **facts.dots, **block,
    )  # fmt: skip
    return y


def coeff_gradients(grad, x, geometry, facts: Setup, coeff, base_weight, scaler, base, dx, dcoeff) -> None:
    """dcoeff [in, G + k] and, for linear layers, dx; either may be None."""
    outs, features = scaler.shape
    block = tiles(TILES, x, facts.kind, "bwd_z")
    block["BLOCK_C"] = min(16, max(4, next_power(facts.functions)))
    columns = 1 if dcoeff is None else triton.cdiv(facts.functions, block["BLOCK_C"])
    count = triton.cdiv(features, block["BLOCK_F"]) * columns
    splits, chunk = chunks(geometry.rows, 4 * block["BLOCK_M"], count, 4096)
    part = x if dcoeff is None else partial(dcoeff, splits, facts.acc)
    launch(
        wkan_bwd_z_kernel, (count, splits),
        grad, x, facts.knots, coeff, scaler if base_weight is None else base_weight, scaler,
        part if dx is None else dx, part, *geometry.args,
        features, outs, facts.functions, facts.count, facts.grid_row, chunk,
        BASE=BASES[base], HAS_BASE=base_weight is not None, WANT_X=dx is not None, WANT_COEFF=dcoeff is not None,
        **facts.constants, **facts.dots, **block,
    )  # fmt: skip
    if dcoeff is not None:
        sum_chunks(part, dcoeff, facts.acc)


def weight_gradients(grad, x, geometry, facts: Setup, coeff, dbase, dscaler, base, shape) -> None:
    """dbase and dscaler [out, in]; either may be None. `kan_linear` uses it for its base branch."""
    outs, features = shape
    block = tiles(TILES, x, facts.kind, "bwd_weight")
    block["BLOCK_O"] = min(block["BLOCK_O"], max(16, next_power(outs)))
    count = triton.cdiv(outs, block["BLOCK_O"]) * triton.cdiv(features, block["BLOCK_F"])
    splits, chunk = chunks(geometry.rows, block["BLOCK_R"], count)
    part_base, part_scaler = (x if d is None else partial(d, splits, facts.acc) for d in (dbase, dscaler))
    launch(
        wkan_bwd_weight_kernel, (count, splits),
        grad, x, facts.knots, coeff, part_base, part_scaler, *geometry.args,
        features, outs, facts.functions, facts.count, facts.grid_row, chunk,
        BASE=BASES[base], WANT_BASE=dbase is not None, WANT_SCALER=dscaler is not None,
        **facts.constants, **facts.dots, **block,
    )  # fmt: skip
    for part, out in ((part_base, dbase), (part_scaler, dscaler)):
        if out is not None:
            sum_chunks(part, out, facts.acc)


def wkan_linear_fwd(
    x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None, scaler: Tensor,
    order: int, base: str, extrapolation: str,
) -> Tensor:  # fmt: skip
    outs, features = scaler.shape
    y = torch.empty((*x.shape[:-1], outs), dtype=x.dtype, device=x.device)
    if y.numel() == 0 or features == 0:
        return y.zero_()
    x, coeff, base_weight, scaler = contiguous(x, coeff, base_weight, scaler)
    facts = setup("wkan_linear", x, grid, order, extrapolation, coeff, base_weight, scaler)
    return forward(x, linear_geometry(x.numel() // features, features), facts, coeff, base_weight, scaler, base, y)


def wkan_linear_bwd(
    grad: Tensor, x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None, scaler: Tensor,
    order: int, base: str, extrapolation: str, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    geometry = linear_geometry(x.numel() // max(1, x.shape[-1]), x.shape[-1])
    return backward(grad, x, geometry, grid, coeff, base_weight, scaler, order, base, extrapolation, mask)


def backward(
    grad, x, geometry, grid, coeff, base_weight, scaler, order, base, extrapolation, mask: list[bool],
    gradient_of_x: Callable[..., None] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All gradients of `wkan_linear` or `wkan_conv2d`.

    ``gradient_of_x(grad, x, facts, coeff, base_weight, scaler, dx)`` writes that of x where rows overlap; else it comes
    with that of the coefficients.
    """
    grad, x, coeff, base_weight, scaler = contiguous(grad, x, coeff, base_weight, scaler)
    grads = gradients(x, coeff, base_weight, scaler, mask)
    if x.numel() == 0 or grad.numel() == 0:
        return tuple(g.zero_() for g in grads)
    facts = setup("wkan_linear", x, grid, order, extrapolation, coeff, base_weight, scaler)
    dx, dcoeff, dbase, dscaler = (g if want else None for g, want in zip(grads, wanted(base_weight, mask)))
    if dx is not None and gradient_of_x is not None:
        gradient_of_x(grad, x, facts, coeff, base_weight, scaler, dx)
        dx = None
    if dx is not None or dcoeff is not None:
        coeff_gradients(grad, x, geometry, facts, coeff, base_weight, scaler, base, dx, dcoeff)
    if dbase is not None or dscaler is not None:
        weight_gradients(grad, x, geometry, facts, coeff, dbase, dscaler, base, scaler.shape)
    return grads


def contiguous(*tensors):
    return tuple(None if t is None else t.contiguous() for t in tensors)


def wanted(base_weight, mask: list[bool]) -> list[bool]:
    return [mask[0], mask[1], mask[2] and base_weight is not None, mask[3]]


def gradients(x, coeff, base_weight, scaler, mask: list[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients that are wanted; empty tensors for the others."""
    inputs = (x, coeff, x if base_weight is None else base_weight, scaler)
    return tuple(torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(inputs, wanted(base_weight, mask)))
