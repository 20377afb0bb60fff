"""SpectralKAN: a spatial WKAN over the pixels of a patch in every band, then a spectral WKAN over the bands.

"SpectralKAN", arXiv 2407.00949. Module names and shapes are those of the public code, so its checkpoints load with
``strict=True`` (``spectral_hidden=()``). The parameter counts that the paper prints belong to ``(16,)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyml.methods.spectralkan.data import BORDERS, pad_border
from pyml.nn import WKAN, WKANLinear
from pyml.ops import _check

HIDDEN_BYTES = 32 << 20  # hidden values of the spatial network held at once while an image is mapped


class SpectralKAN(nn.Module):
    """Class scores of the middle pixel of a patch.

    Args:
        num_classes: 2 for change detection.
        bands: number of spectral bands.
        patch_size: side p of the square patch, odd.
        spectral_hidden: hidden sizes of the spectral WKAN. ``()`` is the public code (3848 parameters at 224 bands),
            ``(16,)`` has the counts of the paper's tables (7552, 9272, 10312 at 155, 198, 224 bands).
        options: passed to `pyml.nn.WKAN` (grid_size, extrapolation, backend, ...).

    Shapes: ``[B, bands, p, p]`` or ``[B, bands, p * p]`` (row after row of the patch) -> ``[B, num_classes]``.
    The input is the difference of the two dates, each scaled to [0, 1] per band: it stays within the grid [-1, 1].
    Source: "SpectralKAN", arXiv 2407.00949, and the names and shapes of its public code.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    layer1: WKAN
    layer2: WKAN

    def __init__(
        self, num_classes: int, bands: int, patch_size: int, spectral_hidden: Sequence[int] = (), **options: object
    ) -> None:
        super().__init__()
        patch_size = _check.integer("SpectralKAN", "patch_size", patch_size, 1, expected="an odd integer >= 1")
        if patch_size % 2 == 0:
            _check.fail("SpectralKAN", "patch_size", "an odd integer >= 1", patch_size)
        self.num_classes = _check.integer("SpectralKAN", "num_classes", num_classes, 1)
        self.bands, self.patch_size = _check.integer("SpectralKAN", "bands", bands, 1), patch_size
        self.spectral_hidden = tuple(_check.integer("SpectralKAN", "spectral_hidden", n, 1) for n in spectral_hidden)
        self.layer1 = WKAN([patch_size**2, 16, 1], **options)  # type: ignore[arg-type]
        self.layer2 = WKAN([self.bands, *self.spectral_hidden, self.num_classes], **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        p, taps = self.patch_size, self.patch_size**2
        _check.tensors("SpectralKAN", x)
        if x.shape[1:] not in ((self.bands, p, p), (self.bands, taps)):
            _check.fail("SpectralKAN", "x", f"[B, {self.bands}, {p}, {p}] or [B, {self.bands}, {taps}]", list(x.shape))
        return self.layer2(self.layer1(x.reshape(-1, taps)).view(-1, self.bands))

    def map(self, image: Tensor, border: str | None = None) -> Tensor:
        """Class scores of every pixel of an image, without patches: both networks as convolutions over the image.

        Args:
            image: ``[bands, H, W]``, any size.
            border: how the image continues beyond its edge, see `data.pad_border`: ``"symmetric"`` (the public training
                code), ``"reflect"`` (the public test code), ``"replicate"``, ``"zeros"``. None: the image brings a
                margin of p // 2 pixels of its own.

        Returns:
            ``[num_classes, H, W]``, equal to the patch form on patches of that border, or
            ``[num_classes, H - p + 1, W - p + 1]`` with border None.

        One value a band and pixel is held between the two networks; `predict.predict_scene` cuts scenes too large
        for that.
        """
        p = self.patch_size
        _check.tensors("SpectralKAN.map", image, first_name="image")
        if image.dim() != 3 or image.shape[0] != self.bands:
            _check.fail("SpectralKAN.map", "image", f"[{self.bands}, H, W]", list(image.shape))
        if border is not None:
            _check.member("SpectralKAN.map", "border", border, BORDERS)
            image = pad_border(image, p // 2, border)
        height, width = image.shape[1] - p + 1, image.shape[2] - p + 1
        if height < 1 or width < 1:
            _check.fail("SpectralKAN.map", "image", f"at least {p} x {p} pixels with its margin", list(image.shape))
        hidden_bytes = height * width * self.layer1.layers[0].out_features * image.element_size()
        parts = image.unsqueeze(1).split(max(1, HIDDEN_BYTES // hidden_bytes))  # each band is an image of one channel
        spatial = torch.cat([self._convolve(self.layer1, part, p) for part in parts])  # [bands, 1, H', W']
        return self._convolve(self.layer2, spatial.movedim(1, 0), 1)[0]

    @staticmethod
    def _convolve(network: WKAN, x: Tensor, kernel_size: int) -> Tensor:
        """A network on every kernel_size x kernel_size patch of ``[N, C, H, W]``: its first layer reads the patch."""
        for layer in network.layers:
            assert isinstance(layer, WKANLinear)
            x = layer.conv2d(x, kernel_size)
            kernel_size = 1
        return x
