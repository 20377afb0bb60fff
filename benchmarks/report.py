"""Rows, and what they say: one row a contender, mode, thread count and allocator setting; targets judged on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pyml.methods._options import plural

from .registry import BOTH, FORWARD, OF_CASES, Case, Cost, Target

OK = "ok"


@dataclass
class Row:
    """One line of the CSV. Seconds are of one call of the whole case; None is an empty field."""

    family: str
    case: str
    op: str
    shape: str
    mode: str
    device: str
    dtype: str
    precision: str  # how fp32 products are done: exact or 3xTF32
    threads: int  # 0 on a GPU
    allocator: str  # default, retain (glibc keeps freed memory), or torch's own on a GPU
    contender: str
    backend: str  # of pyml
    status: str = OK  # ok, not installed, not run: ..., or the error
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    repetitions: int | None = None
    inner_calls: int | None = None
    scale: float | None = None  # the measured call is 1/scale of the case
    compile_s: float | None = None  # first call less a warm one; not part of any time
    extra_bytes: int | None = None  # peak memory of one call above the warm process
    deviation: float | None = None  # from pyml's result, relative to its largest value
    speedup_of_pyml: float | None = None  # this time over pyml's, same allocator setting
    flops: float | None = None
    bytes: float | None = None
    exps: float | None = None
    gflops: float | None = None  # billions of useful floating-point operations a second
    binds: str = ""  # the ceiling that leaves the least time
    ceiling_fraction: float | None = None  # of that ceiling, on useful work
    fma_fraction: float | None = None
    copy_rate: float | None = None
    fma_rate: float | None = None
    exp_rate: float | None = None
    matrix_rate: float | None = None
    load: float | None = None  # runnable processes when the job started (one-minute mean)
    seed: int = 0
    date: str = ""
    cpu: str = ""
    cores: int | None = None
    gpu: str = ""
    system: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    pyml: str = ""
    commit: str = ""
    note: str = ""


SHORT = {BOTH: "fwd+bwd"}
COLUMNS = tuple(f.name for f in fields(Row))
Key = tuple[str, str, str, str, int]


def group(row: Row) -> Key:
    """Rows of one group are compared with each other."""
    return row.case, row.mode, row.device, row.dtype, row.threads


def groups(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return found


def shares(cost: Cost, seconds: float, rates: dict[str, float | None]) -> dict[str, float]:
    """Fraction of each ceiling that useful work reaches. Products count as matrix work where that unit is faster."""
    fma, matrix = rates.get("fma"), rates.get("matrix")
    on_matrix = cost.matrix if matrix and (fma is None or matrix > fma) else 0.0
    work = {"copy": cost.bytes, "exp": cost.exps, "fma": cost.flops - on_matrix, "matrix": on_matrix}
    return {name: w / rate / seconds for name, w in work.items() if w and (rate := rates.get(name))}


def better(rows: Iterable[Row], contender: str) -> Row | None:
    """The contender's faster allocator setting."""
    timed = [r for r in rows if r.contender == contender and r.status == OK and r.median_s]
    return min(timed, key=lambda r: r.median_s or 0.0, default=None)


def memory(rows: Iterable[Row], contender: str) -> int | None:
    return next((r.extra_bytes for r in rows if r.contender == contender and r.extra_bytes is not None), None)


@dataclass
class Verdict:
    """A target, what was measured, and whether that meets it (None: not measured)."""

    case: str
    target: Target
    value: float | None
    met: bool | None
    judged: bool = True  # False: nothing ran with the threads and the dtype that the target is for

    @property
    def word(self) -> str:
        if not self.judged:
            return "not judged"
        return "not measured" if self.met is None else "met" if self.met else "missed"

    @property
    def text(self) -> str:
        t = self.target
        where = plural(t.threads, "thread") if t.device == "cpu" else "GPU"
        where += f", {t.dtype}" if t.dtype else ""
        what = {
            "speedup": f"faster than {t.against}",
            "slowdown": f"time over {t.against}",
            "seconds": "time",
            "backward": "time over the forward alone",
            "ceiling": f"of the {t.against} ceiling",
            "bytes": "extra memory",
            "memory": f"less memory than {t.against}",
            "growth": f"memory over {t.against}",
            "pace": f"time for each operation over {t.against}",
        }[t.measure]
        return f"{t.mode}, {where}: {what}"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.target.at_least else '<='} {self._shown()[0]}"

    @property
    def measured(self) -> str:
        return self._shown()[1]

    def _shown(self) -> tuple[str, str]:
        """Bound and value, with the digits that tell a miss from its bound."""
        measure, bound = self.target.measure, self.target.bound
        if self.value is None:
            return show(measure, bound), ""
        for digits in range(3, 17):
            texts = show(measure, bound, digits), show(measure, self.value, digits)
            if self.met or texts[0] != texts[1]:
                break
        return texts


def show(measure: str, value: float, digits: int = 3) -> str:
    if measure == "seconds":
        return seconds(value, digits)
    if measure == "bytes":
        return megabytes(value, digits)
    if measure == "ceiling":
        return f"{number(100 * value, digits - 1)} %"
    return f"{number(value, digits)}x"


