"""B-spline KAN ops: `bspline_basis`, `kan_linear`, `wkan_linear`, `wkan_conv2d`.

A basis of order k over a grid of G inner intervals has G + 2k + 1 knots and G + k functions. The kernels save only x
and recompute the basis, so nothing that has a row for each input grows with G; copies and partial sums of the
coefficients do, as the coefficients themselves. Maths and edge rules: pyml/reference/bspline.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.backend import pick
from pyml.ops import _check
from pyml.ops._registry import Capability, Op
from pyml.reference import bspline as reference

EXTRAPOLATIONS = reference.EXTRAPOLATIONS
BASES = tuple(reference.BASES)
MAX_ORDER = 5


def bspline_basis(
    x: Tensor,
    grid: Tensor,
    *,
    order: int = 3,
    derivative: int = 0,
    extrapolation: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """B-spline basis functions of every input, or their derivative with respect to x.

    Args:
        x: ``[..., in]``, float32, float64, bfloat16 or float16.
        grid: knots, finite and ascending, ``[in, G + 2k + 1]`` or one shared row ``[G + 2k + 1]``. Repeated knots are
            allowed: an interval of zero width contributes 0. No gradient.
        order: polynomial degree k, 1 to 5.
        derivative: 0 for the functions themselves, 1 for the first derivative, and so on.
        extrapolation: ``"zero"`` gives 0 beyond the extended knots; ``"clamp"`` and ``"linear"`` continue from the
            inner interval [grid[k], grid[-k-1]].

    Returns:
        ``[..., in, G + k]`` in the dtype of x, computed in float32 (float64 when x or grid is float64).

    Differentiable any number of times in x (reverse mode; forward-mode derivatives raise).

    Source: de Boor, "A Practical Guide to Splines", 1978, chapter IX.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """
    if isinstance(derivative, int) and isinstance(order, int) and derivative > order:
        # Polynomials of degree k have no more to give: zeros, but as a function of x, so that autograd may pass.
        _check_basis(x, grid, order, derivative, extrapolation)
        pick(BSPLINE_BASIS, x.device.type, backend)
        return (x.nan_to_num(0, 0, 0) * 0).unsqueeze(-1).expand(*x.shape, grid.shape[-1] - order - 1).contiguous()
    return BSPLINE_BASIS(x, grid, order, derivative, extrapolation, backend=backend)


def kan_linear(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None = None,
    *,
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """KAN layer: one spline an edge. y[o] = sum_i base(x[i]) base_weight[o, i] + sum_ib coeff[o, i, b] B_b(x[i]).

    Args:
        x: ``[..., in]``, float32, float64, bfloat16 or float16.
        grid: knots, ``[in, G + 2k + 1]`` or one shared row ``[G + 2k + 1]``, finite and ascending; no gradient.
        coeff: spline coefficients ``[out, in, G + k]``.
        base_weight: ``[out, in]``, or None for no base branch.
        order: polynomial degree k, 1 to 5.
        base: ``"silu"``, ``"relu"``, ``"tanh"`` or ``"identity"``.
        extrapolation: see `bspline_basis`.

    Returns:
        ``[..., out]`` in the dtype of x, accumulated in float32 (float64 when any input is float64). Weights may have
        another floating dtype than x; each gradient has the dtype of its input.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, section 2.2.
    """
    return KAN_LINEAR(x, grid, coeff, base_weight, order, base, extrapolation, backend=backend)


def wkan_linear(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None,
    scaler: Tensor,
    *,
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """WKAN layer: one spline an input, shared by all outputs and scaled per edge.

    y[o] = sum_i base(x[i]) base_weight[o, i] + s_i(x[i]) scaler[o, i] with s_i(x) = sum_b coeff[i, b] B_b(x).

    Args:
        x: ``[..., in]``, float32, float64, bfloat16 or float16.
        grid: knots, ``[in, G + 2k + 1]`` or one shared row ``[G + 2k + 1]``, finite and ascending; no gradient.
        coeff: ``[in, G + k]``.
        base_weight: ``[out, in]``, or None for no base branch.
        scaler: ``[out, in]``.
        order, base, extrapolation: see `kan_linear`.

    Returns:
        ``[..., out]`` in the dtype of x; accumulation and dtypes as in `kan_linear`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Source: "SpectralKAN", arXiv 2407.00949.
    """
    return WKAN_LINEAR(x, grid, coeff, base_weight, scaler, order, base, extrapolation, backend=backend)


def wkan_conv2d(
    x: Tensor,
    grid: Tensor,
    coeff: Tensor,
    base_weight: Tensor | None,
    scaler: Tensor,
    *,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    order: int = 3,
    base: str = "silu",
    extrapolation: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """`wkan_linear` on every patch of an image, without ever forming the patches.

    Args:
        x: ``[N, C, H, W]``, or ``[C, H, W]``.
        grid: knots, ``[C * kh * kw, G + 2k + 1]`` or one shared row; taps in the order of ``F.unfold``.
        coeff: ``[C * kh * kw, G + k]``.
        base_weight: ``[out, C * kh * kw]``, or None.
        scaler: ``[out, C * kh * kw]``.
        kernel_size, stride, padding, dilation: int or (height, width). A padded pixel has the value of ``padding_mode``
            and goes through the spline like any other.
        padding_mode: ``"zeros"``, ``"reflect"`` or ``"replicate"``.
        order, base, extrapolation: see `kan_linear`.

    Returns:
        ``[N, out, H', W']`` (or ``[out, H', W']``) in the dtype of x; accumulation and dtypes as in `kan_linear`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Source: the spatial layer of "SpectralKAN", arXiv 2407.00949, which the paper applies to copied patches.
    """
    op = "wkan_conv2d"
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        _check.fail(op, "x", "[N, C, H, W] or [C, H, W]", list(getattr(x, "shape", [])) or type(x).__name__)
    numbers = (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    kernel, step, dilate = (pair(op, name, value, 1) for name, value in numbers)
    image = pad_image(op, x, padding, padding_mode)
    single = x.dim() == 3
    if single:
        image = image.unsqueeze(0)
    y = WKAN_CONV2D(
        image, grid, coeff, base_weight, scaler, kernel, step, dilate, order, base, extrapolation, backend=backend
    )
    return y.squeeze(0) if single else y


def outside_fraction(x: Tensor, grid: Tensor, *, order: int = 3, inner: bool = True) -> Tensor:
    """Share of inputs outside the inner grid [grid[k], grid[-k-1]], or outside the extended knots (inner=False).

    x ``[..., in]`` -> ``[in]`` in float32. A large share means that the grid should be updated
    (`KANLinear.update_grid`) or that the layer needs ``extrapolation="linear"``.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """
    _check_rows("outside_fraction", x, grid, order, "zero")
    low, high = (grid[..., order], grid[..., -order - 1]) if inner else (grid[..., 0], grid[..., -1])
    outside = (x < low) | (x > high if inner else x >= high)
    return outside.flatten(0, -2).float().mean(0) if x.dim() > 1 else outside.float()


# --- checks ---------------------------------------------------------------------------------------------------------


def pair(op: str, name: str, value: int | tuple[int, int], least: int) -> list[int]:
    """A number for both axes, or one for each: ``[height, width]``."""
    both = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        _check.fail(op, name, f"an integer or a pair of integers >= {least}", value)
    return both


def pad_image(op: str, x: Tensor, padding: int | tuple[int, int], padding_mode: str) -> Tensor:
    """The image ``[..., H, W]`` with a border: ``padding`` pixels, the same on opposite sides."""
    high, wide = pair(op, "padding", padding, 0)
    _check.member(op, "padding_mode", padding_mode, ("zeros", "reflect", "replicate"))
    if not high and not wide:
        return x
    least = [1 + p if padding_mode == "reflect" else 1 for p in (high, wide)]
    for size, p, fewest, name in zip(x.shape[-2:], (high, wide), least, ("height", "width")):
        if padding_mode != "zeros" and size < fewest:
            _check.fail(op, "padding", f"less than the {name} {size} in mode {padding_mode}", p)
    return F.pad(x, (wide, wide, high, high), mode="constant" if padding_mode == "zeros" else padding_mode)


def _check_knots(op: str, x: Tensor, features: int, grid: Tensor, order: int, extrapolation: str) -> None:
    _check.tensors(op, x, grid=grid)
    if not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        _check.fail(op, "order", f"an integer from 1 to {MAX_ORDER}", order)
    if extrapolation not in EXTRAPOLATIONS:
        _check.member(op, "extrapolation", extrapolation, EXTRAPOLATIONS)
    rows = (features,) if grid.dim() == 2 and grid.shape[0] != 1 else (1,)
    if grid.dim() not in (1, 2) or (grid.dim() == 2 and grid.shape[0] != rows[0]):
        _check.fail(op, "grid", f"shape [in = {features}, G + 2k + 1] or one row [G + 2k + 1]", list(grid.shape))
    if grid.shape[-1] < 2 * order + 2:
        _check.fail(op, "grid", f"at least 2k + 2 = {2 * order + 2} knots", grid.shape[-1])


def _check_rows(op: str, x: Tensor, grid: Tensor, order: int, extrapolation: str) -> None:
    if not isinstance(x, Tensor) or x.dim() == 0:
        _check.fail(op, "x", "a tensor [..., in]", type(x).__name__ if not isinstance(x, Tensor) else "a scalar")
    _check_knots(op, x, x.shape[-1], grid, order, extrapolation)


def _check_basis(x, grid, order, derivative, extrapolation) -> None:
    _check_rows("bspline_basis", x, grid, order, extrapolation)
    if not isinstance(derivative, int) or derivative < 0:
        _check.fail("bspline_basis", "derivative", "an integer >= 0", derivative)


def _check_kan(x, grid, coeff, base_weight, order, base, extrapolation) -> None:
    op = "kan_linear"
    _check_rows(op, x, grid, order, extrapolation)
    _check.tensors(op, x, ("base_weight",), coeff=coeff, base_weight=base_weight)
    _check.member(op, "base", base, BASES)
    nb = grid.shape[-1] - order - 1
    if coeff.dim() != 3 or coeff.shape[1] != x.shape[-1] or coeff.shape[2] != nb:
        _check.fail(op, "coeff", f"shape [out, in, G + k] = [out, {x.shape[-1]}, {nb}]", list(coeff.shape))
    if base_weight is not None:
        _check.shape(op, "base_weight", base_weight, tuple(coeff.shape[:2]), "[out, in]")


def _check_wkan_weights(op, x, features, grid, coeff, base_weight, scaler, order, base) -> None:
    _check.tensors(op, x, ("base_weight",), coeff=coeff, base_weight=base_weight, scaler=scaler)
    _check.member(op, "base", base, BASES)
    if scaler.dim() != 2 or scaler.shape[1] != features:
        _check.fail(op, "scaler", f"shape [out, in] = [out, {features}]", list(scaler.shape))
    if base_weight is not None:
        _check.shape(op, "base_weight", base_weight, tuple(scaler.shape), "[out, in]")
    _check.shape(op, "coeff", coeff, (features, grid.shape[-1] - order - 1), "[in, G + k]")


def _check_wkan(x, grid, coeff, base_weight, scaler, order, base, extrapolation) -> None:
    _check_rows("wkan_linear", x, grid, order, extrapolation)
    _check_wkan_weights("wkan_linear", x, x.shape[-1], grid, coeff, base_weight, scaler, order, base)


def _check_conv(x, grid, coeff, base_weight, scaler, kernel_size, stride, dilation, order, base, extrapolation) -> None:
    op = "wkan_conv2d"
    if not isinstance(x, Tensor) or x.dim() != 4:
        _check.fail(op, "x", "[N, C, H, W]", list(getattr(x, "shape", [])) or type(x).__name__)
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        pair(op, name, value, 1)
    for size, k, d, name in zip(x.shape[-2:], kernel_size, dilation, ("height", "width")):
        if size < (k - 1) * d + 1:
            _check.fail(op, "x", f"a padded {name} of at least {(k - 1) * d + 1}", size)
    features = x.shape[1] * kernel_size[0] * kernel_size[1]
    _check_knots(op, x, features, grid, order, extrapolation)
    _check_wkan_weights(op, x, features, grid, coeff, base_weight, scaler, order, base)


# --- registration ---------------------------------------------------------------------------------------------------


def _basis_fake(x, grid, order, derivative, extrapolation):
    return x.new_empty((*x.shape, grid.shape[-1] - order - 1))


def _kan_fake(x, grid, coeff, base_weight, order, base, extrapolation):
    return x.new_empty((*x.shape[:-1], coeff.shape[0]))


def _wkan_fake(x, grid, coeff, base_weight, scaler, order, base, extrapolation):
    return x.new_empty((*x.shape[:-1], scaler.shape[0]))


def _conv_fake(x, grid, coeff, base_weight, scaler, kernel_size, stride, dilation, order, base, extrapolation):
    sizes = [(size - (k - 1) * d - 1) // s + 1 for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation)]
    return x.new_empty((x.shape[0], scaler.shape[0], *sizes))


class _Basis(torch.autograd.Function):
    """The basis with a derivative written as the basis of the next derivative: differentiable at every order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid, order, derivative, extrapolation, backend):
        return BSPLINE_BASIS(x, grid, order, derivative, extrapolation, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx, grad):
        x, grid = ctx.saved_tensors
        order, derivative, extrapolation, backend = ctx.options
        if derivative >= order:
            return x.nan_to_num(0, 0, 0) * 0, None, None, None, None, None
        slope = _Basis.apply(x, grid, order, derivative + 1, extrapolation, backend)
        return (grad * slope).sum(-1), None, None, None, None, None


