"""Triton kernels of `pairwise_cost`: costs between clouds of points, and their gradient.

Tiles have one shape whatever the sizes, so that the order of a sum over coordinates depends on their number alone.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch
from pyml.triton_kernels.batched_ot_host import LANGUAGE, lead
from pyml.triton_kernels.batched_ot_math import SMALLEST, entries, finite, start_of
from torch import Tensor

BLOCKS = {"BLOCK": 32, "BLOCK_K": 16}
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def pairwise_points_kernel(
    x, scale, inner, outer_stride, inner_stride, stride_n, stride_k, n, d, COSINE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 / length of each point for cosines, else 1; NaN for one that is not finite."""
    blocks = tl.cdiv(n, BLOCK)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = start_of(x, q, inner, outer_stride, inner_stride)
    square = tl.zeros((BLOCK,), ACC)
    odd = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, d, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = entries(at, i, k, (i < n)[:, None] & (k < d)[None, :], stride_n, stride_k, ACC)
        square += tl.sum(v * v, 1)
        odd += tl.sum(finite(v, ACC).to(tl.int32) ^ 1, 1)
    found = tl.full((BLOCK,), 1.0, ACC)
    if COSINE:
        found = 1.0 / tl.sqrt(square + SMALLEST)
    tl.store(scale + q * n + i, tl.where(odd > 0, float("nan"), found), mask=i < n)


