"""Cases of top-k attention. Costs count the chosen keys once, never the gathered copies or the attention matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyml import ops
from pyml.ops import OPS
from pyml.reference import topk_attention as reference
from pyml.reference import topk_attention_baselines as baselines

from ..registry import BOTH, FORWARD, GPU_NAMES, Case, Contender, Cost, Registry, Setup, Target
from .common import Inputs, compiled, eager, ours

STEP = "training step"
SDPA, FLEX = "gather + SDPA", "FlexAttention"
FORMS = {"public": baselines.region_public, SDPA: baselines.region_sdpa}
MIB = 2**20


def _chosen(inputs: Inputs, batch: int, regions: int, topk: int) -> Tensor:
    scores = torch.rand(batch, 1, regions, regions, generator=inputs.generator)
    return scores.topk(topk, -1).indices.to(inputs.device)


def _flex_lacks(setup: Setup) -> str:
    return "FlexAttention has no backward on a CPU" if setup.device == "cpu" else ""


def region_setup(b: int, h: int, p: int, s: int, topk: int, d: int, dv: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    q, k, v = (inputs.normal(b, h, p, s, width) for width in (d, d, dv))
    args, wanted = (q, k, v, _chosen(inputs, b, p, topk)), [q, k, v]
    found = ours(ops.region_attention, OPS["region_attention"], args, wanted, setup)
    for name, form in FORMS.items():
        found[name] = eager(name, form, args, wanted)
    apart = [t.detach() for t in args]  # on a CPU it refuses inputs that ask for a gradient, even under no_grad
    lacks = _flex_lacks(setup)
    found[FLEX] = eager(FLEX, baselines.region_flex, apart, [] if lacks else apart[:3], forward_only=lacks)
    return found


def module_setup(batch: int, side: int, setup: Setup) -> dict[str, Contender]:
    """BiLevelRoutingAttention as LSNet has it, projections and routing included."""
    from pyml.nn import BiLevelRoutingAttention

    inputs = Inputs(setup)
    torch.manual_seed(setup.seed)
    layer = BiLevelRoutingAttention(12, 2, 16, 48, topk=32, side_dwconv=5).to(inputs.device, inputs.dtype)
    x = inputs.normal(batch, 12, side, side)

    def by(name: str, make: Callable[[], nn.Module]) -> Contender:
        def build(mode: str) -> Callable[[], Any]:
            module, apart = make().train(mode == BOTH), x.detach()
            if lacks:
                return eager(name, module.requires_grad_(False), (apart,), []).build(mode)
            return eager(name, module, (apart,), [apart, *module.parameters()]).build(mode)

        lacks = _flex_lacks(setup) if name == FLEX else ""
        return Contender(name, build, forward_only=lacks)

    forms = {**FORMS, FLEX: baselines.region_flex}
    plain = {name: by(name, partial(baselines.on_plain_torch, layer, form)) for name, form in forms.items()}
    return {"pyml": by("pyml", lambda: layer), **plain}


def step_setup(batch: int, side: int, setup: Setup) -> dict[str, Contender]:
    """Forward, L1, backward and Adam of LSNet."""
    from pyml.nn import LSNet

    inputs = Inputs(setup)
    torch.manual_seed(setup.seed)
    model = LSNet().to(inputs.device, inputs.dtype)
    x, target = (inputs.uniform(batch, 3, side, side, low=0.0) for _ in range(2))

    def train(form: Callable[..., Tensor] | None, mode: str) -> Callable[[], Any]:
        import copy

        network = copy.deepcopy(model) if form is None else baselines.on_plain_torch(model, form)
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3)

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = (network(x) - target).abs().mean()
            loss.backward()
            optimizer.step()
            return loss

        return call

    makes = {"pyml": None, **FORMS}
    return {name: Contender(name, partial(train, form)) for name, form in makes.items()}


def route_setup(b: int, p: int, s: int, topk: int, d: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    q, k = inputs.normal(b, 1, p, s, d), inputs.normal(b, 1, p, s, d)
    found = ours(ops.route_regions, OPS["route_regions"], (q, k, None, topk), [], setup)

    def form(q: Tensor, k: Tensor, grid: None, topk: int) -> Tensor:
        return reference.route_regions(q, k, topk)[0]

    found["eager"] = eager("eager", form, (q, k, None, topk), [])
    return found


def token_setup(b: int, h: int, n: int, d: int, topk: int | list[int], setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    q, k, v = (inputs.normal(b, h, n, d) for _ in range(3))
    args, wanted = (q, k, v, topk), [q, k, v]
    found = ours(ops.topk_attention, OPS["topk_attention"], args, wanted, setup)
    found["eager"] = eager("eager", baselines.topk_scatter, args, wanted)
    found.update(compiled(baselines.topk_scatter, args, wanted, setup))

    def dense(q: Tensor, k: Tensor, v: Tensor, topk: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    found["dense SDPA"] = eager("dense SDPA", dense, args, wanted, same_result=False)
    return found


def attention_cost(rows: int, keys: int, d: int, dv: int, tokens: int, mode: str, size: int) -> Cost:
    """Queries times keys per query; the backward recomputes the logits once: five products instead of two."""
    pairs = rows * keys
    moved = size * tokens * (2 * d + 2 * dv)
    if mode == FORWARD:
        return Cost(2 * pairs * (d + dv), moved, pairs, 2 * pairs * (d + dv))
    work = 2 * pairs * (d + dv) + 2 * pairs * (3 * d + 2 * dv)
    return Cost(work, 3 * moved, 2 * pairs, work)


def token_cost(rows: int, keys: int, kept: int, d: int, tokens: int, mode: str, size: int) -> Cost:
    """All logits once; everything else, the backward too, for the kept keys alone."""
    forward = 2 * rows * (keys + kept) * d
    moved = size * tokens * 4 * d
    if mode == FORWARD:
        return Cost(forward, moved, rows * kept, forward)
    work = forward + 2 * rows * kept * 5 * d
    return Cost(work, 3 * moved, 2 * rows * kept, work)


def _region(
    b: int, topk: int, targets: tuple[Target, ...] = (),
    names: tuple[str, ...] = (*FORMS, FLEX, *GPU_NAMES[:3]), **more: Any,
) -> Case:  # fmt: skip
    h, p, s, d, dv = 2, 256, 64, 24, 6
    return Case(
        "topk_attention", "region_attention", f"B={b} H={h} P={p} S={s} K={topk} D={d} Dv={dv}",
        partial(region_setup, b, h, p, s, topk, d, dv),
        dict.fromkeys(("pyml", *names)),
        partial(attention_cost, b * h * p * s, topk * s, d, dv, b * h * p * s), targets=targets, **more,
    )  # fmt: skip


def _token(topk: int | list[int], targets: tuple[Target, ...], **more: Any) -> Case:
    b, h, n, d = 1, 4, 2048, 32
    kept = topk if isinstance(topk, int) else sum(topk)
    return Case(
        "topk_attention", "topk_attention", f"B={b} H={h} N={n} D={d} k={topk}", partial(token_setup, b, h, n, d, topk),
        dict.fromkeys(("pyml", "eager", "compiled", "dense SDPA", *GPU_NAMES)),
        partial(token_cost, b * h * n, n, kept, d, b * h * n), targets=targets, **more,
    )  # fmt: skip


def register(registry: Registry) -> None:
    op = (Target("speedup", 6, SDPA), Target("speedup", 5, SDPA, BOTH), Target("ceiling", 0.5, "fma"))
    gpu: dict[str, Any] = {"threads": 0, "device": "cuda", "dtype": "bfloat16"}
    on_gpu = tuple(
        Target(measure, bound, against, mode, **gpu) for mode in (FORWARD, BOTH)
        for measure, bound, against in (("speedup", 1, FLEX), ("ceiling", 0.3, "binding"))
    )  # fmt: skip
    near_dense = (Target("slowdown", 3, "dense SDPA"), Target("slowdown", 3, "dense SDPA", BOTH))
    module = (
        Target("speedup", 4, SDPA), Target("speedup", 4, FLEX), Target("speedup", 4, SDPA, BOTH),
        Target("bytes", 24 * MIB), Target("bytes", 60 * MIB, mode=BOTH),
    )  # fmt: skip
    plain = dict.fromkeys(("pyml", *FORMS))
    # Time grows with K and no faster, memory not at all.
    few, published = (f"region_attention B=1 H=2 P=256 S=64 K={k} D=24 Dv=6" for k in (8, 32))
    linear = tuple(Target("pace", 1.1, few, mode) for mode in (FORWARD, BOTH))
    constant = tuple(Target("growth", 1.1, published, mode) for mode in (FORWARD, BOTH))
    cases = [
        _region(1, 8, names=(SDPA,), devices=("cpu",)),
        _region(1, 16, linear, names=(SDPA,), devices=("cpu",)),
        _region(1, 32, op + linear, quick=True, devices=("cpu",)),
        _region(1, 128, constant, time_it=False, devices=("cpu",)),
        _region(16, 32, on_gpu, devices=("cuda",)),
        Case(
            "topk_attention", "BiLevelRoutingAttention", "1x12x128x128 topk=32", partial(module_setup, 1, 128),
            {**plain, FLEX: None}, partial(attention_cost, 2 * 16384, 2048, 24, 6, 2 * 16384), targets=module,
            note="projections, BatchNorm, routing and lepe included; costs are those of the attention",
        ),
        *(_token(k, near_dense, quick=k == 256) for k in (64, 256, 1024)),
        _token([64, 256, 1024], ()),
        Case(
            "topk_attention", "route_regions", "B=1 P=256 S=64 D=48 topk=32", partial(route_setup, 1, 256, 64, 32, 48),
            dict.fromkeys(("pyml", "eager", *GPU_NAMES[:2])),
            lambda mode, size: Cost(2 * 256 * 64 * 48 + 2 * 256 * 256 * 48, 2 * 256 * 64 * 48 * size),
            modes=(FORWARD,),
        ),
        Case(
            "topk_attention", "LSNet step", "4x3x256x256", partial(step_setup, 4, 256), plain,
            lambda mode, size: attention_cost(16 * 16384, 2048, 24, 6, 16 * 16384, BOTH, size), modes=(STEP,),
            note="forward, L1, backward and Adam; costs are those of the attention",
        ),
    ]  # fmt: skip
    for case in cases:
        registry.add(case)
