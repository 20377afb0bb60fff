"""`pairwise_cost`, `sinkhorn_points` and debiasing: exact costs, masked points, the divergence."""

import math

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.ops.batched_ot import BAD_NUMBERS, NOT_CONVERGED
from tests.test_batched_ot_gradients import numeric, slope_along

OP = ops.OPS["sinkhorn_solve"]

pytestmark = pytest.mark.kernels
everywhere = pytest.mark.usefixtures("kernel", "on_device")

KINDS = ("sqeuclidean", "cosine")


def truth(x: Tensor, y: Tensor, kind: str) -> Tensor:
    x, y = x.double(), y.double()
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1)
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)) ** 2).sum(-1)


# --- costs between points ---------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_other_points(kind):
    x, y = torch.randn(3, 140, 70), torch.randn(3, 150, 70)
    whole = ops.pairwise_cost(x, y, kind)
    parts = [
        (slice(1, 2), slice(5, 6), slice(7, 30)), (slice(0, 3), slice(3, 138), slice(60, 64)),
        (slice(2, 3), slice(100, 140), slice(0, 1)), (slice(0, 2), slice(0, 49), slice(146, 150)),
    ]  # fmt: skip
    for q, i, j in parts:
        assert torch.equal(ops.pairwise_cost(x[q, i], y[q, j], kind), whole[q, i, j])
    assert torch.equal(ops.pairwise_cost(y, x, kind), whole.transpose(-1, -2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.pairwise_cost(x, y, kind), whole)
    finally:
        torch.set_num_threads(threads)
    found = ops.sinkhorn_points(x, y, cost=kind, eps=0.5, max_iter=20)
    alone = ops.sinkhorn_points(x[1:2], y[1:2], cost=kind, eps=0.5, max_iter=20)
    assert torch.equal(found.value[1:2], alone.value) and torch.equal(found.f[1:2], alone.f)


@everywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_costs_have_the_digits_of_float32(kind, dtype):
    x, y = torch.randn(2, 30, 300).to(dtype), torch.randn(2, 20, 300).to(dtype)
    found, exact = ops.pairwise_cost(x, y, kind), truth(x, y, kind)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ops.pairwise_cost(x.double(), y, kind).dtype == torch.float64


@everywhere
def test_squared_distances_of_far_clouds_and_of_equal_points():
    x = torch.randn(1, 40, 5) + 1e4
    exact = truth(x, x, "sqeuclidean")
    found = ops.pairwise_cost(x, x)
    assert (found - exact).abs().max() < 1e-6 * exact.max()
    assert not found.diagonal(dim1=-2, dim2=-1).any()


@everywhere
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_point_that_is_not_finite_spoils_its_own_costs_alone(kind, backend):
    x, y = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    good_x, good_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    x[0, 2, 1], y[1, 3, 0], y[1, 3, 2] = math.nan, math.inf, -math.inf
    x.requires_grad_(), y.requires_grad_()
    weight = torch.rand(2, 7, 5, dtype=torch.float64)
    spoilt = torch.zeros(2, 7, 5, dtype=torch.bool)
    spoilt[0, 2], spoilt[1, :, 3] = True, True
    found, clean = (ops.pairwise_cost(u, v, kind, backend=backend) for u, v in ((x, y), (good_x, good_y)))
    assert found[spoilt].isnan().all() and torch.equal(found[~spoilt], clean[~spoilt])
    upstream = weight.masked_fill(spoilt, math.nan)
    slopes = torch.autograd.grad(found, (x, y), upstream)
    expected = torch.autograd.grad(clean, (good_x, good_y), weight.masked_fill(spoilt, 0))
    for got, want in zip(slopes, expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not slopes[0][0, 2].any() and not slopes[1][1, 3].any()


@everywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["lengths", "mask", "weights"])
def test_masked_points_may_be_nan(kind, how):
    x, y = torch.randn(2, 9, 3), torch.randn(2, 6, 3)
    rows, columns = torch.tensor([9, 4]), torch.tensor([3, 6])
    on = torch.arange(9) < rows.unsqueeze(-1), torch.arange(6) < columns.unsqueeze(-1)
    weights = [live / live.sum(-1, keepdim=True) for live in on]
    options = {"lengths": {"lengths": (rows, columns)}, "mask": {"mask": on}, "weights": {}}[how]
    given = weights if how == "weights" else (None, None)

    def run(fill: float) -> tuple[Tensor, ...]:
        u, v = (t.masked_fill(~live.unsqueeze(-1), fill).requires_grad_() for t, live in zip((x, y), on))
        found = ops.sinkhorn_points(u, v, *given, cost=kind, eps=0.5, debias=True, plan_grad="implicit", **options)
        loss = found.value.sum() + found.transport_cost.sum() + (found.plan**2).sum()
        return found.value, found.plan, found.barycentric_map(v), *torch.autograd.grad(loss, (u, v))

    for got, want in zip(run(math.nan), run(0.0)):
        assert torch.equal(got, want)


@everywhere
def test_a_bad_live_point_marks_its_problem():
    x, y = torch.randn(3, 8, 2), torch.randn(3, 8, 2)
    x[1, 0, 0] = math.nan
    x.requires_grad_()
    found = ops.sinkhorn_points(x, y, eps=0.5, plan_grad="implicit")
    assert found.status.tolist() == [0, BAD_NUMBERS, 0]
    (slope,) = torch.autograd.grad(found.value[::2].sum() + (found.plan[::2] ** 2).sum(), x)
    assert not slope[1].any() and slope.isfinite().all() and slope[::2].any()


# --- points, debiasing ------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debias", [False, True])
def test_points_against_central_differences(kind, debias):
    x, y = (torch.randn(2, n, 3, dtype=torch.float64) for n in (12, 9))
    eps = 0.5 if kind == "cosine" else 4.0
    for which, direction in ((0, torch.randn_like(x)), (1, torch.randn_like(y))):

        def loss(t: Tensor, which: int = which) -> Tensor:
            pair = (t, y) if which == 0 else (x, t)
            return ops.sinkhorn_points(*pair, cost=kind, debias=debias, eps=eps, max_iter=500).value.sum()

        leaf = (x, y)[which]
        expected = numeric(loss, leaf, direction)
        assert math.isclose(slope_along(loss, leaf, direction), expected, rel_tol=1e-6, abs_tol=1e-8)


@everywhere
@pytest.mark.parametrize("rho", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_points(rho, dtype):
    """Their entropic cost is not 0, only the divergence is; gradients are finite where points coincide."""
    x = torch.randn(3, 20, 4, dtype=dtype)
    x[:, 1] = x[:, 0]
    leaf = x.clone().requires_grad_()
    plain = ops.sinkhorn_points(leaf, x, eps=0.5, rho=rho)
    assert (plain.value > 0.01).all()
    assert torch.autograd.grad(plain.value.sum(), leaf)[0].isfinite().all()
    divergence = ops.sinkhorn_points(leaf, x.clone(), eps=0.5, rho=rho, debias=True)
    assert divergence.value.abs().max() < 1e-6
    (slope,) = torch.autograd.grad(divergence.value.sum(), leaf)
    assert slope.abs().max() < 1e-3
    apart = ops.sinkhorn_points(x, x + 1.0, eps=0.5, rho=rho, debias=True)
    assert (apart.value > 0.1).all()


@everywhere
def test_points_of_length_zero_and_far_away():
    x, y = torch.zeros(5, 3), torch.randn(4, 3)
    found = ops.sinkhorn_points(x.requires_grad_(), y, cost="cosine", eps=0.1)
    torch.testing.assert_close(found.transport_cost, torch.tensor(1.0))
    assert torch.autograd.grad(found.value, x)[0].isfinite().all()
    near = torch.randn(6, 3)
    far = ops.sinkhorn_points(near + 1e3, near.flip(0) + 1e3, eps=0.5)
    here = ops.sinkhorn_points(near, near.flip(0), eps=0.5)
    torch.testing.assert_close(far.value, here.value, rtol=1e-3, atol=1e-3)


def test_precision_of_points_does_not_follow_autocast():
    x, y = torch.randn(2, 30, 16), torch.randn(2, 20, 16)
    plain = ops.sinkhorn_points(x, y, eps=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ops.sinkhorn_points(x, y, eps=1.0)
    assert torch.equal(plain.value, under.value) and torch.equal(plain.f, under.f)


@everywhere
def test_barycentric_map_of_a_permutation():
    x = torch.randn(8, 2, dtype=torch.float64) * 10
    order = torch.randperm(8)
    found = ops.sinkhorn_points(x, x[order], eps=0.01, max_iter=500)
    torch.testing.assert_close(found.barycentric_map(x[order]), x, rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("eps", [0.05, [1.0, 0.2, 0.05]], ids=str)
def test_debiasing_solves_the_own_problems_alike(eps):
    """With the same eps-scaling; a result starts all three problems where they were."""
    x, y = torch.randn(2, 15, 3, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    pairs = [(x, y), (x, x), (y, y)]
    cost = [ops.pairwise_cost(u, v) for u, v in pairs]
    values = [ops.sinkhorn(c, eps=eps, max_iter=7).value for c in cost]
    found = ops.sinkhorn_points(x, y, eps=eps, max_iter=7, debias=True)
    torch.testing.assert_close(found.value, values[0] - (values[1] + values[2]) / 2, rtol=1e-12, atol=1e-12)
    more = ops.sinkhorn_points(x, y, eps=0.05, max_iter=5, debias=True, init=found)
    ends = [ops.sinkhorn(c, eps=eps, max_iter=7) for c in cost]
    values = [ops.sinkhorn(c, eps=0.05, max_iter=5, init=end).value for c, end in zip(cost, ends)]
    torch.testing.assert_close(more.value, values[0] - (values[1] + values[2]) / 2, rtol=1e-12, atol=1e-12)


@everywhere
def test_debiasing_tells_what_its_own_problems_found():
    cost, own_x, own_y = torch.rand(3, 6, 5), torch.rand(3, 6, 6), torch.rand(3, 5, 5)
    good = ops.sinkhorn(cost, eps=0.1, debias=(own_x, own_y))
    own_x[1, 0, 0], own_y[2, 4, 4] = math.nan, math.inf
    found = ops.sinkhorn(cost, eps=0.1, debias=(own_x, own_y))
    assert found.status.tolist() == [0, BAD_NUMBERS, BAD_NUMBERS]
    assert found.value.isnan().tolist() == [False, True, True] and torch.equal(found.value[0], good.value[0])
    assert torch.equal(found.plan, good.plan) and torch.equal(found.f, good.f)
    with pytest.raises(ValueError, match=r"sinkhorn: cost, a, b: expected finite costs.*status 4 at 1"):
        ops.sinkhorn(cost, eps=0.1, debias=(own_x, own_y), strict=True)
    late = ops.sinkhorn(
        cost * 0, eps=1e-3, tol=1e-7, max_iter=6, debias=(10 * torch.rand(3, 6, 6), torch.zeros(3, 5, 5))
    )
    assert late.status.tolist() == [NOT_CONVERGED] * 3
