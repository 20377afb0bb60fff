"""Cases of the head ops: the optimizer's step on slices where they lie, edits of heads; whole steps: `head_tuning`.

Useful bytes: parameters and both moments read and written, gradients read; an edit moves each element once, in place
the chosen heads alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml import ops
from pyml.ops import OPS
from pyml.reference import head_update_baselines as baselines

from ..registry import BOTH, FORWARD, MODES, TRITON_3X, Case, Contender, Cost, Registry, Setup, Target
from . import head_tuning
from .common import Inputs, compiled, eager, ours

# torch's default is a loop on a CPU and foreach on a GPU.
DEFAULT, FOREACH, FUSED = "AdamW", "AdamW, foreach", "AdamW, fused"
WHOLE, BESIDE = "whole gradient", "slice beside"
ASSIGN, ASSIGN_IN_PLACE = "clone, assign", "assign"
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}


def adamw_setup(count: int, rows: bool, masters: bool, setup: Setup) -> dict[str, Contender]:
    """``count`` heads of 128 of weights [2048, 2048], eight of each; masters: bfloat16 parameters and float32 ones."""
    inputs = Inputs(setup)

    def slices() -> list[Tensor]:
        weights = [inputs.normal(2048, 2048, scale=0.02) for _ in range(count // 8)]
        weights = [w.bfloat16() for w in weights] if masters else weights
        heads = range(0, 8 * 256, 256)
        return [w[h : h + 128] if rows else w[:, h : h + 128] for w in weights for h in heads]

    grads = [inputs.normal(*p.shape) for p in slices()]

    def step(backend: str | None) -> Any:
        def build(mode: str) -> Any:
            params, number = slices(), [0]
            m, v = ([torch.zeros_like(g) for g in grads] for _ in range(2))
            own = [p.float().contiguous() for p in params] if masters else None

            def call() -> None:
                number[0] += 1
                ops.adamw_slices_(
                    params, grads, m, v, step=number[0], masters=own, **OPTIONS, backend=backend
                )  # fmt: skip

            return call

        return build

    found = {"pyml": Contender("pyml", step(None), same_result=False)}
    for name in ("cuda", "triton") if setup.device == "cuda" else ():
        found[f"pyml {name}"] = Contender(f"pyml {name}", step(name), same_result=False)

    def theirs(name: str, **how: Any) -> Contender:
        def build(mode: str) -> Any:
            if not masters:
                return baselines.adamw(slices(), grads, **OPTIONS, **how)
            params, own = slices(), [p.float().contiguous() for p in slices()]
            plain = baselines.adamw(own, grads, **OPTIONS, **how)

            def call() -> None:
                plain()
                torch._foreach_copy_(params, own)

            return call

        return Contender(name, build, same_result=False)

    found[DEFAULT], found[FOREACH] = theirs(DEFAULT), theirs(FOREACH, foreach=True)
    if rows:
        found[FUSED] = theirs(FUSED, fused=True)
    return found


def linear_setup(rows: int, width: int, size: int, dim: int, setup: Setup) -> dict[str, Contender]:
    """One head of a weight [width, width]: its gradient and that of x, with the weight's own where all is trained."""
    inputs = Inputs(setup)
    x, weight = inputs.normal(rows, width), inputs.normal(width, width, scale=0.02)
    whole, head = weight.clone(), 3
    part = weight.narrow(dim, head * size, size)

    def call(x: Tensor, weight: Tensor, part: Tensor) -> Tensor:
        return ops.head_linear(x, weight, None, [part], heads=[head], size=size, dim=dim)

    def beside(x: Tensor, weight: Tensor, part: Tensor) -> Tensor:
        return baselines.linear_beside(x, weight, part, head * size, dim)

    args, wanted = (x, weight, part), [x, part]
    return {
        "pyml": eager("pyml", call, args, wanted),
        WHOLE: eager(WHOLE, torch.nn.functional.linear, (x, whole), [x, whole], same_result=False),
        BESIDE: eager(BESIDE, beside, args, wanted), **compiled(beside, args, wanted, setup),
    }  # fmt: skip


