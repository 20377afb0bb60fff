"""One way to register an op, so that no backend can miss fake, autograd, autocast or vmap.

The C++ side (csrc/library.cpp) holds the schemas, by this convention::

    <op>_fwd(<tensors and options>) -> Tensor                       or (Tensor out, Tensor saved, ...)
    <op>_bwd(Tensor grad, <the same arguments>, <saved ...>, bool[] mask) -> one tensor per name in `gradients`

where ``mask`` says which of the gradients are wanted (the others come back empty). Triton has the same two ops with the
suffix ``_triton``; their launchers are the functions of the same names in triton_kernels/<family>.py.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyml.backend import load_extension, pick, triton_reason
from pyml.ops._functorch import transformable

OPS: dict[str, "Op"] = {}
_TRITON_LIBRARY: list[torch.library.Library] = []  # kept alive: a library takes its ops along when it dies


@dataclass(frozen=True)
class Capability:
    """What an op promises; the generic tests check exactly this and `pyml info --ops` prints it."""

    gradient: bool = True
    double_backward: bool = True
    vmap: bool = True
    export: bool = True
    fullgraph: bool = True
    autocast: bool = True
    bits: str = "any thread count"  # or "run to run"


@dataclass(eq=False)
class Op:
    """A registered op: call it with its schema's arguments and ``backend=``."""

    name: str
    family: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]  # (the fwd arguments) -> outputs, as the kernels allocate them
    gradients: tuple[str, ...]  # names of the differentiable arguments, in schema order
    composed: Callable[..., Tensor] | None = None  # the op through first-order ops; derived twice, the double backward
    capability: Capability = field(default_factory=Capability)
    cuda_preference: tuple[str, ...] = ("triton", "cuda")
    has_cuda: bool = True
    has_triton: bool = True
    free_leading_dims: bool = True  # the first argument takes any leading dims, so vmap over it alone is one call

    def __post_init__(self) -> None:
        OPS[self.name] = self
        self.run: dict[str, Callable[..., Any]] = {"reference": self.reference}
        if load_extension() is None:
            fwd = getattr(torch.ops.pyml, f"{self.name}_fwd").default
            self.arguments = [a.name for a in fwd._schema.arguments]
            self.run["cpp"] = self.run["cuda"] = self._register("")
            if self.has_triton and triton_reason() is None:
                self._define_triton()
                self.run["triton"] = self._register("_triton")

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        return self.run[pick(self, args[0].device.type, backend)](*args)

    def _define_triton(self) -> None:
        if not _TRITON_LIBRARY:
            _TRITON_LIBRARY.append(torch.library.Library("pyml", "FRAGMENT"))
        library = _TRITON_LIBRARY[0]
        for direction in ("fwd", "bwd"):
            if direction == "bwd" and not self.gradients:
                continue
            name = f"{self.name}_{direction}"
            schema = str(getattr(torch.ops.pyml, name).default._schema).removeprefix("pyml::")
            library.define(schema.replace(name, name + "_triton", 1))
            library.impl(name + "_triton", self._launcher(name), "CompositeExplicitAutograd")

    def _launcher(self, name: str) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:  # imported at the first call: Triton is slow to import and may be absent
            return getattr(importlib.import_module(f"pyml.triton_kernels.{self.family}"), name)(*args)

        return launch

    def _register(self, suffix: str) -> Callable[..., Any]:
        """Attach fake, autograd and vmap to one forward/backward pair. Autocast needs nothing: ops keep x's dtype."""
        fwd_name, bwd_name = f"pyml::{self.name}_fwd{suffix}", f"pyml::{self.name}_bwd{suffix}"
        fwd = getattr(torch.ops.pyml, f"{self.name}_fwd{suffix}").default
        torch.library.register_fake(fwd_name, self.fake)
        torch.library.register_vmap(fwd_name, _vmap(fwd, self.free_leading_dims))
        if not self.gradients:
            return fwd
        bwd = getattr(torch.ops.pyml, f"{self.name}_bwd{suffix}").default
        at = [self.arguments.index(name) for name in self.gradients]
        torch.library.register_fake(bwd_name, _bwd_fake(at))
        torch.library.register_vmap(bwd_name, _vmap(bwd, False))
        second = _double_backward(self, at)
        backward = _backward(transformable(bwd, _save_inputs, second, lambda call: _vmap(call, False)), at)
        torch.library.register_autograd(fwd_name, backward, setup_context=_save_all)
        torch.library.register_autograd(bwd_name, second, setup_context=_save_inputs)
        return transformable(fwd, _save_all, backward, lambda call: _vmap(call, self.free_leading_dims))


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save tensors (also the extra outputs of a forward) for the backward, and the plain values beside them."""
    extra = list(output[1:]) if isinstance(output, tuple) and not isinstance(output, list) else []
    ctx.tensors_at = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
    ctx.save_for_backward(*[inputs[i] for i in ctx.tensors_at], *extra)
    ctx.values = [None if isinstance(a, Tensor) else a for a in inputs]
    if extra:
        ctx.mark_non_differentiable(*extra)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For a backward: all of its outputs are gradients, and differentiable."""
    _save_all(ctx, inputs, ())


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    args, tensors = list(ctx.values), list(ctx.saved_tensors)
    for i in ctx.tensors_at:
        args[i] = tensors.pop(0)
    return args, tensors


