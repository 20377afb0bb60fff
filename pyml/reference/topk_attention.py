"""Top-k attention in plain torch: gather the chosen regions by advanced indexing, then attend. Slow, large, readable.

Shapes: q ``[B, H, P, S, D]`` (P regions of S queries), k ``[B, H, Pk, Sk, D]``, v ``[B, H, Pk, Sk, Dv]``,
index ``[B, 1 or H, P, K]``. Read this file before the kernels: they compute the same numbers without gathering.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyml.reference import compute_dtype


def check_regions(op: str, index: Tensor, counts: Tensor | None, regions: int) -> None:
    """Refuse indices outside [-1, regions) and counts outside [0, K], where the numbers can be read."""
    tensors = [t for t in (index, counts) if t is not None]
    if torch.compiler.is_compiling() or any(t.is_meta or torch._C._functorch.is_batchedtensor(t) for t in tensors):
        return
    slots = index.shape[-1]
    if counts is not None and ((counts < 0) | (counts > slots)).any():
        raise ValueError(f"{op}: counts: expected numbers from 0 to K = {slots}, got {counts.flatten().tolist()[:8]}")
    used = index if counts is None else index.where(torch.arange(slots, device=index.device) < counts.unsqueeze(-1), -1)
    wrong = used[(used < -1) | (used >= regions)]
    if wrong.numel():
        raise ValueError(f"{op}: index: expected regions from 0 to {regions - 1} or -1 for none, got {int(wrong[0])}")


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float | None = None,
    counts: Tensor | None = None,
    key_mask: Tensor | None = None,
    region_weight: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every query over the keys of the regions that its own region chose (BiFormer, eq. 6)."""
    check_regions("region_attention", index, counts, k.shape[2])
    wide = compute_dtype(q, k, v, region_weight)
    B, H, P, S, D = q.shape
    Pk, Sk, K = k.shape[2], k.shape[3], index.shape[3]
    scale = max(D, 1) ** -0.5 if scale is None else scale
    valid = torch.ones(B, 1, Pk, Sk, dtype=torch.bool, device=q.device) if key_mask is None else key_mask.unsqueeze(1)
    kw = k.to(wide).masked_fill(~valid.unsqueeze(-1), 0)  # a masked key has no influence, not even a NaN
    vw = v.to(wide).masked_fill(~valid.unsqueeze(-1), 0)

    # One more region of masked zeros: what -1 and entries beyond the counts point to.
    kw, vw = (torch.cat([t, t.new_zeros(B, H, 1, Sk, t.shape[-1])], 2) for t in (kw, vw))
    valid = torch.cat([valid, valid.new_zeros(B, 1, 1, Sk)], 2).expand(B, H, Pk + 1, Sk)
    chosen = index.where((index >= 0) & (index < Pk), Pk)
    if counts is not None:
        chosen = chosen.where(torch.arange(K, device=q.device) < counts.unsqueeze(-1), Pk)
    chosen = chosen.expand(B, H, P, K)
    b = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    h = torch.arange(H, device=q.device).view(1, H, 1, 1)
    keys, values, allowed = kw[b, h, chosen], vw[b, h, chosen], valid[b, h, chosen]  # [B, H, P, K, Sk(, D)]
    if region_weight is not None:
        weight = region_weight.to(wide).where(chosen < Pk, 0)[..., None, None]
        keys, values = keys * weight, values * weight

    logits = torch.einsum("bhpsd,bhpktd->bhpskt", q.to(wide) * scale, keys)
    logits = logits.masked_fill(~allowed.unsqueeze(3), -torch.inf).flatten(4)
    # One more logit of -inf: so there is a largest one even among none.
    top = torch.cat([logits.detach(), logits.detach().new_full((B, H, P, S, 1), -torch.inf)], -1).amax(-1, keepdim=True)
    weights = torch.exp(logits - top.where(top > -torch.inf, 0).where(~top.isnan(), top))
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / total.where(total != 0, 1)  # no valid key: 0
    return torch.einsum("bhpst,bhptd->bhpsd", probabilities, values.flatten(3, 4)).to(q.dtype)


