"""Arguments of batched optimal transport: what `sinkhorn` makes of those it is given, and the checks of its ops.

Every function takes the name of the op that the user called, for the sentence that names it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check

Pair = tuple[Tensor | None, Tensor | None]


def broadcast(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    if t.shape == shape:
        return t
    fits = t.dim() <= len(shape) and t.dim() > 0 and t.shape[-1] == shape[-1]
    if not fits or any(have not in (1, want) for have, want in zip(t.shape[::-1], shape[::-1])):
        _check.fail(op, name, f"a shape that broadcasts to {list(shape)}", list(t.shape))
    return t.expand(shape)


def steps_of(op: str, eps: Any) -> list[float]:
    """The eps of each solve: one number, or some that fall."""
    steps = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    if not steps:
        _check.fail(op, "eps", "a number > 0 or a falling list of them", eps)
    steps = [positive(op, "eps", step) for step in steps]
    if any(after >= before for before, after in itertools.pairwise(steps)):
        _check.fail(op, "eps", "a number > 0 or a falling list of them", eps)
    return steps


def live(op: str, side: str, dim: int, cost: Tensor, lengths: Any, mask: Any) -> Tensor | None:
    """Bool ``[..., n or m]``: which rows (dim -2) or columns (-1) count; None: all."""
    which, size, lead = dim + 2, cost.shape[dim], tuple(cost.shape[:-2])
    for name, pair in (("lengths", lengths), ("mask", mask)):
        if pair is not None and not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            _check.fail(op, name, "a pair (rows, columns) of tensors or None", type(pair).__name__)
    found = None
    if lengths is not None and lengths[which] is not None:
        t, name = lengths[which], f"lengths of {side}"
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            _check.fail(op, name, "an integer tensor", getattr(t, "dtype", type(t).__name__))
        _same_device(op, name, t, cost)
        if t.shape != lead:
            _check.fail(op, name, f"shape {list(lead)}", list(t.shape))
        if readable(t) and t.numel() and not 0 <= int(t.min()) <= int(t.max()) <= size:
            _check.fail(op, name, f"integers from 0 to {size}", f"some from {int(t.min())} to {int(t.max())}")
        found = torch.arange(size, device=cost.device) < t.unsqueeze(-1)
    if mask is not None and mask[which] is not None:
        t, name = mask[which], f"mask of {side}"
        if not isinstance(t, Tensor) or t.dtype != torch.bool:
            _check.fail(op, name, "a bool tensor", getattr(t, "dtype", type(t).__name__))
        _same_device(op, name, t, cost)
        t = broadcast(op, name, t, (*lead, size))
        found = t if found is None else found & t
    return found


def _same_device(op: str, name: str, t: Tensor, cost: Tensor) -> None:
    if t.device != cost.device:
        _check.fail(op, name, f"the device of cost ({cost.device})", t.device)


def readable(t: Tensor) -> bool:
    """Whether its numbers can be looked at for free: not on a GPU, not while a graph is traced, not under vmap."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not torch.compiler.is_compiling() and type(t) is Tensor and t.device.type == "cpu" and not wrapped(t)


def weights(op: str, name: str, given: Any, on: Tensor | None, cost: Tensor, dim: int) -> Tensor | None:
    """Weights ``[..., n or m]``, 0 where masked; None: uniform."""
    if given is not None:
        others: dict[str, Any] = {name: given}
        _check.tensors(op, cost, first_name="cost", **others)
        given = broadcast(op, name, given, (*cost.shape[:-2], cost.shape[dim]))
        return given if on is None else given.masked_fill(~on, 0)
    if on is None:
        return None
    wide = torch.promote_types(cost.dtype, torch.float32)
    return on.to(wide) / on.sum(-1, keepdim=True).clamp(min=1)


def own_costs(op: str, cost: Tensor, debias: Any) -> Sequence[Tensor]:
    """Costs (rows to rows, columns to columns) for the divergence; none: not asked for."""
    if debias is False:
        return ()
    if not isinstance(debias, (tuple, list)) or len(debias) != 2:
        _check.fail(op, "debias", "False or costs (rows to rows, columns to columns)", repr(debias))
    for own, dim, side in zip(debias, (-2, -1), ("rows", "columns")):
        name, size = f"debias of {side}", cost.shape[dim]
        others: dict[str, Any] = {name: own}
        _check.tensors(op, cost, first_name="cost", **others)
        _check.shape(op, name, own, (*cost.shape[:-2], size, size), "[..., n, n]" if dim == -2 else "[..., m, m]")
    return debias


# --- checks of the registered ops -----------------------------------------------------------------------------------


def positive(op: str, name: str, value: Any, zero: bool = False) -> float:
    expected = f"a finite number {'>=' if zero else '>'} 0"
    found = _check.number(op, name, value, expected, low=0)
    if found == 0 and not zero:
        _check.fail(op, name, expected, repr(value))
    return found


def in_range(op: str, dtype: torch.dtype, eps: float, rho: float | None) -> None:
    """eps and rho are numbers that the computation has; below its precision rho is lost beside eps."""
    info = torch.finfo(dtype)
    for name, value in (("eps", eps), ("rho", rho)):
        if value is not None and not info.tiny <= value <= info.max:
            expected = f"a number from {info.tiny:.2g} to {info.max:.2g}, as the cost is computed in {dtype}"
            _check.fail(op, name, expected, value)
    if rho is not None and rho < info.eps * eps:
        _check.fail(op, "rho", f"at least {info.eps:.2g} eps = {info.eps * eps:.2g} in {dtype}", rho)


def check_problem(op: str, cost: Any, a: Any, b: Any, eps: Any, **others: Any) -> None:
    """``others``: (tensor, its last size); None where that is allowed."""
    last = {"a": (a, -2), "b": (b, -1), **others}
    _check.tensors(op, cost, ("a", "b", "init"), first_name="cost", **{name: t for name, (t, _) in last.items()})
    if cost.dim() < 2:
        _check.fail(op, "cost", "shape [..., n, m]", list(cost.shape))
    for name, (t, dim) in last.items():
        if t is not None:
            _check.shape(op, name, t, (*cost.shape[:-2], cost.shape[dim]), f"[..., {'n' if dim == -2 else 'm'}]")
    positive(op, "eps", eps)


def check_options(op: str, max_iter: Any, tol: Any, rho: Any) -> tuple[int, float | None, float | None]:
    """The three as Python's numbers."""
    max_iter = _check.integer(op, "max_iter", max_iter, 1, 1_000_000)
    tol = None if tol is None else positive(op, "tol", tol, zero=True)
    return max_iter, tol, None if rho is None else positive(op, "rho", rho)


def check_points(op: str, x: Any, y: Any, kind: Any, name: str = "kind") -> None:
    _check.tensors(op, x, y=y)
    for points, t in (("x", x), ("y", y)):
        if t.dim() < 2:
            _check.fail(op, points, "shape [..., points, d]", list(t.shape))
    _check.shape(op, "y", y, (*x.shape[:-2], y.shape[-2], x.shape[-1]), "[..., m, d]")
    _check.member(op, name, kind, ("sqeuclidean", "cosine"))
