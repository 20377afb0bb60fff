"""What every B-spline launcher works out before it launches: dtypes, knots, the kind of dot, block shapes."""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from pyml.triton_kernels import architecture, chunks, fp32_dot, launch, tensor_cores
from pyml.triton_kernels.bspline_math import MODES, sum_chunks_kernel
from torch import Tensor

from pyml.reference.bspline import check_knots

_TL = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Host-side facts of one call."""

    knots: Tensor
    count: int  # knots in a row
    grid_row: int  # distance between rows, 0 for one shared row
    functions: int  # G + k
    acc: torch.dtype  # every sum runs in it
    dot: torch.dtype  # operands of the dots
    kind: str  # "scalar" (float64), "ieee" (float32 on the FMA units), "core32" or "core16" (bits of the operands)
    constants: dict[str, Any]  # for every kernel
    dots: dict[str, Any]  # for kernels with dots


def setup(op: str, x: Tensor, grid: Tensor, order: int, extrapolation: str, *weights: Tensor | None) -> Setup:
    """The dtype rules of pyml/reference/bspline.py, and the dot that keeps the promised error.

    16-bit dots need every tensor in that dtype: a float32 weight gradient must not pass through bfloat16. float16 has
    no room for the large values of linear extrapolation.
    """
    tensors = [x, grid, *(w for w in weights if w is not None)]
    acc = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if x.device.type == "cpu":  # the interpreter; reading the knots would make a GPU wait
        check_knots(op, grid.to(acc))
    kind, dot, precision = ("scalar" if acc == torch.float64 else "ieee"), acc, "ieee"
    same = weights and x.dtype != acc and all(w.dtype == x.dtype for w in weights if w is not None)
    if same and acc == torch.float32 and tensor_cores(x) and (x.dtype, extrapolation) != (torch.float16, "linear"):
        kind, dot = "core16", x.dtype
    elif acc == torch.float32:
        precision = fp32_dot()
        kind = "ieee" if precision == "ieee" else "core32"
    rows = grid.contiguous()
    count = grid.shape[-1]
    shared = grid.dim() == 1 or grid.shape[0] == 1
    constants = {"ORDER": order, "MODE": MODES[extrapolation], "STEPS": count.bit_length(), "ACC": _TL[acc]}
    dots = {"DOT": _TL[dot], "PRECISION": precision}
    return Setup(rows, count, 0 if shared else count, count - order - 1, acc, dot, kind, constants, dots)


def tiles(table: dict[int, dict[str, dict[str, dict[str, int]]]], x: Tensor, kind: str, kernel: str) -> dict[str, int]:
    """Block shapes of one kernel from the newest table that x's GPU is not older than."""
    arch = max(architecture(x), min(table))
    return dict(table[max(a for a in table if a <= arch)][kind][kernel])


def partial(out: Tensor, splits: int, acc: torch.dtype) -> Tensor:
    """Room for the sums of every chunk; with one chunk they go straight into the result."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=acc, device=out.device)


def sum_chunks(part: Tensor, out: Tensor, acc: torch.dtype) -> None:
    """Second stage: out = sum of the chunks, in order."""
    if part is out:
        return
    block = 256
    launch(
        sum_chunks_kernel, (-(-out.numel() // block),),
        part, out, part.shape[0], out.numel(),
        BLOCK_S=4, BLOCK_E=block, ACC=_TL[acc], num_warps=4, num_stages=2,
    )  # fmt: skip


__all__ = ["Setup", "chunks", "partial", "setup", "sum_chunks", "tiles"]
