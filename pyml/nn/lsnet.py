"""LSNet: underwater image enhancement with about 7,500 weights. Guide, training and results: docs/lsnet.md."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.nn.topk_attention import BiLevelRoutingAttention
from pyml.ops import _check

ATTENTION = ("routed", "dense", "identity")
LAYOUTS = ("public", "fixed")
WINDOWS, REGIONS = 16, 32


class _ConvSiLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


class _Unused(nn.Module):
    """Shapes of the public checkpoint's ``finallconv``; nothing calls it there either."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 12, 3), nn.SiLU(), nn.Conv2d(12, 9, 3, groups=3))
        self.conv2 = nn.Conv2d(9, 3, 1)


class LSNet(nn.Module):
    """Restores a degraded image I as J = I + compensate - exposed; both terms are learned, 3 channels each.

    Each term has its own path: per-pixel features of every colour, and one map of three channels whose pixels attend to
    each other (`BiLevelRoutingAttention` at half the resolution).

    Args:
        attention: ``"routed"``: 32 of 16 x 16 regions, the method. For comparisons ``"dense"``: all regions, by the
            same kernel; ``"identity"``: no attention.
        layout: how the attention branch halves the resolution. ``"public"``: as the released code: the four quadrants
            of the image become channels, but the way back (PixelShuffle) treats them as neighbouring pixels, so this
            branch comes back scrambled in place and colour; public weights need it. ``"fixed"``: neighbours both ways.
        attention_options: passed to `BiLevelRoutingAttention` (mask_padding, backend, ...).

    Shapes: ``[B, 3, H, W]``, values in 0..1, even H and W -> the same; values may leave 0..1 (clip them to show).
    Dtype: that of the parameters, float32, float64, bfloat16 or float16.
    State: the 60 tensors of the public checkpoint (not with ``attention="identity"``). 8,245 numbers are stored; the
    711 of ``conv5`` and ``finallconv`` are used nowhere and get no gradient, so 7,534 are trained.
    Source: "LSNet", arXiv 2405.16197, and the behaviour of its released code.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    def __init__(self, *, attention: str = "routed", layout: str = "public", **attention_options: Any) -> None:
        super().__init__()
        _check.member("LSNet", "attention", attention, ATTENTION)
        _check.member("LSNet", "layout", layout, LAYOUTS)
        self.attention, self.layout = attention, layout
        topk = WINDOWS**2 if attention == "dense" else REGIONS
        for path in ("d", "o"):  # d: compensate, o: exposed
            for colour in "rgb":
                setattr(self, f"{path}_res_conv_{colour}", _ConvSiLU(1, 16))
            setattr(self, f"{path}_res_conv_rgb", _ConvSiLU(3, 3, 3))
            block = (
                nn.Identity()
                if attention == "identity"
                else BiLevelRoutingAttention(
                    12, 2, WINDOWS, 48, topk=topk, side_dwconv=5, auto_pad=True, **attention_options
                )
            )
            setattr(self, f"{path}_biformer_rgb", block)
        self.conv3 = nn.Sequential(_ConvSiLU(51, 32), _ConvSiLU(32, 3))
        self.conv4 = nn.Sequential(_ConvSiLU(51, 32), _ConvSiLU(32, 3))
        self.conv5 = _ConvSiLU(3, 3)
        self.finallconv = _Unused()
        for unused in (self.conv5, self.finallconv):  # or several processes would wait for gradients that never come
            unused.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        compensate, exposed = self.terms(x)
        return x + compensate - exposed

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The compensate and the exposed term of an image, each in the shape of x."""
        _check.dtype_of_weights("LSNet", "x", x, self.conv5.conv.weight)
        if x.dim() != 4 or x.shape[1] != 3:
            _check.fail("LSNet", "x", "[B, 3, H, W]", list(x.shape))
        if x.shape[2] % 2 or x.shape[3] % 2 or 0 in x.shape[2:]:
            _check.fail("LSNet", "x", "an even height and an even width", list(x.shape))
        return self._path("d", x, self.conv3), self._path("o", x, self.conv4)

    def _path(self, path: str, x: Tensor, head: nn.Sequential) -> Tensor:
        features = [getattr(self, f"{path}_res_conv_{name}")(x[:, i : i + 1]) for i, name in enumerate("rgb")]
        rgb = getattr(self, f"{path}_res_conv_rgb")(x)
        half = _quadrants(rgb) if self.layout == "public" else F.pixel_unshuffle(rgb, 2)
        rgb = F.pixel_shuffle(getattr(self, f"{path}_biformer_rgb")(half), 2)
        return head(torch.cat([*features, rgb], 1))

    def extra_repr(self) -> str:
        return f"attention={self.attention!r}, layout={self.layout!r}"


def _quadrants(x: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, 4 C, H/2, W/2]``: the four quadrants in row order, all colours of one after the other."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, 4 * channels, height // 2, width // 2)
