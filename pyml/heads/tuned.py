"""A model that has a tuner: what is trained of it, and the ways back to a plain one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pyml.nn.head_update import HeadLora, Projection
from pyml.ops import _check

TUNED = "_pyml_tuned"  # attribute of a model that has a tuner: what required a gradient before it


@dataclass(frozen=True)
class TunerReport:
    """What is trained. ``str`` of it is one line."""

    trained: int  # numbers that are trained
    total: int  # numbers of the whole model
    state_bytes: int  # of the two moments of AdamW
    master_bytes: int  # of the float32 copies that `SliceAdamW` keeps of 16-bit weights
    heads: int  # heads with anything trained
    mlps: int
    modules: int  # heads of the model
    siblings: dict[int, list[int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.trained / self.total

    def __str__(self) -> str:
        text = f"{self.heads} of {self.modules} heads"
        text += f" and {self.mlps} MLPs" if self.mlps else ""
        text += f": {self.trained:,} of {self.total:,} numbers trained ({100 * self.share:.2f} %)"
        text += f", optimizer state {self.state_bytes / 1e6:.3g} MB"
        text += f", float32 copies {self.master_bytes / 1e6:.3g} MB" if self.master_bytes else ""
        if self.siblings:
            heads = [(layer, head) for layer, members in self.siblings.items() for head in members]
            text += f"; keys and values are shared, so these heads change too: {heads}"
        return text


def refuse_tuned(op: str, model: Any) -> None:
    """One sentence for a model that has a tuner."""
    if hasattr(model, TUNED) or any(isinstance(module, Projection) for module in model.modules()):
        expected = "a model without another tuner (pyml.heads.detach(model) ends it)"
        _check.fail(op, "model", expected, "one that has one")


@contextmanager
def put_back_on_failure(model: Any) -> Iterator[None]:
    """Within it a plain model gets a tuner; where that fails, it has its layers, flags and gradients again."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        _plain(model)
        for p, asked, grad in before:
            p.requires_grad_(asked)
            p.grad = grad
        raise


def freeze(model: Any) -> None:
    """No parameter requires a gradient or has one, which a step of an optimizer of them all would still take; the model
    remembers what required one."""
    asked = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    setattr(model, TUNED, asked)  # it goes along with copies and pickles of the model, and outlives the tuner
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None


@torch.no_grad()
def detach(model: Any) -> Any:
    """A model with plain Linears again and the values that it has, whatever became of its `HeadTuner`; returns it."""
    for module in model.modules():
        if isinstance(module, HeadLora) and module.enabled:
            for i, block in enumerate(module.blocks):
                module.view(block).add_(module.change(i).to(module.weight.dtype))
    asked = _plain(model)
    for name, p in model.named_parameters(remove_duplicate=False):  # by name: loading may bring new objects
        p.requires_grad_(asked.get(name, p.requires_grad))
    return model


def _plain(model: Any) -> dict[str, bool]:
    """Plain Linears, without products of LoRA; returns what required a gradient before the tuner."""
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, Projection):
                setattr(owner, name, module.original())
    return model.__dict__.pop(TUNED, {})
