"""What the launchers of `topk_attention` work out before they launch: dtypes, block shapes, strides, splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from pyml.triton_kernels import fp32_dot, next_power, tensor_cores
from pyml.triton_kernels.topk_attention_host import language_dtype
from torch import Tensor

from pyml.reference import compute_dtype

# Logits of a block of rows that a program can hold in registers; longer rows are made again for every count.
HELD = {torch.float32: 32768, torch.float64: 16384}
FEATURES = {torch.float32: 128, torch.float64: 64}  # of a gradient or an output in one program
STEP = {torch.float32: 32, torch.float64: 16}  # features in one dot on the FMA units, which unroll over all of them


@dataclass(frozen=True)
class Token:
    """Host-side facts of one call. q, k, v, mask and grad are read by their strides."""

    wide: torch.dtype  # every sum runs in it
    tensors: tuple[Tensor, ...]  # q, k, v, mask (k stands for a missing one), scale
    sizes: tuple[int, ...]  # strides of q, k, v, mask, then the sizes, as the kernels take them
    blocks: dict[str, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages
    search: dict[str, int]  # the same for the kernel that holds logits in registers
    constants: dict[str, Any]
    order: dict[str, Any]  # for the kernel that compares logits as integers
    heads: int  # query heads of all batches
    kv_heads: int

    def tiles(self, axis: str) -> int:
        """Blocks of rows ("N") or of keys ("M")."""
        at, block = (-4, "BLOCK_M") if axis == "N" else (-3, "BLOCK_N")
        return triton.cdiv(self.sizes[at], self.blocks[block])

    def steps(self, axis: str) -> int:
        """Steps that go through the features ("D") or the values ("V")."""
        at, block = (-2, "BLOCK_D") if axis == "D" else (-1, "BLOCK_V")
        return max(1, triton.cdiv(self.sizes[at], self.constants[block]))


def token(q, k, v, mask, causal, scale, backward: bool) -> Token:
    """The dtype rules of the reference, and the dots that keep the promised error: as for `region_attention`."""
    wide = compute_dtype(q, k, v, mask)
    dot = mixed = wide
    if wide == torch.float32 and q.dtype != wide and q.dtype == k.dtype == v.dtype and tensor_cores(q):
        dot = q.dtype
        mixed = dot if dot == torch.bfloat16 or not backward else wide
    B, H, N, D = q.shape
    groups, M, Dv = k.shape[1], k.shape[2], v.shape[3]
    factor = max(D, 1) ** -0.5 if scale is None else scale
    kind, stored, strides = 0, k, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        stored = mask.view(torch.uint8) if kind == 1 else mask
        steps = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
        strides = (steps[0], steps[1], steps[2], steps[3])
    tensors = (q, k, v, stored, torch.full((1,), factor, dtype=wide, device=q.device))  # a float argument has 32 bits
    sizes = (*q.stride(), *k.stride(), *v.stride(), *strides, H, H // max(groups, 1), N, M, D, Dv)
    blocks = block_shapes(N, M, D, Dv, wide, dot)
    constants = {
        "CAUSAL": causal, "MASK": kind, "ACC": language_dtype(wide), "DOT": language_dtype(dot),
        "MIXED": language_dtype(mixed), "PRECISION": fp32_dot() if wide == torch.float32 else "ieee",
        "BLOCK_D": blocks.pop("BLOCK_D"), "BLOCK_V": blocks.pop("BLOCK_V"),
        "STEP_D": blocks.pop("STEP_D"), "STEP_V": blocks.pop("STEP_V"),
    }  # fmt: skip
    constants |= {"WHOLE_D": constants["STEP_D"] >= D, "WHOLE_V": constants["STEP_V"] >= Dv}
    bits = torch.finfo(wide).bits
    order = {
        "HELD": blocks.pop("HELD"), "LOWEST": torch.finfo(wide).min,
        "KEY": language_dtype(getattr(torch, f"int{bits}")), "MAGNITUDE": 2 ** (bits - 1) - 1,
    }  # fmt: skip
    search = dict(blocks)
    if order["HELD"] * blocks["BLOCK_N"] * blocks["BLOCK_M"] > 16384:  # at most 64 logits a thread, or it spills
        search["num_warps"] = 16
    return Token(wide, tensors, sizes, blocks, search, constants, order, B * H, B * groups)


def block_shapes(N: int, M: int, D: int, Dv: int, wide: torch.dtype, dot: torch.dtype) -> dict[str, int]:
    """By shape and dtype alone, and one shape for all kernels: the logits of a tile must have the same bits in each.

    HELD tiles of BLOCK_N keys are all keys where a block of at least 16 rows of logits fits the registers, else 0. Held
    blocks have at most 32 rows: the instruction of such dots does not depend on the warps, which differ there.
    """
    depth, value_depth = (min(FEATURES[wide], max(16, next_power(n))) for n in (D, Dv))
    row = max(depth, value_depth) * dot.itemsize
    on_fma = dot == wide and (wide == torch.float64 or fp32_dot() == "ieee")
    step = STEP[wide] if on_fma else FEATURES[wide]
    keys, room = max(16, next_power(M)), HELD[wide]
    held = 16 * keys <= room
    rows = max(16, min(32, room // keys // 2)) if held else 64 if wide == torch.float32 else 32
    rows = min(rows, max(16, next_power(N)))
    columns = min(keys, 128 if held and row <= 256 else 64)
    work = rows * (keys if held else columns)
    return {
        "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": depth, "BLOCK_V": value_depth, "STEP_D": min(step, depth),
        "STEP_V": min(step, value_depth), "HELD": keys // columns if held else 0,
        "num_warps": 8 if work >= 8192 or row > 256 or (on_fma and work >= 4096) else 4,
        "num_stages": 2 if row <= 256 else 1,
    }  # fmt: skip


def as_list(topk: int | Sequence[int]) -> list[int]:
    """Schemas take one number for a list of one."""
    return [topk] if isinstance(topk, int) else list(topk)
