"""What the cases of every family share: inputs, calls for both modes, compiled contenders, pyml on each backend."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import BOTH, TRITON_3X, TRITON_FP32, Contender, Setup

Form = Callable[..., Tensor]


class Inputs:
    """Seeded tensors on the device and in the dtype of the setup."""

    def __init__(self, setup: Setup) -> None:
        self.device, self.dtype = setup.device, getattr(torch, setup.dtype)
        self.generator = torch.Generator().manual_seed(setup.seed)

    def uniform(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        values = torch.rand(*shape, generator=self.generator) * (high - low) + low
        return values.to(self.device, self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)


def both_modes(form: Form, inputs: Sequence[Any], wanted: Sequence[Tensor]) -> Callable[[str], Callable[[], Any]]:
    """Calls of ``form(*inputs)``: forward under no_grad, or forward and the gradients of ``wanted``."""

    def build(mode: str) -> Callable[[], Any]:
        for leaf in wanted:
            leaf.requires_grad_()
        if mode != BOTH:
            return torch.no_grad()(lambda: form(*inputs))
        grad: list[Tensor] = []

        def call() -> Any:
            y = form(*inputs)
            if not grad:  # not constant, not even nearly: basis functions sum to 1, and what is left would be rounding
                generator = torch.Generator().manual_seed(0)
                grad.append(torch.randn(y.shape, generator=generator).to(y.device, y.dtype))
            return y, *torch.autograd.grad(y, wanted, grad[0])

        return call

    return build


def eager(name: str, form: Form, inputs: Sequence[Any], wanted: Sequence[Tensor], **more: Any) -> Contender:
    return Contender(name, both_modes(form, inputs, wanted), **more)


def compiled(form: Form, inputs: Sequence[Any], wanted: Sequence[Tensor], setup: Setup) -> dict[str, Contender]:
    """``torch.compile`` of a form; on a GPU also with CUDA graphs."""
    found = {"compiled": eager("compiled", torch.compile(form, dynamic=False), inputs, wanted)}
    if setup.device == "cuda":
        graph = torch.compile(form, dynamic=False, mode="reduce-overhead")
        for weight in inputs[1:]:  # as a module's parameters are: the graph reads them where they lie, without a copy
            torch._dynamo.mark_static_address(weight, guard=False)

        def marked(*args: Any) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return graph(*args)

        found["compiled+graph"] = eager("compiled+graph", marked, inputs, wanted, graphed=True)
    return found


def ours(
    function: Form, op: Any, inputs: Sequence[Any], wanted: Sequence[Tensor], setup: Setup, **options: Any
) -> dict[str, Contender]:
    """``pyml`` as a user calls it, and on a GPU each of its backends by name."""
    from pyml.backend import unusable

    def on(backend: str | None) -> Form:
        return lambda *args: function(*args, backend=backend, **options)

    found = {"pyml": eager("pyml", on(None), inputs, wanted)}
    if setup.device == "cuda":
        for backend in ("cuda", "triton"):
            if unusable(op, backend, "cuda") is None:
                found[f"pyml {backend}"] = eager(f"pyml {backend}", on(backend), inputs, wanted)
        if "pyml triton" in found and setup.dtype == "float32":
            build = both_modes(on("triton"), inputs, wanted)
            found[TRITON_3X] = Contender(TRITON_3X, lambda mode: _with_triton_fp32(build(mode), "tf32x3"))
    return found


def _with_triton_fp32(call: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """The launchers read PYML_TRITON_FP32 at every call, forward and backward."""

    def wrapped(*args: Any) -> Any:
        before = os.environ.get(TRITON_FP32)
        os.environ[TRITON_FP32] = precision
        try:
            return call(*args)
        finally:
            if before is None:
                del os.environ[TRITON_FP32]
            else:
                os.environ[TRITON_FP32] = before

    return wrapped
