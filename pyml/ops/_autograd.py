"""The autograd formula of every registered op: its backward op, and that op's own backward by composition."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from pyml.ops._registry import Op


def saver(outputs: int, kept: Sequence[int], lists: bool) -> Callable[..., None]:
    """Keeps tensors (inputs, also in lists; the outputs at ``kept``) and the plain values beside them.

    The first ``outputs`` outputs are differentiable (0: all of them). ``lists``: the schema has lists of tensors.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        several = output if isinstance(output, tuple) else (output,)
        # Flattening costs as much as a small kernel: only where the schema has lists of tensors.
        flat, ctx.structure = tree_flatten(list(inputs)) if lists else (inputs, None)
        ctx.tensors_at = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
        ctx.save_for_backward(*[flat[i] for i in ctx.tensors_at], *[several[i] for i in kept])
        ctx.values = [None if isinstance(a, Tensor) else a for a in flat]
        if 0 < outputs < len(several):
            ctx.mark_non_differentiable(*several[outputs:])

    return save


def saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    flat, tensors = list(ctx.values), list(ctx.saved_tensors)
    for i in ctx.tensors_at:
        flat[i] = tensors.pop(0)
    return flat if ctx.structure is None else tree_unflatten(flat, ctx.structure), tensors


def first_order(bwd: Callable[..., Any], at: list[int], outputs: int) -> Callable[..., Any]:
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        args, extra = saved(ctx)
        wanted = [args[i] is not None and ctx.needs_input_grad[i] for i in at]
        grads = bwd(*upstream[:outputs], *args, *extra, wanted)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        found = dict(zip(at, grads))
        return tuple(found[i] if i in at and wanted[at.index(i)] else none(a) for i, a in enumerate(args))

    return backward


def none(argument: Any) -> Any:
    """No gradient, in the structure that torch wants for lists of tensors."""
    tensors = isinstance(argument, (list, tuple)) and any(isinstance(a, Tensor) for a in argument)
    return [None] * len(argument) if tensors else None


def second_order(op: "Op", at: list[int], backend: str | None) -> Callable[..., Any]:
    """Differentiate the backward by differentiating the composed form twice; no kernel is written for it."""

    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if op.composed is None:
            raise RuntimeError(f"{op.name}: backward of backward is not available")
        composed, n, count = op.composed, op.outputs, len(op.arguments)
        values, _ = saved(ctx)
        upstream, args, wanted_mask = values[:n], values[n : n + count], values[-1]
        wanted = [i for i, want in zip(at, wanted_mask) if want]
        same = backend or ("cuda" if upstream[0].is_cuda else "cpp")  # first-order ops run where the backward ran

        def first(*inputs: Tensor) -> tuple[Tensor, ...]:
            upstream, leaves = inputs[:n], inputs[n:]
            inner = list(args)
            for i, leaf in zip(given, leaves):
                inner[i] = leaf

            def forward(*chosen: Tensor) -> Tensor:
                for i, leaf in zip(wanted, chosen):
                    inner[i] = leaf
                return composed(*inner, backend=same)

            pull = torch.func.vjp(forward, *[inner[i] for i in wanted])[1]
            return pull(upstream[0] if n == 1 else tuple(upstream))

        given = [i for i in at if args[i] is not None and args[i].is_floating_point()]  # a mask may be bool
        with torch.enable_grad():
            pull = torch.func.vjp(first, *upstream, *[args[i] for i in given])[1]
        found = pull(tuple(o for i, o in zip(at, outer) if i in wanted))
        result = [none(a) for a in values]
        for i, value in zip([*range(n), *(i + n for i in given)], found):
            if ctx.needs_input_grad[i]:
                result[i] = value
        return tuple(result)

    return backward
