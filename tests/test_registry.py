"""The registry serves ops unlike those of the B-spline family: several outputs, saved ones, lists, a status word."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyml import ops as _ops  # noqa: F401  (registers the library's own ops first)
from pyml.backend import set_checks
from pyml.ops._registry import OPS, Op, first_tensor, read_status

LIBRARY = torch.library.Library("pyml", "FRAGMENT")
ARGS = "Tensor x, Tensor y, Tensor[] extra, int power"


def _fwd(x, y, extra, power):
    norm = x.pow(power).sum()
    bad = (y < 0).any().to(torch.int32).reshape(1)
    return x * y + sum(extra), x - y, norm, bad


def _bwd(first, second, x, y, extra, power, norm, bad, mask):
    assert torch.equal(norm, x.pow(power).sum())  # what the forward saved has come through
    assert len(extra) == 2
    dx, dy = first * y + second, first * x - second
    return (dx if mask[0] else x.new_empty(0), dy if mask[1] else y.new_empty(0))


def _finish(found, x, y, extra, power):
    read_status("toy_pair", found[3], "y: expected no negative number, got one")
    return found[0], found[1]


@pytest.fixture(scope="module")
def toy():
    LIBRARY.define(f"toy_pair_fwd({ARGS}) -> (Tensor, Tensor, Tensor, Tensor)")
    LIBRARY.define(
        f"toy_pair_bwd(Tensor g, Tensor h, {ARGS}, Tensor norm, Tensor bad, bool[] mask) -> (Tensor, Tensor)"
    )
    LIBRARY.impl("toy_pair_fwd", _fwd, "CompositeExplicitAutograd")
    LIBRARY.impl("toy_pair_bwd", _bwd, "CompositeExplicitAutograd")
    op = Op(
        "toy_pair", "toy", reference=_fwd, check=lambda x, y, extra, power: None,
        fake=lambda x, y, extra, power: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(()),
                                         x.new_empty(1, dtype=torch.int32)),
        gradients=("x", "y"), outputs=2, finish=_finish, has_cuda=False, has_triton=False,
        composed=lambda x, y, extra, power, backend: (x * y + sum(extra), x - y),
        free_leading_dims=False,
    )  # fmt: skip
    yield op
    del OPS["toy_pair"]


@pytest.fixture
def inputs():
    x, y = torch.rand(2, 3, dtype=torch.float64).add(0.1).unbind(0)
    return x.requires_grad_(), y.requires_grad_(), [torch.ones(3).double(), torch.ones(3).double()], 2


def test_two_outputs_and_a_saved_one_are_differentiable(toy, inputs):
    x, y, extra, power = inputs
    assert torch.autograd.gradcheck(lambda x, y: toy(x, y, extra, power), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: toy(x, y, extra, power), (x, y))


def test_what_the_backward_needs_is_guarded(toy, inputs):
    """As with torch's own ops: an overwritten input and a second backward are errors, hooks and checkpoints work."""
    x, y, extra, power = inputs
    expected = torch.autograd.grad(toy(x, y, extra, power)[0].sum(), (x, y))
    h = x * 1
    out = toy(h, y, extra, power)[0]
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = toy(x, y, extra, power)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(out, (x, y), retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(out, (x, y)), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, (x, y))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        out = toy(x, y, extra, power)[0]
    assert len(packed) == 6  # x, y, two extra ones, norm and bad
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, y)), expected)
    for reentrant in (True, False):
        out = checkpoint(lambda x, y: toy(x, y, extra, power)[0], x, y, use_reentrant=reentrant)
        out.sum().backward()
        torch.testing.assert_close((x.grad, y.grad), expected)
        x.grad = y.grad = None


def test_nothing_is_saved_without_need(toy, inputs):
    x, y, extra, power = inputs
    assert toy(x.detach(), y.detach(), extra, power)[0].grad_fn is None
    with torch.no_grad():
        assert not toy(x, y, extra, power)[0].requires_grad
    raw = toy.run["cpp"](x, y, extra, power)
    assert [t.requires_grad for t in raw] == [True, True, False, False]


def test_one_output_alone(toy, inputs):
    x, y, extra, power = inputs
    (dx,) = torch.autograd.grad(toy(x, y, extra, power)[1].sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


def test_compiles_in_one_graph(toy, inputs):
    x, y, extra, power = inputs
    run = torch.compile(lambda x, y: toy.run["cpp"](x, y, extra, power)[:2], fullgraph=True, backend="aot_eager")
    found, expected = run(x, y), toy(x, y, extra, power)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found[0].sum() + found[1].prod(), (x, y)),
        torch.autograd.grad(expected[0].sum() + expected[1].prod(), (x, y)),
    )


def test_vmap_over_any_argument(toy, inputs):
    x, y, extra, power = (a.detach() if isinstance(a, torch.Tensor) else a for a in inputs)
    rows = torch.stack([y, y + 1])
    found = torch.vmap(lambda row: toy.run["cpp"](x, row, extra, power)[:2])(rows)
    expected = [toy(x, row, extra, power) for row in rows]
    for n in range(2):
        torch.testing.assert_close(found[n], torch.stack([pair[n] for pair in expected]))
    none = torch.vmap(lambda row: toy.run["cpp"](x, row, extra, power)[0])(rows[:0])
    assert none.shape == (0, 3)


def test_a_status_word_becomes_one_sentence(toy, inputs):
    x, y, extra, power = inputs
    with pytest.raises(ValueError, match="toy_pair: y: expected no negative number"):
        toy(x, y.detach() - 9, extra, power)
    set_checks(False)
    try:
        assert len(toy(x, y.detach() - 9, extra, power)) == 2
    finally:
        set_checks(True)


def test_the_device_is_that_of_the_first_tensor_also_in_a_list():
    t = torch.ones(1)
    assert first_tensor((2, [t], torch.ones(2))) is t
    with pytest.raises(TypeError, match="expected a tensor"):
        first_tensor((1, "a", []))
