"""Cases of the B-spline family. Costs count the k + 1 basis functions that are not zero, never the dense basis."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml import ops
from pyml.ops import bspline as family
from pyml.reference import bspline as reference
from pyml.reference import bspline_baselines as baselines

from ..registry import BOTH, FORWARD, GPU_NAMES, Case, Contender, Cost, Registry, Setup, Target
from . import spectralkan
from .common import Inputs, compiled, eager, ours

ORDER = 3
BASIS = 25  # FLOPs: interval, local coordinate and the four cubic pieces
SLOPE = 40  # FLOPs of the backward: the pieces again and their derivatives
SILU = 5


def uniform_grid(intervals: int, inputs: Inputs) -> Tensor:
    """The layers' initial grid on [-1, 1], one row ``[G + 2k + 1]``, never in 16 bits: knots would move."""
    index = torch.arange(-ORDER, intervals + ORDER + 1, device=inputs.device)
    return (index * (2 / intervals) - 1).to(torch.promote_types(inputs.dtype, torch.float32))


def kan_cost(b: int, i: int, o: int, g: int, mode: str, size: int) -> Cost:
    """kan_linear of ``[b, i] -> [b, o]`` on g intervals."""
    edges, weights = b * i * o, i * o * (g + ORDER + 1)
    matrix = edges * (2 * (ORDER + 1) + 2)
    forward = Cost(matrix + b * i * (BASIS + SILU), size * (b * i + b * o + weights), b * i, matrix)
    if mode == FORWARD:
        return forward
    return Cost(
        forward.flops + 2 * matrix + b * i * (SLOPE + SILU),
        forward.bytes + size * (2 * b * i + b * o + 2 * weights),
        2 * forward.exps,
        3 * matrix,
    )


def wkan_cost(b: int, i: int, o: int, g: int, mode: str, size: int, pixels: int | None = None) -> Cost:
    """wkan_linear of ``[b, i] -> [b, o]``; for the convolution, ``pixels`` values are read and go through the basis."""
    values = b * i if pixels is None else pixels
    weights, matrix = i * (g + ORDER) + 2 * i * o, 4 * b * i * o
    spline = b * i * 2 * (ORDER + 1)
    forward = Cost(matrix + spline + values * (BASIS + SILU), size * (values + b * o + weights), values, matrix)
    if mode == FORWARD:
        return forward
    return Cost(
        forward.flops + 2 * matrix + 2 * spline + values * (SLOPE + SILU),
        forward.bytes + size * (2 * values + b * o + 2 * weights),
        2 * forward.exps,
        3 * matrix,
    )


def _needs(*names: str, rival: bool = False) -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(("pyml", *names, *GPU_NAMES))
    return {**found, "pykan": "kan"} if rival else found


def _pykan(x: Tensor, i: int, o: int, g: int) -> dict[str, Contender]:
    if importlib.util.find_spec("kan") is None:
        return {}

    def build(mode: str) -> Callable[[], Any]:
        from kan.KANLayer import KANLayer

        layer = KANLayer(in_dim=i, out_dim=o, num=g, k=ORDER, device=str(x.device)).to(x.dtype)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return eager("pykan", lambda v: layer(v)[0], (x,), leaves).build(mode)

    return {"pykan": Contender("pykan", build, same_result=False)}


def _linear(x: Tensor, i: int, o: int) -> dict[str, Contender]:
    layer = torch.nn.Linear(i, o, device=x.device, dtype=x.dtype)
    floor = eager("torch.nn.Linear", layer, (x,), [x, *layer.parameters()], same_result=False)
    return {"torch.nn.Linear": floor}


def kan_setup(b: int, i: int, o: int, g: int, setup: Setup, *, rival: bool = False) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, grid = inputs.uniform(b, i), uniform_grid(g, inputs)
    coeff, base_weight = inputs.normal(o, i, g + ORDER, scale=0.1), inputs.normal(o, i, scale=i**-0.5)
    # the other implementations keep one row of knots per input
    args, wanted = (x, grid, coeff, base_weight), [x, coeff, base_weight]
    full = (x, grid.expand(i, -1).contiguous(), coeff, base_weight)
    found = ours(ops.kan_linear, family.KAN_LINEAR, args, wanted, setup)
    found["eager"] = eager("eager", baselines.kan_eager, full, wanted)
    found.update(compiled(baselines.kan_closed, args, wanted, setup))
    if rival:
        found.update(_pykan(x, i, o, g))
    return {**found, **_linear(x, i, o)}


