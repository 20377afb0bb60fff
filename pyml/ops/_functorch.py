"""Ops under `torch.func`: torch's own registration of an autograd formula works outside of these transforms only."""

from collections.abc import Callable
from typing import Any

import torch


def transformable(
    op: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any], batched: Callable[..., Any]
) -> Callable[..., Any]:
    """``op`` as it is, and inside `torch.func.grad`, `vmap` and their like an autograd function with the same formula.

    Args:
        op: the registered op.
        save: (ctx, inputs, output) -> None, as for `torch.library.register_autograd`.
        backward: (ctx, *grads) -> a gradient or None for each input.
        batched: makes the rule for `vmap` of a callable, see `_registry._vmap`.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return call(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{op}: forward-mode derivatives: expected reverse mode or backend='reference', got a dual"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            return rule(info, in_dims, *args)

    Function.backward = staticmethod(backward)  # type: ignore[method-assign, assignment]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*args)
        return Function.apply(*args)

    rule = batched(call)  # under nested transforms the next one applies to the calls of the rule
    return call
