"""Sample inputs of the noise ops: every kind of scale, shards, lists of odd sizes, groups and bad samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pyml.testing.samples import Sample

Build = Callable[[Generator], dict[str, Any]]
Shape = tuple[int, ...]


def _randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _positive(g: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64) + 0.25


def _scales(g: Generator, shapes: list[Shape], kind: str) -> dict[str, list[Tensor]]:
    """ "number": one for all; "each": a number a tensor; "elements"; "factors"; "mixed": in turn."""
    if kind == "number":
        return {"scale": [_positive(g)], "columns": []}
    kinds = ["elements", "factors", "each"] if kind == "mixed" else [kind]
    scale, columns = [], []
    for n, shape in enumerate(shapes):
        own = kinds[n % len(kinds)] if shape else "each"
        columns.append(torch.ones((), dtype=torch.float64))
        if own == "elements":
            scale.append(_positive(g, *shape))
        elif own == "factors":
            scale.append(_positive(g, shape[0]))
            columns[-1] = _positive(g, torch.Size(shape[1:]).numel())
        else:
            scale.append(_positive(g))
    return {"scale": scale, "columns": columns if any(c.dim() for c in columns) else []}


def _key(g: Generator) -> Tensor:
    return torch.randint(-(2**62), 2**62, (1,), generator=g)


def _single(shape: Shape, kind: str = "number", std: float = 0.7, step: int = 3) -> Build:
    def build(g: Generator) -> dict[str, Any]:
        s = _scales(g, [shape], kind)
        columns = s["columns"][0] if s["columns"] else None
        return {
            "x": _randn(g, *shape),
            "scale": s["scale"][0],
            "columns": columns,
            "std": std,
            "key": _key(g),
            "step": step,
        }

    return build


_SINGLE = [
    Sample("smooth", _single((3, 5)), tiny=True, smooth=True),
    Sample("smooth-elements", _single((2, 3), "elements"), tiny=True, smooth=True),
    Sample("smooth-factors", _single((3, 2, 2), "factors"), tiny=True, smooth=True),
    Sample("blocks", _single((7, 129), "elements")),
    Sample("number", _single((5000,), step=2**32 - 1)),
    Sample("factors", _single((40, 3, 50), "factors")),
    Sample("factors-of-a-line", _single((300,), "factors")),
    Sample("no-dimensions", _single(()), tiny=True),
    Sample("no-noise", _single((70,), std=0.0), tiny=True),
    Sample("float32-scale", _single((4, 20), "elements"), tiny=True, keep=(("scale", torch.float32),)),
    Sample("empty", _single((3, 0), "factors"), tiny=True, empty=True),
]  # fmt: skip


def _list(shapes: list[Shape], kind: str = "number", divide_by: float = 1.0, sgd: bool = False, **places: Any) -> Build:
    def build(g: Generator) -> dict[str, Any]:
        tensors = {"tensors": [_randn(g, *s) for s in shapes]}
        if sgd:
            tensors = {"params": [_randn(g, *s) for s in shapes], "grads": tensors["tensors"]}
        options = {"std": 0.9, "key": _key(g), "step": 11, "ids": None, "offsets": None, "divide_by": divide_by}
        return tensors | _scales(g, shapes, kind) | options | places | ({"lr": 0.3} if sgd else {})

    return build


def _lists(sgd: bool) -> list[Sample]:
    three: list[Shape] = [(3, 4), (5, 2), (7,)]
    return [
        Sample("three", _list(three, "mixed", divide_by=4.0, sgd=sgd), tiny=True, smooth=True),
        Sample(
            "shards", _list(three, "number", sgd=sgd, ids=[4, 4, 2**32 - 1], offsets=[100, 1, 2**34 + 5]), tiny=True
        ),
        Sample("mixed", _list([(33, 70), (300,), (1, 1), (64,), (9, 5, 13)], "mixed", divide_by=256.0, sgd=sgd)),
        Sample("each", _list([(1000,), (63,), (65, 64), ()], "each", sgd=sgd)),
        Sample("elements", _list([(129, 65), (4096,)], "elements", divide_by=3.0, sgd=sgd, offsets=[63, 64])),
        Sample("factors", _list([(64, 640), (3, 7)], "factors", sgd=sgd)),
        Sample("float32-scale", _list(three, "elements", sgd=sgd), tiny=True, keep=(("scale", torch.float32),)),
        Sample("some-empty", _list([(0, 3), (5,), (2, 0)], "factors", sgd=sgd), tiny=True),
        Sample("empty", _list([(0, 3)], sgd=sgd), tiny=True, empty=True),
    ]


def _samples(
    shapes: list[Shape], batch: int, clip: list[float], kind: str | None = None, groups: list[int] | None = None,
    global_clip: float | None = None, odd: str = "",
) -> Build:  # fmt: skip
    def build(g: Generator) -> dict[str, Any]:
        grads = [_randn(g, batch, *s) for s in shapes]
        scales = {"scale": [], "columns": []} if kind is None else _scales(g, shapes, kind)
        if odd == "bad":
            grads[0].view(batch, -1)[1, 0], grads[-1].view(batch, -1)[3, -1] = torch.nan, torch.inf
        if odd == "dropped":
            for s in scales["scale"]:
                s.view(-1)[::3] = 0
            grads[0].view(batch, -1)[2, 0] = torch.nan  # of an element that takes no part
        return {"per_sample_grads": grads, "clip": clip} | scales | {"groups": groups, "global_clip": global_clip}

    return build


_CLIP = [
    Sample("three", _samples([(3, 4), (5,), ()], 6, [2.0]), tiny=True),
    Sample("whitened", _samples([(3, 4), (5,), (2, 2)], 5, [3.0], "mixed"), tiny=True),
    Sample("groups", _samples([(3, 4), (5,), (6,)], 7, [1.0, 4.0], groups=[0, 1, 0], global_clip=2.5), tiny=True),
    Sample("large", _samples([(100, 50), (4097,), (3, 5)], 37, [40.0])),
    Sample("large-whitened", _samples([(100, 50), (4097,), (30, 5)], 33, [60.0], "mixed", odd="dropped")),
    Sample("large-groups", _samples([(2048,), (70, 90), (1,)], 9, [5.0, 30.0, 0.0], groups=[1, 0, 2])),
    Sample("bad", _samples([(50, 60), (77,)], 8, [9.0], odd="bad")),
    Sample("dropped", _samples([(3, 4), (6,)], 5, [1.5], "elements", odd="dropped"), tiny=True),
    Sample("small-clip", _samples([(3, 4)], 3, [0.01], "number"), tiny=True),
    Sample("no-samples", _samples([(3, 4), (5,)], 0, [1.0]), tiny=True, empty=True),
    Sample("no-elements", _samples([(0, 4)], 3, [1.0]), tiny=True, empty=True),
]  # fmt: skip

SAMPLES = {
    "hetero_noise": _SINGLE,
    "hetero_noise_": _lists(False),
    "hetero_noise_sgd_": _lists(True),
    "clip_sum": _CLIP,
}
