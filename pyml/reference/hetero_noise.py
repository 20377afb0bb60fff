"""Counter-based Gaussian noise of any shape of scale, and clipped sums of per-sample gradients, in plain torch.

Every normal is a function of (key, step, tensor id, element) alone. Element e of a tensor takes word ``(e // 16) % 4``
of the Philox4x32-10 counter ``(16 * (e // 64) + e % 16, tensor id, step)`` under the 64-bit key (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"). Words 0 and 1 make two normals, words 2 and 3 two more (Box and Muller
1958)::

    u = (w0 + 1/2) / 2^32                        r = sqrt(-2 ln u)
    phi = 2 pi * signed(w1 << 2) / 2^34          the low 30 bits of w1: an angle in [-pi/4, pi/4)
    c = r cos(phi), negative when bit 31 of w1 is set;  s = r sin(phi)
    normals = (s, c) when bit 30 of w1 is set, else (c, s)

32 bits end at 6.66 sigma. So where w0 < 2^8, 32 bits w0' of the same counter under the key xor `TAIL` come behind it:
u = (2^32 w0 + w0' + 1/2) / 2^64. The largest normal is 9.49, and what is missing beyond has probability 2.4e-21.

Read this file before the kernels: they compute the same numbers.
"""

import math

import torch
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype

