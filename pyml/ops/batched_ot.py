"""Batched entropic optimal transport: `sinkhorn` on any cost, `sinkhorn_points` between point clouds.

Both rest on two registered ops: `sinkhorn_solve` runs the iterations of all problems in one call, `sinkhorn_plan` makes
the plan of given potentials. Maths and edge rules: pyml/reference/batched_ot.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops._registry import Capability, Op
from pyml.reference import batched_ot as reference

NOT_CONVERGED, UNEQUAL_MASSES, BAD_NUMBERS = reference.NOT_CONVERGED, reference.UNEQUAL_MASSES, reference.BAD_NUMBERS
Pair = tuple[Tensor | None, Tensor | None]


class SinkhornResult:
    """What `sinkhorn` found for every problem of a batch ``[...]``.

    Attributes:
        value: ``[...]``, <P, C> + eps KL(P | a b^T), unbalanced also + rho KL(P 1 | a) + rho KL(P^T 1 | b), of the plan
            that is returned, with KL(P | Q) = sum P log(P / Q) - P + Q; the divergence where debiasing was asked for.
        transport_cost: ``[...]``, <P, C>.
        f, g: potentials ``[..., n]``, ``[..., m]`` in float32 or float64: P = a_i b_j exp((f_i + g_j - C_ij) / eps).
            Balanced, sum b g = 0. 0 where masked.
        row_mass: ``[..., n]``, P 1; the columns are exact after each iteration.
        n_iter: int32 ``[...]``, iterations that this problem took.
        status: int32 ``[...]``, 0 or a sum of NOT_CONVERGED = 1 (`tol` was given and not reached), UNEQUAL_MASSES = 2
            (balanced: the columns have their masses, the rows not), BAD_NUMBERS = 4 (a NaN or an infinity in the cost,
            or a weight that is none: the results of that problem are NaN, its gradients 0).
    """

    def __init__(
        self, outputs: Sequence[Tensor], problem: tuple[Any, ...], implicit: bool, backend: str | None
    ) -> None:
        self.value, self.transport_cost, self.f, self.g, self.row_mass, self.n_iter, self.status = outputs
        self._problem, self._implicit, self._backend = problem, implicit, backend
        if not implicit:
            self.f, self.g = self.f.detach(), self.g.detach()

    @property
    def plan(self) -> Tensor:
        """P ``[..., n, m]`` in the dtype of the cost, made at each access; differentiable with plan_grad="implicit"."""
        cost, a, b, eps, _ = self._problem
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
        """Where the plan takes each row on average: ``[..., m, d]`` -> ``[..., n, d]``; 0 for a masked row."""
        plan = self.plan
        mass = plan.sum(-1, keepdim=True)
        return plan @ points.to(plan.dtype) / mass.masked_fill(mass == 0, 1)


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
        lengths: integer tensors (rows, columns), each ``[...]`` or None: only so many first ones count.
        mask: bool tensors (rows, columns), ``[..., n]`` and ``[..., m]`` or None: True for those that count. Default
            weights are uniform among those that count; given ones are set to 0 elsewhere. Other costs are not read.
        init: an earlier result, or its g, to start from.
        plan_grad: "detach": the plan is a constant, as in PLOT; so transport_cost has gradient P. "implicit": plan,
            potentials and transport cost have their exact gradients, by the implicit function theorem, which assumes
            convergence. ``value`` always has the gradient of the envelope: P to the cost, f and g to the weights (exact
            at convergence; no iteration is kept for it).
        debias: costs (rows to rows, columns to columns): ``value`` becomes the Sinkhorn divergence, which is 0 for
            equal clouds; True is for `sinkhorn_points`.
        strict: raise where a status is UNEQUAL_MASSES or BAD_NUMBERS (waits for a GPU).

    Returns:
        SinkhornResult. A problem with nothing to transport gives 0, and gradient 0.

    Accurate at every eps: scalings of a fixed matrix where these are safe, log-sum-exps where they are not. Gradients
    go to cost, a and b; the second derivative raises, that of ``plan`` for given potentials works.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Sources: Cuturi, "Sinkhorn Distances", arXiv 1306.0895; Chizat et al., "Scaling Algorithms for Unbalanced Optimal
    Transport", arXiv 1607.05816; Chen et al., "PLOT", arXiv 2210.01253.
    """
    op = "sinkhorn"
    _check.tensors(op, cost, first_name="cost")
    if cost.dim() < 2:
        _check.fail(op, "cost", "shape [..., n, m]", list(cost.shape))
    _check.member(op, "plan_grad", plan_grad, ("detach", "implicit"))
    steps = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    if not steps:
        _check.fail(op, "eps", "a number > 0 or a falling list of them", eps)
    live = [_live(op, name, dim, cost, lengths, mask) for name, dim in (("rows", -2), ("columns", -1))]
    weights = [_weights(op, name, t, on, cost, dim) for name, t, on, dim in zip("ab", (a, b), live, (-2, -1))]
    g = init.g if isinstance(init, SinkhornResult) else init
    if g is not None:
        _check.tensors(op, cost, first_name="cost", init=g)
        g = _broadcast(op, "init", g.detach(), (*cost.shape[:-2], cost.shape[-1]))
    implicit = plan_grad == "implicit"
    for step in steps[:-1]:
        with torch.no_grad():
            g = SINKHORN_SOLVE(cost, *weights, g, step, max_iter, None, rho, False, backend=backend)[3]
    outputs = SINKHORN_SOLVE(cost, *weights, g, steps[-1], max_iter, tol, rho, implicit, backend=backend)
    if strict and bool((outputs[6] & (UNEQUAL_MASSES | BAD_NUMBERS)).any()):
        worst = outputs[6].flatten().tolist()
        first = next(i for i, s in enumerate(worst) if s & (UNEQUAL_MASSES | BAD_NUMBERS))
        _check.fail(
            op, "cost, a, b", "finite costs, weights >= 0 and equal masses", f"status {worst[first]} at {first}"
        )
    if debias is not False:
        if not isinstance(debias, (tuple, list)) or len(debias) != 2:
            _check.fail(op, "debias", "False or costs (rows to rows, columns to columns)", repr(debias))
        own = [
            SINKHORN_SOLVE(c, w, w, None, steps[-1], max_iter, tol, rho, implicit, backend=backend)[0]
            for c, w in zip(debias, weights)
        ]
        value = outputs[0] - (own[0] + own[1]) / 2
        if rho is not None:
            value = value + steps[-1] / 2 * (_mass(weights[0]) - _mass(weights[1])) ** 2
        outputs = (value, *outputs[1:])
    return SinkhornResult(outputs, (cost, *weights, steps[-1], rho), implicit, backend)


