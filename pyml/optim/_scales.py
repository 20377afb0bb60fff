"""The scale of an optimizer's noise: checked once, then in the form that the ops take, whole or by rows of one rank."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops import _hetero_noise_arguments as arguments
from pyml.privacy import Provenance, Scale
from pyml.privacy import provenance as sources


@dataclass
class Noise:
    """A list of tensors that gets noise, with what belongs to each: arguments of `pyml.ops.hetero_noise_`."""

    tensors: list[Tensor]
    scale: list[Tensor]
    columns: list[Tensor]
    ids: list[int]
    offsets: list[int]


class Scales:
    """The scale for a list of parameters.

    Attributes:
        forms: for each parameter a number, a tensor of its shape or a pair (row factors, column factors).
        uniform: whether all are the number 1.
        provenance: of the scale.
        text: what a report says of it.
    """

    def __init__(self, op: str, scale: Any, provenance: Any, params: Sequence[Tensor]) -> None:
        self.uniform = scale is None
        self.text = "1 everywhere"
        known: tuple[Provenance, ...] | None = None
        if isinstance(scale, Scale):
            if provenance is not None:
                _check.fail(op, "provenance", "none beside a Scale, which has its own", provenance)
            scale, known, self.text = scale.tensors, scale.provenance, str(scale)
        if scale is None or isinstance(scale, int | float):
            self.forms: list[Any] = [1.0 if scale is None else scale] * len(params)
            if provenance is None and scale in (None, 1):  # any other number may be one of the private records'
                known = (Provenance("public"),)
        elif isinstance(scale, list | tuple) and len(scale) == len(params):
            self.forms = [_placed(s, p) for s, p in zip(scale, params)]
        else:
            got = len(scale) if isinstance(scale, list | tuple) else type(scale).__name__
            _check.fail(op, "scale", f"a number, a pyml.privacy.Scale or a list of {len(params)}", got)
        if known is None:
            if provenance is None:
                expected = "where the scale comes from (public, released_iterate, pyml.privacy.dp(...), unknown)"
                _check.fail(op, "provenance", expected, None)
            known = sources.parse(op, provenance)
        self.provenance = known
        self.scale, self.columns = arguments.as_scale(op, self.forms, None, params[0])
        arguments.check_scale(op, [p.shape for p in params], self.scale, self.columns, params[0])
        if self.text == "1 everywhere" and not self.uniform:
            self.text = _described(self.forms, params)

    @cached_property
    def digest(self) -> str:
        """Of values, shapes and provenance: of two scales one was not the other where it differs."""
        found = hashlib.sha256(repr([(p.kind, p.epsilon, p.delta) for p in self.provenance]).encode())
        for form in self.forms:
            for part in form if isinstance(form, tuple) else (form,):
                t = torch.as_tensor(part).detach().cpu().contiguous()
                found.update(f"{t.dtype} {list(t.shape)} {isinstance(form, tuple)}".encode())
                found.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def subset(self, which: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Scale and columns of some of the parameters."""
        return [self.scale[i] for i in which], [self.columns[i] for i in which] if self.columns else []

    def share(self, tensors: Sequence[Tensor], rank: int, world: int) -> Noise:
        """The rows of every tensor to which this rank adds noise: each row has one rank, and the ranks take turns."""
        found = Noise([], [], [], [], [])
        for i, t in enumerate(tensors):
            rows = t if t.dim() else t.view(1)
            count, turn = rows.shape[0], (rank + i) % world
            first, last = count * turn // world, count * (turn + 1) // world
            if first == last or not t.numel():
                continue
            scale = self.scale[i]
            found.tensors.append(rows[first:last])
            found.scale.append(scale[first:last] if scale.dim() else scale)
            if self.columns:
                found.columns.append(self.columns[i])
            found.ids.append(i)
            found.offsets.append(first * (t.numel() // count))
        return found

    def full(self, params: Sequence[Tensor]) -> list[Any]:
        """Numbers and tensors only, as `pyml.privacy.secure_sum` takes them."""
        return [torch.outer(*s).reshape(p.shape) if isinstance(s, tuple) else s for s, p in zip(self.forms, params)]


def _described(forms: Sequence[Any], params: Sequence[Tensor]) -> str:
    """Smallest, largest and RMS over all elements."""
    low, high, squares, count = [], [], 0.0, 0
    for form, p in zip(forms, params):
        parts = [torch.as_tensor(t, dtype=torch.float64) for t in (form if isinstance(form, tuple) else (form,))]
        if p.numel():
            low.append(math.prod(float(t.min()) for t in parts))
            high.append(math.prod(float(t.max()) for t in parts))
            squares += p.numel() * math.prod(float(t.square().mean()) for t in parts)
            count += p.numel()
    if not count:
        return "of no element"
    return f"given: min {min(low):.3g}, max {max(high):.3g}, RMS {math.sqrt(squares / count):.3g}"


def _placed(scale: Any, like: Tensor) -> Any:
    """On the device of its parameter; pairs as tuples."""
    if isinstance(scale, list | tuple):
        return tuple(_placed(part, like) for part in scale)
    return scale.detach().to(like.device) if isinstance(scale, Tensor) else scale
