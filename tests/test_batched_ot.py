"""Properties of `sinkhorn` that the generic tests do not see: accuracy at hard eps, masks, statuses, batch-mates."""

import math

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.ops.batched_ot import BAD_NUMBERS, NOT_CONVERGED, UNEQUAL_MASSES
from pyml.reference import batched_ot as reference

OP = ops.OPS["sinkhorn_solve"]

pytestmark = pytest.mark.kernels
everywhere = pytest.mark.usefixtures("kernel", "on_device")

FIELDS = ("value", "transport_cost", "f", "g", "row_mass", "n_iter", "status")
SIZES = ((49, 4), (196, 16), (16, 30), (64, 64), (40, 150), (3, 200))


def costs(*shape: int, dtype: torch.dtype = torch.float32, low: float = 0.59, high: float = 1.44) -> Tensor:
    return (torch.rand(*shape, dtype=torch.float64) * (high - low) + low).to(dtype)


def solved(cost: Tensor, eps: float, max_iter: int, **options) -> tuple[Tensor, ...]:
    """The reference in float64 on the same numbers."""
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
    given = {"a": None, "b": None, "init": None, **wide}
    return reference.sinkhorn_solve(cost.double(), given.pop("a"), given.pop("b"), given.pop("init"), eps, max_iter,
                                    **given)  # fmt: skip


def plan_of(cost: Tensor, found: tuple[Tensor, ...], eps: float, a=None, b=None) -> Tensor:
    return reference.sinkhorn_plan(cost.double(), a, b, found[2].double(), found[3].double(), eps)


def same_bits(one: ops.SinkhornResult, other: ops.SinkhornResult, rows: slice | None = None) -> None:
    for name in FIELDS:
        x, y = getattr(one, name), getattr(other, name)[rows or slice(None)]
        assert torch.equal(x.nan_to_num(7e9) if x.is_floating_point() else x,
                           y.nan_to_num(7e9) if y.is_floating_point() else y), name  # fmt: skip


# --- accuracy ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize(("eps", "plan_bound"), [(0.1, 1e-5), (0.01, 1e-5), (1e-3, 3e-4)])
def test_close_to_float64_after_the_same_iterations(n, m, eps, plan_bound):
    """At eps 1e-3, where float32 cannot hold f / eps, at least closer than torch in float32."""
    cost = costs(17, n, m)
    for iterations in (1, 6, 100):
        found = ops.sinkhorn(cost, eps=eps, max_iter=iterations)
        truth, torch32 = (
            solved(cost, eps, iterations),
            reference.sinkhorn_solve(cost, None, None, None, eps, iterations),
        )
        exact = plan_of(cost, truth, eps)
        off = (found.plan.double() - exact).abs().sum((-1, -2)) / exact.sum((-1, -2))
        assert off.max() < plan_bound, f"plan after {iterations} iterations"
        for name, place in (("value", 0), ("transport_cost", 1)):
            got, plain = getattr(found, name).double(), torch32[place].double()
            off, allowed = ((t - truth[place]).abs().max() / truth[place].abs().max() for t in (got, plain))
            assert off < (max(1e-6, 2 * allowed) if eps < 0.01 else 1e-6), f"{name} after {iterations} iterations"
        assert not found.status.any() and (found.n_iter == iterations).all()


