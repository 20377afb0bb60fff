"""Top-k attention: `region_attention` with its router `route_regions`, and token-level `topk_attention`.

The kernels read the chosen regions in place: neither gathered keys nor the attention matrix exist, and the backward
recomputes what it needs from the log-sum-exp. Maths and edge rules: pyml/reference/topk_attention.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops._registry import Capability, Op, read_status
from pyml.reference import compute_dtype
from pyml.reference import topk_attention as reference


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    scale: float | None = None,
    counts: Tensor | None = None,
    key_mask: Tensor | None = None,
    region_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query over all keys of the regions that its own region chose.

    Args:
        q: ``[B, H, P, S, D]``: P regions of S queries; float32, float64, bfloat16 or float16, any strides.
        k: ``[B, H, Pk, Sk, D]``.
        v: ``[B, H, Pk, Sk, Dv]``.
        index: int64 ``[B, 1 or H, P, K]``, the key regions of each query region. -1 means none. A region named twice
            counts twice. No gradient.
        scale: of the logits; ``D ** -0.5`` by default.
        counts: int64 ``[B, 1 or H, P]``: only so many entries of each row of ``index`` are used, the others not read.
        key_mask: bool ``[B, Pk, Sk]``, True for valid keys.
        region_weight: ``[B, 1 or H, P, K]``, multiplies the keys and the values of the region in that entry.

    Returns:
        ``[B, H, P, S, Dv]`` in the dtype of q, computed in float32 (float64 when q, k, v or region_weight is float64);
        0 for a query without a valid key. Memory does not grow with K.

    Differentiable any number of times in q, k, v and region_weight; the second derivative gathers the chosen regions.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; among them an index
            outside [-1, Pk).

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
    """
    return REGION_ATTENTION(q, k, v, index, scale, counts, key_mask, region_weight, backend=backend)


