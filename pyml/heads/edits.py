"""Changing what chosen heads put out, while a model runs: the way of knockouts and of steering.

The outputs of heads are the input of o_proj, ``[B, T, H, D]`` there; a hook edits them with `pyml.ops.head_edit`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyml.heads.acting import Where
from pyml.heads.adapters import Adapter, adapter, at
from pyml.heads.hooks import evaluating, hooked
from pyml.heads.selection import Head, as_heads, by_layer
from pyml.ops import _check, head_edit, head_edit_

MODES = ("zero", "mean")


@dataclass
class Edit:
    """Of the heads of one layer: output z becomes ``matrix z + values``; no matrix is 0, no values are 0.

    values ``[k, D]``, matrix ``[k, D, D]``.
    """

    heads: tuple[int, ...]
    values: Tensor | None = None
    matrix: Tensor | None = None

    def __call__(self, x: Tensor, where: Where | None = None) -> Tensor:
        """Of ``[B, T, H, D]``; ``where`` says at which positions, where it is not every one."""
        wide = torch.promote_types(x.dtype, torch.float32)  # a map near the identity has no digits left in 16 bits
        values = None if self.values is None else self.values.to(x.device, wide)
        matrix = None if self.matrix is None else self.matrix.to(x.device, wide)
        how = self.heads, values, matrix
        new = torch.is_grad_enabled() or x.requires_grad  # a reentrant checkpoint has leaves under no_grad
        if where is None:
            return head_edit(x, *how) if new else head_edit_(x, *how)
        index = where(x)
        if new:
            return x.index_put(index, head_edit(x[index], *how))
        x[index] = head_edit_(x[index], *how)
        return x


def install(a: Adapter, edits: Mapping[int, Edit], where: Where | None = None) -> list[Any]:
    """Hooks on o_proj for the edits of these layers, at some positions alone or at every one; their handles."""

    def hook(edit: Edit) -> Any:
        def before(module: Any, args: Any) -> Any:
            shape = (a.num_heads, a.head_dim)
            return (edit(args[0].unflatten(-1, shape), where).flatten(-2), *args[1:])

        return before

    return [a.output(layer).register_forward_pre_hook(hook(edit)) for layer, edit in edits.items()]


@contextmanager
def ablate(model: Any, heads: Any, mode: str = "zero", *, means: Tensor | None = None) -> Iterator[None]:
    """Within it, these heads put out nothing ("zero") or their mean ("mean") at every position, in any run.

    Zero and mean are different experiments: zero also takes the head's constant part away.

    Args:
        model: a causal LM, or its adapter.
        heads: pairs (layer, head), or a bool mask ``[L, H]``.
        mode: "zero" or "mean".
        means: ``[k, D]`` in the order of the heads, from `head_means`; for "mean" alone.
    """
    op = "ablate"
    a = adapter(model, op)
    chosen = as_heads(op, "heads", heads, a.num_layers, a.num_heads)
    _check.member(op, "mode", mode, MODES)
    if (mode == "mean") != (means is not None):
        _check.fail(op, "means", 'the means of the heads with mode "mean", else none', type(means).__name__)
    if means is not None:
        check_means(op, a, means, len(chosen))
    edits = {}
    for layer, members in by_layer(chosen).items():
        rows = [chosen.index((layer, head)) for head in members]
        edits[layer] = Edit(tuple(members), None if means is None else means[rows])
    with hooked() as handles:
        handles += install(a, edits)
        yield


def check_means(op: str, a: Adapter, means: Any, count: int) -> None:
    """One sentence where there is not a row of floats for each head."""
    _check.tensors(op, means, first_name="means")
    _check.shape(op, "means", means, (count, a.head_dim), "[k, D], a row a head")


def as_batches(op: str, a: Adapter, data: Any, name: str = "data") -> list[dict[str, Tensor]]:
    """One batch or several, checked, at least one."""
    several = [data] if isinstance(data, Mapping) else data
    if not isinstance(several, Iterable) or isinstance(several, str):
        _check.fail(op, name, "a batch or a list of batches", type(data).__name__, TypeError)
    found = [a.batch(op, batch, name) for batch in several]
    if not found:
        _check.fail(op, name, "at least one batch", "none")
    return found


def outputs(
    a: Adapter, several: list[dict[str, Tensor]], heads: list[Head], positions: str
) -> Iterator[tuple[Head, Tensor]]:
    """(head, its outputs ``[N, D]``), once for each head and batch, at the last or at all real tokens."""
    with torch.no_grad(), evaluating(a.model):
        for batch in several:
            seen: dict[int, Tensor] = {}

            def keep(layer: int, seen: dict[int, Tensor] = seen) -> Any:
                return lambda module, args: seen.__setitem__(layer, args[0])

            with hooked() as handles:
                for layer in by_layer(heads):
                    handles.append(a.output(layer).register_forward_pre_hook(keep(layer)))
                a.hidden(batch)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
            for layer, head in heads:
                z = seen[layer].unflatten(-1, (a.num_heads, a.head_dim))[:, :, head]
                yield (layer, head), at(z, a.last(batch)) if positions == "last" else z[mask]


def head_means(model: Any, batches: Any, heads: Any) -> Tensor:
    """``[k, D]``: mean outputs of these heads over all real tokens of a batch, or of a list of them."""
    op = "head_means"
    a = adapter(model, op)
    chosen = as_heads(op, "heads", heads, a.num_layers, a.num_heads)
    sums = {head: torch.zeros(a.head_dim, dtype=torch.float64, device=a.device) for head in chosen}
    counts = dict.fromkeys(chosen, 0)
    for head, z in outputs(a, as_batches(op, a, batches, "batches"), chosen, "all"):
        sums[head] += z.double().sum(0)
        counts[head] += len(z)
    rows = [sums[head] / counts[head] for head in chosen]
    dtype = torch.promote_types(a.output(0).weight.dtype, torch.float32)
    return torch.stack(rows).to(dtype) if rows else torch.zeros((0, a.head_dim), dtype=dtype, device=a.device)
