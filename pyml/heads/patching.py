"""Which heads carry a behaviour: path patching without a forward a head, and its estimate from one backward.

Path patching asks what a head does to the last token's logits directly: the head's output there is taken from a
counterfactual run, while every later attention keeps the input it had in the clean run. So the patch travels through
the residual stream and the MLPs of one token alone, and all heads of all layers can travel together: two recording
forwards, and then some MLP rows a head, give what a forward a head gives.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.heads.adapters import Adapter, adapter, at, linear_weight
from pyml.heads.hooks import evaluating, first_argument, hooked
from pyml.heads.metrics import Metric
from pyml.heads.selection import PathScores
from pyml.ops import _check

DIFFERENCES = ("relative", "plain")
BUDGET = 1 << 28  # bytes
# Of an unpatched sweep from the run itself; norms are float32. Rounding alone reaches a third of these (parallel NeoX).
DEVIATION = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}


class Source(NamedTuple):
    """What is patched: a head of a layer, or (head None) its MLP."""

    layer: int
    head: int | None


@dataclass
class Record:
    """What one run had at the last real token, a tensor ``[B, ...]`` a layer."""

    residual: list[Tensor] = field(default_factory=list)  # before the block
    heads: list[Tensor] = field(default_factory=list)  # input of o_proj, [B, heads * head_dim]
    attention: list[Tensor] = field(default_factory=list)  # output of o_proj
    mlp: list[Tensor] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))  # behind the last norm


def path_patch(
    model: Any, clean: Mapping[str, Tensor], counterfactual: Mapping[str, Tensor], metric: Any, *, mlps: bool = False,
    difference: str = "relative", budget: int | None = None, batch_size: int | None = None,
) -> PathScores:  # fmt: skip
    """Scores of all heads by path patching to the last token's logits, exact, at the cost of about two forwards.

    It is the procedure of "From Yes-Men to Truth-Tellers" (ICML 2024); `path_patch_loop` is the same with a forward a
    head. Dropout is off, and the last token of a row is its last real one, whatever side the padding is on.

    Args:
        model: a causal LM of a layout that `pyml.heads.adapter` knows, or its adapter.
        clean, counterfactual: ``input_ids`` ``[B, T]`` and, where rows are padded, ``attention_mask``. Sample b of one
            belongs to sample b of the other; the lengths may differ.
        metric: ``(positive, negative)`` tokens or a function of the logits, see `pyml.heads.metrics.Metric`.
        mlps: also score the MLPs.
        difference: "relative", the mean of (m - m0) / m0 (-0.05 is -5 %), which explodes where m0 is near 0; or
            "plain", the mean of m - m0.
        budget: bytes that the states of the sweep may take; by default 256 MiB. Less memory, the same scores.
        batch_size: samples in one recording forward; by default all.

    Returns:
        `PathScores`: the most negative score is that of the head without which the metric falls most.

    Raises:
        ValueError, TypeError: one sentence; also where something else than attention, MLPs and norms changes the
            hidden states, such as hooks on blocks (an enabled `LayerSteering`) or hooks that change what an output
            projection puts out, which the sweep would miss.
    """
    op = "path_patch"
    a, first, second, values = prepared(op, model, clean, counterfactual, metric, difference)
    sources = all_sources(a, mlps)
    size = positive_int(op, "batch_size", batch_size, len(first["input_ids"]))
    room = positive_int(op, "budget", budget, BUDGET)
    found, base = [], []
    with torch.no_grad(), evaluating(a.model):
        for rows in batches(len(first["input_ids"]), size):
            before, other = record(a, cut(first, rows)), record(a, cut(second, rows))
            for run in (before, other):
                _same_outputs(op, a, run)
            base.append(values(before.final, rows))
            at_once = max(1, room // _bytes(a, before, values) - 1)  # and the unpatched row
            ends = []
            pieces = [sources[i : i + at_once] for i in range(0, len(sources), at_once)]
            for n, piece in enumerate(pieces):
                swept = _sweep(a, before, other, piece, unpatched=n == 0)
                if n == 0:
                    _same_run(op, swept[0], before.final)
                    swept = swept[1:]
                ends.append(values(swept, rows))
            found.append(torch.cat(ends))
    return scores(a, sources, torch.cat(found, 1), torch.cat(base), difference)


def attribution_patch(
    model: Any, clean: Mapping[str, Tensor], counterfactual: Mapping[str, Tensor], metric: Any, *, mlps: bool = False,
    difference: str = "relative", batch_size: int | None = None,
) -> PathScores:  # fmt: skip
    """An estimate from one forward and one backward: gradient of the metric times the change of the head's output.

    It is of first order, and over all paths: a change at the last token that later attention reads counts too. So it
    ranks candidates, and `path_patch` decides. Arguments and result as there, ``batch_size`` of the backward too.
    """
    op = "attribution_patch"
    a, first, second, values = prepared(op, model, clean, counterfactual, metric, difference)
    sources = all_sources(a, mlps)
    count = len(first["input_ids"])
    found = [
        _attributed(a, cut(first, rows), cut(second, rows), values, rows, sources)
        for rows in batches(count, positive_int(op, "batch_size", batch_size, count))
    ]
    change, base = (torch.cat(parts, -1) for parts in zip(*found))
    return scores(a, sources, base + change, base, difference)


def _attributed(
    a: Adapter, first: dict[str, Tensor], second: dict[str, Tensor], values: Metric, rows: slice, sources: list[Source]
) -> tuple[Tensor, Tensor]:
    """The estimated change of the metric ``[sources, b]`` and the metric ``[b]`` of some rows."""
    with evaluating(a.model):
        with torch.no_grad():
            other = record(a, second)
        with torch.enable_grad():
            leaves: dict[str, list[Tensor]] = {"heads": [], "mlp": []}
            before = record(a, first, leaves)
            base = values(before.final, rows)
            parts = leaves["heads"] + leaves["mlp"]
            slopes = torch.autograd.grad(base.sum(), parts)
    split = dict(zip(("heads", "mlp"), (slopes[: a.num_layers], slopes[a.num_layers :])))
    last = a.last(first)
    changes = []
    for source in sources:
        name = "mlp" if source.head is None else "heads"
        slope = at(split[name][source.layer], last)
        change = (getattr(other, name)[source.layer] - getattr(before, name)[source.layer].detach()) * slope
        if source.head is not None:
            change = change.unflatten(-1, (a.num_heads, a.head_dim))[:, source.head]
        changes.append(change.sum(-1, dtype=torch.promote_types(change.dtype, torch.float32)))
    return torch.stack(changes), base.detach()


# --- shared with the loop -------------------------------------------------------------------------------------------


def prepared(
    op: str, model: Any, clean: Any, counterfactual: Any, metric: Any, difference: str
) -> tuple[Adapter, dict[str, Tensor], dict[str, Tensor], Metric]:
    _check.member(op, "difference", difference, DIFFERENCES)
    a = adapter(model, op)
    first, second = a.batch(op, clean, "clean"), a.batch(op, counterfactual, "counterfactual")
    count, other = len(first["input_ids"]), len(second["input_ids"])
    if count != other:
        _check.fail(op, "counterfactual", f"a sample for each of the {count} clean ones", other)
    return a, first, second, Metric(op, a, metric, count)


def all_sources(a: Adapter, mlps: bool) -> list[Source]:
    per_layer: list[int | None] = [*range(a.num_heads), *([None] if mlps else [])]
    return [Source(layer, head) for layer in range(a.num_layers) for head in per_layer]


def scores(a: Adapter, sources: list[Source], patched: Tensor, base: Tensor, difference: str) -> PathScores:
    """From the metric of each source ``[sources, B]`` and of the clean run ``[B]``, both on the CPU in their dtype."""
    change = patched.double() - base.double()
    change = change / base.double() if difference == "relative" else change
    mean = change.mean(1).to(torch.promote_types(patched.dtype, torch.float32)).cpu()
    heads = mean[torch.tensor([s.head is not None for s in sources])].view(a.num_layers, a.num_heads)
    with_mlps = len(sources) > heads.numel()
    mlps = mean[torch.tensor([s.head is None for s in sources])] if with_mlps else None
    return PathScores(heads, mlps, base.cpu())


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def cut(batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def positive_int(op: str, argument: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _check.fail(op, argument, "a positive integer", value)
    return value


def record(a: Adapter, batch: dict[str, Tensor], leaves: dict[str, list[Tensor]] | None = None) -> Record:
    """One run, with what it had at the last real token; ``leaves`` collects outputs of heads and MLPs that gradients
    are wanted for."""
    last = a.last(batch)
    found = Record()

    def leaf(name: str, x: Tensor) -> Tensor:
        if leaves is None:
            return x
        x = x if x.requires_grad else x.detach().requires_grad_()
        leaves[name].append(x)
        return x

    def block(module: Any, args: Any, kwargs: Any) -> None:
        found.residual.append(at(first_argument(args, kwargs), last))

    def before_output(module: Any, args: Any) -> Any:
        x = leaf("heads", args[0])
        found.heads.append(at(x, last))
        return (x, *args[1:])

    def after_output(module: Any, args: Any, out: Tensor) -> None:
        found.attention.append(at(out, last))

    def after_mlp(module: Any, args: Any, out: Tensor) -> Tensor:
        x = leaf("mlp", out)
        found.mlp.append(at(x, last))
        return x

    with hooked() as handles:
        for layer in range(a.num_layers):
            handles.append(a.layers[layer].register_forward_pre_hook(block, with_kwargs=True))
            handles.append(a.output(layer).register_forward_pre_hook(before_output))
            handles.append(a.output(layer).register_forward_hook(after_output))
            handles.append(a.mlp(layer).register_forward_hook(after_mlp))
        found.final = at(a.hidden(batch), last)
    return found


# --- the sweep ------------------------------------------------------------------------------------------------------


def _bytes(a: Adapter, clean: Record, values: Metric) -> int:
    """What one source takes at its widest: some rows of the residual, those within the MLP, its logits."""
    inner = getattr(a.config, "intermediate_size", None) or getattr(a.config, "n_inner", None) or 4 * a.hidden_size
    first = clean.residual[0]
    return len(first) * (4 * a.hidden_size + 3 * int(inner) + 2 * values.width) * first.element_size()


def _sweep(a: Adapter, clean: Record, other: Record, sources: list[Source], unpatched: bool = False) -> Tensor:
    """Final hidden states ``[sources, B, D]``, one patch each; the sources ascend by layer.

    A source starts in its layer, from the clean residual; those of earlier layers go through the same MLP call.
    ``unpatched``: one more row in front, from the first layer on, without a patch.
    """
    state = clean.residual[0][None][: int(unpatched)]
    for layer in range(sources[0].layer, a.num_layers):
        residual, attention = clean.residual[layer], clean.attention[layer]
        heads = [s.head for s in sources if s.layer == layer and s.head is not None]
        before = torch.cat([state, residual.expand(len(heads), *residual.shape)])
        frozen = attention.expand(len(state), *attention.shape)
        added = torch.cat([frozen, attention + _change(a, clean, other, layer, heads)])
        state = a.step(layer, before, added) if len(before) else before
        if Source(layer, None) in sources:
            patched = a.step(layer, residual, attention, other.mlp[layer])
            state = torch.cat([state, patched[None]])
    return a.final_norm(state)


def _same_run(op: str, swept: Tensor, final: Tensor) -> None:
    """The sweep without a patch ends where the model itself ended."""
    if away := _away(swept, final):
        expected = "blocks of attention, MLP and norms alone (no hooks on blocks, no LayerSteering)"
        _check.fail(op, "model", expected, f"a run that ends {100 * away:.3g} % away from them")


def _same_outputs(op: str, a: Adapter, run: Record) -> None:
    """What each o_proj put out is what its weight makes of its input, as it is for a patch."""
    for layer, (heads, found) in enumerate(zip(run.heads, run.attention)):
        module = a.output(layer)
        if away := _away(F.linear(heads, linear_weight(module), module.bias), found):
            expected = "output projections that multiply by their weight alone (no hooks that change what they put out)"
            _check.fail(op, "model", expected, f"one {100 * away:.3g} % away from that at layer {layer}")


def _away(made: Tensor, found: Tensor) -> float:
    """How far rows are from those that the model had, over their size; 0 where rounding can be the reason."""
    wide = torch.promote_types(found.dtype, torch.float32)
    error = (made.to(wide) - found.to(wide)).norm(dim=-1) / found.to(wide).norm(dim=-1)
    kind = found.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else found.dtype
    worst = float(error.nan_to_num(0.0, posinf=float("inf")).max())  # a model with NaN has scores of NaN
    return worst if worst > DEVIATION[dtype] else 0.0


def _change(a: Adapter, clean: Record, other: Record, layer: int, heads: list[int]) -> Tensor:
    """``[heads, B, D]``: what the counterfactual outputs of these heads add to the attention's output."""
    shape = (a.num_heads, a.head_dim)
    change = (other.heads[layer] - clean.heads[layer]).unflatten(-1, shape)[:, heads]
    weight = linear_weight(a.output(layer)).unflatten(1, shape)[:, heads]
    return torch.einsum("bhd,ohd->hbo", change, weight)
