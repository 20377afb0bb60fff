"""KAN layers on B-splines: `KANLinear` (one spline an edge), `WKANLinear` (one spline an input), `KANConv2d`.

Constructors, parameter names and shapes are those of the public codes (efficient-kan; SpectralKAN), so checkpoints load
both ways with ``strict=True``. `KAN` and `WKAN` are networks of these layers. A guide: docs/bspline.md.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml import ops
from pyml.nn._spline_layer import FUSED, SplineLayer
from pyml.ops import _check
from pyml.ops.bspline import pad_image, pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = TypeVar("Network", bound="_Network")


class KANLinear(SplineLayer):
    """y[o] = sum_i base_weight[o, i] act(x[i]) + spline_scaler[o, i] spline_oi(x[i]): a learned curve on every edge.

    Args:
        in_features, out_features: sizes.
        grid_size: number of intervals G of the inner grid.
        spline_order: polynomial degree k, 1 to 5.
        scale_noise, scale_base, scale_spline: initialisation, as in efficient-kan.
        enable_standalone_scale_spline: whether ``spline_scaler`` exists.
        base_activation: class of the activation. SiLU, ReLU, Tanh and Identity run inside the kernel; any other runs as
            ordinary torch beside it.
        grid_eps: share of equal spacing in `update_grid`, 0 to 1.
        grid_range: the inner grid at the start.
        extrapolation: ``"zero"`` (as efficient-kan: the spline fades to 0 beyond the grid), ``"clamp"``, ``"linear"``.
        backend: force one backend for this layer, see `pyml.use_backend`.

    Shapes: ``[..., in] -> [..., out]`` in the dtype of x. State: base_weight ``[out, in]``, spline_weight
    ``[out, in, G + k]``, spline_scaler ``[out, in]``, grid ``[in, G + 2k + 1]`` (float32 or wider whatever the layer's
    dtype). Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,):
            self._rows(x)  # says what is wrong
        base = FUSED.get(type(self.base_activation))
        y = ops.kan_linear(
            x,
            self.grid,
            self.scaled_spline_weight,
            self.base_weight if base else None,
            order=self.spline_order,
            base=base or "identity",
            extrapolation=self.extrapolation,
            backend=self.backend,
        )
        return y if base else y + self._base_branch(x)


