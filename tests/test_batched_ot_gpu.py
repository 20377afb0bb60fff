"""The GPU kernels of optimal transport apart from the generic tests: large problems, strides, batch-mates, hard eps.

They run on Triton's interpreter (TRITON_INTERPRET=1), on the emulated CUDA kernels (tests/cuda_emulation.py), on a GPU
(--device cuda) and on the CPU kernels, of which they claim nothing else. `tight` makes the kernels hold next to
nothing, so that small problems take the way of large ones.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.ops.batched_ot import BAD_NUMBERS, NOT_CONVERGED, UNEQUAL_MASSES
from pyml.reference import batched_ot as reference
from pyml.testing import check
from tests.cases import samples
from tests.conftest import INTERPRETED
from tests.op_helpers import with_and_without_room
from tests.test_triton import compiled, interpret

OP = ops.OPS["sinkhorn_solve"]

pytestmark = pytest.mark.kernels

FIELDS = ("value", "transport_cost", "f", "g", "row_mass", "n_iter", "status")
CHECKED = ("smooth-unbalanced", "one-row", "float32-weights-late")


@compiled
def test_in_the_interpreter():
    interpret(__file__)


def hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyml.triton_kernels import batched_ot, batched_ot_host

    monkeypatch.setattr(batched_ot_host, "MOST_IN_REGISTERS", 0)
    monkeypatch.setattr(batched_ot, "BLOCK", 4)


tight = with_and_without_room(hold_little)


def costs(*shape: int, device: str, dtype: torch.dtype = torch.float64, high: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(*shape, generator=g, dtype=torch.float64) * high).to(device, dtype)


def solved(cost: Tensor, eps: float, max_iter: int, **options: Any) -> tuple[Tensor, ...]:
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in options.items()}
    given = [wide.pop(name, None) for name in ("a", "b", "init")]
    return reference.sinkhorn_solve(cost.double(), *given, eps, max_iter, **wide)


def same(found: ops.SinkhornResult, truth: tuple[Tensor, ...], bound: float) -> None:
    for name, want in zip(FIELDS, truth):
        got = getattr(found, name)
        if want.is_floating_point():
            torch.testing.assert_close(
                got.double(), want, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("sample", [s for s in samples(OP) if s.id in CHECKED], ids=lambda s: s.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_held_in_little_room(kernel, tight, device, sample, dtype):
    check(OP, sample, kernel, dtype, device)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (13, 6), (3, 4), (2, 19)])
@pytest.mark.parametrize("eps", [0.1, 0.01, 1e-3])
def test_each_eps(kernel, tight, device, n, m, eps):
    """Scalings, scalings that the potentials take up, log-sum-exps."""
    cost = costs(2, n, m, device=device)
    same(ops.sinkhorn(cost, eps=eps, max_iter=13), solved(cost, eps, 13), 1e-11)
    low = ops.sinkhorn(cost.float(), eps=eps, max_iter=13)
    same(low, solved(cost.float(), eps, 13), 1e-6 if eps > 1e-3 else 1e-5)


@pytest.mark.parametrize("options", [{"tol": 1e-2}, {"rho": 5.0, "tol": 1e-5}, {"tol": 1e-12}], ids=str)
def test_each_problem_stops_for_itself(kernel, tight, device, options):
    cost = torch.cat(
        [costs(2, 6, 5, device=device), costs(2, 6, 5, device=device, high=9.0), costs(1, 6, 5, device=device) * 0]
    )
    found = ops.sinkhorn(cost, eps=0.3, max_iter=22, **options)
    same(found, solved(cost, 0.3, 22, **options), 1e-11)
    assert found.n_iter[4] < found.n_iter[2:4].max()
    assert (
        options["tol"] > 1e-9
        or (found.status[2:] == torch.tensor([NOT_CONVERGED, NOT_CONVERGED, 0], device=device)).all()
    )
    for k in range(len(cost)):
        alone = ops.sinkhorn(cost[k], eps=0.3, max_iter=22, **options)
        for name in FIELDS:
            assert torch.equal(getattr(alone, name), getattr(found, name)[k]), name


def test_bad_masked_and_empty_problems(kernel, tight, device):
    """A NaN that counts spoils its problem, one that does not is not read; nothing to transport gives zeros."""
    cost = costs(6, 4, 5, device=device)
    cost[1, 2, 3], cost[2, 0, 1], cost[4, 3, 4] = math.nan, math.inf, math.nan
    a, b = torch.full((6, 4), 0.25, device=device).double(), torch.full((6, 5), 0.2, device=device).double()
    a[3], a[4] = 0, torch.tensor([0.5, 0.25, 0.25, 0], device=device)
    a[5, 0] = 0.75
    leaf = cost.clone().requires_grad_()
    found = ops.sinkhorn(leaf, a, b, eps=0.2, max_iter=7, plan_grad="implicit")
    same(found, solved(cost, 0.2, 7, a=a, b=b), 1e-11)
    assert found.status.tolist() == [0, BAD_NUMBERS, BAD_NUMBERS, 0, 0, UNEQUAL_MASSES]
    (slope,) = torch.autograd.grad(found.value.nan_to_num().sum() + found.transport_cost.nan_to_num().sum(), leaf)
    assert slope.isfinite().all() and not slope[1:4].any() and not slope[4, 3].any()
    assert slope[0].any() and slope[4, :3].all()


@pytest.mark.parametrize("dims", [1, 2, 3, 4], ids=lambda d: f"{d}-dims")
def test_costs_are_read_where_they_lie(kernel, device, dims):
    """Leading dimensions that lie apart, as those of PLOT's [B, M, K, N]; transposed costs."""
    shape = (2, 3, 2, 2)[:dims]
    plain = costs(*shape, 7, 3, device=device)
    order = [*reversed(range(dims)), dims + 1, dims]
    spread = torch.zeros(*[2 * plain.shape[d] for d in order], device=device, dtype=plain.dtype)
    view = spread[tuple(slice(None, None, 2) for _ in order)]
    view.copy_(plain.permute(order))
    view = view.permute([order.index(d) for d in range(dims + 2)])
    assert torch.equal(view, plain) and not view.is_contiguous()
    one, two = (ops.sinkhorn(t, eps=0.2, max_iter=6) for t in (plain, view))
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.plan, two.plan)


