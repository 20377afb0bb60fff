"""Gaussian noise with a standard deviation for every element, and clipped sums of per-sample gradients.

The noise is a function of (key, step, tensor id, element) alone: no bit depends on threads, chunks, memory layout, on
how tensors are listed or sharded, or on the instruction set of a CPU. The formula: pyml/reference/hetero_noise.py. What
is private about it, and when: `pyml.privacy`. Philox is no cryptographic generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops import _hetero_noise_arguments as arguments
from pyml.ops._registry import Capability, Op, first_tensor
from pyml.reference import hetero_noise as reference

Scale = float | Tensor | Sequence[float | Tensor | tuple[Tensor, Tensor]]


def hetero_noise(
    x: Tensor, scale: float | Tensor, std: float, *, key: Tensor, step: int, columns: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``x + std * scale * z`` with standard normal z, out of place, differentiable in x, scale and columns.

    Args:
        x: any shape, float32, float64, bfloat16 or float16, any strides. It is tensor 0 of `hetero_noise_`.
        scale: a number, a tensor without dimensions, of the shape of x, or the row factors ``[first dim]`` where
            ``columns`` is given.
        std: standard deviation that the scale multiplies, >= 0.
        key: int64 tensor of one element on the device of x: 64 bits, see `hetero_noise_`.
        step: in [0, 2^32); another step gives other noise.
        columns: column factors ``[product of the other dims]``: element (r, c) has scale[r] * columns[c].

    Returns:
        Shape and dtype of x. Rows under `torch.vmap` get the same noise, as calls in a loop would.
    """
    if not isinstance(scale, Tensor):
        if isinstance(scale, (list, tuple)):
            expected = "a number or a tensor, as x is one tensor (row factors beside columns)"
            _check.fail("hetero_noise", "scale", expected, f"a {type(scale).__name__} of {len(scale)}", TypeError)
        scale = arguments.as_scale("hetero_noise", scale, None, first_tensor([x, key]))[0][0]
    return HETERO_NOISE(x, scale, columns, std, key, step, backend=backend)


