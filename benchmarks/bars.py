"""The picture of a run: horizontal bars of the better times."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyml.methods._options import plural

from .registry import BOTH, MODES
from .report import OK, Row, better, groups, number

WIDE, BAR, FONT = 7.0, 0.17, 7  # inches of a panel and of a bar, points of the text beside bars
GAP, LINE = 0.8, 0.75  # between two cases, and of one line of a label, in bars
LETTERS = 10  # of the title that fit on an inch


def write(rows: Sequence[Row], path: Path) -> str | None:
    """Draw the times at the highest thread count into a PNG. The reason why not, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed, so no bars were drawn"
    most = max(row.threads for row in rows)
    shown = [m for key, m in groups(rows).items() if key[4] == most and any(r.status == OK and r.median_s for r in m)]
    if not shown:
        return "no case was timed, so no bars were drawn"
    draw(shown).savefig(path)
    return None


def draw(shown: Sequence[Sequence[Row]]) -> Any:
    """A figure with one panel for forward and backward and one for the rest; a group of rows is one case and mode."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(r.contender for m in shown for r in m if r.median_s))
    colors = {name: colormaps["tab10"](n) if n < 10 else colormaps["Set2"](n % 8) for n, name in enumerate(names)}
    sides = [[m for m in shown if (m[0].mode == BOTH) == both] for both in (False, True)]
    sides = [side for side in sides if side]
    several = len({m[0].dtype for m in shown}) > 1
    first = shown[0][0]
    where = first.gpu if first.device == "cuda" else f"{first.cpu}, {plural(first.threads, 'thread')}"
    better_one = ", better allocator setting" if first.device == "cpu" else ""
    title = f"{where}, torch {first.torch}: milliseconds, log scale{better_one}"
    heading = textwrap.wrap(title, int(LETTERS * WIDE * len(sides)))
    columns = min(len(names), 4 * len(sides))
    tall = 1.2 + 0.2 * (len(heading) + -(-len(names) // columns))  # title, legend, axis
    tall += BAR * max(sum(_span(m, several) + GAP for m in side) for side in sides)
    figure = Figure(figsize=(WIDE * len(sides), tall), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides):
        _panel(panel, side, colors, several)
        panel.set_title("forward + backward" if side[0][0].mode == BOTH else "forward", fontsize=10)
    figure.suptitle("\n".join(heading), fontsize=11)
    marks = [Patch(color=color) for color in colors.values()]
    figure.legend(marks, names, fontsize=9, loc="outside lower center", ncol=columns)
    return figure


def _label(row: Row, several: bool) -> list[str]:
    """The lines beside the bars of one case: op, shape, and what else tells it from the others."""
    more = [row.dtype] * several + [row.mode] * (row.mode not in MODES)
    return [row.op, *textwrap.wrap(row.shape, 28, break_on_hyphens=False), *more]


def _span(members: Sequence[Row], several: bool) -> float:
    """Bars that the case takes, or as much room as its label needs."""
    bars = len({r.contender for r in members if r.median_s})
    return max(float(bars), LINE * len(_label(members[0], several)))


def _panel(panel: Any, side: Sequence[Sequence[Row]], colors: dict[str, Any], several: bool) -> None:
    ticks, labels, times, at = [], [], [], 0.0
    for members in side:
        span = _span(members, several)
        names = dict.fromkeys(r.contender for r in members)
        bars = [row for name in names if (row := better(members, name))]
        middle = at + (span - 1) / 2
        for n, row in enumerate(bars, start=1):
            place, time = middle + n - (len(bars) + 1) / 2, (row.median_s or 0.0) * 1e3
            panel.barh(place, time, height=0.85, color=colors[row.contender])
            panel.annotate(number(time), (time, place), (3, 0), textcoords="offset points", va="center", fontsize=FONT)
            times.append(time)
        ticks.append(middle)
        labels.append("\n".join(_label(members[0], several)))
        at += span + GAP
    panel.set_yticks(ticks, labels, fontsize=FONT)
    panel.set_ylim(at - 0.3, -0.9)
    panel.set_xscale("log")
    low, high = min(times) / 2, max(times)
    panel.set_xlim(low, high * (high / low) ** 0.16)  # room for the longest bar's number
