"""Path patching as published: one forward a head. The truth that `pyml.heads.path_patch` is tested against."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyml.heads.adapters import Adapter, at, evaluating, first_argument, replaced
from pyml.heads.metrics import Metric
from pyml.heads.patching import Record, Source, all_sources, hooked, prepared, record, scores
from pyml.heads.selection import PathScores


def path_patch_loop(
    model: Any, clean: Mapping[str, Tensor], counterfactual: Mapping[str, Tensor], metric: Any, *, mlps: bool = False,
    difference: str = "relative",
) -> PathScores:  # fmt: skip
    """Scores by a forward for each head (and MLP); arguments and result of `pyml.heads.path_patch`."""
    a, first, second, values = prepared("path_patch_loop", model, clean, counterfactual, metric, difference)
    sources = all_sources(a, mlps)
    everything = slice(0, len(first["input_ids"]))
    with torch.no_grad(), evaluating(a.model):
        inputs = _attention_inputs(a, first)
        other = record(a, second)
        base = values(at(a.hidden(first), a.last(first)), everything)
        runs = [_patched(a, first, inputs, other, source, values) for source in sources]
    return scores(a, sources, torch.stack(runs), base, difference)


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
