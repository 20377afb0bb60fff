"""Pictures of what was found in a model: the scores of its heads, and what knocking heads out does."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyml.methods._checkpoint import write_atomically

if TYPE_CHECKING:
    from pyml.methods._head_search import Found

PANELS = 6  # seeds in the heat map
LINES = {
    "key": ("key heads", "C3", "-"), "random": ("random heads", "C0", "-"),
    "control-key": ("controls, key heads", "C3", ":"), "control-random": ("controls, random heads", "C0", ":"),
}  # fmt: skip


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_heat_map(found: "Mapping[int, Found]", count: int, difference: str, path: Path) -> None:
    """A panel a seed, at most six: the score of every head, the chosen ones framed. Red is what the behaviour needs."""
    from matplotlib.patches import Rectangle

    shown = list(found.items())[:PANELS]
    layers, heads = shown[0][1].size
    factor = 100 if difference == "relative" else 1
    width, height = (min(max(2.4, 0.28 * count + 1.0), 6.0) for count in (heads, layers))
    figure = new_figure(width * len(shown) + 1.2, height)
    most = max(abs(score) for _, one in shown for row in one.heads for score in row) * factor or 1.0
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (seed, one) in zip(axes, shown):
        values = [[factor * score for score in row] for row in one.heads]
        picture = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        for layer, head in one.key_heads(count):
            axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black"))
        axis.set_title(f"seed {seed}", fontsize=9)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    unit = "% change of the metric" if difference == "relative" else "change of the metric"
    figure.colorbar(picture, ax=list(axes), label=unit)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))


def save_knockout(found: "Sequence[Found]", ablation: str, title: str, path: Path) -> None:
    """Per cent against how many heads are knocked out, mean over seeds; whiskers are the standard deviation."""
    figure = new_figure(6.5, 3.6)
    axis = figure.subplots()
    counts = found[0].knockout["counts"]
    for name, (label, colour, style) in LINES.items():
        if name in found[0].knockout:
            columns = list(zip(*(one.knockout[name] for one in found)))
            spread = [statistics.stdev(column) for column in columns] if len(found) > 1 else None
            axis.errorbar(
                range(len(counts)), [statistics.fmean(column) for column in columns], yerr=spread, marker="o",
                markersize=4, capsize=2, linestyle=style, color=colour, label=label,
            )  # fmt: skip
    axis.set_xticks(range(len(counts)), [f"{count:g}" for count in counts])
    axis.set_xlabel(f"heads knocked out ({ablation})")
    axis.set_ylabel("%")
    axis.set_ylim(-3, 103)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    axis.set_title("\n".join(textwrap.wrap(title, 56)), fontsize=9)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
