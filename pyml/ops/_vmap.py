"""`torch.vmap` over a registered op: one call where the new dimension can join the batch, else one call a row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def over_rows(op: Callable[..., Any]) -> Rule:
    """The rule that is always right: one call a row."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def row(a: Any, dim: Any, n: int) -> Any:
            if isinstance(a, (list, tuple)):
                return [row(*pair, n) for pair in zip(a, dim)] if isinstance(dim, (list, tuple)) else a
            if dim is None or not isinstance(a, Tensor):
                return a
            # A batch of none: one made-up row tells the shapes.
            return a.select(dim, n) if size else a.new_zeros(a.movedim(dim, 0).shape[1:])

        rows = [op(*[row(a, dim, n) for a, dim in zip(args, in_dims)]) for n in range(max(size, 1))]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)[:size], 0
        return tuple(torch.stack(column)[:size] for column in zip(*rows)), (0,) * len(rows[0])

    return rule


def over_batch(
    op: Callable[..., Any], batched: Sequence[int], leading: bool, whole: Callable[..., bool] = lambda *args: True
) -> Rule:
    """One call, where only arguments with a batch dimension are mapped.

    Args:
        op: the op, as the rule calls it.
        batched: positions of the arguments with a batch dimension 0; they share its size or have 1 there.
        leading: they take any leading dimensions; else the new dimension is folded into the batch.
        whole: (the arguments) -> whether every output has that batch dimension too. A status word (int32 ``[1]``) and
            the empty gradient that nobody wants have none: one serves all rows.
    """
    one_by_one = over_rows(op)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        mapped = {i for i, dim in enumerate(in_dims) if _mapped(dim)}
        if size == 0 or not mapped <= set(batched) or not whole(*args):
            return one_by_one(info, in_dims, *args)
        given = [i for i in batched if isinstance(args[i], Tensor) and (i in mapped or not _is_word(args[i]))]
        rows = {i: args[i].movedim(in_dims[i], 0) if i in mapped else args[i].unsqueeze(0) for i in given}
        count = 0 if leading else max(t.shape[1] for t in rows.values())
        call = list(args)
        for i, t in rows.items():
            if leading:
                call[i] = t.expand(size, *t.shape[1:])
            else:
                each = count if t.shape[1] == 1 else t.shape[1]
                call[i] = t.expand(size, each, *t.shape[2:]).flatten(0, 1)
        found = op(*call)
        joined = size if leading else size * count

        def apart(t: Tensor) -> tuple[Tensor, int | None]:
            if t.dim() == 0 or t.shape[0] != joined:  # a status word, or a gradient that was not wanted
                return t, None
            return (t if leading else t.unflatten(0, (size, count))), 0

        if isinstance(found, Tensor):
            return apart(found)
        tensors, dims = zip(*map(apart, found))
        return tensors, dims

    return rule


def _mapped(dim: Any) -> bool:
    """A list has a dimension, or none, for each of its items."""
    return any(map(_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _is_word(t: Tensor) -> bool:
    return t.dtype == torch.int32 and t.shape == (1,)
