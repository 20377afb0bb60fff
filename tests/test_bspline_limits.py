"""B-spline layers at their limits: tiny and far data, NaN and no rows, 16-bit knots, the meta device, pruned edges."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pyml.nn import KAN, WKAN, KANConv2d, KANLinear, WKANLinear
from pyml.nn._knots import uniform_knots
from tests.test_bspline_layers import LAYERS, spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "width"), [(4e-7, 3e-7), (-3e-30, 6e-30), (1e-3, 1e-6), (1000.0, 0.5), (1.7e9, 1000.0), (-1e12, 1e9)]
)
def test_the_grid_follows_data_of_any_size(low, width, dtype, device):
    """Every row has its basis, and the knots lie as close as the data and the dtype of the grid allow."""
    layer = KANLinear(1, 2, device=device).to(dtype)
    x = (low + width * torch.rand(400, 1, dtype=torch.float64)).to(device)
    layer.update_grid(x, margin=0.0)
    assert (layer.grid.diff() > 0).all()
    torch.testing.assert_close(layer.b_splines(x.to(dtype)).sum(-1).double(), torch.ones_like(x), rtol=0, atol=1e-3)
    inner = float(layer.grid[0, -4] - layer.grid[0, 3])
    assert inner <= max(1.1 * width, 2000 * torch.finfo(dtype).eps * abs(low))
    if width > 100 * torch.finfo(dtype).eps * abs(low):
        assert inner >= 0.9 * width


@pytest.mark.parametrize("size", [1e-35, 1e-36, 1e-37, 1e-40, 1e-44])
def test_data_near_the_smallest_numbers_keeps_a_live_grid(size, device):
    layer = KANLinear(1, 2, device=device)
    x = size * (2 * torch.rand(400, 1, device=device) - 1)
    layer.update_grid(x, margin=0.0)
    torch.testing.assert_close(layer.b_splines(x).sum(-1), torch.ones_like(x), rtol=0, atol=1e-5)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.3, 7.5, -1.7e9])
def test_one_value_is_still_one_value(value, device):
    layer = KANLinear(1, 2, device=device)
    spread(layer)
    old = copy.deepcopy(layer)
    x = torch.full((50, 1), value, device=device)
    layer.update_grid(x)
    assert torch.equal(layer.grid, old.grid) == (abs(value) < 1)
    assert (layer.grid.diff() > 0).all() and (layer.outside_fraction(x) == 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_pruning_needs_finite_rows(kind):
    layer, network = kind(2, 3), (KAN if kind is KANLinear else WKAN)([2, 3, 1])
    state = copy.deepcopy(layer.state_dict())
    spoiled = torch.rand(10, 2)
    spoiled[3, 0] = torch.nan
    for x, got in ((spoiled, "NaN or infinity"), (torch.empty(0, 2), "no row")):
        for call in (layer.edge_sizes, lambda x: layer.prune(0.1, x), lambda x: network.prune(0.0, x)):
            with pytest.raises(ValueError, match=f"Linear: x: expected at least one row of finite values, got {got}$"):
                call(x)
    for each in (layer, network):
        with pytest.raises(ValueError, match=r"Linear: x: expected at least one row, got no row$"):
            each.regularization_loss(x=torch.empty(0, 2))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "scaled"), [(KANLinear, True), (KANLinear, False), (WKANLinear, True), (KANConv2d, True)]
)
def test_pruned_edges_stay_0_where_they_are_kept_so(kind, scaled):
    """Momentum from before, weight decay and gradients all move them; the parameters stay those of the optimizer."""
    torch.manual_seed(0)
    layer = kind(1, 3, 2) if kind is KANConv2d else kind(4, 3, enable_standalone_scale_spline=scaled)
    x = torch.randn(20, 1, 3, 3) if kind is KANConv2d else torch.randn(50, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()

    train(5)
    parameters = dict(layer.named_parameters())
    mask = layer.prune(float(layer.edge_sizes(x).median()), x)
    assert 0 < int(mask.sum()) < mask.numel()
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    freed = copy.deepcopy(layer.state_dict())
    train(50)
    assert layer.edge_sizes(x)[~mask].min() > 0, "without help they come back"
    layer.load_state_dict(freed)
    optimizer.register_step_post_hook(lambda *_: layer.keep_edges(mask))
    train(50)
    assert (layer.edge_activations(layer._rows(x))[:, ~mask] == 0).all()
    assert layer.edge_sizes(x)[mask].min() > 0


def test_knots_are_wide_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = KANLinear(2, 3, grid_size=20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.grid.dtype == torch.float32 and layer.spline_weight.dtype == torch.bfloat16
    assert torch.equal(layer.grid, KANLinear(2, 3, grid_size=20).grid)
    for low, high, size in ((-1, 1, 5), (-1, 1, 20), (0.1, 3.7, 7), (-1e-3, 2e5, 13)):  # the public codes' own formula
        expected = torch.arange(-3, size + 4) * ((high - low) / size) + low
        assert torch.equal(uniform_knots((low, high), size, 3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_knots_of_a_16_bit_checkpoint_are_widened(kind, dtype):
    layer = kind(2, 3)
    state = {name: value.to(dtype) for name, value in layer.state_dict().items()}
    for assign in (True, False):
        layer.load_state_dict(state, assign=assign)
        assert layer.grid.dtype == torch.float32 and torch.equal(layer.grid, state["grid"].float())
    network = KAN([2, 3, 1])
    network.load_state_dict({name: value.to(dtype) for name, value in network.state_dict().items()}, assign=True)
    assert {each.grid.dtype for each in network.layers} == {torch.float32}
    assert network(torch.rand(5, 2)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [KAN, WKAN])
def test_layers_from_the_meta_device_get_their_knots(kind, dtype):
    sizes, options = [2, 3, 1], {"grid_size": 7, "spline_order": 2, "grid_range": (-2, 3)}
    network = kind(sizes, **options, device="meta").to(dtype).to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in network.layers:
        layer.reset_parameters()
    torch.manual_seed(3)
    expected = kind(sizes, **options, dtype=dtype)
    for name, value in expected.to(dtype).state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    moved = expected.layers[0]
    moved.update_grid(torch.rand(50, 2, dtype=dtype))
    knots = moved.grid.clone()
    moved.reset_parameters()
    assert torch.equal(moved.grid, knots), "knots that follow the data stay there"


@pytest.mark.parametrize("memory", [0.0, 1e-40, torch.nan, torch.inf, "falling"])
def test_memory_that_nothing_was_written_to_holds_no_knots(memory):
    layer = KANLinear(2, 3)
    knots = layer.grid.clone()
    with torch.no_grad():
        layer.grid.copy_(knots.flip(1)) if memory == "falling" else layer.grid.fill_(memory)
    layer.reset_parameters()
    assert torch.equal(layer.grid, knots) and layer.spline_weight.isfinite().all()


@pytest.mark.parametrize(
    "activation",
    [lambda: nn.ELU(inplace=True), lambda: nn.ReLU(inplace=True), lambda: nn.Sequential(nn.Hardswish(inplace=True))],
    ids=["ELU", "ReLU", "inside"],
)
def test_no_activation_changes_the_input(activation):
    layer, conv = KANLinear(4, 3, base_activation=activation), KANConv2d(1, 2, 2, base_activation=activation)
    x, image = torch.randn(20, 4), torch.randn(2, 1, 5, 5)
    before = x.clone(), image.clone()
    with torch.no_grad():
        layer(x), layer.edge_sizes(x), layer.regularization_loss(x=x), conv(image), conv.edge_sizes(image)
    assert torch.equal(x, before[0]) and torch.equal(image, before[1])
    torch.testing.assert_close(layer.edge_activations(x).sum(-1), layer(x), rtol=1e-4, atol=1e-5)


def test_sizes_of_numpy_are_integers():
    two, three = np.int64(2), np.int32(3)
    layer = KANLinear(two, three, grid_size=three, spline_order=two, grid_range=(np.float32(-1), np.int64(1)))
    assert layer(torch.rand(4, 2)).shape == (4, 3) and layer.grid.shape == (2, 8)
    layer.refine_grid(np.int64(6))
    assert KAN([two, three, 1])(torch.rand(4, 2)).shape == (4, 1)
    assert KANConv2d(np.int64(1), two, 3)(torch.rand(1, 1, 4, 4)).shape == (1, 2, 2, 2)
    for layer in (WKANLinear(two, three), KANLinear(two, three)):
        layer.load_state_dict(type(layer)(2, 3).state_dict(), strict=True)
