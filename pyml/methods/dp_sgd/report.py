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
LEAST_SEEDS = 3  # for a verdict
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
    counts = ", ".join(f"{count} {name}" for name, count in config["records"].items())
    parts = [f"{counts} records", plural(config["epochs"], "epoch")]
    if config["federated"]:
        parts.append(
            f"each client with chance {config['client_share']:g} in a round, there with rate "
            f"{config['learning_rate']:g}, batch {config['client_batch']} and passes {config['client_passes']}"
        )
    else:
        parts.append(f"batch {config['batch_size']}")
    parts.append(f"momentum {config['momentum']:g}")
    rates, clips = (", ".join(f"{v:g}" for v in config[name]) for name in ("learning_rates", "clips"))
    if len(config["learning_rates"]) * len(config["clips"]) > 1:
        parts.append(f"one choice by validation from learning rates {rates} x clip norms {clips} for each row")
    else:
        parts.append(f"learning rate {rates} and clip norm {clips}, not chosen")
    guide = config["guide"]
    if guide is not None:
        parts.append(f"guide {guide['file']} ({guide['provenance']})")
    elif any(ARMS[arm].guide == "parameters" for arm in config["arms"]):
        parts.append(f"guides trained first, each for {config['guide_share']:g} of its arm's epsilon if it were alone")
    return "; ".join(parts)


def findings(metrics: dict[str, Any]) -> list[str]:
    """Sentences: each arm against isotropic noise, each guide against its permutation, seeds that diverged, choices at
    the edge of the grid, audits above their epsilon."""
    rows, found = metrics["archs"], []
    for target in metrics["config"]["epsilons"]:
        for arm in metrics["config"]["arms"]:
            if ARMS[arm].guide and not ARMS[arm].permuted:
                for other in (PLAIN, f"{arm}-permuted"):
                    names = row_name(arm, target), row_name(other, target) if other in ARMS else ""
                    if names[1] in rows:
                        found.append(_comparison(names, *(rows[name]["accuracy"]["values"] for name in names)))
    config = metrics["config"]
    for name, row in rows.items():
        if lost := sum(value > 0 for value in row["diverged"]["values"]):
            found.append(f"{name}: {plural(lost, 'seed')} diverged: accuracy counted as 0, no model")
        if chosen := _at_the_edge(config, row):
            found.append(f"{name}: {chosen} at the edge of the grid: a wider one may do better")
        bounds = [value for value in row["epsilon_lower"]["values"] if value is not None]
        provable = row["epsilon_with_tuning"]
        # The audit is of records: of clients, whose epsilon is another, it says nothing.
        if provable is not None and bounds and not config["federated"] and max(bounds) > provable:
            found.append(
                f"{name}: suspicious, as the audit says epsilon is at least {max(bounds):.3g}, above {provable:.3g}"
            )
    return found


def _at_the_edge(config: dict[str, Any], row: dict[str, Any]) -> str:
    """What was chosen at an end of the grid, or nothing.

    A step of clipped records is as long as rate x norm says, so only such products have ends: the least rate with the
    largest norm is at none. Many updates of clients are shorter than the norm and not clipped: there both count.
    """
    rate, clip, rates, clips = row["learning_rate"], row["clip"], config["learning_rates"], config["clips"]
    if config["federated"]:
        axes = [(f"learning rate {rate:g}", rate, rates)]
        axes += [] if clip is None else [(f"clip norm {clip:g}", clip, clips)]
    else:
        products = [one * other for one in rates for other in clips]
        what = f"learning rate {rate:g}" if clip is None else f"rate x norm {rate * clip:g} ({rate:g} x {clip:g})"
        axes = [(what, rate if clip is None else rate * clip, products)]
    return " and ".join(what for what, value, axis in axes if len(set(axis)) > 1 and value in (min(axis), max(axis)))


def _comparison(names: tuple[str, str], first: list[float], second: list[float]) -> str:
    """Differences are of the same seeds, hence of the same initial weights."""
    differences = [a - b for a, b in zip(first, second)]
    mean, count = statistics.fmean(differences), len(differences)
    start = f"{names[0]} against {names[1]}: {mean:+.2f}"
    if count < LEAST_SEEDS:
        return f"{start} points; {'one seed shows' if count == 1 else f'{count} seeds show'} nothing"
    from scipy.stats import t

    spread = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    permuted = names[1].partition("@")[0].endswith("-permuted")
    if abs(mean) > spread:
        verdict = "better" if mean > 0 else "worse"
    else:
        verdict = "not shown to be better" if permuted else "no difference shown"
    verdict = f"the guide is {verdict} than its permutation" if permuted else verdict
    return f"{start} ± {spread:.2f} points ({CONFIDENCE:.0%}, {count} seeds): {verdict}"


class _Missing:
    """A value that is not there, in any format."""

    def __format__(self, spec: str) -> str:
        return "-"


def rounded_up(value: float | None, digits: int) -> str:
    """Never less than what is proven."""
    return "none" if value is None else f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _shown(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same with texts for the tables."""

    def row(values: dict[str, Any]) -> dict[str, Any]:
        whole = {name: _whole(value) for name, value in values.items()}
        return {
            **whole, "epsilon_shown": rounded_up(values["epsilon"], 3),
            "tuning_shown": rounded_up(values["epsilon_with_tuning"], 2),
            "clip_shown": "-" if values["clip"] is None else f"{values['clip']:g}",
        }  # fmt: skip

    return {**metrics, "archs": {name: row(values) for name, values in metrics["archs"].items()}}


def _whole(value: Any) -> Any:
    return {**value, "mean": _Missing()} if isinstance(value, dict) and value["mean"] is None else value


@dataclass(frozen=True)
class Compared(Tables):
    """Tables with the findings below."""

    def show(self, metrics: dict[str, Any], folder: Path) -> None:
        from rich.console import Console

        super().show(_shown(metrics), folder)
        console = Console(highlight=False)
        for line in findings(metrics):
            console.print(line)

    def markdown(self, metrics: dict[str, Any]) -> str:
        table = super().markdown(_shown(metrics))
        lines = [f"- {line}" for line in findings(metrics)]
        return "\n".join([table, *lines, ""]) if lines else table


TABLES = Compared(
    scores={
        "epsilon": "{epsilon_shown}",
        "with tuning": "{tuning_shown}",
        "accuracy, %": mean_and_spread("accuracy", 2),
        "gain": "{gain[mean]:.2f}",
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
    heading="arm",
)