def seconds(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or unit == "us":
            return f"{number(value / size, digits)} {unit}"
    return ""


def megabytes(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{number(value / 1e6, digits)} MB"


def number(value: float, digits: int = 3) -> str:
    """So many digits, more before the point where the number is large, none that are 0 at the end."""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def judge(case: Case, target: Target, rows: Sequence[Row]) -> Verdict:
    """Each side at its better allocator setting; memory is that of the default one.

    Only the dtype of the target counts, else the first one, and only rows with as many threads as it is for.
    """
    threads = target.threads if target.device == "cpu" else 0
    dtype = target.dtype or (rows[0].dtype if rows else "")

    def rows_of(mode: str) -> list[Row]:
        like = (target.device, mode, dtype, threads)
        return [r for r in rows if (r.device, r.mode, r.dtype, r.threads) == like]

    mine = rows_of(target.mode)
    here = [r for r in mine if r.case == case.name]
    ours, other = better(here, "pyml"), better(here, target.against)
    value: float | None = None
    if target.measure in ("speedup", "slowdown"):
        if ours and other and ours.median_s and other.median_s:
            value = other.median_s / ours.median_s
            value = value if target.measure == "speedup" else 1 / value
    elif target.measure == "seconds":
        value = ours.median_s if ours else None
    elif target.measure == "pace":
        base = better((r for r in mine if r.case == target.against), "pyml")
        each = [r.median_s / r.flops for r in (ours, base) if r and r.median_s and r.flops]
        value = each[0] / each[1] if len(each) == 2 else None
    elif target.measure == "backward":
        alone = better([r for r in rows_of(FORWARD) if r.case == case.name], "pyml")
        if ours and alone and ours.median_s and alone.median_s:
            value = ours.median_s / alone.median_s
    elif target.measure == "ceiling":
        value = ours.fma_fraction if ours and target.against == "fma" else ours.ceiling_fraction if ours else None
    else:
        extra = memory(here, "pyml")
        if target.measure == "bytes":
            value = extra
        elif target.measure == "memory":
            theirs = memory(here, target.against)
            value = theirs / max(extra, 1) if extra is not None and theirs is not None else None
        else:
            base = memory([r for r in mine if r.case == target.against], "pyml")
            value = extra / max(base, 1) if extra is not None and base is not None else None
    met = None if value is None else (value >= target.bound if target.at_least else value <= target.bound)
    same = (target.device, dtype, threads)
    return Verdict(case.name, target, value, met, any((r.device, r.dtype, r.threads) == same for r in rows))


def verdicts(cases: Iterable[Case], rows: Sequence[Row]) -> list[Verdict]:
    """Every target of the cases and devices that were run, except against rivals that are not installed and cases that
    were not run."""
    devices = {r.device for r in rows}
    absent = {(r.case, r.contender) for r in rows if r.status == "not installed"}
    ran = {r.case for r in rows}
    return [
        judge(case, target, rows)
        for case in cases
        for target in case.targets
        if target.device in devices
        and (case.name, target.against) not in absent
        and (target.measure not in OF_CASES or target.against in ran)
    ]


def fill_speedups(rows: Sequence[Row]) -> None:
    for members in groups(rows).values():
        ours = {r.allocator: r.median_s for r in members if r.contender == "pyml" and r.status == OK}
        for row in members:
            mine = ours.get(row.allocator)
            if row.median_s and mine:
                row.speedup_of_pyml = row.median_s / mine


@dataclass
class Line:
    """One line of the printed table: a contender under both allocator settings."""

    mode: str
    threads: str
    contender: str
    default: str
    retain: str
    spread: str
    faster: str
    memory: str
    gflops: str
    ceiling: str


def lines(members: Sequence[Row]) -> list[Line]:
    """The group's contenders in their order. ``faster``: the other's better time over pyml's better time."""
    found = []
    ours = better(members, "pyml")
    for name in dict.fromkeys(r.contender for r in members):
        of = [r for r in members if r.contender == name]
        best, first = better(of, name), of[0]
        cells = {r.allocator: _time_cell(r) for r in of}
        on_gpu = first.device != "cpu"
        faster = ""
        if best and ours and name != "pyml" and best.median_s and ours.median_s:
            faster = f"{number(best.median_s / ours.median_s)}x"
        fraction = ""
        if best and best.ceiling_fraction is not None:
            fraction = f"{100 * best.ceiling_fraction:.0f} % {best.binds}"
        label = name if name != "pyml" or not first.backend else f"pyml ({first.backend})"
        found.append(
            Line(
                SHORT.get(first.mode, first.mode),
                "" if on_gpu else str(first.threads),
                label,
                cells.get("torch" if on_gpu else "default", ""),
                cells.get("retain", ""),
                _spread(best) if best else "",
                faster,
                megabytes(memory(of, name)),
                number(best.gflops) if best and best.gflops else "",
                fraction,
            )
        )
    return found


def _time_cell(row: Row) -> str:
    if row.status != OK:
        return row.status.split(":")[0] if row.status.startswith("not ") else "failed"
    return seconds(row.median_s)


def _spread(row: Row) -> str:
    size = 1.0 if (row.median_s or 0) >= 1 else 1e-3 if (row.median_s or 0) >= 1e-3 else 1e-6
    return f"{number((row.p20_s or 0) / size)}-{number((row.p80_s or 0) / size)}"


def value_of(column: str, text: str) -> Any:
    """A CSV field back to the type of its column."""
    kind = next(f.type for f in fields(Row) if f.name == column)
    if kind is str:
        return text
    if text == "":
        return 0 if kind is int else None
    return int(text) if kind in (int, int | None) else float(text)
