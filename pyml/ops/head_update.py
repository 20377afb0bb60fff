"""Training and editing of single attention heads: linear layers whose gradients are those of a few slices, AdamW on
these slices where they lie, and edits of heads' outputs.

The slices are views of the weight: a head of a query, key or value projection is a block of its rows, a head of an
output projection a block of its columns. The formulas: pyml/reference/head_update.py. Finding, tuning and steering of
heads: `pyml.heads`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.ops import _fused
from pyml.ops import _head_update_arguments as arguments
from pyml.ops._registry import Capability, Op
from pyml.reference import head_update as reference


def head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, slices: Sequence[Tensor], *, heads: Sequence[int], size: int,
    dim: int, bias_slices: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """``F.linear(x, weight, bias)`` with gradients to x and to the slices, and none to the rest of the weight.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]`` without requires_grad; the forward reads it alone, in one product.
        bias: ``[out]`` without requires_grad, or None.
        slices: for each head h the view ``weight.narrow(dim, h * size, size)``, of the same memory: a step on it is a
            step of the weight. torch's fused optimizers would write beside columns, and are refused from here on.
        heads: numbers of the heads, different ones.
        size: rows or columns of a head.
        dim: 0 where heads are rows (queries, keys, values), 1 where they are columns (outputs).
        bias_slices: the views ``bias[h * size : (h + 1) * size]``, or none; for rows only.

    Returns:
        ``[..., out]``. For the backward, rows keep x, columns keep a copy of ``x[..., chosen]`` alone. Differentiable
        twice. Under autocast as `torch.nn.Linear`.

    Raises:
        ValueError, TypeError: one sentence, also where a slice no longer shares the memory of the weight (after a
            change of dtype, a deepcopy), since its training would change nothing.
    """
    arguments.check_linear("head_linear", x, weight, bias, slices, heads, size, dim, bias_slices)
    if not torch.compiler.is_compiling():
        _fused.guard()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _linear(x, weight, bias, tuple(heads), size, dim, [*slices, *bias_slices])


def adamw_slices_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *, step: int,
    lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    masters: list[Tensor] | None = None, key: Tensor | None = None, ids: list[int] | None = None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """One step of AdamW on a list of slices, in one pass over memory; the formula of `torch.optim.AdamW`.

    Only the elements of the slices are written, also where they are columns of a weight, which
    ``torch.optim.AdamW(fused=True)`` gets wrong.

    Args:
        params: slices of any shape, dtype and strides, that do not share elements.
        grads: of their shapes, in any dtype and strides.
        exp_avgs, exp_avg_sqs: first and second moments of their shapes, best float32 without gaps (float64 for float64
            parameters). Arithmetic is in float32, or float64 where any tensor of the slice is.
        step: number of this step, from 1 on, below 2^32.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        masters: float32 copies of 16-bit parameters: the step moves these, and the parameters become their rounding.
            Where a master does not round to its parameter, something else has written to that, and the step starts from
            the parameter.
        key: int64 tensor of one element on the device of the parameters: without masters, 16-bit parameters are then
            rounded stochastically. The bits are a function of key, step, id and element, on every backend.
        ids: numbers of the slices in [0, 2^32) for that, by default 0, 1, 2, ...

    Raises:
        ValueError, TypeError: one sentence; nothing has been written then.
    """
    masters = [] if masters is None else masters
    numbers = (step, lr, betas, eps, weight_decay)
    if isinstance(params, (list, tuple)) and not params:
        _check_adamw(params, grads, exp_avgs, exp_avg_sqs, *numbers, masters, key, ids)
        return
    ADAMW_SLICES_(params, grads, exp_avgs, exp_avg_sqs, *numbers, masters, key, ids, backend=backend)


def head_edit(
    x: Tensor, heads: Sequence[int], values: Tensor | None = None, matrix: Tensor | None = None, *,
    strength: float = 1.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Head ``heads[i]`` becomes ``(1 - strength) x + strength (matrix[i] @ x + values[i])``; the others stay as they
    are, bit for bit. Differentiable in x, values and matrix.

    Without matrix the head is replaced by the values (an ablation by means, a patch), without both by zeros.

    Args:
        x: ``[..., H, D]``: what an output projection takes, seen by head.
        heads: k different numbers in [0, H).
        values: broadcasts to ``[..., k, D]``.
        matrix: ``[k, D, D]``.
        strength: 1 for the whole edit, 0 for none.

    Returns:
        Shape and dtype of x, memory of its own.
    """
    return HEAD_EDIT(x, heads, arguments.same_rank(x, heads, values), matrix, strength, backend=backend)


