"""Sample inputs of the B-spline family: odd sizes, every order and kind of grid, inputs inside, outside, on knots."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pyml.testing.samples import Sample

# --- grids: [rows, G + 2k + 1], or one shared row when rows is None --------------------------------------------------


def uniform(g: Generator, rows: int | None, intervals: int, order: int) -> Tensor:
    """Evenly spaced over [-1, 1] and k steps beyond; every row of its own starts a little later."""
    row = -1 + 2 / intervals * torch.arange(-order, intervals + order + 1, dtype=torch.float64)
    return row if rows is None else row + 0.01 * torch.arange(rows, dtype=torch.float64).unsqueeze(-1)


def uneven(g: Generator, rows: int | None, intervals: int, order: int) -> Tensor:
    """Random gaps, the widest about six times the narrowest."""
    gaps = 0.2 + torch.rand(*([] if rows is None else [rows]), intervals + 2 * order, generator=g, dtype=torch.float64)
    knots = torch.cat([torch.zeros_like(gaps[..., :1]), gaps.cumsum(-1)], -1)
    return 3 * (knots / knots[..., -1:]) - 1.5


def repeated(g: Generator, rows: int | None, intervals: int, order: int) -> Tensor:
    """Uneven, with one inner knot twice: an interval of zero width inside."""
    grid = uneven(g, rows, intervals, order)
    middle = order + intervals // 2
    grid[..., middle + 1] = grid[..., middle]
    return grid


def clamped(g: Generator, rows: int | None, intervals: int, order: int) -> Tensor:
    """The end knots k + 1 times each, as in an open uniform spline; the last knot belongs to the last interval."""
    grid = uniform(g, rows, intervals, order)
    grid[..., :order] = grid[..., order : order + 1]
    grid[..., -order:] = grid[..., -order - 1 : -order]
    return grid


def far(g: Generator, rows: int | None, intervals: int, order: int) -> Tensor:
    """Uniform, and far from 0: for inputs near 0 only the base branch is left."""
    return uniform(g, rows, intervals, order) + 10


# --- inputs: [*lead, features] ---------------------------------------------------------------------------------------


def inside(g: Generator, shape: tuple[int, ...], grid: Tensor, order: int) -> Tensor:
    low, high = grid[..., order], grid[..., -order - 1]
    return low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)


def around(g: Generator, shape: tuple[int, ...], grid: Tensor, order: int) -> Tensor:
    """Half inside, the rest in the extension and beyond it, a few far away."""
    x = 1.5 * torch.randn(shape, generator=g, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=g) < 0.05, 40 * x, x)


def on_knots(g: Generator, shape: tuple[int, ...], grid: Tensor, order: int) -> Tensor:
    """Exactly on a knot, the first and the last among them."""
    index = torch.randint(grid.shape[-1], shape, generator=g)
    return grid.expand(*shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def off_knots(g: Generator, shape: tuple[int, ...], grid: Tensor, order: int) -> Tensor:
    """In the left half of a random interval, at least a seventh of it away from the knot and never at 0."""
    index = torch.randint(grid.shape[-1] - 1, shape, generator=g).unsqueeze(-1)
    rows = grid.expand(*shape, -1)
    left, right = rows.gather(-1, index), rows.gather(-1, index + 1)
    at = 0.15 + 0.25 * torch.rand(index.shape, generator=g, dtype=torch.float64)
    return (left + at * (right - left)).squeeze(-1)


def of_size(scale: float) -> "Inputs":
    def near_zero(g: Generator, shape: tuple[int, ...], grid: Tensor, order: int) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    return near_zero


# --- calls -----------------------------------------------------------------------------------------------------------

Grid = Callable[[Generator, int | None, int, int], Tensor]
Inputs = Callable[[Generator, tuple[int, ...], Tensor, int], Tensor]


def _normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _basis(
    lead=(7,), features=3, G=5, order=3, derivative=0, extrapolation="zero", grid=uniform, rows=True, x=around
) -> Callable[[Generator], dict[str, Any]]:
    def build(g: Generator) -> dict[str, Any]:
        knots = grid(g, features if rows else None, G, order)
        return {
            "x": x(g, (*lead, features), knots, order),
            "grid": knots,
            "order": order,
            "derivative": derivative,
            "extrapolation": extrapolation,
        }

    return build


def _layer(
    op: str, lead=(7,), features=3, out=4, G=5, order=3, base="silu", with_base=True, extrapolation="zero",
    grid=uniform, rows=True, x=around,
) -> Callable[[Generator], dict[str, Any]]:  # fmt: skip
    def build(g: Generator) -> dict[str, Any]:
        knots = grid(g, features if rows else None, G, order)
        values: dict[str, Any] = {"x": x(g, (*lead, features), knots, order), "grid": knots}
        values |= _weights(g, op, features, out, G + order, with_base)
        return {**values, "order": order, "base": base, "extrapolation": extrapolation}

    return build


def _weights(g: Generator, op: str, features: int, out: int, nb: int, with_base: bool) -> dict[str, Any]:
    kan = op == "kan_linear"
    weights: dict[str, Any] = {"coeff": _normal(g, out, features, nb) if kan else _normal(g, features, nb)}
    weights["base_weight"] = _normal(g, out, features) if with_base else None
    return weights if kan else weights | {"scaler": _normal(g, out, features)}


def _conv(
    image=(2, 3, 6, 7), out=4, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), G=5, order=3, base="silu",
    with_base=True, extrapolation="zero", grid=uniform, rows=True, x=around,
) -> Callable[[Generator], dict[str, Any]]:  # fmt: skip
    def build(g: Generator) -> dict[str, Any]:
        features = image[1] * kernel[0] * kernel[1]
        shared = grid(g, None, G, order)
        knots = shared.expand(features, -1).clone() if rows else shared
        if rows and x is around:  # the other kinds place each pixel by one row, and every tap sees every pixel
            knots = knots * torch.linspace(1, 1.01, features, dtype=torch.float64).unsqueeze(-1)
        values: dict[str, Any] = {"x": x(g, image, shared, order), "grid": knots}
        values |= _weights(g, "wkan_conv2d", features, out, G + order, with_base)
        values |= {"kernel_size": list(kernel), "stride": list(stride), "dilation": list(dilation)}
        return {**values, "order": order, "base": base, "extrapolation": extrapolation}

    return build


# --- the lists -------------------------------------------------------------------------------------------------------

_FULL = torch.float32


def _smooth(id: str, build: Callable[[Generator], dict[str, Any]]) -> Sample:
    return Sample(id, build, tiny=True, smooth=True)


_BASIS = [
    _smooth("smooth", _basis(lead=(2, 2), features=2, order=2, x=off_knots)),
    _smooth("smooth-cubic-shared", _basis(lead=(5,), features=2, rows=False, x=off_knots)),
    _smooth("smooth-derivative-linear", _basis(order=3, derivative=1, extrapolation="linear", x=off_knots)),
    Sample("order1-G1", _basis(lead=(), features=1, G=1, order=1, x=off_knots), tiny=True),
    Sample("order2-clamp", _basis(features=63, order=2, extrapolation="clamp", x=inside)),
    Sample("order4-uneven", _basis(lead=(2, 3), features=5, order=4, grid=uneven)),
    Sample("order5-linear", _basis(lead=(9,), features=4, order=5, extrapolation="linear", grid=uneven)),
    Sample("G20-derivative2", _basis(lead=(65,), features=3, G=20, derivative=2)),
    Sample("G40-rows-130", _basis(lead=(130,), features=3, G=40, rows=False)),
    Sample("on-knots", _basis(lead=(40,), features=3, x=on_knots)),
    Sample("on-knots-clamped", _basis(lead=(40,), features=3, grid=clamped, x=on_knots)),
    Sample("on-knots-repeated", _basis(lead=(40,), features=3, grid=repeated, x=on_knots)),
    Sample("no-rows", _basis(lead=(0,), features=3), tiny=True, empty=True),
    Sample("no-features", _basis(lead=(4,), features=0, rows=False), tiny=True, empty=True),
    Sample("float32-grid", _basis(lead=(9,), features=5), tiny=True, keep=(("grid", _FULL),)),
]


def _layers(op: str) -> list[Sample]:
    def layer(**options: Any) -> Callable[[Generator], dict[str, Any]]:
        return _layer(op, **options)

    weights = tuple((name, _FULL) for name in ("grid", "coeff", "base_weight", "scaler"))
    return [
        _smooth("smooth", layer(lead=(2, 2), features=2, out=2, order=2, x=off_knots)),
        _smooth("smooth-linear", layer(lead=(3,), features=2, out=2, order=2, extrapolation="linear", base="tanh",
                                      x=off_knots)),
        _smooth("smooth-no-base", layer(features=2, out=2, with_base=False, rows=False, x=off_knots)),
        Sample("one-of-each", layer(lead=(), features=1, out=1, G=1, order=1, x=off_knots), tiny=True),
        Sample("order1-relu", layer(lead=(2, 3), features=5, out=3, order=1, base="relu", x=off_knots), tiny=True),
        Sample("order2-identity", layer(lead=(4, 1, 7), features=3, out=5, order=2, base="identity")),
        Sample("order4-clamp", layer(features=9, out=7, order=4, extrapolation="clamp", x=inside)),
        Sample("order5-uneven", layer(lead=(5,), features=6, out=3, order=5, grid=uneven, extrapolation="linear")),
        Sample("63-to-65", layer(lead=(65,), features=63, out=65)),
        Sample("130-to-3-shared", layer(lead=(130,), features=130, out=3, rows=False)),
        Sample("25-to-16", layer(lead=(257,), features=25, out=16, rows=False, x=inside)),
        Sample("G20", layer(lead=(65,), features=17, out=33, G=20)),
        Sample("G40-uneven", layer(lead=(33,), features=5, out=18, G=40, grid=uneven)),
        Sample("G70-rows-300", layer(lead=(300,), features=3, out=18, G=70)),
        Sample("clamp", layer(lead=(3, 11), features=7, out=16, extrapolation="clamp")),
        Sample("linear-tanh", layer(lead=(33,), features=7, out=17, extrapolation="linear", base="tanh")),
        Sample("tanh-1e-3", layer(features=5, grid=far, base="tanh", x=of_size(1e-3))),
        Sample("tanh-1e-6", layer(features=5, grid=far, base="tanh", x=of_size(1e-6))),
        Sample("linear-order1", layer(lead=(33,), features=3, out=2, order=1, extrapolation="linear", x=off_knots)),
        Sample("on-knots", layer(lead=(40,), features=5, out=9, x=on_knots)),
        Sample("on-knots-order2", layer(lead=(40,), features=5, out=9, order=2, x=on_knots)),
        Sample("on-knots-order2-G20", layer(lead=(65,), features=5, out=9, order=2, G=20, x=on_knots)),
        Sample("on-knots-repeated", layer(lead=(40,), features=5, out=9, grid=repeated, x=on_knots)),
        Sample("on-knots-clamped", layer(lead=(40,), features=5, out=9, grid=clamped, x=on_knots)),
        Sample("repeated-linear", layer(lead=(40,), features=5, out=9, grid=repeated, extrapolation="linear")),
        Sample("clamped-no-base", layer(lead=(40,), features=5, out=9, grid=clamped, with_base=False)),
        Sample("no-rows", layer(lead=(0,), features=3), tiny=True, empty=True),
        Sample("no-leading", layer(lead=(3, 0, 2), features=3, rows=False), tiny=True, empty=True),
        Sample("no-outputs", layer(lead=(4,), features=3, out=0), tiny=True, empty=True),
        Sample("no-features", layer(lead=(4,), features=0, rows=False), tiny=True, empty=True),
        Sample("float32-weights", layer(lead=(9,), features=5, out=3), tiny=True, keep=weights),
        Sample("float32-grid", layer(lead=(9,), features=5, out=3), tiny=True, keep=(("grid", _FULL),)),
    ]  # fmt: skip


_CONV = [
    _smooth("smooth", _conv(image=(1, 1, 3, 4), out=2, kernel=(2, 2), order=2, x=off_knots)),
    _smooth("smooth-no-base", _conv(image=(2, 1, 3, 3), out=1, kernel=(1, 2), with_base=False, rows=False,
                                   extrapolation="linear", x=off_knots)),
    Sample("1x1", _conv(kernel=(1, 1), out=3)),
    Sample("3x3", _conv()),
    Sample("5x5-shared", _conv(image=(1, 2, 9, 65), out=16, kernel=(5, 5), rows=False)),
    Sample("stride", _conv(image=(3, 1, 9, 10), stride=(2, 3))),
    Sample("dilation", _conv(image=(1, 2, 9, 10), kernel=(3, 2), dilation=(2, 3), extrapolation="clamp", base="tanh")),
    Sample("order1", _conv(order=1, rows=False, x=off_knots)),
    Sample("order4-G20", _conv(order=4, G=20, extrapolation="linear")),
    Sample("order5-uneven", _conv(order=5, grid=uneven, base="identity")),
    Sample("on-knots", _conv(rows=False, x=on_knots)),
    Sample("repeated-no-base", _conv(grid=repeated, with_base=False, base="relu")),
    Sample("clamped", _conv(grid=clamped, rows=False, x=on_knots)),
    Sample("no-images", _conv(image=(0, 3, 6, 7)), tiny=True, empty=True),
    Sample("no-outputs", _conv(image=(1, 1, 4, 4), out=0), tiny=True, empty=True),
    Sample("float32-weights", _conv(image=(1, 2, 4, 5)), tiny=True,
           keep=tuple((w, _FULL) for w in ("grid", "coeff", "base_weight", "scaler"))),
]  # fmt: skip

SAMPLES = {
    "bspline_basis": _BASIS,
    "kan_linear": _layers("kan_linear"),
    "wkan_linear": _layers("wkan_linear"),
    "wkan_conv2d": _CONV,
}