TAIL = 0x9E3779B97F4A7C15  # the key of the refined tail is the key xor this
REFINE_BELOW = 1 << 8
_WORD = (1 << 32) - 1
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _high_low(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product of two 32-bit numbers, which has no room in int64."""
    high, low = word >> 16, word & 0xFFFF
    return (high * factor + ((low * factor) >> 16)) >> 16, (word * factor) & _WORD


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of 32 bits, in int64, for each counter of four such words.

    Args:
        key: int64 of one element, 64 bits.
        counter: four int64 tensors of one shape, each in [0, 2^32).
    """
    k0, k1 = key.reshape(()) & _WORD, (key.reshape(()) >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _high_low(c0, _MULTIPLY[0])
        high1, low1 = _high_low(c2, _MULTIPLY[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def words(key: Tensor, step: int, tensor_id: int, elements: Tensor) -> list[Tensor]:
    """The four Philox words of the counters that these elements belong to."""
    count = (elements >> 6) * 16 + (elements & 15)
    return philox(key, (count & _WORD, count >> 32, torch.full_like(count, tensor_id), torch.full_like(count, step)))


def normals(key: Tensor, step: int, tensor_id: int, elements: Tensor) -> Tensor:
    """Standard normals in float64 of the elements with these numbers (int64, any shape)."""
    tail = (TAIL + (1 << 63)) % (1 << 64) - (1 << 63)  # as int64
    plain, more = words(key, step, tensor_id, elements), words(key ^ tail, step, tensor_id, elements)
    second, swapped = (elements >> 5) & 1 == 1, (elements >> 4) & 1 == 1  # which pair of words, which of its normals
    w0, w1, extra = (
        torch.where(second, b, a) for a, b in ((plain[0], plain[2]), (plain[1], plain[3]), (more[0], more[2]))
    )
    u = torch.where(w0 < REFINE_BELOW, ((w0 << 32 | extra).double() + 0.5) * 2.0**-64, (w0.double() + 0.5) * 2.0**-32)
    r = torch.sqrt(-2 * torch.log(u))
    signed = ((w1 << 2) & _WORD) ^ (1 << 31)  # two's complement: flip the top bit, then take away what it counts
    phi = (signed - (1 << 31)).double() * (2 * math.pi * 2.0**-34)
    c = r * torch.cos(phi) * (1 - 2 * (w1 >> 31))
    s = r * torch.sin(phi)
    return torch.where(swapped ^ ((w1 >> 30) & 1 == 1), s, c)


def noise_like(t: Tensor, key: Tensor, step: int, tensor_id: int = 0, offset: int = 0) -> Tensor:
    """Normals in float64 of the shape of t, whose first element has the number ``offset``."""
    return normals(key, step, tensor_id, torch.arange(t.numel(), device=t.device).view(t.shape) + offset)


def full_scale(t: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
    """The scale of every element of t, or something that broadcasts to it: a number, factors of [first dim, rest], or
    as it is."""
    if columns is None:
        return scale
    return (scale.unsqueeze(1) * columns.unsqueeze(0)).reshape(t.shape)


def hetero_noise(
    x: Tensor, scale: Tensor, std: float, *, key: Tensor, step: int, columns: Tensor | None = None
) -> Tensor:
    """x + std * scale * z."""
    return _hetero_noise(x, scale, columns, std, key, step)


def _hetero_noise(x: Tensor, scale: Tensor, columns: Tensor | None, std: float, key: Tensor, step: int) -> Tensor:
    wide = compute_dtype(x)
    factors = None if columns is None else columns.to(wide)
    return (x.to(wide) + std * full_scale(x, scale.to(wide), factors) * noise_like(x, key, step).to(wide)).to(x.dtype)


def _each(scale, columns, ids, offsets, n):
    """Scale, column factors, id and offset of tensor n."""
    own = columns[n] if columns and columns[n].dim() else None
    return scale[n if len(scale) > 1 else 0], own, n if ids is None else ids[n], 0 if offsets is None else offsets[n]


def _noisy(t, wide, n, scale, columns, std, key, step, ids, offsets):
    """t + std * scale * z in this dtype, for tensor n of a list."""
    s, c, tensor_id, offset = _each(scale, columns, ids, offsets, n)
    c = None if c is None else c.to(wide)
    return t.to(wide) + std * full_scale(t, s.to(wide), c) * noise_like(t, key, step, tensor_id, offset).to(wide)


def hetero_noise_(tensors, scale, columns, std, key, step, ids, offsets, divide_by) -> None:
    """t <- (t + std * scale * z) / divide_by, tensor by tensor."""
    for n, t in enumerate(tensors):
        t.copy_(_noisy(t, compute_dtype(t), n, scale, columns, std, key, step, ids, offsets) / divide_by)


def hetero_noise_sgd_(params, grads, scale, columns, std, key, step, lr, ids, offsets, divide_by) -> None:
    """p <- p - lr * (t + std * scale * z) / divide_by, tensor by tensor."""
    for n, (p, t) in enumerate(zip(params, grads)):
        wide = compute_dtype(p, t)
        p.copy_(p.to(wide) - lr * _noisy(t, wide, n, scale, columns, std, key, step, ids, offsets) / divide_by)


# --- clipped sums of per-sample gradients -----------------------------------------------------------------------------


def clip_sum(per_sample_grads, clip, scale, columns, groups, global_clip):
    """Sums of ``factor_i * g_i`` over the samples i, the norms that the factors come from, and how many were bad.

    The norm of group k is that of g / scale over its tensors; the factor is min(1, clip_k / norm_k). With a global
    clip, all factors of a sample shrink until the norm over all groups is at most that. An element of scale 0 takes no
    part. A sample with a NaN or an infinity has the norm infinity in that group, and factor 0 in every group.
    """
    count = per_sample_grads[0].shape[0]
    group_of = [0] * len(per_sample_grads) if groups is None else list(groups)
    square = torch.zeros(count, len(clip), dtype=torch.float64, device=per_sample_grads[0].device)
    live = []
    for n, g in enumerate(per_sample_grads):
        rows = g.double().flatten(1) if g.dim() > 1 else g.double().unsqueeze(1)
        keep = torch.ones_like(rows[:1], dtype=torch.bool)
        if scale:
            s, c, _, _ = _each(scale, columns, None, None, n)
            wide = compute_dtype(g)
            like = g[0] if count else g.new_zeros(g.shape[1:])
            s = full_scale(like, s.to(wide), None if c is None else c.to(wide)).double()
            s = s.expand(g.shape[1:]).reshape(1, rows.shape[1])
            keep = s != 0
            rows = torch.where(keep, rows / torch.where(keep, s, 1), 0)
        live.append(keep)
        square[:, group_of[n]] += (rows * rows).sum(1)
    norms = square.sqrt()
    bad = ~norms.isfinite().all(1)
    limits = torch.tensor([float(c) for c in clip], dtype=torch.float64, device=norms.device)
    factors = (limits / norms).clamp(max=1).nan_to_num(1.0)  # 0 / 0: a clip of 0 has nothing to shrink
    if global_clip is not None:
        whole = ((factors * norms) ** 2).sum(1, keepdim=True).sqrt()
        factors = factors * (global_clip / whole).clamp(max=1).nan_to_num(1.0)
    factors = factors.masked_fill(bad.unsqueeze(1), 0)
    sums = []
    for n, (g, keep) in enumerate(zip(per_sample_grads, live)):
        wide = compute_dtype(g)
        rows = (g if g.dim() > 1 else g.unsqueeze(1)).to(wide).flatten(1).masked_fill(bad.unsqueeze(1) | ~keep, 0)
        sums.append((factors[:, group_of[n], None].to(wide) * rows).sum(0).view(g.shape[1:]))
    return sums, norms.nan_to_num(math.inf, math.inf).to(compute_dtype(*per_sample_grads)), bad.sum()
