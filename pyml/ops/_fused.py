"""Fused torch optimizers ignore strides on a CPU: of a parameter with gaps, such as columns of a weight, they write the
gaps. Whoever makes gradients of slices installs this guard."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyml.ops import _check

handles: list[Any] = []


def guard() -> None:
    """From now on a fused torch optimizer raises at its step where it would write beside slices."""
    if not handles:
        handles.append(register_optimizer_step_pre_hook(_refuse))


def _refuse(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused") and any(_beside(p) for p in group["params"]):
            wanted = (
                "HeadTuner.optimizer() or fused=False (transformers.Trainer: optimizers=(tuner.optimizer(lr), None))"
            )
            got = f"a fused {type(optimizer).__name__}, which writes beside strided slices"
            _check.fail("HeadTuner", "optimizer", wanted, got)


def _beside(p: torch.Tensor) -> bool:
    """On a CPU any parameter with gaps; on a GPU those that are known to be slices, as nobody has tried there."""
    return not p.is_contiguous() and (getattr(p, "head_slice", False) or (p.device.type == "cpu" and _gaps(p)))


def _gaps(p: torch.Tensor) -> bool:
    dense = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape) if size > 1):
        if stride != dense:
            return p.numel() > 0
        dense *= size
    return False
