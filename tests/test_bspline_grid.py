"""Knots and fits: the banded solver, refinement by knot insertion, grid updates that keep the function."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.nn import KAN, WKAN, KANConv2d, KANLinear, WKANLinear
from pyml.nn._banded import fit, gram_band, solve_banded

LAYERS = [KANLinear, WKANLinear]


def curves(layer: KANLinear | WKANLinear, x: Tensor) -> Tensor:
    """The spline part of every edge in float64, ``[N, out, in]``."""
    basis = ops.bspline_basis(
        x.double(), layer.grid.double(), order=layer.spline_order, extrapolation=layer.extrapolation
    )
    return torch.einsum("nib,oib->noi", basis, layer.scaled_spline_weight.detach().double())


def spread(layer: KANLinear | WKANLinear) -> None:
    """Coefficients of order 1, so that a changed function shows."""
    with torch.no_grad():
        layer.spline_weight.normal_()


def everywhere(layer: KANLinear | WKANLinear) -> Tensor:
    """Points inside the grid, in its extension, beyond it, and on every knot (the last but one ulp), ``[N, in]``."""
    low, high = layer.grid[:, 0], layer.grid[:, -1]
    share = torch.linspace(-0.2, 1.2, 401, device=low.device, dtype=low.dtype).unsqueeze(1)
    return torch.cat([torch.lerp(low, high, share), layer.grid.T])


# --- the solver ------------------------------------------------------------------------------------------------------


def banded_system(device: str, features: int = 4, n: int = 50, nb: int = 11, k: int = 3) -> tuple[Tensor, Tensor]:
    grid = torch.linspace(-1.7, 1.7, nb + k + 1, dtype=torch.float64)
    x = 2 * torch.rand(n, features, dtype=torch.float64) - 1
    return ops.bspline_basis(x, grid, order=k).to(device), torch.randn(n, features, 3, dtype=torch.float64).to(device)


def test_banded_solution_is_the_dense_one(device):
    basis, y = banded_system(device)
    dense = torch.einsum("nia,nib->iab", basis, basis)
    ridge = 1e-6
    full = dense + ridge * dense.diagonal(dim1=1, dim2=2).amax(1)[:, None, None] * torch.eye(11, device=device).double()
    rhs = torch.einsum("nib,nim->ibm", basis, y)
    expected = torch.linalg.solve(full, rhs)
    torch.testing.assert_close(solve_banded(gram_band(basis, 3), rhs, ridge), expected, rtol=1e-9, atol=1e-9)


def test_fit_of_rank_deficient_data_is_the_minimum_norm_fit(device):
    """All data in the first third: most coefficients are free. torch's lstsq returns 100 % residuals here."""
    grid = torch.linspace(-1.9, 1.9, 20, dtype=torch.float64)
    x = -1 + 0.6 * torch.rand(200, 5, dtype=torch.float64)
    y = torch.sin(5 * x).unsqueeze(-1)
    basis = ops.bspline_basis(x, grid, order=3)
    coeff = fit(basis.to(device), y.to(device), 3).cpu()
    for i in range(5):
        expected = np.linalg.pinv(basis[:, i].numpy(), rcond=1e-4) @ y[:, i].numpy()
        residual, best = (
            np.linalg.norm(basis[:, i].numpy() @ c - y[:, i].numpy()) for c in (coeff[i].numpy(), expected)
        )
        assert residual <= 1.01 * best + 1e-6
        assert np.abs(coeff[i].numpy()).max() < 10 * np.abs(expected).max()
    assert torch.equal(fit(basis.to(device), y.to(device), 3).cpu(), coeff), "the same fit twice differs"


def test_a_feature_without_data_gets_zero(device):
    basis, y = banded_system(device)
    basis[:, 2] = 0
    coeff = fit(basis, y, 3)
    assert coeff.isfinite().all() and (coeff[2] == 0).all() and (coeff[1] != 0).all()


# --- refinement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("new", [5, 6, 10, 13])
def test_refine_does_not_change_the_function(kind, order, new, device):
    for extrapolation in ("zero", "clamp", "linear"):
        layer = kind(3, 2, 5, order, extrapolation=extrapolation, dtype=torch.float64, device=device)
        layer.grid = layer.grid.double()
        spread(layer)
        x = everywhere(layer)
        before = curves(layer, x)
        layer.refine_grid(new)
        assert layer.grid_size == new and layer.grid.shape == (3, new + 2 * order + 1)
        assert layer.spline_weight.shape[-1] == new + order and layer.spline_weight.requires_grad
        assert (layer.grid.diff() >= 0).all()
        assert (curves(layer, x) - before).abs().max() < 1e-12