@everywhere
@pytest.mark.parametrize(("n", "m"), [(196, 16), (64, 64), (12, 9)])
def test_thousands_of_iterations_at_eps_a_thousandth(n, m):
    """Sums underflow, in float32 most of them, and are taken as log-sum-exps."""
    cost = costs(2, n, m, dtype=torch.float64, low=0.0, high=1.0)
    found, truth = ops.sinkhorn(cost, eps=1e-3, max_iter=2000), solved(cost, 1e-3, 2000)
    torch.testing.assert_close(found.value, truth[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.plan, plan_of(cost, truth, 1e-3), rtol=1e-6, atol=1e-10)
    low = ops.sinkhorn(cost.float(), eps=1e-3, max_iter=2000)
    torch.testing.assert_close(low.value.double(), truth[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(low.plan.sum(-2), torch.full((2, m), 1 / m), rtol=1e-3, atol=0.0)


@everywhere
@pytest.mark.parametrize(("n", "m"), [(6, 5), (40, 60)])
def test_far_costs_and_offsets(n, m):
    """Costs up to 1e6 times eps; a constant on all costs moves the value and nothing else."""
    cost = 1e3 * costs(4, n, m, dtype=torch.float64, low=0.0)
    found, truth = ops.sinkhorn(cost, eps=1e-3, max_iter=40), solved(cost, 1e-3, 40)
    torch.testing.assert_close(found.value, truth[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.g, truth[3], rtol=1e-9, atol=1e-9)
    one, two = ops.sinkhorn(costs(4, n, m), eps=0.1), ops.sinkhorn(costs(4, n, m) * 0 + 3, eps=0.1)
    torch.testing.assert_close(two.value, torch.full((4,), 3.0))
    assert one.plan.isfinite().all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_that_of_the_input_alone(dtype):
    cost = costs(5, 49, 4).to(dtype)
    low, full = ops.sinkhorn(cost, eps=0.01), ops.sinkhorn(cost.float(), eps=0.01)
    assert low.f.dtype == torch.float32 and torch.equal(low.f, full.f) and torch.equal(low.g, full.g)
    for name in ("value", "transport_cost"):  # numbers of float32, not of the cost's dtype
        assert getattr(low, name).dtype == torch.float32 and torch.equal(getattr(low, name), getattr(full, name)), name
    assert low.plan.dtype == dtype
    torch.testing.assert_close(low.plan.float(), full.plan, rtol=1e-2, atol=1e-6)


def test_the_process_keeps_its_denormal_numbers():
    ops.sinkhorn(costs(3, 20, 20), eps=0.1)
    assert torch.tensor([1e-40]).mul(1.0).item() != 0.0


@everywhere
def test_scalings_of_doubles_far_apart():
    """Blocks of costs 1 and 2 at eps 0.005: scalings drift beyond what a float could hold, and no mass is lost."""
    cost = torch.zeros(1, 40, 40, dtype=torch.float64)
    cost[:, :8, 20:], cost[:, 8:, 20:] = 1, 2
    found, truth = ops.sinkhorn(cost, eps=0.005, max_iter=200), solved(cost, 0.005, 200)
    exact = plan_of(cost, truth, 0.005)
    assert (found.plan - exact).abs().sum() < 1e-9 * exact.sum()
    for name, place in (("f", 2), ("g", 3)):
        assert torch.allclose(getattr(found, name), truth[place], rtol=1e-9, atol=1e-9), name


def test_one_large_problem():
    """2000 x 2000, for which no speed is claimed; its gradient needs no second matrix beside itself."""
    cost = costs(1, 2000, 2000)
    leaf = cost.clone().requires_grad_()
    found, truth = ops.sinkhorn(leaf, eps=0.05, max_iter=2), solved(cost, 0.05, 2)
    exact = plan_of(cost, truth, 0.05)
    (slope,) = torch.autograd.grad(found.value.sum(), leaf)
    for plan in (found.plan, slope):
        assert (plan - exact).abs().sum() < 1e-5 * exact.sum()
    assert (found.value.double() - truth[0]).abs() < 1e-6 * truth[0]


# --- one problem at a time --------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("options", [{}, {"tol": 1e-4}, {"rho": 0.5, "tol": 1e-4}], ids=str)
def test_batch_mates_change_no_bit(n, m, options):
    cost = torch.cat([costs(20, n, m), 30 * costs(13, n, m, low=0.0), costs(4, n, m) * 0])
    together = ops.sinkhorn(cost, eps=0.02, max_iter=60, **options)
    for rows in (slice(0, 1), slice(5, 22), slice(19, 37), slice(36, 37)):
        same_bits(ops.sinkhorn(cost[rows], eps=0.02, max_iter=60, **options), together, rows)


@everywhere
@pytest.mark.parametrize(("n", "m"), [(7, 5), (40, 60), (100, 20)])
def test_bad_numbers_stay_in_their_problem(n, m):
    cost = costs(19, n, m)
    good = ops.sinkhorn(cost, eps=0.1)
    spoilt = cost.clone()
    spoilt[3, 1, 2], spoilt[9, 0, 0], spoilt[18, n - 1, m - 1] = math.nan, math.inf, -math.inf
    leaf = spoilt.clone().requires_grad_()
    found = ops.sinkhorn(leaf, eps=0.1)
    bad = torch.tensor([i in (3, 9, 18) for i in range(19)])
    assert torch.equal(found.status, torch.where(bad, BAD_NUMBERS, 0).int())
    assert found.value[bad].isnan().all() and found.f[bad].isnan().all() and found.g[bad].isnan().all()
    for name in FIELDS:
        assert torch.equal(getattr(found, name)[~bad], getattr(good, name)[~bad]), name
    assert torch.equal(found.plan[~bad], good.plan[~bad])
    (slope,) = torch.autograd.grad(found.value[~bad].sum(), leaf)
    assert not slope[bad].any() and slope.isfinite().all() and slope[~bad].any()
    with pytest.raises(ValueError, match=r"sinkhorn: cost, a, b: expected finite costs.*status 4 at 3"):
        ops.sinkhorn(spoilt, eps=0.1, strict=True)


@everywhere
@pytest.mark.parametrize("n", [6, 40])
def test_weights_that_are_none(n):
    a = torch.full((4, n), 1 / n)
    a[1, 0], a[2, 0] = -a[1, 0], math.nan
    found = ops.sinkhorn(costs(4, n, n), a, eps=0.1)
    assert found.status.tolist() == [0, BAD_NUMBERS | 0, BAD_NUMBERS, 0]
    assert found.value[1:3].isnan().all() and found.value[::3].isfinite().all()


@everywhere
@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_start_that_is_no_number(n, odd):
    """It spoils its problem, unless it stands where something is masked."""
    cost, start, b = costs(4, n, n), torch.rand(4, n) * 0.1, torch.full((4, n), 1 / (n - 1))
    b[:, 2] = 0
    good = ops.sinkhorn(cost, b=b, init=start, eps=0.1, max_iter=10)
    start[0, 2], start[1, 3], start[3, 2] = odd, odd, -odd
    found = ops.sinkhorn(cost, b=b, init=start, eps=0.1, max_iter=10)
    assert found.status.tolist() == [0, BAD_NUMBERS, 0, 0] and found.g[1].isnan().all()
    assert torch.equal(found.g[[0, 2, 3]], good.g[[0, 2, 3]]) and torch.equal(found.value[0], good.value[0])
    again = ops.sinkhorn(cost, b=b, init=found, eps=0.1, max_iter=10)
    assert again.status.tolist() == found.status.tolist()


@everywhere
@pytest.mark.parametrize("size", [(3, 2), (40, 45)])
def test_unbalanced_sums_below_what_is_kept_of_the_matrix(size):
    """A light column meets its row cheaply, a heavy one at a cost that scalings alone would flush to 0; the strong
    damping of a small rho hides from the scalings how small the sum is."""
    n, m = size
    cost, b = torch.zeros(17, n, m), torch.full((17, m), 1.0)
    b[:, 0], cost[:, 0, 1:] = 1e-30, 68.0
    options = {"eps": 1.0, "max_iter": 8, "rho": 0.05}
    found, exact = ops.sinkhorn(cost, b=b, **options), solved(cost, **options, b=b)
    for name, place in (("f", 2), ("g", 3), ("value", 0)):
        got = getattr(found, name).double()
        assert (got - exact[place]).abs().max() < 1e-5 * (1 + exact[place].abs().max()), name


@everywhere
@pytest.mark.parametrize("size", [(49, 4), (30, 20), (40, 90)])
@pytest.mark.parametrize("rho", [0.05, 100.0])
def test_an_unbalanced_value_keeps_its_digits(size, rho):
    """Its KL terms are differences of masses; they are summed in double whichever kernel runs."""
    n, m = size
    cost = costs(17, n, m)
    a, b = torch.rand(17, n) + 0.5, torch.rand(17, m) + 0.5
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    found, exact = ops.sinkhorn(cost, a, b, eps=0.1, rho=rho), solved(cost, 0.1, 100, a=a, b=b, rho=rho)
    assert ((found.value.double() - exact[0]).abs() < 1e-6 * exact[0].abs()).all()


@everywhere
@pytest.mark.parametrize("n", [6, 40])
def test_unequal_masses_are_marked(n):
    cost, a = costs(3, n, n), torch.full((3, n), 1 / n)
    a[1] *= 2
    found = ops.sinkhorn(cost, a, eps=0.1)
    assert found.status.tolist() == [0, UNEQUAL_MASSES, 0]
    torch.testing.assert_close(found.plan.sum(-2), torch.full((3, n), 1 / n))  # columns as asked for
    with pytest.raises(ValueError, match="status 2 at 1"):
        ops.sinkhorn(cost, a, eps=0.1, strict=True)
    assert not ops.sinkhorn(cost, a, eps=0.1, rho=1.0, strict=True).status.any()


@everywhere
def test_each_problem_stops_for_itself():
    easy, hard = costs(1, 20, 30), costs(1, 20, 30, low=0.0, high=20.0)
    found = ops.sinkhorn(torch.cat([easy, hard]), eps=0.2, tol=1e-5, max_iter=5000)
    assert found.n_iter[0] < found.n_iter[1] and not found.status.any()
    assert (found.n_iter % reference.CHECK_EVERY == 0).all() and (found.error <= 1.1e-5).all()
    late = ops.sinkhorn(hard, eps=0.2, tol=1e-5, max_iter=10)
    assert late.status.tolist() == [NOT_CONVERGED] and late.n_iter.tolist() == [10]


# --- masks ------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("size", [(9, 7), (50, 60)])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_a_ragged_batch_is_its_problems(size, rho):
    n, m = size
    cost = costs(6, n, m)
    rows, columns = torch.tensor([n, 3, 1, n - 2, 5, 2]), torch.tensor([m, m, 2, 1, m - 3, 4])
    padded = cost.clone()
    for q in range(6):  # what is masked is not looked at
        padded[q, rows[q] :], padded[q, :, columns[q] :] = math.nan, math.inf
    options = {"eps": 0.1, "max_iter": 30, "rho": rho, "plan_grad": "implicit"}
    leaf = padded.clone().requires_grad_()
    found = ops.sinkhorn(leaf, lengths=(rows, columns), **options)
    (slope,) = torch.autograd.grad(found.value.sum() + found.transport_cost.sum(), leaf)
    assert not found.status.any()
    for q in range(6):
        i, j = int(rows[q]), int(columns[q])
        alone = cost[q, :i, :j].clone().requires_grad_()
        one = ops.sinkhorn(alone, **options)
        torch.testing.assert_close(found.value[q], one.value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.plan[q, :i, :j], one.plan, rtol=1e-5, atol=1e-7)
        assert not found.plan[q, i:].any() and not found.plan[q, :, j:].any()
        assert not found.f[q, i:].any() and not found.g[q, j:].any() and not slope[q, i:].any()
        (expected,) = torch.autograd.grad(one.value + one.transport_cost, alone)
        torch.testing.assert_close(slope[q, :i, :j], expected, rtol=1e-4, atol=1e-6)
    on = torch.arange(n) < rows.unsqueeze(-1), torch.arange(m) < columns.unsqueeze(-1)
    same_bits(found, ops.sinkhorn(padded, mask=on, **options))
    weights = [live / live.sum(-1, keepdim=True) for live in on]
    same_bits(found, ops.sinkhorn(padded, *weights, **options))


@everywhere
@pytest.mark.parametrize("n", [5, 40])
def test_all_masked_gives_zero(n):
    leaf = torch.full((3, n, n), math.nan, requires_grad=True)
    off = torch.zeros(3, n, dtype=torch.bool)
    found = ops.sinkhorn(leaf, mask=(off, off), eps=0.1, plan_grad="implicit")
    (slope,) = torch.autograd.grad(found.value.sum() + found.transport_cost.sum() + found.plan.sum(), leaf)
    for t in (found.value, found.transport_cost, found.f, found.g, found.plan, found.status, found.n_iter, slope):
        assert not t.any()


@everywhere
@pytest.mark.parametrize(("n", "m"), [(7, 3), (40, 50)])
def test_no_plan_without_potentials(n, m):
    """NaN where something counts, 0 where it is masked; the problems beside it keep theirs."""
    cost, b = costs(5, n, m), torch.full((5, m), 1 / (m - 1))
    b[:, 1] = 0
    found = ops.sinkhorn(cost, b=b, eps=0.2, max_iter=10)
    f, g = found.f.clone(), found.g.clone()
    f[1, 0], g[2, 0], f[3, 2] = math.nan, math.inf, -math.inf
    plan = ops.sinkhorn_plan(cost, None, b, f, g, 0.2)
    assert torch.equal(plan[::4], found.plan[::4]) and not plan[:, :, 1].any()
    assert plan[1:4, :, [0, 2]].isnan().all()


# --- layouts ----------------------------------------------------------------------------------------------------------


@everywhere
def test_plot_costs_are_read_where_they_lie():
    """Similarities [B, M, K, N] of one matrix product, as B * K problems of M x N."""
    sim = costs(3, 49, 5, 4)
    view = sim.permute(0, 2, 1, 3)
    same_bits(ops.sinkhorn(view, eps=0.1), ops.sinkhorn(view.contiguous(), eps=0.1))
    big = costs(2, 100, 3, 60).permute(0, 2, 3, 1)
    same_bits(ops.sinkhorn(big, eps=0.1), ops.sinkhorn(big.contiguous(), eps=0.1))
