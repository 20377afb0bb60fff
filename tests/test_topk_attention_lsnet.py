"""LSNet: the public checkpoint's names, its layout, its description in other words, wrong input."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.nn import LSNet
from tests.test_topk_attention_layers import awake, pixel_by_pixel


def published_shapes() -> dict[str, list[int]]:
    """The public checkpoint's table."""
    bn = {"weight": [], "bias": [], "running_mean": [], "running_var": []}
    shapes = {}
    for path in "do":
        for colour in "rgb":
            shapes |= {
                f"{path}_res_conv_{colour}.conv.weight": [16, 1, 1, 1],
                f"{path}_res_conv_{colour}.conv.bias": [16],
            }
        shapes |= {f"{path}_res_conv_rgb.conv.weight": [3, 3, 3, 3], f"{path}_res_conv_rgb.conv.bias": [3]}
        block = f"{path}_biformer_rgb"
        shapes |= {f"{block}.lepe.weight": [12, 1, 5, 5], f"{block}.lepe.bias": [12]}
        for name, width in (("to_q", 48), ("to_kv", 60)):
            shapes[f"{block}.{name}.c.weight"] = [width, 12, 1, 1]
            shapes |= {f"{block}.{name}.bn.{key}": [width] for key in bn}
            shapes[f"{block}.{name}.bn.num_batches_tracked"] = []
    for head in ("conv3", "conv4"):
        shapes |= {f"{head}.0.conv.weight": [32, 51, 1, 1], f"{head}.0.conv.bias": [32]}
        shapes |= {f"{head}.1.conv.weight": [3, 32, 1, 1], f"{head}.1.conv.bias": [3]}
    shapes |= {"conv5.conv.weight": [3, 3, 1, 1], "conv5.conv.bias": [3]}
    shapes |= {"finallconv.conv1.0.weight": [12, 3, 3, 3], "finallconv.conv1.0.bias": [12]}
    shapes |= {"finallconv.conv1.2.weight": [9, 4, 3, 3], "finallconv.conv1.2.bias": [9]}
    return shapes | {"finallconv.conv2.weight": [3, 9, 1, 1], "finallconv.conv2.bias": [3]}


@pytest.mark.parametrize("options", [{}, {"attention": "dense"}, {"layout": "fixed"}, {"mask_padding": True}])
def test_lsnet_loads_the_published_names(options):
    shapes = published_shapes()
    assert len(shapes) == 60
    model = LSNet(**options)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == shapes
    model.load_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == 8245
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7534


def test_only_used_weights_get_a_gradient():
    model = LSNet()
    model(torch.rand(1, 3, 32, 32)).square().sum().backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == {"conv5", "finallconv"}


class _Passed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layout", "moves"),
    [
        ("public", [((0, 200, 40), (1, 145, 80)), ((1, 10, 10), (0, 20, 21)), ((2, 130, 250), (2, 5, 245))]),
        ("fixed", [((0, 200, 40), (0, 200, 40)), ((1, 10, 10), (1, 10, 10)), ((2, 130, 250), (2, 130, 250))]),
    ],
)
def test_where_the_attention_branch_puts_a_pixel(layout, moves):
    """The public order scrambles places and colours; weights of the release are made for it."""
    model = LSNet(attention="identity", layout=layout)
    model.d_res_conv_rgb, model.conv3 = _Passed(), _Passed()
    for source, target in moves:
        x = torch.zeros(1, 3, 256, 256)
        x[0][source] = 1
        branch = model._path("d", x, model.conv3)[0, 48:]
        assert branch.nonzero().tolist() == [list(target)]


@pytest.mark.parametrize("layout", ["public", "fixed"])
def test_lsnet_is_its_description(layout, device):
    model = awake(LSNet(layout=layout)).double().to(device).eval()
    x = torch.rand(1, 3, 34, 36, dtype=torch.float64, device=device)
    found = []
    for path, head in (("d", model.conv3), ("o", model.conv4)):
        weights = [getattr(model, f"{path}_res_conv_{c}").conv for c in ("r", "g", "b", "rgb")]
        features = [F.silu(weights[i](x[:, i : i + 1])) for i in range(3)]
        rgb = F.silu(weights[3](x))
        if layout == "public":
            top, low = rgb.chunk(2, 2)
            half = torch.cat([quarter for part in (top, low) for quarter in part.chunk(2, 3)], 1)
        else:
            half = torch.stack([rgb[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
        attended = pixel_by_pixel(getattr(model, f"{path}_biformer_rgb"), half)
        features.append(F.pixel_shuffle(attended, 2))
        y = F.silu(head[0].conv(torch.cat(features, 1)))
        found.append(F.silu(head[1].conv(y)))
    terms = model.terms(x)
    for one, expected in zip(terms, found):
        torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model(x), x + found[0] - found[1], rtol=1e-8, atol=1e-10)


def test_wrong_input_of_lsnet():
    model = LSNet(attention="identity")
    for shape, sentence in (
        ((1, 3, 255, 256), "x: expected an even height and an even width, got [1, 3, 255, 256]"),
        ((1, 3, 0, 8), "x: expected an even height and an even width, got [1, 3, 0, 8]"),
        ((1, 4, 8, 8), "x: expected [B, 3, H, W], got [1, 4, 8, 8]"),
        ((3, 8, 8), "x: expected [B, 3, H, W], got [3, 8, 8]"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"LSNet: {sentence}")):
            model(torch.ones(shape))
    for dtype, sentence in (
        (torch.uint8, "x: expected float32, float64, bfloat16 or float16, got torch.uint8"),
        (torch.float64, "x: expected the dtype of the weights (torch.float32), got torch.float64"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"LSNet: {sentence}")):
            model(torch.ones(1, 3, 8, 8, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)).shape == (1, 3, 8, 8)
    with pytest.raises(TypeError, match="LSNet: x: expected a tensor, got list"):
        model([1, 2])
    with pytest.raises(ValueError, match="LSNet: attention: expected one of routed, dense, identity, got 'none'"):
        LSNet(attention="none")
    with pytest.raises(ValueError, match="LSNet: layout: expected one of public, fixed, got 'nchw'"):
        LSNet(layout="nchw")
