"""Argument checks of the public functions: one sentence with op, argument, expected, got."""

import math
import operator
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyml.backend import BACKENDS

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def tensors(
    op: str, first: Tensor, optional: tuple[str, ...] = (), first_name: str = "x", **others: Tensor | None
) -> None:
    """All are dense floating tensors on the device of the first; optional ones may be None."""
    _floating(op, first_name, first)
    for name, given in others.items():
        if given is None and name in optional:
            continue
        t = _floating(op, name, given)
        if t.device != first.device:
            fail(op, name, f"the device of {first_name} ({first.device})", t.device)


def _floating(op: str, name: str, t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        fail(op, name, "a tensor", type(t).__name__, TypeError)
    if t.dtype not in FLOATS:
        fail(op, name, "float32, float64, bfloat16 or float16", t.dtype, TypeError)
    if t.layout != torch.strided:
        fail(op, name, "a dense tensor", t.layout, TypeError)
    return t


def dtype_of_weights(op: str, name: str, t: Tensor, weight: Tensor) -> None:
    """The input of a layer has the dtype of its weights; autocast makes them meet by itself."""
    tensors(op, t, first_name=name)
    if t.dtype != weight.dtype and not torch.is_autocast_enabled(t.device.type):
        fail(op, name, f"the dtype of the weights ({weight.dtype})", t.dtype, TypeError)


def shape(op: str, name: str, t: Tensor, expected: tuple[int, ...], names: str) -> None:
    if t.shape != expected:
        fail(op, name, f"shape {names} = {list(expected)}", list(t.shape))


def integer(op: str, name: str, value: Any, low: int, high: int | None = None, expected: str | None = None) -> int:
    """Integers of every kind, those of NumPy among them, as Python's."""
    try:
        found = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = low - 1
    if found < low or (high is not None and found > high):
        plain = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        fail(op, name, expected or plain, value)
    return found


def number(op: str, name: str, value: Any, expected: str = "a finite number", low: float = -math.inf) -> float:
    """A finite number of any kind, at least ``low``; no tensor, whose gradient would be lost."""
    try:
        found = math.nan if isinstance(value, str | bool | Tensor) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found >= low):
        fail(op, name, expected, repr(value))
    return found


def member(op: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        fail(op, name, "one of " + ", ".join(str(a) for a in allowed), repr(value))


def backend(op: str, name: str | None) -> None:
    """One of the names that `pyml.use_backend` takes, or None."""
    if name is not None:
        member(op, "backend", name, (*BACKENDS, "auto"))


def writable(op: str, written: dict[str, Any]) -> None:
    """Tensors (or lists of them) that an op writes to: no place in memory has two elements, no gradient is lost."""
    seen: set[int] = set()
    for name, value in written.items():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(t, Tensor):
                continue
            if id(t) in seen:
                fail(op, name, "tensors that differ, since they are written to", "one of them twice")
            seen.add(id(t))
            if t.requires_grad and torch.is_grad_enabled():
                fail(op, name, "a tensor without requires_grad, or a call under torch.no_grad()", "requires_grad")
            if overlaps(t):
                fail(op, name, "elements with places of their own in memory", f"strides {list(t.stride())}")


def overlaps(t: Tensor) -> bool:
    """Whether two elements may share memory: in order of stride, each step must pass over all that lies below it."""
    if t.numel() == 0:
        return False
    reach = 0  # offset of the last element below
    for step, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False
