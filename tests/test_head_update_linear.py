"""`head_linear`: the gradients of a few heads are those of the whole matrix, and nothing else is computed or kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyml.ops import head_linear

SIZE, IN, OUT = 4, 12, 20


def layer(dim: int, heads: tuple[int, ...], bias: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of `head_linear` without x: slices are leaves that share the memory of the weight."""
    weight = torch.randn(OUT, IN, dtype=dtype)
    found = {"weight": weight, "bias": torch.randn(OUT, dtype=dtype) if bias else None, "heads": heads, "size": SIZE}
    slices = [weight.narrow(dim, h * SIZE, SIZE).detach().requires_grad_() for h in heads]
    more = (
        [found["bias"][h * SIZE : (h + 1) * SIZE].detach().requires_grad_() for h in heads] if bias and not dim else []
    )
    return found | {"slices": slices, "dim": dim, "bias_slices": more}


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [*arguments["slices"], *arguments["bias_slices"]]


def full_gradients(x: Tensor, a: dict[str, Any], loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of x, the slices and the bias slices, cut out of the gradients of whole tensors."""
    weight = a["weight"].clone().requires_grad_()
    bias = None if a["bias"] is None else a["bias"].clone().requires_grad_()
    given = [x, weight, *([] if bias is None else [bias])]
    of_x, of_weight, *of_bias = torch.autograd.grad(loss(F.linear(x, weight, bias)), given)
    cut = [of_weight.narrow(a["dim"], h * SIZE, SIZE) for h in a["heads"]]
    return [of_x, *cut, *(of_bias[0][h * SIZE : (h + 1) * SIZE] for h in a["heads"] if a["bias_slices"])]


CASES = [(0, (3,), False), (0, (4, 0, 2), True), (1, (1,), False), (1, (2, 0), True), (0, (), False)]


@pytest.mark.parametrize(("dim", "heads", "bias"), CASES)
@pytest.mark.parametrize("lead", [(), (7,), (2, 5)])
def test_gradients_are_those_of_the_whole_matrix(dim, heads, bias, lead):
    a, x = layer(dim, heads, bias), torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
    y = head_linear(x, **a)
    assert torch.equal(y, F.linear(x, a["weight"], a["bias"]))
    found = torch.autograd.grad(y.sin().sum(), [x, *leaves(a)])
    for got, expected in zip(found, full_gradients(x, a, lambda y: y.sin().sum()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)
    assert a["weight"].grad is None and not a["weight"].requires_grad


def test_a_step_on_a_slice_is_a_step_of_the_weight():
    """And the graph of before that step is refused, as torch refuses any overwritten weight."""
    a, x = layer(1, (0, 2)), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    first = head_linear(x, **a)
    stale = head_linear(x, **a)
    first.sum().backward()
    before = a["weight"].clone()
    torch.optim.SGD(leaves(a), lr=0.1).step()
    assert (a["weight"] != before).any(0).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert not torch.equal(head_linear(x, **a), first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.sum().backward()


@pytest.mark.parametrize(("dim", "heads", "bias"), CASES[:4])
def test_derivatives(dim, heads, bias):
    """Finite differences move the slices in their memory, which is the weight's: so they see the whole layer."""
    a, x = layer(dim, heads, bias), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    count = len(heads)

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        return head_linear(x, **{**a, "slices": parts[:count], "bias_slices": parts[count:]}).sin()

    assert torch.autograd.gradcheck(call, (x, *leaves(a)))
    assert torch.autograd.gradgradcheck(call, (x, *leaves(a)), gen_non_contig_grad_outputs=True)


def test_second_derivatives_find_the_slices():
    """The gradient of x depends on the weight: a penalty on it moves the slices as it moves a whole matrix."""
    a, x = layer(1, (2, 1)), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    (of_x,) = torch.autograd.grad(head_linear(x, **a).sin().sum(), x, create_graph=True)
    found = torch.autograd.grad(of_x.square().sum(), [x, *leaves(a)])
    weight = a["weight"].clone().requires_grad_()
    (of_x,) = torch.autograd.grad(F.linear(x, weight).sin().sum(), x, create_graph=True)
    expected_x, whole = torch.autograd.grad(of_x.square().sum(), [x, weight])
    for got, expected in zip(found, [expected_x, whole[:, 8:12], whole[:, 4:8]], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_only_what_is_needed_is_kept():
    """Rows keep x, columns the chosen part of x alone, without gradients nothing."""
    x = torch.randn(50, IN, dtype=torch.float64, requires_grad=True)

    def kept(call: Callable[[], Tensor], a: dict[str, Any]) -> int:
        own = {a["weight"].untyped_storage().data_ptr()}
        stored: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        return sum(stored.values())

    rows, columns = layer(0, (1, 2)), layer(1, (1, 2))
    assert kept(lambda: head_linear(x, **rows), rows) == 50 * IN * 8
    assert kept(lambda: head_linear(x, **columns), columns) == 50 * 2 * SIZE * 8
    for a in (rows, columns):
        for p in leaves(a):
            p.requires_grad_(False)
        assert kept(lambda a=a: head_linear(x, **a), a) == 0


def test_only_wanted_gradients():
    a, x = layer(0, (0, 3)), torch.randn(5, IN, dtype=torch.float64)
    a["slices"][0].requires_grad_(False)
    head_linear(x, **a).sum().backward()
    assert a["slices"][0].grad is None
    torch.testing.assert_close(a["slices"][1].grad, x.sum(0).expand(SIZE, IN))
    frozen = layer(0, (1,))
    frozen["slices"][0].requires_grad_(False)
    assert not head_linear(x, **frozen).requires_grad


@pytest.mark.parametrize("dim", [0, 1])
def test_checkpointing_and_accumulation(dim):
    a, x = layer(dim, (2, 0)), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    head_linear(x, **a).sin().sum().backward()
    once = [p.grad.clone() for p in leaves(a)]
    for _ in range(2):
        checkpoint(lambda x: head_linear(x, **a).sin(), x, use_reentrant=False).sum().backward()
    for p, g in zip(leaves(a), once):
        torch.testing.assert_close(p.grad, 3 * g, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("dim", "heads", "bias"), CASES[:4])
def test_compiles_without_a_graph_break(dim, heads, bias):
    a, x = layer(dim, heads, bias, torch.float32), torch.randn(3, 5, IN, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return head_linear(x, **a).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x), [x, *leaves(a)])
    for got, expected in zip(found, torch.autograd.grad(loss(x), [x, *leaves(a)]), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dim", "heads", "bias"), CASES[:4])
def test_functional_transforms(dim, heads, bias):
    """Gradients of every sample by vmap of grad; and vmap of the layer itself."""
    a, x = layer(dim, heads, bias), torch.randn(4, 3, IN, dtype=torch.float64)
    count = len(heads)

    def loss(parts: list[Tensor], x: Tensor) -> Tensor:
        return head_linear(x, **{**a, "slices": parts[:count], "bias_slices": parts[count:]}).sin().sum()

    parts = [p.detach() for p in leaves(a)]
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parts, x)
    for n in range(len(x)):
        alone = torch.autograd.grad(loss(leaves(a), x[n]), leaves(a))
        for got, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(got[n], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.vmap(lambda x: head_linear(x, **a))(x), head_linear(x, **a))


@pytest.mark.parametrize("dim", [0, 1])
def test_autocast_is_that_of_a_linear_layer(dim):
    a, x = layer(dim, (1,), dtype=torch.float32), torch.randn(8, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = head_linear(x, **a)
        assert torch.equal(y, F.linear(x, a["weight"])) and y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), [x, *leaves(a)])
    truth = full_gradients(x, a, lambda y: y.square().sum())
    for got, expected in zip(found, truth):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_slice_that_lost_its_weight_is_refused():
    a = layer(0, (1, 2), bias=True)
    x = torch.randn(3, IN, dtype=torch.float64)
    for name, lost in (
        ("slices", [p.detach().clone() for p in a["slices"]]),
        ("slices", [a["slices"][1], a["slices"][0]]),
        ("bias_slices", copy.deepcopy(a["bias_slices"])),
        ("slices", [p.float() for p in a["slices"]]),
    ):
        with pytest.raises(
            ValueError, match=rf"head_linear: {name}\[0\]: expected a view of the weight, narrow\(0, 4, 4\)"
        ):
            head_linear(x, **{**a, name: lost})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, IN)}, r"head_linear: x: expected the dtype of the weights \(torch.float64\)"),
        ({"x": torch.ones(3, 5).double()}, r"head_linear: x: expected shape \[..., in\] = \[..., 12\], got \[3, 5\]"),
        ({"dim": 2}, "head_linear: dim: expected 0 for rows or 1 for columns, got 2"),
        ({"size": 7}, "head_linear: size: expected a divisor of 20, which is dimension 0 of the weight, got 7"),
        ({"heads": (1, 5)}, r"head_linear: heads: expected heads in \[0, 5\), got 5"),
        ({"heads": (1,)}, "head_linear: slices: expected 1 tensors, one a head, got 2"),
        ({"bias_slices": [torch.ones(4).double()]}, "head_linear: bias_slices: expected none without a bias"),
        ({"weight": torch.ones(OUT, IN, requires_grad=True).double()},
         "head_linear: weight: expected a tensor without requires_grad, since gradients go to the slices alone"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        head_linear(**{"x": torch.ones(3, IN).double(), **layer(0, (1, 2)), **change})
