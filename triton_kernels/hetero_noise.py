"""Triton launchers of the noise family: `hetero_noise`, its list and SGD forms, `clip_sum`. Formula and order of the
elements: pyml/reference/hetero_noise.py. The words are those of the other backends bit for bit; normals are within
2 ulp of max(|z|, 1) of theirs, because Triton fuses products and sums as it likes.
"""

from collections.abc import Sequence

import torch
import triton
from pyml.triton_kernels import launch
from pyml.triton_kernels.hetero_noise_clip import clip_norm_kernel, clip_sum_kernel
from pyml.triton_kernels.hetero_noise_normals import hetero_noise_kernel
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype

ADD, STEP, PRODUCT = 0, 1, 2  # out = (in + s z) factor; base + factor (in + s z); in (s z)
NUMBER, ELEMENTS, FACTORS = 0, 1, 2
BLOCKS = 8  # of 64 elements in a program
CLIP_BLOCK = 1024


def _scale(scale: Tensor, columns: Tensor | None) -> tuple[int, Tensor, Tensor, int]:
    """Kind, the tensor of the scale or of the row factors, the column factors, how many of these."""
    if columns is not None and columns.dim():
        return FACTORS, scale.contiguous(), columns.contiguous(), max(1, columns.numel())
    return (ELEMENTS if scale.dim() else NUMBER), scale.contiguous(), scale, 1


