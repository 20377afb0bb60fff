"""The networks of ``--arch``: LSNet, two ablations, its corrected layout, and two baselines without training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyml.methods._pictures import to_float
from pyml.methods._recipe import among, require
from pyml.methods.lsnet.data import Pairs
from pyml.nn import BiLevelRoutingAttention, LSNet

LSNETS = {
    "identity": {"attention": "identity"},
    "dense": {"attention": "dense"},
    "lsnet": {},
    "lsnet-fixed": {"layout": "fixed"},
}
ARCHS = ("raw", "affine", *LSNETS)


class Affine(nn.Module):
    """One affine map of colours for all images: y = weight x + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, 3, H, W]``."""
        return nn.functional.conv2d(x, self.weight[:, :, None, None], self.bias)

    @torch.no_grad()
    def fit(self, pairs: Pairs, chosen: Sequence[int]) -> None:
        """Least squares over every pixel of the chosen pairs, from sums in float64."""
        gram, moment = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
        for i in chosen:
            x, y = (to_float(side[i]).flatten(1).T.double() for side in (pairs.inputs, pairs.targets))
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            gram += x.T @ x
            moment += x.T @ y
        solved = torch.linalg.lstsq(gram, moment, driver="gelsd").solution
        self.weight.copy_(solved[:3].T)
        self.bias.copy_(solved[3])


def build(arch: str) -> nn.Module:
    """The network of one ``--arch`` name."""
    require("arch", arch, among(ARCHS))
    if arch in LSNETS:
        return LSNet(**LSNETS[arch])  # type: ignore[arg-type]
    return Affine() if arch == "affine" else nn.Identity()


def attention_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Operations of the attention products for an image of this shape."""
    half = (shape[0], 12, shape[2] // 2, shape[3] // 2)
    return sum(m.flops(half)[1] for m in model.modules() if isinstance(m, BiLevelRoutingAttention))