def wkan_setup(b: int, i: int, o: int, g: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, grid = inputs.uniform(b, i), uniform_grid(g, inputs)
    coeff = inputs.normal(i, g + ORDER, scale=0.1)
    base_weight, scaler = inputs.normal(o, i, scale=i**-0.5), inputs.normal(o, i, scale=i**-0.5)
    args, wanted = (x, grid, coeff, base_weight, scaler), [x, coeff, base_weight, scaler]
    full = (x, grid.expand(i, -1).contiguous(), coeff, base_weight, scaler)
    found = ours(ops.wkan_linear, family.WKAN_LINEAR, args, wanted, setup)
    found["eager"] = eager("eager", baselines.wkan_eager, full, wanted)
    found.update(compiled(baselines.wkan_closed, args, wanted, setup))
    return {**found, **_linear(x, i, o)}


def conv_setup(n: int, h: int, w: int, k: int, o: int, g: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, grid = inputs.uniform(n, 1, h + k - 1, w + k - 1), uniform_grid(g, inputs)
    taps = k * k
    coeff = inputs.normal(taps, g + ORDER, scale=0.1)
    base_weight, scaler = inputs.normal(o, taps, scale=1 / k), inputs.normal(o, taps, scale=1 / k)
    args, wanted = (x, grid, coeff, base_weight, scaler), [x, coeff, base_weight, scaler]

    def on_patches(form: Any, x: Tensor, *rest: Tensor) -> Tensor:
        rows = reference.patches(x, (k, k), (1, 1), (1, 1))
        return form(rows.flatten(0, 2), *rest).view(*rows.shape[:3], o).permute(0, 3, 1, 2)

    full = (x, grid.expand(taps, -1).contiguous(), coeff, base_weight, scaler)
    found = ours(ops.wkan_conv2d, family.WKAN_CONV2D, args, wanted, setup, kernel_size=k)
    found["eager"] = eager("eager", partial(on_patches, baselines.wkan_eager), full, wanted)
    found.update(compiled(partial(on_patches, baselines.wkan_closed), args, wanted, setup))
    return found


def _in_dtype(form: Callable[..., Tensor], x: Tensor, grid: Tensor) -> Tensor:
    return form(x.to(grid.dtype), grid).to(x.dtype)


def basis_setup(b: int, i: int, g: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, grid = inputs.uniform(b, i), uniform_grid(g, inputs)
    found = ours(ops.bspline_basis, family.BSPLINE_BASIS, (x, grid), [x], setup)
    full = (x, grid.expand(i, -1).contiguous())
    found["eager"] = eager("eager", partial(_in_dtype, baselines.dense_basis), full, [x])
    found.update(compiled(partial(_in_dtype, baselines.closed_basis), (x, grid), [x], setup))
    return found


def layer_setup(name: str, b: int, i: int, o: int, setup: Setup) -> dict[str, Contender]:
    """A layer as a user builds it, every parameter trained."""
    from pyml import nn

    inputs = Inputs(setup)
    torch.manual_seed(setup.seed)
    layer = getattr(nn, name)(i, o).to(inputs.device, inputs.dtype)
    stem = "wkan" if name.startswith("W") else "kan"
    x, params = inputs.uniform(b, i), list(layer.parameters())
    found = {"pyml": eager("pyml", layer, (x,), [x, *params])}
    for label, kind in (("eager", "eager"), ("compiled", "closed")):
        form = baselines.PlainLayer(layer, getattr(baselines, f"{stem}_{kind}"))
        if label == "compiled":
            found.update(compiled(form, (x,), [x, *params], setup))
        else:
            found[label] = eager(label, form, (x,), [x, *params])
    return {**found, **(_pykan(x, i, o, 5) if stem == "kan" else {}), **_linear(x, i, o)}


def _ratios(forward: float, both: float, against: str = "compiled", **more: Any) -> tuple[Target, ...]:
    return Target("speedup", forward, against, FORWARD, **more), Target("speedup", both, against, BOTH, **more)


def _kan(b: int, i: int, o: int, g: int, targets: tuple[Target, ...] = (), *, rival: bool = False, **more: Any) -> Case:
    names = _needs("eager", "compiled", "torch.nn.Linear", rival=rival)
    setup, cost = partial(kan_setup, b, i, o, g, rival=rival), partial(kan_cost, b, i, o, g)
    return Case("bspline", "kan_linear", f"{b}x{i}->{o} G={g}", setup, names, cost, targets=targets, **more)


def _wkan(b: int, i: int, o: int, g: int, targets: tuple[Target, ...] = (), **more: Any) -> Case:
    names = _needs("eager", "compiled", "torch.nn.Linear")
    setup, cost = partial(wkan_setup, b, i, o, g), partial(wkan_cost, b, i, o, g)
    return Case("bspline", "wkan_linear", f"{b}x{i}->{o} G={g}", setup, names, cost, targets=targets, **more)


def _layer(name: str, b: int, i: int, o: int, rival: bool) -> Case:
    cost = kan_cost if name == "KANLinear" else wkan_cost
    names = _needs("eager", "compiled", "torch.nn.Linear", rival=rival)
    targets = [Target("seconds", 150e-6, mode=BOTH)]
    targets += [Target("speedup", 1.0, n, BOTH) for n in names if n in ("eager", "compiled", "pykan")]
    return Case(
        "bspline", name, f"layer {b}x{i}->{o} G=5", partial(layer_setup, name, b, i, o), names,
        partial(cost, b, i, o, 5), targets=tuple(targets), devices=("cpu",),
    )  # fmt: skip


def register(registry: Registry) -> None:
    on_gpu = tuple(
        t for name in ("eager", "compiled", "compiled+graph") for t in _ratios(1.0, 1.0, name, threads=0, device="cuda")
    )
    on_gpu_kan = on_gpu + _ratios(1.0, 1.0, "pykan", threads=0, device="cuda")
    small_memory = (Target("memory", 8, "eager", FORWARD), Target("memory", 8, "eager", BOTH))
    near_ceiling = (Target("ceiling", 0.45, "fma", FORWARD),)
    small = [Target("seconds", 30e-6), *(Target("speedup", 1.0, n) for n in ("eager", "compiled", "pykan"))]
    cases = [
        _kan(4096, 784, 64, 5, _ratios(4, 3) + _ratios(25, 12, "eager") + near_ceiling + small_memory),
        _kan(1024, 256, 256, 5, _ratios(2, 2) + near_ceiling + small_memory, rival=True),
        _kan(1024, 256, 256, 20, _ratios(4, 3.5) + small_memory),
        _kan(14336, 25, 16, 5, _ratios(2, 2.5) + small_memory, rival=True, quick=True),
        _kan(64, 25, 16, 5, tuple(small), rival=True, quick=True),
        _wkan(64, 25, 16, 5, tuple(t for t in small if t.against != "pykan")),
        _layer("KANLinear", 64, 25, 16, rival=True),
        _layer("WKANLinear", 64, 25, 16, rival=False),
        _wkan(
            224000, 25, 16, 5,
            _ratios(5, 4) + _ratios(70, 30, "eager") + (Target("slowdown", 3, "torch.nn.Linear"),) + on_gpu,
        ),
        _wkan(14336, 25, 16, 5, quick=True),
        _kan(224000, 25, 16, 5, on_gpu_kan, rival=True),
        _kan(16384, 1024, 1024, 5, on_gpu_kan, rival=True, devices=("cuda",)),
        _wkan(16384, 1024, 1024, 5, on_gpu, devices=("cuda",)),
        Case(
            "bspline", "wkan_conv2d", "8x1x128x140 k=5 ->16 G=5", partial(conv_setup, 8, 128, 140, 5, 16, 5),
            _needs("eager", "compiled"), lambda mode, size: wkan_cost(
                8 * 128 * 140, 25, 16, 5, mode, size, pixels=8 * 132 * 144),
        ),
        Case(
            "bspline", "bspline_basis", "14336x25 G=5", partial(basis_setup, 14336, 25, 5), _needs("eager", "compiled"),
            lambda mode, size: Cost(
                14336 * 25 * (BASIS if mode == FORWARD else BASIS + SLOPE),
                14336 * 25 * size * (9 if mode == FORWARD else 19),
            ),
        ),
        _kan(
            14336, 25, 16, 200,
            tuple(Target("growth", 1.1, "kan_linear 14336x25->16 G=5", m) for m in (FORWARD, BOTH)),
            time_it=False, devices=("cpu",),
        ),
    ]  # fmt: skip
    for case in cases:
        registry.add(case)
    spectralkan.register(registry)
