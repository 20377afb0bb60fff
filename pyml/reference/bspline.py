"""B-splines and KAN layers in plain torch, by the Cox-de Boor recursion (de Boor, "A Practical Guide to Splines").

Shapes: x ``[..., in]``, grid ``[in, G + 2k + 1]`` or one shared row ``[G + 2k + 1]``, basis ``[..., in, G + k]``.
Read this file before the kernels: they compute the same numbers without ever storing the basis.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EXTRAPOLATIONS = ("zero", "clamp", "linear")
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def check_knots(op: str, grid: Tensor, *results: Tensor) -> None:
    """Refuse knots that do not ascend, or so large that differences overflow: as the CPU kernels do, where knots can be
    read without a wait and there are results."""
    if grid.device.type != "cpu" or torch.compiler.is_compiling() or not all(t.numel() for t in results):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(grid):
        return
    most = torch.finfo(grid.dtype).max / 4
    if not ((grid[..., 1:] >= grid[..., :-1]).all() and (grid.abs() <= most).all()):
        expected = "finite knots in ascending order, none beyond a quarter of the largest number"
        raise ValueError(f"{op}: grid: expected {expected}, got {grid.flatten().tolist()[:32]}")


def interval(x: Tensor, grid: Tensor, order: int, extrapolation: str) -> tuple[Tensor, Tensor]:
    """Index of the knot interval of each x ``[..., in]`` and whether x lies inside it; NaN counts as inside.

    Intervals are half-open, [t_j, t_j+1), and those of zero width are never chosen. The last knot belongs to the last
    interval of positive width where it is repeated. Outside the extended knots nothing is chosen ("zero"), or the
    nearest inner interval of [grid[k], grid[-k-1]] ("clamp", "linear"), where one has a width.
    """
    last = grid.shape[-1] - 2
    j = (x.unsqueeze(-1) >= grid).sum(-1) - 1
    positive = grid[..., 1:] > grid[..., :-1]
    index = torch.arange(last + 1, device=x.device)
    low, high = (0, last) if extrapolation == "zero" else (order, last - order)
    inner = positive & (index >= low) & (index <= high)
    first_wide = torch.where(inner, index, last).amin(-1)
    last_wide = torch.where(inner, index, 0).amax(-1)
    outside = (x < grid[..., 0]) | (x >= grid[..., -1])
    closed = (x == grid[..., -1]) & (grid[..., -1] == grid[..., -2])
    inside = ~outside | closed
    if extrapolation != "zero":
        inside = inner.any(-1).expand_as(inside)
    return torch.minimum(torch.maximum(j, first_wide), last_wide), inside


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0: a term over repeated knots vanishes."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def _basis(x: Tensor, grid: Tensor, chosen: Tensor, order: int, derivative: int) -> Tensor:
    """Basis of one order, or its derivative, from the basis of the next lower order."""
    if order == 0:
        return chosen if derivative == 0 else torch.zeros_like(chosen)
    left, right = grid[..., : -(order + 1)], grid[..., order + 1 :]
    left_width, right_width = grid[..., order:-1] - left, right - grid[..., 1:-order]
    if derivative:
        lower = _basis(x, grid, chosen, order - 1, derivative - 1)
        return order * (_over(lower[..., :-1], left_width) - _over(lower[..., 1:], right_width))
    lower = _basis(x, grid, chosen, order - 1, 0)
    x = x.unsqueeze(-1)
    return _over((x - left) * lower[..., :-1], left_width) + _over((right - x) * lower[..., 1:], right_width)


def bspline_basis(
    x: Tensor,
    grid: Tensor,
    order: int = 3,
    derivative: int = 0,
    extrapolation: str = "zero",
) -> Tensor:
    """All basis functions at x: ``[..., in] -> [..., in, G + k]``, or their derivative of any degree."""
    dtype, x, grid = x.dtype, wide(x, grid), wide(grid, x).detach()  # no backend has a gradient to the knots
    check_knots("bspline_basis", grid, x)
    return _functions(x, grid, order, derivative, extrapolation).to(dtype)


def _functions(x: Tensor, grid: Tensor, order: int, derivative: int, extrapolation: str) -> Tensor:
    """`bspline_basis` of x and knots in one dtype."""
    j, inside = interval(x, grid, order, extrapolation)
    chosen = (j.unsqueeze(-1) == torch.arange(grid.shape[-1] - 1, device=x.device)).to(x.dtype)  # one_hot has no vmap
    chosen = chosen * inside.unsqueeze(-1)
    if extrapolation == "zero":
        x = torch.where(inside, x, grid[..., 0])  # an infinite x must not turn 0 * x into NaN
        return _basis(x, grid, chosen, order, derivative)
    low, high = grid[..., order], grid[..., -order - 1]
    nearest = torch.where(x < low, low, torch.where(x > high, high, x))  # slope 1 at the ends, as in the kernels
    beyond = (x != nearest).unsqueeze(-1)
    basis = _basis(nearest, grid, chosen, order, derivative)
    if extrapolation == "linear" and derivative == 0:
        slope = _basis(nearest, grid, chosen, order, 1)
        basis = basis + torch.where(beyond, (x - nearest).unsqueeze(-1) * slope, 0)
    if derivative > (1 if extrapolation == "linear" else 0):
        basis = torch.where(beyond & ~x.isnan().unsqueeze(-1), 0, basis)
    return basis


def wide(a: Tensor, *others: Tensor | None) -> Tensor:
    """``a`` in the dtype that ops compute in: float64 when any input has it, else float32."""
    double = any(t.dtype == torch.float64 for t in (a, *others) if t is not None)
    return a.to(torch.float64 if double else torch.float32)


def kan_linear(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None = None,
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
) -> Tensor:
    """y[o] = sum_i base(x[i]) base_weight[o, i] + sum_i sum_b coeff[o, i, b] B_b(x[i]) (Liu et al., KAN, eq. 2.10)."""
    xc = wide(x, grid, coeff, base_weight)
    knots = wide(grid, xc).detach()
    check_knots("kan_linear", knots, xc, coeff)
    basis = _functions(xc, knots, order, 0, extrapolation)
    y = torch.einsum("...ib,oib->...o", basis, coeff.to(xc.dtype))
    if base_weight is not None:
        y = y + F.linear(BASES[base](xc), base_weight.to(xc.dtype))
    return y.to(x.dtype)


def wkan_linear(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None,
    scaler: Tensor,
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
    op: str = "wkan_linear",  # or that which has these rows for its patches
) -> Tensor:
    """y[o] = sum_i base(x[i]) base_weight[o, i] + s_i(x[i]) scaler[o, i], one spline s_i an input (SpectralKAN)."""
    xc = wide(x, grid, coeff, base_weight, scaler)
    knots = wide(grid, xc).detach()
    check_knots(op, knots, xc, scaler)
    spline = (_functions(xc, knots, order, 0, extrapolation) * coeff.to(xc.dtype)).sum(-1)
    y = F.linear(spline, scaler.to(xc.dtype))
    if base_weight is not None:
        y = y + F.linear(BASES[base](xc), base_weight.to(xc.dtype))
    return y.to(x.dtype)


def patches(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """x ``[N, C, H, W]`` -> every patch as a row, ``[N, H', W', C * kh * kw]``, taps in the order of torch's unfold."""
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    x = x.unfold(2, (kh - 1) * dh + 1, sh).unfold(3, (kw - 1) * dw + 1, sw)[..., ::dh, ::dw]
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3)


def wkan_conv2d(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None,
    scaler: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
) -> Tensor:
    """wkan_linear on every patch of x ``[N, C, H, W]`` -> ``[N, out, H', W']``, by forming the patches."""
    rows = patches(x, kernel_size, stride, dilation)
    y = wkan_linear(rows, grid, coeff, base_weight, scaler, order, base, extrapolation, "wkan_conv2d")
    return y.permute(0, 3, 1, 2)
