"""Noise that stands up to an adversary who looks at bits: secret key, integer sums, no early exit. CPU only.

`secure_sum` clips, rounds each record's gradient to a grid, adds up integers exactly and adds an integer Gaussian. What
is released is these integers; scaling them to floats is post-processing. Its multiplier and its distance from the
Gaussian mechanism are known numbers, to be handed to `epsilon` or `History.record`:

- Sensitivity. A clipped gradient has whitened norm at most C; rounding moves it by at most sqrt(d) / 2 grid steps. The
  norm of the integers is computed exactly and a record above that bound is left out, so no float rounding is trusted.
- Noise. A discrete Gaussian that is, within `TOTAL_VARIATION` an element (below 1e-28), a post-processing of real
  Gaussian noise (`pyml.privacy._gaussian`). T steps over d elements are within T d times that; the price is (1 +
  e^epsilon) times as much delta.
- Bits. ChaCha20 of the package cryptography, a fresh 256-bit key from the operating system in every call: nothing to
  seed, nothing to resume, nothing that a fork repeats. That its stream looks random is an assumption, as everywhere.

Not proven: that NumPy, the compiler and the CPU take the same time for all integers (their loops have neither branches
nor addresses that depend on data); anything about the time or the memory of the gradients themselves; that Python
forgets keys.

`secure_noise` gives such noise as floats. Added to a float sum it is "hardened": no released number is a bare sum, and
the noise has no holes, but the rounding of that sum is not accounted for. Ghost clipping has float sums only.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyml.ops import _check
from pyml.privacy import _arguments as arguments
from pyml.privacy._gaussian import TOTAL_VARIATION, WIDTH, integers
from pyml.privacy.multipliers import smallest_entry

REKEY = 2**30  # bytes of one key; ChaCha20's block counter would end at 2^38
# Of std / clip. Below, squares on the grid leave int64, and nobody is protected; above, a clip norm is less than one
# step of the grid, and nothing but rounding is left of a gradient.
LEAST_MULTIPLIER, MOST_MULTIPLIER = 2.0**-9, 2.0**20


class SecureStream:
    """Random bytes: ChaCha20 under a key that nobody has seen, replaced after every 1 GiB."""

    def __init__(self) -> None:
        self._left = -1  # nothing yet
        self._update: Callable[[bytes], bytes]

    def __call__(self, size: int) -> bytes:
        if size > self._left:
            ciphers = arguments.package("secure", "cryptography.hazmat.primitives.ciphers")
            algorithms = arguments.package("secure", "cryptography.hazmat.primitives.ciphers.algorithms")
            key = algorithms.ChaCha20(os.urandom(32), bytes(16))  # a key is used once, so its nonce may be 0
            self._update = ciphers.Cipher(key, mode=None).encryptor().update
            self._left = max(REKEY, size)
        self._left -= size
        return self._update(bytes(size))


@dataclass
class SecureSum:
    """What `secure_sum` gives.

    Attributes:
        sums: the noisy sums, one a parameter, in the dtypes of the gradients. Safe to release.
        norms: float64 ``[B]``, the norms before the clip. Private: not to be released.
        bad: how many records were left out for a NaN, an infinity or a norm that does not fit. Private.
        multiplier: the effective noise multiplier: a little below std / clip, as rounding adds to the sensitivity.
        total_variation: distance of this one step from the Gaussian mechanism with that multiplier.
    """

    sums: list[Tensor]
    norms: Tensor
    bad: int
    multiplier: float
    total_variation: float


def secure_sum(
    per_sample: Iterable[Tensor], clip: float, std: float, *, scale: Sequence[Any] | None = None
) -> SecureSum:
    """Clip in the whitened norm, add up on a grid and add discrete Gaussian noise.

    Args:
        per_sample: one floating CPU tensor ``[B, *shape]`` a parameter: the gradients of B records. B may be 0: the
            noise is added, and the step counts.
        clip: C, the bound on ||g / scale||_2 of a record.
        std: of the noise on the whitened sum: element j has noise std * scale_j. From 2^-9 to 2^20 clip.
        scale: for each parameter a number or a tensor that broadcasts to its shape, >= 0. An element with scale 0 is
            dropped: its sum is 0 and has no noise. None is 1.

    Returns:
        SecureSum.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        ImportError: cryptography is not installed.
    """
    op = "secure_sum"
    clip, std = arguments.positive(op, "clip", clip), arguments.positive(op, "std", std)
    if not LEAST_MULTIPLIER <= std / clip <= MOST_MULTIPLIER:
        _check.fail(op, "std", f"from {LEAST_MULTIPLIER:g} to {MOST_MULTIPLIER:g} clip", f"{std / clip:g} clip")
    given = list(per_sample)
    if not given:
        _check.fail(op, "per_sample", "at least one tensor", "none")
    for g in given:
        _on_cpu(op, "per_sample", g)
        if g.dim() == 0 or g.shape[0] != given[0].shape[0]:
            expected = "tensors [B, *shape] with one B"
            _check.fail(op, "per_sample", expected, [list(t.shape) for t in given])
    scales = _scales(op, scale, [g.shape[1:] for g in given])
    totals, norms, kept, limit = grid_sum(given, scales, clip, WIDTH * clip / std)
    stream, unit, sums = SecureStream(), std / WIDTH, []
    for g, s, total in zip(given, scales, totals):
        noisy = total + torch.from_numpy(integers(total.numel(), stream)).view(total.shape)
        sums.append((noisy.double() * unit * s).to(g.dtype))
    elements = sum(t.numel() for t in totals)
    return SecureSum(sums, norms, int((~kept).sum()), WIDTH / math.sqrt(limit), elements * TOTAL_VARIATION)


def grid_sum(
    per_sample: Sequence[Tensor], scales: Sequence[Tensor], clip: float, radius: float
) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """The exact integer sums of what is left of each record after clip and rounding.

    Args:
        radius: the clip norm in grid steps.

    Returns:
        int64 sums; norms ``[B]``; bool ``[B]``, which records count; the bound on their squared integer norms.
    """
    elements = sum(s.numel() for s in scales)
    limit = math.floor((radius + math.sqrt(elements) / 2) ** 2)
    white = [
        torch.where(s > 0, g.detach().double() / s.where(s > 0, torch.ones_like(s)), 0.0).reshape(g.shape[0], s.numel())
        for g, s in zip(per_sample, scales)
    ]
    norms = _squares(white).sqrt()
    factor = torch.where(norms > clip, clip / norms, 1.0) * (radius / clip)
    grid = [(w * factor[:, None]).round() for w in white]
    # A norm beyond float64 would leave a record of zeros, and not a bad one. What remains is far from the end of int64.
    kept = norms.isfinite() & (_squares(grid) <= 1.001 * limit)
    whole = [torch.where(kept[:, None], n, 0.0).long() for n in grid]
    kept = kept & (_squares(whole) <= limit)
    totals = [torch.where(kept[:, None], n, 0).sum(0).view(s.shape) for n, s in zip(whole, scales)]
    return totals, norms, kept, limit


def _squares(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.square().sum(1) for p in parts]).sum(0)


def _on_cpu(op: str, name: str, t: Any) -> None:
    _check.tensors(op, t, first_name=name)
    if t.device.type != "cpu":
        _check.fail(op, name, "a CPU tensor: secure mode has no GPU form", t.device)


def _scales(op: str, scale: Sequence[Any] | None, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Float64 scales in full shape."""
    given = [1.0] * len(shapes) if scale is None else scale
    if not isinstance(given, list | tuple) or len(given) != len(shapes):
        got = len(given) if isinstance(given, list | tuple) else type(given).__name__
        _check.fail(op, "scale", f"a list of {len(shapes)}, one for each parameter", got)
    found = []
    for s, shape in zip(given, shapes):
        if isinstance(s, Tensor):
            _on_cpu(op, "scale", s)
            smallest_entry(op, "scale", s)
            if s.dim() > len(shape) or any(a not in (1, b) for a, b in zip(reversed(s.shape), reversed(shape))):
                _check.fail(op, "scale", f"a shape that broadcasts to {list(shape)}", list(s.shape))
            found.append(s.detach().double().expand(shape))
        else:
            found.append(torch.full(shape, arguments.not_negative(op, "scale", s), dtype=torch.float64))
    return found


