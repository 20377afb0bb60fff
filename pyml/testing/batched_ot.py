"""Sample inputs of batched optimal transport: odd sizes, weights, masks, small eps, unbalanced, early stops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pyml.reference import batched_ot as reference
from pyml.testing.samples import Sample

Build = Callable[[Generator], dict[str, Any]]


def _uniform(g: Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64) * (high - low) + low


def _weights(g: Generator, lead: tuple[int, ...], size: int, kind: str) -> Tensor | None:
    """Multiples of 1/256 with sum 1, which no rounding to a dtype changes; "zeros": some are 0; "free": any sum."""
    if kind == "uniform":
        return None
    if kind == "free":
        return 0.25 + _uniform(g, *lead, size)
    parts = torch.ones(*lead, size, dtype=torch.float64)
    if kind == "zeros":
        parts[..., size // 2 :: 3] = 0
    rest = 256 - parts.sum(-1).long()
    share = parts / parts.sum(-1, keepdim=True)
    more = (share * rest.unsqueeze(-1)).floor() * parts
    parts = parts + more
    first = parts.argmax(-1, keepdim=True)
    parts.scatter_add_(-1, first, (256 - parts.sum(-1, keepdim=True)))
    return parts / 256


def _solve(
    lead: tuple[int, ...] = (2,), n: int = 4, m: int = 3, weights: str = "uniform", eps: float = 0.1,
    max_iter: int = 10, tol: float | None = None, rho: float | None = None, implicit: bool = False, init: bool = False,
    scale: float = 1.0,
) -> Build:  # fmt: skip
    def build(g: Generator) -> dict[str, Any]:
        return {
            "cost": _uniform(g, *lead, n, m, high=scale),
            "a": _weights(g, lead, n, weights),
            "b": _weights(g, lead, m, weights),
            "init": _uniform(g, *lead, m, high=0.2) if init else None,
            "eps": eps,
            "max_iter": max_iter,
            "tol": tol,
            "rho": rho,
            "implicit": implicit,
        }

    return build


_SOLVE = [
    # Finite differences need convergence, and weights that may move apart: a and b have them in unbalanced problems.
    # Each iteration takes long in Triton's interpreter, so tiny samples converge within a few.
    Sample("smooth-unbalanced", _solve(n=3, m=2, weights="free", eps=0.5, rho=0.2, max_iter=10, implicit=True),
           tiny=True, smooth=True),
    Sample("smooth", _solve(lead=(), n=5, m=3, eps=0.5, max_iter=16, implicit=True), tiny=True, smooth=True),
    Sample("smooth-unbalanced-init", _solve(lead=(), n=2, m=4, weights="some", eps=0.5, rho=0.2, max_iter=11, init=True,
           implicit=True), tiny=True, smooth=True),
    Sample("one-row", _solve(lead=(), n=1, m=5, max_iter=2), tiny=True),
    Sample("float32-weights-late", _solve(lead=(), n=3, m=5, weights="some", eps=0.01, tol=1e-9, max_iter=6), tiny=True,
           keep=(("a", torch.float32), ("b", torch.float32))),
    Sample("plot", _solve(lead=(5, 7), n=49, m=4, max_iter=100)),
    Sample("plot-vit", _solve(lead=(9,), n=196, m=16, max_iter=50)),
    Sample("square", _solve(lead=(3,), n=64, m=64, max_iter=30)),
    Sample("large", _solve(lead=(2,), n=150, m=170, max_iter=20)),
    Sample("tall", _solve(lead=(3,), n=500, m=3, max_iter=30)),
    Sample("wide", _solve(lead=(3,), n=3, m=400, max_iter=30)),
    Sample("tall-50", _solve(lead=(3,), n=130, m=21, weights="zeros", max_iter=25)),
    Sample("many-tiny", _solve(lead=(37,), n=5, m=6, weights="some", max_iter=25)),
    Sample("weights", _solve(lead=(3, 2), n=19, m=23, weights="some", max_iter=25)),
    Sample("zeros", _solve(lead=(18,), n=17, m=9, weights="zeros", max_iter=25)),
    Sample("zeros-large", _solve(lead=(2,), n=33, m=60, weights="zeros", max_iter=25)),
    Sample("init", _solve(lead=(17,), n=12, m=8, init=True, max_iter=7)),
    Sample("init-large", _solve(n=40, m=50, init=True, max_iter=7)),
    Sample("eps-0.01", _solve(lead=(17,), n=20, m=10, eps=0.01, max_iter=30)),
    Sample("eps-0.01-large", _solve(n=50, m=70, eps=0.01, max_iter=30)),
    Sample("eps-0.001", _solve(lead=(3,), n=30, m=20, eps=0.001, max_iter=30)),
    Sample("eps-0.001-large", _solve(n=40, m=60, eps=0.001, max_iter=30)),
    Sample("scale-1000", _solve(lead=(3,), n=20, m=50, eps=1.0, scale=1000.0, max_iter=30)),
    Sample("stops", _solve(lead=(33,), n=11, m=7, eps=0.05, tol=1e-3, max_iter=100)),
    Sample("stops-large", _solve(lead=(5,), n=40, m=30, eps=0.05, tol=1e-3, max_iter=100)),
    Sample("does-not-stop", _solve(lead=(5,), n=8, m=9, eps=0.01, tol=1e-9, max_iter=12)),
    Sample("unbalanced", _solve(lead=(18,), n=13, m=11, weights="free", rho=0.5, max_iter=30)),
    Sample("unbalanced-large", _solve(n=60, m=40, weights="free", rho=0.2, tol=1e-3, max_iter=60)),
    Sample("unbalanced-zeros", _solve(n=33, m=60, weights="zeros", rho=1.0, max_iter=20)),
    Sample("implicit", _solve(lead=(17,), n=16, m=4, implicit=True, max_iter=100)),
    Sample("implicit-large", _solve(n=40, m=90, eps=0.2, implicit=True, max_iter=100)),
    Sample("implicit-weights", _solve(n=50, m=20, weights="zeros", eps=0.2, implicit=True, max_iter=100)),
    Sample("implicit-unbalanced", _solve(n=50, m=20, weights="free", eps=0.2, rho=0.5, implicit=True, max_iter=100)),
    Sample("implicit-rows", _solve(lead=(), n=7, m=2, eps=0.4, implicit=True, max_iter=400)),
    Sample("implicit-few-rows", _solve(lead=(), n=7, m=2, eps=0.4, implicit=True, max_iter=12), tiny=True),
    Sample("implicit-unbalanced-init", _solve(n=3, m=5, weights="some", eps=0.5, rho=0.7, implicit=True, init=True,
           max_iter=400)),
    Sample("one", _solve(n=1, m=1)),
    Sample("one-once", _solve(n=1, m=1, max_iter=1), tiny=True),
    Sample("late", _solve(n=2, m=3, eps=0.05, tol=1e-9, max_iter=6), tiny=True),
    Sample("float32-weights", _solve(weights="some"), keep=(("a", torch.float32), ("b", torch.float32))),
    Sample("no-batch", _solve(lead=(0,)), tiny=True, empty=True),
    Sample("no-rows", _solve(n=0), tiny=True, empty=True),
    Sample("no-columns", _solve(m=0), tiny=True, empty=True),
]  # fmt: skip


def _plan(lead: tuple[int, ...] = (2,), n: int = 4, m: int = 3, weights: str = "some", eps: float = 0.2) -> Build:
    def build(g: Generator) -> dict[str, Any]:
        cost, a, b = _uniform(g, *lead, n, m), _weights(g, lead, n, weights), _weights(g, lead, m, weights)
        f, p = reference.sinkhorn_solve(cost, a, b, None, eps, 20)[2:4]
        return {"cost": cost, "a": a, "b": b, "f": f, "g": p, "eps": eps}

    return build


_PLAN = [
    Sample("smooth", _plan(n=3, m=2), tiny=True, smooth=True),
    Sample("smooth-uniform", _plan(lead=(), n=2, m=4, weights="uniform"), tiny=True, smooth=True),
    Sample("plot", _plan(lead=(5, 7), n=49, m=4, weights="uniform")),
    Sample("zeros", _plan(lead=(3,), n=20, m=30, weights="zeros")),
    Sample("square", _plan(n=64, m=64, eps=0.05, weights="uniform")),
    Sample("float32-potentials", _plan(lead=()), tiny=True, keep=(("f", torch.float32), ("g", torch.float32))),
    Sample("no-batch", _plan(lead=(0,), weights="uniform"), tiny=True, empty=True),
    Sample("no-rows", _plan(n=0, weights="uniform"), tiny=True, empty=True),
    Sample("no-columns", _plan(m=0, weights="uniform"), tiny=True, empty=True),
]


def _points(
    lead: tuple[int, ...] = (2,), n: int = 4, m: int = 3, d: int = 5, kind: str = "sqeuclidean", far: float = 0.0
) -> Build:
    def build(g: Generator) -> dict[str, Any]:
        x, y = (_uniform(g, *lead, size, d, low=far - 1, high=far + 1) for size in (n, m))
        return {"x": x, "y": y, "kind": kind}

    return build


_PAIRWISE = [
    Sample("smooth", _points(n=3, m=2), tiny=True, smooth=True),
    Sample("smooth-cosine", _points(lead=(), n=2, m=3, kind="cosine"), tiny=True, smooth=True),
    Sample("one", _points(lead=(), n=1, m=1, d=1)),
    Sample("plot", _points(lead=(3, 2), n=49, m=4, d=70, kind="cosine")),
    Sample("few-rows", _points(lead=(2,), n=3, m=150, d=9)),
    Sample("square", _points(lead=(2,), n=140, m=133, d=65)),
    Sample("square-cosine", _points(lead=(), n=70, m=150, d=200, kind="cosine")),
    Sample("far", _points(n=20, m=30, d=3, far=30.0)),
    Sample("float32-y", _points(lead=()), tiny=True, keep=(("y", torch.float32),)),
    Sample("no-batch", _points(lead=(0,)), tiny=True, empty=True),
    Sample("no-points", _points(n=0), tiny=True, empty=True),
    Sample("no-coordinates", _points(d=0, kind="cosine"), tiny=True, empty=True),
]

SAMPLES = {"sinkhorn_solve": _SOLVE, "sinkhorn_plan": _PLAN, "pairwise_cost": _PAIRWISE}
