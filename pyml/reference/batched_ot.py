"""Entropic optimal transport in plain torch: log-domain Sinkhorn over a batch, and its gradients. Slow, readable.

Shapes: cost ``[..., n, m]``, a ``[..., n]``, b ``[..., m]``. The plan is P = a_i b_j exp((f_i + g_j - C_ij) / eps). One
iteration updates f (rows), then g (columns). A weight below the smallest normal float32 number counts as zero, and zero
means masked: its costs are not looked at, its potential is 0.

Read this file before the kernels: they compute the same numbers.
"""

import math

import torch
from torch import Tensor

from pyml.reference import compute_dtype

NOT_CONVERGED, UNEQUAL_MASSES, BAD_NUMBERS = 1, 2, 4  # bits of a status
CHECK_EVERY = 5  # iterations between two looks at the marginal error
SMALLEST = torch.finfo(torch.float32).tiny


def _weights(given: Tensor | None, cost: Tensor, dim: int, wide: torch.dtype) -> Tensor:
    """Weights of the rows (dim -2) or columns (-1): as given, or uniform."""
    if given is not None:
        return given.to(wide).masked_fill(given.detach().to(wide).abs() < SMALLEST, 0)
    shape = (*cost.shape[:-2], cost.shape[dim])
    return torch.full(shape, 1 / max(cost.shape[dim], 1), dtype=wide, device=cost.device)


def mass_tolerance(a: Tensor | None, b: Tensor | None) -> float:
    """How far two masses may be apart, relatively: what rounding to the dtype of the weights explains."""
    return max([1e-4, *(2 * torch.finfo(t.dtype).eps for t in (a, b) if t is not None)])


class _Problem:
    """Weights and cost in full precision, with whatever is masked or broken made harmless."""

    def __init__(
        self, cost: Tensor, a: Tensor | None, b: Tensor | None, init: Tensor | None, eps: float, rho: float | None
    ) -> None:
        wide = compute_dtype(cost, a, b)
        self.eps, self.rho = eps, rho
        self.damp = 1.0 if rho is None else rho / (rho + eps)  # of a potential's update
        self.tau = 1.0 if rho is None else 1 + eps / rho
        self.a, self.b = _weights(a, cost, -2, wide), _weights(b, cost, -1, wide)
        live_a, live_b = self.a.detach() > 0, self.b.detach() > 0
        plain = cost.detach().to(wide).masked_fill(~(live_a.unsqueeze(-1) & live_b.unsqueeze(-2)), 0)
        odd = ~plain.isfinite().all(-1).all(-1)
        for w in (self.a.detach(), self.b.detach()):
            odd = odd | (w < 0).any(-1) | ~w.isfinite().all(-1)
        self.init = torch.zeros_like(self.b) if init is None else init.to(wide).masked_fill(~live_b, 0)
        odd = odd | ~self.init.isfinite().all(-1)
        self.bad = odd
        self.init = self.init.masked_fill(odd.unsqueeze(-1), 0)
        self.live_a, self.live_b = live_a & ~odd.unsqueeze(-1), live_b & ~odd.unsqueeze(-1)
        self.empty = ~(self.live_a.any(-1) & self.live_b.any(-1))  # nothing to transport, or bad
        self.live = self.live_a.unsqueeze(-1) & self.live_b.unsqueeze(-2)
        self.cost, self.plain = (t.to(wide).masked_fill(~self.live, 0) for t in (cost, plain))
        self.log_a, self.log_b = (
            torch.log(torch.where(live, w, 1)).masked_fill(~live & ~self.empty.unsqueeze(-1), -math.inf)
            for w, live in ((self.a, self.live_a), (self.b, self.live_b))
        )

    def row_update(self, g: Tensor) -> Tensor:
        """f from g: the plan's rows then have the mass that they should have."""
        logits = self.log_b.detach().unsqueeze(-2) + (g.unsqueeze(-2) - self.plain) / self.eps
        return (-self.damp * self.eps * torch.logsumexp(logits, -1)).masked_fill(~self.live_a, 0)

    def column_update(self, f: Tensor) -> Tensor:
        logits = self.log_a.detach().unsqueeze(-1) + (f.unsqueeze(-1) - self.plain) / self.eps
        return (-self.damp * self.eps * torch.logsumexp(logits, -2)).masked_fill(~self.live_b, 0)

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        log = (f.unsqueeze(-1) + g.unsqueeze(-2) - self.plain) / self.eps
        weights = self.a.detach().unsqueeze(-1) * self.b.detach().unsqueeze(-2)
        return torch.exp(log.masked_fill(~self.live, 0)) * weights.masked_fill(~self.live, 0)

    def error(self, f: Tensor, rows: Tensor) -> Tensor:
        """L1 distance of the row masses from what f asks for; the columns are exact after each iteration."""
        wanted = self.a.detach() if self.rho is None else self.a.detach() * torch.exp(-f / self.rho)
        return (rows - wanted).abs().sum(-1)