def route_regions(
    q: Tensor,
    k: Tensor,
    grid: int | tuple[int, int] | None,
    topk: int,
    *,
    region_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    per_head: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The ``topk`` key regions most similar to each query region, by the inner product of the regions' means.

    Args:
        q: regions ``[B, H, P, S, D]`` as in `region_attention` (then grid and region_size are None), or a map
            ``[B, C, height, width]``, which counts as one head.
        k: ``[B, H, Pk, Sk, D]``, or a map with as many channels as q.
        grid: regions along the height and the width of both maps; an int for both.
        topk: how many regions, 1 to Pk.
        region_size: height and width of a region in both maps, instead of ``grid``.
        scale: of the logits; by default one over the root of the length of the means. The choice depends on its sign.
        per_head: every head chooses for itself; by default all heads together choose the same regions.
        query_mask: bool ``[B, P, S]``, True for the queries that count in the means.
        key_mask: bool ``[B, Pk, Sk]``; a region without a valid key is chosen last, with logit -inf.
        return_logits: also return the logits of the chosen regions.

    Returns:
        index, int64 ``[B, 1 or H, P, topk]``, by falling logits; equal ones by rising index, NaN first. With
        ``return_logits`` also the logits, float32, same shape. Always computed in float32, from sums in
        float64: backends choose alike unless two logits differ by less than the rounding of those sums. No gradient.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
    """
    op = "route_regions"
    if grid is not None or region_size is not None:
        if grid is not None and region_size is not None:
            _check.fail(op, "region_size", "None, or a grid of None", f"region_size {region_size}, grid {grid}")
        q, k = (_map_regions(op, name, t, grid, region_size) for name, t in (("q", q), ("k", k)))
    with torch.no_grad():
        index, logits = ROUTE_REGIONS(q, k, topk, scale, per_head, query_mask, key_mask, backend=backend)
    return (index, logits) if return_logits else index


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int | Sequence[int],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    straight_through: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query over the ``topk`` keys with its largest logits.

    Args:
        q: ``[B, H, N, D]``, float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, M, D]``; Hkv divides H, and query head h uses kv head h // (H / Hkv).
        v: ``[B, Hkv, M, Dv]``.
        topk: how many keys a query keeps, at least 1; all that are valid where these are fewer. Of equal logits those
            of the lower index stay; -0 equals +0. A list gives one output for each of its numbers in one sweep.
        mask: broadcasts to ``[B, H, N, M]``. Bool: True where a query may attend. Floating: added to the logits, -inf
            masks; it has a gradient.
        causal: query i sees the keys up to i.
        scale: of the logits; ``D ** -0.5`` by default.
        straight_through: the gradient passes through softmax over all valid keys instead of the kept ones (of v it
            stays that of the output). Only with a single ``topk``.

    Returns:
        ``[B, H, N, Dv]`` in the dtype of q, or ``[len(topk), B, H, N, Dv]`` for a list; 0 for a query without a valid
        key. Logits are computed, and compared, in float32 (float64 when any input is float64). A NaN among the valid
        logits of a query reaches its output and gradients, a NaN in v at least the queries that keep it.

    Memory is linear in N and M (a gradient of a mask has the mask's size). Differentiable in q, k, v and a floating
    mask, through the kept keys alone; the second derivative forms the ``[N, M]`` matrix.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Source: Zhao et al., "Explicit Sparse Transformer", arXiv 1912.11637.
    """
    several = not isinstance(topk, int)
    if isinstance(mask, Tensor) and mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    found = TOPK_ATTENTION(
        q, k, v, mask, topk if several else [topk], causal, scale, straight_through, backend=backend
    )  # fmt: skip
    return found.transpose(0, 1) if several else found.squeeze(1)


def _map_regions(op: str, name: str, t: Tensor, grid: Any, region_size: Any) -> Tensor:
    """A map ``[B, C, height, width]`` as regions ``[B, 1, P, S, C]``; regions in rows, pixels in rows."""
    if not isinstance(t, Tensor) or t.dim() != 4:
        _check.fail(op, name, "a map [B, C, height, width]", list(getattr(t, "shape", [])) or type(t).__name__)
    argument, value = ("grid", grid) if grid is not None else ("region_size", region_size)
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
        _check.fail(op, argument, "an integer or a pair of integers >= 1", value)
    if any(size % n for size, n in zip(t.shape[2:], pair)):
        _check.fail(op, argument, f"divisors of the size {list(t.shape[2:])} of {name}", value)
    rows, columns = pair if grid is not None else [size // n for size, n in zip(t.shape[2:], pair)]
    B, C, height, width = t.shape
    split = t.reshape(B, C, rows, height // rows, columns, width // columns)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(B, 1, rows * columns, (height // rows) * (width // columns), C)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_scale(op: str, scale: Any) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        _check.fail(op, "scale", "a finite number or None", repr(scale))


def _check_five(op: str, q: Any, k: Any) -> None:
    """q and k as [B, H, regions, tokens, D] of one B, H and D."""
    _check.tensors(op, q, first_name="q", k=k)
    for name, t in (("q", q), ("k", k)):
        if t.dim() != 5:
            _check.fail(op, name, "shape [B, H, regions, tokens, D]", list(t.shape))
    B, H, _, _, D = q.shape
    _check.shape(op, "k", k, (B, H, *k.shape[2:4], D), "[B, H, Pk, Sk, D]")


def _check_other(op: str, name: str, t: Any, like: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(t, Tensor):
        _check.fail(op, name, f"a tensor of {dtype}", type(t).__name__, TypeError)
    if t.dtype != dtype:
        _check.fail(op, name, str(dtype), t.dtype, TypeError)
    if t.device != like.device:
        _check.fail(op, name, f"the device of q ({like.device})", t.device)


def _check_mask(op: str, name: str, mask: Any, t: Tensor) -> None:
    if mask is not None:
        _check_other(op, name, mask, t, torch.bool)
        _check.shape(op, name, mask, (t.shape[0], *t.shape[2:4]), "[B, regions, tokens]")


def _check_per_region(op: str, name: str, t: Tensor, q: Tensor, last: tuple[int, ...], names: str) -> None:
    if t.dim() != 3 + len(last):
        _check.fail(op, name, f"shape [B, 1 or H, P{names}]", list(t.shape))
    heads = t.shape[1] if t.shape[1] in (1, q.shape[1]) else 1
    _check.shape(op, name, t, (q.shape[0], heads, q.shape[2], *last), f"[B, 1 or H, P{names}]")


def _check_region(q, k, v, index, scale, counts, key_mask, region_weight) -> None:
    op = "region_attention"
    _check_five(op, q, k)
    _check.tensors(op, q, ("region_weight",), first_name="q", v=v, region_weight=region_weight)
    if v.dim() != 5:
        _check.fail(op, "v", "shape [B, H, Pk, Sk, Dv]", list(v.shape))
    _check.shape(op, "v", v, (*k.shape[:4], v.shape[4]), "[B, H, Pk, Sk, Dv]")
    _check_other(op, "index", index, q, torch.int64)
    _check_per_region(op, "index", index, q, index.shape[3:4] or (0,), ", K")
    _check_scale(op, scale)
    if counts is not None:
        _check_other(op, "counts", counts, q, torch.int64)
        _check_per_region(op, "counts", counts, q, (), "")
    _check_mask(op, "key_mask", key_mask, k)
    if region_weight is not None:
        _check_per_region(op, "region_weight", region_weight, q, index.shape[3:], ", K")


def _check_route(q, k, topk, scale, per_head, query_mask, key_mask) -> None:
    op = "route_regions"
    _check_five(op, q, k)
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= k.shape[2]:
        _check.fail(op, "topk", f"an integer from 1 to Pk = {k.shape[2]}", repr(topk))
    _check_scale(op, scale)
    if not isinstance(per_head, bool):
        _check.fail(op, "per_head", "True or False", repr(per_head))
    _check_mask(op, "query_mask", query_mask, q)
    _check_mask(op, "key_mask", key_mask, k)


def _check_topk(q, k, v, mask, topk, causal, scale, straight_through) -> None:
    op = "topk_attention"
    _check.tensors(op, q, first_name="q", k=k, v=v)
    for name, t, shape in (("q", q, "[B, H, N, D]"), ("k", k, "[B, Hkv, M, D]"), ("v", v, "[B, Hkv, M, Dv]")):
        if t.dim() != 4:
            _check.fail(op, name, f"shape {shape}", list(t.shape))
    B, H, N, D = q.shape
    _, groups, M, _ = k.shape
    _check.shape(op, "k", k, (B, groups, M, D), "[B, Hkv, M, D]")
    _check.shape(op, "v", v, (B, groups, M, v.shape[3]), "[B, Hkv, M, Dv]")
    if H % groups if groups else H:
        _check.fail(op, "k", f"Hkv that divides H = {H}", groups)
    if not isinstance(topk, (list, tuple)) or not topk or not all(_is_count(n) for n in topk):
        _check.fail(op, "topk", "an integer >= 1 or a list of them", repr(topk))
    for name, value in (("causal", causal), ("straight_through", straight_through)):
        if not isinstance(value, bool):
            _check.fail(op, name, "True or False", repr(value))
    if straight_through and len(topk) != 1:
        _check.fail(op, "straight_through", "False with several topk", straight_through)
    _check_scale(op, scale)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        _check.tensors(op, q, first_name="q", mask=mask)
    if mask.device != q.device:
        _check.fail(op, "mask", f"the device of q ({q.device})", mask.device)
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, (B, H, N, M))):
        _check.fail(op, "mask", f"a shape that broadcasts to [B, H, N, M] = {[B, H, N, M]}", list(mask.shape))


def _is_count(n: Any) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and 1 <= n < 2**63


# --- registration ---------------------------------------------------------------------------------------------------


def _region_fake(q, k, v, index, scale, counts, key_mask, region_weight):
    wide = compute_dtype(q, k, v, region_weight)
    out = q.new_empty((*q.shape[:4], v.shape[4]))
    exact = q.new_empty(out.shape if q.dtype != wide else (q.shape[0], 0), dtype=wide)
    return out, q.new_empty(q.shape[:4], dtype=torch.float64), exact, q.new_empty(1, dtype=torch.int32)


def _region_finish(found, q, k, v, index, scale, counts, key_mask, region_weight):
    if isinstance(found, Tensor):  # the reference has looked at the numbers itself
        return found
    out, _, _, status = found
    if status.is_cuda:  # on a CPU the kernel has raised already
        also = "" if counts is None else f", and counts from 0 to {index.shape[3]}"
        sentence = f"index: expected regions from 0 to {k.shape[2] - 1} or -1 for none{also}, got others"
        read_status("region_attention", status, sentence)
    return out


def _region_composed(q, k, v, index, scale, counts, key_mask, region_weight, backend):
    return reference.region_attention(q, k, v, index, scale, counts, key_mask, region_weight)


def _route_fake(q, k, topk, scale, per_head, query_mask, key_mask):
    shape = (q.shape[0], q.shape[1] if per_head else 1, q.shape[2], topk)
    return q.new_empty(shape, dtype=torch.int64), q.new_empty(shape, dtype=torch.float32)


def _topk_fake(q, k, v, mask, topk, causal, scale, straight_through):
    wide = compute_dtype(q, k, v, mask)
    B, H, N, _ = q.shape
    out = q.new_empty((B, len(topk), H, N, v.shape[3]))
    rows = (B, len(topk) + straight_through, H, N)
    average = q.new_empty(out.shape if straight_through or q.dtype != wide else (B, 0), dtype=wide)
    top, total, tau = (q.new_empty(rows, dtype=wide) for _ in range(3))
    return out, top, total, tau, q.new_empty(rows, dtype=torch.int32), average


def _topk_finish(found, q, k, v, mask, topk, causal, scale, straight_through):
    return found if isinstance(found, Tensor) else found[0]


def _topk_composed(q, k, v, mask, topk, causal, scale, straight_through, backend):
    return reference.topk_attention(q, k, v, mask, topk, causal, scale, straight_through)


REGION_ATTENTION = Op(
    "region_attention", "topk_attention", reference.region_attention, _check_region, _region_fake,
    gradients=("q", "k", "v", "region_weight"), composed=_region_composed, finish=_region_finish, saved=(0, 1, 2),
    batched=("q", "k", "v", "index", "counts", "key_mask", "region_weight"), free_leading_dims=False,
)  # fmt: skip
ROUTE_REGIONS = Op(
    "route_regions", "topk_attention", reference.route_regions, _check_route, _route_fake,
    gradients=(), batched=("q", "k", "query_mask", "key_mask"), free_leading_dims=False,
    capability=Capability(gradient=False, double_backward=False),
)  # fmt: skip
TOPK_ATTENTION = Op(
    "topk_attention", "topk_attention", reference.topk_attention, _check_topk, _topk_fake,
    gradients=("q", "k", "v", "mask"), composed=_topk_composed, finish=_topk_finish, saved=(0, 1, 2, 3, 4, 5),
    batched=("q", "k", "v", "mask"), free_leading_dims=False,
)  # fmt: skip

__all__ = ["region_attention", "route_regions", "topk_attention"]
