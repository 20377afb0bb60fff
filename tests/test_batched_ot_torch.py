"""`sinkhorn` itself under compile, vmap and functional transforms; its arguments and their refusals."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from pyml import ops


def loss(cost: Tensor) -> Tensor:
    found = ops.sinkhorn(cost, eps=0.2, max_iter=20, plan_grad="implicit")
    return found.value.sum() + (found.plan * cost).sum() + found.f.sum()


def test_compiles_in_one_graph():
    cost = torch.rand(3, 6, 5)
    leaf, same = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    torch._dynamo.reset()
    found, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), loss(same)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, same))


def test_vmap_and_grad():
    cost = torch.rand(4, 6, 5, dtype=torch.float64)
    rows = torch.stack([torch.func.grad(loss)(c) for c in cost])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(cost), rows, rtol=1e-12, atol=1e-12)


def test_points_compile():
    x, y = torch.rand(2, 7, 3), torch.rand(2, 6, 3)
    torch._dynamo.reset()

    def call(x: Tensor, y: Tensor) -> Tensor:
        return ops.sinkhorn_points(x, y, eps=0.3, debias=True).value

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, y), call(x, y))


def test_weights_broadcast():
    cost, a = torch.rand(2, 3, 6, 5), torch.rand(6).softmax(-1)
    leaf = a.clone().requires_grad_()
    found = ops.sinkhorn(cost, leaf, eps=0.2)
    assert torch.equal(found.value, ops.sinkhorn(cost, a.expand(2, 3, 6).contiguous(), eps=0.2).value)
    assert torch.autograd.grad(found.value.sum(), leaf)[0].shape == (6,)
    assert found.f.shape == (2, 3, 6) and found.plan.shape == cost.shape and found.error.shape == (2, 3)


COST = torch.rand(2, 4, 3)
REFUSED = {
    "eps: expected a finite number > 0, got 0": {"eps": 0},
    "eps: expected a finite number > 0, got nan": {"eps": float("nan")},
    r"eps: expected a number > 0 or a falling list": {"eps": []},
    "max_iter: expected an integer from 1 to 1000000, got 0": {"max_iter": 0},
    "tol: expected a finite number >= 0": {"tol": -1.0},
    "rho: expected a finite number > 0": {"rho": 0.0},
    "plan_grad: expected one of detach, implicit": {"plan_grad": "unroll"},
    "a: expected a shape that broadcasts to": {"a": torch.ones(3)},
    "b: expected float32, float64, bfloat16 or float16": {"b": torch.ones(3, dtype=torch.int64)},
    "init: expected a shape that broadcasts to": {"init": torch.ones(4)},
    "lengths: expected a pair": {"lengths": torch.ones(2, dtype=torch.int64)},
    "lengths of rows: expected an integer tensor": {"lengths": (torch.ones(2), None)},
    "lengths of columns: expected shape": {"lengths": (None, torch.ones(3, dtype=torch.int64))},
    "mask of rows: expected a bool tensor": {"mask": (torch.ones(2, 4), None)},
    "mask of columns: expected a shape": {"mask": (None, torch.ones(2, 4, dtype=torch.bool))},
    "debias: expected False or costs": {"debias": True},
    r"debias of rows: expected shape \[..., n, n\] = \[2, 4, 4\]": {"debias": (torch.ones(4, 4), torch.ones(2, 3, 3))},
    r"debias of columns: expected shape \[..., m, m\]": {"debias": (torch.ones(2, 4, 4), torch.ones(2, 4, 4))},
    "debias of rows: expected a tensor": {"debias": (1.0, torch.ones(2, 3, 3))},
    r"eps: expected a number > 0 or a falling list of them, got \[0.1, 0.1\]": {"eps": [0.1, 0.1]},
    r"eps: expected a number > 0 or a falling list of them, got \[0.1, 0.2\]": {"eps": [0.1, 0.2]},
    "eps: expected a finite number > 0, got -1": {"eps": [0.1, -1]},
    "lengths of rows: expected integers from 0 to 4, got some from 2 to 5": {"lengths": (torch.tensor([5, 2]), None)},
    "lengths of columns: expected integers from 0 to 3, got some from -1 to 3": {
        "lengths": (None, torch.tensor([3, -1]))
    },
    r"lengths of rows: expected the device of cost \(cpu\), got meta": {
        "lengths": (torch.ones(2, dtype=torch.int64, device="meta"), None)
    },
    r"mask of columns: expected the device of cost \(cpu\), got meta": {
        "mask": (None, torch.ones(2, 3, dtype=torch.bool, device="meta"))
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_arguments_are_one_sentence(words):
    with pytest.raises((ValueError, TypeError), match=r"^sinkhorn: " + words) as caught:
        ops.sinkhorn(COST, **{"eps": 0.1, **REFUSED[words]})
    assert "\n" not in str(caught.value)


def test_wrong_points_are_one_sentence():
    x = torch.rand(2, 4, 3)
    for y, words in ((torch.rand(2, 4, 2), "y: expected shape"), (torch.rand(4, 3), "y: expected shape")):
        with pytest.raises(ValueError, match=f"sinkhorn_points: {words}"):
            ops.sinkhorn_points(x, y, eps=0.1)
    refused = {
        "cost: expected one of sqeuclidean, cosine": {"cost": "manhattan"},
        "eps: expected a finite number > 0": {"eps": -0.1},
        "max_iter: expected an integer": {"max_iter": 0},
        "lengths of rows: expected integers from 0 to 4": {"lengths": (torch.tensor([9, 1]), None)},
        "debias: expected one of False, True": {"debias": (1, 2)},
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=f"^sinkhorn_points: {words}"):
            ops.sinkhorn_points(x, x, **{"eps": 0.1, **options})
    found = ops.sinkhorn_points(x, x, eps=0.1)
    for points, words in (
        (x.tolist(), "points: expected a tensor, got list"),
        (x.int(), "points: expected float32, float64, bfloat16 or float16, got torch.int32"),
        (x[:, :3], r"points: expected \[..., 4, d\], one a column, got \[2, 3, 3\]"),
        (x[0, :, 0], "points: expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^barycentric_map: {words}"):
            found.barycentric_map(points)


def test_lengths_under_vmap_and_compile():
    """Where lengths cannot be looked at, one beyond the end counts as the end."""
    cost, lengths = torch.rand(3, 5, 4), torch.tensor([5, 2, 9])

    def value(cost: Tensor, lengths: Tensor) -> Tensor:
        return ops.sinkhorn(cost, eps=0.2, max_iter=10, lengths=(lengths, None)).value

    expected = value(cost, lengths.clamp(max=5))
    assert torch.equal(torch.vmap(value)(cost, lengths), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(value, fullgraph=True, backend="aot_eager")(cost, lengths), expected)


@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("side", [0, 1])
def test_debiased_with_an_empty_side_is_nothing(side, rho):
    x, y = torch.rand(2, 5, 3, requires_grad=True), torch.rand(2, 6, 3, requires_grad=True)
    lengths = [None, None]
    lengths[side] = torch.tensor([0, 4])
    found = ops.sinkhorn_points(x, y, eps=0.5, rho=rho, debias=True, lengths=tuple(lengths))
    grads = torch.autograd.grad(found.value.sum(), (x, y))
    assert found.value[0] == 0 and found.value[1].abs() > 1e-4 and found.status[0] == 0
    assert all((g[0] == 0).all() and (g[1] != 0).any() for g in grads)
    sizes = [5, 6]
    sizes[side] = 0
    leaves = [torch.rand(2, n, 3, requires_grad=True) for n in sizes]
    bad = torch.tensor([[0.3, float("nan"), 0.7]])
    weights = {"a": bad, "b": torch.zeros(1, 4)}
    marked = ops.sinkhorn(
        torch.rand(1, 3, 4), eps=0.5, rho=rho, **weights, debias=(torch.rand(1, 3, 3), torch.rand(1, 4, 4))
    )
    assert marked.value.isnan() and marked.status & 4
    none = ops.sinkhorn_points(*leaves, eps=0.5, rho=rho, debias=True)
    assert (none.value == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(none.value.sum(), leaves))


def test_a_plan_of_costs_that_changed_is_refused():
    cost, a = torch.rand(2, 4, 5), torch.rand(2, 4).softmax(-1)
    for written in (cost, a):
        found = ops.sinkhorn(cost, a, eps=0.2)
        assert found.plan.shape == (2, 4, 5)
        written.mul_(1.5)
        with pytest.raises(ValueError, match="plan: cost, a, b: expected the numbers that were solved, got some"):
            _ = found.plan
    with torch.inference_mode():
        assert ops.sinkhorn(torch.rand(2, 4, 5), eps=0.2).plan.shape == (2, 4, 5)


def test_copies_of_a_result_and_those_of_a_graph_have_their_plan():
    cost = torch.rand(2, 4, 5).mul_(2)
    found = ops.sinkhorn(cost, eps=0.2)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other.plan, found.plan)
    torch._dynamo.reset()
    compiled = torch.compile(lambda c: ops.sinkhorn(c, eps=0.2), backend="eager")(cost)
    assert torch.equal(compiled.plan, found.plan)
    assert torch.equal(torch.compile(lambda: found.plan, backend="eager")(), found.plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_barycentric_map_of_16_bit_costs_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(500, 500, generator=generator).to(dtype)
    points = 1e5 + 1e3 * torch.rand(500, 2, generator=generator)
    found = ops.sinkhorn(cost, eps=1.0).barycentric_map(points)
    expected = ops.sinkhorn(cost.double(), eps=1.0).barycentric_map(points.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert ops.sinkhorn(cost, eps=1.0).barycentric_map(points.clamp(max=1).to(dtype)).dtype == dtype


def test_numbers_that_the_dtype_does_not_hold_are_refused():
    cost = torch.rand(3, 4)
    for name, value in (("eps", 1e-39), ("eps", 1e39), ("rho", 1e39)):
        with pytest.raises(ValueError, match=f"sinkhorn: {name}: expected a number from 1.2e-38 to 3.4e.38"):
            ops.sinkhorn(cost, **{"eps": 0.1, name: value})
    with pytest.raises(ValueError, match=r"sinkhorn: rho: expected at least 1.2e-07 eps = 1.2e-08 in torch.float32"):
        ops.sinkhorn(cost, eps=0.1, rho=1e-9)
    smallest = ops.sinkhorn(cost, eps=0.1, rho=1.2e-8).value
    torch.testing.assert_close(
        smallest, ops.sinkhorn(cost.double(), eps=0.1, rho=1.2e-8).value.float(), rtol=1e-5, atol=0
    )


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    cost = torch.rand(3, 4)
    found = ops.sinkhorn(
        cost, eps=numpy.float64(0.5), max_iter=numpy.int64(20), tol=numpy.float32(0), rho=numpy.float32(2)
    )
    assert torch.equal(found.value, ops.sinkhorn(cost, eps=0.5, max_iter=20, tol=0.0, rho=2.0).value)


@pytest.mark.parametrize("wrong", [True, "0.5", torch.tensor(0.5), None, float("nan")])
def test_what_is_no_number_is_refused(wrong):
    for name, sentence in (("eps", "a finite number > 0"), ("max_iter", "an integer from 1 to 1000000")):
        with pytest.raises(ValueError, match=f"sinkhorn: {name}: expected {sentence}"):
            ops.sinkhorn(torch.rand(3, 4), **{"eps": 0.5, name: wrong})