class WKANLinear(SplineLayer):
    """y[o] = sum_i base_weight[o, i] act(x[i]) + spline_scaler[o, i] spline_i(x[i]): one curve an input, scaled.

    2 mn + m (G + k) parameters instead of mn (G + k + 2) for m inputs and n outputs. Arguments and shapes as
    `KANLinear`, but spline_weight is ``[1, in, G + k]`` and the scaler always exists: without it all outputs would
    share one sum.
    Source: "SpectralKAN", arXiv 2407.00949.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    shared_curves = True
    spline_scaler: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,):
            self._rows(x)  # says what is wrong
        base = FUSED.get(type(self.base_activation))
        y = ops.wkan_linear(
            x,
            self.grid,
            self.spline_weight.squeeze(0),
            self.base_weight if base else None,
            self.spline_scaler,
            order=self.spline_order,
            base=base or "identity",
            extrapolation=self.extrapolation,
            backend=self.backend,
        )
        return y if base else y + self._base_branch(x)

    def conv2d(
        self,
        x: Tensor,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
    ) -> Tensor:
        """This layer on every patch of an image, without forming patches: ``[N, C, H, W] -> [N, out, H', W']``.

        in_features must be C * kh * kw, taps in the order of ``torch.nn.functional.unfold``. See `ops.wkan_conv2d`.
        """
        base = FUSED.get(type(self.base_activation))
        y = ops.wkan_conv2d(
            x,
            self.grid,
            self.spline_weight.squeeze(0),
            self.base_weight if base else None,
            self.spline_scaler,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            order=self.spline_order,
            base=base or "identity",
            extrapolation=self.extrapolation,
            backend=self.backend,
        )
        if base:
            return y
        wide = torch.promote_types(x.dtype, self.base_weight.dtype)
        weight = self.base_weight.to(wide).view(self.out_features, -1, *pair("conv2d", "kernel_size", kernel_size, 1))
        activated = self.base_activation(pad_image("conv2d", x, padding, padding_mode).to(wide))  # padded pixels too
        return y + F.conv2d(activated, weight, stride=stride, dilation=dilation).to(x.dtype)


class KANConv2d(WKANLinear):
    """Convolution whose taps are learned curves: each of the C * kh * kw taps has one spline, scaled per output.

    It is the WKAN form on purpose. One spline per (output, tap), as in `KANLinear`, would evaluate out * C * kh * kw
    curves a pixel and needs the patches or their basis in memory. With one spline a tap the curve is evaluated where
    the pixel is read, and the mix over outputs is an ordinary matrix product (`ops.wkan_conv2d`): no patches, no basis.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as torch.nn.Conv2d; no groups, and padding is
            a number or a pair. A padded pixel passes the curves like any other.
        padding_mode: ``"zeros"``, ``"reflect"`` or ``"replicate"``.
        The rest: see `KANLinear`.

    Shapes: ``[N, C, H, W]`` or ``[C, H, W]`` -> ``[N, out, H', W']`` or ``[out, H', W']``. State as `WKANLinear` with
    in = C * kh * kw. `update_grid` and the diagnostics take images too, and form the patches: pass a sample.
    Source: the layer of "SpectralKAN", arXiv 2407.00949, as a convolution.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        **options: Any,
    ) -> None:
        numbers = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "padding": (padding, 0)}
        numbers["dilation"] = dilation, 1
        pairs = (pair("KANConv2d", name, value, least) for name, (value, least) in numbers.items())
        kernel, step, pad, dilate = ((high, wide) for high, wide in pairs)
        super().__init__(in_channels * kernel[0] * kernel[1], out_channels, **options)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel, step, pad, dilate
        _check.member("KANConv2d", "padding_mode", padding_mode, ("zeros", "reflect", "replicate"))
        self.padding_mode = padding_mode

    def forward(self, x: Tensor) -> Tensor:
        channels = self.in_channels
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or x.shape[-3] != channels:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            self._fail("x", f"[N, {channels}, H, W] or [{channels}, H, W]", got)
        return self.conv2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)

    def _rows(self, x: Tensor) -> Tensor:
        """Images as rows of taps ``[patches, C * kh * kw]``; rows stay rows."""
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-3] != self.in_channels:
            return super()._rows(x)
        padded = pad_image("KANConv2d", x, self.padding, self.padding_mode)
        taps = F.unfold(padded, self.kernel_size, self.dilation, stride=self.stride)  # [..., C * kh * kw, patches]
        return taps.transpose(-1, -2).reshape(-1, self.in_features)