@triton.jit
def pairwise_cost_fwd_kernel(
    x, y, scale_x, scale_y, cost, x_inner, x_outer_stride, x_inner_stride, x_n, x_k,
    y_inner, y_outer_stride, y_inner_stride, y_m, y_k, n, m, d,
    COSINE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(n, BLOCK), tl.cdiv(m, BLOCK)
    q = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    i = tl.program_id(0) // columns % rows * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    x_at = start_of(x, q, x_inner, x_outer_stride, x_inner_stride)
    y_at = start_of(y, q, y_inner, y_outer_stride, y_inner_stride)
    sx = tl.load(scale_x + q * n + i, mask=i < n, other=0.0)
    sy = tl.load(scale_y + q * m + j, mask=j < m, other=0.0)
    total = tl.zeros((BLOCK, BLOCK), ACC)
    for k0 in range(0, d, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        xs = entries(x_at, i, k, (i < n)[:, None] & (k < d)[None, :], x_n, x_k, ACC)
        ys = entries(y_at, j, k, (j < m)[:, None] & (k < d)[None, :], y_m, y_k, ACC)
        if COSINE:
            total += tl.sum((xs * sx[:, None])[:, None, :] * (ys * sy[:, None])[None, :, :], 2)
        else:
            apart = xs[:, None, :] - ys[None, :, :]
            total += tl.sum(apart * apart, 2)
    if COSINE:
        total = 1.0 - total
    lost = (sx != sx)[:, None] | (sy != sy)[None, :]
    place = (q * n + i.to(tl.int64)[:, None]) * m + j.to(tl.int64)[None, :]
    tl.store(cost + place, tl.where(lost, float("nan"), total), mask=(i < n)[:, None] & (j < m)[None, :])


@triton.jit
def pairwise_cost_bwd_kernel(
    x, y, scale_x, scale_y, cost, grad, dx, x_inner, x_outer_stride, x_inner_stride, x_n, x_k,
    y_inner, y_outer_stride, y_inner_stride, y_m, y_k,
    g_inner, g_outer_stride, g_inner_stride, g_n, g_m, c_n, c_m, n, m, d,
    COSINE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of points and coordinates: a sum over the other points. Costs of lost points are NaN."""
    rows, columns = tl.cdiv(n, BLOCK), tl.cdiv(d, BLOCK_K)
    q = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    i = tl.program_id(0) // columns % rows * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(0) % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    x_at = start_of(x, q, x_inner, x_outer_stride, x_inner_stride)
    y_at = start_of(y, q, y_inner, y_outer_stride, y_inner_stride)
    g_at = start_of(grad, q, g_inner, g_outer_stride, g_inner_stride)
    inside = (i < n)[:, None] & (k < d)[None, :]
    xs = entries(x_at, i, k, inside, x_n, x_k, ACC)
    sx = tl.load(scale_x + q * n + i, mask=i < n, other=0.0)
    total = tl.zeros((BLOCK, BLOCK_K), ACC)
    along = tl.zeros((BLOCK,), ACC)
    for j0 in range(0, m, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        both = (i < n)[:, None] & (j < m)[None, :]
        c = entries(cost + q * n * m, i, j, both, c_n, c_m, ACC)
        g = tl.where(c == c, entries(g_at, i, j, both, g_n, g_m, ACC), 0.0)
        sy = tl.load(scale_y + q * m + j, mask=j < m, other=0.0)
        ys = entries(y_at, j, k, (j < m)[:, None] & (k < d)[None, :], y_m, y_k, ACC)
        ys = tl.where((sy == sy)[:, None], ys * sy[:, None], 0.0)
        if COSINE:
            total += tl.sum(g[:, :, None] * ys[None, :, :], 1)
            along += tl.sum(g * tl.where(c == c, 1.0 - c, 0.0), 1)
        else:
            total += tl.sum(g[:, :, None] * (ys[None, :, :] - xs[:, None, :]), 1)
    slope = sx[:, None] * (sx[:, None] * xs * along[:, None] - total) if COSINE else -2.0 * total
    slope = tl.where((sx == sx)[:, None], slope, 0.0)
    place = (q * n + i.to(tl.int64)[:, None]) * d + k.to(tl.int64)[None, :]
    tl.store(dx + place, slope.to(dx.dtype.element_ty), mask=inside)


class _Cloud:
    """One cloud where it lies, and the scales of its points."""

    def __init__(self, t: Tensor, kind: str, wide: torch.dtype) -> None:
        self.given = t
        self.points, place = lead(t)
        self.place = (*place, self.points.stride(-2), self.points.stride(-1))
        self.scale = torch.empty(t.shape[:-1], dtype=wide, device=t.device)
        self.constants = {"COSINE": kind == "cosine", "ACC": LANGUAGE[wide], **BLOCKS, **OPTIONS}
        grid = t.shape[:-2].numel() * triton.cdiv(t.shape[-2], BLOCKS["BLOCK"])
        launch(
            pairwise_points_kernel, (grid,),
            self.points, self.scale, *self.place, t.shape[-2], t.shape[-1], **self.constants,
        )  # fmt: skip


def _clouds(x: Tensor, y: Tensor, kind: str) -> tuple[_Cloud, _Cloud, torch.dtype]:
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return _Cloud(x, kind, wide), _Cloud(y, kind, wide), wide


def _costs(of_x: _Cloud, of_y: _Cloud, wide: torch.dtype) -> Tensor:
    x, y = of_x.given, of_y.given
    cost = torch.empty((*x.shape[:-1], y.shape[-2]), dtype=wide, device=x.device)
    grid = x.shape[:-2].numel() * triton.cdiv(x.shape[-2], BLOCKS["BLOCK"]) * triton.cdiv(y.shape[-2], BLOCKS["BLOCK"])
    launch(
        pairwise_cost_fwd_kernel, (grid,),
        of_x.points, of_y.points, of_x.scale, of_y.scale, cost, *of_x.place, *of_y.place,
        x.shape[-2], y.shape[-2], x.shape[-1], **of_x.constants,
    )  # fmt: skip
    return cost


def pairwise_cost_fwd(x: Tensor, y: Tensor, kind: str) -> Tensor:
    return _costs(*_clouds(x, y, kind))


def pairwise_cost_bwd(grad: Tensor, x: Tensor, y: Tensor, kind: str, mask: list[bool]) -> tuple[Tensor, Tensor]:
    of_x, of_y, wide = _clouds(x, y, kind)
    cost = _costs(of_x, of_y, wide)
    upstream, place = lead(grad)
    found = []
    for mine, theirs, dim, wanted in ((of_x, of_y, -2, mask[0]), (of_y, of_x, -1, mask[1])):
        t, other = mine.given, theirs.given
        slope = torch.empty(t.shape if wanted else (0,), dtype=t.dtype, device=t.device)
        found.append(slope)
        if not wanted:
            continue
        grid = (
            t.shape[:-2].numel()
            * triton.cdiv(t.shape[-2], BLOCKS["BLOCK"])
            * triton.cdiv(t.shape[-1], BLOCKS["BLOCK_K"])
        )
        launch(
            pairwise_cost_bwd_kernel, (grid,),
            mine.points, theirs.points, mine.scale, theirs.scale, cost, upstream, slope, *mine.place, *theirs.place,
            *place, upstream.stride(dim), upstream.stride(-3 - dim), cost.stride(dim), cost.stride(-3 - dim),
            t.shape[-2], other.shape[-2], t.shape[-1], **mine.constants,
        )  # fmt: skip
    return found[0], found[1]
