"""KANLinear, WKANLinear, KANConv2d and their networks: values, state dicts, copies, options, wrong input."""

import copy
import io
import math
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from pyml import ops
from pyml.nn import KAN, WKAN, KANConv2d, KANLinear, WKANLinear

LAYERS = [KANLinear, WKANLinear]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def spread(module: nn.Module) -> None:
    """Coefficients of order 1, so that the spline part shows."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, KANLinear | WKANLinear):
                layer.spline_weight.normal_()


def by_scipy(layer: KANLinear | WKANLinear, x: Tensor) -> Tensor:
    """The layer's formula with every basis function taken from scipy, on the extended knots, in float64."""
    interpolate = pytest.importorskip("scipy.interpolate")
    grid, order = layer.grid.double().cpu().numpy(), layer.spline_order
    points = x.detach().double().cpu().numpy()
    basis = np.zeros((*points.shape, layer.grid_size + order))
    for i in range(points.shape[1]):
        for b in range(basis.shape[2]):
            element = interpolate.BSpline.basis_element(grid[i, b : b + order + 2], extrapolate=False)
            basis[:, i, b] = np.nan_to_num(element(points[:, i]))
    coeff = layer.spline_weight * (1 if layer.spline_scaler is None else layer.spline_scaler.unsqueeze(-1))
    spline = np.einsum("nib,oib->no", basis, coeff.detach().double().cpu().numpy())
    base = F.linear(layer.base_activation(x.detach().double()), layer.base_weight.detach().double())
    return base.cpu() + torch.from_numpy(spline)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_forward_is_the_formula(kind, order, size, device):
    layer = kind(5, 4, size, order, grid_range=[-1.5, 1]).to(device)
    spread(layer)
    x = 1.5 * torch.randn(200, 5, device=device)
    expected = by_scipy(layer, x)
    assert (layer(x).double().cpu() - expected).abs().max() < 3e-6 * expected.abs().max()
    edges = layer.edge_activations(x)
    assert edges.shape == (200, 4, 5)
    torch.testing.assert_close(edges.sum(-1), layer(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_leading_dims(kind, dtype, device):
    layer = kind(6, 3, device=device, dtype=dtype)
    assert layer.base_weight.dtype == dtype and layer.grid.dtype == torch.float32
    x = torch.rand(2, 3, 4, 6, device=device).to(dtype) - 0.5
    y = layer(x)
    assert y.shape == (2, 3, 4, 3) and y.dtype == dtype
    assert torch.equal(y[1, 2], layer(x[1, 2])) or (y[1, 2] - layer(x[1, 2])).abs().max() < 1e-6
    assert layer(x[0, 0, 0]).shape == (3,)
    assert layer(x[:0]).shape == (0, 3, 4, 3)
    full = copy.deepcopy(layer).double()(x.double())
    assert (y.double() - full).abs().max() <= 4 * torch.finfo(dtype).eps * full.abs().max() + 1e-6


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_every_parameter_and_twice(kind, device):
    layer = kind(3, 2, spline_order=2, device=device, dtype=torch.float64)
    layer.grid = layer.grid.double()
    spread(layer)
    x = (torch.rand(4, 3, dtype=torch.float64) * 1.8 - 0.9).to(device).requires_grad_()
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights))


def test_derivatives_when_the_coefficients_depend_on_the_input(device):
    """Each input of the op counts once, however the caller computed it: three derivatives against the reference."""
    found = {}
    for backend in (None, "reference"):
        x = torch.tensor([[0.31], [-0.57]], dtype=torch.float64, device=device, requires_grad=True)
        grid = torch.linspace(-2.2, 2.2, 13, dtype=torch.float64, device=device)
        coeff = torch.sin(torch.arange(8, dtype=torch.float64, device=device) * x.mean()).view(1, 1, 8)
        value = ops.kan_linear(x, grid, coeff, order=4, backend=backend).square().sum()
        found[backend] = []
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            found[backend].append(gradient.detach())
            value = gradient.square().sum()
    for ours, expected in zip(found[None], found["reference"]):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.GELU, nn.PReLU, nn.Sigmoid, nn.ReLU, nn.Tanh, nn.Identity])
@pytest.mark.parametrize("kind", LAYERS)
def test_any_base_activation(kind, activation, device):
    layer = kind(4, 3, base_activation=activation).to(device)
    spread(layer)
    x = torch.randn(50, 4, device=device)
    expected = by_scipy(copy.deepcopy(layer).double(), x)
    assert (layer(x).double().cpu() - expected).abs().max() < 3e-6 * expected.abs().max()
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert kind(4, 3, base_activation=activation).to(device)(x.bfloat16()).dtype == torch.bfloat16, "fp32 weights"


