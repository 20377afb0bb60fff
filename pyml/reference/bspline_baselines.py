"""Pinned baselines of the B-spline family: plain torch with the parameters of `pyml.ops`.

Each stands for one way in which these layers are written today:

- `kan_eager`: the form of efficient-kan, Cox-de Boor on dense tensors and one matrix product;
- `wkan_eager`: the form of the public WKAN layer, the same recursion and one spline an input;
- `kan_closed`, `wkan_closed`: the cubic basis in closed form, no recursion. Compiled by `torch.compile`, this is the
  strongest pure-torch form that we know, and the one that targets are set against.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor, grid: Tensor) -> Tensor:
    """16-bit inputs go through the basis in the dtype of the knots, as in our kernels; otherwise nothing happens."""
    return x.to(torch.promote_types(x.dtype, grid.dtype))


def dense_basis(x: Tensor, grid: Tensor, order: int = 3) -> Tensor:
    """All basis functions by recursion over full tensors: x ``[B, in]``, grid ``[in, knots]`` -> ``[B, in, G + k]``.

    Distinct knots only (the forms it stands for divide by zero on repeated ones).
    """
    x = x.unsqueeze(-1)
    basis = ((x >= grid[..., :-1]) & (x < grid[..., 1:])).to(x.dtype)
    for k in range(1, order + 1):
        left = (x - grid[..., : -(k + 1)]) / (grid[..., k:-1] - grid[..., : -(k + 1)])
        right = (grid[..., k + 1 :] - x) / (grid[..., k + 1 :] - grid[..., 1:-k])
        basis = left * basis[..., :-1] + right * basis[..., 1:]
    return basis


def closed_basis(x: Tensor, grid: Tensor) -> Tensor:
    """All cubic basis functions on uniform knots: B(t) = ((2 - |t|)_+^3 - 4 (1 - |t|)_+^3) / 6, t from its middle knot.

    x ``[B, in]``, grid ``[in, knots]`` or ``[knots]`` -> ``[B, in, G + 3]``.
    """
    functions = grid.shape[-1] - 4
    first, step = grid[..., :1], (grid[..., -1:] - grid[..., :1]) / (grid.shape[-1] - 1)
    middle = torch.arange(2, functions + 2, device=x.device, dtype=x.dtype)
    t = (((x.unsqueeze(-1) - first) / step) - middle).abs()
    outer, inner = F.relu(2 - t), F.relu(1 - t)
    return (outer * outer * outer - 4 * (inner * inner * inner)) / 6


def kan_eager(x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor, scaler: Tensor | None = None) -> Tensor:
    """KAN layer as efficient-kan runs it. coeff ``[out, in, G + k]``, scaler ``[out, in]`` multiplies it per edge."""
    weight = coeff if scaler is None else coeff * scaler.unsqueeze(-1)
    basis = dense_basis(_wide(x, grid), grid).flatten(1).to(x.dtype)
    return F.linear(F.silu(x), base_weight) + F.linear(basis, weight.flatten(1))


def kan_closed(x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor, scaler: Tensor | None = None) -> Tensor:
    """KAN layer on the dense closed-form basis, made to be compiled."""
    weight = coeff if scaler is None else coeff * scaler.unsqueeze(-1)
    basis = closed_basis(_wide(x, grid), grid).flatten(1).to(x.dtype)
    return F.linear(F.silu(x), base_weight) + F.linear(basis, weight.flatten(1))


def wkan_eager(x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor, scaler: Tensor) -> Tensor:
    """WKAN layer as the public SpectralKAN code runs it. coeff ``[in, G + k]``, scaler ``[out, in]``."""
    spline = (dense_basis(_wide(x, grid), grid) * coeff).sum(-1).to(x.dtype)
    return F.linear(F.silu(x), base_weight) + F.linear(spline, scaler)


def wkan_closed(x: Tensor, grid: Tensor, coeff: Tensor, base_weight: Tensor, scaler: Tensor) -> Tensor:
    """WKAN layer on the dense closed-form basis, made to be compiled."""
    spline = (closed_basis(_wide(x, grid), grid) * coeff).sum(-1).to(x.dtype)
    return F.linear(F.silu(x), base_weight) + F.linear(spline, scaler)


class PlainLayer(nn.Module):
    """A KANLinear or WKANLinear of pyml run by one of the forms above, on the parameters of that layer."""

    grid: Tensor

    def __init__(self, layer: Any, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        self.base_weight, self.spline_weight = layer.base_weight, layer.spline_weight
        self.spline_scaler = getattr(layer, "spline_scaler", None)
        self.register_buffer("grid", layer.grid)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``."""
        coeff = self.spline_weight[0] if self.form in (wkan_eager, wkan_closed) else self.spline_weight
        y = self.form(x.reshape(-1, x.shape[-1]), self.grid, coeff, self.base_weight, self.spline_scaler)
        return y.view(*x.shape[:-1], -1)


def on_plain_torch(module: nn.Module, forms: dict[type[nn.Module], Callable[..., Tensor]]) -> nn.Module:
    """A copy of a model in which every layer of the given types runs by the given form, on copies of its parameters."""
    module = copy.deepcopy(module)
    if type(module) in forms:
        return PlainLayer(module, forms[type(module)])
    for name, child in list(module.named_modules()):
        if type(child) in forms:
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], PlainLayer(child, forms[type(child)]))
    return module