def _kan_composed(x, grid, coeff, base_weight, order, base, extrapolation, backend):
    xw = reference.wide(x, grid, coeff, base_weight)
    basis = _Basis.apply(xw, grid, order, 0, extrapolation, backend)
    y = torch.einsum("...ib,oib->...o", basis, coeff.to(xw.dtype))
    if base_weight is not None:
        y = y + F.linear(reference.BASES[base](xw), base_weight.to(xw.dtype))
    return y.to(x.dtype)


def _wkan_composed(x, grid, coeff, base_weight, scaler, order, base, extrapolation, backend):
    xw = reference.wide(x, grid, coeff, base_weight, scaler)
    spline = (_Basis.apply(xw, grid, order, 0, extrapolation, backend) * coeff.to(xw.dtype)).sum(-1)
    y = F.linear(spline, scaler.to(xw.dtype))
    if base_weight is not None:
        y = y + F.linear(reference.BASES[base](xw), base_weight.to(xw.dtype))
    return y.to(x.dtype)


def _conv_composed(
    x, grid, coeff, base_weight, scaler, kernel_size, stride, dilation, order, base, extrapolation, backend
):
    rows = reference.patches(x, kernel_size, stride, dilation)
    y = _wkan_composed(rows, grid, coeff, base_weight, scaler, order, base, extrapolation, backend)
    return y.permute(0, 3, 1, 2)


