"""Interleaved timing and peak memory. Knows calls, not cases."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_SLICE = 1e-3  # seconds: a shorter call is repeated inside one measurement, or the timer would be what we measure
MOST_REPETITIONS = 60


@dataclass
class Timing:
    """Seconds a call, and how they were obtained."""

    median: float
    p20: float
    p80: float
    repetitions: int
    inner: int


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low, part = int(at), at - int(at)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * part


class WallClock:
    """Wall time of ``n`` calls on a CPU."""

    def __call__(self, call: Callable[[], Any], n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return time.perf_counter() - start


class CudaClock:
    """GPU time of ``n`` calls between two events, launch gaps included."""

    def __call__(self, call: Callable[[], Any], n: int) -> float:
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def plan(seconds: float, budget: float) -> tuple[int, int]:
    """(repetitions, calls in each) for a call that takes ``seconds``, to spend about ``budget`` on it.

    At least 5 repetitions, 3 of a call longer than a second, 1 of one longer than ten.
    """
    inner = max(1, math.ceil(LEAST_SLICE / max(seconds, 1e-9)))
    least = 5 if seconds < 1 else 3 if seconds < 10 else 1
    return max(least, min(MOST_REPETITIONS, int(budget / max(seconds * inner, 1e-9)))), inner


def schedule(repetitions: dict[str, int]) -> list[str]:
    """The order of measurements: A B C A B C ..., the ones with fewer repetitions spread evenly over the rounds."""
    rounds = max(repetitions.values())
    order = []
    for r in range(rounds):
        order += [name for name, n in repetitions.items() if (r + 1) * n // rounds > r * n // rounds]
    return order


def interleave(
    calls: dict[str, Callable[[], Any]],
    budget: float,
    clock: Callable[[Callable[[], Any], int], float] | None = None,
    known: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Time all calls in turns, about ``budget`` seconds for each. ``known`` calls are warm and take about so long."""
    clock = clock or WallClock()
    plans = {}
    for name, call in calls.items():
        if name in (known or {}):
            plans[name] = plan((known or {})[name], budget)
            continue
        warm = clock(call, 1)
        if warm < 1:  # a CUDA graph is recorded in the second call and replayed from the third on
            clock(call, 1)
            warm = clock(call, 1)
        if warm < 0.05:
            clock(call, 3)
            n = max(3, math.ceil(LEAST_SLICE / max(warm, 1e-9)))
            warm = clock(call, n) / n
        plans[name] = plan(warm, budget)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name in schedule({name: p[0] for name, p in plans.items()}):
            inner = plans[name][1]
            taken[name].append(clock(calls[name], inner) / inner)
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(
            statistics.median(values),
            quantile(values, 0.2),
            quantile(values, 0.8),
            len(values),
            plans[name][1],
        )
        for name, values in taken.items()
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(call: Callable[[], Any], anew: Callable[[], Callable[[], Any]] | None = None) -> int:
    """Peak resident memory of one call above the warm process, result included (Linux; the kernel's high-water mark).

    The heap is trimmed first, so that pages which the warm-up left behind do not hide what the call needs. With
    ``anew`` the call only warms the process up, and the first call of what ``anew`` builds is measured: with all that
    it keeps.
    """
    result = call()
    if anew is not None:
        del call
        call = anew()
    del result
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def peak_extra_cuda_bytes(call: Callable[[], Any], anew: Callable[[], Callable[[], Any]] | None = None) -> int:
    """The same on a GPU, from torch's allocator."""
    import torch

    result = call()
    if anew is not None:
        call = anew()
    del result
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before
