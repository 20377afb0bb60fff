"""What all spline layers share: parameters, initialisation, grid changes, regularisers, pruning, plots."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml import ops
from pyml.nn import _banded, _knots
from pyml.ops import _check
from pyml.ops.bspline import EXTRAPOLATIONS, MAX_ORDER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDED = (torch.bfloat16, torch.float16)  # knots in these would bend every curve
FUSED = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh", nn.Identity: "identity"}  # computed inside the kernels


class SplineLayer(nn.Module):
    """Base of `KANLinear` and `WKANLinear`; its arguments are documented there."""

    shared_curves = False  # True: one spline an input, scaled per edge; False: one spline an edge
    grid: Tensor
    base_weight: nn.Parameter
    spline_weight: nn.Parameter
    spline_scaler: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1, 1),
        *,
        extrapolation: str = "zero",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        sizes = {"in_features": in_features, "out_features": out_features, "grid_size": grid_size}
        in_features, out_features, grid_size = (_check.integer(kind, *size, 1) for size in sizes.items())
        spline_order = _check.integer(kind, "spline_order", spline_order, 1, MAX_ORDER)
        for name, value in (("scale_noise", scale_noise), ("scale_base", scale_base), ("scale_spline", scale_spline)):
            _check.number(kind, name, value)
        if not isinstance(grid_range, Sequence) or isinstance(grid_range, str) or len(grid_range) != 2:
            self._fail("grid_range", "two numbers, low < high", grid_range)
        low, high = (_check.number(kind, "grid_range", end, "two finite numbers, low < high") for end in grid_range)
        if not low < high:
            self._fail("grid_range", "two numbers, low < high", grid_range)
        if isinstance(base_activation, nn.Module) or not callable(base_activation):
            self._fail("base_activation", "a class such as torch.nn.SiLU", repr(base_activation))
        if self.shared_curves and not enable_standalone_scale_spline:
            self._fail("enable_standalone_scale_spline", "True (a shared spline needs its scaler)", False)
        if not 0 <= _check.number(kind, "grid_eps", grid_eps, "a number from 0 to 1") <= 1:
            self._fail("grid_eps", "a number from 0 to 1", grid_eps)
        _check.member(kind, "extrapolation", extrapolation, EXTRAPOLATIONS)
        _check.backend(kind, backend)
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.scale_noise, self.scale_base, self.scale_spline = scale_noise, scale_base, scale_spline
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        self.base_activation = base_activation()
        for part in self.base_activation.modules() if isinstance(self.base_activation, nn.Module) else ():
            if getattr(part, "inplace", False):  # it would change the caller's x, which the splines read too
                part.inplace = False  # type: ignore[assignment]
        self.grid_eps, self.grid_range = grid_eps, (low, high)
        self.extrapolation, self.backend = extrapolation, backend

        self.register_buffer("grid", self._first_knots(in_features).to(device))
        options = {"device": device, "dtype": dtype}
        curves = 1 if self.shared_curves else out_features
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.spline_weight = nn.Parameter(torch.empty(curves, in_features, grid_size + spline_order, **options))
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features, **options))
        else:
            self.register_parameter("spline_scaler", None)
        self.reset_parameters()

    def _first_knots(self, features: int) -> Tensor:
        knots = _knots.uniform_knots(self.grid_range, self.grid_size, self.spline_order)
        return knots.expand(features, -1).contiguous()

    def reset_parameters(self) -> None:
        """Small random splines, Kaiming-uniform weights: the public codes' distribution and order of random draws.

        The splines interpolate uniform noise at the inner knots with the least coefficients. There are k - 1 more
        coefficients than knots, so this is the rank-deficient fit that torch.linalg.lstsq gets wrong. The knots stay
        where they are, unless they are none: those of memory that nothing was written to.
        """
        if self.grid.is_meta:
            return
        if not _knots.usable(self.grid):
            self.grid = self._first_knots(len(self.grid)).to(self.grid)
        k, curves = self.spline_order, self.spline_weight.shape[0]
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * self.scale_base)
        noise = torch.rand(self.grid_size + 1, self.in_features, curves, device=self.grid.device) - 0.5
        # the reference basis, because a forced GPU backend may not run where the layer is made
        basis = ops.bspline_basis(self.grid.T[k:-k].double(), self.grid, order=k, backend="reference")
        coeff = _banded.fit(basis, noise * self.scale_noise / self.grid_size, k)
        with torch.no_grad():
            scale = 1.0 if self.enable_standalone_scale_spline else self.scale_spline
            self.spline_weight.copy_(coeff.permute(2, 0, 1) * scale)
        if self.spline_scaler is not None:
            nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5) * self.scale_spline)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SplineLayer":
        grid = self.grid
        super()._apply(fn, recurse)
        if grid.is_meta and not self.grid.is_meta:  # memory that nothing was written to yet
            self.grid = self._first_knots(len(grid)).to(self.grid)
        if self.grid.dtype in ROUNDED:
            self.grid = grid.to(self.grid.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        if self.grid.dtype in ROUNDED:  # load_state_dict(assign=True)
            self.grid = self.grid.float()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, grid_size={self.grid_size}, spline_order={self.spline_order}, "
            f"extrapolation={self.extrapolation!r}"
        )

    def _fail(self, argument: str, expected: str, got: Any) -> NoReturn:
        _check.fail(type(self).__name__, argument, expected, got)

    def _rows(self, x: Tensor) -> Tensor:
        """x ``[..., in]`` as ``[N, in]``."""
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != self.in_features:
            self._fail("x", f"[..., {self.in_features}]", list(x.shape) if isinstance(x, Tensor) else type(x).__name__)
        return x.reshape(-1, self.in_features)

    def _finite_rows(self, x: Tensor) -> Tensor:
        """`_rows` for what a single NaN, or the lack of a row, would spoil in silence."""
        rows = self._rows(x)
        if len(rows) == 0 or not bool(rows.isfinite().all()):
            self._fail("x", "at least one row of finite values", "no row" if len(rows) == 0 else "NaN or infinity")
        return rows

    # --- the splines -------------------------------------------------------------------------------------------------

    @property
    def scaled_spline_weight(self) -> Tensor:
        """The coefficients of every edge, ``[out, in, G + k]``."""
        if self.spline_scaler is None:
            return self.spline_weight
        return self.spline_weight * self.spline_scaler.unsqueeze(-1)

    def b_splines(self, x: Tensor) -> Tensor:
        """The basis at x: ``[..., in] -> [..., in, G + k]``."""
        return ops.bspline_basis(
            x, self.grid, order=self.spline_order, extrapolation=self.extrapolation, backend=self.backend
        )

    def curve2coeff(self, x: Tensor, y: Tensor) -> Tensor:
        """Coefficients ``[m, in, G + k]`` of the splines nearest to y ``[N, in, m]`` at x ``[N, in]``, in float64."""
        with torch.no_grad():
            coeff = _banded.fit(self.b_splines(self._rows(x).double()), y, self.spline_order)
        return coeff.permute(2, 0, 1).to(self.spline_weight.dtype).contiguous()

    def edge_activations(self, x: Tensor) -> Tensor:
        """The value of every edge, base branch and spline: ``[..., in] -> [..., out, in]`` in float32 or wider.

        Summed over ``in`` it is the output of the layer. It takes N * out * in values: for samples, not for whole
        training sets.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        spline = torch.einsum("...ib,oib->...oi", self.b_splines(x), self.scaled_spline_weight.to(x.dtype))
        return spline + self.base_activation(x).unsqueeze(-2) * self.base_weight.to(x.dtype)

    def _base_branch(self, x: Tensor) -> Tensor:
        """For an activation that the kernels do not have."""
        wide = torch.promote_types(x.dtype, self.base_weight.dtype)
        return F.linear(self.base_activation(x.to(wide)), self.base_weight.to(wide)).to(x.dtype)

    # --- grid changes ------------------------------------------------------------------------------------------------

    def outside_fraction(self, x: Tensor, inner: bool = True) -> Tensor:
        """Share of x ``[..., in]`` outside the inner grid (or the extended knots) of each feature, ``[in]`` in float32.

        Raises:
            ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        """
        return ops.outside_fraction(self._rows(x), self.grid, order=self.spline_order, inner=inner)

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to where the data is; every curve stays as near to itself on the data as the new knots allow.

        Call it between steps, for example after the first epochs, with a batch that shows the spread of the inputs.

        Args:
            x: ``[..., in]``, finite, at least one row.
            margin: how far the grid reaches beyond the data, in units of x, before the mix with its quantiles
                (``grid_eps``). For data whose spread is far below 0.01 give a smaller one.

        The fit is in float64 on the unscaled coefficients, so ``spline_scaler`` is untouched and counted once. A
        feature with one value only keeps its grid, or has it moved when the value lies outside.
        """
        data = self._finite_rows(x).double()
        margin = _check.number(type(self).__name__, "margin", margin, "a number >= 0", low=0)
        order, old = self.spline_order, self.grid.double()
        stored = torch.finfo(self.grid.dtype)
        knots, kept = _knots.data_knots(data, old, self.grid_size, order, margin, self.grid_eps, stored)
        new = knots.to(self.grid.dtype).double()  # fit over the knots as they will be stored

        def basis(grid: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda points: ops.bspline_basis(
                points, grid, order=order, extrapolation=self.extrapolation, backend=self.backend
            )

        sites = _knots.fit_sites(new, order, self.extrapolation)
        change = _banded.refit(data, sites, basis(new), basis(old), order)
        coeff = torch.einsum("iab,oib->oia", change, self.spline_weight.double()).to(self.spline_weight.dtype)
        self.spline_weight.copy_(torch.where(kept[:, None], self.spline_weight, coeff))
        self.grid.copy_(torch.where(kept[:, None], self.grid, new.to(self.grid.dtype)))

    @torch.no_grad()
    def refine_grid(self, new_grid_size: int) -> None:
        """Insert knots until the inner grid has ``new_grid_size`` intervals. The function does not change, anywhere.

        A multiple of the old size keeps the inner grid of an equally spaced layer equally spaced. ``spline_weight``
        becomes a new, longer parameter: make the optimizer after this call, or anew.
        """
        expected = f"an integer >= the grid size {self.grid_size}"
        kind = type(self).__name__
        new_grid_size = _check.integer(kind, "new_grid_size", new_grid_size, self.grid_size, expected=expected)
        old = self.grid.double()
        grid = _knots.refined_knots(old, self.grid_size, self.spline_order, new_grid_size).to(self.grid.dtype)
        change = _knots.insertion_matrix(old, grid.double(), self.spline_order)
        coeff = torch.einsum("iab,oib->oia", change, self.spline_weight.double()).to(self.spline_weight.dtype)
        self.spline_weight = nn.Parameter(coeff.contiguous(), requires_grad=self.spline_weight.requires_grad)
        self.grid, self.grid_size = grid, new_grid_size

    # --- regularisation, pruning, plots ------------------------------------------------------------------------------

    def regularization_loss(
        self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0, *, x: Tensor | None = None
    ) -> Tensor:
        """L1 norm and entropy of the edges, a scalar.

        Without x the size of an edge is the mean of its absolute coefficients (the weight form of efficient-kan:
        cheap). With x ``[..., in]`` it is the mean absolute value of the edge on the data (Liu et al., KAN, section
        2.5), which needs N * out * in values for the N rows of x: pass a sample of the batch.
        """
        size = self.spline_weight.abs().mean(-1) if x is None else self._edge_sizes(self._rows(x))
        size = size.to(torch.promote_types(size.dtype, torch.float32))
        total = size.sum()
        share = size / (total + 1e-12)
        entropy = -(share * (share + 1e-30).log()).sum()  # edges of size 0 count 0, with finite gradients
        return regularize_activation * total + regularize_entropy * entropy

    def _edge_sizes(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            self._fail("x", "at least one row", "no row")
        return self.edge_activations(x).abs().mean(0)

    @torch.no_grad()
    def edge_sizes(self, x: Tensor | None = None, points: int = 64) -> Tensor:
        """Mean absolute value of every edge, ``[out, in]``: on the data x, or on ``points`` points of the grid.

        x is finite, with at least one row.
        """
        if x is not None:
            rows = self._finite_rows(x)
        else:
            low, high = _knots.inner_range(self.grid, self.spline_order)
            rows = torch.lerp(low, high, torch.linspace(0, 1, points, device=low.device, dtype=low.dtype).unsqueeze(1))
        step = max(1, _banded.CHUNK // (self.in_features * self.out_features))
        return torch.stack([self._edge_sizes(part) * (len(part) / len(rows)) for part in rows.split(step)]).sum(0)

    @torch.no_grad()
    def prune(self, threshold: float, x: Tensor | None = None) -> Tensor:
        """Set edges smaller than ``threshold`` (see `edge_sizes`) to 0 in place; the mask of the others, ``[out, in]``.

        Shapes and parameters stay. Training moves the edges away from 0 again, by gradients and by what an optimizer
        remembers of them: `keep_edges` after every step is what keeps them 0. `KAN.prune` makes a smaller network.
        """
        mask = self.edge_sizes(x) >= _check.number(type(self).__name__, "threshold", threshold, "a number")
        self.keep_edges(mask)
        return mask

    @torch.no_grad()
    def keep_edges(self, mask: Tensor) -> None:
        """Set the edges where ``mask`` (bool ``[out, in]``, as `prune` returns it) is False to 0, in place."""
        shape = list(self.base_weight.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            self._fail("mask", f"a bool tensor {shape}", got)
        cut = ~mask.to(self.base_weight.device)
        self.base_weight.masked_fill_(cut, 0)
        if self.spline_scaler is not None:
            self.spline_scaler.masked_fill_(cut, 0)
        if not self.shared_curves:
            self.spline_weight.masked_fill_(cut.unsqueeze(-1), 0)

    def select(self, outputs: Tensor, features: Tensor) -> None:
        """Keep some outputs and features, in place, given as masks ``[out]``, ``[in]`` or as indices."""

        def kept(weight: nn.Parameter, rows: Tensor | slice) -> nn.Parameter:
            return nn.Parameter(weight.detach()[rows][:, features].clone(), requires_grad=weight.requires_grad)

        curves = slice(None) if self.shared_curves else outputs
        self.base_weight = kept(self.base_weight, outputs)
        self.spline_weight = kept(self.spline_weight, curves)
        if self.spline_scaler is not None:
            self.spline_scaler = kept(self.spline_scaler, outputs)
        self.grid = self.grid[features].clone()
        self.out_features, self.in_features = self.base_weight.shape

    def plot(self, features: Sequence[int] | None = None, outputs: Sequence[int] | None = None) -> "Figure":
        """Draw the learned curves: one panel an input feature, one line an output. Returns a matplotlib Figure.

        By default the first 16 features and the first 8 outputs. Needs matplotlib (``pip install 'pyml[train]'``).
        """
        from pyml.nn import _plot

        return _plot.curves(self, features, outputs)
