"""The effective noise multiplier of anisotropic Gaussian noise: what an accountant for isotropic noise may be told.

The release is sum_i clip(g_i) + L z with z ~ N(0, I) and an invertible L that is public, or made from earlier DP
outputs. Multiplying by L^-1 is undone by L, so it is post-processing both ways: the release is exactly as private as
the isotropic Gaussian mechanism L^-1 sum_i clip(g_i) + z. One record moves that by at most D = sup ||L^-1 d||_2 over
the contributions d that the clip lets through, and the effective multiplier is 1 / D. Here L is diagonal with entries
std * scale. An element
whose scale is 0 has no noise: the whitened clip drops it, every other clip releases it in the clear.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.ops._hetero_noise_arguments import as_scale
from pyml.privacy import _arguments as arguments

OP = "effective_multiplier"
MODES = ("whitened", "l2", "group")


def effective_multiplier(
    std: float,
    clip: float | Sequence[float],
    mode: str = "whitened",
    scale: Any = None,
    global_clip: float | None = None,
) -> float:
    """The noise multiplier of isotropic noise that is exactly as private: 1 / sup ||d / (std * scale)||_2.

    Args:
        std: the factor of the noise at the level of the sum, before any division by the batch size: the noise of
            element j is std * scale_j * z_j.
        clip: the clip norm C; for "group" a list of one clip norm a group; for "whitened" either.
        mode: which norm of a record's gradient is clipped.
            "whitened": ||g / scale||_2 <= C. Then ||d / (std scale)|| <= C / std for every scale: the multiplier is
            std / C, whatever the scale (scale, clip and noise, then undo the scale: "scale-then-privatize", arXiv
            2507.01129; AdaClip, arXiv 1908.07643). With a list, ||g_k / scale||_2 <= C_k for each group k (`clip_sum`
            with ``scale`` and ``groups``): C is then (sum_k C_k^2)^(1/2), and the scale has no part either.
            "l2": ||g||_2 <= C. A record along the least noised axis attains C / (std min(scale)): the multiplier is
            std min(scale) / C. This is tight, so noise above the smallest buys nothing.
            "group": ||g_k||_2 <= C_k for each group k, plain L2 norms only (`clip_sum` with ``groups`` and no
            ``scale``). The groups add up: the multiplier is (sum_k (C_k / (std scale_k))^2)^(-1/2) with the least scale
            of each group.
        scale: a number or a tensor; or, as in `pyml.ops.hetero_noise_`, a list with a number, a tensor or a pair
            (row factors, column factors) for each tensor; for "group" a list of these, one a group. None is 1. A tuple
            at these places is refused: it might be a pair, or a list.
        global_clip: also a bound on the norm over all groups, whitened for "whitened"; not for "l2". For "group" the
            supremum of sum_k (d_k / (std scale_k))^2 is then linear in d_k^2 under one budget: filled greedily from the
            least noised group. For "whitened" C is at most global_clip.

    Returns:
        The multiplier; 0 where a released element has no noise.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """
    std = arguments.not_negative(OP, "std", std)
    _check.member(OP, "mode", mode, MODES)
    several = isinstance(clip, Sequence) and not isinstance(clip, str) and mode != "l2"
    norms: Sequence[Any] = clip if several else [clip]  # type: ignore[assignment]
    if not norms or (mode == "group" and not several):
        _check.fail(OP, "clip", f'a list of one clip norm a group, for mode "{mode}"', clip)
    clips = [arguments.positive(OP, "clip", c) for c in norms]
    if global_clip is not None:
        if mode == "l2":
            _check.fail(OP, "global_clip", 'none, for mode "l2"', global_clip)
        global_clip = arguments.positive(OP, "global_clip", global_clip)
    if mode != "group":
        smallest = least(OP, "scale", scale)  # checked in both modes
        if math.isinf(smallest):
            _check.fail(OP, "scale", "at least one entry", "none")
        whole = math.hypot(*clips)
        reach = whole if global_clip is None else min(whole, global_clip)
        return std / reach if mode == "whitened" else std * smallest / reach
    scales = [1.0] * len(clips) if scale is None else scale
    if not isinstance(scales, list) or len(scales) != len(clips):
        got = len(scales) if isinstance(scales, list) else type(scales).__name__
        _check.fail(OP, "scale", f"a list of one scale for each of the {len(clips)} groups", got)
    noise = [std * least(OP, "scale", s) for s in scales]
    if math.inf in noise:
        _check.fail(OP, "scale", "at least one entry a group", "none")
    if min(noise) == 0:
        return 0.0
    unit = max(clips)  # in units of the largest clip norm no square leaves the range of a double
    budget = math.inf if global_clip is None else (global_clip / unit) ** 2
    reach = 0.0
    for s, c in sorted(zip(noise, clips)):
        part = min(c / unit, math.sqrt(budget))
        budget = max(budget - part * part, 0.0)
        reach = math.hypot(reach, part * (unit / s)) if part else reach
    return 1 / reach if reach else math.inf  # below the least double: noise beyond all that floats hold


def least(op: str, name: str, scale: Any) -> float:
    """The smallest entry of a scale in any of its forms; refuses what no scale may hold."""
    if scale is None:
        return 1.0
    if isinstance(scale, tuple):  # two tensors, or rows and columns of one
        expected = "a list of one scale for each tensor, a pair (row factors, column factors) in it"
        _check.fail(op, name, expected, f"a tuple of {len(scale)}")
    if isinstance(scale, list):
        if not scale:
            _check.fail(op, name, "a scale for each tensor", "an empty list")
        rows, columns = as_scale(op, scale, None, None)
        found = [(least(op, name, r), least(op, name, c)) for r, c in zip(rows, columns or [1.0] * len(rows))]
        return min(math.inf if math.inf in pair else pair[0] * pair[1] for pair in found)  # an empty factor: no element
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return smallest_entry(op, name, scale)
    return arguments.not_negative(op, name, scale)


def smallest_entry(op: str, name: str, scale: Tensor) -> float:
    _check.tensors(op, scale, first_name=name)
    if scale.numel() == 0:
        return math.inf  # no element, no noise that could be too small
    low, high = torch.aminmax(scale.detach())
    if not (float(low) >= 0 and float(high) < math.inf):
        bad = float(low) if not float(low) >= 0 else float(high)
        _check.fail(op, name, "finite entries >= 0", bad)
    return float(low)
