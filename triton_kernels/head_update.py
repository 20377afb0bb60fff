"""Triton launchers of the head family: `adamw_slices_`, `head_edit` and its form in place. Formulas and the order of
the random words: pyml/reference/head_update.py.
"""

import functools
from collections.abc import Sequence

import torch
import triton
from pyml.triton_kernels import chunks, launch, next_power
from pyml.triton_kernels.head_update_kernels import adamw_slices_kernel, head_edit_kernel, head_edit_matrix_kernel
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype

BLOCKS = 8  # of 64 elements in a program
BF16, FP16 = 1, 2  # what is rounded stochastically
EDIT_ELEMENTS = 4096  # of a block of rows
MATRIX_BLOCK = 16


def _acc(wide: torch.dtype):
    return triton.language.float64 if wide == torch.float64 else triton.language.float32


def _halves(number: float) -> tuple[float, float]:
    """A number as a float32 and what that leaves: a float argument of a launch has 32 bits."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


# --- AdamW ------------------------------------------------------------------------------------------------------------


def adamw_slices__fwd(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
) -> None:  # fmt: skip
    """One launch a slice; what is no matrix of even rows is copied, and brought home."""
    torch.ops.pyml.check_slices_apart(params, grads, exp_avgs, exp_avg_sqs, masters)
    numbers = (
        1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], 1 / (1 - betas[1] ** step) ** 0.5, eps,
        -lr / (1 - betas[0] ** step),
    )  # fmt: skip
    halves = [half for number in numbers for half in _halves(number)]
    for n, p in enumerate(params):
        if p.numel() == 0:
            continue
        tensors = [p, grads[n], exp_avgs[n], exp_avg_sqs[n], masters[n] if masters else p]
        wide = compute_dtype(*tensors)
        flat = [_matrix(t) for t in tensors]
        columns = flat[0].shape[1]
        rounds = {torch.bfloat16: BF16, torch.float16: FP16}.get(p.dtype, 0) if key is not None else 0
        launch(
            adamw_slices_kernel, (triton.cdiv(p.numel(), 64 * BLOCKS),), *flat, p if key is None else key.contiguous(),
            *halves, step, n if ids is None else ids[n], p.numel(), columns,
            *(t.stride(i) for t in flat for i in (0, 1)), MASTER=bool(masters), ROUNDS=rounds, ACC=_acc(wide),
            BLOCKS=BLOCKS, num_warps=4, num_stages=1,
        )  # fmt: skip
        for i, (t, m) in enumerate(zip(tensors, flat)):
            if i != 1 and m.data_ptr() != t.data_ptr() and (masters or i != 4):
                t.copy_(m.view(t.shape))


def _matrix(t: Tensor) -> Tensor:
    """The tensor as a matrix of its last dimension: where it lies if its other dimensions join, else a copy."""
    if t.dim() == 2:
        return t
    shape = (t.numel() // t.shape[-1], t.shape[-1]) if t.dim() else (1, 1)
    return t.reshape(shape)


# --- edits ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _places(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers of heads on the device, kept: a copy there waits for the host, and has no place in a CUDA graph."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def _rows(t: Tensor) -> Tensor:
    """``[..., H, D]`` as ``[N, H, D]``; a copy where the leading dimensions do not join."""
    return t.reshape(t.shape[:-2].numel(), *t.shape[-2:])


def _edit(
    x: Tensor, out: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float,
    wide: torch.dtype,
) -> None:  # fmt: skip
    """x and out ``[N, H, D]``, values ``[N, k, D]``, matrix ``[k, D (in), D (out)]`` with any strides."""
    count, _, dim = x.shape
    if 0 in (count, dim, len(heads)):
        return
    width = next_power(dim)
    rows = max(1, min(next_power(count), EDIT_ELEMENTS // width))
    places = _places(tuple(heads), x.device)
    v, m = (out if t is None else t for t in (values, matrix))  # what is absent is not read
    launch(
        head_edit_kernel, (triton.cdiv(count, rows), len(heads)), x, out, places, v, m, *x.stride(),
        *out.stride(), *v.stride(), *m.stride(), *_halves(1 - strength), *_halves(strength), count, dim,
        VALUES=values is not None, MATRIX=matrix is not None, KEEP=strength != 1, ACC=_acc(wide), ROWS=rows,
        WIDTH=width, num_warps=4, num_stages=1,
    )  # fmt: skip


def _wide(x: Tensor, values: Tensor | None, matrix: Tensor | None) -> torch.dtype:
    return compute_dtype(x, values, matrix)


def _values(x: Tensor, heads: Sequence[int], values: Tensor | None) -> Tensor | None:
    return None if values is None else _rows(values.expand(*x.shape[:-2], len(heads), x.shape[-1]))


def head_edit_fwd(
    x: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float
) -> Tensor:  # fmt: skip
    out = x.clone(memory_format=torch.contiguous_format)
    turned = None if matrix is None else matrix.transpose(1, 2)
    _edit(_rows(x), _rows(out), heads, _values(x, heads, values), turned, strength, _wide(x, values, matrix))
    return out


def head_edit__fwd(
    x: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float
) -> None:
    """A program has whole rows of a head, so they may be written where they were read."""
    rows, turned = _rows(x), None if matrix is None else matrix.transpose(1, 2)
    _edit(rows, rows, heads, _values(x, heads, values), turned, strength, _wide(x, values, matrix))
    if rows.data_ptr() != x.data_ptr():
        x.copy_(rows.view(x.shape))


def head_edit_bwd(
    grad: Tensor, x: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _wide(x, values, matrix)
    of_x, of_values, of_matrix = (
        (grad if t is None else t).new_empty(0) for t in (x, values, matrix)
    )  # empty ones, for what nobody wants
    if mask[0]:
        of_x = grad.to(x.dtype, copy=True, memory_format=torch.contiguous_format)
        _edit(_rows(grad), _rows(of_x), heads, None, matrix, strength, wide)
    if mask[1] and values is not None:
        own = torch.cat([grad.narrow(-2, h, 1) for h in heads] or [grad.narrow(-2, 0, 0)], -2).to(wide)
        shared = [d for d in range(x.dim() - 2) if values.shape[d] == 1 != x.shape[d]]
        of_values = (own.sum(shared, keepdim=True) if shared else own).mul(strength).to(values.dtype).contiguous()
    if mask[2] and matrix is not None:
        of_matrix = _of_matrix(_rows(grad), _rows(x), heads, strength, wide).to(matrix.dtype)
    return of_x, of_values, of_matrix


def _of_matrix(grad: Tensor, x: Tensor, heads: Sequence[int], strength: float, wide: torch.dtype) -> Tensor:
    """``strength * sum over rows of grad[row, head]^T x[row, head]``, in chunks of rows that are added in order."""
    count, _, dim = x.shape
    if 0 in (count, dim, len(heads)):
        return torch.zeros(len(heads), dim, dim, dtype=wide, device=x.device)
    width, tiles = next_power(dim), triton.cdiv(dim, MATRIX_BLOCK)
    splits, size = chunks(count, 32, tiles * len(heads))
    part = torch.empty(splits, len(heads), dim, dim, dtype=wide, device=x.device)
    places = _places(tuple(heads), x.device)
    launch(
        head_edit_matrix_kernel, (tiles, len(heads), splits), grad, x, places, part, *grad.stride(), *x.stride(),
        *_halves(strength), count, size, dim, ACC=_acc(wide), BLOCK=MATRIX_BLOCK, WIDTH=width, num_warps=4,
        num_stages=1,
    )  # fmt: skip
    return part[0] if splits == 1 else part.sum(0)
