"""What the tables of a run show, and what its numbers say: which guide helped, and which only seemed to."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyml.methods._options import plural
from pyml.methods._sweep import TRAINING_COSTS, Tables, mean_and_spread
from pyml.methods.dp_sgd.arms import ARMS, row_name
from pyml.privacy.accounting import NOISE

CONFIDENCE = 0.95
PLAIN = "isotropic"


def noise_of(config: dict[str, Any]) -> str:
    """How the noise was made, as every epsilon must say it."""
    return NOISE["fast" if config["private"] else "seeded"]


def title(config: dict[str, Any]) -> str:
    unit = f"client of {config['federated']}" if config["federated"] else "record"
    return (
        f"{config['data']}: {plural(config['seeds'], 'seed')}, epsilon of one {unit} at delta {config['delta']:g}; "
        f"{noise_of(config)}"
    )


def _recipe(config: dict[str, Any]) -> str:
    guide = config["guide"]
    if guide is None:
        source = f"guides of the arms parameters: {config['guide_share']:g} of their epsilon and delta"
    else:
        source = f"guide {guide['file']} ({guide['provenance']})"
    rates, clips = (", ".join(f"{v:g}" for v in config[name]) for name in ("learning_rates", "clips"))
    counts = ", ".join(f"{count} {name}" for name, count in config["records"].items())
    return (
        f"{counts} records; {config['epochs']} epochs, batch {config['batch_size']}, one choice by validation from "
        f"learning rates {rates} x clip norms {clips} for each row; {source}"
    )


def findings(metrics: dict[str, Any]) -> list[str]:
    """Sentences: each arm against isotropic noise, each guide against its permutation, choices at the edge of the
    grid, audits above their epsilon."""
    rows, found = metrics["archs"], []
    for target in metrics["config"]["epsilons"]:
        for arm in metrics["config"]["arms"]:
            if ARMS[arm].guide and not ARMS[arm].permuted:
                for other in (PLAIN, f"{arm}-permuted"):
                    names = row_name(arm, target), row_name(other, target) if other in ARMS else ""
                    if names[1] in rows:
                        found.append(_comparison(names, *(rows[name]["accuracy"]["values"] for name in names)))
    config = metrics["config"]
    reaches = [rate * clip for rate in config["learning_rates"] for clip in config["clips"]]
    for name, row in rows.items():
        if len(reaches) > 1 and row["clip"] is not None:
            reach = row["learning_rate"] * row["clip"]
            if reach in (min(reaches), max(reaches)):
                point = f"learning rate {row['learning_rate']:g} and clip norm {row['clip']:g}"
                found.append(f"{name}: {point} are at the edge of the grid: a wider one may do better")
        bound = max(row["epsilon_lower"]["values"])
        provable = row["epsilon_with_tuning"]
        if provable is not None and bound > provable:
            found.append(f"{name}: the audit says epsilon is at least {bound:.3g}, above {provable:.3g}: a bug")
    return found


def _comparison(names: tuple[str, str], first: list[float], second: list[float]) -> str:
    """Differences are of the same seeds, hence of the same initial weights."""
    differences = [a - b for a, b in zip(first, second)]
    mean, count = statistics.fmean(differences), len(differences)
    start = f"{names[0]} against {names[1]}: {mean:+.2f}"
    if count == 1:
        return f"{start} points; one seed shows nothing"
    from scipy.stats import t

    spread = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    permuted = names[1].partition("@")[0].endswith("-permuted")
    if mean > spread:
        verdict = "the guide is better than its permutation" if permuted else "better"
    elif permuted:
        verdict = "the guide is no better than its permutation"
    else:
        verdict = "worse" if mean < -spread else "no difference shown"
    return f"{start} ± {spread:.2f} points ({CONFIDENCE:.0%}, {count} seeds): {verdict}"


@dataclass(frozen=True)
class Compared(Tables):
    """Tables with the findings below."""

    def show(self, metrics: dict[str, Any], folder: Path) -> None:
        from rich.console import Console

        super().show(metrics, folder)
        console = Console(highlight=False)
        for line in findings(metrics):
            console.print(line)

    def markdown(self, metrics: dict[str, Any]) -> str:
        lines = [f"- {line}" for line in findings(metrics)]
        return "\n".join([super().markdown(metrics), *lines, ""]) if lines else super().markdown(metrics)


TABLES = Compared(
    scores={
        "epsilon": "{epsilon_shown}",
        "with tuning": "{tuning_shown}",
        "accuracy, %": mean_and_spread("accuracy", 2),
        "gain": "{gain_shown}",
    },
    costs={
        "lr": "{learning_rate:g}",
        "clip": "{clip_shown}",
        "AUC": "{auc[mean]:.3f}",
        "eps >=": "{epsilon_lower[mean]:.2f}",
        **TRAINING_COSTS,
    },
    title=title,
    recipe=_recipe,
    cost_title="Chosen learning rate and clip norm; audit: AUC and least epsilon; training of one seed",
    files="metrics.json, table.md, accuracy.png; per row tuning.json, per seed model.safetensors, checkpoint and logs",
)