def secure_noise(shape: Sequence[int], std: float, *, scale: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian noise on a grid of std / 2^20 from a fresh secret key: for "hardened" noise on float sums.

    Args:
        shape: of the result.
        std: its standard deviation where the scale is 1.
        scale: a number or a tensor that broadcasts to the shape, >= 0.
        dtype: float32, float64, bfloat16 or float16. A 16-bit result has its own coarser grid.

    Returns:
        A new CPU tensor. There is no seed: for noise that can be repeated there is `pyml.ops.hetero_noise`.
    """
    op = "secure_noise"
    std = arguments.not_negative(op, "std", std)
    _check.member(op, "dtype", dtype, _check.FLOATS)
    sizes = [arguments.count(op, "shape", n) for n in shape]
    (s,) = _scales(op, None if scale is None else [scale], [torch.Size(sizes)])
    drawn = torch.from_numpy(integers(math.prod(sizes), SecureStream())).view(sizes)
    return (drawn.double() * (std / WIDTH) * s).to(dtype)


def secure_batch(records: int, sample_rate: float, *, stream: Callable[[int], bytes] | None = None) -> Tensor:
    """The indices of a Poisson batch from a secret source, int64 in ascending order; it may be empty.

    Each record is in it with the same chance, at most 2^-64 below ``sample_rate``, independently of the others: what
    the accountant assumes. A batch that could be guessed would have no amplification by sampling. A ``stream`` (n ->
    the next n random bytes) takes the place of a fresh secret key, where a batch must be drawn again.
    """
    op = "secure_batch"
    count, rate = arguments.count(op, "records", records), arguments.share(op, "sample_rate", sample_rate)
    bound = math.floor(rate * 2**64)
    words = np.frombuffer((stream or SecureStream())(8 * count), "<u8")
    chosen = words < np.uint64(bound) if bound < 2**64 else np.ones(count, bool)
    return torch.from_numpy(np.flatnonzero(chosen))


def new_key(device: torch.device | str = "cpu") -> Tensor:
    """64 bits of the operating system for `pyml.ops.hetero_noise_`: int64 ``[1]``. To be kept secret, as is a
    checkpoint that holds it. Every rank of a run needs the same one. Noise under it is "fast": Philox is no
    cryptographic generator.
    """
    return torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.int64).to(device)


def noise_kind(*, seed: int | None = None, secure: bool = False, ghost: bool = False) -> str:
    """What the noise of a run may be called, for `History`: "seeded", "fast", "hardened" or "secure".

    Args:
        seed: a seed that was given; anybody who knows it can take the noise away.
        secure: the noise comes from this module.
        ghost: clipping never sees a record's gradient (ghost clipping), so none can be rounded to the grid.
    """
    if seed is not None:
        if secure:
            _check.fail("noise_kind", "seed", "none, as secure noise has no seed", seed)
        return "seeded"
    if not secure:
        return "fast"
    return "hardened" if ghost else "secure"