def _basis_composed(x, grid, order, derivative, extrapolation, backend):
    return _Basis.apply(x, grid, order, derivative, extrapolation, backend)


# Functional and differentiable: every op claims all that a row can claim. Sums have a fixed order, so the bits are the
# same for every number of threads. No kernel has run on a GPU yet: GPU_ORDER is by arithmetic (docs/gpu.md).
ROW = Capability(bits="any thread count")
GPU_ORDER = ("triton", "cuda")

BSPLINE_BASIS = Op(
    "bspline_basis", "bspline", reference.bspline_basis, _check_basis, _basis_fake,
    gradients=("x",), composed=_basis_composed, capability=ROW, cuda_preference=GPU_ORDER,
)  # fmt: skip
KAN_LINEAR = Op(
    "kan_linear", "bspline", reference.kan_linear, _check_kan, _kan_fake,
    gradients=("x", "coeff", "base_weight"), composed=_kan_composed, capability=ROW, cuda_preference=GPU_ORDER,
)  # fmt: skip
WKAN_LINEAR = Op(
    "wkan_linear", "bspline", reference.wkan_linear, _check_wkan, _wkan_fake,
    gradients=("x", "coeff", "base_weight", "scaler"), composed=_wkan_composed, capability=ROW,
    cuda_preference=GPU_ORDER,
)  # fmt: skip
WKAN_CONV2D = Op(
    "wkan_conv2d", "bspline", reference.wkan_conv2d, _check_conv, _conv_fake,
    gradients=("x", "coeff", "base_weight", "scaler"), composed=_conv_composed, capability=ROW,
    cuda_preference=GPU_ORDER, free_leading_dims=False,
)  # fmt: skip

__all__ = ["bspline_basis", "kan_linear", "outside_fraction", "wkan_conv2d", "wkan_linear"]