@pytest.mark.parametrize("kind", LAYERS)
def test_refine_in_float32_changes_roundings_only(kind, device):
    layer = kind(4, 3, device=device)
    spread(layer)
    x = everywhere(layer)
    before = layer(x)
    layer.refine_grid(20)
    assert (layer(x) - before).abs().max() < 2e-6 * before.abs().max()
    steps = layer.grid[:, 3:-3].diff()
    assert (steps - 0.1).abs().max() < 1e-6, "a multiple of the old size stays equally spaced"
    assert torch.equal(layer.grid[:, :3], kind(1, 1).to(device).grid[:, :3].expand(4, -1)), "the outer knots moved"


@pytest.mark.parametrize("kind", LAYERS)
def test_refine_of_uneven_and_repeated_knots(kind, device):
    layer = kind(3, 2, 6, dtype=torch.float64, device=device)
    grid = torch.rand(3, 13, dtype=torch.float64).sort(1).values
    grid[1, 6] = grid[1, 5]  # a zero-width interval
    grid[2, :4], grid[2, -4:] = grid[2, 3], grid[2, -4]  # an open spline: end knots k + 1 times
    layer.grid = grid.to(device)
    spread(layer)
    x = everywhere(layer)[:-1]  # at a last knot that is repeated the curve jumps to 0 within one rounding
    x[-13:, 2] = x[-13:, 2].clamp(max=float(grid[2, -1]) - 1e-9)
    before = curves(layer, x)
    layer.refine_grid(11)
    assert (curves(layer, x) - before).abs().max() < 1e-9


def test_refined_networks_train_and_reload():
    net = KAN([2, 4, 1], grid_size=3)
    x = torch.rand(50, 2) * 2 - 1
    before = net(x)
    net.refine_grid(9)
    assert net.grid_size == 9
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    twin = KAN([2, 4, 1], grid_size=9)
    twin.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(twin(x), net(x))


def test_refine_keeps_a_frozen_parameter_frozen():
    layer = WKANLinear(2, 2)
    layer.spline_weight.requires_grad_(False)
    layer.refine_grid(8)
    assert not layer.spline_weight.requires_grad


@pytest.mark.parametrize("bad", [4, 7.0, "8"])
def test_refine_refuses_other_sizes(bad):
    with pytest.raises(ValueError, match=r"KANLinear: new_grid_size: expected an integer >= the grid size 5, got"):
        KANLinear(2, 2).refine_grid(bad)


# --- grid updates ----------------------------------------------------------------------------------------------------


def best_residual(old: KANLinear | WKANLinear, new: KANLinear | WKANLinear, x: Tensor) -> Tensor:
    """Root mean square of the part of the old curves that no coefficients over the new knots can give, ``[in]``."""
    basis = ops.bspline_basis(x.double(), new.grid.double(), order=new.spline_order).cpu().numpy()
    target = curves(old, x).cpu().numpy()
    rest = []
    for i in range(x.shape[1]):
        coeff = np.linalg.lstsq(basis[:, i], target[:, :, i], rcond=1e-12)[0]
        rest.append(np.sqrt(np.mean((basis[:, i] @ coeff - target[:, :, i]) ** 2)))
    return torch.tensor(rest)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("size", [5, 20])
def test_update_grid_is_the_best_fit_and_counts_the_scaler_once(kind, scale, size, device):
    layer = kind(4, 3, size, device=device)
    spread(layer)
    with torch.no_grad():
        layer.spline_scaler.fill_(scale)
    x = (0.4 * torch.randn(2000, 4)).to(device)
    old = copy.deepcopy(layer)
    layer.update_grid(x)
    change = (curves(layer, x) - curves(old, x)).square().mean((0, 1)).sqrt().cpu()
    floor = best_residual(old, layer, x)
    assert (change <= 1.001 * floor + 1e-5 * scale).all()
    assert torch.equal(layer.spline_scaler, old.spline_scaler)
    assert torch.equal(layer.base_weight, old.base_weight)
    assert (layer.outside_fraction(x) == 0).all()
    again = copy.deepcopy(old)
    again.update_grid(x)
    assert torch.equal(again.spline_weight, layer.spline_weight) and torch.equal(again.grid, layer.grid)


def test_update_grid_with_the_same_data_twice_changes_nothing():
    layer = KANLinear(4, 3)
    spread(layer)
    x = torch.randn(500, 4)
    layer.update_grid(x)
    once = copy.deepcopy(layer)
    layer.update_grid(x)
    assert torch.equal(layer.grid, once.grid)
    inside = torch.lerp(layer.grid[:, 3], layer.grid[:, -4], torch.linspace(0, 1, 200).unsqueeze(1))
    assert (curves(layer, inside) - curves(once, inside)).abs().max() < 1e-4  # coefficients of order 1, float32


