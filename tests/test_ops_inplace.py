"""Generic tests of the ops that write to their arguments (`Op.mutates`) or draw random numbers (`Op.keys`).

What they compute is compared with the reference in test_ops.py, like that of every other op.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyml.ops import Op
from pyml.testing.compare import public, run, twin
from tests.cases import arguments, each, schema_arguments, tensors_of
from tests.mutations import assert_refused_well, verdict
from tests.op_helpers import DENSE_LAYOUTS, expanded, first, skip_unless, torch_op


def written(op: Op, values: dict[str, Any]) -> list[Tensor]:
    return [t for n in op.mutates for t in tensors_of(values[n])]


def relaid(op: Op, values: dict[str, Any], layout: Any) -> dict[str, Any]:
    """The same arguments, those that are written to in another layout."""
    return {n: each(v, layout) if n in op.mutates else v for n, v in values.items()}


@pytest.mark.ops("mutates")
@pytest.mark.parametrize("layout", DENSE_LAYOUTS, ids=lambda f: f.__name__)
def test_only_the_elements_are_written(op, backend, layout, device):
    """Not what lies between or beside them in memory, and not the other arguments."""
    values = relaid(op, arguments(op, first(op, "tiny"), torch.float32, device), lambda t: twin(layout(t)))
    before = {n: each(v, twin) for n, v in values.items()}
    public(op)(**values, backend=backend)
    assert any(not torch.equal(*pair) for pair in zip(written(op, values), written(op, before))), "nothing happened"
    for name, value in values.items():
        for t, old in zip(tensors_of(value), tensors_of(before[name])):
            if name not in op.mutates:
                assert torch.equal(t, old), f"{op.name}: wrote into its argument {name}"
                continue
            own = torch.zeros(len(t.untyped_storage()) // t.element_size(), dtype=torch.bool, device=device)
            own.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
            around = [torch.empty(0, dtype=t.dtype, device=device).set_(s.untyped_storage()) for s in (t, old)]
            bits = [a[~own].view(torch.uint8) for a in around]  # what was never written may be a NaN
            assert torch.equal(*bits), f"{op.name}: wrote beside the elements of {name}"


@pytest.mark.ops("mutates")
def test_the_layout_does_not_change_the_numbers(op, backend, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    dense = run(op, values, backend)
    for layout in DENSE_LAYOUTS:
        for name, t in run(op, relaid(op, values, layout), backend).items():
            assert torch.equal(t, dense[name]), f"{op.name}: {name} differs when {layout.__name__}"


@pytest.mark.ops("mutates")
def test_elements_that_share_a_place_are_refused(op, backend, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    for name in op.mutates:
        wrong = values | {name: each(values[name], expanded)}
        if all(t.dim() < 2 or t.shape[0] < 2 for t in tensors_of(wrong[name])):
            continue
        before = [twin(t) for t in written(op, wrong)]
        _, error = verdict(lambda wrong=wrong: public(op)(**wrong, backend=backend))
        assert error is not None, f"{op.name}: wrote to an expanded {name}"
        assert_refused_well(op.name, f"{name} expanded", error)
        if backend != "reference":
            fwd = torch_op(op, backend, "fwd")
            _, error = verdict(lambda wrong=wrong, fwd=fwd: fwd(*schema_arguments(op, wrong)))
            assert error is not None, f"{op.name}: the torch op wrote to an expanded {name}"
        assert all(map(torch.equal, before, written(op, wrong))), f"{op.name}: {name} was written before the refusal"


@pytest.mark.ops("mutates")
def test_one_tensor_twice_is_refused(op, backend, device):
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    for name in op.mutates:
        if isinstance(values[name], list) and len(values[name]) > 1:
            twice = values | {name: [values[name][0]] * len(values[name])}
            _, error = verdict(lambda twice=twice: public(op)(**twice, backend=backend))
            assert error is not None, f"{op.name}: takes one tensor twice in {name}"
            assert_refused_well(op.name, f"{name} twice", error)


@pytest.mark.ops("mutates")
def test_autograd_sees_the_write(op, backend, device):
    """A leaf that requires a gradient is refused outside no_grad; a value that a backward needs is not overwritten."""
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    leaf = {n: each(v, lambda t: twin(t).requires_grad_()) if n in op.mutates else v for n, v in values.items()}
    _, error = verdict(lambda: public(op)(**leaf, backend=backend))
    assert error is not None, f"{op.name}: wrote to a leaf that requires a gradient"
    assert_refused_well(op.name, "requires_grad", error)
    with torch.no_grad():
        _, error = verdict(lambda: public(op)(**leaf, backend=backend))
    assert (error is None) == op.writes_leaves, f"{op.name}: {error}"  # as an optimizer does
    if error is not None:
        assert_refused_well(op.name, "requires_grad under no_grad", error)
    t = written(op, values)[0]
    weight = torch.ones_like(t, requires_grad=True)
    product = (weight * t).sum()
    public(op)(**values, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.ops("mutates")
def test_compiles_with_its_writes(op, backend, device):
    skip_unless(op.capability.fullgraph, "a full graph")
    values = arguments(op, first(op, "tiny"), torch.float32, device)

    def step(arguments: dict[str, Any]) -> list[Tensor]:
        public(op)(**arguments, backend=backend)
        return [t * 2 for t in written(op, arguments)]  # reads what was written

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if backend == "reference" else "inductor")
    for _ in range(2):
        inside, outside = ({n: each(v, twin) for n, v in values.items()} for _ in range(2))
        for got, expected in zip(compiled(inside), step(outside)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for got, expected in zip(written(op, inside), written(op, outside)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        values = inside  # the second call starts where the first one ended


@pytest.mark.ops("keys")
def test_the_key_alone_chooses_the_numbers(op, backend, device):
    """The same bits for the same key and step, others for another one; torch's generator is neither read nor moved."""
    values = arguments(op, first(op, "tiny"), torch.float32, device)
    once = run(op, values, backend)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = run(op, values, backend)
    assert torch.equal(torch.get_rng_state(), state), f"{op.name}: moved torch's generator"
    for name, t in once.items():
        assert torch.equal(again[name], t), f"{op.name}: {name} depends on torch's generator"
    for key in op.keys:
        other = run(op, values | {key: values[key] + 1}, backend)
        changed = [(other[n] != t).double().mean().item() for n, t in once.items() if t.numel()]
        assert max(changed) > 0.9, f"{op.name}: {key} + 1 leaves the numbers as they were"
