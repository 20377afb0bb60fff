"""One way to register an op, so that no backend can miss fake, autograd, autocast or vmap.

The C++ side (csrc/library.cpp) holds the schemas, by this convention::

    <op>_fwd(<tensors and options>) -> Tensor                       or (Tensor out, ..., Tensor saved, ...)
    <op>_bwd(Tensor grad, ..., <the same arguments>, <saved ...>, bool[] mask) -> one tensor per name in `gradients`

where ``mask`` says which of the gradients are wanted (the others come back empty). Triton has the same two ops with the
suffix ``_triton``; their launchers are the functions of the same names in triton_kernels/<family>.py.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyml.backend import checks, load_extension, pick, triton_reason
from pyml.ops import _check
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
    check: Callable[..., None]  # (the fwd arguments): raises one sentence; serves every backend, fake and direct call
    fake: Callable[..., Any]  # (the fwd arguments) -> outputs, as the kernels allocate them
    gradients: tuple[str, ...]  # names of the differentiable arguments, in schema order
    composed: Callable[..., Any] | None = None  # the op through first-order ops; derived twice, the double backward
    finish: Callable[..., Any] | None = (
        None  # (outputs, the fwd arguments) -> what the caller gets; reads a status word
    )
    outputs: int = 1  # how many outputs, the first ones, are differentiable; the others are saved for the backward
    batched: tuple[str, ...] = ()  # arguments that share a free batch dim 0; () means the first one alone
    mutates: tuple[str, ...] = ()  # arguments that are written to
    capability: Capability = field(default_factory=Capability)
    cuda_preference: tuple[str, ...] = ("triton", "cuda")
    has_cpp: bool = True
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
        self.check(*args)
        found = self.run[pick(self, first_tensor(args).device.type, backend)](*args)
        return found if self.finish is None else self.finish(found, *args)

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
        skip = self.outputs if name.endswith("_bwd") else 0

        def launch(*args: Any) -> Any:  # imported at the first call: Triton is slow to import and may be absent
            inputs = args[skip : skip + len(self.arguments)]
            self.check(*inputs)
            if skip:
                shapes = [a.to("meta") if isinstance(a, Tensor) else a for a in inputs]  # nothing is allocated
                self._check_upstream(args[:skip], inputs, self.fake(*shapes))
            return getattr(importlib.import_module(f"pyml.triton_kernels.{self.family}"), name)(*args)

        return launch

    def _register(self, suffix: str) -> Callable[..., Any]:
        """Attach fake, autograd and vmap to one forward/backward pair. Autocast needs nothing: ops keep x's dtype."""
        fwd_name, bwd_name = f"pyml::{self.name}_fwd{suffix}", f"pyml::{self.name}_bwd{suffix}"
        fwd = getattr(torch.ops.pyml, f"{self.name}_fwd{suffix}").default
        torch.library.register_fake(fwd_name, self._fwd_fake)
        torch.library.register_vmap(fwd_name, _vmap(fwd, self.free_leading_dims))
        if not self.gradients:
            return fwd
        bwd = getattr(torch.ops.pyml, f"{self.name}_bwd{suffix}").default
        at = [self.arguments.index(name) for name in self.gradients]
        torch.library.register_fake(bwd_name, self._bwd_fake)
        torch.library.register_vmap(bwd_name, _vmap(bwd, False))
        second = _double_backward(self, at, "triton" if suffix else None)
        lists = "Tensor[]" in str(fwd._schema)
        save, save_bwd = _saver(self.outputs, lists), _saver(0, lists)  # all outputs of a backward are differentiable
        backward = _backward(transformable(bwd, save_bwd, second, lambda call: _vmap(call, False)), at, self.outputs)
        torch.library.register_autograd(fwd_name, backward, setup_context=save)
        torch.library.register_autograd(bwd_name, second, setup_context=save_bwd)
        return transformable(fwd, save, backward, lambda call: _vmap(call, self.free_leading_dims))

    def _fwd_fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.fake(*args)

    def _check_upstream(self, upstream: Sequence[Tensor], inputs: Sequence[Any], outputs: Any) -> None:
        for grad, output in zip(upstream, (outputs,) if isinstance(outputs, Tensor) else outputs):
            _check.tensors(self.name, first_tensor(inputs), grad=grad)
            _check.shape(self.name, "grad", grad, tuple(output.shape), "of the output")

    def _bwd_fake(self, *args: Any) -> Any:
        n = self.outputs
        upstream, inputs, mask = args[:n], args[n : n + len(self.arguments)], args[-1]
        outputs = self._fwd_fake(*inputs)
        self._check_upstream(upstream, inputs, outputs)
        grads = []
        for name, wanted in zip(self.gradients, mask):
            given = inputs[self.arguments.index(name)]
            like = upstream[0] if given is None else given
            grads.append(torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else like.new_empty(0))
        return tuple(grads) if len(grads) > 1 else grads[0]


