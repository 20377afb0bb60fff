"""The run: plan the jobs, start each in a fresh process, turn answers into rows, write and print."""

import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyml.methods import Stopped, UserError
from pyml.methods._options import check_folder, plural

from . import bars, jobs, machine, output, report
from . import compare as comparison
from .registry import FAMILIES, TRITON_3X, TRITON_FP32, Case, load, missing
from .report import OK, Row

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float64", "bfloat16", "float16")
TABLE_WIDTH = 120
TABLE = "bench.csv"
SHORT = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}


def main(
    families: Sequence[str] = (),
    *,
    device: str | None = None,
    threads: int | Sequence[int] | None = None,
    dtype: str | None = None,
    quick: bool = False,
    out: str | os.PathLike[str] | None = None,
    compare: str | os.PathLike[str] | None = None,
    budget: float | None = None,
    only: str | None = None,
    seed: int = 0,
) -> int:
    """Run the benchmarks and print, then write CSV, Markdown and bars.

    Args:
        families: names of families; none means all.
        device: ``"cpu"`` or ``"cuda"``; default: cuda where a GPU is visible.
        threads: CPU thread counts; default 1 and 2 (2 alone when ``quick``).
        dtype: ``"float32"`` (default), ``"float64"``, ``"bfloat16"``, ``"float16"``, or several with commas between;
            targets are judged on the first.
        quick: the few cases marked quick, few repetitions: one to two minutes.
        out: folder for the results; default ``bench-results/<date>``, or ``<date>-2`` and so on where it is there.
        compare: CSV of an older run, not in ``out``; regressions are listed and the result is 1.
        budget: seconds for the whole run; repetitions shrink to fit, what does not fit is listed as not run.
        only: part of a case's name; the others are left out.
        seed: of the inputs.

    Returns:
        0, or 1 when pyml failed in a case, or a comparison shows a regression or has nothing to compare.

    Raises:
        UserError (a ValueError): one sentence, before anything runs.
        Stopped: after Ctrl-C; the CSV holds what was measured.
    """
    import torch
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [SHORT.get(name.strip(), name.strip()) for name in (dtype or DTYPES[0]).split(",")]
    counts = _check(device, threads, dtypes, quick, budget)
    cases = _chosen_cases(list(families), device, quick, only)
    absent = {case.name: missing(case) for case in cases}
    plan = jobs.plan(cases, device, dtypes, counts, absent, quick)
    old = output.read_csv(Path(compare)) if compare else None
    if compare and old:
        comparison.check_old(old, Path(compare), plan)
    folder = _folder(out, compare)
    console.print(f"{plural(len(cases), 'case')}, {len(plan)} processes; results go to {folder}")
    collector = Collector(cases, absent, {**machine.facts(device), "seed": seed})
    if device == "cpu" and (busy := machine.load() or 0) > 0.5:
        collector.notes.append(f"Other programs were running (load {busy} at the start): times are too long.")
        console.print(*collector.notes)
    try:
        _run(plan, collector, console, folder, quick, budget, seed)
    except KeyboardInterrupt:
        raise Stopped(_kept(collector.rows, folder / TABLE)) from None
    return _finish(collector, console, folder, old)


def _check(device: str, threads: Any, dtypes: list[str], quick: bool, budget: float | None) -> list[int]:
    import torch

    if device not in DEVICES:
        raise UserError(f"bench: device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: device: expected a GPU that torch can use, got none")
    if wrong := [name for name in dtypes if name not in DTYPES]:
        raise UserError(f"bench: dtype: expected one of {', '.join(DTYPES)}, got {wrong[0]!r}")
    if budget is not None and budget <= 0:
        raise UserError(f"bench: budget: expected seconds > 0, got {budget}")
    if threads is None:
        cores = os.cpu_count() or 1
        return sorted({min(n, cores) for n in ((2,) if quick else (1, 2))})
    counts = [threads] if isinstance(threads, int) else list(threads)
    if not counts or any(not isinstance(n, int) or n < 1 for n in counts):
        raise UserError(f"bench: threads: expected integers >= 1, got {threads!r}")
    return sorted(set(counts))


