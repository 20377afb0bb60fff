"""Generic tests: every op of `pyml.ops.OPS` on every backend, exactly what its capability row claims.

A new family adds its samples (pyml/testing/<family>.py) and is tested here without a line of its own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pyml.ops import OPS, Op
from pyml.testing import check
from pyml.testing.compare import assert_accurate, public, run
from tests.cases import Sample, arguments, in_double, samples, schema_arguments
from tests.conftest import INTERPRETED
from tests.mutations import assert_refused_well, mutations, verdict

HALF = (torch.bfloat16, torch.float16)


def leaves(op: Op, values: dict[str, Any]) -> list[str]:
    return [n for n in op.gradients if isinstance(values[n], Tensor)]


def first(op: Op, *flags: str) -> Sample:
    return next(s for s in samples(op) if all(getattr(s, flag) for flag in flags) and not s.empty)


def skip_unless(claimed: bool, what: str) -> None:
    if not claimed:
        pytest.skip(f"the op does not claim {what}")


def torch_op(op: Op, backend: str, direction: str) -> Any:
    return getattr(torch.ops.pyml, f"{op.name}_{direction}{'_triton' if backend == 'triton' else ''}").default


def test_every_op_has_samples():
    for op in OPS.values():
        found = samples(op)
        assert len({s.id for s in found}) == len(found), f"{op.name}: sample ids must be unique"
        for flag in ("tiny", "empty", *(("smooth",) if op.capability.gradient else ())):
            assert any(getattr(s, flag) for s in found), f"{op.name}: expected a sample with {flag}=True"
        assert public(op).__doc__, f"{op.name}: the public function has no docstring"
        assert op.capability.bits in ("any thread count", "run to run")


def test_every_torch_op_belongs_to_a_registered_op():
    """So that none escapes the tests below. Ops without a tensor, such as the benchmarks' ceilings, have no gradient,
    no layout and no dtype to test."""
    names = {n.removeprefix("pyml::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("pyml::")}
    schemas = {name: getattr(torch.ops.pyml, name).default._schema for name in names}
    on_tensors = {name for name, s in schemas.items() if any("Tensor" in str(a.type) for a in s.arguments)}
    known = {f"{op}_{way}{end}" for op in OPS for way in ("fwd", "bwd") for end in ("", "_triton")}
    assert on_tensors <= known, f"ops without an entry in pyml.ops.OPS: {sorted(on_tensors - known)}"


def test_agrees_with_the_reference(op, backend, sample, dtype, device):
    check(op, sample, backend, dtype, device)


# --- memory layouts --------------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.dim() > 1 else t


@pytest.mark.parametrize("layout", [strided, transposed, offset, expanded], ids=lambda f: f.__name__)
def test_memory_layout_changes_nothing(op, backend, layout, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    for name, t in values.items():
        if isinstance(t, Tensor):
            values[name] = layout(t.detach()).requires_grad_(t.requires_grad)
    before = {n: t.detach().clone() for n, t in values.items() if isinstance(t, Tensor)}

    def upstream(number: int, output: Tensor) -> Tensor:
        dense = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape).to(output)
        return layout(dense) if output.dim() else dense

    got = run(op, values, backend, upstream)
    truth = run(op, in_double(values), "reference", upstream)
    same = run(op, values, "reference", upstream)
    for name in truth:
        assert_accurate(f"{op.name} {layout.__name__}, {name}", got[name], truth[name], same[name])
    for name, t in before.items():
        assert torch.equal(values[name], t), f"{op.name}: wrote into its argument {name}"


# --- bad arguments ---------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_in_one_sentence(op, backend, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device, grad=False)
    refused = 0
    for label, wrong in mutations(values):
        expected, why = verdict(lambda wrong=wrong: public(op)(**wrong, backend="reference"))
        got, error = verdict(lambda wrong=wrong: public(op)(**wrong, backend=backend))
        if why is not None:
            refused += 1
            assert_refused_well(op.name, label, why)
            assert error is not None, f"{op.name} {label}: the reference refuses it, {backend} does not"
        if error is not None:
            assert_refused_well(op.name, label, error)
            assert why is not None, f"{op.name} {label}: {backend} refuses what the reference takes: {error}"
        elif expected is not None:
            assert got.shape == expected.shape and got.dtype == expected.dtype, f"{op.name} {label}: {got.shape}"
    assert refused > 10


@pytest.mark.kernels
def test_the_torch_op_refuses_what_its_function_refuses(op, backend, device):
    """torch.ops.pyml is reachable too: wrong shapes must raise there, never read out of bounds."""
    values = arguments(op, first(op, "tiny"), torch.float32, device, grad=False)
    fwd = torch_op(op, backend, "fwd")
    for label, wrong in mutations(values):
        _, why = verdict(lambda wrong=wrong: public(op)(**wrong, backend="reference"))
        _, error = verdict(lambda wrong=wrong: fwd(*schema_arguments(op, wrong)))
        if why is not None and isinstance(why, ValueError | TypeError):
            assert error is not None, f"{op.name} {label}: the function says {why}, the torch op says nothing"


@pytest.mark.kernels
def test_a_backward_with_a_wrong_gradient_is_refused(op, backend, device):
    skip_unless(op.capability.gradient, "a gradient")
    values = arguments(op, first(op, "tiny"), torch.float32, device, grad=False)
    fwd, bwd = torch_op(op, backend, "fwd"), torch_op(op, backend, "bwd")
    outputs = fwd(*schema_arguments(op, values))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = [outputs[i] for i in op.saved]
    mask = [values[n] is not None for n in op.gradients]
    for grad in (outputs[0].new_zeros(3, 2, 1), outputs[0].new_zeros(()), outputs[0][..., :-1]):
        _, error = verdict(lambda grad=grad: bwd(grad, *schema_arguments(op, values), *kept, mask))
        assert error is not None, f"{op.name}: took a gradient of shape {list(grad.shape)}"


# --- derivatives -----------------------------------------------------------------------------------------------------


def function_of_leaves(op: Op, values: dict[str, Any], backend: str) -> tuple[Any, list[Tensor]]:
    names = leaves(op, values)

    def call(*tensors: Tensor) -> Any:
        return public(op)(**{**values, **dict(zip(names, tensors))}, backend=backend)

    return call, [values[n] for n in names]


# Triton's interpreter takes milliseconds a call: there, finite differences go along one random direction only.
@pytest.mark.samples("tiny", "smooth")
def test_gradcheck(op, backend, sample, device):
    skip_unless(op.capability.gradient, "a gradient")
    call, inputs = function_of_leaves(op, arguments(op, sample, torch.float64, device), backend)
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-7, nondet_tol=0.0, fast_mode=INTERPRETED)


@pytest.mark.samples("tiny", "smooth")
def test_gradgradcheck(op, backend, sample, device):
    skip_unless(op.capability.double_backward, "a double backward")
    call, inputs = function_of_leaves(op, arguments(op, sample, torch.float64, device), backend)
    options = {"gen_non_contig_grad_outputs": True, "fast_mode": INTERPRETED}
    assert torch.autograd.gradgradcheck(call, inputs, eps=1e-6, atol=1e-6, **options)


@pytest.mark.kernels
@pytest.mark.samples("tiny", "smooth")
def test_double_backward_reaches_every_gradient(op, backend, sample, device):
    """gradgradcheck passes over a gradient that is cut off from the graph; the reference does not."""
    skip_unless(op.capability.double_backward, "a double backward")

    def second(name: str) -> list[Tensor]:
        values = arguments(op, sample, torch.float64, device)
        inputs = [values[n] for n in leaves(op, values)]
        output = public(op)(**values, backend=name)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=device).view(output.shape)
        upstream.requires_grad_()
        found = []
        for gradient in torch.autograd.grad(output, inputs, upstream, create_graph=True):
            weights = torch.linspace(1, 2, gradient.numel(), dtype=output.dtype, device=device).view(gradient.shape)
            found += torch.autograd.grad(
                (gradient * weights).sum(), [*inputs, upstream], retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
        return found

    torch.testing.assert_close(second(backend), second("reference"), rtol=1e-9, atol=1e-10)


def test_only_wanted_gradients(op, backend, device):
    """Each differentiable argument alone: the kernel's mask must not leave one out or ask for too many."""
    skip_unless(op.capability.gradient, "a gradient")
    values = arguments(op, first(op, "tiny"), torch.float64, device)
    together = run(op, values, backend)
    for name in leaves(op, values):
        alone = {n: v.detach().requires_grad_(n == name) if isinstance(v, Tensor) else v for n, v in values.items()}
        got = run(op, alone, backend)
        torch.testing.assert_close(got[f"gradient of {name}"], together[f"gradient of {name}"], rtol=1e-12, atol=1e-12)


