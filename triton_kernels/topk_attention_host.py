"""What the launchers of `region_attention` work out before they launch: dtypes, block shapes, who chose a region."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import fp32_dot, next_power, tensor_cores
from torch import Tensor

from pyml.reference import compute_dtype

WIDEST = {torch.float32: 512, torch.float64: 256}  # features of a key or value: whole rows lie in shared memory


def language_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Region:
    """Host-side facts of one call. q, k, v and grad are read by their strides; the small tensors are made dense."""

    wide: torch.dtype  # every sum runs in it
    tensors: tuple[Tensor, ...]  # q, k, v, index, counts, key_mask, region_weight, scale; k stands for what is missing
    sizes: tuple[int, ...]  # strides of q, k, v, then the sizes, as the kernels take them
    blocks: dict[str, int]
    constants: dict[str, Any]

    @property
    def query_blocks(self) -> int:
        return triton.cdiv(int(self.sizes[17]), self.blocks["BLOCK_M"])


def region(q, k, v, index, scale, counts, key_mask, region_weight, backward: bool) -> Region:
    """The dtype rules of the reference, and the dots that keep the promised error.

    16-bit dots need q, k and v in that dtype. What a kernel computes in between (P, dS) is rounded to bfloat16 for
    them, but not to float16, which has no room for small gradients or large weights.
    """
    wide = compute_dtype(q, k, v, region_weight)
    for name, t in (("q", q), ("v", v)):
        if t.shape[4] > WIDEST[wide]:
            most = f"at most {WIDEST[wide]} features in a Triton kernel in {wide}"
            raise ValueError(f"region_attention: {name}: expected {most}, got {t.shape[4]}")
    dot = mixed = wide
    if wide == torch.float32 and q.dtype != wide and q.dtype == k.dtype == v.dtype and tensor_cores(q):
        dot = q.dtype
        plain = region_weight is None and not backward
        mixed = dot if dot == torch.bfloat16 or plain else wide
    D, Dv = q.shape[4], v.shape[4]
    factor = max(D, 1) ** -0.5 if scale is None else scale
    small = tuple(None if t is None else t.contiguous() for t in (index, counts, key_mask, region_weight))
    tensors = (
        q, k, v, small[0], k if small[1] is None else small[1],
        k if small[2] is None else small[2].view(torch.uint8), k if small[3] is None else small[3],
        torch.full((1,), factor, dtype=wide, device=q.device),  # a float argument has 32 bits
    )  # fmt: skip
    heads = (t.shape[1] if t is not None else 1 for t in (small[0], small[1], small[3]))
    sizes = (
        *q.stride(), *k.stride(), *v.stride(),
        q.shape[1], q.shape[2], q.shape[3], D, k.shape[2], k.shape[3], Dv, index.shape[3], *heads,
    )  # fmt: skip
    blocks = block_shapes(q.shape[3], k.shape[3], D, Dv, mixed, backward)
    if region_weight is not None and dot == wide:
        blocks["num_stages"] = 1  # rows that are multiplied on their way wait in registers: those of two tiles spill
    constants = {
        "HAS_COUNTS": counts is not None, "HAS_MASK": key_mask is not None, "HAS_WEIGHT": region_weight is not None,
        "ACC": language_dtype(wide), "DOT": language_dtype(dot), "MIXED": language_dtype(mixed),
        "PRECISION": fp32_dot() if wide == torch.float32 else "ieee",
        "BLOCK_D": blocks.pop("BLOCK_D"), "BLOCK_V": blocks.pop("BLOCK_V"),
    }  # fmt: skip
    return Region(wide, tensors, sizes, blocks, constants)


def block_shapes(S: int, Sk: int, D: int, Dv: int, dot: torch.dtype, backward: bool) -> dict[str, int]:
    """Queries and keys a tile, by shape and dtype alone. Wide rows get small tiles, to fit in shared memory."""
    depth, value_depth = (max(16, next_power(n)) for n in (D, Dv))
    wide = max(depth, value_depth) * (torch.finfo(dot).bits // 16)  # in units of 16 bits
    most = 64 if wide <= 128 else 32 if wide <= 512 else 16
    if backward and dot.itemsize > 2:
        most = min(most, 32)
    warps = 8 if wide > 64 and (dot.itemsize > 2 or wide > 256) else 4  # with 4, the compiler spills registers there
    return {
        "BLOCK_M": min(most, max(16, next_power(S))), "BLOCK_N": min(most, max(16, next_power(Sk))),
        "BLOCK_D": depth, "BLOCK_V": value_depth, "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


@dataclass(frozen=True)
class Choosers:
    """Who chose each key region: a compressed list of slots, in chunks of at most `size`, all in a fixed order.

    A row is a key region of one (batch, index head). All shapes follow from the arguments' shapes, so nothing waits for
    the device; the tail of `row_of_chunk` is beyond the last row and has no work.
    """

    slots: Tensor  # [E] positions in index, by rising row; those that name none come last
    first_slot: Tensor  # [rows + 1]
    first_chunk: Tensor  # [rows + 1]
    row_of_chunk: Tensor  # [chunks]
    size: int
    heads: int  # index heads: 1 or H


def choosers(index: Tensor, counts: Tensor | None, key_regions: int) -> Choosers:
    """Invert ``index`` on its device by a stable sort. Chunks are as long as the mean row, so they are at most twice as
    many as key regions: memory does not grow with K, and a region that all chose is still shared by many programs."""
    B, heads, P, K = index.shape
    if counts is not None and counts.shape[1] > heads:
        heads = counts.shape[1]
        index = index.expand(B, heads, P, K)
    rows, entries = B * heads * key_regions, B * heads * P * K
    good = (index >= 0) & (index < key_regions)
    if counts is not None:
        good &= torch.arange(K, device=index.device) < counts.unsqueeze(-1)
    kind = torch.int32 if rows < 2**31 else torch.int64
    group = torch.arange(B * heads, device=index.device).view(B, heads, 1, 1) * key_regions
    row = torch.where(good, index + group, rows).to(kind).flatten()
    row, slots = row.sort(stable=True)
    first_slot = torch.searchsorted(row, torch.arange(rows + 1, dtype=kind, device=index.device))
    size = max(16, triton.cdiv(P * K, key_regions))
    chunks = (first_slot.diff() + size - 1) // size
    first_chunk = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    most = min(entries, rows) + entries // size
    ids = torch.arange(most, device=index.device)
    return Choosers(slots, first_slot, first_chunk, torch.searchsorted(first_chunk[1:], ids, right=True), size, heads)