def _chosen_cases(families: list[str], device: str, quick: bool, only: str | None) -> list[Case]:
    cases = [c for c in load(families or FAMILIES).cases if device in c.devices]
    if only is not None:
        cases = [c for c in cases if only.lower() in c.name.lower()]
    elif quick:
        cases = [c for c in cases if c.quick]
    if not cases:
        wanted = f"with {only!r} in its name" if only else "here"
        raise UserError(f"bench: no case of {', '.join(families or FAMILIES)} {wanted} for device {device}")
    return cases


def _folder(out: str | os.PathLike[str] | None, compare: str | os.PathLike[str] | None) -> Path:
    """Make the folder for the results: --out, or one of this day that is not there yet."""
    if out:
        folder = check_folder(Path(out), "bench: out")
        if compare and (folder / TABLE).exists() and (folder / TABLE).samefile(compare):
            raise UserError(f"bench: out: expected another folder than that of --compare, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    day = Path("bench-results") / datetime.date.today().isoformat()
    folder, number = day, 1
    while True:
        try:
            check_folder(folder, "bench: out").mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = day.with_name(f"{day.name}-{number}")


class Collector:
    """Rows so far. Ceilings come first and fill every later row of their thread count."""

    def __init__(self, cases: Sequence[Case], absent: dict[str, dict[str, str]], facts: dict[str, Any]) -> None:
        self.cases, self.absent, self.facts = cases, absent, facts
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.rates: dict[tuple[int, str], dict[str, float | None]] = {}

    def add(self, job: jobs.Job, answer: dict[str, Any], load: float | None) -> None:
        if job.kind == "ceilings":
            self._raise_ceilings((job.threads, job.dtype), {} if "error" in answer else answer)
        elif job.kind == "time":
            self._times(job, answer, load)
        else:
            self._memory(job, answer, load)

    def _row(self, job: jobs.Job, mode: str, name: str, load: float | None, **more: Any) -> Row:
        case = job.case
        assert case is not None
        cost = case.cost(mode, element_size(job.dtype))
        how = precision(job, name, more.get("backend", ""))
        row = Row(
            case.family, case.name, case.op, case.shape, mode, job.device, job.dtype, how,
            job.threads, job.allocator, name, **{"backend": "", "note": case.note, **more, **self.facts},
            load=load, flops=cost.flops, bytes=cost.bytes, exps=cost.exps,
        )  # fmt: skip
        self._against_ceilings(row)
        return row

    def _raise_ceilings(self, key: tuple[int, str], found: dict[str, float | None]) -> None:
        """A ceiling is the best that was seen: other programs may have been running the first time."""
        seen = self.rates.setdefault(key, {})
        for name, rate in found.items():
            seen[name] = max((r for r in (rate, seen.get(name)) if r is not None), default=None)
        for row in self.rows:
            self._against_ceilings(row)

    def _against_ceilings(self, row: Row) -> None:
        rates = dict(self.rates.get((row.threads, row.dtype), {}))
        three = rates.pop("matrix_3xtf32", None)
        if row.precision == "3xTF32":
            rates["matrix"] = three
        for name, rate in rates.items():
            setattr(row, f"{name}_rate", rate)
        if row.median_s is None or row.contender == "torch.nn.Linear":  # the floor does other work than the case counts
            return
        row.gflops = row.flops / row.median_s / 1e9 if row.flops else None
        case = next(c for c in self.cases if c.name == row.case)
        if found := report.shares(case.cost(row.mode, element_size(row.dtype)), row.median_s, rates):
            row.binds = max(found, key=lambda name: found[name])
            row.ceiling_fraction, row.fma_fraction = found[row.binds], found.get("fma")

    def _times(self, job: jobs.Job, answer: dict[str, Any], load: float | None) -> None:
        case = job.case
        assert case is not None
        for mode in case.modes:
            timed, errors = (answer.get(key, {}).get(mode, {}) for key in ("modes", "errors"))
            for name in case.contenders:
                backend = answer.get("backend", "") if name == "pyml" else ""
                if name in self.absent[case.name]:
                    self.rows.append(self._row(job, mode, name, load, status="not installed"))
                elif name in timed:
                    self.rows.append(self._timed(job, mode, name, load, timed[name], backend))
                elif name in errors or ("error" in answer and name in job.names):
                    status = errors.get(name) or answer["error"]
                    self.rows.append(self._row(job, mode, name, load, status=status, backend=backend))

    def _timed(self, job: jobs.Job, mode: str, name: str, load: float | None, t: dict[str, Any], backend: str) -> Row:
        row = self._row(job, mode, name, load, backend=backend)
        scale = t["scale"]
        row.median_s, row.p20_s, row.p80_s = (t[k] * scale for k in ("median", "p20", "p80"))
        row.repetitions, row.inner_calls, row.scale = t["repetitions"], t["inner"], scale
        row.compile_s, row.deviation, row.extra_bytes = t["compile"], t.get("deviation"), t.get("extra_bytes")
        self._against_ceilings(row)
        return row

    def _memory(self, job: jobs.Job, answer: dict[str, Any], load: float | None) -> None:
        case, name = job.case, job.names[0]
        assert case is not None
        for mode in case.modes:
            extra = answer.get("modes", {}).get(mode)
            at = (case.name, job.dtype, mode, name, job.allocator, job.threads)
            rows = [r for r in self.rows if (r.case, r.dtype, r.mode, r.contender, r.allocator, r.threads) == at]
            if not rows:
                status = answer.get("error", OK)
                rows = [self._row(job, mode, name, load, status=status)]
                self.rows += rows
            for row in rows:
                row.extra_bytes = extra
                if "error" in answer:
                    row.note = f"memory: {answer['error']}"


def element_size(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def precision(job: jobs.Job, name: str, backend: str) -> str:
    """How products of the dtype are done. Only Triton kernels can do fp32 in another way than exactly."""
    if job.dtype != "float32":
        return job.dtype
    if name == TRITON_3X:
        return "3xTF32"
    if name == "pyml triton" or (name == "pyml" and backend == "triton"):
        return {"tf32x3": "3xTF32", "tf32": "TF32"}.get(os.environ.get(TRITON_FP32, ""), "exact")
    return "exact"


def _run(
    plan: Sequence[jobs.Job],
    collector: Collector,
    console: Any,
    folder: Path,
    quick: bool,
    budget: float | None,
    seed: int,
) -> None:
    end = time.monotonic() + budget if budget else float("inf")
    slice_seconds = jobs.QUICK_SLICE if quick or budget else jobs.FULL_SLICE
    with tempfile.TemporaryDirectory(prefix="pyml-bench-cache-") as cache, console.status("") as status:
        for n, job in enumerate(plan):
            left = end - time.monotonic()
            status.update(f"[{n + 1}/{len(plan)}] {job.text}")
            if left < 3:
                answer: dict[str, Any] = {"error": "not run: the budget was spent"}
            else:
                share = left / (len(plan) - n)
                calls = max(1, len(job.names) * (len(job.case.modes) if job.case else 4))
                # half of a process's share goes to starting it, building inputs and compiling
                each = max(0.02, min(slice_seconds, 0.5 * share / calls))
                answer = jobs.start(job, seed=seed, budget=each, timeout=min(left, 1800.0), cache=Path(cache))
            collector.add(job, answer, machine.load())
            last = n + 1 == len(plan) or (plan[n + 1].case, plan[n + 1].dtype) != (job.case, job.dtype)
            if job.case is not None and last:
                members = [r for r in collector.rows if (r.case, r.dtype) == (job.case.name, job.dtype)]
                output.print_case(console, members)
                output.write_csv(collector.rows, folder / TABLE)


def _kept(rows: Sequence[Row], path: Path) -> str:
    """What a run that was stopped leaves: every row so far. Without any, an older file stays."""
    if not rows:
        return "stopped before anything was measured"
    output.write_csv(rows, path)
    return f"stopped; {path} holds the {plural(len(rows), 'row')} measured so far"


def _finish(collector: Collector, console: Any, folder: Path, old: list[Row] | None) -> int:
    rows = collector.rows
    report.fill_speedups(rows)
    found = report.verdicts(collector.cases, rows)
    notes = list(collector.notes)
    for line in output.ceiling_lines(rows):
        console.print(line)
    if found:
        output.print_targets(console, found)
    off = sorted({(r.case, r.contender) for r in rows if (r.deviation or 0) > (1e-3 if r.dtype == "float32" else 5e-2)})
    for case, name in off:
        notes.append(f"{case}: the result of {name} differs from that of pyml; their times are not of the same thing.")
    output.write_csv(rows, folder / TABLE)
    drawing = bars.write(rows, folder / "bench.png")
    notes += [drawing] if drawing else []
    output.write_markdown(rows, found, folder / "bench.md", notes)
    for note in notes:
        if note not in collector.notes:
            console.print(note)
    worse = _print_changes(console, old, rows) if old else False
    console.print(f"Written: {folder / TABLE}, bench.md" + ("" if drawing else ", bench.png"))
    return 1 if worse or _failed(rows) else 0


def _failed(rows: Sequence[Row]) -> bool:
    """Whether pyml was measured nowhere, or could not be somewhere."""
    ours = [r for r in rows if r.contender == "pyml"]
    return not any(r.status == OK for r in ours) or any(not r.status.startswith((OK, "not run")) for r in ours)


def _print_changes(console: Any, old: list[Row], rows: list[Row]) -> bool:
    """Whether something is slower, or nothing could be compared."""
    if sentence := comparison.other_machine(old, rows):
        console.print(sentence)
    changes = comparison.changes(old, rows)
    if not changes:
        console.print("Compared nothing: this run and the older one have no time of pyml in common.")
        return True
    bad = [c for c in changes if c.regression]
    console.print(f"Compared {len(changes)} times of pyml with the older run: {plural(len(bad), 'regression')}.")
    for change in changes:
        if change.regression or change.ratio < 1 / comparison.MARGIN:
            word = "slower" if change.regression else "faster"
            ratio = change.ratio if change.regression else 1 / change.ratio
            then, now = report.seconds(change.before.median_s), report.seconds(change.row.median_s)
            if change.regression or ratio > comparison.MARGIN:
                console.print(f"  {ratio:.2f}x {word}: {change.text}: {then} -> {now}")
    return bool(bad)


def cli(arguments: Sequence[str] | None = None) -> int:
    """`python -m pyml.benchmarks`: the same options as `pyml bench`."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m pyml.benchmarks", description="Measure pyml on this machine.")
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; default all")
    parser.add_argument("--device", help="cpu or cuda; default cuda where a GPU is visible")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU thread counts; default 1 2")
    parser.add_argument("--dtype", help="float32 (default), float64, bfloat16, float16, or a,b,...")
    parser.add_argument("--quick", action="store_true", help="a few cases in one to two minutes")
    parser.add_argument("--out", help="folder for CSV, Markdown and bars; default bench-results/<date>")
    parser.add_argument("--compare", help="CSV of an older run: show regressions")
    parser.add_argument("--budget", type=float, help="seconds for the whole run")
    parser.add_argument("--only", help="only cases with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    try:
        return main(**vars(parser.parse_args(arguments)))
    except (UserError, Stopped) as error:
        print(error, file=sys.stderr)
        return 130 if isinstance(error, Stopped) else 2
