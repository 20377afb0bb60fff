"""`sinkhorn` itself under compile, vmap and functional transforms; its arguments and their refusals."""

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
