"""Sample inputs of the head ops: slices of every kind with and without masters, and edits of heads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pyml.testing.samples import Sample

Build = Callable[[Generator], dict[str, Any]]
Shape = tuple[int, ...]
STATE = (("exp_avgs", torch.float32), ("exp_avg_sqs", torch.float32))
MASTERS = (*STATE, ("masters", torch.float32))


def _randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _columns(g: Generator, rows: int, columns: int, width: int) -> Tensor:
    """Columns of a wider matrix, as the heads of an output projection are."""
    return _randn(g, rows, width)[:, 3 : 3 + columns]


def _slices(
    shapes: list[Shape], step: int = 3, columns: bool = False, masters: bool = False, key: bool = False, **more: Any
) -> Build:
    def build(g: Generator) -> dict[str, Any]:
        params = [_columns(g, s[0], s[1], 2 * s[1] + 5) if columns else _randn(g, *s) for s in shapes]
        if masters:  # exact in every dtype, so that each takes the same side of "has something else written to it?"
            for p in params:
                p.mul_(16).round_().div_(16)
        values: dict[str, Any] = {
            "params": params,
            "grads": [_randn(g, *s) for s in shapes],
            "exp_avgs": [0.3 * _randn(g, *s) for s in shapes],
            "exp_avg_sqs": [0.01 + _randn(g, *s) ** 2 for s in shapes],
            "step": step,
            "lr": 0.05,
            "betas": (0.9, 0.99),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "masters": [p + (_randn(g, *p.shape) > 1) for p in params] if masters else [],
            "key": torch.randint(-(2**62), 2**62, (1,), generator=g) if key else None,
            "ids": None,
        }
        return values | more

    return build


_THREE: list[Shape] = [(3, 4), (5, 2), (7,)]
_ADAMW = [
    Sample("three", _slices(_THREE), tiny=True, keep=STATE),
    Sample("state-of-the-dtype", _slices(_THREE, step=1), tiny=True),
    Sample("masters", _slices(_THREE, masters=True), tiny=True, keep=MASTERS),
    Sample("stochastic", _slices([(3, 50), (70,)], key=True, ids=[7, 2]), tiny=True, keep=STATE),
    Sample("no-decay", _slices([(4, 5)], weight_decay=0.0, betas=(0.0, 0.5), step=2**31), tiny=True, keep=STATE),
    Sample("no-dimensions", _slices([(), (1, 1)], lr=0.0), tiny=True, keep=STATE),
    Sample("rows", _slices([(128, 300), (64, 129), (1, 1030)]), keep=STATE),
    Sample("columns", _slices([(100, 128), (70, 33), (65, 7), (513, 1)], columns=True), keep=STATE),
    Sample("columns-masters", _slices([(100, 128), (9, 600)], columns=True, masters=True), keep=MASTERS),
    Sample("columns-stochastic", _slices([(70, 40), (30, 200)], columns=True, key=True), keep=STATE),
    Sample("more-dimensions", _slices([(3, 5, 70), (2, 3, 4, 5), (1000,)], eps=1e-3), keep=STATE),
    Sample("float32-gradients", _slices([(20, 64)]), keep=(("grads", torch.float32), *STATE)),
    Sample("some-empty", _slices([(0, 3), (5,), (2, 0)]), tiny=True, keep=STATE),
    Sample("empty", _slices([(0, 3)]), tiny=True, empty=True, keep=STATE),
]  # fmt: skip


def _edit(
    lead: Shape, heads: int, dim: int, chosen: tuple[int, ...], values: Shape | None = None, matrix: bool = False,
    strength: float = 1.0,
) -> Build:  # fmt: skip
    """values: the leading dimensions of the values, or None."""

    def build(g: Generator) -> dict[str, Any]:
        return {
            "x": _randn(g, *lead, heads, dim),
            "heads": chosen,
            "values": None if values is None else _randn(g, *values, len(chosen), dim),
            "matrix": 0.5 * _randn(g, len(chosen), dim, dim) if matrix else None,
            "strength": strength,
        }

    return build


_EDITS = [
    Sample("affine", _edit((3,), 4, 2, (2, 0), (3,), True), tiny=True, smooth=True),
    Sample("smooth-strength", _edit((2, 2), 3, 2, (1,), (2, 1), True, 0.3), tiny=True, smooth=True),
    Sample("replace", _edit((2, 3), 3, 5, (1, 2), (1, 3)), tiny=True),
    Sample("zero", _edit((4,), 3, 3, (0, 2)), tiny=True),
    Sample("matrix", _edit((5,), 2, 3, (1,), None, True, -1.5), tiny=True),
    Sample("shrunk", _edit((3,), 2, 3, (1,), None, False, 0.25), tiny=True),
    Sample("none-chosen", _edit((3,), 2, 3, (), (1,)), tiny=True),
    Sample("all", _edit((), 3, 4, (2, 1, 0), (), True), tiny=True),
    Sample("mean-ablate", _edit((2, 70), 8, 64, (7, 3, 0), ()), tiny=False),
    Sample("rows", _edit((2, 67), 8, 64, (5, 1), (2, 1), True)),
    Sample("odd-dims", _edit((2, 2, 35), 5, 37, (4, 0, 2), (2, 2, 35), True, 0.7)),
    Sample("wide-heads", _edit((130,), 3, 130, (1,), None, True)),
    Sample("many-rows", _edit((1100,), 2, 18, (0, 1), (1,), True, 2.0)),
    Sample("float32-maps", _edit((2, 3), 3, 5, (1, 2), (1, 3), True), tiny=True,
           keep=(("values", torch.float32), ("matrix", torch.float32))),
    Sample("empty", _edit((0,), 3, 4, (1,), (0,), True), tiny=True, empty=True),
    Sample("empty-heads", _edit((3,), 2, 0, (1,), (3,), True), tiny=True, empty=True),
]  # fmt: skip

SAMPLES = {"adamw_slices_": _ADAMW, "head_edit": _EDITS, "head_edit_": _EDITS}
