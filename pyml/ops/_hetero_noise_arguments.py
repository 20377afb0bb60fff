"""Argument checks of the noise ops, and the forms that a scale may have."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops._check import fail

WORD = 1 << 32  # a step and an id are one Philox word each
ELEMENTS = 1 << 62  # so that no sum of an offset and a size overflows


def number(op: str, name: str, value: Any, expected: str, low: float = -math.inf, above: bool = False) -> None:
    """A finite number of at least ``low``, or above it."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value < low or (above and value == low):
        fail(op, name, expected, repr(value), ValueError if right else TypeError)


def whole(op: str, name: str, value: Any, end: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        fail(op, name, "an integer", repr(value), TypeError)
    if isinstance(value, int) and not 0 <= value < end:
        fail(op, name, f"an integer in [0, 2^{end.bit_length() - 1})", value)


def check_key(op: str, key: Any, step: Any, first: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        fail(op, "key", "an int64 tensor", key.dtype if isinstance(key, Tensor) else type(key).__name__, TypeError)
    if key.numel() != 1:
        fail(op, "key", "one element", f"shape {list(key.shape)}")
    if key.device != first.device:
        fail(op, "key", f"the device of the tensors ({first.device})", key.device)
    whole(op, "step", step, WORD)
    if key.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        fail(op, "step", "a call outside of the capture of a CUDA graph, whose replays would repeat the noise", step)


def check_std(op: str, std: Any) -> None:
    number(op, "std", std, "a finite number of at least 0", 0.0)


def check_list(op: str, name: str, value: Any, first: Tensor | None = None, count: int | None = None) -> list[Tensor]:
    """A list of floating tensors on one device; ``count`` of them where that is given."""
    if not isinstance(value, (list, tuple)):
        fail(op, name, "a list of tensors", type(value).__name__, TypeError)
    if count is not None and len(value) != count:
        fail(op, name, f"{count} tensors", len(value))
    for i, t in enumerate(value):
        leader = value[0] if first is None else first
        _check.tensors(op, leader, first_name=f"{name}[0]" if first is None else "tensors", **{f"{name}[{i}]": t})
    return list(value)


def check_scale(op: str, shapes: Sequence[Sequence[int]], scale: Any, columns: Any, like: Tensor) -> None:
    """One number for all; or for each shape a number, factors of rows and columns, or a tensor of that shape."""
    given = check_list(op, "scale", scale, like)
    if len(given) not in (1, len(shapes)):
        fail(op, "scale", f"one tensor, or {len(shapes)}", len(given))
    factors = check_list(op, "columns", columns, like)
    if factors and not len(given) == len(factors) == len(shapes):
        fail(op, "columns", f"none, or {len(shapes)} tensors beside as many in scale", len(factors))
    for n, shape in enumerate(shapes):
        of_columns = None if not factors or factors[n].dim() == 0 else factors[n]
        check_one(op, f"[{n}]", list(shape), given[n if len(given) > 1 else 0], of_columns)


def check_one(op: str, which: str, shape: list[int], scale: Tensor, columns: Tensor | None) -> None:
    """The scale of one tensor of this shape."""
    if columns is None:
        if scale.dim() and list(scale.shape) != shape:
            fail(op, f"scale{which}", f"no dimensions, or shape {shape}", list(scale.shape))
        return
    if not shape:
        fail(op, f"columns{which}", "none for a tensor without dimensions", list(columns.shape))
    _check.shape(op, f"scale{which}", scale, (shape[0],), "[first dim]")
    _check.shape(op, f"columns{which}", columns, (math.prod(shape[1:]),), "[product of the other dims]")


def check_places(op: str, tensors: Sequence[Tensor], ids: Any, offsets: Any) -> None:
    """Where each tensor lies among the random numbers."""
    for name, value, end in (("ids", ids, WORD), ("offsets", offsets, ELEMENTS)):
        if value is None:
            continue
        if not isinstance(value, (list, tuple)):
            fail(op, name, "a list of integers", type(value).__name__, TypeError)
        if len(value) != len(tensors):
            fail(op, name, f"{len(tensors)} integers", len(value))
        for i, v in enumerate(value):
            whole(op, f"{name}[{i}]", v, end)
    if ids is None:
        return
    starts = [0] * len(tensors) if offsets is None else offsets
    places = sorted((i, start, start + t.numel()) for i, start, t in zip(ids, starts, tensors))
    for (i, _, end), (j, start, _) in pairwise(places):
        if i == j and start < end:
            fail(op, "ids", "shards of one tensor that do not meet, or they would get the same noise",
                 f"id {i} with elements up to {end} and from {start} on")  # fmt: skip


def check_pairs(op: str, params: Any, grads: Any) -> None:
    """Parameters and their gradients: two lists of equal shapes, dtypes may differ."""
    for i, (p, t) in enumerate(zip(check_list(op, "params", params), grads)):
        _check.shape(op, f"grads[{i}]", t, tuple(p.shape), "of its parameter")


def check_samples(op: str, grads: Any) -> list[Tensor]:
    """Per-sample gradients ``[B, ...]`` of one batch size."""
    given = check_list(op, "per_sample_grads", grads)
    if not given:
        fail(op, "per_sample_grads", "at least one tensor", "none")
    for i, g in enumerate(given):
        if g.dim() == 0 or g.shape[0] != given[0].shape[0]:
            first = list(given[0].shape[:1]) or "[B, ...]"
            fail(op, f"per_sample_grads[{i}]", f"the batch size of the first, {first}", list(g.shape))
    return given


def check_groups(op: str, clip: Any, groups: Any, global_clip: Any, tensors: int) -> None:
    """Clip norms by group; the group of every tensor."""
    limits = [clip] if isinstance(clip, (int, float)) else clip
    if not isinstance(limits, (list, tuple)):
        fail(op, "clip", "a number, or one for each group", type(clip).__name__, TypeError)
    if not limits:
        fail(op, "clip", "at least one number", "none")
    for limit in limits:
        number(op, "clip", limit, "finite numbers of at least 0", 0.0)
    if global_clip is not None:
        number(op, "global_clip", global_clip, "None, or a finite number of at least 0", 0.0)
    if groups is None:
        if len(limits) != 1:
            fail(op, "groups", f"the group of each tensor, for {len(limits)} clip norms", "None")
        return
    if not isinstance(groups, (list, tuple)):
        fail(op, "groups", "None, or a list of integers", type(groups).__name__, TypeError)
    if len(groups) != tensors:
        fail(op, "groups", f"{tensors} integers, one for each tensor", len(groups))
    for k in groups:
        if not isinstance(k, int) or isinstance(k, bool):
            fail(op, "groups", "integers", repr(k), TypeError)
        if not 0 <= k < len(limits):
            fail(op, "groups", f"groups in [0, {len(limits)}), as many as clip norms", k)


def as_scale(op: str, scale: Any, columns: Any, like: Tensor | None) -> tuple[Any, Any]:
    """The public forms of a scale as the two lists of the torch op: a number, or a list of numbers, tensors and
    (row, column) pairs. In the list of columns a tensor without dimensions stands for none. `pyml.privacy` reads its
    scales by this too: what is accounted for is what the noise has."""
    columns = [] if columns is None else columns
    if not isinstance(scale, (list, tuple)):
        return [_tensor(op, scale, like)], columns
    pairs = [s if isinstance(s, (list, tuple)) else (s, None) for s in scale]
    for p in pairs:
        if len(p) != 2:
            fail(op, "scale", "pairs (row factors, column factors)", f"{len(p)} items")
    for factor in (f for s in scale if isinstance(s, (list, tuple)) for f in s):
        if not isinstance(factor, Tensor) or factor.dim() != 1:
            got = list(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
            fail(op, "scale", "pairs of tensors with one dimension (row factors, column factors)", got)
    if any(c is not None for _, c in pairs):
        if columns:
            fail(op, "columns", "none beside pairs in scale", len(columns))
        columns = [_tensor(op, 1.0 if c is None else c, like) for _, c in pairs]
    return [_tensor(op, s, like) for s, _ in pairs], columns


def _tensor(op: str, value: Any, like: Tensor | None) -> Any:
    if isinstance(value, Tensor) or like is None:
        return value
    number(op, "scale", value, "finite numbers of at least 0, tensors, or pairs of tensors", 0.0)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), float(value), dtype=wide, device=like.device)
