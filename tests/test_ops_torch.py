"""Generic tests of the torch contract: every op under opcheck, compile, export, vmap, functional transforms, autocast.

As in test_ops.py, each op is held to exactly what its capability row claims.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from pyml.ops import Op
from pyml.testing.compare import public, run
from tests.cases import arguments, each, schema_arguments, tensors_of
from tests.conftest import INTERPRETED
from tests.op_helpers import batch_of, first, leaves, of_rows, skip_unless, torch_op, total

HALF = (torch.bfloat16, torch.float16)
DISPATCH = ("test_autograd_registration", "test_aot_dispatch_dynamic")  # of opcheck


@pytest.mark.kernels
@pytest.mark.samples("tiny")
def test_opcheck(op, backend, sample, device):
    values = arguments(op, sample, torch.float32, device, grad=op.capability.gradient)
    fwd = torch_op(op, backend, "fwd")
    # Dispatch is the same code for all backends, and passes by a kernel: in the interpreter one sample shows it.
    every = not INTERPRETED or sample is first(op, "tiny")
    utils = ("test_schema", "test_faketensor", *(DISPATCH if every else ()))
    torch.library.opcheck(fwd, schema_arguments(op, values), test_utils=utils)
    if op.gradients:
        detached = [each(v, Tensor.detach) for v in schema_arguments(op, values)]
        outputs = fwd(*detached)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(y) for y in outputs[: op.outputs]]
        kept = [outputs[i] for i in op.saved]
        mask = [values[n] is not None for n in op.gradients]
        torch.library.opcheck(torch_op(op, backend, "bwd"), (*upstream, *detached, *kept, mask), test_utils=utils)


def test_compiles_without_graph_break_or_recompile(op, backend, device):
    skip_unless(op.capability.fullgraph, "a full graph")
    skip_unless(not op.mutates, "an output of its own")  # see test_ops_inplace.py
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    names = batch_of(op, values)
    # The reference is ordinary torch code: tracing it is the question, the minutes in inductor are not. And inductor
    # makes the same of a kernel that is interpreted as of one in C++.
    counter = CompileCounterWithBackend("aot_eager" if backend == "reference" or INTERPRETED else "inductor")

    def loss(*batch: Tensor) -> Tensor:
        return total(public(op)(**{**values, **dict(zip(names, batch))}, backend=backend))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    taken = {size for value in values.values() for t in tensors_of(value) for size in t.shape}
    sizes = [n for n in range(4 if INTERPRETED else 11, 99) if n not in taken][: 2 if INTERPRETED else 3]
    for rows in sizes:  # that no other dimension has
        batch = [of_rows(values[n], rows) for n in names]
        for t in batch:
            torch._dynamo.mark_dynamic(t, 0)
        found, truth = compiled(*batch), loss(*batch)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        if op.capability.gradient:
            inputs = [dict(zip(names, batch)).get(n, values[n]) for n in leaves(op, values)]
            got, expected = torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1, f"{op.name}: compiled {counter.frame_count} times for batches of {sizes}"


class Module(torch.nn.Module):
    def __init__(self, op: Op, values: dict[str, Any], backend: str):
        super().__init__()
        self.call, self.backend = public(op), backend
        self.options = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
        self.names = [n for n, v in values.items() if isinstance(v, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(**dict(zip(self.names, tensors)), **self.options, backend=self.backend)


def test_exports(op, backend, device):
    skip_unless(op.capability.export, "export")
    values = arguments(op, first(op, "tiny"), torch.float32, device, grad=False)
    module, names = Module(op, values, backend), batch_of(op, values)
    batch = torch.export.Dim("batch", min=2)

    def tensors(rows: int) -> tuple[Tensor, ...]:
        return tuple(of_rows(values[n], rows) if n in names else values[n] for n in module.names)

    dynamic = tuple({0: batch} if n in names else None for n in module.names)
    program = torch.export.export(module, tensors(4), dynamic_shapes=(dynamic,))
    torch.testing.assert_close(program.module()(*tensors(9)), module(*tensors(9)))


def test_vmap(op, backend, device):
    skip_unless(op.capability.vmap, "vmap")
    values = arguments(op, first(op, "tiny"), torch.float64, device, grad=False)
    names = leaves(op, values)
    names += [n for n in batch_of(op, values) if n not in names]

    def call(*tensors: Tensor) -> Any:
        return public(op)(**{**values, **dict(zip(names, tensors))}, backend=backend)

    def stacked(t: Tensor) -> Tensor:
        return torch.stack([t, t * 0.5, t * 0.25] if t.is_floating_point() else [t, t.flip(-1), t], min(t.dim(), 1))

    stacks = [stacked(values[n]) for n in names]
    choices = (names[:1], batch_of(op, values), leaves(op, values), names)
    for chosen in filter(None, dict.fromkeys(map(tuple, choices))):
        at = [min(s.dim() - 1, 1) for s in stacks]
        dims = tuple(d if n in chosen else None for n, d in zip(names, at))
        inputs = [s if n in chosen else s.select(d, 0) for s, n, d in zip(stacks, names, at)]
        rows = [call(*(t if d is None else t.select(d, n) for t, d in zip(inputs, dims))) for n in range(3)]
        truth = torch.stack(rows) if isinstance(rows[0], Tensor) else tuple(torch.stack(c) for c in zip(*rows))
        torch.testing.assert_close(torch.vmap(call, in_dims=dims)(*inputs), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's unfold, in the reference of a convolution
def test_per_sample_gradients(op, backend, device):
    """vmap of grad, as differentially private training uses it."""
    skip_unless(op.capability.vmap and op.capability.gradient, "vmap and a gradient")
    values = arguments(op, first(op, "tiny", "smooth"), torch.float64, device, grad=False)
    names = leaves(op, values)

    def loss(start: Tensor, weights: list[Tensor]) -> Tensor:
        return total(public(op)(**{**values, **dict(zip(names, [start, *weights]))}, backend=backend))

    start, weights = values[names[0]], [values[n] for n in names[1:]]
    batch = torch.stack([start, start * 0.9, start * 0.8][: 2 if INTERPRETED else 3])
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(batch, weights)
    for n in range(len(batch)):
        expected = torch.func.grad(loss, argnums=(0, 1))(batch[n], weights)
        torch.testing.assert_close(got[0][n], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close([g[n] for g in got[1]], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.kernels
@pytest.mark.samples("tiny", "smooth")
def test_each_output_alone_has_its_gradient(op, backend, sample, device):
    """The backward then gets no gradient for the others, and takes zeros of stride 0 for them."""
    skip_unless(op.capability.gradient and op.outputs > 1, "several outputs with a gradient")
    values = arguments(op, sample, torch.float64, device)
    inputs = [values[n] for n in leaves(op, values)]

    def gradients(which: str, output: int) -> tuple[Tensor, ...]:
        y = public(op)(**values, backend=which)[output]
        if not y.requires_grad:
            return tuple(torch.zeros_like(t) for t in inputs)
        return torch.autograd.grad(y.sin().sum(), inputs, materialize_grads=True)

    for output in range(op.outputs):
        got, expected = gradients(backend, output), gradients("reference", output)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_second_derivatives_by_functional_transforms(op, backend, device):
    """jacrev of jacrev, as physics-informed losses use it."""
    claims = op.capability
    skip_unless(claims.vmap and claims.double_backward, "vmap and a double backward")
    values = arguments(op, first(op, "tiny", "smooth"), torch.float64, device, grad=False)
    name = leaves(op, values)[0]

    def loss(start: Tensor, which: str) -> Tensor:
        return total(public(op)(**{**values, name: start}, backend=which))

    def second(which: str) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(loss))(values[name], which)

    torch.testing.assert_close(second(backend), second("reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says once that duals are new
def test_a_tangent_is_refused_and_not_lost(op, backend, device):
    """Forward mode has no formula here; without a word the derivative would be zero."""
    skip_unless(op.capability.gradient, "a gradient")
    values = arguments(op, first(op, "tiny"), torch.float64, device, grad=False)
    for name in leaves(op, values):

        def call(t: Tensor, name: str = name) -> Any:
            return public(op)(**values | {name: t}, backend=backend)

        t = values[name]
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives: expected"):
            call(forward_ad.make_dual(t, torch.ones_like(t)))
        with pytest.raises(NotImplementedError, match="forward-mode derivatives: expected"):
            torch.func.jvp(call, (t,), (torch.ones_like(t),))


@pytest.mark.parametrize("low", HALF, ids=str)
def test_autocast_keeps_the_dtype(op, backend, low, device):
    skip_unless(op.capability.autocast, "autocast")
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    plain = run(op, values, backend)
    with torch.autocast(device, dtype=low):
        under = run(op, values, backend)
        from_layers = [n for n in batch_of(op, values) if values[n].is_floating_point()]
        lowered = values | {n: values[n].detach().to(low) for n in from_layers}  # as linear layers hand them on
        result = public(op)(**lowered, backend=backend)
        head = tensors_of(result[0] if isinstance(result, tuple) else result)[0]
        expected = torch.float32 if op.capability.wide else low
        assert head.dtype == expected or not head.is_floating_point()  # indices have no precision to lose
    for name, t in plain.items():
        assert under[name].dtype == t.dtype, f"{name} is {under[name].dtype} under autocast, expected {t.dtype}"
        if backend != "reference":  # whose own matrix products autocast lowers
            assert torch.equal(under[name], t), f"{name} changes under autocast"
