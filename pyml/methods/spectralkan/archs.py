"""The networks of ``--arch``: SpectralKAN, the ablations of its paper and two plain rivals, all with one interface.

``forward(patches [B, bands, p, p]) -> [B, 2]`` for training, ``map(image [bands, H + p - 1, W + p - 1]) -> [2, H, W]``
for scenes. Parameter counts of the ablations agree with the paper's table (cubic splines, 5 intervals).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyml.methods._recipe import Rule, among, require
from pyml.methods.spectralkan.data import patch_view
from pyml.methods.spectralkan.model import SpectralKAN
from pyml.nn import KAN, WKAN, KANLinear, WKANLinear

CLASSES = 2
ODD = Rule("an odd number", lambda value: value >= 1 and value % 2 == 1)
CHUNK = 1000  # patches at a time where a scene has to be mapped patch by patch


def map_patches(model: nn.Module, image: Tensor, patch_size: int) -> Tensor:
    """Map ``[bands, H + p - 1, W + p - 1] -> [classes, H, W]`` patch by patch, ``CHUNK`` copied at a time."""
    view = patch_view(image, patch_size)
    height, width = view.shape[:2]
    pixels = torch.arange(height * width, device=image.device)
    scores = [model(view[part // width, part % width]) for part in pixels.split(CHUNK)]
    return torch.cat(scores).T.reshape(-1, height, width)


class PatchModel(nn.Module):
    """A network that knows only patches, so that its scene map has to copy them."""

    def __init__(self, bands: int, patch_size: int) -> None:
        super().__init__()
        self.bands, self.patch_size = bands, patch_size

    def map(self, image: Tensor) -> Tensor:
        """``[bands, H + p - 1, W + p - 1] -> [2, H, W]``."""
        return map_patches(self, image, self.patch_size)


class FlatKAN(PatchModel):
    """The paper's plain KAN: every value of the patch is one input, ``[25 b, 16, 2]``."""

    def __init__(self, bands: int, patch_size: int, extrapolation: str = "zero") -> None:
        super().__init__(bands, patch_size)
        self.layers = KAN([bands * patch_size**2, 16, CLASSES], extrapolation=extrapolation)

    def forward(self, patches: Tensor) -> Tensor:
        return self.layers(patches.flatten(1))


class FlatWKAN(PatchModel):
    """The paper's plain WKAN ``[25 b, 16, 2]``; scenes go through `pyml.ops.wkan_conv2d`, without patches."""

    def __init__(self, bands: int, patch_size: int, extrapolation: str = "zero") -> None:
        super().__init__(bands, patch_size)
        self.layers = WKAN([bands * patch_size**2, 16, CLASSES], extrapolation=extrapolation)

    def forward(self, patches: Tensor) -> Tensor:
        return self.layers(patches.flatten(1))

    def map(self, image: Tensor) -> Tensor:
        first, second = self.layers.layers
        assert isinstance(first, WKANLinear)
        hidden = first.conv2d(image, self.patch_size)
        return second(hidden.permute(1, 2, 0)).permute(2, 0, 1)


class MTSFKAN(PatchModel):
    """The paper's two stages with plain KAN layers: spatial ``[25, 16, 1]`` a band, then spectral ``[b, 16, 2]``."""

    def __init__(self, bands: int, patch_size: int, extrapolation: str = "zero") -> None:
        super().__init__(bands, patch_size)
        self.spatial = KAN([patch_size**2, 16, 1], extrapolation=extrapolation)
        self.spectral = KAN([bands, 16, CLASSES], extrapolation=extrapolation)

    def forward(self, patches: Tensor) -> Tensor:
        return self.spectral(self.spatial(patches.flatten(2)).squeeze(-1))


class CNN(PatchModel):
    """A plain rival: 3 x 3 convolutions without padding down to one pixel, then a linear classifier."""

    def __init__(self, bands: int, patch_size: int, width: int = 32) -> None:
        super().__init__(bands, patch_size)
        layers: list[nn.Module] = []
        channels = bands
        for _ in range(patch_size // 2):
            layers += [nn.Conv2d(channels, width, 3), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, CLASSES, 1))

    def forward(self, patches: Tensor) -> Tensor:
        return self.layers(patches).flatten(1)

    def map(self, image: Tensor) -> Tensor:
        return self.layers(image.unsqueeze(0)).squeeze(0)


class Transformer(PatchModel):
    """A plain rival: one token a pixel of the patch, two encoder layers, the mean of the tokens classified."""

    def __init__(self, bands: int, patch_size: int, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__(bands, patch_size)
        self.embed = nn.Linear(bands, width)
        self.position = nn.Parameter(0.02 * torch.randn(patch_size**2, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.embed(patches.flatten(2).transpose(1, 2)) + self.position
        return self.classify(self.encoder(tokens).mean(1))


def _spectralkan(bands: int, patch_size: int, hidden: Sequence[int], extrapolation: str) -> nn.Module:
    return SpectralKAN(CLASSES, bands, patch_size, tuple(hidden), extrapolation=extrapolation)


ARCHS: dict[str, Callable[[int, int, Sequence[int], str], nn.Module]] = {
    "spectralkan": _spectralkan,
    "wkan": lambda bands, patch, hidden, beyond: FlatWKAN(bands, patch, beyond),
    "kan": lambda bands, patch, hidden, beyond: FlatKAN(bands, patch, beyond),
    "mtsf-kan": lambda bands, patch, hidden, beyond: MTSFKAN(bands, patch, beyond),
    "cnn": lambda bands, patch, hidden, beyond: CNN(bands, patch),
    "transformer": lambda bands, patch, hidden, beyond: Transformer(bands, patch),
}


def build(
    arch: str,
    bands: int,
    patch_size: int = 5,
    spectral_hidden: Sequence[int] = (),
    extrapolation: str = "zero",
) -> nn.Module:
    """The network of one ``--arch`` name.

    ``spectral_hidden`` only matters for SpectralKAN; ``extrapolation`` (``"zero"`` as in the public code, ``"clamp"``
    or ``"linear"``) for every network of splines.
    """
    require("arch", arch, among(ARCHS))
    require("patch_size", patch_size, ODD)
    return ARCHS[arch](bands, patch_size, spectral_hidden, extrapolation)


def fit_knots(model: nn.Module, patches: Tensor) -> None:
    """Move the knots of the first spline layer to the quantiles of its input, ``[B, bands, p, p]``, in place.

    That layer reads the image, so one look is enough; layers behind it see values that move while they learn. Networks
    without splines stay as they are.
    """
    for layer in model.modules():
        if isinstance(layer, KANLinear | WKANLinear):
            layer.update_grid(patches.reshape(-1, layer.in_features))
            return
