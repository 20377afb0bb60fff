"""Batched entropic optimal transport: `sinkhorn` on any cost, `sinkhorn_points` between point clouds.

Three registered ops are below them: `sinkhorn_solve` runs the iterations of all problems in one call, `sinkhorn_plan`
makes the plan of given potentials, `pairwise_cost` the costs between points. Maths and edge rules:
pyml/reference/batched_ot.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _batched_ot_arguments as arguments
from pyml.ops import _check
from pyml.ops._batched_ot_arguments import Pair
from pyml.ops._registry import Capability, Op
from pyml.reference import batched_ot as reference

NOT_CONVERGED, UNEQUAL_MASSES, BAD_NUMBERS = reference.NOT_CONVERGED, reference.UNEQUAL_MASSES, reference.BAD_NUMBERS


class SinkhornResult:
    """What `sinkhorn` found for every problem of a batch ``[...]``.

    Attributes:
        value: ``[...]``, <P, C> + eps KL(P | a b^T), unbalanced also + rho KL(P 1 | a) + rho KL(P^T 1 | b), of the plan
            that is returned, with KL(P | Q) = sum P log(P / Q) - P + Q; the divergence where debiasing was asked for.
            Float32 or float64, as are all numbers but the plan.
        transport_cost: ``[...]``, <P, C>.
        f, g: potentials ``[..., n]``, ``[..., m]``: P = a_i b_j exp((f_i + g_j - C_ij) / eps). Balanced, sum b g = 0.
            0 where masked.
        row_mass: ``[..., n]``, P 1; the columns are exact after each iteration.
        n_iter: int32 ``[...]``, iterations that this problem took.
        status: int32 ``[...]``, 0 or a sum of NOT_CONVERGED = 1 (`tol` was given and not reached), UNEQUAL_MASSES = 2
            (balanced: the columns have their masses, the rows not), BAD_NUMBERS = 4 (a NaN or an infinity in the cost
            or in ``init``, or a weight that is none: the results of that problem are NaN, its gradients 0). Debiased,
            what its own two problems gave too.
    """

    def __init__(
        self, outputs: Sequence[Tensor], problem: tuple[Any, ...], implicit: bool, backend: str | None,
        own: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.value, self.transport_cost, self.f, self.g, self.row_mass, self.n_iter, self.status = outputs
        self._problem, self._implicit, self._backend = problem, implicit, backend
        self._own = [g.detach() for g in own]  # debiased: where the two own problems ended, for a warm start
        self._versions = _versions(problem)
        if not implicit:
            self.f, self.g = self.f.detach(), self.g.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _versions=_versions(state["_problem"]))  # copies count from anew

    @property
    def plan(self) -> Tensor:
        """P ``[..., n, m]`` in the dtype of the cost, made at each access; differentiable with plan_grad="implicit".

        Raises:
            ValueError: the cost or a weight has been written to since.
        """
        return self._plan(None)

    def _plan(self, dtype: torch.dtype | None) -> Tensor:
        cost, a, b, eps, _ = self._problem
        versions = _versions(self._problem)
        if None not in (versions, self._versions) and versions != self._versions:
            _check.fail("SinkhornResult.plan", "cost, a, b", "the numbers that were solved", "some written to since")
        cost = cost if dtype is None else cost.to(dtype)
        if self._implicit:
            return SINKHORN_PLAN(cost, a, b, self.f, self.g, eps, backend=self._backend)
        detached = [t if t is None else t.detach() for t in (cost, a, b)]
        return SINKHORN_PLAN(*detached, self.f, self.g, eps, backend=self._backend)

    @property
    def error(self) -> Tensor:
        """``[...]``: L1 distance of the row masses from what they should be, a or, unbalanced, a exp(-f / rho)."""
        cost, a, _, _, rho = self._problem
        wanted = self.row_mass.new_full((), 1 / max(cost.shape[-2], 1)) if a is None else a.detach()
        if rho is not None:
            wanted = wanted * torch.exp(-self.f.detach() / rho)
        return (self.row_mass - wanted).abs().sum(-1)

    def barycentric_map(self, points: Tensor) -> Tensor:
        """Where the plan takes each row on average: ``[..., m, d]`` -> ``[..., n, d]``; 0 for a masked row.

        Computed in float32, or float64; in the wider dtype of points and cost. Points that no mass goes to are not
        looked at.
        """
        cost = self._problem[0]
        _check.tensors("barycentric_map", cost, first_name="cost", points=points)
        if points.dim() < 2 or points.shape[-2] != cost.shape[-1]:
            _check.fail("barycentric_map", "points", f"[..., {cost.shape[-1]}, d], one a column", list(points.shape))
        dtype = torch.promote_types(points.dtype, cost.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        plan = self._plan(wide)
        mass, unmet = plan.sum(-1, keepdim=True), (plan.detach().sum(-2) == 0).unsqueeze(-1)
        with torch.autocast(plan.device.type, enabled=False):
            found = plan @ points.to(wide).masked_fill(unmet, 0) / mass.masked_fill(mass == 0, 1)
        return found.to(dtype)


def _versions(problem: tuple[Any, ...]) -> list[int] | None:
    """How often the tensors of a problem were written to; None where that cannot be asked."""
    tensors = [t for t in problem if isinstance(t, Tensor)]
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return None
    return [t._version for t in tensors]


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Sequence[float],
    max_iter: int = 100,
    tol: float | None = None,
    rho: float | None = None,
    lengths: Pair | None = None,
    mask: Pair | None = None,
    init: Tensor | SinkhornResult | None = None,
    plan_grad: str = "detach",
    debias: bool | tuple[Tensor, Tensor] = False,
    strict: bool = False,
    backend: str | None = None,
) -> SinkhornResult:
    """Entropic optimal transport for a batch of problems, each solved by Sinkhorn's iteration in one call.

    Args:
        cost: ``[..., n, m]``, float32, float64, bfloat16 or float16, any strides. Computed in float32, or float64.
        a: weights of the rows, ``[..., n]`` or what broadcasts to it; 1 / n by default. 0 masks a row.
        b: weights of the columns, ``[..., m]``; 1 / m by default. Their sum is that of a, unless ``rho`` is given.
        eps: regularisation, in units of the cost. A list of falling numbers is eps-scaling: each is solved from the
            potentials of the one before; the results, and n_iter, are those of the last.
        max_iter: iterations at most (exactly, without ``tol``), for each eps. One updates f (rows), then g (columns).
        tol: a problem stops when the L1 error of its row masses is at most this, looked at every 5 iterations. Each
            problem stops for itself: its result does not depend on its batch-mates, nor on the number of threads.
        rho: unbalanced: the plan's masses may differ from a and b, at the price rho KL(P 1 | a) + rho KL(P^T 1 | b).
        lengths: integer tensors (rows, columns), each ``[...]`` or None: only so many first ones count. Less than 0 or
            more than there are is refused on a CPU, and counts as 0 or all where looking would cost a wait for the GPU.
        mask: bool tensors (rows, columns), ``[..., n]`` and ``[..., m]`` or None: True for those that count. Default
            weights are uniform among those that count; given ones are set to 0 elsewhere. Other costs are not read.
        init: an earlier result, or its g, to start from. A NaN or an infinity in it marks that problem BAD_NUMBERS;
            masked entries are not looked at. An earlier debiased result also starts the own problems.
        plan_grad: "detach": the plan is a constant, as in PLOT; so transport_cost has gradient P. "implicit": plan,
            potentials and transport cost have their exact gradients, by the implicit function theorem, which assumes
            convergence. ``value`` always has the gradient of the envelope: P to the cost, f and g to the weights (exact
            at convergence; no iteration is kept for it).
        debias: costs (rows to rows ``[..., n, n]``, columns to columns ``[..., m, m]``): ``value`` becomes the
            Sinkhorn divergence, which is 0 for equal clouds; True is for `sinkhorn_points`. These own problems are
            solved as the first: the same eps, iterations and tolerance.
        strict: raise where a status is UNEQUAL_MASSES or BAD_NUMBERS (waits for a GPU).

    Returns:
        SinkhornResult. A problem with nothing to transport, be it on one side alone, gives 0, gradient 0 and status 0.

    Accurate at every eps that the dtype can hold beside the cost: scalings of a fixed matrix where these are safe,
    log-sum-exps where they are not. In float32 potentials have 7 digits, so where max |C| / eps is above 1e5 the plan's
    masses are wrong in the third digit (`SinkhornResult.error` shows it), and at eps above 1000 times the largest cost
    the rounding of ``value`` is some 1e-7 eps: use float64 there. Gradients go to cost, a and b; the second derivative
    raises, that of ``plan`` for given potentials works.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Sources: Cuturi, "Sinkhorn Distances", arXiv 1306.0895; Chizat et al., "Scaling Algorithms for Unbalanced Optimal
    Transport", arXiv 1607.05816; Chen et al., "PLOT", arXiv 2210.01253.
    """
    return _sinkhorn(
        "sinkhorn", cost, a, b, eps=eps, max_iter=max_iter, tol=tol, rho=rho, lengths=lengths, mask=mask, init=init,
        plan_grad=plan_grad, debias=debias, strict=strict, backend=backend,
    )  # fmt: skip


def _sinkhorn(
    op: str, cost: Tensor, a: Tensor | None, b: Tensor | None, *, eps: Any, max_iter: int = 100,
    tol: float | None = None, rho: float | None = None, lengths: Pair | None = None, mask: Pair | None = None,
    init: Any = None, plan_grad: str = "detach", debias: Any = False, strict: bool = False, backend: str | None = None,
) -> SinkhornResult:  # fmt: skip
    _check.tensors(op, cost, first_name="cost")
    if cost.dim() < 2:
        _check.fail(op, "cost", "shape [..., n, m]", list(cost.shape))
    _check.member(op, "plan_grad", plan_grad, ("detach", "implicit"))
    steps = arguments.steps_of(op, eps)
    max_iter, tol, rho = arguments.check_options(op, max_iter, tol, rho)
    wide = reference.compute_dtype(cost, *(t for t in (a, b) if isinstance(t, Tensor)))
    for step in steps:
        arguments.in_range(op, wide, step, rho)
    live = [arguments.live(op, name, dim, cost, lengths, mask) for name, dim in (("rows", -2), ("columns", -1))]
    weights = [arguments.weights(op, name, t, on, cost, dim) for name, t, on, dim in zip("ab", (a, b), live, (-2, -1))]
    own_costs = arguments.own_costs(op, cost, debias)
    starts: list[Tensor | None] = [init.g, *init._own] if isinstance(init, SinkhornResult) else [init]
    starts = [*starts, None, None]
    if starts[0] is not None:
        _check.tensors(op, cost, first_name="cost", init=starts[0])
        starts[0] = arguments.broadcast(op, "init", starts[0].detach(), (*cost.shape[:-2], cost.shape[-1]))
    implicit = plan_grad == "implicit"

    def solve(cost: Tensor, a: Tensor | None, b: Tensor | None, g: Tensor | None) -> tuple[Tensor, ...]:
        for step in steps[:-1]:
            with torch.no_grad():
                g = SINKHORN_SOLVE(cost, a, b, g, step, max_iter, None, rho, False, backend=backend)[3]
        return SINKHORN_SOLVE(cost, a, b, g, steps[-1], max_iter, tol, rho, implicit, backend=backend)

    outputs = solve(cost, weights[0], weights[1], starts[0])
    own = [solve(c, w, w, g) for c, w, g in zip(own_costs, weights, starts[1:])]
    if own:
        value = outputs[0] - (own[0][0] + own[1][0]) / 2
        if rho is not None:
            value = value + steps[-1] / 2 * (_mass(weights[0], value) - _mass(weights[1], value)) ** 2
        status = outputs[6] | own[0][6] | own[1][6]
        for weight, size in zip(weights, cost.shape[-2:]):
            if weight is not None:
                value = value.masked_fill((weight == 0).all(-1) & (status & BAD_NUMBERS == 0), 0)
            elif size == 0:
                value = 0 * value
        outputs = (value, *outputs[1:6], status)
    if strict and bool((outputs[6] & (UNEQUAL_MASSES | BAD_NUMBERS)).any()):
        worst = outputs[6].flatten().tolist()
        first = next(i for i, s in enumerate(worst) if s & (UNEQUAL_MASSES | BAD_NUMBERS))
        _check.fail(
            op, "cost, a, b", "finite costs, weights >= 0 and equal masses", f"status {worst[first]} at {first}"
        )
    return SinkhornResult(outputs, (cost, *weights, steps[-1], rho), implicit, backend, [o[3] for o in own])


def _mass(weights: Tensor | None, like: Tensor) -> Any:
    return 1.0 if weights is None else weights.to(like.dtype).sum(-1)


def sinkhorn_points(
    x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, eps: float | Sequence[float],
    cost: str = "sqeuclidean", max_iter: int = 100, tol: float | None = None, rho: float | None = None,
    lengths: Pair | None = None, mask: Pair | None = None, init: Tensor | SinkhornResult | None = None,
    plan_grad: str = "detach", debias: bool = False, strict: bool = False, backend: str | None = None,
) -> SinkhornResult:  # fmt: skip
    """`sinkhorn` between point clouds.

    Args:
        x: ``[..., n, d]``. Masked points may hold anything, NaN too.
        y: ``[..., m, d]``, leading dimensions as those of x.
        cost: "sqeuclidean", |x - y|^2, or "cosine", 1 - cos(x, y), where a point of length 0 has cosine 0: see
            `pairwise_cost`. In float32, or float64, whatever autocast and the settings of TF32 say.
        debias: ``value`` becomes the Sinkhorn divergence, value(x, y) - value(x, x) / 2 - value(y, y) / 2.

    The other arguments are those of `sinkhorn`.

    Returns:
        SinkhornResult; gradients go to x and y too.
    """
    op = "sinkhorn_points"
    arguments.check_points(op, x, y, cost, "cost")
    _check.member(op, "debias", debias, (False, True))
    clouds = [(x, y), (x, x), (y, y)] if debias else [(x, y)]
    costs = [PAIRWISE_COST(u, v, cost, backend=backend) for u, v in clouds]
    return _sinkhorn(
        op, costs[0], a, b, eps=eps, max_iter=max_iter, tol=tol, rho=rho, lengths=lengths, mask=mask, init=init,
        plan_grad=plan_grad, debias=costs[1:] if debias else False, strict=strict, backend=backend,
    )  # fmt: skip


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
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The op under `sinkhorn`: arguments as there, already broadcast; init is g ``[..., m]``.

    Returns:
        value, transport cost, f, g, row masses, n_iter, status: see `SinkhornResult`. f and g have gradients when
        ``implicit``.
    """
    return SINKHORN_SOLVE(cost, a, b, init, eps, max_iter, tol, rho, implicit, backend=backend)


