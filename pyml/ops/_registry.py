"""One way to register an op, so that no backend can miss fake, autograd, autocast or vmap.

The C++ side (csrc/library.cpp) holds the schemas, by this convention::

    <op>_fwd(<tensors and options>) -> Tensor                       or (Tensor out, ..., Tensor saved, ...)
    <op>_bwd(Tensor grad, ..., <the same arguments>, <saved ...>, bool[] mask) -> one tensor per name in `gradients`

where ``mask`` says which of the gradients are wanted (the others come back empty). Triton has the same two ops with the
suffix ``_triton``; their launchers are the functions of the same names in triton_kernels/<family>.py.
"""

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyml.backend import checks, load_extension, pick, triton_reason
from pyml.ops import _check
from pyml.ops._autograd import first_order, saver, second_order
from pyml.ops._functorch import transformable
from pyml.ops._vmap import Rule, over_batch, over_rows

OPS: dict[str, "Op"] = {}
_checked = threading.local()  # op: whose arguments this thread has just checked


@dataclass(frozen=True)
class Capability:
    """What an op promises; the generic tests check exactly this and `pyml info --ops` prints it."""

    gradient: bool = True
    double_backward: bool = True
    vmap: bool = True
    export: bool = True
    fullgraph: bool = True
    autocast: bool = True
    wide: bool = False  # outputs are float32 or float64, also for 16-bit arguments; else of the arguments' dtype
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
    outline: Callable[..., None] | None = None  # what of `check` the C++ op, without outputs, leaves to it
    composed: Callable[..., Any] | None = None  # the op through first-order ops; derived twice, the double backward
    finish: Callable[..., Any] | None = (
        None  # (outputs, the fwd arguments) -> what the caller gets; reads a status word
    )
    outputs: int = 1  # how many outputs, the first ones, are differentiable
    saved: tuple[int, ...] | None = None  # positions of the outputs that the backward takes; None: those beyond
    batched: tuple[str, ...] = ()  # arguments that share a free batch dim 0 (or have 1 there); () means the first alone
    mutates: tuple[str, ...] = ()  # arguments that are written to: tensors, or lists of them; no gradient goes through
    keys: tuple[str, ...] = ()  # arguments that choose the random numbers (key, step); torch's generator does not
    capability: Capability = field(default_factory=Capability)
    cuda_preference: tuple[str, ...] = ("triton", "cuda")
    has_cpp: bool = True
    has_cuda: bool = True
    has_triton: bool = True
    writes_leaves: bool = True  # under no_grad what it mutates may require a gradient, as parameters do
    free_leading_dims: bool = True  # the batched arguments take any leading dims; else vmap folds them into the batch

    def __post_init__(self) -> None:
        OPS[self.name] = self
        if self.mutates:
            self.check = self._check_writes(self.check)
        self.run: dict[str, Callable[..., Any]] = {"reference": self.reference}
        if self.has_cpp and load_extension() is None:
            fwd = getattr(torch.ops.pyml, f"{self.name}_fwd").default
            self.arguments = [a.name for a in fwd._schema.arguments]
            if self.saved is None:
                self.saved = tuple(range(self.outputs, len(fwd._schema.returns)))
            self.run["cpp"] = self.run["cuda"] = self._register("")
            if self.has_triton and triton_reason() is None:
                self._define_triton()
                self.run["triton"] = self._register("_triton")

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        eager = not torch.compiler.is_compiling()
        if self.outline is not None and eager and self._run_outlined(args, backend):
            return None
        self.check(*args)
        run = self.run[pick(self, first_tensor(args).device.type, backend)]
        found = self._run_checked(run, args) if self.mutates and eager else run(*args)
        return found if self.finish is None else self.finish(found, *args)

    def _run_outlined(self, args: tuple[Any, ...], backend: str | None) -> bool:
        """Whether a kernel that checks its lists itself has run, in a fraction of the time that `check` takes. Where it
        refuses, `check` says why in its own words."""
        assert self.outline is not None
        self.outline(*args)
        try:
            run = self.run[pick(self, first_tensor(args).device.type, backend)]
            own = run is self.run.get("cpp")  # or "cuda": they are one
            if own:
                run(*args)
            return own
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = error
        self.check(*args)
        raise refusal

    def _run_checked(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """`_count_writes` need not check again: lists are long, and a check costs microseconds a tensor."""
        _checked.op = self
        try:
            return run(*args)
        finally:
            _checked.op = None

    def _check_writes(self, check: Callable[..., None]) -> Callable[..., None]:
        at = [(name, list(inspect.signature(check).parameters).index(name)) for name in self.mutates]

        def both(*args: Any) -> None:
            check(*args)
            _check.writable(self.name, {name: args[i] for name, i in at})

        return both

    def _define_triton(self) -> None:
        library = _library()
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
            if getattr(_checked, "op", None) is not self:
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
        torch.library.register_vmap(fwd_name, self._fwd_vmap(fwd))
        if self.outline is not None and not suffix:
            torch.ops.pyml.register_writes(fwd_name, [self.arguments.index(name) for name in self.mutates])
        elif self.mutates:
            self._count_writes(fwd_name, fwd)
        if not self.gradients:
            return fwd
        bwd = getattr(torch.ops.pyml, f"{self.name}_bwd{suffix}").default
        at = [self.arguments.index(name) for name in self.gradients]
        torch.library.register_fake(bwd_name, self._bwd_fake)
        torch.library.register_vmap(bwd_name, self._bwd_vmap(bwd))
        second = second_order(self, at, "triton" if suffix else None)
        lists = "Tensor[]" in str(fwd._schema)
        # All outputs of a backward are differentiable.
        save, save_bwd = saver(self.outputs, self.saved or (), lists), saver(0, (), lists)
        backward = first_order(transformable(bwd, save_bwd, second, self._bwd_vmap), at, self.outputs)
        torch.ops.pyml.register_autograd(fwd_name, bwd_name, at, self.outputs, list(self.saved or ()))
        torch.library.register_autograd(bwd_name, second, setup_context=save_bwd)
        return transformable(fwd, save, backward, self._fwd_vmap)

    def _fwd_vmap(self, call: Callable[..., Any]) -> Rule:
        """The batched arguments share one call; where an op writes to its arguments, or numbers elements to draw noise
        for them, every row has its own."""
        if self.mutates or self.keys:
            return over_rows(call)
        return over_batch(call, self._batched_at(), self.free_leading_dims)

    def _bwd_vmap(self, call: Callable[..., Any]) -> Rule:
        """As the forward, unless a gradient is wanted that is a sum over the batch: every row has its own."""
        if self.keys:
            return over_rows(call)
        n, count = self.outputs, len(self.arguments)
        inner = self._batched_at()
        names = [self.arguments[i] for i in inner]

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            kept = range(n + count, len(args) - 1)  # what the forward saved
            return over_batch(
                call,
                [*range(n), *(n + i for i in inner), *kept],
                self.free_leading_dims,
                lambda *args: all(name in names or not wanted for name, wanted in zip(self.gradients, args[-1])),
            )(info, in_dims, *args)

        return rule

    def _batched_at(self) -> list[int]:
        return [self.arguments.index(name) for name in self.batched] or [0]

    def _count_writes(self, name: str, op: Any) -> None:
        """Autograd sees a write only by the version of a tensor; without it, a stale value would enter a backward.

        A call of the torch op comes by here too, so its check is here.
        """
        at = [self.arguments.index(n) for n in self.mutates]
        below = torch._C._after_ADInplaceOrView_keyset

        def write(keys: Any, *args: Any) -> Any:
            if getattr(_checked, "op", None) is not self:
                self.check(*args)
            for i in at:
                if args[i] is not None:
                    torch.autograd.graph.increment_version(args[i])
            return op.redispatch(keys & below, *args)

        _library().impl(name, write, "ADInplaceOrView", with_keyset=True)

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


@functools.cache
def _library() -> torch.library.Library:
    """Kept alive by the cache: a library takes what it registered along when it dies."""
    return torch.library.Library("pyml", "FRAGMENT")


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
    while torch._C._functorch.is_functorch_wrapped_tensor(status):  # one word serves all rows of a vmap
        status = torch._C._functorch.get_unwrapped(status)
    if status.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if status.any():
        raise ValueError(f"{op}: {sentence}")
