"""What is meant by "these heads": lists, masks, and the rules that choose them by their scores."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyml.ops import _check

Head = tuple[int, int]


class PathScores(NamedTuple):
    """Scores of heads ``[L, H]`` and of MLPs ``[L]`` (None where not asked for), on the CPU, and the metric of the
    clean run ``[B]``. The most negative score is that of the part that carries the behaviour most."""

    heads: Tensor
    mlps: Tensor | None
    clean: Tensor


class Selection(NamedTuple):
    """Chosen heads (layer, head) and MLPs (layer), the most important first."""

    heads: list[Head]
    mlps: list[int]


def top_k(scores: Any, k: int, *, mlps: bool = False, largest: bool = False) -> Selection:
    """The k most negative scores (the SPT rule), or the largest; with ``mlps`` the MLPs compete."""
    order = _ranked("top_k", scores, mlps, largest)
    if not isinstance(k, int) or not 0 <= k <= len(order):
        _check.fail("top_k", "k", f"an integer in 0..{len(order)}", k)
    return _selection(order[:k])


def share(scores: Any, fraction: float = 0.05, *, mlps: bool = False, largest: bool = False) -> Selection:
    """The most important modules, as many as stay below a fraction of all (at least one); says what it chose."""
    order = _ranked("share", scores, mlps, largest)
    if not 0 < fraction <= 1:
        _check.fail("share", "fraction", "a number in (0, 1]", fraction)
    k = max(1, math.ceil(fraction * len(order) - 1e-9) - 1)  # the largest k below the fraction
    k = len(order) if fraction == 1 else k
    found = _selection(order[:k])
    parts = "heads and MLPs" if mlps else "heads"
    print(f"chose {k} of {len(order)} {parts} ({100 * k / len(order):.1f} %): {found.heads + found.mlps}")
    return found


def threshold(scores: Any, below: float = -0.05, *, mlps: bool = False) -> Selection:
    """All modules whose score lies below a bound (the arithmetic paper's key heads: below -5 %)."""
    return _selection([item for item in _ranked("threshold", scores, mlps, False) if item[0] < below])


def random_heads(num_layers: int, num_heads: int, k: int, *, seed: int, exclude: Iterable[Head] = ()) -> list[Head]:
    """k heads drawn without replacement, the control of every claim about chosen ones."""
    out = set(exclude)
    free = [(layer, head) for layer in range(num_layers) for head in range(num_heads) if (layer, head) not in out]
    if not 0 <= k <= len(free):
        _check.fail("random_heads", "k", f"an integer in 0..{len(free)}", k)
    return random.Random(seed).sample(free, k)


def as_heads(op: str, argument: str, heads: Any, num_layers: int, num_heads: int) -> list[Head]:
    """Pairs (layer, head) from a list of them or a bool mask ``[L, H]``: distinct, in range, in their order."""
    if isinstance(heads, Selection):
        if heads.mlps:
            _check.fail(op, argument, "heads alone (.heads of the selection)", f"MLPs of layers {heads.mlps} too")
        heads = heads.heads
    if isinstance(heads, Tensor):
        if heads.dtype != torch.bool or heads.shape != (num_layers, num_heads):
            got = f"{list(heads.shape)} of {heads.dtype}"
            _check.fail(op, argument, f"a bool mask [L, H] = [{num_layers}, {num_heads}]", got)
        return [(int(layer), int(head)) for layer, head in heads.nonzero().tolist()]
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        _check.fail(op, argument, "a list of (layer, head) or a bool mask [L, H]", type(heads).__name__, TypeError)
    found: list[Head] = []
    for item in heads:
        pair = tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else ()
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
            _check.fail(op, argument, "pairs (layer, head) of integers", repr(item))
        if not (0 <= pair[0] < num_layers and 0 <= pair[1] < num_heads):
            _check.fail(op, argument, f"layers in 0..{num_layers - 1} and heads in 0..{num_heads - 1}", repr(item))
        if pair in found:
            _check.fail(op, argument, "heads that differ", f"{pair} twice")
        found.append((pair[0], pair[1]))
    return found


def split(heads: Any) -> tuple[Any, list[int]]:
    """A choice of heads without the MLPs of its `Selection`, or of those for each projection, and these MLPs."""
    if isinstance(heads, Mapping):
        parts = {name: split(part) for name, part in heads.items()}
        mlps = sorted({layer for _, layers in parts.values() for layer in layers})
        return {name: chosen for name, (chosen, _) in parts.items()}, mlps
    return (heads.heads, sorted(set(heads.mlps))) if isinstance(heads, Selection) else (heads, [])


def by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    """The heads of each layer, ascending."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def by_projection(
    op: str, heads: Any, projections: Sequence[str], num_layers: int, num_heads: int
) -> dict[str, list[Head]]:
    """The heads of each projection, from one choice for all or a dict of choices."""
    names = list(heads) if isinstance(heads, Mapping) else list(projections)
    for name in names:
        _check.member(op, "projections", name, ("q", "k", "v", "o"))
    if len(set(names)) != len(names):
        _check.fail(op, "projections", "projections that differ", names)
    chosen = heads if isinstance(heads, Mapping) else dict.fromkeys(names, heads)
    return {name: as_heads(op, "heads", chosen[name], num_layers, num_heads) for name in names}


def _ranked(op: str, scores: Any, mlps: bool, largest: bool) -> list[tuple[float, int, int | None]]:
    """(score, layer, head or None for the MLP), the most important first; equal scores keep the order of the model."""
    heads = scores.heads if isinstance(scores, PathScores) else scores
    if not isinstance(heads, Tensor) or heads.dim() != 2:
        _check.fail(op, "scores", "PathScores or a tensor [L, H]", type(scores).__name__, TypeError)
    items: list[tuple[float, int, int | None]] = [
        (value, layer, head) for layer, row in enumerate(heads.tolist()) for head, value in enumerate(row)
    ]
    if mlps:
        extra = scores.mlps if isinstance(scores, PathScores) else None
        if extra is None:
            _check.fail(op, "scores", "PathScores with scores of the MLPs", "none of MLPs")
        items += [(value, layer, None) for layer, value in enumerate(extra.tolist())]
    wrong = [value for value, _, _ in items if not math.isfinite(value)]
    if wrong:
        expected = "finite scores (a relative score is not where the clean metric is 0)"
        _check.fail(op, "scores", expected, wrong[0])
    return sorted(items, key=lambda item: -item[0] if largest else item[0])


def _selection(items: Iterable[tuple[float, int, int | None]]) -> Selection:
    chosen = list(items)
    return Selection(
        [(layer, head) for _, layer, head in chosen if head is not None],
        [layer for _, layer, head in chosen if head is None],
    )


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def positive(value: Any) -> bool:
    """A finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