def edit_setup(batch: int, length: int, heads: int, chosen: int, setup: Setup) -> dict[str, Contender]:
    """An affine map of the chosen heads of 128, as steering has it."""
    inputs = Inputs(setup)
    x, values = inputs.normal(batch, length, heads, 128), inputs.normal(chosen, 128)
    matrix = inputs.normal(chosen, 128, 128, scale=0.1)
    places, wanted = tuple(range(1, 1 + chosen)), [x, values, matrix]

    def call(x: Tensor, values: Tensor, matrix: Tensor, backend: str | None = None) -> Tensor:
        return ops.head_edit(x, places, values, matrix, backend=backend)

    def plain(x: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
        return baselines.edit_assign(x, places, values, matrix)

    args = (x, values, matrix)
    found = ours(call, OPS["head_edit"], args, wanted, setup)
    return found | {ASSIGN: eager(ASSIGN, plain, args, wanted)} | compiled(plain, args, wanted, setup)


def edit_in_place_setup(batch: int, length: int, heads: int, chosen: int, setup: Setup) -> dict[str, Contender]:
    """The chosen heads replaced by their means, as a knockout has it."""
    inputs = Inputs(setup)
    x, values = inputs.normal(batch, length, heads, 128), inputs.normal(chosen, 128)
    places = tuple(range(1, 1 + chosen))
    found = ours(lambda x, values, backend=None: ops.head_edit_(x, places, values, backend=backend),
                 OPS["head_edit_"], (x, values), [], setup)  # fmt: skip
    return found | {ASSIGN_IN_PLACE: eager(
        ASSIGN_IN_PLACE, lambda x, values: baselines.edit_assign_(x, places, values), (x, values), []
    )}  # fmt: skip


def register(registry: Registry) -> None:
    gpu: dict[str, str | None] = {"pyml cuda": None, "pyml triton": None}
    ways: dict[str, str | None] = {"pyml": None, DEFAULT: None, FOREACH: None, **gpu}
    own: dict[str, str | None] = {"pyml": None, TRITON_3X: None, **gpu}
    half = 32 * 128 * 2048
    for rows, shape in ((True, "[128, 2048]"), (False, "[2048, 128] columns")):
        targets = tuple(Target("speedup", 2.5, DEFAULT, threads=n) for n in (1, 2))
        fused: dict[str, str | None] = {FUSED: None} if rows else {}
        registry.add(Case(
            "head_update", "adamw_slices_", f"32 x {shape}", partial(adamw_setup, 32, rows, False),
            ways | fused, _bytes(7 * half), modes=(FORWARD,), quick=True,
            targets=(*targets, Target("bytes", 1 << 20)), note="" if rows else "torch's fused step is wrong here",
        ))  # fmt: skip
    registry.add(Case(
        "head_update", "adamw_slices_", "32 x [2048, 128] columns in bfloat16, masters",
        partial(adamw_setup, 32, False, True), ways, lambda mode, element: Cost(bytes=half * (7 * 4 + 2 * 2)),
        modes=(FORWARD,),
    ))  # fmt: skip
    for dim, what in ((0, "rows"), (1, "columns")):
        work = 2.0 * 1024 * 2048 * (2 * 2048 + 128)
        registry.add(Case(
            "head_update", "head_linear", f"1024 x 2048 -> 2048, 128 {what}",
            partial(linear_setup, 1024, 2048, 128, dim),
            {"pyml": None, WHOLE: None, BESIDE: None, "compiled": None, "compiled+graph": None},
            lambda mode, element, work=work: Cost(flops=work, matrix=work), modes=(BOTH,),
        ))  # fmt: skip
    for chosen in (1, 8):
        size = 4 * 512 * 32 * 128
        registry.add(Case(
            "head_update", "head_edit", f"{chosen} of 32 heads, 4 x 512 tokens, affine",
            partial(edit_setup, 4, 512, 32, chosen),
            own | {ASSIGN: None, "compiled": None, "compiled+graph": None},
            _edit_cost(size, chosen), modes=MODES, quick=chosen == 1,
        ))  # fmt: skip
    registry.add(Case(
        "head_update", "head_edit_", "3 of 32 heads, 4 x 512 tokens, means",
        partial(edit_in_place_setup, 4, 512, 32, 3),
        own | {ASSIGN_IN_PLACE: None}, _bytes(4 * 512 * 3 * 128),
        modes=(FORWARD,),
    ))  # fmt: skip
    head_tuning.register(registry)


def _bytes(elements: float) -> Any:
    return lambda mode, element: Cost(bytes=elements * element)


def _edit_cost(size: int, chosen: int) -> Any:
    def cost(mode: str, element: int) -> Cost:
        products = 2.0 * size / 32 * chosen * 128 * (1 if mode == FORWARD else 3)
        return Cost(flops=products, matrix=products, bytes=2.0 * size * element * (1 if mode == FORWARD else 2))

    return cost