def sinkhorn_plan(
    cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, eps: float, *, backend: str | None = None
) -> Tensor:
    """The plan a_i b_j exp((f_i + g_j - C_ij) / eps) of given potentials ``[..., n]`` and ``[..., m]``.

    Returns:
        ``[..., n, m]`` in the dtype of the cost, 0 where a or b is. Differentiable any number of times in all
        arguments, which count as independent: through `sinkhorn_solve` the potentials follow the cost.
    """
    return SINKHORN_PLAN(cost, a, b, f, g, eps, backend=backend)


def pairwise_cost(x: Tensor, y: Tensor, kind: str = "sqeuclidean", *, backend: str | None = None) -> Tensor:
    """Costs between two point clouds, each summed over d in one fixed order: no bit depends on the other points.

    Args:
        x: ``[..., n, d]``, float32, float64, bfloat16 or float16, any strides.
        y: ``[..., m, d]``, leading dimensions as those of x.
        kind: "sqeuclidean": sum (x - y)^2, of differences, so that far clouds lose no digits; "cosine":
            1 - cos(x, y), where a point of length 0 has cosine 0.

    Returns:
        ``[..., n, m]`` in float32, or float64 when x or y is. A point with a NaN or an infinity has cost NaN and takes
        no part in any gradient.
    """
    return PAIRWISE_COST(x, y, kind, backend=backend)


