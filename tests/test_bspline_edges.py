"""What the B-spline ops make of NaN, infinities and knots that are none."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyml.ops import bspline_basis, kan_linear, wkan_conv2d, wkan_linear
from pyml.reference import bspline as reference
from tests import test_bspline as family

grid_of, OP = family.grid_of, family.OP


def test_nan_inputs_stay_where_they_are(kernel, device):
    """A NaN spoils its own row and no other; it never leads out of bounds."""
    grid = grid_of("uniform", 5, 3, device, torch.float32)
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.zeros(33, 7, device=device)
        x[4, 2] = bad
        coeff = torch.ones(5, 7, 8, device=device)
        clean = kan_linear(torch.zeros_like(x), grid, coeff, torch.ones(5, 7, device=device))
        got = kan_linear(x, grid, coeff, torch.ones(5, 7, device=device))
        rows = torch.arange(33, device=device) != 4
        torch.testing.assert_close(got[rows], clean[rows])
        if math.isnan(bad):
            assert got[4].isnan().all()


@pytest.mark.parametrize("extrapolation", reference.EXTRAPOLATIONS)
@pytest.mark.parametrize("order", [1, 3])
def test_edges_of_floating_point(kernel, order, extrapolation, device):
    """NaN and infinities: the values of the reference, and NaN where it has NaN."""
    grid = grid_of("uneven", 5, order, device)
    x = torch.tensor([[math.nan], [0.1], [math.inf], [-math.inf]], dtype=torch.float64, device=device)
    for derivative in range(order + 1):
        options = {"order": order, "derivative": derivative, "extrapolation": extrapolation}
        got, truth = bspline_basis(x, grid, **options), reference.bspline_basis(x, grid, **options)
        if extrapolation == "linear" and derivative == 0:  # infinity times a slope, or times 0
            assert not got[2:].isfinite().any() and not truth[2:].isfinite().any()
            got, truth = got[:2], truth[:2]
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("extrapolation", ["zero", "linear"])
def test_nan_reaches_every_coefficient_of_its_feature(kernel, extrapolation, bad, device):
    """And no other, as in plain torch, where NaN times 0 is NaN. An infinite input does so where the spline goes on."""
    image = torch.linspace(-1, 1, 24, device=device).view(1, 2, 3, 4)
    image[0, 1, 1, 2] = bad
    rows = image.flatten(2).transpose(1, 2)  # a feature for each channel, a row for each pixel
    grid, scaler = grid_of("uniform", 5, 3, device, torch.float32), torch.rand(3, 8, device=device)
    kan, wkan, conv = (torch.rand(*size, 8, device=device, requires_grad=True) for size in ((3, 2), (2,), (8,)))
    kan_linear(rows, grid, kan, extrapolation=extrapolation).sum().backward()
    wkan_linear(rows, grid, wkan, None, scaler[:, :2], extrapolation=extrapolation).sum().backward()
    wkan_conv2d(image, grid, conv, None, scaler, kernel_size=2, extrapolation=extrapolation).sum().backward()
    spoiled = math.isnan(bad) or extrapolation == "linear"
    for clean, hit in (kan.grad.unbind(1), wkan.grad, conv.grad.view(2, 4, 8)):
        assert clean.isfinite().all()
        assert not hit.isfinite().any() if spoiled else hit.isfinite().all()


def test_gradients_of_a_relu_base_at_nan(kernel, device):
    """As torch: the slope of relu is 1 at NaN. The slope of a spline of order 1 does not depend on where x is."""
    x = torch.tensor([[math.nan], [0.0], [-1.0], [2.0]], device=device, requires_grad=True)
    grid, weight = grid_of("uniform", 5, 1, device, torch.float32), torch.full((1, 1), 3.0, device=device)
    kan_linear(x, grid, torch.zeros(1, 1, 6, device=device), weight, order=1, base="relu").sum().backward()
    leaf = x.detach().clone().requires_grad_()
    (F.relu(leaf) * weight).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)


def test_bad_knots_are_refused(kernel, device):
    """Not ascending, not finite, or so large that their differences overflow."""
    if device != "cpu":
        pytest.skip("reading the knots would make the GPU wait")
    x, good = torch.zeros(3, 1), torch.linspace(-8e37, 8e37, 12)
    torch.testing.assert_close(bspline_basis(x, good).sum(-1), torch.ones(3, 1))
    for bad in (good.flip(0), good * 3, torch.where(good > 7e37, math.inf, good), good.where(good < 7e37, math.nan)):
        for op, call in (
            ("bspline_basis", lambda grid: bspline_basis(x, grid)),
            ("kan_linear", lambda grid: kan_linear(x, grid, torch.zeros(1, 1, 8))),
            ("wkan_linear", lambda grid: wkan_linear(x, grid, torch.zeros(1, 8), None, torch.zeros(1, 1))),
        ):
            with pytest.raises(ValueError, match=f"{op}: grid: expected finite knots in ascending order, none beyond"):
                call(bad)
