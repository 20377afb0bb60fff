"""Sample inputs of every op: what the tests, `pyml verify` and the argument fuzz run.

A family adds one file beside this one with ``SAMPLES = {op name: [Sample, ...]}``; nothing else needs to know.
"""

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml.ops import OPS, Op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Args:
        id: unique among the samples of the op.
        build: generator -> arguments by name, as both the public function and the reference take them. Floating tensors
            are float64 on the CPU; `arguments` casts them.
        tiny: a few hundred numbers at most, so that finite differences, opcheck and Triton's interpreter can afford it.
        smooth: no knot, kink or tie within 1e-3 of an input: finite differences hold, also for the second derivative.
        empty: some tensor has no elements.
        keep: names of tensors that stay in a dtype of their own, e.g. float32 weights beside bfloat16 inputs.
    """

    id: str
    build: Callable[[torch.Generator], dict[str, Any]]
    tiny: bool = False
    smooth: bool = False
    empty: bool = False
    keep: tuple[tuple[str, torch.dtype], ...] = ()


def samples(op: Op) -> list[Sample]:
    """The samples of one op; an error when its family has none."""
    try:
        module = importlib.import_module(f"pyml.testing.{op.family}")
    except ModuleNotFoundError as error:
        raise LookupError(f"{op.name}: expected samples in pyml/testing/{op.family}.py, got no such file") from error
    found = module.SAMPLES.get(op.name, [])
    if not found:
        raise LookupError(f"{op.name}: expected samples in pyml/testing/{op.family}.py, got none for this op")
    return found


def arguments(op: Op, sample: Sample, dtype: torch.dtype, device: str, grad: bool = True) -> dict[str, Any]:
    """Fresh arguments by name in one dtype: the same numbers at every call; differentiable ones ask for a gradient."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name}/{sample.id}".encode()))
    values = sample.build(generator)
    keep = dict(sample.keep)

    def made(name: str, t: Tensor) -> Tensor:
        t = t.to(device, keep.get(name, dtype) if t.is_floating_point() else t.dtype)
        return t.requires_grad_() if grad and name in op.gradients and t.is_floating_point() else t

    return {name: each(value, partial(made, name)) for name, value in values.items()}


def each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """One argument with ``change`` applied to its tensors: a tensor, a list of tensors, or something else."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return [change(v) if isinstance(v, Tensor) else v for v in value]
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of one argument: itself, those of a list, or none."""
    found: list[Tensor] = []
    each(value, found.append)
    return found


def in_double(values: dict[str, Any]) -> dict[str, Any]:
    """The same (already rounded) numbers in float64: the arguments of the truth."""

    def wider(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return {name: each(value, wider) for name, value in values.items()}


def schema_arguments(op: Op, values: dict[str, Any]) -> list[Any]:
    """Positional arguments of ``torch.ops.pyml.<op>_fwd``."""
    return [values[name] for name in op.arguments]


def everything() -> list[tuple[Op, Sample]]:
    """Every sample of every op."""
    return [(op, sample) for op in OPS.values() for sample in samples(op)]
