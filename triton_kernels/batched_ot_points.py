"""Triton kernels of `pairwise_cost`: costs between clouds of points, and their gradient.

Tiles have one shape whatever the sizes, so that the order of a sum over coordinates depends on their number alone.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch
from pyml.triton_kernels.batched_ot_host import LANGUAGE, grid, located
from pyml.triton_kernels.batched_ot_math import SMALLEST, block_of, entries, finite, start_of, store_entries, within
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype

BLOCK, BLOCK_K = 32, 16
BLOCKS = {"BLOCK": BLOCK, "BLOCK_K": BLOCK_K}
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def pairwise_points_kernel(
    x, scale, inner, outer_stride, inner_stride, stride_n, stride_k, n, d, COSINE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 / length of each point for cosines, else 1; NaN for one that is not finite."""
    q, i, _ = block_of(n, 1, BLOCK, 1)
    at = start_of(x, q, inner, outer_stride, inner_stride)
    square = tl.zeros((BLOCK,), ACC)
    odd = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, d, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = entries(at, i, k, within(i, n, k, d), stride_n, stride_k, ACC)
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
    q, i, j = block_of(n, m, BLOCK, BLOCK)
    x_at = start_of(x, q, x_inner, x_outer_stride, x_inner_stride)
    y_at = start_of(y, q, y_inner, y_outer_stride, y_inner_stride)
    sx = tl.load(scale_x + q * n + i, mask=i < n, other=0.0)
    sy = tl.load(scale_y + q * m + j, mask=j < m, other=0.0)
    total = tl.zeros((BLOCK, BLOCK), ACC)
    for k0 in range(0, d, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        xs = entries(x_at, i, k, within(i, n, k, d), x_n, x_k, ACC)
        ys = entries(y_at, j, k, within(j, m, k, d), y_m, y_k, ACC)
        if COSINE:
            total += tl.sum((xs * sx[:, None])[:, None, :] * (ys * sy[:, None])[None, :, :], 2)
        else:
            apart = xs[:, None, :] - ys[None, :, :]
            total += tl.sum(apart * apart, 2)
    if COSINE:
        total = 1.0 - total
    lost = (sx != sx)[:, None] | (sy != sy)[None, :]
    store_entries(cost, q, i, j, n, m, tl.where(lost, float("nan"), total))


@triton.jit
def pairwise_cost_bwd_kernel(
    x, y, scale_x, scale_y, cost, grad, dx, x_inner, x_outer_stride, x_inner_stride, x_n, x_k,
    y_inner, y_outer_stride, y_inner_stride, y_m, y_k,
    g_inner, g_outer_stride, g_inner_stride, g_n, g_m, c_n, c_m, n, m, d,
    COSINE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of points and coordinates: a sum over the other points. Costs of lost points are NaN."""
    q, i, k = block_of(n, d, BLOCK, BLOCK_K)
    x_at = start_of(x, q, x_inner, x_outer_stride, x_inner_stride)
    y_at = start_of(y, q, y_inner, y_outer_stride, y_inner_stride)
    g_at = start_of(grad, q, g_inner, g_outer_stride, g_inner_stride)
    xs = entries(x_at, i, k, within(i, n, k, d), x_n, x_k, ACC)
    sx = tl.load(scale_x + q * n + i, mask=i < n, other=0.0)
    total = tl.zeros((BLOCK, BLOCK_K), ACC)
    along = tl.zeros((BLOCK,), ACC)
    for j0 in range(0, m, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        both = within(i, n, j, m)
        c = entries(cost + q * n * m, i, j, both, c_n, c_m, ACC)
        g = tl.where(c == c, entries(g_at, i, j, both, g_n, g_m, ACC), 0.0)
        sy = tl.load(scale_y + q * m + j, mask=j < m, other=0.0)
        ys = entries(y_at, j, k, within(j, m, k, d), y_m, y_k, ACC)
        ys = tl.where((sy == sy)[:, None], ys * sy[:, None], 0.0)
        if COSINE:
            total += tl.sum(g[:, :, None] * ys[None, :, :], 1)
            along += tl.sum(g * tl.where(c == c, 1.0 - c, 0.0), 1)
        else:
            total += tl.sum(g[:, :, None] * (ys[None, :, :] - xs[:, None, :]), 1)
    slope = sx[:, None] * (sx[:, None] * xs * along[:, None] - total) if COSINE else -2.0 * total
    store_entries(dx, q, i, k, n, d, tl.where((sx == sx)[:, None], slope, 0.0))


class _Cloud:
    """One cloud where it lies, and the scales of its points."""

    def __init__(self, t: Tensor, kind: str, wide: torch.dtype) -> None:
        self.points, self.place = located(t)
        self.batch, (self.size, self.d) = t.shape[:-2].numel(), t.shape[-2:]
        self.scale = torch.empty(t.shape[:-1], dtype=wide, device=t.device)
        self.constants = {"COSINE": kind == "cosine", "ACC": LANGUAGE[wide], **BLOCKS, **OPTIONS}
        launch(
            pairwise_points_kernel, grid(self.batch, self.size, 1, BLOCK, 1),
            self.points, self.scale, *self.place, self.size, self.d, **self.constants,
        )  # fmt: skip


def _costs(of_x: _Cloud, of_y: _Cloud) -> Tensor:
    cost = of_x.scale.new_empty((*of_x.scale.shape, of_y.size))
    launch(
        pairwise_cost_fwd_kernel, grid(of_x.batch, of_x.size, of_y.size, BLOCK, BLOCK),
        of_x.points, of_y.points, of_x.scale, of_y.scale, cost, *of_x.place, *of_y.place,
        of_x.size, of_y.size, of_x.d, **of_x.constants,
    )  # fmt: skip
    return cost


def _pull(mine: _Cloud, theirs: _Cloud, cost: Tensor, grad: Tensor) -> Tensor:
    """The gradient of one cloud; `cost` and `grad` have its points as rows."""
    slope = torch.empty(mine.points.shape, dtype=mine.points.dtype, device=cost.device)
    upstream, place = located(grad)
    launch(
        pairwise_cost_bwd_kernel, grid(mine.batch, mine.size, mine.d, BLOCK, BLOCK_K),
        mine.points, theirs.points, mine.scale, theirs.scale, cost, upstream, slope, *mine.place, *theirs.place,
        *place, cost.stride(-2), cost.stride(-1), mine.size, theirs.size, mine.d, **mine.constants,
    )  # fmt: skip
    return slope


def pairwise_cost_fwd(x: Tensor, y: Tensor, kind: str) -> Tensor:
    wide = compute_dtype(x, y)
    return _costs(_Cloud(x, kind, wide), _Cloud(y, kind, wide))


def pairwise_cost_bwd(grad: Tensor, x: Tensor, y: Tensor, kind: str, mask: list[bool]) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(x, y)
    of_x, of_y = _Cloud(x, kind, wide), _Cloud(y, kind, wide)
    cost = _costs(of_x, of_y)
    dx = _pull(of_x, of_y, cost, grad) if mask[0] else x.new_empty(0)
    dy = _pull(of_y, of_x, cost.mT, grad.mT) if mask[1] else y.new_empty(0)
    return dx, dy