def sinkhorn_solve(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    eps: float,
    max_iter: int = 100,
    tol: float | None = None,
    rho: float | None = None,
    implicit: bool = False,
) -> tuple[Tensor, ...]:
    """value, transport cost, f, g, row masses of the plan, iterations (int32), status (int32); see `pyml.ops`."""
    p = _Problem(cost, a, b, init, eps, rho)
    f, g, n_iter, active = _iterate(p, max_iter, tol)
    plan = p.plan(f, g)
    rows, columns = plan.sum(-1), plan.sum(-2)
    status = p.bad.to(torch.int32) * BAD_NUMBERS
    mass_a, mass_b = p.a.detach().sum(-1), p.b.detach().sum(-1)
    if tol is not None:
        late = active & ~(p.error(f, rows) <= tol)
        status = status + late.to(torch.int32) * NOT_CONVERGED
    if rho is None:
        apart = (mass_a - mass_b).abs() > mass_tolerance(a, b) * torch.maximum(mass_a, mass_b)
        status = status + (apart & ~p.empty).to(torch.int32) * UNEQUAL_MASSES
        shift = ((p.b.detach() * g).sum(-1) / mass_b).masked_fill(p.empty, 0).unsqueeze(-1)
        f, g = (f + shift).masked_fill(~p.live_a, 0), (g - shift).masked_fill(~p.live_b, 0)  # so that sum b g = 0
    value = (plan * p.plain).sum((-1, -2)) + eps * _kl_plan(p, plan, f, g, mass_a * mass_b)
    if rho is not None:
        value = value + rho * (_kl(rows, p.a.detach()) + _kl(columns, p.b.detach()))

    # Derivatives, with the numbers above as they are: what is added below is zero.
    spread = plan * p.cost
    da, db = _weight_slopes(p, rows, f, g, mass_a, mass_b)
    by_envelope = spread.sum((-1, -2)) + (da * p.a).sum(-1) + (db * p.b).sum(-1)
    value = value + (by_envelope - by_envelope.detach())
    if implicit:
        f, g = _implicit_potentials(p, plan, f, g)
        log = (f.unsqueeze(-1) + g.unsqueeze(-2) - p.cost) / eps + p.log_a.unsqueeze(-1) + p.log_b.unsqueeze(-2)
        log = log.masked_fill(~p.live, 0)
        spread = plan * (1 + log - log.detach()) * p.cost
    transport = spread.sum((-1, -2))

    def finish(t: Tensor, dead: Tensor) -> Tensor:
        return t.masked_fill(dead, 0) + torch.where(p.bad.view(p.bad.shape + (1,) * (t.dim() - p.bad.dim())), nan, 0)

    nan = torch.tensor(math.nan, dtype=f.dtype, device=f.device)
    none = p.empty
    f, rows = (finish(t, none.unsqueeze(-1) | ~p.live_a) for t in (f, rows))
    g = finish(g, none.unsqueeze(-1) | ~p.live_b)
    n_iter = n_iter.masked_fill(none, 0)
    status = torch.where(p.bad, BAD_NUMBERS, status.masked_fill(none, 0)).to(torch.int32)
    return finish(value, none), finish(transport, none), f, g, rows, n_iter, status


@torch.no_grad()
def _iterate(p: _Problem, max_iter: int, tol: float | None) -> tuple[Tensor, ...]:
    """Potentials, iterations of each problem, and which of them still ran at the end."""
    f, g = torch.zeros_like(p.a), p.init
    active = torch.ones_like(p.empty)
    n_iter = torch.zeros(p.empty.shape, dtype=torch.int32, device=g.device)
    for k in range(max_iter):
        if tol is not None and k > 0 and k % CHECK_EVERY == 0:
            active = active & ~(p.error(f, p.plan(f, g).sum(-1)) <= tol)
        running = active.unsqueeze(-1)
        f = torch.where(running, p.row_update(g), f)
        g = torch.where(running, p.column_update(f), g)
        n_iter = n_iter + active.to(torch.int32)
    return f, g, n_iter, active


def _kl_plan(p: _Problem, plan: Tensor, f: Tensor, g: Tensor, mass: Tensor) -> Tensor:
    """KL(P | a b^T) = sum P log(P / (a b)) - P + a b."""
    ratio = (f.unsqueeze(-1) + g.unsqueeze(-2) - p.plain) / p.eps
    return (plan * ratio.masked_fill(~p.live, 0) - plan).sum((-1, -2)) + mass


def _kl(x: Tensor, y: Tensor) -> Tensor:
    live = y > 0
    return (torch.xlogy(x, torch.where(live, x / torch.where(live, y, 1), 1)) - x + y).sum(-1)


