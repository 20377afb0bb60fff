"""Jobs: what has to run in which fresh process, and starting it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyml.methods._options import plural

from .registry import GPU_NAMES, TARGET_THREADS, Case

RETAIN = {"MALLOC_MMAP_THRESHOLD_": "2147483647", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
ALLOCATORS = ("default", "retain")
QUICK_SLICE, FULL_SLICE = 0.25, 1.0  # seconds on each contender and mode; the short one too under a budget


@dataclass(frozen=True)
class Job:
    """One fresh process."""

    kind: str  # ceilings, time, memory
    device: str
    dtype: str
    threads: int  # 0 on a GPU
    allocator: str
    case: Case | None = None
    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        what = self.case.name if self.case else "machine ceilings"
        where = "GPU" if self.device == "cuda" else plural(self.threads, "thread")
        detail = f", peak memory of {self.names[0]}" if self.kind == "memory" else f", {self.allocator} allocator"
        return f"{what}, {where}" + ("" if self.kind == "ceilings" else detail)


def plan(
    cases: Sequence[Case],
    device: str,
    dtypes: Sequence[str],
    threads: Sequence[int],
    missing: dict[str, dict[str, str]],
    quick: bool = False,
) -> list[Job]:
    """Ceilings, then case by case: every thread count under every allocator setting, then peak memory; ceilings again.

    On a GPU one process times a case and reads torch's allocator; on a CPU each contender's peak needs its own process.
    There, cases with targets come first: time may run out.
    """
    on_cpu = device == "cpu"
    counts = list(threads) if on_cpu else [0]
    measured_at = TARGET_THREADS if TARGET_THREADS in counts else max(counts)  # peak memory, once a contender
    settings = ALLOCATORS if on_cpu else ("torch",)
    ceilings = [Job("ceilings", device, dtype, n, settings[-1]) for dtype in dtypes for n in counts]
    jobs = list(ceilings)
    pairs = [(dtype, case) for dtype in dtypes for case in cases]
    if not on_cpu:
        pairs.sort(key=lambda pair: not any(t.device == device for t in pair[1].targets))
    for dtype, case in pairs:
        names = tuple(n for n in case.contenders if n not in missing[case.name] and not (on_cpu and n in GPU_NAMES))
        if case.time_it:
            jobs += [Job("time", device, dtype, n, a, case, names) for n in counts for a in settings]
        if on_cpu:
            alone = [n for n in names if not quick or n in ("pyml", "eager")]
            jobs += [Job("memory", device, dtype, measured_at, "default", case, (name,)) for name in alone]
    return jobs if quick else jobs + ceilings  # again, in case that something else ran the first time


def environment(job: Job, cache: Path) -> dict[str, str]:
    """The process's environment. An empty compile cache of this run's own makes the first compile a cold one."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if job.device == "cpu":
        env.update({name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
        if job.allocator == "retain":
            env.update(RETAIN)
    env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return env


def start(job: Job, *, seed: int, budget: float, timeout: float, cache: Path) -> dict[str, Any]:
    """Run a job and return its answer, or ``{"error": one sentence}``."""
    with tempfile.TemporaryDirectory(prefix="pyml-bench-") as folder:
        answer = Path(folder) / "answer.json"
        order = {
            "kind": job.kind, "device": job.device, "dtype": job.dtype, "threads": job.threads, "seed": seed,
            "budget": budget, "names": job.names, "answer": str(answer), "family": job.case.family if job.case else "",
            "case": job.case.name if job.case else "", "modes": job.case.modes if job.case else (),
        }  # fmt: skip
        before = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", f"{__package__}.worker"],
                input=json.dumps(order), text=True, capture_output=True, env=environment(job, cache),
                timeout=max(timeout, 1.0), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"not run: {time.monotonic() - before:.0f} s were left and did not suffice"}
        if done.returncode or not answer.exists():
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"the process ended with code {done.returncode}"
            if done.returncode < 0:
                reason = f"the process was killed by signal {-done.returncode} (out of memory?)"
            return {"error": f"failed: {reason[:200]}"}
        return json.loads(answer.read_text())
