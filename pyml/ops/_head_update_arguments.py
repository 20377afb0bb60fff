"""Argument checks of the head ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops import _hetero_noise_arguments as arguments
from pyml.ops._check import fail

# --- slices of a weight -----------------------------------------------------------------------------------------------


def check_linear(
    op: str, x: Any, weight: Any, bias: Any, slices: Any, heads: Any, size: Any, dim: Any, bias_slices: Any
) -> None:  # fmt: skip
    """What `head_linear` takes: the weight of a linear layer, and views of it."""
    _check.tensors(op, weight, ("bias",), "weight", x=x, bias=bias)
    _check.dtype_of_weights(op, "x", x, weight)
    if weight.dim() != 2:
        fail(op, "weight", "shape [out, in]", list(weight.shape))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        fail(op, "x", f"shape [..., in] = [..., {weight.shape[1]}]", list(x.shape))
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.shape[0],), "[out]")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.requires_grad:
            fail(op, name, "a tensor without requires_grad, since gradients go to the slices alone", "requires_grad")
    if dim not in (0, 1) or isinstance(dim, bool):
        fail(op, "dim", "0 for rows or 1 for columns", repr(dim))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or weight.shape[dim] % size:
        fail(op, "size", f"a divisor of {weight.shape[dim]}, which is dimension {dim} of the weight", repr(size))
    check_heads(op, heads, weight.shape[dim] // size)
    check_views(op, "slices", slices, weight, heads, size, dim)
    if not isinstance(bias_slices, (list, tuple)) or bias_slices:
        if bias is None or dim == 1:
            fail(op, "bias_slices", "none without a bias, or for columns", type(bias_slices).__name__)
        check_views(op, "bias_slices", bias_slices, bias, heads, size, 0)


def check_heads(op: str, heads: Any, count: int) -> None:
    """Different numbers of heads, of ``count``."""
    if not isinstance(heads, (list, tuple)):
        fail(op, "heads", "a tuple of integers", type(heads).__name__, TypeError)
    for head in heads:
        if not isinstance(head, int) or isinstance(head, bool):
            fail(op, "heads", "integers", repr(head), TypeError)
        if not 0 <= head < count:
            fail(op, "heads", f"heads in [0, {count})", head)
    if len(set(heads)) != len(heads):
        fail(op, "heads", "heads that differ", tuple(heads))


def check_views(op: str, name: str, slices: Any, whole: Tensor, heads: Sequence[int], size: int, dim: int) -> None:
    """The slices of these heads; where tensors have places in memory (not while a graph is traced), views of it."""
    if not isinstance(slices, (list, tuple)):
        fail(op, name, "a sequence of tensors", type(slices).__name__, TypeError)
    if len(slices) != len(heads):
        fail(op, name, f"{len(heads)} tensors, one a head", len(slices))
    shape = (*whole.shape[:dim], size, *whole.shape[dim + 1 :])
    for n, t in enumerate(slices):
        _check.tensors(op, whole, first_name="weight", **{f"{name}[{n}]": t})
        _check.shape(op, f"{name}[{n}]", t, shape, "of the weight's part")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    storage, start, step = whole.untyped_storage().data_ptr(), whole.storage_offset(), whole.stride(dim) * size
    for n, (t, head) in enumerate(zip(slices, heads)):
        same = t.dtype == whole.dtype and t.stride() == whole.stride() and t.storage_offset() == start + head * step
        if not same or t.untyped_storage().data_ptr() != storage:
            fail(op, f"{name}[{n}]", f"a view of the weight, narrow({dim}, {head * size}, {size})",
                 "memory of its own: a step would move it and not the weight")  # fmt: skip


# --- AdamW ------------------------------------------------------------------------------------------------------------


def check_adamw(
    op: str, params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, step: Any, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, masters: Any, key: Any, ids: Any,
) -> None:  # fmt: skip
    """Lists of as many tensors of equal shapes, and the numbers of a step."""
    check_adamw_outline(op, params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids)
    given = arguments.check_list(op, "params", params)
    first = given[0] if given else None
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, value in (lists | {"masters": masters} if masters else lists).items():
        for n, t in enumerate(arguments.check_list(op, name, value, first, len(given))):
            if t.shape != given[n].shape:
                _check.shape(op, f"{name}[{n}]", t, tuple(given[n].shape), "of its parameter")


def check_adamw_outline(
    op: str, params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, step: Any, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, masters: Any, key: Any, ids: Any,
) -> None:  # fmt: skip
    """All but what the tensors of the lists are like."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            fail(op, name, "a list of tensors", type(value).__name__, TypeError)
    arguments.whole(op, "step", step, arguments.WORD)
    if isinstance(step, int) and step < 1:
        fail(op, "step", "the number of this step, from 1 on", step)
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        arguments.number(op, name, number, "a finite number of at least 0", 0.0)
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        fail(op, "betas", "two numbers in [0, 1)", repr(betas))
    for beta in betas:
        arguments.number(op, "betas", beta, "two numbers in [0, 1)", 0.0)
        if beta >= 1:
            fail(op, "betas", "two numbers in [0, 1)", beta)
    if key is not None:
        if masters:
            fail(op, "key", "None beside masters, which keep what rounding cuts off", type(key).__name__)
        first = params[0] if params and isinstance(params[0], Tensor) else key
        arguments.check_key(op, key, step, first)
    if all(isinstance(p, Tensor) for p in params):
        arguments.check_places(op, params, ids, None)