@pytest.mark.parametrize("kind", LAYERS)
def test_extrapolation(kind, device):
    far = torch.tensor([[-50.0], [-4.0], [-2.0], [2.0], [4.0], [50.0]], device=device)
    outputs = {}
    for mode in ("zero", "clamp", "linear"):
        layer = kind(1, 1, base_activation=nn.Identity, extrapolation=mode, device=device)
        torch.manual_seed(3)
        spread(layer)
        with torch.no_grad():
            layer.base_weight.zero_()
            layer.spline_scaler.fill_(1)
        outputs[mode] = layer(far).squeeze(1), layer(torch.tensor([[-1.0], [1.0]], device=device)).squeeze(1)
    (zero, _), (clamp, ends), (linear, _) = outputs.values()
    assert (zero[[0, 1, 4, 5]] == 0).all()
    torch.testing.assert_close(clamp, ends.repeat_interleave(3))
    left, right = linear[:3] - ends[0], linear[3:] - ends[1]
    torch.testing.assert_close(left, left[2] * torch.tensor([49.0, 3.0, 1.0], device=device), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, right[0] * torch.tensor([1.0, 3.0, 49.0], device=device), rtol=1e-4, atol=1e-4)
    assert left[2].abs() > 1e-3 and right[0].abs() > 1e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_outside_fraction(kind, device):
    layer = kind(3, 2, device=device)
    x = torch.tensor([[0.0, 1.5, 3.0], [0.0, -1.0, -3.0], [0.5, 1.0, 0.0], [-0.5, 2.0, 5.0]], device=device)
    assert layer.outside_fraction(x).tolist() == [0, 0.5, 0.75]
    assert layer.outside_fraction(x.reshape(2, 2, 3), inner=False).tolist() == [0, 0, 0.75]


# --- the public codes: initial values, state dicts -------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("size", [5, 20, 60])
@pytest.mark.parametrize("order", [2, 3, 5])
def test_initial_values_are_those_of_the_public_codes(kind, size, order):
    """Same seed, same draws; the splines are the minimum-norm fit, which torch's lstsq misses from G = 20 on."""
    torch.manual_seed(11)
    layer = kind(7, 3, size, order, scale_noise=0.3, scale_base=0.7, scale_spline=0.9)
    torch.manual_seed(11)
    base = nn.init.kaiming_uniform_(torch.empty(3, 7), a=math.sqrt(5) * 0.7)
    count = 3 if kind is KANLinear else 1
    noise = (torch.rand(size + 1, 7, count) - 0.5) * 0.3 / size
    scaler = nn.init.kaiming_uniform_(torch.empty(3, 7), a=math.sqrt(5) * 0.9)
    assert torch.equal(layer.base_weight, base) and torch.equal(layer.spline_scaler, scaler)
    basis = layer.b_splines(layer.grid.T[order:-order].double()).numpy()
    for i in range(7):
        expected = torch.from_numpy(np.linalg.pinv(basis[:, i]) @ noise[:, i].double().numpy()).T
        difference = (layer.spline_weight[:, i] - expected).abs().max()
        assert difference < 3e-5 * expected.abs().max()


def test_without_a_scaler():
    torch.manual_seed(0)
    layer = KANLinear(4, 3, scale_spline=2.0, enable_standalone_scale_spline=False)
    torch.manual_seed(0)
    plain = KANLinear(4, 3)
    torch.testing.assert_close(layer.spline_weight, 2 * plain.spline_weight, rtol=1e-6, atol=0)
    assert list(layer.state_dict()) == ["base_weight", "spline_weight", "grid"] and layer.spline_scaler is None
    x = torch.randn(9, 4)
    torch.testing.assert_close(layer(x).double(), by_scipy(layer, x), rtol=1e-5, atol=1e-5)
    layer.update_grid(x)
    layer.refine_grid(7)
    layer.prune(0.01)
    layer.select(torch.tensor([0]), torch.tensor([1, 2]))
    assert layer(x[:, 1:3]).shape == (9, 1)


def public_state(sizes: list[int], shared: bool, size: int = 5, order: int = 3) -> dict[str, Tensor]:
    """A checkpoint as efficient-kan (or the public SpectralKAN code) writes it, made by hand."""
    state: dict[str, Tensor] = {}
    for n, (a, b) in enumerate(pairwise(sizes)):
        knots = (torch.arange(-order, size + order + 1) * (2 / size) - 1).expand(a, -1).contiguous()
        state[f"layers.{n}.base_weight"] = torch.randn(b, a)
        state[f"layers.{n}.spline_weight"] = torch.randn(1 if shared else b, a, size + order)
        state[f"layers.{n}.spline_scaler"] = torch.randn(b, a)
        state[f"layers.{n}.grid"] = knots
    return state


