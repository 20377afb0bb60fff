"""Triton launchers of the top-k attention family: `region_attention`, its router `route_regions`, `topk_attention`.

The kernels are in topk_attention_region*.py and topk_attention_token*.py.
"""

import torch
from pyml.triton_kernels.topk_attention_region import region_attention_fwd
from pyml.triton_kernels.topk_attention_region_bwd import region_attention_bwd
from pyml.triton_kernels.topk_attention_token import topk_attention_fwd
from pyml.triton_kernels.topk_attention_token_bwd import topk_attention_bwd
from torch import Tensor


def route_regions_fwd(
    q: Tensor, k: Tensor, topk: int, scale: float | None, per_head: bool, query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Composed of torch ops: one pass over q and one over k, then a product and a stable sort of P by Pk numbers.

    A kernel of its own would save nothing: the passes run at the speed of memory, the rest is small. Ties need the
    stable sort, which torch.topk does not promise.
    """
    qm, km = _means(q, query_mask), _means(k, key_mask)
    if not per_head:
        qm, km = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (qm, km))  # [B, 1, P, H * D]
    factor = max(qm.shape[-1], 1) ** -0.5 if scale is None else scale
    logits = ((qm.double() @ km.double().transpose(-1, -2)) * factor).float()
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask.any(-1)[:, None, None, :], -torch.inf)
    logits, index = logits.sort(stable=True, dim=-1, descending=True)
    return index[..., :topk].contiguous(), logits[..., :topk].contiguous()


def _means(t: Tensor, mask: Tensor | None) -> Tensor:
    """float32 means ``[B, H, P, D]`` of the valid tokens, from sums in float64, without a copy of t in float64."""
    if mask is None:
        return (t.sum(3, dtype=torch.float64) / max(t.shape[3], 1)).float()
    total = t.masked_fill(~mask[:, None, :, :, None], 0).sum(3, dtype=torch.float64)
    return (total / mask.sum(-1).clamp(min=1)[:, None, :, None]).float()


__all__ = [
    "region_attention_bwd",
    "region_attention_fwd",
    "route_regions_fwd",
    "topk_attention_bwd",
    "topk_attention_fwd",
]
