"""Tables on screen, CSV, Markdown and bars."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyml.methods import UserError

from . import ceilings
from .registry import BOTH, MODES
from .report import COLUMNS, OK, Line, Row, Verdict, better, groups, lines, seconds, value_of

HEAD = ("mode", "thr", "contender", "default", "retain", "p20-p80", "pyml faster", "memory", "of ceiling")
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
    where = f"{row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else row.gpu
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
        line.ceiling,
    )  # fmt: skip


def print_case(console: Any, rows: Sequence[Row]) -> None:
    """All modes and thread counts of one case as one table, about 110 columns wide."""
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


def problems(rows: Sequence[Row]) -> list[str]:
    """One sentence for every contender that has no time, but for rivals that are not installed."""
    found = [r for r in rows if r.status not in (OK, "not installed")]
    return list(dict.fromkeys(f"{r.case}, {r.mode}: {r.contender}: {r.status}" for r in found))


def print_targets(console: Any, found: Sequence[Verdict]) -> None:
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
    for members in by_case.values():
        text += [f"## {case_title(members[0])}", "", _md(HEAD), _md(["---"] * len(HEAD))]
        text += [_md(_cells(line)) for part in groups(members).values() for line in lines(part)]
        below = [*compile_times(members), *problems(members)]
        text += ["", *below] if below else []
        text.append("")
    if found:
        text += ["## Targets", "", _md(TARGET_HEAD), _md(["---"] * len(TARGET_HEAD))]
        text += [_md((v.case, v.text, v.wanted, v.measured, v.word)) for v in found]
    path.write_text("\n".join(text).rstrip() + "\n")


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def write_bars(rows: Sequence[Row], path: Path) -> str | None:
    """Horizontal bars of the better times, log scale, at the highest thread count. The reason why not, or None."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed, so no bars were drawn"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    most = max(row.threads for row in rows)
    shown = [m for key, m in groups(rows).items() if key[4] == most and any(r.status == OK and r.median_s for r in m)]
    if not shown:
        return "no case was timed, so no bars were drawn"
    names = list(dict.fromkeys(r.contender for m in shown for r in m if r.median_s))
    colors = {name: plt.get_cmap("tab10")(n % 10) for n, name in enumerate(names)}
    sides = [[m for m in shown if m[0].mode != BOTH], [m for m in shown if m[0].mode == BOTH]]
    sides = [side for side in sides if side]
    height = 1.6 + 0.17 * max(sum(len({r.contender for r in m if r.median_s}) + 0.8 for m in side) for side in sides)
    figure, axes = plt.subplots(1, len(sides), figsize=(7 * len(sides), height), squeeze=False, layout="constrained")
    for panel, side in zip(axes[0], sides):
        _panel(panel, side, colors)
        panel.set_title("forward + backward" if side[0][0].mode == BOTH else "forward", fontsize=10)
    first = rows[0]
    where = first.gpu if first.device == "cuda" else f"{first.cpu}, {most} thread{'s' if most > 1 else ''}"
    better_one = ", better allocator setting" if first.device == "cpu" else ""
    figure.suptitle(f"{where}, torch {first.torch}: milliseconds, log scale{better_one}", fontsize=11)
    bars = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(bars, names, fontsize=9, loc="outside lower center", ncol=min(len(names), 8))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return None


def _panel(panel: Any, side: Sequence[Sequence[Row]], colors: dict[str, Any]) -> None:
    ticks, labels, at = [], [], 0.0
    several = len({m[0].dtype for m in side}) > 1
    for members in side:
        start = at
        for name in dict.fromkeys(r.contender for r in members):
            best = better(members, name)
            if best is not None and best.median_s:
                panel.barh(at, best.median_s * 1e3, height=0.85, color=colors[name])
                panel.text(best.median_s * 1e3 * 1.06, at, f"{best.median_s * 1e3:.3g}", va="center", fontsize=7)
                at += 1
        ticks.append((start + at - 1) / 2)
        first = members[0]
        extra = [first.dtype] if several else []
        labels.append("\n".join([first.op, first.shape, *extra, *([first.mode] if first.mode not in MODES else [])]))
        at += 0.8
    panel.set_yticks(ticks, labels, fontsize=7)
    panel.set_ylim(at - 0.3, -0.9)
    panel.set_xscale("log")
    panel.margins(x=0.14)