@pytest.mark.parametrize("kind", [KAN, WKAN])
@pytest.mark.parametrize("size", [5, 9])
def test_checkpoints_load_both_ways(kind, size):
    state = public_state([6, 4, 2], kind is WKAN, size)
    net = kind([6, 4, 2], grid_size=size)
    ours = net.state_dict()
    assert set(ours) == set(state) and all(
        ours[k].shape == v.shape and ours[k].dtype == v.dtype for k, v in state.items()
    )
    assert all(torch.equal(ours[k], v) for k, v in state.items() if k.endswith("grid")), "the same knots bit for bit"
    net.load_state_dict(state, strict=True)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    x = torch.rand(20, 6) - 0.5
    expected = by_scipy(net.layers[1], by_scipy(net.layers[0], x))
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-4, atol=1e-4)


# --- moves and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: KAN([3, 4, 2]), lambda: WKAN([3, 4, 2]), lambda: KANConv2d(3, 2, 3)])
def test_copies_are_equal_and_independent(make):
    module = make()
    x = torch.randn(2, 3) if not isinstance(module, KANConv2d) else torch.randn(1, 3, 5, 5)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(twin(x), module(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), module(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_knots_stay_in_float32_or_wider(kind):
    layer = kind(3, 2, grid_range=[-1.3, 0.9])
    knots = layer.grid.clone()
    assert torch.equal(layer.bfloat16().grid, knots) and layer.base_weight.dtype == torch.bfloat16
    assert torch.equal(layer.half().grid, knots)
    assert layer.double().grid.dtype == torch.float64
    assert torch.equal(layer.half().grid, knots) and layer.grid.dtype == torch.float32
    assert torch.equal(layer.float().grid, knots)


@pytest.mark.parametrize("kind", LAYERS)
def test_meta_device(kind):
    with torch.device("meta"):
        layer = kind(4, 3)
    assert layer.grid.is_meta and layer.spline_weight.is_meta
    twin = kind(4, 3)
    layer.to_empty(device="cpu").load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), twin(x))
    assert kind(4, 3, device="meta").base_weight.is_meta


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_for_any_batch(kind, autocast, device):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = nn.Sequential(kind(6, 5), nn.Linear(5, 4), kind(4, 3, base_activation=nn.GELU)).to(device)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch in (8, 5, 33):
        x = torch.randn(batch, 6, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y, eager = compiled(x), layer(x)
        assert y.dtype == eager.dtype == (torch.bfloat16 if autocast else torch.float32)
        torch.testing.assert_close(y, eager)
    assert counter.frame_count == 1, "a new batch size compiled again"


# --- convolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), ((2, 3), (2, 1), (0, 1), 1), (3, 2, (2, 1), (1, 2)), (1, 1, 0, 1)],
)
def test_convolution_is_the_layer_on_patches(mode, activation, kernel, stride, padding, dilation, device):
    conv = KANConv2d(2, 3, kernel, stride, padding, dilation, mode, base_activation=activation).to(device)
    spread(conv)
    image = torch.randn(2, 2, 9, 8, device=device)
    patches = WKANLinear(conv.in_features, 3, base_activation=activation).to(device)
    patches.load_state_dict(conv.state_dict(), strict=True)
    high, wide = conv.padding
    padded = F.pad(image, (wide, wide, high, high), mode="constant" if mode == "zeros" else mode)
    rows = F.unfold(padded, kernel, dilation, stride=stride).transpose(1, 2)
    shape = F.conv2d(image, torch.zeros(1, 2, *conv.kernel_size, device=device), None, stride, padding, dilation).shape
    expected = patches(rows).transpose(1, 2).reshape(2, 3, *shape[2:])
    torch.testing.assert_close(conv(image), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv(image[1]), expected[1], rtol=1e-4, atol=1e-5)
    conv(image).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


# --- wrong input -----------------------------------------------------------------------------------------------------

