"""What this machine can do, measured in the run that it is compared with.

copy    bytes/s, reading and writing 256 MiB each (1 GiB on a GPU), as torch copies a tensor
fma     fp32 floating-point operations/s in registers: `torch.ops.pyml.machine_fma` on a CPU, a compiled chain on a GPU
exp     exponentials/s in registers: `torch.ops.pyml.machine_exp`, or the same kind of chain
matrix  floating-point operations/s of torch.mm at 2048 (8192 on a GPU), in the dtype of the run
matrix_3xtf32  on a GPU in float32: a third of the TF32 rate
"""

import time
from collections.abc import Callable
from typing import Any

from . import harness

NAMES = ("copy", "fma", "exp", "matrix")
UNITS = {"copy": "GB/s", "fma": "GFLOP/s", "exp": "Gexp/s", "matrix": "GFLOP/s"}


def measure(device: str, dtype: str, budget: float = 1.0) -> dict[str, float | None]:
    """Rates a second; None where it cannot be measured here. A rate is the best of the repetitions: it is a ceiling."""
    import torch

    kind = getattr(torch, dtype)
    cuda = device == "cuda"
    clock = harness.CudaClock() if cuda else harness.WallClock()
    source = torch.empty(1 << (28 if cuda else 26), device=device).normal_()
    target = torch.empty_like(source)
    n = 8192 if cuda else 2048
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    rates: dict[str, float | None] = {
        "copy": _best(lambda: target.copy_(source), 2 * source.nbytes, budget, clock),
        "matrix": _best(lambda: torch.mm(a, b), 2.0 * n**3, budget, clock),
    }
    if cuda and dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["matrix_3xtf32"] = _best(lambda: torch.mm(a, b), 2.0 * n**3, budget, clock) / 3
        torch.backends.cuda.matmul.allow_tf32 = False
    chains = _cuda_chains() if cuda else {}
    for name in ("fma", "exp"):
        op = None if cuda else _native(name)
        if op is not None:
            rates[name] = _native_rate(op, budget)
        elif name in chains:
            call, work = chains[name]
            rates[name] = _best(call, work, budget, clock)
        else:
            rates[name] = None
    return rates


def _best(call: Callable[[], Any], work: float, budget: float, clock: Any) -> float:
    for _ in range(2):
        clock(call, 1)
    end = time.monotonic() + budget
    best, least = float("inf"), 3
    while least > 0 or time.monotonic() < end:
        best = min(best, clock(call, 1))
        least -= 1
    return work / best


def _native(name: str) -> Any:
    import torch

    from pyml.backend import load_extension

    if load_extension() is not None:
        return None
    return getattr(torch.ops.pyml, f"machine_{name}", None)


def _native_rate(op: Any, budget: float) -> float:
    repeats, best = 1, 0.0
    end = time.monotonic() + budget
    while True:
        start = time.perf_counter()
        done = op(repeats)
        seconds = time.perf_counter() - start
        best = max(best, done / seconds if seconds > 5e-3 else 0.0)
        if seconds < 2e-2:
            repeats *= 2  # until starting the threads no longer counts
        elif time.monotonic() > end:
            return best


def _cuda_chains() -> dict[str, tuple[Callable[[], Any], float]]:
    """A long dependent chain per element, many elements: registers only, so that the arithmetic unit binds."""
    import torch

    try:
        import triton  # noqa: F401
    except ImportError:
        return {}
    steps, x = 256, torch.rand(1 << 24, device="cuda")

    def fma(v: Any) -> Any:
        w = v + 1
        for _ in range(steps // 2):
            v, w = v * 0.999 + 0.001, w * 0.999 + 0.001
        return v + w

    def exp(v: Any) -> Any:
        for _ in range(steps // 8):
            v = torch.exp(v * -1.0)
        return v

    fast_fma, fast_exp = torch.compile(fma, dynamic=False), torch.compile(exp, dynamic=False)
    return {
        "fma": (lambda: fast_fma(x), 2.0 * steps * x.numel()),
        "exp": (lambda: fast_exp(x), steps / 8.0 * x.numel()),
    }
