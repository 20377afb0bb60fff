"""Pinned baselines of the head ops: how they are done in torch today.

- `adamw`: `torch.optim.AdamW` on the slices as parameters, its default (on a CPU a loop) or another of its forms; fused
  is right for slices without gaps alone;
- `linear_beside`: a frozen linear layer, and the slice's own product put into its place;
- `edit_assign`: a clone, and the chosen heads assigned;
- `edit_assign_`: the chosen heads assigned in place, as a hook on the output projection does.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


def linear_beside(x: Tensor, weight: Tensor, part: Tensor, first: int, dim: int) -> Tensor:
    """``F.linear(x, weight)`` where the rows (dim 0) or columns (dim 1) of the weight from ``first`` are ``part``."""
    last = first + part.shape[dim]
    if dim == 0:
        y = F.linear(x, weight.detach())
        return torch.cat([y[:, :first], F.linear(x, part), y[:, last:]], 1)
    rest = torch.cat([weight[:, :first], weight[:, last:]], 1).detach()
    return F.linear(torch.cat([x[:, :first], x[:, last:]], 1), rest) + F.linear(x[:, first:last], part)


def edit_assign(x: Tensor, heads: Sequence[int], values: Tensor, matrix: Tensor) -> Tensor:
    y = x.clone()
    chosen = list(heads)
    y[..., chosen, :] = torch.einsum("...kd,ked->...ke", x[..., chosen, :], matrix) + values
    return y


def edit_assign_(x: Tensor, heads: Sequence[int], values: Tensor) -> Tensor:
    x[..., list(heads), :] = values
    return x
