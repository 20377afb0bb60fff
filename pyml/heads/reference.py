"""The published ways, slow: path patching with a forward a head, the truth that `pyml.heads.path_patch` is tested
against; and training by masks on whole gradients, a baseline of the benchmarks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyml.heads.adapters import Adapter, adapter, at
from pyml.heads.hooks import evaluating, first_argument, hooked, replaced
from pyml.heads.metrics import Metric
from pyml.heads.patching import Record, Source, all_sources, prepared, record, scores
from pyml.heads.selection import PathScores, by_projection


def path_patch_loop(
    model: Any, clean: Mapping[str, Tensor], counterfactual: Mapping[str, Tensor], metric: Any, *, mlps: bool = False,
    difference: str = "relative",
) -> PathScores:  # fmt: skip
    """Scores by a forward for each head (and MLP); arguments and result of `pyml.heads.path_patch`."""
    a, first, second, values = prepared("path_patch_loop", model, clean, counterfactual, metric, difference)
    sources = all_sources(a, mlps)
    base, run = patched_runs(a, first, second, values)
    return scores(a, sources, torch.stack([run(source) for source in sources]), base, difference)


def patched_runs(
    a: Adapter, first: dict[str, Tensor], second: dict[str, Tensor], values: Metric
) -> tuple[Tensor, Callable[[Source], Tensor]]:
    """The metric of the clean run ``[B]``, and a function that gives it with one source patched."""
    with torch.no_grad(), evaluating(a.model):
        inputs = _attention_inputs(a, first)
        other = record(a, second)
        base = values(at(a.hidden(first), a.last(first)), slice(0, len(first["input_ids"])))

    def run(source: Source) -> Tensor:
        with torch.no_grad(), evaluating(a.model):
            return _patched(a, first, inputs, other, source, values)

    return base, run


def mask_by_hook(model: Any, heads: Any, projections: Sequence[str]) -> list[nn.Parameter]:
    """Freezes a model but for the whole matrices that hold the heads, with a hook on each gradient that zeroes the
    rest of it: how head-only training is done without slices. Layouts without fused projections.

    An optimizer with weight decay still moves what is masked.
    """
    a = adapter(model, "mask_by_hook")
    a.model.requires_grad_(False)
    found: list[nn.Parameter] = []
    for name, chosen in by_projection("mask_by_hook", heads, projections, a.num_layers, a.num_heads).items():
        place = a.places[name]
        for layer in sorted({layer for layer, _ in chosen}):
            members = sorted({a.group(h) if name in "kv" else h for at_layer, h in chosen if at_layer == layer})
            weight = getattr(a.attention(layer), place.attribute).weight

            def masked(grad: Tensor, members: list[int] = members, dim: int = place.dim) -> Tensor:
                kept = torch.zeros_like(grad)
                for head in members:
                    part = (dim, head * a.head_dim, a.head_dim)
                    kept.narrow(*part).copy_(grad.narrow(*part))
                return kept

            weight.requires_grad_(True).register_hook(masked)
            found.append(weight)
    return found


def _attention_inputs(a: Adapter, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each attention module reads at the last real token."""
    found: list[Tensor] = []
    last = a.last(batch)
    with hooked() as handles:
        for layer in range(a.num_layers):
            module = a.attention(layer)
            keep = lambda m, args, kwargs: found.append(at(first_argument(args, kwargs), last))  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        a.hidden(batch)
    return found


def _patched(
    a: Adapter, batch: dict[str, Tensor], inputs: list[Tensor], other: Record, source: Source, values: Metric
) -> Tensor:
    """The metric of one run with one patch, every later attention reading at the last token what it read before."""
    last = a.last(batch)
    rows = torch.arange(len(last), device=last.device)

    def written(x: Tensor, value: Tensor, columns: slice | None = None) -> Tensor:
        columns = columns or slice(None)
        x = x.clone()
        x[rows, last, columns] = value[:, columns]
        return x

    def freeze(layer: int) -> Any:
        return lambda m, args, kwargs: replaced(args, kwargs, written(first_argument(args, kwargs), inputs[layer]))

    with hooked() as handles:
        for layer in range(source.layer + 1, a.num_layers):
            handles.append(a.attention(layer).register_forward_pre_hook(freeze(layer), with_kwargs=True))
        if source.head is None:
            put = lambda m, args, out: written(out, other.mlp[source.layer])  # noqa: E731
            handles.append(a.mlp(source.layer).register_forward_hook(put))
        else:
            columns = slice(source.head * a.head_dim, (source.head + 1) * a.head_dim)
            swap = lambda m, args: (written(args[0], other.heads[source.layer], columns), *args[1:])  # noqa: E731
            handles.append(a.output(source.layer).register_forward_pre_hook(swap))
        return values(at(a.hidden(batch), last), slice(0, len(last)))
