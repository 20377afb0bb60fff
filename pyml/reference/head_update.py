"""AdamW on slices of weights, stochastic rounding, and edits of attention heads, in plain torch.

AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization") as `torch.optim.AdamW` computes it::

    p <- p (1 - lr weight_decay)
    m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

Stochastic rounding to 16 bits goes up with the probability of what is cut off: the low bits of a random word are added
to the bits of the float32 number, which is then cut. Element e of a slice (row-major) takes word ``(e // 16) % 4`` of
the Philox counter ``(16 * (e // 64) + e % 16, id, step)`` under the key xor `ROUNDING`; a noise of the same key has
other words. bfloat16 takes 16 of its bits, float16 takes 13, also where it is denormal.

Read this file before the kernels: they compute the same numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype
from pyml.reference.hetero_noise import words

ROUNDING = 0x2545F4914F6CDD1D  # the key of the rounding is the key xor this
_SMALL = 0x38800000  # bits of 2^-14, the smallest float16 that is not denormal


def adamw_slices_(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids
) -> None:  # fmt: skip
    """One step of AdamW, slice by slice. With masters these move, and the parameters become their rounding.

    A step starts from the master where its rounding to the parameter's dtype equals the parameter (so -0 is 0), and
    from the parameter elsewhere: that was written to since. A NaN equals nothing, so a parameter that is NaN stays one.
    """
    for n, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        master = masters[n] if masters else p
        wide = compute_dtype(p, g, m, v, master)
        start = torch.where(master.to(p.dtype) == p, master.to(wide), p.to(wide))
        now = [start, *(t.to(wide) for t in (g, m, v))]
        new, first, second = adamw(now[0], now[1], now[2], now[3], step, lr, betas, eps, weight_decay)
        m.copy_(first)
        v.copy_(second)
        if masters:
            master.copy_(new)
        if key is not None and p.dtype in (torch.bfloat16, torch.float16):
            new = stochastic_rounding(new.float(), p.dtype, rounding_words(key, step, n if ids is None else ids[n], p))
        p.copy_(new)


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: Sequence[float], eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Parameter, first and second moment after a step, all of one dtype."""
    m = torch.lerp(m, g, 1 - betas[0])
    v = (v * betas[1]).addcmul(g, g, value=1 - betas[1])
    denominator = v.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    return (p * (1 - lr * weight_decay)).addcdiv(m, denominator, value=-lr / (1 - betas[0] ** step)), m, v


def rounding_words(key: Tensor, step: int, tensor_id: int, like: Tensor) -> Tensor:
    """A random word of 32 bits (int64) for every element of a slice of this shape."""
    elements = torch.arange(like.numel(), device=like.device).view(like.shape)
    four = torch.stack(words(key ^ ROUNDING, step, tensor_id, elements))
    return four.gather(0, ((elements >> 4) & 3).unsqueeze(0)).squeeze(0)


def stochastic_rounding(x: Tensor, dtype: torch.dtype, word: Tensor) -> Tensor:
    """x (float32) in bfloat16 or float16: one of its two neighbours there, the nearer one more often. Infinities and
    NaN stay."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    if dtype == torch.bfloat16:
        found = _of_bits((bits + (word & 0xFFFF)) & 0xFFFF0000)
    else:
        sign, size, low = bits & 0x80000000, bits & 0x7FFFFFFF, word & 0x1FFF
        plain = _of_bits(sign | ((size + low) & 0x7FFFE000))
        # Denormal halves are whole multiples of 2^-24: 13 bits behind the point decide.
        denormal = ((x.double().abs() * 2.0**37).nan_to_num(0, 0).clamp(max=2.0**40).long() + low) >> 13
        found = torch.where(size < _SMALL, torch.copysign(denormal.float() * 2.0**-24, x), plain)
    return torch.where(x.isfinite(), found, x).to(dtype)


def _of_bits(bits: Tensor) -> Tensor:
    """The float32 of 32 bits in int64."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


# --- edits of heads ---------------------------------------------------------------------------------------------------


def head_edit(x: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float) -> Tensor:
    """Head heads[i] becomes ``(1 - strength) x + strength (matrix[i] x + values[i])``; others stay.

    x ``[..., H, D]``, values ``[..., k, D]`` with leading dimensions of 1 or those of x, matrix ``[k, D, D]``.
    """
    wide = compute_dtype(x, values, matrix)
    place = {head: i for i, head in enumerate(heads)}
    rows = []
    for head in range(x.shape[-2]):
        row = x.select(-2, head)
        if head in place:
            given, i = row.to(wide).contiguous(), place[head]  # the same bits in every layout
            edited = torch.zeros_like(given) if matrix is None else given @ matrix[i].to(wide).t()
            if values is not None:
                edited = edited + values.select(-2, i).to(wide)
            if strength != 1:  # else what was there has no say, not even a NaN
                edited = (1 - strength) * given + strength * edited
            row = edited.to(x.dtype)
        rows.append(row)
    return torch.stack(rows, -2) if rows else x.clone()


def head_edit_(x: Tensor, heads: Sequence[int], values: Tensor | None, matrix: Tensor | None, strength: float) -> None:
    """The same in place."""
    x.copy_(head_edit(x, heads, values, matrix, strength))