WRONG = [
    (lambda: KANLinear(0, 2), "KANLinear: in_features: expected an integer >= 1, got 0"),
    (lambda: WKANLinear(2, 2.5), "WKANLinear: out_features: expected an integer >= 1, got 2.5"),
    (lambda: KANLinear(2, 2, grid_size=0), "KANLinear: grid_size: expected an integer >= 1, got 0"),
    (lambda: KANLinear(2, 2, spline_order=0), "KANLinear: spline_order: expected an integer from 1 to 5, got 0"),
    (lambda: KANLinear(2, 2, spline_order=6), "KANLinear: spline_order: expected an integer from 1 to 5, got 6"),
    (lambda: KANLinear(2, 2, grid_range=[1, -1]), "KANLinear: grid_range: expected two numbers, low < high, got [1"),
    (lambda: KANLinear(2, 2, extrapolation="cubic"), "KANLinear: extrapolation: expected one of zero"),
    (lambda: KANLinear(2, 2, base_activation=nn.SiLU()), "KANLinear: base_activation: expected a class such as"),
    (lambda: WKANLinear(2, 2, enable_standalone_scale_spline=False), "WKANLinear: enable_standalone_scale_spline:"),
    (lambda: KAN([4]), "KAN: layers_hidden: expected at least two sizes, got [4]"),
    (lambda: WKAN(4), "WKAN: layers_hidden: expected at least two sizes, got 4"),
    (lambda: KANLinear(2, 2, grid_range=3), "KANLinear: grid_range: expected two numbers, low < high, got 3"),
    (lambda: KANLinear(2, 2, grid_eps=1.5), "KANLinear: grid_eps: expected a number from 0 to 1, got 1.5"),
    (lambda: KANLinear(2, 2).update_grid(torch.ones(3, 2), margin=-1), "KANLinear: margin: expected a number >= 0"),
    (lambda: KAN([2, 2]).prune("a"), "KANLinear: threshold: expected a number, got 'a'"),
    (lambda: KANConv2d(1, 1, 3, padding_mode="circular"), "KANConv2d: padding_mode: expected one of zeros, reflect"),
    (lambda: KANConv2d(1, 1, (1, 2, 3)), "KANConv2d: kernel_size: expected an integer or a pair of integers >= 1"),
    (lambda: KANLinear(2, 2, grid_range=("a", "b")), "KANLinear: grid_range: expected two finite numbers, low < high"),
    (lambda: KANLinear(2, 2, grid_range="ab"), "KANLinear: grid_range: expected two numbers, low < high, got ab"),
    (lambda: KANLinear(2, 2, grid_range=(0, math.inf)), "KANLinear: grid_range: expected two finite numbers, low < hi"),
    (lambda: KAN([2, 2], grid_eps=None), "KANLinear: grid_eps: expected a number from 0 to 1, got None"),
    (lambda: KANLinear(2, 2).update_grid(torch.ones(3, 2), None), "KANLinear: margin: expected a number >= 0, got N"),
    (lambda: KANLinear(2, 2).update_grid(torch.ones(3, 2), math.inf), "KANLinear: margin: expected a number >= 0, got"),
    (lambda: KANLinear(2, 2, scale_noise=math.nan), "KANLinear: scale_noise: expected a finite number, got nan"),
    (lambda: KAN([2, 2], scale_base="1"), "KANLinear: scale_base: expected a finite number, got '1'"),
    (lambda: WKANLinear(2, 2, scale_spline=None), "WKANLinear: scale_spline: expected a finite number, got None"),
    (lambda: KANLinear(2, 2, backend="cppp"), "KANLinear: backend: expected one of reference, cpp, cuda, triton, auto"),
    (lambda: KANLinear(2, 2).prune(math.nan), "KANLinear: threshold: expected a number, got nan"),
    (lambda: KANLinear(2, 3).keep_edges(torch.ones(3, 2)), "KANLinear: mask: expected a bool tensor [3, 2], got torch"),
    (lambda: KANLinear(2, 3).keep_edges([True]), "KANLinear: mask: expected a bool tensor [3, 2], got list"),
    (lambda: KANLinear(2, 2).refine_grid(7.5), "KANLinear: new_grid_size: expected an integer >= the grid size 5"),
    (lambda: KANLinear(3, 2)(torch.ones(5, 4)), "KANLinear: x: expected [..., 3], got [5, 4]"),
    (lambda: WKANLinear(3, 2)(torch.tensor(1.0)), "WKANLinear: x: expected [..., 3], got []"),
    (lambda: KANLinear(3, 2)([1.0, 2.0, 3.0]), "KANLinear: x: expected [..., 3], got list"),
    (lambda: KANLinear(3, 2)(torch.ones(2, 3, dtype=torch.int64)), "kan_linear: x: expected float32, float64"),
    (lambda: KANConv2d(2, 1, 3)(torch.ones(1, 3, 5, 5)), "KANConv2d: x: expected [N, 2, H, W] or [2, H, W], got [1"),
    (lambda: KANConv2d(1, 1, 3)(torch.ones(1, 1, 2, 5)), "wkan_conv2d: x: expected a padded height of at least 3"),
    (lambda: KANLinear(2, 2, backend="fast")(torch.ones(1, 2)), "backend: expected one of reference, cpp"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_wrong_input_gets_one_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(sentence)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_layer_takes_the_automatic_choice():
    layer, x = KANLinear(2, 3, backend="auto"), torch.rand(4, 2)
    same = KANLinear(2, 3)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), same(x))
