"""Knockout curves: what is left of a behaviour when its first n heads are silent."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyml.heads.adapters import adapter, at
from pyml.heads.edits import ablate, as_batches, check_means, head_means
from pyml.heads.hooks import evaluating
from pyml.heads.metrics import Metric
from pyml.heads.selection import as_heads
from pyml.ops import _check


class KnockoutCurve(NamedTuple):
    """The value when the first `counts` heads are knocked out."""

    counts: list[int]
    values: list[float]


def knockout(
    model: Any, data: Any, heads: Any, mode: str = "zero", metric: Any = None, *, counts: Sequence[int] | None = None,
    means: Tensor | None = None, evaluate: Callable[[Any], float] | None = None,
) -> KnockoutCurve:  # fmt: skip
    """The mean metric (or anything else) with the first n heads silent, for each n.

    Args:
        model: a causal LM of a known layout.
        data: a batch or a list of batches; None where `evaluate` is given and no means are needed.
        heads: pairs (layer, head) in the order of their importance.
        mode: "zero" (as SPT's public code) or "mean" (as the arithmetic paper): outputs at every position.
        metric: see `pyml.heads.path_patch`; tokens for each sample need one batch.
        counts: by default 0, 1, ..., all.
        means: from `head_means`; by default over `data`.
        evaluate: instead of a metric: a function from the model to a number, such as an accuracy.

    Raises:
        ValueError, TypeError: one sentence.
    """
    op = "knockout"
    a = adapter(model, op)
    chosen = as_heads(op, "heads", heads, a.num_layers, a.num_heads)
    steps = list(range(len(chosen) + 1)) if counts is None else list(counts)
    if not all(isinstance(n, int) and 0 <= n <= len(chosen) for n in steps):
        _check.fail(op, "counts", f"integers in 0..{len(chosen)}", steps)
    if (metric is None) == (evaluate is None):
        _check.fail(op, "metric", "a metric or a function evaluate, one of the two", "neither or both")
    _check.member(op, "mode", mode, ("zero", "mean"))
    several = as_batches(op, a, data) if data is not None or metric is not None else []
    if mode == "mean" and means is None:
        if not several:
            _check.fail(op, "data", 'batches or means, with mode "mean"', "neither")
        means = head_means(a, several, chosen)
    if mode == "zero" and means is not None:
        _check.fail(op, "means", 'none with mode "zero"', "means")
    if means is not None:
        check_means(op, a, means, len(chosen))

    def measured() -> float:
        if evaluate is not None:
            return float(evaluate(a.model))
        found = []
        with torch.no_grad(), evaluating(a.model):
            for batch in several:
                count = len(batch["input_ids"])
                last = at(a.hidden(batch), a.last(batch))
                found.append(Metric(op, a, metric, count)(last, slice(0, count)).double())
        return float(torch.cat(found).mean())

    values = []
    for n in steps:
        with ablate(a, chosen[:n], mode, means=None if means is None else means[:n]):
            values.append(measured())
    return KnockoutCurve(steps, values)
