"""Tables on screen, CSV and Markdown."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyml.methods import UserError
from pyml.methods._options import plural

from . import ceilings
from .report import COLUMNS, OK, Line, Row, Verdict, groups, lines, seconds, value_of

HEAD = ("mode", "thr", "contender", "default", "retain", "p20-p80", "pyml faster", "memory", "GFLOP/s", "of ceiling")
TARGET_HEAD = ("case", "target", "wanted", "measured", "")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_field(getattr(row, name)) for name in COLUMNS])
    partial.replace(path)  # a run that is killed leaves the last whole table


def _field(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[Row]:
    """Rows of an older run. Columns that it does not have stay empty."""
    try:
        with path.open(newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"bench: compare: expected a CSV written by pyml bench, got {path} ({reason})") from None
    needed = ("case", "mode", "device", "dtype", "threads", "allocator", "contender", "median_s")
    if not records or any(name not in records[0] for name in needed):
        raise UserError(f"bench: compare: expected a CSV written by pyml bench, got {path}")
    empty = {name: "" for name in COLUMNS}
    try:
        return [
            Row(**{name: value_of(name, text or "") for name, text in {**empty, **r}.items() if name in empty})
            for r in records
        ]
    except ValueError as error:
        raise UserError(f"bench: compare: {path} holds a field that is no number ({error})") from None


def ceiling_text(row: Row) -> str:
    parts = []
    for name in ceilings.NAMES:
        rate = getattr(row, f"{name}_rate")
        parts.append(f"{name} {rate / 1e9:.0f} {ceilings.UNITS[name]}" if rate else f"{name} not measured")
    where = plural(row.threads, "thread") if row.device == "cpu" else row.gpu
    how = row.dtype if row.precision in ("", "exact", row.dtype) else f"{row.dtype} as {row.precision}"
    return f"Ceilings, {where}, {how}: " + ", ".join(parts)


def ceiling_lines(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(ceiling_text(row) for row in rows))


def case_title(row: Row) -> str:
    title = f"{row.case}, {row.dtype}"
    return title + (f"; {row.note}" if row.note else "")


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.mode, line.threads, line.contender, line.default, line.retain, line.spread, line.faster, line.memory,
        line.gflops, line.ceiling,
    )  # fmt: skip


def print_case(console: Any, rows: Sequence[Row]) -> None:
    """All modes and thread counts of one case as one table of at most 120 columns, if anything of it has a figure."""
    if not measured(rows):
        for sentence in problems(rows):
            console.print(sentence)
        return
    from rich import box
    from rich.table import Table

    table = Table(title=case_title(rows[0]), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for n, name in enumerate(HEAD):
        table.add_column(name, justify="left" if n < 3 else "right", no_wrap=True)
    before = ("", "")
    for members in groups(rows).values():
        table.add_section()
        for line in lines(members):
            cells = list(_cells(line))
            if (cells[0], cells[1]) == before:
                cells[0] = cells[1] = ""
            else:
                before = (cells[0], cells[1])
            table.add_row(*cells)
    console.print(table)
    for sentence in [*compile_times(rows), *problems(rows)]:
        console.print(sentence)


def compile_times(rows: Sequence[Row]) -> list[str]:
    """What torch.compile took the first time; no other figure holds it."""
    slowest: dict[str, float] = {}
    for row in rows:
        if row.contender.startswith("compiled") and row.compile_s:
            what = f"{row.contender} {row.mode}"
            slowest[what] = max(slowest.get(what, 0.0), row.compile_s)
    if not slowest:
        return []
    return ["Compiling took, beside these times: " + ", ".join(f"{w} {seconds(s)}" for w, s in slowest.items()) + "."]


def measured(rows: Sequence[Row]) -> bool:
    return any(row.median_s is not None or row.extra_bytes is not None for row in rows)


def problems(rows: Sequence[Row]) -> list[str]:
    """Who has no time and why: one sentence a case and reason. Rivals that are not installed are in the table."""
    reasons: dict[tuple[str, str], str] = {}
    modes: dict[tuple[str, str], dict[str, list[str]]] = {}  # of each contender
    for row in rows:
        if row.status not in (OK, "not installed"):
            # one reason, though the seconds that were left differ from process to process
            key = row.case, "not run" if row.status.startswith("not run") else row.status
            reasons.setdefault(key, row.status)
            of = modes.setdefault(key, {}).setdefault(row.contender, [])
            of += [row.mode] if row.mode not in of else []
    found = []
    for key, contenders in modes.items():
        together: dict[str, list[str]] = {}
        for name, of in contenders.items():
            together.setdefault(", ".join(of), []).append(name)
        who = "; ".join(f"{', '.join(names)} ({of})" for of, names in together.items())
        found.append(f"{key[0]}: {reasons[key]}: {who}")
    return found


def not_judged(found: Sequence[Verdict]) -> list[str]:
    """One sentence for each number of threads, or dtype, that targets are for and that this run did not have."""
    counts = Counter((v.target.dtype, v.target.threads) for v in found if not v.judged)
    return [
        f"Not judged: {plural(n, 'target')} for {plural(threads, 'thread')}, as nothing ran with so many."
        if not dtype
        else f"Not judged: {plural(n, 'target')} for {dtype}, as nothing ran in it."
        for (dtype, threads), n in sorted(counts.items())
    ]


def print_targets(console: Any, found: Sequence[Verdict]) -> None:
    for sentence in not_judged(found):
        console.print(sentence)
    found = [v for v in found if v.judged]
    if not found:
        return
    from rich import box
    from rich.table import Table

    table = Table(title="Targets, each side at its better allocator setting", title_justify="left", box=box.SIMPLE_HEAD)
    for n, name in enumerate(TARGET_HEAD):
        table.add_column(name, justify="right" if n in (2, 3) else "left")
    for v in found:
        table.add_row(v.case, v.text, v.wanted, v.measured, v.word)
    console.print(table)


def write_markdown(rows: Sequence[Row], found: Sequence[Verdict], path: Path, notes: Sequence[str] = ()) -> None:
    first = rows[0]
    facts = [first.gpu, first.cpu, f"{first.cores} cores", first.system]
    facts += [f"Python {first.python}", f"torch {first.torch}"]
    facts += [f"Triton {first.triton}" if first.triton else "", f"CUDA {first.cuda}" if first.cuda else ""]
    facts += [f"pyml {first.pyml}", f"commit {first.commit}" if first.commit else "", first.date]
    text = ["# pyml benchmarks", "", ", ".join(f for f in facts if f) + ".", "", *ceiling_lines(rows), ""]
    text += [*notes, ""] if notes else []
    text += ["`pyml faster` is the other's better time over pyml's better time: below 1, pyml is the slower one.", ""]
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case, row.dtype), []).append(row)
    empty = [members for members in by_case.values() if not measured(members)]
    for members in by_case.values():
        if members in empty:
            continue
        text += [f"## {case_title(members[0])}", "", _md(HEAD), _md(["---"] * len(HEAD))]
        text += [_md(_cells(line)) for part in groups(members).values() for line in lines(part)]
        below = [*compile_times(members), *problems(members)]
        text += ["", *below] if below else []
        text.append("")
    if empty:
        text += ["## Without a figure", "", *(f"- {line}" for members in empty for line in problems(members)), ""]
    if found:
        text += ["## Targets", "", *not_judged(found), ""]
    if judged := [v for v in found if v.judged]:
        text += [_md(TARGET_HEAD), _md(["---"] * len(TARGET_HEAD))]
        text += [_md((v.case, v.text, v.wanted, v.measured, v.word)) for v in judged]
    path.write_text("\n".join(text).rstrip() + "\n")


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