def route_regions(
    q: Tensor,
    k: Tensor,
    topk: int,
    scale: float | None = None,
    per_head: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The topk key regions whose mean is most similar to the mean of each query region (BiFormer, eqs. 3 to 5).

    Means and logits are float32, rounded from sums in float64: so their bits do not depend on the order of the sums.
    """
    with torch.no_grad():
        qm, km = _means(q, query_mask), _means(k, key_mask)
        if not per_head:
            qm, km = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (qm, km))  # [B, 1, P, H * D]
        scale = max(qm.shape[-1], 1) ** -0.5 if scale is None else scale
        logits = ((qm.double() @ km.double().transpose(-1, -2)) * scale).float()
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask.any(-1)[:, None, None, :], -torch.inf)
        logits, index = logits.sort(stable=True, dim=-1, descending=True)  # stable: the lower index first
        return index[..., :topk].contiguous(), logits[..., :topk].contiguous()


def _means(t: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each region ``[B, H, P, S, D] -> [B, H, P, D]`` over its valid tokens; 0 where there is none."""
    if mask is None:
        return (t.double().sum(3) / max(t.shape[3], 1)).float()
    total = t.double().masked_fill(~mask[:, None, :, :, None], 0).sum(3)
    return (total / mask.sum(-1).clamp(min=1)[:, None, :, None]).float()


# --- token level ------------------------------------------------------------------------------------------------------


def token_logits(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None, wide: torch.dtype
) -> Tensor:
    """Logits ``[B, H, N, M]`` of queries ``[B, H, N, D]`` and keys ``[B, Hkv, M, D]``, -inf where masked.

    Query head h uses kv head h // (H / Hkv).
    """
    H, N, D = q.shape[1:]
    M = k.shape[2]
    keys = k.to(wide).repeat_interleave(H // max(k.shape[1], 1), 1)
    logits = (q.to(wide) @ keys.transpose(-1, -2)) * (max(D, 1) ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        added = mask.to(wide)
        logits = (logits + added).masked_fill(added == -torch.inf, -torch.inf)  # masked, whatever was there
    if causal:
        later = torch.arange(M, device=q.device) > torch.arange(N, device=q.device).unsqueeze(-1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def kept_keys(logits: Tensor, topk: int) -> Tensor:
    """Which keys ``[B, H, N, M]`` each query keeps: its topk largest logits, equal ones by rising index.

    Masked keys never; all others in a row with a NaN, which has no largest logits.
    """
    logits = logits.detach()
    best = logits.sort(dim=-1, descending=True, stable=True).indices[..., :topk]  # stable: the lower index first
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    return (kept | logits.isnan().any(-1, keepdim=True)) & (logits != -torch.inf)


def softmax_over(logits: Tensor, kept: Tensor) -> Tensor:
    """Softmax over the kept keys, 0 elsewhere and where a query keeps none."""
    logits = logits.masked_fill(~kept, -torch.inf)
    # One more logit of -inf: so there is a largest one even among no keys.
    top = torch.cat([logits.detach(), logits.detach().new_full((*logits.shape[:3], 1), -torch.inf)], -1)
    top = top.amax(-1, keepdim=True)
    weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    topk: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Softmax attention over the topk largest logits of each query, once for each of topk: ``[B, topks, H, N, Dv]``."""
    wide = compute_dtype(q, k, v, mask)
    logits = token_logits(q, k, mask, causal, scale, wide)
    values = v.to(wide).repeat_interleave(q.shape[1] // max(v.shape[1], 1), 1)
    probabilities = [softmax_over(logits, kept_keys(logits, n)) for n in topk]
    if straight_through:  # the value of the hard one, the derivative of the dense one
        dense = softmax_over(logits, logits.detach() != -torch.inf)
        probabilities = [hard.detach() + (dense - dense.detach()) for hard in probabilities]
    return torch.stack([p @ values for p in probabilities], 1).to(q.dtype)