def _backward(bwd: Callable[..., Any], at: list[int]) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        args, extra = _saved(ctx)
        wanted = [args[i] is not None and ctx.needs_input_grad[i] for i in at]
        grads = bwd(grad, *args, *extra, wanted)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        found = dict(zip(at, grads))
        return tuple(found[i] if i in at and wanted[at.index(i)] else None for i in range(len(args)))

    return backward


def _double_backward(op: Op, at: list[int]) -> Callable[..., Any]:
    """Differentiate the backward by differentiating the composed form twice; no kernel is written for it."""

    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if op.composed is None:
            raise RuntimeError(f"{op.name}: backward of backward is not available")
        composed = op.composed
        (grad, *args), _ = _saved(ctx)
        wanted = [i for i, want in zip(at, args.pop()) if want]

        def first(grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            inner = list(args)
            for i, leaf in zip(given, leaves):
                inner[i] = leaf

            def forward(*chosen: Tensor) -> Tensor:
                for i, leaf in zip(wanted, chosen):
                    inner[i] = leaf
                return composed(*inner)

            return torch.func.vjp(forward, *[inner[i] for i in wanted])[1](grad)

        given = [i for i in at if args[i] is not None]
        with torch.enable_grad():
            pull = torch.func.vjp(first, grad, *[args[i] for i in given])[1]
        found = pull(tuple(o for i, o in zip(at, outer) if i in wanted))
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for n, value in zip([0, *(i + 1 for i in given)], found):
            if ctx.needs_input_grad[n]:
                result[n] = value
        return tuple(result)

    return backward


def _bwd_fake(at: list[int]) -> Callable[..., Any]:
    def fake(grad: Tensor, *args: Any) -> Any:
        mask = args[-1]
        grads = []
        for i, wanted in zip(at, mask):
            like = args[i] if args[i] is not None else grad
            grads.append(torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else like.new_empty(0))
        return tuple(grads) if len(grads) > 1 else grads[0]

    return fake


def _vmap(op: Callable[..., Any], first_takes_batch: bool) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = [i for i, a in enumerate(args) if isinstance(a, Tensor) and in_dims[i] is not None]
        if first_takes_batch and batched == [0]:
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        rows = [
            op(*[a.select(in_dims[i], n) if i in batched else a for i, a in enumerate(args)])
            for n in range(info.batch_size)
        ]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(torch.stack(column) for column in zip(*rows)), (0,) * len(rows[0])

    return rule
