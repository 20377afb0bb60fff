"""A discrete Gaussian of fixed width on the integers, sampled in constant time from random bytes.

A draw compares 128 random bits with every threshold of one small table and never leaves early: neither branches nor
addresses depend on what was drawn. Sixteen draws x of the small width b are then joined, x + k y, level by level.

Why that is a discrete Gaussian: the chance of z = x + k y, with x and y of width s, is exp(-z^2 / (2 s^2 (1 + k^2)))
times the sum over all integers y of a Gaussian of width w = s / sqrt(1 + k^2) centred at k z / (1 + k^2). By Poisson's
summation formula that sum is the same for every centre, so for every z, up to a factor 1 +- 2 sum_m exp(-2 pi^2 w^2
m^2), which is `_ripple(w)`. The factors below are so chosen that w > 1.87, where the ripple is below 1e-29, relative to
the chance of each z, in the tails too.

Why it serves as a Gaussian: let Y be a real Gaussian of width `WIDTH` around an integer, and round Y at random to the
integer n with chance ~ exp(-(n - Y)^2 / (2 R^2)). The result is a discrete Gaussian of width sqrt(WIDTH^2 + R^2) around
the same integer, up to ripple(R). So the integer release is a post-processing of the Gaussian mechanism with std
`WIDTH`: every accountant for that holds, sampling and composition included, up to `TOTAL_VARIATION` a draw.
"""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

BASE = Decimal("4.6")
FACTORS = (2, 5, 28, 780)
DRAWS = 2 ** len(FACTORS)
LAST = 60  # the table ends here: 13 widths, a tail of less than 2^-128
ROUNDING = 2.0  # R above
VARIANCE = float(BASE**2) * math.prod(1 + k * k for k in FACTORS)  # of the integers
WIDTH = math.sqrt(VARIANCE - ROUNDING**2)  # std of the Gaussian that they are a rounding of: 1.1e6 grid steps
CHUNK = 1024  # samples at once: what they need stays in the cache


def _ripple(width: float) -> float:
    """Relative deviation of sum_n exp(-(n - c)^2 / (2 width^2)) from its mean over c, and a little more."""
    return 2.001 * math.exp(-2 * math.pi**2 * width**2)


def _distance() -> float:
    """Total variation between one sample and the rounded Gaussian: the table, the joins, the rounding."""
    table = DRAWS * (LAST + 1) * 2.0**-128
    joins, width, left = 0.0, float(BASE), DRAWS
    for k in FACTORS:
        left //= 2
        joins += left * 2 * _ripple(width / math.sqrt(1 + k * k))  # twice: the normalisation deviates as well
        width *= math.sqrt(1 + k * k)
    return table + joins + 2 * _ripple(ROUNDING)


TOTAL_VARIATION = _distance()


@lru_cache(maxsize=1)
def thresholds() -> list[tuple[np.uint64, np.uint64]]:
    """P(|x| >= j) * 2^128 for j = 1..LAST, to the nearest integer, as its high and its low 64 bits."""
    with localcontext() as context:
        context.prec = 80
        weights = [(-Decimal(j * j) / (2 * BASE * BASE)).exp() for j in range(LAST + 40)]
        both = [2 * w for w in weights[1:]]
        total = weights[0] + sum(both)
        tails = [sum(both[j:], Decimal(0)) / total for j in range(LAST)]
        whole = [int((tail * 2**128).to_integral_value()) for tail in tails]
    return [(np.uint64(t >> 64), np.uint64(t & (2**64 - 1))) for t in whole]


def base_draws(high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """|x| for each 128-bit number: how many thresholds are above it. All are looked at, for every number."""
    found = np.zeros(high.shape, np.uint8)
    less, equal, below = (np.empty(high.shape, bool) for _ in range(3))
    for t_high, t_low in thresholds():
        np.less(high, t_high, out=less)
        np.equal(high, t_high, out=equal)
        np.less(low, t_low, out=below)
        np.logical_and(equal, below, out=equal)
        np.logical_or(less, equal, out=less)
        np.add(found, less.view(np.uint8), out=found)
    return found


def integers(count: int, stream: Callable[[int], bytes]) -> npt.NDArray[np.int64]:
    """``[count]`` discrete Gaussians of variance `VARIANCE`; ``stream(n)`` gives the next n random bytes."""
    found = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        part = found[start : start + CHUNK]
        part[:] = _chunk(len(part), stream)
    return found


def _chunk(count: int, stream: Callable[[int], bytes]) -> npt.NDArray[np.int64]:
    words = np.frombuffer(stream(count * DRAWS * 16), "<u8").reshape(2, DRAWS, count)
    bits = np.frombuffer(stream(count * 2), "<u2").astype(np.int64)
    x = base_draws(words[0], words[1]).astype(np.int64)
    sign = -((bits >> np.arange(DRAWS)[:, None]) & 1)  # 0 or -1; a zero keeps its chance under either
    x = (x ^ sign) - sign
    for k in FACTORS:
        x = x[0::2] + k * x[1::2]
    return x[0]