def check_apart(op: str, read: Sequence[Tensor], **written: Sequence[Tensor]) -> None:
    """No element that is written belongs to another slice too: each slice marks its own."""
    marks: dict[tuple[int, int], Tensor] = {}
    for name, tensors in (*written.items(), ("grads", read)):
        for n, t in enumerate(tensors):
            if t.numel() == 0:
                continue
            key = (t.untyped_storage().data_ptr(), t.element_size())
            if key not in marks:
                marks[key] = torch.zeros(t.untyped_storage().nbytes() // key[1], dtype=torch.bool, device=t.device)
            own = marks[key].as_strided(t.shape, t.stride(), t.storage_offset())
            if bool(own.any()):
                expected = "slices whose elements are no others' too, since they are written to"
                fail(op, "params", expected, f"{name}[{n}] over another one")
            if tensors is not read:
                own.fill_(True)


# --- edits of heads ---------------------------------------------------------------------------------------------------


def check_edit(op: str, x: Any, heads: Any, values: Any, matrix: Any, strength: Any) -> None:
    """values: the dimensions of x, those before the heads may be 1."""
    _check.tensors(op, x, ("values", "matrix"), values=values, matrix=matrix)
    if x.dim() < 2:
        fail(op, "x", "shape [..., H, D]", list(x.shape))
    check_heads(op, heads, x.shape[-2])
    lead, own = x.shape[:-2], (len(heads), x.shape[-1])
    if values is not None:
        fits = values.dim() == x.dim() and values.shape[-2:] == own
        if not fits or any(n not in (1, m) for n, m in zip(values.shape, lead)):
            fail(op, "values", f"a shape that broadcasts to [..., k, D] = {[*lead, *own]}", list(values.shape))
    if matrix is not None:
        _check.shape(op, "matrix", matrix, (*own, x.shape[-1]), "[k, D, D]")
    arguments.number(op, "strength", strength, "a finite number")


def check_edit_in_place(op: str, x: Any, heads: Any, values: Any, matrix: Any, strength: Any) -> None:
    """The same, and no gradient that the write would spoil."""
    check_edit(op, x, heads, values, matrix, strength)
    if x.requires_grad:
        fail(op, "x", "a tensor without requires_grad, since attention keeps this very tensor for its backward "
             "(head_edit makes a new one)", "requires_grad")  # fmt: skip
    for name, t in (("values", values), ("matrix", matrix)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            fail(op, name, "a tensor without requires_grad, or a call under torch.no_grad(), since a write in place "
                 "passes no gradient on (head_edit does)", "requires_grad")  # fmt: skip


def same_rank(x: Any, heads: Any, values: Any) -> Any:
    """The values with as many dimensions as x, the last two full; unchanged where that cannot be."""
    if not (isinstance(x, Tensor) and isinstance(values, Tensor) and isinstance(heads, (list, tuple))):
        return values
    missing = x.dim() - values.dim()
    if x.dim() < 2 or missing < 0:
        return values
    values = values[(None,) * missing] if missing else values
    own = (len(heads), x.shape[-1])
    if values.shape[-2:] == own or any(n not in (1, m) for n, m in zip(values.shape[-2:], own)):
        return values
    return values.expand(*values.shape[:-2], *own)