# --- the torch contract ----------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.samples("tiny")
def test_opcheck(op, backend, sample, device):
    values = arguments(op, sample, torch.float32, device, grad=op.capability.gradient)
    fwd = torch_op(op, backend, "fwd")
    torch.library.opcheck(fwd, schema_arguments(op, values))
    if op.gradients:
        detached = [v.detach() if isinstance(v, Tensor) else v for v in schema_arguments(op, values)]
        outputs = fwd(*detached)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        mask = [values[n] is not None for n in op.gradients]
        bwd = torch_op(op, backend, "bwd")
        kept = [outputs[i] for i in op.saved]
        torch.library.opcheck(bwd, (torch.ones_like(outputs[0]), *detached, *kept, mask))


def test_compiles_without_graph_break_or_recompile(op, backend, device):
    skip_unless(op.capability.fullgraph, "a full graph")
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    name = next(n for n, v in values.items() if isinstance(v, Tensor))
    others = {n: v for n, v in values.items() if n != name}
    # The reference is ordinary torch code: tracing it is the question, the minutes in inductor are not.
    counter = CompileCounterWithBackend("aot_eager" if backend == "reference" else "inductor")

    def loss(t: Tensor) -> Tensor:
        return public(op)(**{name: t, **others}, backend=backend).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    wanted = [values[n] for n in leaves(op, values)] if op.capability.gradient else []
    for rows in (11, 13, 17):  # sizes that no other dimension has
        start = values[name].detach()
        batch = torch.cat([start] * rows)[:rows].clone().requires_grad_(values[name].requires_grad)
        torch._dynamo.mark_dynamic(batch, 0)
        torch.testing.assert_close(compiled(batch), loss(batch), rtol=1e-5, atol=1e-5)
        if wanted:
            inputs = [batch if t is values[name] else t for t in wanted]
            got, expected = torch.autograd.grad(compiled(batch), inputs), torch.autograd.grad(loss(batch), inputs)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1, f"{op.name}: compiled {counter.frame_count} times for three batch sizes"


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
    tensors = tuple(v for v in values.values() if isinstance(v, Tensor))
    start = torch.cat([tensors[0]] * 4)
    module = Module(op, values, backend)
    dynamic = ({0: torch.export.Dim("batch", min=2)}, *(None for _ in tensors[1:]))
    program = torch.export.export(module, (start, *tensors[1:]), dynamic_shapes=(dynamic,))
    bigger = torch.cat([start] * 2)
    torch.testing.assert_close(program.module()(bigger, *tensors[1:]), module(bigger, *tensors[1:]))


