"""Gradients of `sinkhorn`: the envelope, the implicit one, detaching, points, debiasing, second derivatives."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.reference import batched_ot_baselines as baselines
from tests.test_triton import compiled, interpret

OP = ops.OPS["sinkhorn_solve"]

pytestmark = pytest.mark.kernels
everywhere = pytest.mark.usefixtures("kernel", "on_device")


@compiled
def test_in_the_interpreter():
    """What takes it seconds: nearly singular systems, sums past trust, masks, potentials that are none."""
    chosen = "singular and 49 or unbalanced_sums or potentials or all_masked or masses or start_that"
    interpret(__file__, str(Path(__file__).with_name("test_batched_ot.py")), "-k", chosen)


def costs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=dtype) + 0.3


def numeric(loss, leaf: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    """Central difference of a number along one direction."""
    with torch.no_grad():
        up, down = loss(leaf + step * direction), loss(leaf - step * direction)
    return ((up - down) / (2 * step)).item()


def slope_along(loss, leaf: Tensor, direction: Tensor) -> float:
    leaf = leaf.detach().clone().requires_grad_()
    return (torch.autograd.grad(loss(leaf), leaf)[0] * direction).sum().item()


SHAPES = ((3, 9, 4), (2, 40, 30), (1, 30, 70), (1, 100, 20))


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rho", [None, 0.4])
def test_envelope_against_central_differences(shape, rho):
    weight = torch.rand(shape[0], dtype=torch.float64) + 0.5

    def loss(cost: Tensor) -> Tensor:
        return (ops.sinkhorn(cost, eps=0.2, max_iter=400, rho=rho).value * weight).sum()

    cost = costs(*shape)
    direction = torch.randn(shape, dtype=torch.float64)
    assert math.isclose(slope_along(loss, cost, direction), numeric(loss, cost, direction), rel_tol=1e-6, abs_tol=1e-8)


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rho", [None, 0.4])
def test_implicit_against_central_differences(shape, rho):
    """Of the transport cost, of any function of the plan, of the potentials."""
    pick = torch.randn(shape, dtype=torch.float64)

    def loss(cost: Tensor) -> Tensor:
        found = ops.sinkhorn(cost, eps=0.2, max_iter=600, rho=rho, plan_grad="implicit")
        of_potentials = (found.f * pick[..., 0]).sum() + (found.g.sin() * pick[:, 0]).sum()
        return found.transport_cost.sum() + (found.plan * pick).sum() + (found.plan**2).sum() + 0.1 * of_potentials

    cost, direction = costs(*shape), torch.randn(shape, dtype=torch.float64)
    assert math.isclose(slope_along(loss, cost, direction), numeric(loss, cost, direction), rel_tol=1e-6, abs_tol=1e-8)


@everywhere
@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("mode", ["value", "implicit"])
def test_weights_through_a_softmax(n, side, mode):
    """Balanced weights have a derivative along directions that keep their sum."""
    cost, other = costs(2, n, n + 3), None
    size = n if side == "a" else n + 3
    pick = torch.randn(cost.shape, dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        weights = {side: logits.softmax(-1), "ab".replace(side, ""): other}
        found = ops.sinkhorn(cost, **weights, eps=0.2, max_iter=600, plan_grad="implicit")
        if mode == "value":
            return found.value.sum()
        of_potentials = (found.f**2).sum() + (found.g * pick[:, 0]).sum()
        return found.transport_cost.sum() + (found.plan * pick).sum() + of_potentials

    logits, direction = torch.randn(2, size, dtype=torch.float64), torch.randn(2, size, dtype=torch.float64)
    expected = numeric(loss, logits, direction)
    assert math.isclose(slope_along(loss, logits, direction), expected, rel_tol=1e-5, abs_tol=1e-8)


@everywhere
def test_masses_other_than_one():
    cost, weights = costs(2, 7, 5), torch.full((2, 7), 3 / 7, dtype=torch.float64)

    def loss(scale: Tensor) -> Tensor:
        b = torch.full((2, 5), 3 / 5, dtype=torch.float64)
        return ops.sinkhorn(cost, weights * scale, b * scale, eps=0.2, max_iter=300).value.sum()

    one = torch.ones((), dtype=torch.float64)
    assert math.isclose(slope_along(loss, one, one), numeric(loss, one, one), rel_tol=1e-6)


@everywhere
def test_the_envelope_is_off_at_an_early_stop_as_documented():
    """Its error has the size of the marginal error, and goes with it."""
    cost, direction = costs(1, 30, 20), torch.randn(1, 30, 20, dtype=torch.float64)
    errors = []
    for iterations in (1, 3, 10, 200):

        def loss(c: Tensor, iterations: int = iterations) -> Tensor:
            return ops.sinkhorn(c, eps=0.05, max_iter=iterations).value.sum()

        errors.append(abs(slope_along(loss, cost, direction) - numeric(loss, cost, direction)))
    assert errors[0] > 1e-4 and errors[-1] < 1e-8 and errors[1] > errors[2] > errors[3]


@everywhere
@pytest.mark.parametrize("shape", [(5, 49, 4), (2, 40, 50)], ids=str)
def test_detached_is_plots_choice(shape):
    cost = costs(*shape, dtype=torch.float32)
    leaf, same = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    found = ops.sinkhorn(leaf, eps=0.1)
    plan, transport = baselines.plot_loop(same, 0.1, 100, threshold=0.0)
    torch.testing.assert_close(found.plan, plan, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found.transport_cost, transport)
    (slope,) = torch.autograd.grad(found.transport_cost.sum(), leaf)
    torch.testing.assert_close(slope, torch.autograd.grad(transport.sum(), same)[0], rtol=1e-4, atol=1e-8)
    assert not found.plan.requires_grad and not found.f.requires_grad and not found.g.requires_grad


@everywhere
def test_implicit_is_unrolled_when_converged():
    cost, pick = costs(2, 20, 30), torch.randn(2, 20, 30, dtype=torch.float64)
    leaf, same = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    found = ops.sinkhorn(leaf, eps=0.2, max_iter=300, plan_grad="implicit")
    plan, transport = baselines.log_domain(same, 0.2, 300)
    mine = torch.autograd.grad((found.plan * pick).sum() + found.transport_cost.sum(), leaf)[0]
    unrolled = torch.autograd.grad((plan * pick).sum() + transport.sum(), same)[0]
    torch.testing.assert_close(mine, unrolled, rtol=1e-7, atol=1e-10)


@everywhere
@pytest.mark.parametrize("field", ["value", "transport_cost", "plan", "f"])
def test_a_second_derivative_raises(field):
    leaf = costs(1, 4, 3).requires_grad_()
    found = getattr(ops.sinkhorn(leaf, eps=0.3, plan_grad="implicit"), field)
    (slope,) = torch.autograd.grad((found**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="sinkhorn_solve: backward of backward is not available"):
        slope.sum().backward()


@everywhere
@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_a_bad_problem_has_no_gradient(n, rho):
    """Through none of the results, and those beside it keep theirs."""
    cost, weights = costs(3, n, n), torch.full((3, n), 1 / n, dtype=torch.float64)
    for spoil in ("cost", "a", "b"):
        leaves = {"cost": cost.clone(), "a": weights.clone(), "b": weights.clone()}
        leaves[spoil][1].view(-1)[2] = math.nan if spoil != "a" else -0.1
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        found = ops.sinkhorn(**leaves, eps=0.2, max_iter=300, rho=rho, plan_grad="implicit")
        every = (found.plan**2).sum() + found.value.sum() + found.transport_cost.sum() + (found.f + found.g).sum()
        for name, slope in zip(leaves, torch.autograd.grad(every, list(leaves.values()))):
            assert not slope[1].any(), f"{name} beside a bad {spoil}"
            assert slope[::2].isfinite().all() and slope[::2].any(), f"{name} beside a bad {spoil}"


def slopes_of_transport(cost: Tensor, **options) -> Tensor:
    leaf = cost.clone().requires_grad_()
    found = ops.sinkhorn(leaf, plan_grad="implicit", **options)
    pick = torch.linspace(-1, 1, cost.numel(), dtype=cost.dtype).view(cost.shape).sin()
    return torch.autograd.grad(found.transport_cost.sum() + (found.plan * pick).sum(), leaf)[0]


@everywhere
@pytest.mark.parametrize("shape", [(2, 40, 30), (2, 30, 45), (1, 90, 80), (1, 75, 130), (2, 49, 4)], ids=str)
@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("eps", [0.02, 0.002])
def test_implicit_is_exact_where_the_system_is_nearly_singular(shape, rho, eps):
    """At small eps the plan falls apart into clusters that hardly exchange mass; a solver of the whole system is the
    truth."""
    torch.manual_seed(5)
    cost = costs(*shape)
    cost[:, shape[1] // 3 :, : shape[2] // 2] += 0.5
    options = {"eps": eps, "max_iter": 200, "rho": rho}
    truth = slopes_of_transport(cost, backend="reference", **options)
    found = slopes_of_transport(cost, **options)
    assert (found - truth).abs().max() < 1e-10 * truth.abs().max()
    single = slopes_of_transport(cost.float(), **options).double()
    assert (single - truth).abs().max() < 1e-2 * truth.abs().max()


def test_implicit_above_the_size_that_is_factorised():
    torch.manual_seed(6)
    cost = costs(1, 520, 515)
    truth, found = (slopes_of_transport(cost, eps=0.3, max_iter=60, backend=b) for b in ("reference", None))
    assert (found - truth).abs().max() < 1e-8 * truth.abs().max()
    with pytest.warns(UserWarning, match="sinkhorn: implicit gradient: expected conjugate gradients.* 1 of 1"):
        slopes_of_transport(cost, eps=3e-4, max_iter=10)


# --- warm start, eps-scaling ------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("shape", [(3, 20, 15), (2, 60, 80)], ids=str)
def test_a_warm_start_goes_on_where_it_was(shape):
    cost = costs(*shape)
    first, whole = ops.sinkhorn(cost, eps=0.05, max_iter=20), ops.sinkhorn(cost, eps=0.05, max_iter=50)
    for init in (first, first.g):
        second = ops.sinkhorn(cost, eps=0.05, max_iter=30, init=init)
        torch.testing.assert_close(second.plan, whole.plan, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(second.value, whole.value, rtol=1e-12, atol=1e-12)
    near = ops.sinkhorn(cost + 1e-3 * torch.rand(shape), eps=0.05, tol=1e-4, max_iter=1000, init=whole)
    cold = ops.sinkhorn(cost, eps=0.05, tol=1e-4, max_iter=1000)
    assert (near.n_iter <= cold.n_iter).all() and near.n_iter.sum() < cold.n_iter.sum()


@everywhere
def test_eps_scaling_ends_in_the_same_plan_sooner():
    torch.manual_seed(3)
    cost = costs(2, 40, 40) ** 2
    options = {"tol": 1e-6, "max_iter": 20000}
    scaled = ops.sinkhorn(cost, eps=[1.0, 0.3, 0.1, 0.03, 0.01], max_iter=100)
    truth = ops.sinkhorn(cost, eps=0.01, **options)
    cold = ops.sinkhorn(cost, eps=0.01, max_iter=100)
    off = [(r.plan - truth.plan).abs().sum((-1, -2)).max() for r in (scaled, cold)]
    assert off[0] < off[1]
    assert torch.equal(ops.sinkhorn(cost, eps=[0.2], max_iter=10).value, ops.sinkhorn(cost, eps=0.2, max_iter=10).value)


@pytest.mark.parametrize("form", [baselines.log_domain, baselines.kernel_space, baselines.kernel_space_sums])
def test_baselines_compute_the_same(form):
    cost = costs(3, 12, 7)
    plan, transport = form(cost, 0.1, 40)
    found = ops.sinkhorn(cost, eps=0.1, max_iter=40)
    torch.testing.assert_close(found.plan, plan, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.transport_cost, transport, rtol=1e-10, atol=1e-14)


@everywhere
def test_implicit_gradient_beside_a_row_without_mass():
    """In float32 the plan of a row at cost 100 vanishes; the other rows keep their gradient."""
    cost = costs(1, 40, 30)
    cost[:, 0] = 100
    pick = torch.randn(40, 30, dtype=torch.float64)

    def slope(dtype: torch.dtype) -> Tensor:
        leaf = cost.to(dtype, copy=True).requires_grad_()
        plan = ops.sinkhorn(leaf, eps=0.1, max_iter=300, rho=1.0, plan_grad="implicit").plan
        return torch.autograd.grad((plan * pick.to(dtype)).sum(), leaf)[0].double()

    truth = slope(torch.float64)
    assert truth.abs().max() > 1e-4
    assert (slope(torch.float32) - truth).abs().max() < 1e-3 * truth.abs().max()
