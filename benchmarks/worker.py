"""One job in one fresh process: a JSON job on stdin, the answer as JSON in the file that the job names.

Kinds of job: ``time`` (all contenders of a case in turns), ``memory`` (one contender), ``ceilings``.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from . import ceilings, harness
from .registry import Case, Contender, Setup, load

LONG = 10.0  # seconds: such a call is not repeated only to warm up


def main() -> int:
    job = json.load(sys.stdin)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if job["device"] == "cpu":
        torch.set_num_threads(job["threads"])
    else:
        _trust_gpu_kernels()
    answer = KINDS[job["kind"]](job)
    Path(job["answer"]).write_text(json.dumps(answer))
    return 0


def _build(job: dict[str, Any]) -> tuple[Case, dict[str, Contender]]:
    case = load([job["family"]]).find(job["case"])
    contenders = case.setup(Setup(job["device"], job["dtype"], job["seed"]))
    return case, {name: c for name, c in contenders.items() if name in job["names"]}


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _time(job: dict[str, Any]) -> dict[str, Any]:
    case, contenders = _build(job)
    clock = harness.CudaClock() if job["device"] == "cuda" else harness.WallClock()
    answer: dict[str, Any] = {"backend": _backend(case, job["device"]), "modes": {}, "errors": {}}
    for mode in job["modes"]:
        calls: dict[str, Any] = {}
        facts: dict[str, dict[str, Any]] = {}
        ours: list[Any] | None = None
        for name, contender in contenders.items():
            errors = answer["errors"].setdefault(mode, {})
            if not contender.runs(mode):
                errors[name] = f"not there: {contender.forward_only}"
                continue
            try:
                start = time.perf_counter()
                call = contender.build(mode)
                output = call()
                if job["device"] == "cuda":
                    _synchronize()
                facts[name] = {"scale": contender.scale, "first": time.perf_counter() - start}
                if name == "pyml":
                    ours = _copy(output)
                elif contender.same_result and ours is not None:
                    facts[name]["deviation"] = _deviation(output, ours)
                if job["device"] == "cuda" and not contender.graphed:
                    facts[name]["extra_bytes"] = harness.peak_extra_cuda_bytes(call, contender.anew(mode))
                del output
                calls[name] = call
            except Exception as error:  # one contender that cannot run must not take the others along
                errors[name] = _sentence(error)
        if not calls:
            continue
        del ours
        long = {n: f["first"] for n, f in facts.items() if n in calls and f["first"] > LONG and "compiled" not in n}
        timings = harness.interleave(calls, job["budget"], clock, long)
        answer["modes"][mode] = {
            name: {**facts[name], **vars(t), "compile": max(0.0, facts[name]["first"] - t.median)}
            for name, t in timings.items()
        }
    return answer


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    _, contenders = _build(job)
    (contender,) = contenders.values()
    runs = [mode for mode in job["modes"] if contender.runs(mode)]
    return {"modes": {mode: harness.peak_extra_bytes(contender.build(mode), contender.anew(mode)) for mode in runs}}


def _ceilings(job: dict[str, Any]) -> dict[str, Any]:
    return ceilings.measure(job["device"], job["dtype"], job["budget"])


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def _tensors(output: Any) -> list[Any]:
    import torch

    if isinstance(output, torch.Tensor):
        return [output.detach()]
    return [t.detach() for t in output if isinstance(t, torch.Tensor)] if isinstance(output, (tuple, list)) else []


def _copy(output: Any) -> list[Any]:
    return [t.clone() for t in _tensors(output)]


def _deviation(output: Any, ours: list[Any]) -> float | None:
    """Largest difference from pyml's result, relative to the largest value; infinite where one of them alone is a NaN
    or an infinity. None where shapes do not match."""
    theirs = _tensors(output)
    if not theirs or [t.shape for t in theirs] != [t.shape for t in ours]:
        return None
    worst = 0.0
    for a, b in zip(theirs, ours):
        if b.numel():
            a, b = a.double(), b.double()
            here, there = a.isfinite(), b.isfinite()
            if not (here == there).all():
                return math.inf
            if here.any():
                a, b = a[here], b[here]
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def _trust_gpu_kernels() -> None:
    """Measure what would run once `pyml verify` has passed: without its stamp the automatic choice is the reference."""
    from pyml import backend

    backend.verified_here = lambda device: {op: list(backend.BACKENDS) for op in _ops()}  # type: ignore[assignment]


def _ops() -> dict[str, Any]:
    from pyml.ops._registry import OPS

    return OPS


def _backend(case: Case, device: str) -> str:
    """The backend that ran: of the op itself, or of any op of the family for a layer or a method."""
    from pyml.backend import pick

    op = _ops().get(case.op) or next((o for o in _ops().values() if o.family == case.family), None)
    return pick(op, device, None) if op else ""


KINDS = {"time": _time, "memory": _memory, "ceilings": _ceilings}

if __name__ == "__main__":
    raise SystemExit(main())