def first_tensor(args: Sequence[Any]) -> Tensor:
    """The first tensor among arguments, also inside a list: it says on which device an op runs."""
    for a in args:
        if isinstance(a, Tensor):
            return a
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0]
    raise TypeError("expected a tensor among the arguments, got none")


def read_status(op: str, status: Tensor, sentence: str) -> None:
    """Raise ``op: sentence`` when a CUDA kernel left a nonzero status word, at the price of waiting for the GPU.

    For `Op.finish`. Not under graph capture or compile, and not after ``pyml.set_checks(False)``: the kernel has
    treated what was bad as masked.
    """
    if torch.compiler.is_compiling() or not checks():
        return
    if status.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if status.any():
        raise ValueError(f"{op}: {sentence}")


def _saver(outputs: int, lists: bool) -> Callable[..., None]:
    """Keeps tensors (inputs, also in lists; outputs beyond the differentiable) and the plain values beside them."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        extra = list(output[outputs:]) if outputs and isinstance(output, tuple) else []
        # Flattening costs as much as a small kernel: only where the schema has lists of tensors.
        flat, ctx.structure = tree_flatten(list(inputs)) if lists else (inputs, None)
        ctx.tensors_at = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
        ctx.save_for_backward(*[flat[i] for i in ctx.tensors_at], *extra)
        ctx.values = [None if isinstance(a, Tensor) else a for a in flat]
        if extra:
            ctx.mark_non_differentiable(*extra)

    return save


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    flat, tensors = list(ctx.values), list(ctx.saved_tensors)
    for i in ctx.tensors_at:
        flat[i] = tensors.pop(0)
    return flat if ctx.structure is None else tree_unflatten(flat, ctx.structure), tensors


def _backward(bwd: Callable[..., Any], at: list[int], outputs: int) -> Callable[..., Any]:
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        args, extra = _saved(ctx)
        wanted = [args[i] is not None and ctx.needs_input_grad[i] for i in at]
        grads = bwd(*upstream[:outputs], *args, *extra, wanted)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        found = dict(zip(at, grads))
        return tuple(found[i] if i in at and wanted[at.index(i)] else _none(a) for i, a in enumerate(args))

    return backward


def _none(argument: Any) -> Any:
    """No gradient, in the structure that torch wants for lists of tensors."""
    tensors = isinstance(argument, (list, tuple)) and any(isinstance(a, Tensor) for a in argument)
    return [None] * len(argument) if tensors else None


def _double_backward(op: Op, at: list[int], backend: str | None) -> Callable[..., Any]:
    """Differentiate the backward by differentiating the composed form twice; no kernel is written for it."""

    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if op.composed is None:
            raise RuntimeError(f"{op.name}: backward of backward is not available")
        composed, n, count = op.composed, op.outputs, len(op.arguments)
        saved, _ = _saved(ctx)
        upstream, args, wanted_mask = saved[:n], saved[n : n + count], saved[-1]
        wanted = [i for i, want in zip(at, wanted_mask) if want]
        same = backend or ("cuda" if upstream[0].is_cuda else "cpp")  # first-order ops run where the backward ran

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            upstream, leaves = values[:n], values[n:]
            inner = list(args)
            for i, leaf in zip(given, leaves):
                inner[i] = leaf

            def forward(*chosen: Tensor) -> Tensor:
                for i, leaf in zip(wanted, chosen):
                    inner[i] = leaf
                return composed(*inner, backend=same)

            pull = torch.func.vjp(forward, *[inner[i] for i in wanted])[1]
            return pull(upstream[0] if n == 1 else tuple(upstream))

        given = [i for i in at if args[i] is not None]
        with torch.enable_grad():
            pull = torch.func.vjp(first, *upstream, *[args[i] for i in given])[1]
        found = pull(tuple(o for i, o in zip(at, outer) if i in wanted))
        result = [_none(a) for a in saved]
        for i, value in zip([*range(n), *(i + n for i in given)], found):
            if ctx.needs_input_grad[i]:
                result[i] = value
        return tuple(result)

    return backward


def _vmap(op: Callable[..., Any], first_takes_batch: bool) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = [i for i, a in enumerate(args) if isinstance(a, Tensor) and in_dims[i] is not None]
        if first_takes_batch and batched == [0]:
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0

        def row(n: int) -> Any:
            return op(*[a.movedim(in_dims[i], 0)[n] if i in batched else a for i, a in enumerate(args)])

        def empty(i: int, a: Any) -> Any:  # a batch of none: one made-up row tells the shapes
            return a.new_zeros(a.movedim(in_dims[i], 0).shape[1:]) if i in batched else a

        size = info.batch_size
        rows = [row(n) for n in range(size)] or [op(*[empty(i, a) for i, a in enumerate(args)])]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)[:size], 0
        return tuple(torch.stack(column)[:size] for column in zip(*rows)), (0,) * len(rows[0])

    return rule