def sinkhorn_points(
    x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, cost: str = "sqeuclidean",
    debias: bool = False, **options: Any,
) -> SinkhornResult:  # fmt: skip
    """`sinkhorn` between point clouds.

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``, leading dimensions as those of x.
        a: see `sinkhorn`; so are b and ``options``.
        cost: "sqeuclidean", |x - y|^2, or "cosine", 1 - cos(x, y), where a point of length 0 has cosine 0. Formed in
            float32 (float64 when x or y is) whatever autocast and the settings of TF32 say.
        debias: ``value`` becomes the Sinkhorn divergence, value(x, y) - value(x, x) / 2 - value(y, y) / 2.

    Returns:
        SinkhornResult; gradients go to x and y too.
    """
    op = "sinkhorn_points"
    _check.tensors(op, x, y=y)
    for name, t in (("x", x), ("y", y)):
        if t.dim() < 2:
            _check.fail(op, name, "shape [..., points, d]", list(t.shape))
    _check.shape(op, "y", y, (*x.shape[:-2], y.shape[-2], x.shape[-1]), "[..., m, d]")
    _check.member(op, "cost", cost, ("sqeuclidean", "cosine"))
    pair: Any = (_point_cost(x, x, cost), _point_cost(y, y, cost)) if debias else False
    return sinkhorn(_point_cost(x, y, cost), a, b, debias=pair, **options)


