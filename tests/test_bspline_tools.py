"""Regularisers, pruning and plots of the B-spline layers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pyml.nn import KAN, WKAN, KANConv2d, KANLinear, WKANLinear
from tests.test_bspline_layers import LAYERS, spread


def l1_and_entropy(size: Tensor) -> tuple[Tensor, Tensor]:
    share = size / size.sum()
    return size.sum(), -(share * share.log()).sum()


@pytest.mark.parametrize("kind", LAYERS)
def test_regularisers(kind, device):
    layer = kind(4, 3, device=device)
    spread(layer)
    x = torch.randn(30, 4, device=device)
    for form, size in ((None, layer.spline_weight.abs().mean(-1)), (x, layer.edge_activations(x).abs().mean(0))):
        l1, entropy = l1_and_entropy(size)
        torch.testing.assert_close(layer.regularization_loss(1.0, 0.0, x=form), l1)
        torch.testing.assert_close(layer.regularization_loss(0.5, 2.0, x=form), 0.5 * l1 + 2 * entropy)


@pytest.mark.parametrize("form", ["weight", "activation"])
@pytest.mark.parametrize("zeros", ["some", "all"])
def test_regularisers_of_empty_edges_stay_finite(form, zeros):
    layer = KANLinear(3, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p[0 if zeros == "some" else slice(None)] = 0
    x = torch.randn(10, 3) if form == "activation" else None
    loss = layer.regularization_loss(x=x)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_network_regularisers_see_each_layers_own_input():
    net = KAN([3, 4, 2])
    x = torch.randn(20, 3)
    hidden = net.layers[0](x)
    expected = net.layers[0].regularization_loss(x=x) + net.layers[1].regularization_loss(x=hidden)
    torch.testing.assert_close(net.regularization_loss(x=x), expected)
    weight_form = sum(layer.regularization_loss(0.3, 0.2) for layer in net.layers)
    torch.testing.assert_close(net.regularization_loss(0.3, 0.2), weight_form)


@pytest.mark.parametrize("kind", LAYERS)
def test_prune_removes_small_edges(kind, device):
    layer = kind(6, 5, device=device)
    x = torch.randn(200, 6, device=device)
    sizes = layer.edge_sizes(x)
    torch.testing.assert_close(sizes, layer.edge_activations(x).abs().mean(0))
    threshold = float(sizes.median())
    before = layer.edge_activations(x)
    mask = layer.prune(threshold, x)
    assert torch.equal(mask, sizes >= threshold) and 0 < int(mask.sum()) < mask.numel()
    after = layer.edge_activations(x)
    assert (after[:, ~mask] == 0).all() and torch.equal(after[:, mask], before[:, mask])
    layer(x).square().sum().backward()
    if kind is KANLinear:  # a pruned spline stays 0 in training
        assert (layer.spline_weight.grad[~mask] == 0).all()
    assert (layer.spline_scaler.grad[~mask] == 0).all() or kind is WKANLinear


@pytest.mark.parametrize("kind", [KAN, WKAN])
def test_pruned_network_is_smaller_and_equal_where_nothing_was_lost(kind):
    net = kind([4, 6, 5, 2])
    spread(net)
    with torch.no_grad():
        for dead in (1, 4):  # two hidden units that nobody feeds, and that therefore must not be read either
            net.layers[0].base_weight[dead] = 0
            net.layers[0].spline_scaler[dead] = 0
            net.layers[1].base_weight[:, dead] = 0
            net.layers[1].spline_scaler[:, dead] = 0
        net.layers[2].base_weight[:, 3] = 0  # one hidden unit that nobody reads
        net.layers[2].spline_scaler[:, 3] = 0
    x = torch.randn(50, 4)
    for data in (None, x):
        small = net.prune(1e-6, data)
        assert [layer.in_features for layer in small.layers] == [4, 4, 4] and small.layers[-1].out_features == 2
        torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
        assert [layer.in_features for layer in net.layers] == [4, 6, 5], "prune returns a copy"
        small(x).sum().backward()
        kind([4, 4, 4, 2]).load_state_dict(small.state_dict(), strict=True)
    with pytest.raises(ValueError, match=r"KAN: threshold: expected less than the largest edges \(.*\), got 1000"):
        net.prune(1000)


def test_pruning_removes_chains_of_units():
    """A unit without inputs takes along the unit that only it feeds."""
    net = KAN([2, 2, 2, 2, 1])
    spread(net)
    with torch.no_grad():
        for name, rows in ((0, 1), (1, 1), (2, 1)):
            layer = net.layers[name]
            layer.base_weight[rows, :], layer.spline_weight[rows, :] = 0, 0
            layer.base_weight[:, 1 if name else 0], layer.spline_weight[rows, 1] = 1, 0.5
        net.layers[0].base_weight[1], net.layers[0].spline_weight[1] = 0, 0
        net.layers[1].base_weight[1, 0], net.layers[1].spline_weight[1, 0] = 0, 0
        net.layers[2].base_weight[1, 0], net.layers[2].spline_weight[1, 0] = 0, 0
    small = net.prune(1e-6)
    assert [layer.in_features for layer in small.layers] == [2, 1, 1, 1]


def test_plot_draws_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    layer = KANLinear(3, 2)
    spread(layer)
    figure = layer.plot()
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert len(panels) == 3
    line = panels[2].get_lines()[1]
    x = torch.zeros(201, 3, dtype=torch.float64)
    x[:, 2] = torch.as_tensor(np.asarray(line.get_xdata()))
    expected = layer.edge_activations(x)[:, 1, 2].detach()
    assert np.allclose(line.get_ydata(), expected, atol=1e-5)
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    wide = WKAN([40, 30, 2]).plot(0)
    assert (
        sum(axis.get_visible() for axis in wide.axes) == 16 and "16 inputs and 8 outputs shown" in wide.get_suptitle()
    )
    assert len(KANConv2d(1, 2, 3).plot(features=[4], outputs=[1, 0]).axes[0].get_lines()) == 3
    with pytest.raises(ValueError, match=r"KANLinear: features: expected indices from 0 to 2, got \[3\]"):
        layer.plot(features=[3])
