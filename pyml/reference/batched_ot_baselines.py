"""Pinned baselines of batched optimal transport: plain torch, uniform weights, a fixed number of iterations.

cost ``[B, n, m]`` -> (plan ``[B, n, m]``, transport cost ``[B]``). Each stands for one way in which it is run today:

- `log_domain`: a loop of logsumexp, the safe form; compiled in blocks of five iterations, it is the strongest safe form
  in torch that we know (the whole loop in one graph compiles for minutes and runs no faster);
- `kernel_space`: exp(-C / eps) once, then two batched products an iteration, as PLOT does; NaN below eps ~ 0.02;
- `kernel_space_sums`: the same with products and sums that torch.compile fuses: the fastest form in torch, as unsafe;
- `plot_loop`: PLOT's loop with its stop at the mean change over the whole batch: results depend on batch-mates.

Their gradients are those of the unrolled loop; with ``detach`` the plan is a constant, as in PLOT.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 5  # iterations in one compiled graph

Step = Callable[..., tuple[Tensor, Tensor]]


def log_block(scaled: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Five iterations in the log domain: scaled = -C / eps; f, g are divided by eps."""
    n, m = scaled.shape[-2:]
    for _ in range(BLOCK):
        f = math.log(m) - torch.logsumexp(scaled + g.unsqueeze(-2), -1)
        g = math.log(n) - torch.logsumexp(scaled + f.unsqueeze(-1), -2)
    return f, g


def sums_block(kernel: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Five iterations of scalings by products and sums."""
    n, m = kernel.shape[-2:]
    for _ in range(BLOCK):
        u = 1 / (n * (kernel * v.unsqueeze(-2)).sum(-1))
        v = 1 / (m * (kernel * u.unsqueeze(-1)).sum(-2))
    return u, v


def bmm_block(kernel: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by batched matrix-vector products."""
    n, m = kernel.shape[-2:]
    for _ in range(BLOCK):
        u = 1 / (n * torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1))
        v = 1 / (m * torch.bmm(kernel.transpose(-1, -2), u.unsqueeze(-1)).squeeze(-1))
    return u, v


def log_domain(cost: Tensor, eps: float, iterations: int, block: Step = log_block) -> tuple[Tensor, Tensor]:
    n, m = cost.shape[-2:]
    scaled = cost * (-1 / eps)
    f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros(cost.shape[0], m)
    for _ in range(iterations // BLOCK):
        f, g = block(scaled, f, g)
    plan = torch.exp(scaled + f.unsqueeze(-1) + g.unsqueeze(-2)) / (n * m)
    return plan, (plan * cost).sum((-1, -2))


def _by_scalings(cost: Tensor, eps: float, iterations: int, block: Step) -> tuple[Tensor, Tensor]:
    kernel = torch.exp(cost * (-1 / eps))
    u, v = cost.new_ones(cost.shape[:-1]), cost.new_full((cost.shape[0], cost.shape[-1]), 1 / cost.shape[-1])
    for _ in range(iterations // BLOCK):
        u, v = block(kernel, u, v)
    plan = u.unsqueeze(-1) * kernel * v.unsqueeze(-2)
    return plan, (plan * cost).sum((-1, -2))


def kernel_space(cost: Tensor, eps: float, iterations: int, block: Step = bmm_block) -> tuple[Tensor, Tensor]:
    return _by_scalings(cost, eps, iterations, block)


def kernel_space_sums(cost: Tensor, eps: float, iterations: int, block: Step = sums_block) -> tuple[Tensor, Tensor]:
    return _by_scalings(cost, eps, iterations, block)


def plot_loop(cost: Tensor, eps: float, iterations: int, threshold: float = 1e-2) -> tuple[Tensor, Tensor]:
    n, m = cost.shape[-2:]
    with torch.no_grad():
        kernel = torch.exp(cost * (-1 / eps))
        u, v = torch.ones_like(cost[..., 0]), torch.ones_like(cost[..., 0, :])
        for _ in range(iterations):
            before = u
            u = (1 / n) / torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1)
            v = (1 / m) / torch.bmm(kernel.transpose(-1, -2), u.unsqueeze(-1)).squeeze(-1)
            if (u - before).abs().mean().item() < threshold:
                break
        plan = u.unsqueeze(-1) * kernel * v.unsqueeze(-2)
    return plan, (plan * cost).sum((-1, -2))
