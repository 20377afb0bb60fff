"""Argument checks of the public functions: one sentence with op, argument, expected, got."""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def tensors(op: str, first: Tensor, optional: tuple[str, ...] = (), **others: Tensor | None) -> None:
    """All are floating tensors on the device of the first (named x in messages); optional ones may be None."""
    if not isinstance(first, Tensor):
        fail(op, "x", "a tensor", type(first).__name__, TypeError)
    if first.dtype not in FLOATS:
        fail(op, "x", "float32, float64, bfloat16 or float16", first.dtype, TypeError)
    for name, t in others.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Tensor):
            fail(op, name, "a tensor", type(t).__name__, TypeError)
        if t.dtype not in FLOATS:
            fail(op, name, "float32, float64, bfloat16 or float16", t.dtype, TypeError)
        if t.device != first.device:
            fail(op, name, f"the device of x ({first.device})", t.device)


def shape(op: str, name: str, t: Tensor, expected: tuple[int, ...], names: str) -> None:
    if t.shape != expected:
        fail(op, name, f"shape {names} = {list(expected)}", list(t.shape))


def member(op: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        fail(op, name, "one of " + ", ".join(str(a) for a in allowed), repr(value))