def test_vmap(op, backend, device):
    skip_unless(op.capability.vmap, "vmap")
    values = arguments(op, first(op, "tiny"), torch.float64, device, grad=False)
    names = leaves(op, values)

    def call(*tensors: Tensor) -> Tensor:
        return public(op)(**{**values, **dict(zip(names, tensors))}, backend=backend)

    stacks = [torch.stack([values[n], values[n] * 0.5, values[n] * 0.25], 1) for n in names]
    for batched in (range(1), range(len(names))):  # the first argument alone, then all of them
        dims = tuple(1 if i in batched else None for i in range(len(names)))
        inputs = [s if d is not None else s.select(1, 0) for s, d in zip(stacks, dims)]
        rows = [call(*(t if d is None else t.select(d, n) for t, d in zip(inputs, dims))) for n in range(3)]
        torch.testing.assert_close(torch.vmap(call, in_dims=dims)(*inputs), torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's unfold, in the reference of a convolution
def test_per_sample_gradients(op, backend, device):
    """vmap of grad, as differentially private training uses it."""
    skip_unless(op.capability.vmap and op.capability.gradient, "vmap and a gradient")
    values = arguments(op, first(op, "tiny", "smooth"), torch.float64, device, grad=False)
    names = leaves(op, values)

    def loss(start: Tensor, weights: list[Tensor]) -> Tensor:
        return public(op)(**{**values, **dict(zip(names, [start, *weights]))}, backend=backend).sin().sum()

    start, weights = values[names[0]], [values[n] for n in names[1:]]
    batch = torch.stack([start, start * 0.9, start * 0.8])
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(batch, weights)
    for n in range(3):
        expected = torch.func.grad(loss, argnums=(0, 1))(batch[n], weights)
        torch.testing.assert_close(got[0][n], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close([g[n] for g in got[1]], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.kernels
def test_second_derivatives_by_functional_transforms(op, backend, device):
    """jacrev of jacrev, as physics-informed losses use it."""
    claims = op.capability
    skip_unless(claims.vmap and claims.double_backward, "vmap and a double backward")
    values = arguments(op, first(op, "tiny", "smooth"), torch.float64, device, grad=False)
    name = leaves(op, values)[0]

    def loss(start: Tensor, which: str) -> Tensor:
        return public(op)(**{**values, name: start}, backend=which).sin().sum()

    def second(which: str) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(loss))(values[name], which)

    torch.testing.assert_close(second(backend), second("reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("low", HALF, ids=str)
def test_autocast_keeps_the_dtype(op, backend, low, device):
    skip_unless(op.capability.autocast, "autocast")
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    plain = run(op, values, backend)
    with torch.autocast(device, dtype=low):
        under = run(op, values, backend)
        name = next(n for n, v in values.items() if isinstance(v, Tensor))
        lowered = {**values, name: values[name].detach().to(low)}  # as a linear layer under autocast hands it on
        assert public(op)(**lowered, backend=backend).dtype == low
    for name, t in plain.items():
        assert under[name].dtype == t.dtype, f"{name} is {under[name].dtype} under autocast, expected {t.dtype}"
        if backend != "reference":  # whose own matrix products autocast lowers
            assert torch.equal(under[name], t), f"{name} changes under autocast"


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_bits(op, backend, sample, device):
    """The same bits from run to run and, where claimed, for every thread count."""
    values = arguments(op, sample, torch.float32, device)
    once, again = run(op, values, backend), run(op, values, backend)
    for name, t in once.items():
        assert torch.equal(again[name], t), f"{op.name} {sample.id}: {name} differs from run to run"
    if op.capability.bits == "any thread count" and backend == "cpp":
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, t in run(op, values, backend).items():
                assert torch.equal(t, once[name]), f"{op.name} {sample.id}: {name} differs with {threads} threads"


@pytest.mark.samples("tiny")
def test_nothing_unwritten_is_read(op, backend, sample, device):
    """Fresh memory is NaN in deterministic mode: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    try:
        check(op, sample, backend, torch.float32, device)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="one warning is enough")
def test_the_op_names_itself_when_a_backend_is_unknown():
    for op in OPS.values():
        values = arguments(op, first(op, "tiny"), torch.float32, "cpu")
        with pytest.raises(RuntimeError, match="expected one of reference, cpp, cuda, triton, got 'fast'"):
            public(op)(**values, backend="fast")
