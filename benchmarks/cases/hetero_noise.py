"""Cases of heterogeneous noise: the noise step of a model's gradients, its SGD form, clipped sums of gradients, and a
whole training step (`dp_step`).

Useful bytes: each tensor once. On a CPU the generation of the normals binds, not memory: the row "generation
alone" makes as many in registers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml import ops
from pyml.reference import hetero_noise_baselines as baselines

from ..registry import FORWARD, Case, Contender, Cost, Registry, Setup, Target
from . import dp_step
from .common import Inputs

STD, DIVIDE = 1.1, 256.0
CHAIN, PLAIN, OPACUS, GENERATION = "normal_, addcmul_, div_", "out of place", "Opacus", "generation alone"
FLAT = "norm and product, flat"
MIB = 1 << 20  # parts of it are noise of the measurement: "none" is below one, clip_sum has its sums besides
NORMALS = 1.6e9  # a second and core, with AVX-512


def _on(backend: str | None, function: Any, *args: Any, **options: Any) -> Any:
    """A call for each step: another step, other noise."""
    step = [0]

    def build(mode: str) -> Any:
        def call() -> Any:
            step[0] += 1
            return function(*args, step=step[0], backend=backend, **options)

        return call

    return build


def _ours(setup: Setup, function: Any, *args: Any, **options: Any) -> dict[str, Contender]:
    found = {"pyml": Contender("pyml", _on(None, function, *args, **options))}
    for name in ("cuda", "triton") if setup.device == "cuda" else ():
        found[f"pyml {name}"] = Contender(f"pyml {name}", _on(name, function, *args, **options), same_result=False)
    return found


def _plain(name: str, call: Any, scale: float = 1.0) -> Contender:
    return Contender(name, lambda mode: torch.no_grad()(call), same_result=False, scale=scale)


def _key(setup: Setup) -> Tensor:
    return torch.tensor([0x1234567890ABCDEF], device=setup.device)


def noise_setup(size: int, kind: str, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    g, scale, key = inputs.normal(size), inputs.uniform(size, low=0.5, high=1.5), _key(setup)
    options: dict[str, Any] = {"key": key, "divide_by": DIVIDE}
    if kind == "factors":
        rows, columns = inputs.uniform(1000, low=0.5, high=1.5), inputs.uniform(size // 1000, low=0.5, high=1.5)
        return _ours(setup, ops.hetero_noise_, [g.view(1000, -1)], [(rows, columns)], STD, **options)
    if kind == "isotropic":  # what Opacus does, so with the same reads and writes
        opacus = Contender(OPACUS, lambda mode: baselines.opacus_noise(g.clone(), STD, DIVIDE), same_result=False)
        return _ours(setup, ops.hetero_noise_, [g], [1.0], STD, **options) | {OPACUS: opacus}
    buffer = torch.empty_like(g)
    found = _ours(setup, ops.hetero_noise_, [g], [scale], STD, **options)
    own, other = g.clone(), g.clone()
    found[CHAIN] = _plain(CHAIN, lambda: baselines.noise_chain(own, scale, STD, DIVIDE, buffer))
    found[PLAIN] = _plain(PLAIN, lambda: baselines.noise_out_of_place(other, scale, STD, DIVIDE))
    if setup.device == "cpu":
        found[GENERATION] = _generation(size)
    found[OPACUS] = Contender(OPACUS, lambda mode: baselines.opacus_noise(other, STD, DIVIDE), same_result=False)
    return found


def list_setup(count: int, size: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    grads = [inputs.normal(size) for _ in range(count)]
    scales = [inputs.uniform(size, low=0.5, high=1.5) for _ in range(count)]
    buffers, own = [torch.empty_like(g) for g in grads], [g.clone() for g in grads]

    def chain() -> None:
        for t, scale, buffer in zip(own, scales, buffers):
            baselines.noise_chain(t, scale, STD, DIVIDE, buffer)

    found = _ours(setup, ops.hetero_noise_, grads, scales, STD, key=_key(setup), divide_by=DIVIDE)
    return found | {CHAIN: _plain(CHAIN, chain)}


def _generation(size: int) -> Contender:
    machine = torch.ops.pyml.machine_normals
    repeats = max(1, round(size / machine(1)))
    return Contender(GENERATION, lambda mode: lambda: machine(repeats), size / machine(repeats), same_result=False)


def single_setup(size: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, scale = inputs.normal(size), inputs.uniform(size, low=0.5, high=1.5)
    found = _ours(setup, ops.hetero_noise, x, scale, STD, key=_key(setup))
    return found | {PLAIN: _plain(PLAIN, lambda: baselines.noise_out_of_place(x, scale, STD, 1.0))}


def _fused(params: list[Tensor], grads: list[Tensor], scale: Any, std: float, **options: Any) -> None:
    ops.hetero_noise_sgd_(params, grads, scale, std, lr=0.1, **options)


def sgd_setup(size: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    p, g, scale = inputs.normal(size), inputs.normal(size), inputs.uniform(size, low=0.5, high=1.5)
    buffer, own = torch.empty_like(g), p.clone()

    found = _ours(setup, _fused, [p], [g], [scale], STD, key=_key(setup), divide_by=DIVIDE)
    chain = partial(baselines.sgd_chain, own, g, scale, STD, 0.1 / DIVIDE, buffer)
    return found | {CHAIN: _plain(CHAIN, chain)}


def clip_setup(batch: int, tensors: int, size: int, whitened: bool, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    rows = inputs.normal(batch, tensors * size)
    grads = [rows[:, n * size : (n + 1) * size].contiguous() for n in range(tensors)]
    clip = 0.8 * (tensors * size) ** 0.5
    scale = [inputs.uniform(size, low=0.5, high=1.5) for _ in range(tensors)] if whitened else None

    def call(backend: str | None = None) -> list[Tensor]:
        return ops.clip_sum(grads, clip, scale=scale, backend=backend)[0]

    found = {"pyml": Contender("pyml", lambda mode: call)}
    for name in ("cuda", "triton") if setup.device == "cuda" else ():
        found[f"pyml {name}"] = Contender(f"pyml {name}", lambda mode, name=name: partial(call, name))
    if not whitened:
        found[OPACUS] = Contender(OPACUS, lambda mode: baselines.opacus_clip(grads, clip))
    found[FLAT] = _plain(FLAT, lambda: baselines.clip_flat(rows, clip))
    return found


def _cost(size: float, tensors: float) -> Any:
    return lambda mode, element: Cost(bytes=size * tensors * element)


def register(registry: Registry) -> None:
    add = partial(_add, registry)
    noise = {"pyml": None, CHAIN: None, PLAIN: None, GENERATION: None, OPACUS: "opacus"}
    gpu = {"pyml cuda": None, "pyml triton": None}
    for size, name in ((1_000_000, "1e6"), (10_000_000, "1e7"), (50_000_000, "5e7")):
        add("hetero_noise_", f"{name} elements", partial(noise_setup, size, "step"), noise | gpu, _cost(size, 3),
            quick=size == 1_000_000, targets=_targets(size) if size > 1_000_000 else ())  # fmt: skip
    add("hetero_noise_", "1e7 elements, one scale", partial(noise_setup, 10_000_000, "isotropic"),
        {"pyml": None, OPACUS: "opacus"} | gpu, _cost(10_000_000, 2),
        targets=(Target("speedup", 18, OPACUS),))  # fmt: skip
    add("hetero_noise_", "1000x10000 rows x columns", partial(noise_setup, 10_000_000, "factors"),
        {"pyml": None} | gpu, _cost(10_000_000, 2))  # fmt: skip
    add("hetero_noise_", "300 x 33333 elements", partial(list_setup, 300, 33_333), {"pyml": None, CHAIN: None} | gpu,
        _cost(10_000_000, 3))  # fmt: skip
    add("hetero_noise_sgd_", "1e7 elements", partial(sgd_setup, 10_000_000), {"pyml": None, CHAIN: None} | gpu,
        _cost(10_000_000, 4))  # fmt: skip
    add("hetero_noise", "1e7 elements, out of place", partial(single_setup, 10_000_000),
        {"pyml": None, PLAIN: None} | gpu, _cost(10_000_000, 3))  # fmt: skip
    for batch in (64, 256):
        targets = tuple(Target("speedup", 1.2, OPACUS, threads=n) for n in (1, 2))
        add("clip_sum", f"{batch} x 1e6 in 16 tensors", partial(clip_setup, batch, 16, 62_500, False),
            {"pyml": None, OPACUS: "opacus", FLAT: None} | gpu, _cost(1e6 * batch, 1), quick=batch == 64,
            targets=(*targets, Target("bytes", 4_000_000 + MIB)))  # fmt: skip
    add("clip_sum", "64 x 1e6 in 16 tensors, whitened", partial(clip_setup, 64, 16, 62_500, True),
        {"pyml": None, FLAT: None} | gpu, _cost(1e6 * 64, 1))  # fmt: skip
    dp_step.register(registry)


def _targets(size: int) -> tuple[Target, ...]:
    gpu: dict[str, Any] = {"threads": 0, "device": "cuda"}
    return (
        Target("speedup", 5, CHAIN, threads=1),
        Target("speedup", 9, CHAIN),
        Target("speedup", 18, OPACUS),
        Target("slowdown", 1.15, GENERATION),
        Target("seconds", size / NORMALS, threads=1),
        Target("bytes", MIB),
        Target("ceiling", 0.8, "binding", **gpu),  # that of copying: there is no other work in the cost
        Target("speedup", 2, CHAIN, **gpu),
    )


def _add(registry: Registry, op: str, shape: str, setup: Any, names: dict[str, Any], cost: Any, **more: Any) -> None:
    registry.add(Case("hetero_noise", op, shape, setup, names, cost, modes=(FORWARD,), **more))