def _halves(number: float) -> tuple[float, float]:
    """A number as a float32 and what that leaves."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


def _run(
    mode: int, t: Tensor, out: Tensor, base: Tensor | None, scale: Tensor, columns: Tensor | None, std: float,
    factor: float, key: Tensor, step: int, tensor_id: int = 0, first: int = 0,
) -> None:  # fmt: skip
    """One tensor; what has gaps is copied, and brought home."""
    if out.numel() == 0:
        return
    kind, elements, by_column, count = _scale(scale, columns)
    whole = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    t = t.contiguous()
    base = t if base is None else base.contiguous()
    wide = compute_dtype(t, base)
    blocks = (first + out.numel() - 1) // 64 - first // 64 + 1
    launch(
        hetero_noise_kernel, (triton.cdiv(blocks, BLOCKS),), t, whole, base, elements, by_column, key.contiguous(),
        *_halves(std), *_halves(factor), step, tensor_id, first, out.numel(), count, MODE=mode, KIND=kind,
        ACC=triton.language.float64 if wide == torch.float64 else triton.language.float32, BLOCKS=BLOCKS,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    if whole is not out:
        out.copy_(whole)


def _each(count: int, scale: Sequence[Tensor], columns: Sequence[Tensor], ids: Sequence[int] | None,
          offsets: Sequence[int] | None):  # fmt: skip
    for n in range(count):
        own = columns[n] if columns else None
        yield (
            n,
            scale[n if len(scale) > 1 else 0],
            own,
            n if ids is None else ids[n],
            0 if offsets is None else offsets[n],
        )


def hetero_noise_fwd(
    x: Tensor, scale: Tensor, columns: Tensor | None, std: float, key: Tensor, step: int
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(ADD, x, out, None, scale, columns, std, 1.0, key, step)
    return out


def hetero_noise_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, columns: Tensor | None, std: float, key: Tensor, step: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = [t.new_empty(0) for t in (x, scale, grad if columns is None else columns)]
    of_x = grad.to(x.dtype, copy=True).contiguous() if mask[0] else none[0]
    if not (mask[1] or mask[2]):
        return of_x, none[1], none[2]
    wide = compute_dtype(x, grad)
    product = torch.empty(x.shape, dtype=wide, device=x.device)  # grad * std * z
    _run(PRODUCT, grad, product, None, torch.ones((), dtype=wide, device=x.device), None, std, 1.0, key, step)
    if columns is None or columns.dim() == 0:
        of_scale = product if scale.dim() else product.double().sum()
        return of_x, of_scale.to(scale.dtype) if mask[1] else none[1], none[2]
    matrix = product.double().view(scale.numel(), columns.numel())
    of_scale = (matrix * columns.double()).sum(1).to(scale.dtype) if mask[1] else none[1]
    of_columns = (matrix * scale.double().unsqueeze(1)).sum(0).to(columns.dtype) if mask[2] else none[2]
    return of_x, of_scale, of_columns


def hetero_noise__fwd(tensors, scale, columns, std, key, step, ids, offsets, divide_by) -> None:
    for n, s, c, tensor_id, first in _each(len(tensors), scale, columns, ids, offsets):
        _run(ADD, tensors[n], tensors[n], None, s, c, std, 1 / divide_by, key, step, tensor_id, first)


def hetero_noise_sgd__fwd(params, grads, scale, columns, std, key, step, lr, ids, offsets, divide_by) -> None:
    for n, s, c, tensor_id, first in _each(len(params), scale, columns, ids, offsets):
        _run(STEP, grads[n], params[n], params[n], s, c, std, -lr / divide_by, key, step, tensor_id, first)


def clip_sum_fwd(
    grads: Sequence[Tensor], clip: Sequence[float], scale: Sequence[Tensor], columns: Sequence[Tensor],
    groups: Sequence[int] | None, global_clip: float | None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Squares of every block of every sample, factors by a few torch ops, sums over the samples in order."""
    count, device = grads[0].shape[0], grads[0].device
    plain = [g if g.numel() == 0 or g[0].is_contiguous() else g.contiguous() for g in grads]
    kinds = [_scale(s, c) for _, s, c, _, _ in _each(len(grads), scale, columns, None, None)] if scale else None
    norms = torch.zeros(count, len(clip), dtype=torch.float64, device=device)
    for n, g in enumerate(plain):
        size = g[0].numel() if count else 0
        part = torch.zeros(count, triton.cdiv(size, CLIP_BLOCK), dtype=torch.float64, device=device)
        _clip(clip_norm_kernel, (part.shape[1], count), g, size, part, kinds and kinds[n], part.shape[1])
        norms[:, 0 if groups is None else groups[n]] += part.sum(1)
    norms = norms.sqrt().nan_to_num(torch.inf, torch.inf)
    bad = norms.isinf().any(1)
    factors = _shrink(torch.tensor(list(clip), dtype=torch.float64, device=device).expand_as(norms), norms)
    if global_clip is not None:
        whole = (factors * norms).square().sum(1, keepdim=True).sqrt()
        factors = factors * _shrink(torch.full_like(whole, global_clip), whole)
    factors = factors.masked_fill(bad.unsqueeze(1), -1)
    sums = []
    for n, g in enumerate(plain):
        total = torch.zeros(g.shape[1:], dtype=compute_dtype(g), device=device)
        weights = factors[:, 0 if groups is None else groups[n]].contiguous()
        _clip(clip_sum_kernel, (triton.cdiv(total.numel(), CLIP_BLOCK),), g, total.numel(), total,
              kinds and kinds[n], count, weights)  # fmt: skip
        sums.append(total)
    return sums, norms.to(compute_dtype(*grads)), bad.sum()


def _clip(kernel, grid, g, size, out, scale, count, *more) -> None:
    kind, elements, by_column, columns = scale or (-1, out, out, 1)
    acc = triton.language.float64 if compute_dtype(g) == torch.float64 else triton.language.float32
    if size == 0 or g.numel() == 0:
        return
    launch(kernel, grid, g, out, elements, by_column, *more, size, g.stride(0), columns, count, KIND=kind, ACC=acc,
           BLOCK=CLIP_BLOCK, num_warps=4, num_stages=1)  # fmt: skip


def _shrink(limit: Tensor, norm: Tensor) -> Tensor:
    """min(1, limit / norm); a norm of 0 has nothing to shrink."""
    return torch.where(norm > limit, limit / norm, 1.0)