def test_update_grid_places_the_knots_of_efficient_kan():
    layer = KANLinear(3, 2)
    x = torch.randn(300, 3)
    ordered = x.sort(0).values
    step = (ordered[-1] - ordered[0] + 0.02) / 5
    for i in range(3):
        uniform = ordered[0, i] - 0.01 + step[i] * torch.arange(6)
        quantiles = ordered[[0, 59, 119, 179, 239, 299], i]
        inner = 0.02 * uniform + 0.98 * quantiles
        left = inner[0] - step[i] * torch.tensor([3, 2, 1])
        right = inner[-1] + step[i] * torch.tensor([1, 2, 3])
        expected = torch.cat([left, inner, right])
        if i == 0:
            layer.update_grid(x)
        torch.testing.assert_close(layer.grid[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("extrapolation", ["zero", "clamp", "linear"])
def test_difficult_features_keep_their_curves(kind, extrapolation, device):
    """Constant, binary, 90 % zero, constant far outside, on knots: efficient-kan loses these splines or bends them."""
    layer = kind(6, 4, extrapolation=extrapolation, device=device)
    spread(layer)
    x = torch.rand(1000, 6) * 1.6 - 0.8
    x[:, 0] = 0.3
    x[:, 1] = (x[:, 1] > 0.3).float()
    x[:900, 2] = 0
    x[:, 3] = 7.5  # constant and far outside
    x[:, 4] = torch.tensor([-1, -0.6, -0.2, 0.2, 0.6]).repeat(200)
    x = x.to(device)
    old = copy.deepcopy(layer)
    layer.update_grid(x)
    assert layer.grid.isfinite().all() and layer.spline_weight.isfinite().all()
    assert (layer.grid.diff() > 0).all()
    change, size = (curves(layer, x) - curves(old, x)).abs().amax((0, 1)), curves(old, x).abs().amax((0, 1))
    assert torch.equal(layer.grid[0], old.grid[0]) and change[0] == 0, "a constant feature inside keeps its grid"
    assert layer.grid[3, 3] < 7.5 < layer.grid[3, -4] and change[3] < 1e-6 * (1 + size[3])
    for i in (1, 4):  # as many distinct values as the new curve can pass through
        assert change[i] < 1e-5 * size[i], i
    assert (layer.outside_fraction(x) == 0).all()
    # where there is no data the curve follows the old one, it does not fall to 0
    between = torch.full((1, 6), 0.5, device=device)
    assert (curves(layer, between) - curves(old, between)).abs()[:, :, 1].max() < 0.5 * curves(old, between).abs().max()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_update_grid_with_few_rows(rows):
    layer = KANLinear(5, 2)
    spread(layer)
    x = torch.rand(rows, 5) - 0.5
    old = copy.deepcopy(layer)
    layer.update_grid(x)
    assert (curves(layer, x) - curves(old, x)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_update_and_refine_in_other_dtypes(kind, dtype, device):
    layer = kind(4, 3, device=device).to(dtype)
    x = (0.5 * torch.randn(400, 4)).to(device, dtype)
    old = copy.deepcopy(layer)
    before = layer(x)
    layer.update_grid(x)
    layer.refine_grid(10)
    after = layer(x)
    assert after.dtype == dtype and after.isfinite().all()
    tolerance = 0.01 if dtype == torch.float64 else 0.03  # the refit's own change, and the roundings of 8 bits
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert layer.spline_weight.dtype == dtype and not torch.equal(layer.grid[:, 3], old.grid[:, 3])


def test_update_grid_takes_any_leading_dims_and_needs_finite_rows():
    layer, flat = KANLinear(3, 2), KANLinear(3, 2)
    flat.load_state_dict(layer.state_dict())
    x = torch.randn(4, 5, 3)
    layer.update_grid(x)
    flat.update_grid(x.reshape(-1, 3))
    assert torch.equal(layer.grid, flat.grid)
    state = copy.deepcopy(layer.state_dict())
    for bad, got in ((torch.full((4, 3), torch.nan), "NaN or infinity"), (torch.empty(0, 3), "no row")):
        with pytest.raises(ValueError, match=rf"KANLinear: x: expected at least one row of finite values, got {got}"):
            layer.update_grid(bad)
    with pytest.raises(ValueError, match=r"KANLinear: x: expected \[..., 3\], got \[4, 2\]"):
        layer.update_grid(torch.ones(4, 2))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items()), (
        "a refused call changed it"
    )


def test_networks_update_inside_forward():
    for kind in (KAN, WKAN):
        net = kind([3, 4, 2])
        x = 3 * torch.randn(200, 3)
        assert max(float(share.max()) for share in net.outside_fraction(x)) > 0.5
        y = net(x, update_grid=True)
        assert torch.equal(y, net(x))
        assert all((share == 0).all() for share in net.outside_fraction(x))


def test_convolutions_update_from_images():
    layer = KANConv2d(2, 3, 3, padding=1)
    image = 2 * torch.randn(2, 2, 9, 8)
    assert layer.outside_fraction(image).max() > 0.3
    layer.update_grid(image)
    assert (layer.outside_fraction(image) == 0).all()
    with pytest.raises(ValueError, match=r"KANConv2d: x: expected"):
        layer.update_grid(torch.randn(2, 3, 9, 8))
