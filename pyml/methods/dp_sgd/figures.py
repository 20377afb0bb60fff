"""The picture of a run: accuracy against epsilon, an arm a line."""

import textwrap
from pathlib import Path
from typing import Any

from pyml.methods._checkpoint import write_atomically
from pyml.methods.dp_sgd.arms import ARMS, row_name
from pyml.methods.dp_sgd.report import title


def save_figure(metrics: dict[str, Any], path: Path) -> None:
    """A PNG; whiskers are the standard deviation over seeds, arms lie side by side at each epsilon."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config, rows = metrics["config"], metrics["archs"]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    private = [arm for arm in config["arms"] if ARMS[arm].mode]
    targets = sorted(config["epsilons"])
    for number, arm in enumerate(private):
        found = [rows[row_name(arm, target)]["accuracy"] for target in targets]
        beside = 1 + 0.02 * (number - (len(private) - 1) / 2)
        spread = [row["std"] for row in found] if config["seeds"] > 1 else None
        dashed = "--" if ARMS[arm].permuted else "-"
        axis.errorbar(
            [target * beside for target in targets], [row["mean"] for row in found], yerr=spread, marker="o",
            markersize=4, capsize=2, linestyle=dashed, label=arm,
        )  # fmt: skip
    for arm in config["arms"]:
        if arm not in private:
            axis.axhline(rows[arm]["accuracy"]["mean"], color="0.5", linestyle=":", label=arm)
    axis.set_xscale("log")
    axis.set_xlim(targets[0] / 1.5, targets[-1] * 1.5)
    axis.set_xticks(targets, [f"{target:g}" for target in targets])
    axis.minorticks_off()
    axis.set_xlabel("epsilon (provable, of one training)")
    axis.set_ylabel("test accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    axis.set_title("\n".join(textwrap.wrap(title(config), 70)), fontsize=9)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
