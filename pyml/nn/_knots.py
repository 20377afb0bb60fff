"""Knots: the uniform grid, the grid that follows the data, and exact refinement by knot insertion. All in float64."""

import torch
from torch import Tensor


def uniform_knots(grid_range: tuple[float, float], grid_size: int, order: int) -> Tensor:
    """G + 2k + 1 knots ``[G + 2k + 1]`` of equal spacing, k of them beyond each end of the range.

    In the default dtype (float32 where that is narrower) and this order of operations, so that the values are those of
    the public codes bit for bit.
    """
    low, high = grid_range
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.arange(-order, grid_size + order + 1, dtype=wide) * ((high - low) / grid_size) + low


def usable(grid: Tensor) -> bool:
    """Whether these are knots: finite, ascending, not all in one place."""
    ascending = (grid.diff() >= 0).all() & (grid[:, 0] < grid[:, -1]).all()
    return bool(grid.isfinite().all() & ascending)


def inner_range(grid: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """First and last knot of the inner grid, ``[in]`` each."""
    return grid[:, order], grid[:, grid.shape[1] - order - 1]


def data_knots(
    x: Tensor, grid: Tensor, grid_size: int, order: int, margin: float, grid_eps: float, stored: torch.finfo
) -> tuple[Tensor, Tensor]:
    """Knots that follow the data: a mix of the quantiles of x (share 1 - grid_eps) and of equal spacing (grid_eps).

    Args:
        x: ``[N, in]`` float64, finite.
        grid: the knots so far, ``[in, G + 2k + 1]`` float64.
        margin: how far the equally spaced part reaches beyond the data.
        stored: the dtype that the knots will be stored in.

    Returns:
        knots ``[in, G + 2k + 1]``, and kept ``[in]``: True where the row is the old one. A feature with one value only
        (as near as knots can tell) says nothing about a spread: it keeps its row when the value lies inside, else its
        row is moved to the value, and made wider where its knots would coincide there.
    """
    ordered = x.sort(0).values
    low, high = ordered[0], ordered[-1]
    quantiles = ordered[torch.arange(grid_size + 1, device=x.device) * (len(x) - 1) // grid_size]
    step = (high - low + 2 * margin) / grid_size
    index = torch.arange(-order, grid_size + order + 1, device=x.device, dtype=x.dtype).unsqueeze(1)
    uniform = low - margin + index * step
    inner = grid_eps * uniform[order : grid_size + order + 1] + (1 - grid_eps) * quantiles
    left = inner[:1] + index[:order] * step
    right = inner[-1:] + (index[grid_size + order + 1 :] - grid_size) * step
    knots = torch.cat([left, inner, right]).T

    first, last = inner_range(grid, order)
    size = stored.eps * torch.maximum(low.abs(), high.abs())
    apart = 16 * size.clamp_min(8 * stored.tiny)  # nearer values have no room for knots between them
    constant = high - low <= apart
    kept = constant & (low >= first) & (high <= last)
    steps = grid.diff()
    wider = (apart / steps.where(steps > 0, torch.inf).amin(1)).clamp_min(1)
    middle, old_middle = ((pair[0] + pair[1]).unsqueeze(1) / 2 for pair in ((low, high), (first, last)))
    moved = middle + (grid - old_middle) * wider.unsqueeze(1)
    knots = torch.where(constant.unsqueeze(1), torch.where(kept.unsqueeze(1), grid, moved), knots)
    return knots, kept


def fit_sites(grid: Tensor, order: int, extrapolation: str) -> Tensor:
    """k + 1 points inside every interval that the layer evaluates, ``[S, in]``: enough to fix every coefficient."""
    if extrapolation != "zero":
        grid = grid[:, order : grid.shape[1] - order]
    share = (torch.arange(order + 1, device=grid.device, dtype=grid.dtype) + 0.5) / (order + 1)
    return (grid[:, :-1, None] + (grid[:, 1:] - grid[:, :-1])[..., None] * share).flatten(1).T


def refined_knots(grid: Tensor, grid_size: int, order: int, new_size: int) -> Tensor:
    """The same knots and new_size - grid_size more, ``[in, new_size + 2k + 1]``, each put in the widest inner piece.

    A multiple of the old size splits every interval of an equally spaced grid in equal parts. The knots beyond the
    inner range stay, so the live range does not shrink.
    """
    inner = grid[:, order : order + grid_size + 1]
    width = inner[:, 1:] - inner[:, :-1]
    pieces = torch.ones_like(width)
    for _ in range(new_size - grid_size):
        widest = (width / pieces).argmax(1, keepdim=True)
        pieces.scatter_add_(1, widest, torch.ones_like(widest, dtype=pieces.dtype))
    most = int(pieces.max())
    part = torch.arange(1, most, device=grid.device, dtype=grid.dtype)
    inserted = inner[:, :-1, None] + width[..., None] * (part / pieces[..., None])
    real = part < pieces[..., None]
    far = torch.where(real, inserted, torch.inf).flatten(1).sort(1).values[:, : new_size - grid_size]
    return torch.cat([grid, far], 1).sort(1).values


def insertion_matrix(old: Tensor, new: Tensor, order: int) -> Tensor:
    """Coefficients over the knots ``old`` -> coefficients of the same function over ``new``, a superset of them.

    old ``[in, K]``, new ``[in, K']``, float64 -> ``[in, nb_new, nb_old]``. The Oslo algorithm (Cohen, Lyche and
    Riesenfeld, "Discrete B-splines and subdivision techniques", 1980): the recursion of the basis over the new knots.
    """
    nb = new.shape[1] - order - 1
    at = new[:, :nb, None]
    t = old.unsqueeze(1)
    alpha = ((t[..., :-1] <= at) & (at < t[..., 1:])).to(new.dtype)
    for p in range(1, order + 1):
        at = new[:, p : nb + p, None]
        left = _over(at - t[..., : -p - 1], t[..., p:-1] - t[..., : -p - 1])
        right = _over(t[..., p + 1 :] - at, t[..., p + 1 :] - t[..., 1:-p])
        alpha = left * alpha[..., :-1] + right * alpha[..., 1:]
    return alpha


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where knots coincide."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))