# --- registration ---------------------------------------------------------------------------------------------------


def _check_solve(cost, a, b, init, eps, max_iter, tol, rho, implicit) -> None:
    arguments.check_problem("sinkhorn_solve", cost, a, b, eps, init=(init, -1))
    arguments.check_options("sinkhorn_solve", max_iter, tol, rho)
    arguments.in_range("sinkhorn_solve", reference.compute_dtype(cost, a, b), eps, rho)
    if not isinstance(implicit, bool):
        _check.fail("sinkhorn_solve", "implicit", "True or False", repr(implicit))


def _check_plan(cost, a, b, f, g, eps) -> None:
    arguments.check_problem("sinkhorn_plan", cost, a, b, eps, f=(f, -2), g=(g, -1))


def _check_pairwise(x, y, kind) -> None:
    arguments.check_points("pairwise_cost", x, y, kind)


def _solve_fake(cost, a, b, init, eps, max_iter, tol, rho, implicit):
    wide, lead = reference.compute_dtype(cost, a, b), cost.shape[:-2]
    f, g = cost.new_empty((*lead, cost.shape[-2]), dtype=wide), cost.new_empty((*lead, cost.shape[-1]), dtype=wide)
    words = [cost.new_empty(lead, dtype=torch.int32) for _ in range(2)]
    values = [cost.new_empty(lead, dtype=wide) for _ in range(2)]
    return *values, f, g, torch.empty_like(f), *words