def head_edit_(
    x: Tensor, heads: Sequence[int], values: Tensor | None = None, matrix: Tensor | None = None, *,
    strength: float = 1.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`head_edit` written into x, which is returned; only the chosen heads are touched. Without gradients: attention
    keeps this very tensor for its backward, so an x that requires one is refused."""
    HEAD_EDIT_(x, heads, arguments.same_rank(x, heads, values), matrix, strength, backend=backend)
    return x


# --- the linear layer -------------------------------------------------------------------------------------------------


def _linear(x, weight, bias, heads, size, dim, parts) -> Tensor:
    """`parts`: the slices of the weight, then those of the bias."""
    keeps = torch.is_grad_enabled() and any(p.requires_grad for p in parts)
    picked = torch.cat([x.narrow(-1, h * size, size) for h in heads], -1) if keeps and dim == 1 else None
    return _HeadLinear.apply(x, picked, weight, bias, heads, size, dim, keeps, *parts)


class _HeadLinear(torch.autograd.Function):
    """``picked`` is what the gradients of columns need of x. It is an argument, so that derivatives of these gradients
    find their way to x. ``keeps``: some slice wants a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, picked, weight, bias, heads, size, dim, keeps, *parts):
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, picked, weight, _, ctx.heads, ctx.size, ctx.dim, keeps, *parts = inputs
        ctx.save_for_backward(x if keeps and ctx.dim == 0 else picked, weight, *parts)

    @staticmethod
    def backward(ctx, dy):
        picked, weight, *parts = ctx.saved_tensors
        heads, size, dim = ctx.heads, ctx.size, ctx.dim
        dx = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # dy W is the layer of the transposed weight: so its own derivatives reach the slices, as they must.
                turned = [p.t() for p in parts[: len(heads)]]
                dx = _linear(dy, weight.t().to(dy.dtype), None, heads, size, 1 - dim, turned)
            else:
                dx = dy.matmul(weight.to(dy.dtype))
        return dx, None, None, None, None, None, None, None, *_of_parts(ctx, dy, picked, parts)


def _of_parts(ctx: Any, dy: Tensor, picked: Tensor | None, parts: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the slices: ``dy[..., chosen]^T x`` or ``dy^T x[..., chosen]``."""
    wanted = ctx.needs_input_grad[-len(parts) :] if parts else ()
    if picked is None or not any(wanted):
        return [None] * len(parts)
    heads, size = ctx.heads, ctx.size
    rows, x = dy.reshape(-1, dy.shape[-1]), picked.reshape(-1, picked.shape[-1])
    found: list[Tensor | None] = []
    for n, want in enumerate(wanted):
        i = n % len(heads)
        own = rows.narrow(1, heads[i] * size, size) if ctx.dim == 0 else rows
        if not want:
            found.append(None)
        elif n >= len(heads):
            found.append(own.sum(0))
        else:
            found.append(own.t().mm(x if ctx.dim == 0 else x.narrow(1, i * size, size)))
    return [None if g is None else g.to(p.dtype) for g, p in zip(found, parts)]


# --- registration -----------------------------------------------------------------------------------------------------


def _check_adamw(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
) -> None:  # fmt: skip
    arguments.check_adamw(
        "adamw_slices_", params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
    )


def _outline_adamw(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
) -> None:  # fmt: skip
    arguments.check_adamw_outline(
        "adamw_slices_", params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
    )


def _reference_adamw(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
) -> None:  # fmt: skip
    """The formula, which goes slice by slice; kernels do not, and what they refuse is refused here too."""
    if not torch.compiler.is_compiling() and not params[0].is_meta:
        written = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
        arguments.check_apart("adamw_slices_", grads, **written)
    reference.adamw_slices_(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids)


def _check_edit(x, heads, values, matrix, strength) -> None:
    arguments.check_edit("head_edit", x, heads, values, matrix, strength)


def _check_edit_(x, heads, values, matrix, strength) -> None:
    arguments.check_edit_in_place("head_edit_", x, heads, values, matrix, strength)


def _edit_fake(x, heads, values, matrix, strength):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _edit_composed(x, heads, values, matrix, strength, backend):
    return reference.head_edit(x, heads, values, matrix, strength)  # linear in each argument: plain torch does


def _nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""


_WRITES = Capability(gradient=False, double_backward=False, vmap=False, export=False, autocast=False)

ADAMW_SLICES_ = Op(
    "adamw_slices_", "head_update", _reference_adamw, _check_adamw, _nothing, (),
    mutates=("params", "exp_avgs", "exp_avg_sqs", "masters"), outline=_outline_adamw, capability=_WRITES,
)  # fmt: skip
HEAD_EDIT = Op(
    "head_edit", "head_update", reference.head_edit, _check_edit, _edit_fake, ("x", "values", "matrix"),
    composed=_edit_composed, batched=("x", "values"),
)  # fmt: skip
HEAD_EDIT_ = Op(
    "head_edit_", "head_update", reference.head_edit_, _check_edit_, _nothing, (), mutates=("x",), capability=_WRITES,
    writes_leaves=False,
)  # fmt: skip
