"""`wkan_conv2d` on the kernels of bspline_wkan.py; only its gradient of x needs a kernel of its own."""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch, next_power
from pyml.triton_kernels.bspline_host import setup
from pyml.triton_kernels.bspline_math import BASES, base_slope, contract, nonzero
from pyml.triton_kernels.bspline_wkan import Geometry, backward, contiguous, forward
from torch import Tensor


@triton.jit
def wkan_conv2d_bwd_x_kernel(
    grad, x, grid, coeff, base_weight, scaler, dx,
    planes, channels, height, width, out_height, out_width, kh, kw, step_h, step_w, dil_h, dil_w,
    features, outs, functions, count, grid_row,
    ORDER: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dx of a convolution, gathered: every input pixel asks each of its taps which output pixel used it there.

    No two programs add to one address, so there is nothing to order and no patch to store.
    """
    area = height * width
    blocks = tl.cdiv(area, BLOCK_M)
    plane = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = plane % channels
    image = (plane // channels).to(tl.int64)
    at = plane.to(tl.int64) * area + pixel
    xs = tl.load(x + at, mask=pixel < area, other=0.0).to(ACC)
    slope = base_slope(xs, BASE)
    pixels = out_height * out_width
    result = tl.zeros((BLOCK_M,), ACC)
    for tap in range(0, kh * kw):
        feature = (channel * (kh * kw) + tap).to(tl.int64)
        down = pixel // width - (tap // kw) * dil_h
        across = pixel % width - (tap % kw) * dil_w
        h, w = down // step_h, across // step_w
        used = (down >= 0) & (across >= 0) & (h * step_h == down) & (w * step_w == across)
        used = used & (h < out_height) & (w < out_width) & (pixel < area)
        gs = tl.zeros((BLOCK_M, BLOCK_O), ACC)
        gb = tl.zeros((BLOCK_M, BLOCK_O), ACC)
        for o0 in range(0, outs, BLOCK_O):
            o = (o0 + tl.arange(0, BLOCK_O)).to(tl.int64)
            there = (image * outs + o[None, :]) * pixels + (h * out_width + w)[:, None]
            keep = used[:, None] & (o[None, :] < outs)
            g = tl.load(grad + there, mask=keep, other=0.0).to(ACC)
            gs += g * tl.load(scaler + o * features + feature, mask=o < outs, other=0.0).to(ACC)[None, :]
            if HAS_BASE:
                gb += g * tl.load(base_weight + o * features + feature, mask=o < outs, other=0.0).to(ACC)[None, :]
        knots = grid + feature * grid_row + tl.zeros((BLOCK_M,), tl.int32)
        first, values, rest = nonzero(xs, knots, count, ORDER, 1, MODE, STEPS)
        ds = contract(first, values, rest, coeff + feature * functions, functions, ORDER)
        result += tl.where(used, ds * tl.sum(gs, 1) + slope * tl.sum(gb, 1), 0.0)
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=pixel < area)


def conv_geometry(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> tuple[Geometry, list[int]]:
    """Geometry of a valid convolution, and its output height and width."""
    n, channels, height, width = x.shape
    sizes = [(s - (k - 1) * d - 1) // t + 1 for s, k, t, d in zip((height, width), kernel, stride, dilation)]
    area = height * width
    geometry = Geometry(
        n * sizes[0] * sizes[1], sizes[0] * sizes[1], sizes[1], channels * area, stride[0] * width, stride[1],
        kernel[0] * kernel[1], kernel[1], area, dilation[0] * width, dilation[1],
    )  # fmt: skip
    return geometry, sizes


def wkan_conv2d_fwd(
    x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None, scaler: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], order: int, base: str, extrapolation: str,
) -> Tensor:  # fmt: skip
    x, coeff, base_weight, scaler = contiguous(x, coeff, base_weight, scaler)
    geometry, sizes = conv_geometry(x, kernel_size, stride, dilation)
    y = torch.empty((x.shape[0], scaler.shape[0], *sizes), dtype=x.dtype, device=x.device)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_()
    facts = setup("wkan_conv2d", x, grid, order, extrapolation, coeff, base_weight, scaler)
    return forward(x, geometry, facts, coeff, base_weight, scaler, base, y)


def wkan_conv2d_bwd(
    grad: Tensor, x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor | None, scaler: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], order: int, base: str, extrapolation: str,
    mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    geometry, sizes = conv_geometry(x, kernel_size, stride, dilation)

    def gradient_of_x(grad, x, facts, coeff, base_weight, scaler, dx) -> None:
        outs, features = scaler.shape
        images, channels, height, width = x.shape
        block = {"BLOCK_M": 128, "BLOCK_O": min(16, next_power(outs)), "num_warps": 4, "num_stages": 2}
        launch(
            wkan_conv2d_bwd_x_kernel, (images * channels * triton.cdiv(height * width, block["BLOCK_M"]),),
            grad, x, facts.knots, coeff, scaler if base_weight is None else base_weight, scaler, dx,
            images * channels, channels, height, width, *sizes, *kernel_size, *stride, *dilation,
            features, outs, facts.functions, facts.count, facts.grid_row,
            BASE=BASES[base], HAS_BASE=base_weight is not None, **facts.constants, **block,
        )  # fmt: skip

    return backward(
        grad, x, geometry, grid, coeff, base_weight, scaler, order, base, extrapolation, mask, gradient_of_x
    )