def _plan_fake(cost, a, b, f, g, eps):
    return cost.new_empty(cost.shape)


def _plan_composed(cost, a, b, f, g, eps, backend):
    return reference.sinkhorn_plan(cost, a, b, f, g, eps)


def _pairwise_fake(x, y, kind):
    return x.new_empty((*x.shape[:-1], y.shape[-2]), dtype=reference.compute_dtype(x, y))


def _pairwise_composed(x, y, kind, backend):
    return reference.pairwise_cost(x, y, kind)


SINKHORN_SOLVE = Op(
    "sinkhorn_solve", "batched_ot", reference.sinkhorn_solve, _check_solve, _solve_fake, gradients=("cost", "a", "b"),
    outputs=4, saved=(2, 3), batched=("cost", "a", "b", "init"),
    capability=Capability(double_backward=False, wide=True),
    cuda_preference=("cuda", "triton"),  # by arithmetic, see docs/gpu.md; not measured yet
)  # fmt: skip
SINKHORN_PLAN = Op(
    "sinkhorn_plan", "batched_ot", reference.sinkhorn_plan, _check_plan, _plan_fake,
    gradients=("cost", "a", "b", "f", "g"), composed=_plan_composed, batched=("cost", "a", "b", "f", "g"),
    cuda_preference=("cuda", "triton"),  # by arithmetic, see docs/gpu.md; not measured yet
)  # fmt: skip
PAIRWISE_COST = Op(
    "pairwise_cost", "batched_ot", reference.pairwise_cost, _check_pairwise, _pairwise_fake, gradients=("x", "y"),
    composed=_pairwise_composed, batched=("x", "y"), capability=Capability(wide=True),
    cuda_preference=("cuda", "triton"),
)  # fmt: skip

__all__ = ["SinkhornResult", "pairwise_cost", "sinkhorn", "sinkhorn_plan", "sinkhorn_points", "sinkhorn_solve"]
