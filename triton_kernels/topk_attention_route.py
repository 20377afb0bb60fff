"""Triton kernels of `route_regions`: means of the regions, the logits of all pairs, and the place of each in its row.

Means and logits are float32, rounded from sums in float64, as on every backend: so all of them choose alike.
"""

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import launch, next_power
from pyml.triton_kernels.topk_attention_region import load_rows, valid_keys
from pyml.triton_kernels.topk_attention_token import order_of
from torch import Tensor

MOST = 2**31 - 1
FEATURES = 128  # that a program averages at once
TILE = 64  # regions whose places one program finds, and as many that it compares them with at once


@triton.jit
def route_regions_means_kernel(
    x, token_mask, means, x_b, x_h, x_p, x_s, x_d, heads, regions, tokens, depth,
    HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means [B, H, regions, depth] over the valid tokens of each region, 0 where there is none."""
    steps = tl.cdiv(depth, BLOCK_D)
    region_id = (tl.program_id(0) // steps).to(tl.int64)
    first = (tl.program_id(0) % steps) * BLOCK_D
    r, h, b = region_id % regions, region_id // regions % heads, region_id // regions // heads
    rows = x + b * x_b + h * x_h + r * x_p + (tl.full((), 0, tl.int64) + first) * x_d
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
    count = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, tokens, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keep = valid_keys(token_mask, s, b, r, r >= 0, regions, tokens, HAS_MASK)
        sums += load_rows(rows, s, keep, depth - first, x_s, x_d, tl.float64, tl.float64, BLOCK_D)
        count += keep.to(tl.int32)
    mean = tl.sum(sums, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    c = first + tl.arange(0, BLOCK_D)
    tl.store(means + region_id * depth + c, mean.to(tl.float32), mask=c < depth)


@triton.jit
def route_regions_logits_kernel(
    q_means, k_means, seen, scale, logits, heads, joined, P, Pk, depth,
    HAS_SEEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logits [B, heads, P, Pk]: each sums over `joined` heads; -inf where a region has no valid key."""
    down, across = tl.cdiv(P, BLOCK_P), tl.cdiv(Pk, BLOCK_G)
    group = (tl.program_id(0) // across // down).to(tl.int64)
    p = tl.program_id(0) // across % down * BLOCK_P + tl.arange(0, BLOCK_P)
    g = tl.program_id(0) % across * BLOCK_G + tl.arange(0, BLOCK_G)
    acc = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    for head in range(0, joined):
        q_rows = q_means + (group * joined + head) * P * depth
        k_rows = k_means + (group * joined + head) * Pk * depth
        for d in range(0, depth, BLOCK_D):
            x = load_rows(q_rows + d, p, p < P, depth - d, depth, 1, tl.float64, tl.float64, BLOCK_D)
            y = load_rows(k_rows + d, g, g < Pk, depth - d, depth, 1, tl.float64, tl.float64, BLOCK_D)
            acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee", out_dtype=tl.float64)
    found = (acc * tl.load(scale)).to(tl.float32)
    if HAS_SEEN:
        valid = tl.load(seen + group // heads * Pk + g, mask=g < Pk, other=0) != 0
        found = tl.where(valid[None, :], found, float("-inf"))
    at = (group * P + p)[:, None] * Pk + g[None, :]
    tl.store(logits + at, found, mask=(p < P)[:, None] & (g < Pk)[None, :])


@triton.jit
def orders(every, g, Pk, MOST: tl.constexpr):
    """The logits of regions g in a row, and integers that order as they do: NaN above all, -0 as 0; nothing is below
    what stands behind the last region."""
    logits = tl.load(every + g, mask=g < Pk, other=float("-inf"))
    return logits, tl.where(logits != logits, MOST, order_of(logits, tl.int32, MOST))


@triton.jit
def route_regions_fwd_kernel(every, index, logits, Pk, topk, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """index and logits [rows, topk] from logits `every` [rows, Pk].

    The place of a region in its row is the number of those before it: larger ones, and equal ones of a lower index. No
    two share a place, and a row may have any length.
    """
    blocks = tl.cdiv(Pk, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * BLOCK
    g = begin + tl.arange(0, BLOCK)
    mine, order = orders(every + row * Pk, g, Pk, MOST)
    before = ((order[None, :] == order[:, None]) & (g[None, :] < g[:, None])).to(tl.int32)
    for start in range(0, Pk, BLOCK):
        _, others = orders(every + row * Pk, start + tl.arange(0, BLOCK), Pk, MOST)
        bar = tl.where(start < begin, order - 1, order)  # all of an earlier block stand before their equals
        before += (others[None, :] > bar[:, None]).to(tl.int32)
    place = tl.sum(before, 1)
    chosen = (g < Pk) & (place < topk)
    tl.store(index + row * topk + place, g.to(tl.int64), mask=chosen)
    tl.store(logits + row * topk + place, mine, mask=chosen)


# --- host ------------------------------------------------------------------------------------------------------------


def _means(t: Tensor, token_mask: Tensor | None) -> Tensor:
    B, H, regions, tokens, D = t.shape
    means = torch.empty((B, H, regions, D), dtype=torch.float32, device=t.device)
    wide = min(FEATURES, next_power(D))
    launch(
        route_regions_means_kernel, (B * H * regions * triton.cdiv(D, wide),),
        t, t if token_mask is None else token_mask.contiguous().view(torch.uint8), means, *t.stride(),
        H, regions, tokens, D, HAS_MASK=token_mask is not None,
        BLOCK_S=min(2048 // wide, 64, next_power(tokens)), BLOCK_D=wide, num_warps=4, num_stages=2,
    )  # fmt: skip
    return means


def route_regions_fwd(
    q: Tensor, k: Tensor, topk: int, scale: float | None, per_head: bool, query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Beside the results this takes the means, and the logits of all pairs in float32."""
    (B, H, P, _, D), Pk = q.shape, k.shape[2]
    heads, joined = (H, 1) if per_head else (1, H)
    index = torch.empty((B, heads, P, topk), dtype=torch.int64, device=q.device)
    logits = torch.empty(index.shape, dtype=torch.float32, device=q.device)
    if index.numel() == 0:
        return index, logits
    means = _means(q, query_mask), _means(k, key_mask)
    factor = max(joined * D, 1) ** -0.5 if scale is None else scale
    seen = q if key_mask is None else key_mask.any(-1).view(torch.uint8)
    every = torch.empty((B, heads, P, Pk), dtype=torch.float32, device=q.device)
    tile = {name: max(16, min(32, next_power(size))) for name, size in (("BLOCK_P", P), ("BLOCK_G", Pk))}
    launch(
        route_regions_logits_kernel, (B * heads * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(Pk, tile["BLOCK_G"]),),
        *means, seen, torch.full((1,), factor, dtype=torch.float64, device=q.device), every, heads, joined, P,
        Pk, D,
        HAS_SEEN=key_mask is not None, BLOCK_D=16, **tile, num_warps=4, num_stages=2,
    )  # fmt: skip
    block = max(16, min(TILE, next_power(Pk)))
    launch(
        route_regions_fwd_kernel, (B * heads * P * triton.cdiv(Pk, block),),
        every, index, logits, Pk, topk, MOST=MOST, BLOCK=block, num_warps=4, num_stages=2,
    )  # fmt: skip
    return index, logits