class _Network(nn.Module):
    """Layers one after the other; its arguments are documented at `KAN`."""

    layer: type[SplineLayer]
    layers: Sequence[SplineLayer]  # an nn.ModuleList

    def __init__(
        self,
        layers_hidden: Sequence[int],
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1, 1),
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(layers_hidden, Sequence) or len(layers_hidden) < 2:
            _check.fail(type(self).__name__, "layers_hidden", "at least two sizes", layers_hidden)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            self.layer(
                size_in, size_out, grid_size, spline_order, scale_noise, scale_base, scale_spline,
                base_activation=base_activation, grid_eps=grid_eps, grid_range=grid_range, **options,
            )
            for size_in, size_out in pairwise(layers_hidden)
        )  # fmt: skip

    @property
    def grid_size(self) -> int:
        return self.layers[0].grid_size

    @property
    def spline_order(self) -> int:
        return self.layers[0].spline_order

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        """``[..., in] -> [..., out]``; with ``update_grid`` every layer first moves its knots to its input."""
        for layer in self.layers:
            if update_grid:
                layer.update_grid(x)
            x = layer(x)
        return x

    def _inputs(self, x: Tensor | None) -> Iterator[tuple[SplineLayer, Tensor | None]]:
        """Every layer with its own input, when the network sees x."""
        for layer in self.layers:
            yield layer, x
            x = None if x is None else layer(x)

    def regularization_loss(
        self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0, *, x: Tensor | None = None
    ) -> Tensor:
        """Sum over the layers, in weight form or, with data x, in activation form; see `SplineLayer`."""
        strength = regularize_activation, regularize_entropy
        return torch.stack([layer.regularization_loss(*strength, x=z) for layer, z in self._inputs(x)]).sum()

    def refine_grid(self, new_grid_size: int) -> None:
        """Refine every layer; the function does not change. See `SplineLayer.refine_grid`."""
        for layer in self.layers:
            layer.refine_grid(new_grid_size)

    @torch.no_grad()
    def outside_fraction(self, x: Tensor, inner: bool = True) -> list[Tensor]:
        """Share of each layer's inputs outside its grid, one ``[in]`` a layer; see `SplineLayer.outside_fraction`."""
        return [layer.outside_fraction(z, inner) for layer, z in self._inputs(x) if z is not None]

    @torch.no_grad()
    def prune(self: Network, threshold: float, x: Tensor | None = None) -> Network:
        """A smaller copy: edges below ``threshold`` are 0, hidden units left without an edge in or out are gone.

        Args:
            threshold: smallest mean absolute value of an edge that stays (`SplineLayer.edge_sizes`).
            x: data ``[..., in]`` to measure on; without it, points of each layer's inner grid.

        The function changes by what was cut, and by the constant that a unit without inputs still sent on. Inputs and
        outputs all stay. In training edges leave 0 again, see `SplineLayer.prune`. Raises ValueError when a layer would
        lose every unit.
        """
        small = copy.deepcopy(self)
        kept = [twin.prune(threshold, z) for (_, z), twin in zip(self._inputs(x), small.layers)]
        alive = [mask.new_ones(mask.shape[1]) for mask in kept] + [kept[-1].new_ones(kept[-1].shape[0])]
        for _ in kept:  # a unit that goes may leave its neighbours without an edge: at most once a layer
            for n in range(1, len(kept)):
                fed = (kept[n - 1] & alive[n - 1]).any(1)
                read = (kept[n] & alive[n + 1].unsqueeze(1)).any(0)
                alive[n] &= fed & read
        for units in alive:
            if not bool(units.any()):
                highest = min(float(layer.edge_sizes(z).max()) for layer, z in self._inputs(x))
                _check.fail(type(self).__name__, "threshold", f"less than the largest edges ({highest:.3g})", threshold)
        for n, layer in enumerate(small.layers):
            layer.select(alive[n + 1], alive[n])
        return small

    def plot(
        self, layer: int = 0, features: Sequence[int] | None = None, outputs: Sequence[int] | None = None
    ) -> "Figure":
        """Draw the learned curves of one layer: `SplineLayer.plot`."""
        return self.layers[layer].plot(features, outputs)


class KAN(_Network):
    """A network of `KANLinear` layers. Drop-in for efficient-kan's KAN: same constructor, same state_dict.

    Args:
        layers_hidden: sizes, ``[in, hidden ..., out]``.
        The rest, and as keywords extrapolation, backend, device and dtype: see `KANLinear`.

    Shapes: ``[..., in] -> [..., out]``. Parameters are ``layers.<n>.base_weight`` and so on.
    Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    layer = KANLinear


class WKAN(_Network):
    """A network of `WKANLinear` layers: constructor and state_dict of the public SpectralKAN code.

    Arguments and shapes as `KAN`. Source: "SpectralKAN", arXiv 2407.00949.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    layer = WKANLinear
