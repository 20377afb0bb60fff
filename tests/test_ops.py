"""Generic tests: every op of `pyml.ops.OPS` on every backend, exactly what its capability row claims.

A new family adds its samples (pyml/testing/<family>.py) and is tested here without a line of its own. The torch
contract is in test_ops_torch.py; ops that write to their arguments or draw random numbers are in test_ops_inplace.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyml.ops import OPS, Op
from pyml.testing import check
from pyml.testing.compare import assert_accurate, public, run
from tests.cases import arguments, each, in_double, samples, schema_arguments, tensors_of
from tests.conftest import INTERPRETED
from tests.mutations import assert_refused_well, mutations, verdict
from tests.op_helpers import DENSE_LAYOUTS, emulated, expanded, first, leaves, skip_unless, torch_op


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
    no layout and no dtype to test; ops that neither give nor write anything, which are checks, have no result."""
    names = {n.removeprefix("pyml::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("pyml::")}
    schemas = {name: getattr(torch.ops.pyml, name).default._schema for name in names}
    on_tensors = {name for name, s in schemas.items() if any("Tensor" in str(a.type) for a in s.arguments)}
    on_tensors -= {
        name for name, s in schemas.items()
        if not s.returns and not any(a.alias_info and a.alias_info.is_write for a in s.arguments)
    }  # fmt: skip
    known = {f"{op}_{way}{end}" for op in OPS for way in ("fwd", "bwd") for end in ("", "_triton")}
    assert on_tensors <= known, f"ops without an entry in pyml.ops.OPS: {sorted(on_tensors - known)}"


def test_agrees_with_the_reference(op, backend, sample, dtype, device):
    check(op, sample, backend, dtype, device)


# --- memory layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, expanded], ids=lambda f: f.__name__)
def test_memory_layout_changes_nothing(op, backend, layout, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    for name, value in values.items():
        if name not in op.mutates or layout is not expanded:  # for which see test_ops_inplace.py
            values[name] = each(value, lambda t: layout(t.detach()).requires_grad_(t.requires_grad))
    before = {n: each(v, lambda t: t.detach().clone()) for n, v in values.items()}
    given: list[tuple[Tensor, Tensor]] = []

    def upstream(number: int, output: Tensor) -> Tensor:
        dense = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape).to(output)
        given.append((layout(dense) if output.dim() else dense, dense.clone()))
        return given[-1][0]

    got = run(op, values, backend, upstream)
    truth = run(op, in_double(values), "reference", upstream)
    same = run(op, values, "reference", upstream)
    for name in truth:
        assert_accurate(f"{op.name} {layout.__name__}, {name}", got[name], truth[name], same[name])
    for name, value in before.items():
        for now, t in zip(tensors_of(values[name]), tensors_of(value)):
            assert torch.equal(now, t), f"{op.name}: wrote into its argument {name}"
    for now, t in given:
        assert torch.equal(now, layout(t) if t.dim() else t), f"{op.name}: wrote into the gradient of its output"


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
        elif isinstance(expected, Tensor):
            assert got.shape == expected.shape and got.dtype == expected.dtype, f"{op.name} {label}: {got.shape}"
    assert refused > 10


@pytest.mark.kernels
def test_the_torch_op_refuses_what_its_function_refuses(op, backend, device):
    """torch.ops.pyml is reachable too: wrong shapes must raise there, never read out of bounds."""
    values = arguments(op, first(op, "tiny"), torch.float32, device, grad=False)
    fwd = torch_op(op, backend, "fwd")
    for label, wrong in mutations(values):
        _, why = verdict(lambda wrong=wrong: public(op)(**wrong, backend="reference"))
        if any(v is None and isinstance(values[n], bool) for n, v in wrong.items()):
            continue  # torch's dispatcher reads None as False
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


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one order; what is unwritten shows below")
def test_bits(op, backend, sample, device):
    """The same bits from run to run and, where claimed, for every thread count."""
    values = arguments(op, sample, torch.float32, device)
    once, again = run(op, values, backend), run(op, values, backend)
    for name, t in once.items():
        assert torch.equal(again[name], t), f"{op.name} {sample.id}: {name} differs from run to run"
    if op.capability.bits == "any thread count" and backend == "cpp" and not emulated():  # that has one thread
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