def test_more_leading_dimensions_than_a_kernel_follows(kernel, device):
    cost = costs(*[2] * 8, 3, 2, device=device).transpose(0, 7).transpose(1, 6).transpose(2, 5)
    one = ops.sinkhorn(cost, eps=0.3, max_iter=3)
    two = ops.sinkhorn(cost.contiguous(), eps=0.3, max_iter=3)
    assert torch.equal(one.value, two.value) and torch.equal(one.plan, two.plan)


@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m"), [(3, 300), (40, 260), (17, 129), (130, 5)])
def test_rows_of_several_spans(kernel, device, n, m, dtype):
    """More columns than lanes hold at once; gradients too."""
    cost = costs(1, n, m, device=device, dtype=dtype)
    leaves = [cost.clone().requires_grad_(), cost.double().requires_grad_()]
    found = ops.sinkhorn(leaves[0], eps=0.3, max_iter=25, plan_grad="implicit")
    truth = reference.sinkhorn_solve(leaves[1], None, None, None, 0.3, 25, implicit=True)
    bound = 2e-6 if dtype == torch.float32 else 1e-11
    same(found, tuple(t.detach() for t in truth), bound)
    slopes = [torch.autograd.grad(v.sum() + t.sum(), x)[0].double() for v, t, x in (
        (found.value, found.transport_cost, leaves[0]), (truth[0], truth[1], leaves[1]))]  # fmt: skip
    assert (slopes[0] - slopes[1]).abs().max() <= 10 * bound * slopes[1].abs().max()
