"""Pinned baselines of the head ops: how they are done in torch today.

- `adamw`: `torch.optim.AdamW` on the slices as parameters, its default (foreach) or another of its forms; fused is
  right for slices without gaps alone;
- `edit_assign`: a clone, and the chosen heads assigned;
- `edit_assign_`: the chosen heads assigned in place, as a hook on the output projection does.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], **options: Any) -> Callable[[], None]:
    """A call is one step on slices that share their memory with the parameters given."""
    own = [torch.nn.Parameter(p) for p in params]
    for p, g in zip(own, grads):
        p.grad = g
    optimizer = torch.optim.AdamW(own, **options)

    def step() -> None:
        optimizer.step()

    return step


def edit_assign(x: Tensor, heads: Sequence[int], values: Tensor, matrix: Tensor) -> Tensor:
    y = x.clone()
    chosen = list(heads)
    y[..., chosen, :] = torch.einsum("...kd,ked->...ke", x[..., chosen, :], matrix) + values
    return y


def edit_assign_(x: Tensor, heads: Sequence[int], values: Tensor) -> Tensor:
    x[..., list(heads), :] = values
    return x