def hetero_noise_(
    tensors: list[Tensor], scale: Scale, std: float, *, key: Tensor, step: int, columns: list[Tensor] | None = None,
    ids: list[int] | None = None, offsets: list[int] | None = None, divide_by: float = 1.0,
    params: list[Tensor] | None = None, lr: float | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """``t <- (t + std * scale * z) / divide_by`` for a list of tensors, in one pass over memory.

    With ``params``, ``p <- p - lr * (t + std * scale * z) / divide_by`` instead; t is left as it was.

    Args:
        tensors: sums of clipped gradients, any shapes, dtypes and strides. Arithmetic is in float32, of float64 in it.
            Sums of private data belong in float32 or float64: rounding them to 16 bits before the noise moves them by
            more than a clip norm bounds.
        scale: one number or tensor without dimensions for all; or a list with, for each tensor, a number, a tensor of
            its shape, or a pair of factors (rows ``[first dim]``, columns ``[product of the other dims]``). >= 0:
            numbers are checked; entries of tensors are not, as this would cost a pass over memory, and a NaN there is a
            NaN in the result.
        std: standard deviation of the sum, before the division: noise multiplier times clip norm.
        key: int64 tensor of one element, 64 bits, on the device of the tensors. From the operating system:
            `pyml.privacy.new_key`. A chosen key is reproducible, and not private.
        step: in [0, 2^32). Noise of a (key, step) must never be used twice for private data; so a call is refused while
            a CUDA graph is captured, which would replay it.
        columns: the second halves of the pairs, as a list of its own; an empty tensor where there is none.
        ids: numbers of the tensors in [0, 2^32), by default 0, 1, 2, ...: a tensor keeps its noise wherever it is
            listed.
        offsets: the number of the first element of each tensor in its whole, where it is a (flattened) shard of one.
        divide_by: what the noisy sum is divided by, such as the expected batch size.
        params, lr: parameters of the shapes of the tensors, and the step size of SGD.

    Raises:
        ValueError, TypeError: one sentence; nothing has been written then.
    """
    scales, columns = arguments.as_scale("hetero_noise_", scale, columns, first_tensor([tensors, key]))
    if params is None:
        if lr is not None:
            _check.fail("hetero_noise_", "lr", "None without params", lr)
        HETERO_NOISE_(tensors, scales, columns, std, key, step, ids, offsets, divide_by, backend=backend)
        return
    if lr is None:
        _check.fail("hetero_noise_", "lr", "a number beside params", "None")
    HETERO_NOISE_SGD_(params, tensors, scales, columns, std, key, step, lr, ids, offsets, divide_by, backend=backend)


def hetero_noise_sgd_(
    params: list[Tensor], grads: list[Tensor], scale: Scale, std: float, *, key: Tensor, step: int, lr: float,
    columns: list[Tensor] | None = None, ids: list[int] | None = None, offsets: list[int] | None = None,
    divide_by: float = 1.0, backend: str | None = None,
) -> None:  # fmt: skip
    """``p <- p - lr * (t + std * scale * z) / divide_by``: `hetero_noise_` with ``params``, arguments as there."""
    scales, columns = arguments.as_scale("hetero_noise_sgd_", scale, columns, first_tensor([params, key]))
    HETERO_NOISE_SGD_(params, grads, scales, columns, std, key, step, lr, ids, offsets, divide_by, backend=backend)


def clip_sum(
    per_sample_grads: list[Tensor], clip: float | list[float], *, scale: Scale | None = None,
    columns: list[Tensor] | None = None, groups: list[int] | None = None, global_clip: float | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Sums over the samples of per-sample gradients, each shrunk to a clip norm first, without a copy of them.

    Sample i counts with the factor ``min(1, clip / norm_i)``, where the norm over all tensors is that of g, or of
    g / scale (the whitened norm) where a scale is given.

    Args:
        per_sample_grads: tensors ``[B, ...]``, any strides and dtypes. On a GPU one in which a sample is not contiguous
            is copied.
        clip: clip norm; or one for each group.
        scale: as in `hetero_noise_`, for tensors ``[...]``. An element of scale 0 takes no part: its sum is 0.
        columns: as in `hetero_noise_`.
        groups: group of each tensor, in [0, number of clip norms): norms and factors are then by group.
        global_clip: then shrinks every sample to that norm over all its groups.

    Returns:
        sums ``[...]`` in float32 (float64 for float64), in the order of the tensors; norms ``[B, groups]`` before
        clipping, infinite where bad; and how many samples were bad (int64, no dimensions): they have a NaN or an
        infinity, and take no part. A batch without samples gives zeros. No gradient.
    """
    like = per_sample_grads[0] if isinstance(per_sample_grads, (list, tuple)) and per_sample_grads else None
    scale, columns = arguments.as_scale("clip_sum", [] if scale is None else scale, columns, like)
    limits = [clip] if isinstance(clip, (int, float)) else clip
    return CLIP_SUM(per_sample_grads, limits, scale, columns, groups, global_clip, backend=backend)


# --- registration ---------------------------------------------------------------------------------------------------


def _check_noise(x, scale, columns, std, key, step) -> None:
    op = "hetero_noise"
    _check.tensors(op, x, ("columns",), scale=scale, columns=columns)
    arguments.check_one(op, "", list(x.shape), scale, columns)
    arguments.check_std(op, std)
    arguments.check_key(op, key, step, x)


def _check_list_noise(op, tensors, scale, columns, std, key, step, ids, offsets, divide_by) -> None:
    arguments.check_list(op, "tensors", tensors)
    like = tensors[0] if tensors else key
    if tensors:
        arguments.check_scale(op, [t.shape for t in tensors], scale, columns, like)
    arguments.check_std(op, std)
    arguments.check_key(op, key, step, like)
    arguments.check_places(op, tensors, ids, offsets)
    arguments.number(op, "divide_by", divide_by, "a finite number above 0", 0.0, above=True)


def _check_noise_(tensors, scale, columns, std, key, step, ids, offsets, divide_by) -> None:
    _check_list_noise("hetero_noise_", tensors, scale, columns, std, key, step, ids, offsets, divide_by)


def _check_noise_sgd_(params, grads, scale, columns, std, key, step, lr, ids, offsets, divide_by) -> None:
    op = "hetero_noise_sgd_"
    arguments.check_list(op, "params", params)
    arguments.check_list(op, "grads", grads, params[0] if params else key, len(params))
    arguments.check_pairs(op, params, grads)
    arguments.number(op, "lr", lr, "a finite number")
    _check_list_noise(op, params, scale, columns, std, key, step, ids, offsets, divide_by)


def _check_clip_sum(per_sample_grads, clip, scale, columns, groups, global_clip) -> None:
    op = "clip_sum"
    given = arguments.check_samples(op, per_sample_grads)
    if isinstance(scale, (list, tuple)) and not scale:
        if not isinstance(columns, (list, tuple)) or columns:
            _check.fail(op, "columns", "none without a scale", type(columns).__name__)
    else:
        arguments.check_scale(op, [g.shape[1:] for g in given], scale, columns, given[0])
    arguments.check_groups(op, clip, groups, global_clip, len(given))


def _noise_fake(x, scale, columns, std, key, step):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _noise_composed(x, scale, columns, std, key, step, backend):
    like = x.detach()
    one = like.new_ones((), dtype=reference.compute_dtype(like))
    z = HETERO_NOISE(torch.zeros_like(like, dtype=one.dtype), one, None, std, key, step, backend=backend)
    factors = None if columns is None else columns.to(one.dtype)
    return (x.to(one.dtype) + reference.full_scale(x, scale.to(one.dtype), factors) * z).to(x.dtype)


def _clip_sum_fake(per_sample_grads, clip, scale, columns, groups, global_clip):
    first = per_sample_grads[0]
    sums = [g.new_empty(g.shape[1:], dtype=reference.compute_dtype(g)) for g in per_sample_grads]
    norms = first.new_empty((first.shape[0], len(clip)), dtype=reference.compute_dtype(*per_sample_grads))
    return sums, norms, first.new_empty((), dtype=torch.int64)


def _nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""


_ON_GPU = ("cuda", "triton")  # one launch for a list of tensors, and the bits of the CPU
_WRITES = Capability(gradient=False, double_backward=False, vmap=False, export=False, autocast=False)

HETERO_NOISE = Op(
    "hetero_noise", "hetero_noise", reference._hetero_noise, _check_noise, _noise_fake, ("x", "scale", "columns"),
    composed=_noise_composed, keys=("key", "step"), cuda_preference=_ON_GPU,
)  # fmt: skip
HETERO_NOISE_ = Op(
    "hetero_noise_", "hetero_noise", reference.hetero_noise_, _check_noise_, _nothing, (), mutates=("tensors",),
    keys=("key", "step"), capability=_WRITES, cuda_preference=_ON_GPU,
)  # fmt: skip
HETERO_NOISE_SGD_ = Op(
    "hetero_noise_sgd_", "hetero_noise", reference.hetero_noise_sgd_, _check_noise_sgd_, _nothing, (),
    mutates=("params",), keys=("key", "step"), capability=_WRITES, cuda_preference=_ON_GPU,
)  # fmt: skip
CLIP_SUM = Op(
    "clip_sum", "hetero_noise", reference.clip_sum, _check_clip_sum, _clip_sum_fake, (),
    capability=Capability(gradient=False, double_backward=False, vmap=False, export=False, wide=True),
)  # fmt: skip
