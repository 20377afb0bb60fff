"""Pinned baselines of the noise step and of clipped sums: how they are written by hand today.

- `noise_chain`, `sgd_chain`: normals into a kept buffer, then two operations in place: the fastest form in torch that
  we know;
- `noise_out_of_place`: the formula as one writes it down;
- `opacus_sgd`: Opacus' own optimizer (installed apart), homogeneous noise; `opacus_noise`, `opacus_clip`: its steps;
- `clip_flat`: norms and one matrix-vector product, where all gradients of a sample already lie in one row.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def noise_chain(t: Tensor, scale: Tensor, std: float, divide_by: float, buffer: Tensor) -> Tensor:
    buffer.normal_()
    return t.addcmul_(buffer, scale, value=std).div_(divide_by)


def sgd_chain(p: Tensor, t: Tensor, scale: Tensor, std: float, rate: float, buffer: Tensor) -> Tensor:
    """p - rate * (t + std * scale * z)."""
    buffer.normal_()
    return p.add_(t, alpha=-rate).addcmul_(buffer, scale, value=-rate * std)


def noise_out_of_place(t: Tensor, scale: Tensor, std: float, divide_by: float) -> Tensor:
    return (t + torch.randn_like(t) * scale * std) / divide_by


def opacus_sgd(params: Sequence[Tensor], lr: float, multiplier: float, clip: float, batch: int) -> Any:
    """Opacus' own optimizer around SGD, with noise that is the same everywhere; not in its secure mode."""
    from opacus.optimizers import DPOptimizer

    inner = torch.optim.SGD(params, lr=lr)
    return DPOptimizer(inner, noise_multiplier=multiplier, max_grad_norm=clip, expected_batch_size=batch)


def _optimizer(shapes: Sequence[Sequence[int]], std: float, clip: float, divide_by: float) -> tuple[Any, list[Any]]:
    params = [torch.nn.Parameter(torch.zeros(*s)) for s in shapes]
    return opacus_sgd(params, 0.1, std / clip, clip, int(divide_by)), params


def opacus_noise(t: Tensor, std: float, divide_by: float) -> Callable[[], Tensor]:
    """Opacus' noise and division over one parameter whose sum of clipped gradients is t."""
    optimizer, (p,) = _optimizer([t.shape], std, 1.0, divide_by)
    p.grad_sample = p.detach().unsqueeze(0)  # looked at, not read

    def call() -> Tensor:
        p.summed_grad = t.detach()  # it refuses one that it has seen
        optimizer.add_noise()
        optimizer.scale_grad()
        return p.grad

    return call


def opacus_clip(grads: Sequence[Tensor], clip: float) -> Callable[[], list[Tensor]]:
    """Opacus' norms, factors and weighted sums over per-sample gradients."""
    optimizer, params = _optimizer([g.shape[1:] for g in grads], 1.0, clip, len(grads[0]))

    def call() -> list[Tensor]:
        for p, g in zip(params, grads):
            p.grad_sample, p.summed_grad = g.detach(), None
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in params]

    return call


def clip_flat(rows: Tensor, clip: float) -> Tensor:
    """Rows [B, P] -> [P]."""
    return (clip / rows.norm(dim=1).clamp(min=1e-6)).clamp(max=1) @ rows
