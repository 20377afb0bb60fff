"""Triton kernels, one file a family: `@triton.jit` kernels and one host launcher per op (no torch.library here).

A launcher has the name and the arguments of its op in csrc/library.cpp; the public function has checked them. It makes
inputs contiguous, allocates outputs and calls `launch`. Block shapes come from literal tables, never from timing runs:
same bits on every run, no warm-up, no GPU needed at import. Rules for kernels: loads are upcast at once, addresses are
int64, sums run in a fixed order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run: what an ahead-of-time compile needs to know."""

    kernel: Any
    arguments: dict[str, Any]  # every parameter of the kernel by name, constexprs too
    options: dict[str, int]  # num_warps, num_stages


_recording: list[tuple[int, list[Launch]]] = []


@contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Inside the block launchers run nothing: their launches for compute capability `arch` (80, 90) are collected."""
    launches: list[Launch] = []
    _recording.append((arch, launches))
    try:
        yield launches
    finally:
        _recording.pop()


def architecture(x: Tensor) -> int:
    """Compute capability as two digits (90 is Hopper); 90 for CPU tensors, which only the interpreter can run."""
    if _recording:
        return _recording[-1][0]
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    return 90


def tensor_cores(x: Tensor) -> bool:
    """Whether dots may run in 16 bits: the interpreter's 16-bit arithmetic is wrong without any message."""
    return bool(_recording) or x.is_cuda


FP32_DOTS = ("ieee", "tf32x3", "tf32")


def fp32_dot() -> str:
    """How dots of float32 run: exactly on the FMA units (the default), as three TF32 products that keep about 22 bits,
    or in plain TF32 (11 bits), which only PYML_TRITON_FP32=tf32 switches on."""
    name = os.environ.get("PYML_TRITON_FP32") or "ieee"
    if name not in FP32_DOTS:
        raise ValueError(f"PYML_TRITON_FP32: expected one of {', '.join(FP32_DOTS)}, got {name!r}")
    return name


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Run `kernel` on the device of its first tensor; nothing to do for an empty grid."""
    if _recording:
        named = dict(zip(kernel.arg_names, arguments)) | constants
        _recording[-1][1].append(Launch(kernel, named, {"num_warps": num_warps, "num_stages": num_stages}))
        return
    if 0 in grid:
        return
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.is_cuda:
        with torch.cuda.device(first.device):  # Triton launches on the current device, whatever its tensors say
            kernel[grid](*arguments, **constants, **options)
    else:
        kernel[grid](*arguments, **constants, **options)


def chunks(rows: int, block: int, tiles: int, programs: int = 528) -> tuple[int, int]:
    """Split `rows` into S equal chunks: (S, rows a chunk). Depends on the shape alone, so sums have the same bits on
    every run; 528 programs fill a GPU of 132 multiprocessors four times when there are only few tiles."""
    blocks = triton.cdiv(rows, block)
    want = max(1, min(blocks, programs // max(1, tiles)))
    size = triton.cdiv(blocks, want) * block
    return max(1, triton.cdiv(rows, size)), size


def next_power(n: int) -> int:
    return triton.next_power_of_2(max(1, n))
