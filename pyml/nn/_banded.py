"""Least squares for splines in float64. At most k + 1 basis functions overlap, so the normal equations are banded.

torch.linalg.lstsq is not used: its default CPU driver is wrong in batches (pytorch issue 187411), and its only CUDA
driver is invalid for rank-deficient input, which real data often is. Here every feature is solved at once, on any
device, and directions without data follow a tiny ridge instead of noise.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22  # basis values held at once (32 MB)


def row_chunks(x: Tensor, columns: int) -> Iterator[Tensor]:
    """Pieces of x ``[N, in]`` whose basis, with ``columns`` functions a feature, stays within CHUNK values."""
    yield from x.split(max(1, CHUNK // max(1, x.shape[1] * columns)))


def gram_band(basis: Tensor, order: int) -> Tensor:
    """The band of A^T A for A = basis ``[N, in, nb]``: ``[in, nb, k + 1]``, [i, b, d] = sum_n A[n,i,b] A[n,i,b+d]."""
    _, features, nb = basis.shape
    band = basis.new_zeros(features, nb, order + 1)
    for d in range(min(order + 1, nb)):
        band[:, : nb - d, d] = (basis[..., : nb - d] * basis[..., d:]).sum(0)
    return band


def solve_banded(band: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """Solve (M + ridge * max(diag M) * I) c = rhs by banded Cholesky, O(nb k^2) a feature.

    Args:
        band: M in the layout of `gram_band`, ``[in, nb, k + 1]`` float64, positive semi-definite.
        rhs: ``[in, nb, m]`` float64.
        ridge: relative to the largest diagonal entry of each feature. As it goes to 0 the solution goes to the
            minimum-norm least-squares solution.

    Returns:
        ``[in, nb, m]``. Never NaN for finite input: a feature without any data gets 0.
    """
    features, nb, width = band.shape
    k = width - 1
    largest = band[..., 0].amax(1, keepdim=True)
    shift = ridge * torch.where(largest > 0, largest, 1)
    factor = torch.cat([band, band.new_zeros(features, k, width)], 1)  # k rows of padding end the loops without cases
    factor[:, :nb, 0] += shift
    solution = torch.cat([rhs, rhs.new_zeros(features, k, rhs.shape[2])], 1)
    for b in range(nb):
        pivot = torch.maximum(factor[:, b, :1], shift).sqrt()  # rounding must not turn a weak pivot negative
        factor[:, b] /= pivot
        factor[:, b, :1] = pivot
        column = factor[:, b, 1:]
        solution[:, b] /= pivot
        solution[:, b + 1 : b + width] -= column.unsqueeze(-1) * solution[:, b].unsqueeze(1)
        for e in range(1, width):
            factor[:, b + e, : width - e] -= column[:, e - 1 : e] * column[:, e - 1 :]
    for b in reversed(range(nb)):
        above = (factor[:, b, 1:].unsqueeze(-1) * solution[:, b + 1 : b + width]).sum(1)
        solution[:, b] = (solution[:, b] - above) / factor[:, b, :1]
    return solution[:, :nb]


def fit(basis: Tensor, y: Tensor, order: int, ridge: float = 1e-9) -> Tensor:
    """Coefficients ``[in, nb, m]`` of the splines nearest to y ``[N, in, m]``, the smallest where y leaves a choice."""
    basis, y = basis.double(), y.double()
    return solve_banded(gram_band(basis, order), torch.einsum("nib,nim->ibm", basis, y), ridge)


def refit(
    x: Tensor,
    sites: Tensor,
    new_basis: Callable[[Tensor], Tensor],
    old_basis: Callable[[Tensor], Tensor],
    order: int,
) -> Tensor:
    """The linear map from old to new coefficients that keeps every spline nearest to itself on the data.

    The rows of x count fully. ``sites``, spread over the whole new grid, count a millionth in total: they decide only
    where there is no data, so that a constant or binary feature keeps its curve and does not fall to 0. Because the map
    does not depend on the curves, no ``[N, in, out]`` tensor is formed and a scale on the curves plays no part.

    Args:
        x: ``[N, in]`` float64.
        sites: ``[S, in]`` float64.
        new_basis, old_basis: ``[n, in] -> [n, in, nb]`` float64.

    Returns:
        ``[in, nb_new, nb_old]`` float64.
    """
    columns = 2 * new_basis(sites[:1]).shape[-1]
    band: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for points, weight in ((x, 1.0), (sites, 1e-6 * len(x) / len(sites))):
        for rows in row_chunks(points, columns):
            new, old = new_basis(rows), old_basis(rows)
            band = band + weight * gram_band(new, order)
            cross = cross + weight * torch.einsum("nia,nib->iab", new, old)
    assert isinstance(band, Tensor) and isinstance(cross, Tensor)
    return solve_banded(band, cross, 1e-14)
