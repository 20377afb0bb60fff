"""Triton launchers of batched optimal transport: `sinkhorn_solve`, `sinkhorn_plan` and `pairwise_cost`.

The kernels are in batched_ot_solve.py, batched_ot_bwd.py, batched_ot_plan.py and batched_ot_points.py.
"""

import torch
from pyml.triton_kernels import launch
from pyml.triton_kernels.batched_ot_bwd import sinkhorn_solve_bwd_kernel
from pyml.triton_kernels.batched_ot_host import Problems, grid, located, problems
from pyml.triton_kernels.batched_ot_plan import sinkhorn_plan_bwd_kernel, sinkhorn_plan_fwd_kernel
from pyml.triton_kernels.batched_ot_points import pairwise_cost_bwd, pairwise_cost_fwd
from pyml.triton_kernels.batched_ot_solve import sinkhorn_solve_fwd_kernel
from torch import Tensor

from pyml.reference.batched_ot import mass_tolerance

BLOCK = 64  # rows and columns of a block, where a problem has several


def sinkhorn_solve_fwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, init: Tensor | None, eps: float, max_iter: int,
    tol: float | None, rho: float | None, implicit: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    p = problems(cost, a, b, eps)
    batch = cost.shape[:-2]
    value, transport = p.new(*batch), p.new(*batch)
    f, g, rows = p.new(*batch, p.n), p.new(*batch, p.m), p.new(*batch, p.n)
    n_iter, status = (torch.empty(batch, dtype=torch.int32, device=cost.device) for _ in range(2))
    outputs = (value, transport, f, g, rows, n_iter, status)
    if cost.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    scratch = p.scratch(4, 3)
    launch(
        sinkhorn_solve_fwd_kernel, (p.batch,),
        p.cost, *p.weights, p.cost if init is None else p.rows(init), p.eps,
        p.eps if rho is None else p.number(rho), p.eps if tol is None else p.number(tol), *outputs, scratch,
        *p.place, p.n, p.m, max_iter, scratch.shape[1], mass_tolerance(a, b),
        HAS_INIT=init is not None, UNBALANCED=rho is not None, STOPS=tol is not None, SINGLE=p.single, BLOCK=BLOCK,
        **p.constants, **p.options,
    )  # fmt: skip
    return outputs


def sinkhorn_solve_bwd(
    grad_value: Tensor, grad_transport: Tensor, grad_f: Tensor, grad_g: Tensor, cost: Tensor, a: Tensor | None,
    b: Tensor | None, init: Tensor | None, eps: float, max_iter: int, tol: float | None, rho: float | None,
    implicit: bool, f: Tensor, g: Tensor, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = problems(cost, a, b, eps, in_double=implicit)  # in float its system loses more than the reference does
    wanted = [mask[0], mask[1] and a is not None, mask[2] and b is not None]
    found = [_gradient(want, t, cost, p) for want, t in zip(wanted, (cost, a, b))]
    if cost.numel() > 0:
        scratch = p.scratch(1, 1)
        launch(
            sinkhorn_solve_bwd_kernel, (p.batch,),
            p.cost, *p.weights, p.eps, p.eps if rho is None else p.number(rho), p.rows(f), p.rows(g),
            *(p.rows(t) for t in (grad_value, grad_transport, grad_f, grad_g)), *found, scratch,
            *p.place, p.n, p.m, scratch.shape[1],
            UNBALANCED=rho is not None, IMPLICIT=implicit, SINGLE=p.single, BLOCK=BLOCK,
            WANT_COST=wanted[0], WANT_A=wanted[1], WANT_B=wanted[2], **p.constants, **p.options,
        )  # fmt: skip
    return _finished(found, wanted, (cost, a, b), cost)


def sinkhorn_plan_fwd(cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, eps: float) -> Tensor:
    p = problems(cost, a, b, eps)
    plan = torch.empty(cost.shape, dtype=cost.dtype, device=cost.device)
    if plan.numel() > 0:
        blocks = _blocks(p)
        launch(
            sinkhorn_plan_fwd_kernel, grid(p.batch, p.n, p.m, *blocks.values()),
            p.cost, *p.weights, p.rows(f), p.rows(g), p.eps, plan, *p.place, p.n, p.m, **_plan_constants(p), **blocks,
        )  # fmt: skip
    return plan


def sinkhorn_plan_bwd(
    grad: Tensor, cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, eps: float,
    mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    p = problems(cost, a, b, eps)
    wanted = [mask[0], mask[1] and a is not None, mask[2] and b is not None, mask[3], mask[4]]
    given = (cost, a, b, f, g)
    found = [_gradient(want, t, cost, p) for want, t in zip(wanted, given)]
    if cost.numel() > 0:
        upstream, place = located(grad)
        flags = dict(zip(("WANT_COST", "WANT_A", "WANT_B", "WANT_F", "WANT_G"), wanted))
        launch(
            sinkhorn_plan_bwd_kernel, (p.batch,),
            p.cost, *p.weights, p.rows(f), p.rows(g), p.eps, upstream, *found, *p.place,
            *place, p.n, p.m,
            **flags, **_plan_constants(p), **_blocks(p),
        )  # fmt: skip
    return _finished(found, wanted, given, cost)


def _blocks(p: Problems) -> dict[str, int]:
    return {"BLOCK_N": min(BLOCK, p.constants["N"]), "BLOCK_M": min(BLOCK, p.constants["M"])}


def _plan_constants(p: Problems) -> dict[str, object]:
    rest = {name: p.constants[name] for name in ("HAS_A", "HAS_B", "ACC")}
    return rest | {"num_warps": 4 if p.constants["N"] * p.constants["M"] >= 2048 else 1, "num_stages": 1}


def _gradient(wanted: bool, like: Tensor | None, cost: Tensor, p: Problems) -> Tensor:
    """Room for one gradient: that of the cost in its dtype, of small tensors in that of the sums. Zero without work."""
    if not wanted or like is None:
        return cost.new_empty(0)
    make = torch.zeros if cost.numel() == 0 else torch.empty
    return make(like.shape, dtype=cost.dtype if like is cost else p.wide, device=cost.device)


def _finished(found, wanted, given, cost) -> tuple[Tensor, ...]:
    """In the dtypes of the inputs; what is not wanted is empty."""
    return tuple(
        t.to(like.dtype) if want and like is not None else (cost if like is None else like).new_empty(0)
        for t, want, like in zip(found, wanted, given)
    )


__all__ = [
    "pairwise_cost_bwd",
    "pairwise_cost_fwd",
    "sinkhorn_plan_bwd",
    "sinkhorn_plan_fwd",
    "sinkhorn_solve_bwd",
    "sinkhorn_solve_fwd",
]
