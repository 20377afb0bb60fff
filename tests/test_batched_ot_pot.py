"""POT as an oracle for hard cases, where it is installed: small eps, zero mass, long and thin, unbalanced, ragged."""

import pytest
import torch
from torch import Tensor

from pyml import ops

ot = pytest.importorskip("ot", reason="POT is not installed (pip install 'pyml[test]')")


def problem(n: int, m: int, weights: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    cost = torch.rand(n, m, dtype=torch.float64)
    a, b = (torch.rand(k, dtype=torch.float64) + 0.1 if weights else torch.ones(k, dtype=torch.float64) for k in (n, m))
    return cost, a / a.sum(), b / b.sum()


def oracle(cost: Tensor, a: Tensor, b: Tensor, eps: float, **options) -> Tensor:
    exact = {"method": "sinkhorn_log", "stopThr": 1e-13, "numItermax": 100000, "warn": False}
    plan = ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), eps, **exact, **options)
    return torch.from_numpy(plan)


CASES = [(8, 6, 1e-3), (500, 3, 0.01), (3, 70, 0.02), (49, 4, 0.01), (40, 60, 0.05), (1, 5, 0.1)]


@pytest.mark.parametrize(("n", "m", "eps"), CASES)
def test_balanced(n, m, eps):
    cost, a, b = problem(n, m)
    found = ops.sinkhorn(cost, a, b, eps=eps, max_iter=100000, tol=1e-12)
    torch.testing.assert_close(found.plan, oracle(cost, a, b, eps), rtol=1e-6, atol=1e-10)
    low = ops.sinkhorn(cost.float(), a.float(), b.float(), eps=eps, max_iter=2000)
    torch.testing.assert_close(low.transport_cost.double(), found.transport_cost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(9, 7), (45, 50)])
def test_zero_mass_is_a_smaller_problem(n, m):
    cost, a, b = problem(n, m)
    a[2], b[-3:] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    found = ops.sinkhorn(cost, a, b, eps=0.05, max_iter=20000, tol=1e-13)
    rows, columns = a > 0, b > 0
    expected = oracle(cost[rows][:, columns], a[rows], b[columns], 0.05)
    torch.testing.assert_close(found.plan[rows][:, columns], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(9, 7), (45, 50), (60, 10)])
@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_unbalanced(n, m, rho):
    cost, a, b = problem(n, m)
    b = 1.7 * b
    found = ops.sinkhorn(cost, a, b, eps=0.05, rho=rho, max_iter=20000, tol=1e-13)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), 0.05, rho, reg_type="kl", stopThr=1e-15, numItermax=100000
    )
    torch.testing.assert_close(found.plan, torch.from_numpy(plan), rtol=1e-6, atol=1e-10)
    assert (found.error < 1e-10).all()


def test_the_value_is_the_least():
    """Of the regularised problem: no feasible plan nearby costs less."""
    cost, a, b = problem(6, 5)
    eps = 0.1
    found = ops.sinkhorn(cost, a, b, eps=eps, max_iter=5000)

    def price(plan: Tensor) -> Tensor:
        outer = a.unsqueeze(-1) * b
        return (plan * cost).sum() + eps * (torch.xlogy(plan, plan / outer) - plan + outer).sum()

    torch.testing.assert_close(price(found.plan), found.value, rtol=1e-10, atol=1e-12)
    for _ in range(20):
        i, k = torch.randperm(6)[:2]
        j, q = torch.randperm(5)[:2]
        step = 0.3 * min(found.plan[i, q], found.plan[k, j])
        other = found.plan.clone()
        other[i, j] += step
        other[k, q] += step
        other[i, q] -= step
        other[k, j] -= step
        assert price(other) > found.value
