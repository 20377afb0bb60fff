"""Pinned baselines of top-k attention: plain torch with the arguments of `pyml.ops`, and the module on its parameters.

Each stands for one way in which this attention is run today:

- `region_public`: the form of the public BiFormer and LSNet code: keys and values expanded to every query region,
  gathered, and the whole attention matrix written out;
- `region_sdpa`: gathered by advanced indexing (its gradient stays small), then scaled_dot_product_attention with the
  values padded with zeros to the width of the keys, which is what torch's fused CPU kernel asks for;
- `region_flex`: compiled FlexAttention with the chosen regions as its block mask; on a CPU it has no backward;
- `topk_scatter`: token level: torch.topk, a mask scattered from its indices, softmax.

Do not tune these without a note in CHANGELOG.md: ratios of older result files would lose their meaning.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[..., Tensor]


def region_public(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """q ``[B, H, P, S, D]``, k, v ``[B, H, Pk, Sk, D | Dv]``, index ``[B, 1 or H, P, K]`` -> ``[B, H, P, S, Dv]``."""
    B, H, P, _, D = q.shape
    chosen = index.expand(B, H, -1, -1)[..., None, None]

    def gathered(t: Tensor) -> Tensor:
        everywhere = t.unsqueeze(2).expand(-1, -1, P, -1, -1, -1)  # [B, H, P, Pk, Sk, D]: its gradient has that size
        return everywhere.gather(3, chosen.expand(-1, -1, -1, -1, *t.shape[3:])).flatten(3, 4)

    keys, values = gathered(k), gathered(v)
    weights = torch.softmax(q * (D**-0.5 if scale is None else scale) @ keys.transpose(-1, -2), -1)
    return weights @ values


def region_sdpa(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """As `region_public`, through torch's fused attention: less memory, and on a CPU the faster forward."""
    B, H, P, S, D = q.shape
    wide = F.pad(v, (0, D - v.shape[-1])) if v.shape[-1] < D else v
    b = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    h = torch.arange(H, device=q.device).view(1, H, 1, 1)
    chosen = index.expand(B, H, -1, -1)
    keys, values = (t[b, h, chosen].reshape(B, H * P, -1, t.shape[-1]) for t in (k, wide))
    y = F.scaled_dot_product_attention(q.reshape(B, H * P, S, D), keys, values, scale=scale)
    return y[..., : v.shape[-1]].reshape(B, H, P, S, v.shape[-1])


_FLEX: list[Callable[..., Any]] = []  # compiled once


def region_flex(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """As `region_public`, for one choice of regions by all heads or by each; equal region sizes."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if not _FLEX:
        _FLEX.append(torch.compile(flex_attention, dynamic=False))
    P, S = q.shape[2:4]
    Pk, Sk = k.shape[2:4]
    blocks = index.sort(-1).values.int()
    padded = F.pad(blocks, (0, Pk - blocks.shape[-1]))
    count = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32, device=q.device)
    mask = BlockMask.from_kv_blocks(count, padded, BLOCK_SIZE=(S, Sk), seq_lengths=(P * S, Pk * Sk))
    flat = (t.flatten(2, 3) for t in (q, k, v))
    return _FLEX[0](*flat, block_mask=mask, scale=scale).unflatten(2, (P, S))


def topk_scatter(q: Tensor, k: Tensor, v: Tensor, topk: int | Sequence[int]) -> Tensor:
    """q ``[B, H, N, D]``, k, v ``[B, H, M, D | Dv]``: each query keeps its ``topk`` largest logits."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5

    def one(n: int) -> Tensor:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(n, -1).indices, True)
        return torch.softmax(logits.masked_fill(~kept, -math.inf), -1) @ v

    return one(topk) if isinstance(topk, int) else torch.stack([one(n) for n in topk])


class PlainRegionAttention(nn.Module):
    """A BiLevelRoutingAttention of pyml run the public way around one of the forms above, on that layer's parameters.

    ``[B, C, H, W]`` with sides that n_win divides: convolution and BatchNorm on the map, windows, means, torch.topk.
    """

    def __init__(self, layer: Any, form: Attend) -> None:
        super().__init__()
        self.form, self.layer = form, layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        n, heads = layer.n_win, layer.num_heads
        q, kv = (p.bn(p.c(x)) for p in (layer.to_q, layer.to_kv))
        k, v = kv.split([layer.qk_dim, layer.dim], 1)
        height, width = x.shape[2] // n, x.shape[3] // n

        def windows(t: Tensor) -> Tensor:
            cut = t.unflatten(1, (heads, -1)).unflatten(3, (n, height)).unflatten(5, (n, width))
            return cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(2, 3).flatten(3, 4)  # [B, heads, P, S, C / heads]

        q_rows, k_rows, v_rows = windows(q), windows(k), windows(v)
        with torch.no_grad():
            mean_q, mean_k = (t.mean(3).transpose(1, 2).flatten(2) for t in (q_rows, k_rows))
            index = (mean_q * layer.scale @ mean_k.transpose(1, 2)).topk(layer.topk, -1).indices.unsqueeze(1)
        y = self.form(q_rows, k_rows, v_rows, index, layer.scale)
        cut = y.unflatten(3, (height, width)).unflatten(2, (n, n))
        return cut.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape) + layer.lepe(v)


def on_plain_torch(model: nn.Module, form: Attend) -> nn.Module:
    """A copy of a model in which every BiLevelRoutingAttention runs by the given form, on copies of its parameters."""
    from pyml.nn import BiLevelRoutingAttention

    model = copy.deepcopy(model)
    if isinstance(model, BiLevelRoutingAttention):
        return PlainRegionAttention(model, form)
    for name, child in list(model.named_modules()):
        if isinstance(child, BiLevelRoutingAttention):
            setattr(
                model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], PlainRegionAttention(child, form)
            )
    return model