def _weight_slopes(p: _Problem, rows: Tensor, f: Tensor, g: Tensor, mass_a: Tensor, mass_b: Tensor) -> tuple:
    """d value / da and d value / db: the potentials when balanced, else what is left of the KL terms."""
    if p.rho is None:
        da, db = f + p.eps * (mass_b - 1).unsqueeze(-1), g + p.eps * (mass_a - 1).unsqueeze(-1)
    else:
        row_share = rows / torch.where(p.live_a, p.a.detach(), 1)
        column_share = torch.exp(-g / p.rho)
        da = p.eps * (mass_b.unsqueeze(-1) - row_share) + p.rho * (1 - row_share)
        db = p.eps * (mass_a.unsqueeze(-1) - column_share) + p.rho * (1 - column_share)
    return da.masked_fill(~p.live_a, 0), db.masked_fill(~p.live_b, 0)


def _implicit_potentials(p: _Problem, plan: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials as functions of cost and weights: one Newton step from where they are.

    It moves them nowhere, and carries the derivative of the fixed point: [tau r, P; P^T, tau c] (df; dg) = -eps d(rhs).
    """
    rows, columns = plan.sum(-1), plan.sum(-2)
    gone_a, gone_b = ((~live | p.empty.unsqueeze(-1)).to(plan.dtype) for live in (p.live_a, p.live_b))
    top = torch.cat([torch.diag_embed(p.tau * rows + gone_a), plan], -1)
    bottom = torch.cat([plan.transpose(-1, -2), torch.diag_embed(p.tau * columns + gone_b)], -1)
    matrix = torch.cat([top, bottom], -2)
    b = p.b.detach()
    if p.rho is None:  # the direction (1, -1) is free: sum b g = 0 fixes it
        pin = torch.cat([torch.zeros_like(f), b], -1)
        matrix = matrix + pin.unsqueeze(-1) * pin.unsqueeze(-2)
    rhs = torch.cat(
        [
            (plan * (p.log_b.masked_fill(~p.live_b, 0).unsqueeze(-2) - p.cost / p.eps)).sum(-1),
            (plan * (p.log_a.masked_fill(~p.live_a, 0).unsqueeze(-1) - p.cost / p.eps)).sum(-2),
        ],
        -1,
    )
    moved = p.eps * torch.linalg.solve_ex(matrix, (rhs - rhs.detach()).unsqueeze(-1)).result.squeeze(-1)
    n = f.shape[-1]
    f, g = f - moved[..., :n], g - moved[..., n:]
    if p.rho is None:
        off = (p.b * g).sum(-1) / b.sum(-1).masked_fill(p.empty, 1)
        off = (off - off.detach()).unsqueeze(-1)
        f, g = f + off, g - off
    return f, g


def sinkhorn_plan(cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """The plan ``[..., n, m]`` of given potentials, in the dtype of the cost; 0 where a or b is 0.

    A problem whose potentials are not finite has no plan: NaN, and no gradient.
    """
    wide = compute_dtype(cost, a, b)
    wa, wb = _weights(a, cost, -2, wide), _weights(b, cost, -1, wide)
    live = (wa.detach() > 0).unsqueeze(-1) & (wb.detach() > 0).unsqueeze(-2)
    lost = ~(f.detach().isfinite().all(-1) & g.detach().isfinite().all(-1)).unsqueeze(-1).unsqueeze(-1)
    log = (f.to(wide).unsqueeze(-1) + g.to(wide).unsqueeze(-2) - cost.to(wide)) / eps
    weights = (wa.unsqueeze(-1) * wb.unsqueeze(-2)).masked_fill(~live, 0)
    plan = torch.exp(log.masked_fill(~live | lost, 0)) * weights
    return plan.masked_fill(live & lost, math.nan).to(cost.dtype)


def pairwise_cost(x: Tensor, y: Tensor, kind: str = "sqeuclidean") -> Tensor:
    """Cost ``[..., n, m]`` between points ``[..., n, d]`` and ``[..., m, d]``, in float32 or float64.

    A point with a NaN or an infinity has cost NaN, and takes no part in any gradient.
    """
    wide = compute_dtype(x, y)
    lost = [~t.detach().isfinite().all(-1) for t in (x, y)]
    u, v = (t.to(wide).masked_fill(odd.unsqueeze(-1), 0) for t, odd in zip((x, y), lost))
    if kind == "cosine":
        u, v = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + SMALLEST) for t in (u, v))
        cost = 1 - (u.unsqueeze(-2) * v.unsqueeze(-3)).sum(-1)
    else:
        cost = ((u.unsqueeze(-2) - v.unsqueeze(-3)) ** 2).sum(-1)
    return cost.masked_fill(lost[0].unsqueeze(-1) | lost[1].unsqueeze(-2), math.nan)
