"""Argument checks of `pyml.privacy`: numbers, phases of training, packages of the extra [privacy]."""

import importlib
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from pyml.ops import _check

Phase = tuple[float, float, int]  # multiplier, sample rate, steps


def number(op: str, name: str, value: Any, expected: str, allowed: Callable[[float], bool]) -> float:
    """A float that ``allowed`` accepts. NaN compares false, so no range lets it in."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        _check.fail(op, name, expected, type(value).__name__, TypeError)
    if not allowed(float(value)):
        _check.fail(op, name, expected, value)
    return float(value)


def positive(op: str, name: str, value: Any) -> float:
    return number(op, name, value, "a finite number above 0", lambda v: 0 < v < math.inf)


def not_negative(op: str, name: str, value: Any) -> float:
    return number(op, name, value, "a finite number >= 0", lambda v: 0 <= v < math.inf)


def share(op: str, name: str, value: Any) -> float:
    return number(op, name, value, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def delta(op: str, value: Any) -> float:
    return number(op, "delta", value, "a number between 0 and 1", lambda v: 0 < v < 1)


def count(op: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        _check.fail(op, name, "an integer >= 0", value)
    return int(value)


def phase(op: str, multiplier: Any, sample_rate: Any, steps: Any) -> Phase:
    return (
        not_negative(op, "multiplier", multiplier),
        share(op, "sample_rate", sample_rate),
        count(op, "steps", steps),
    )


def phases(op: str, multiplier: Any, sample_rate: Any, steps: Any) -> tuple[Phase, ...]:
    """One multiplier with its sample rate and steps, or a list of such triples."""
    if isinstance(multiplier, str):
        _check.fail(
            op, "multiplier", "a number, or a list of (multiplier, sample_rate, steps)", repr(multiplier), TypeError
        )
    if not isinstance(multiplier, Sequence):
        for name, value in (("sample_rate", sample_rate), ("steps", steps)):
            if value is None:
                _check.fail(op, name, "a number beside a single multiplier", None)
        return (phase(op, multiplier, sample_rate, steps),)
    for name, value in (("sample_rate", sample_rate), ("steps", steps)):
        if value is not None:
            _check.fail(op, name, "nothing beside a list of (multiplier, sample_rate, steps)", value)
    found = []
    for one in multiplier:
        if not isinstance(one, Sequence) or isinstance(one, str) or len(one) != 3:
            _check.fail(op, "multiplier", "a list of (multiplier, sample_rate, steps)", one)
        found.append(phase(op, *one))
    return tuple(found)


def package(op: str, name: str) -> Any:
    """A module that only the extra [privacy] installs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        raise ImportError(f"{op}: {root} is not installed (pip install 'pyml[privacy]')") from error