def _point_cost(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """``[..., n, m]`` in full precision. Differences are taken from a common centre: far clouds lose no digits."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(wide), y.to(wide)
    if kind == "cosine":
        x, y = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + reference.SMALLEST) for t in (x, y))
        return 1 - _product(x, y)
    centre = x.detach().mean(-2, keepdim=True) if x.shape[-2] else 0
    x, y = x - centre, y - centre
    square = (x * x).sum(-1).unsqueeze(-1) + (y * y).sum(-1).unsqueeze(-2)
    return (square - 2 * _product(x, y)).clamp(min=0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in the dtype of x, never in TF32 or a dtype of autocast."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    with torch.autocast(x.device.type, enabled=False):
        if not x.is_cuda or not before:
            return x @ y.transpose(-1, -2)
        matmul.allow_tf32 = False
        try:
            return x @ y.transpose(-1, -2)
        finally:
            matmul.allow_tf32 = before


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


# --- arguments of `sinkhorn` ----------------------------------------------------------------------------------------


def _broadcast(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    if t.shape == shape:
        return t
    fits = t.dim() <= len(shape) and t.dim() > 0 and t.shape[-1] == shape[-1]
    if not fits or any(have not in (1, want) for have, want in zip(t.shape[::-1], shape[::-1])):
        _check.fail(op, name, f"a shape that broadcasts to {list(shape)}", list(t.shape))
    return t.expand(shape)


def _live(op: str, side: str, dim: int, cost: Tensor, lengths: Any, mask: Any) -> Tensor | None:
    """Bool ``[..., n or m]``: which rows (dim -2) or columns (-1) count; None: all."""
    which, size, lead = dim + 2, cost.shape[dim], tuple(cost.shape[:-2])
    for name, pair in (("lengths", lengths), ("mask", mask)):
        if pair is not None and not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            _check.fail(op, name, "a pair (rows, columns) of tensors or None", type(pair).__name__)
    found = None
    if lengths is not None and lengths[which] is not None:
        t = lengths[which]
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            _check.fail(op, f"lengths of {side}", "an integer tensor", getattr(t, "dtype", type(t).__name__))
        if t.shape != lead:
            _check.fail(op, f"lengths of {side}", f"shape {list(lead)}", list(t.shape))
        found = torch.arange(size, device=cost.device) < t.to(cost.device).unsqueeze(-1)
    if mask is not None and mask[which] is not None:
        t = mask[which]
        if not isinstance(t, Tensor) or t.dtype != torch.bool:
            _check.fail(op, f"mask of {side}", "a bool tensor", getattr(t, "dtype", type(t).__name__))
        t = _broadcast(op, f"mask of {side}", t, (*lead, size))
        found = t if found is None else found & t
    return found


def _weights(op: str, name: str, given: Any, live: Tensor | None, cost: Tensor, dim: int) -> Tensor | None:
    if given is not None:
        others: dict[str, Any] = {name: given}
        _check.tensors(op, cost, first_name="cost", **others)
        given = _broadcast(op, name, given, (*cost.shape[:-2], cost.shape[dim]))
        return given if live is None else given.masked_fill(~live, 0)
    if live is None:
        return None
    wide = torch.promote_types(cost.dtype, torch.float32)
    return live.to(wide) / live.sum(-1, keepdim=True).clamp(min=1)


def _mass(weights: Tensor | None) -> Any:
    return 1.0 if weights is None else weights.sum(-1)


# --- checks ---------------------------------------------------------------------------------------------------------


def _positive(op: str, name: str, value: Any, zero: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        _check.fail(op, name, f"a finite number {'>=' if zero else '>'} 0", repr(value))


def _check_problem(op: str, cost: Any, a: Any, b: Any, eps: Any, **others: Any) -> None:
    """``others``: (tensor, its last size); None where that is allowed."""
    last = {"a": (a, -2), "b": (b, -1), **others}
    _check.tensors(op, cost, ("a", "b", "init"), first_name="cost", **{name: t for name, (t, _) in last.items()})
    if cost.dim() < 2:
        _check.fail(op, "cost", "shape [..., n, m]", list(cost.shape))
    for name, (t, dim) in last.items():
        if t is not None:
            _check.shape(op, name, t, (*cost.shape[:-2], cost.shape[dim]), f"[..., {'n' if dim == -2 else 'm'}]")
    _positive(op, "eps", eps)


def _check_solve(cost, a, b, init, eps, max_iter, tol, rho, implicit) -> None:
    op = "sinkhorn_solve"
    _check_problem(op, cost, a, b, eps, init=(init, -1))
    if not isinstance(max_iter, int) or isinstance(max_iter, bool) or not 1 <= max_iter <= 1_000_000:
        _check.fail(op, "max_iter", "an integer from 1 to 1000000", repr(max_iter))
    if tol is not None:
        _positive(op, "tol", tol, zero=True)
    if rho is not None:
        _positive(op, "rho", rho)
    if not isinstance(implicit, bool):
        _check.fail(op, "implicit", "True or False", repr(implicit))


def _check_plan(cost, a, b, f, g, eps) -> None:
    _check_problem("sinkhorn_plan", cost, a, b, eps, f=(f, -2), g=(g, -1))


# --- registration ---------------------------------------------------------------------------------------------------


def _solve_fake(cost, a, b, init, eps, max_iter, tol, rho, implicit):
    double = any(t is not None and t.dtype == torch.float64 for t in (cost, a, b))
    wide = torch.float64 if double else torch.float32
    lead = cost.shape[:-2]
    f, g = cost.new_empty((*lead, cost.shape[-2]), dtype=wide), cost.new_empty((*lead, cost.shape[-1]), dtype=wide)
    words = [cost.new_empty(lead, dtype=torch.int32) for _ in range(2)]
    return cost.new_empty(lead), cost.new_empty(lead), f, g, torch.empty_like(f), *words


def _plan_fake(cost, a, b, f, g, eps):
    return cost.new_empty(cost.shape)


def _plan_composed(cost, a, b, f, g, eps, backend):
    return reference.sinkhorn_plan(cost, a, b, f, g, eps)


SINKHORN_SOLVE = Op(
    "sinkhorn_solve", "batched_ot", reference.sinkhorn_solve, _check_solve, _solve_fake, gradients=("cost", "a", "b"),
    outputs=4, saved=(2, 3), batched=("cost", "a", "b", "init"), capability=Capability(double_backward=False),
    has_cuda=False, has_triton=False,
)  # fmt: skip
SINKHORN_PLAN = Op(
    "sinkhorn_plan", "batched_ot", reference.sinkhorn_plan, _check_plan, _plan_fake,
    gradients=("cost", "a", "b", "f", "g"), composed=_plan_composed, batched=("cost", "a", "b", "f", "g"),
    has_cuda=False, has_triton=False,
)  # fmt: skip

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_plan", "sinkhorn_points", "sinkhorn_solve"]
