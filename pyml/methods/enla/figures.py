"""The picture of a run: the accuracies of all arms as bars."""

import textwrap
from pathlib import Path
from typing import Any

from pyml.methods._checkpoint import write_atomically
from pyml.methods.enla.report import score_names, title


def save_bars(metrics: dict[str, Any], path: Path) -> None:
    """A PNG with one group of bars a split, one bar an arm; whiskers are the standard deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config, arms = metrics["config"], metrics["archs"]
    names = score_names(config)
    width = 0.8 / len(arms)
    figure = Figure(figsize=(max(5.0, 0.28 * len(names) * len(arms) + 2.5), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (arm, row) in enumerate(arms.items()):
        places = [group + width * (number - (len(arms) - 1) / 2) for group in range(len(names))]
        spread = [row[name]["std"] for name in names] if config["seeds"] > 1 else None
        axis.bar(places, [row[name]["mean"] for name in names], width, yerr=spread, capsize=2, label=arm)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    axis.set_title("\n".join(textwrap.wrap(title(config), 70)), fontsize=10)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
