"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._options import plural
from pyml.methods._sweep import TRAINING_COSTS, Tables, mean_and_spread

TOTALS = {"base2novel": "harmonic", "crossdata": "mean", "domain": "mean"}


def score_names(config: dict[str, Any]) -> list[str]:
    """The scores of a run: every split that is scored, then what sums them up (see `Task.totals`)."""
    names = list(config["eval_images"])
    total = TOTALS.get(config["task"])
    return [*names, total] if total == "harmonic" or (total and len(names) > 2) else names


def title(config: dict[str, Any]) -> str:
    shots, seeds = plural(config["shots"], "shot"), plural(config["seeds"], "seed")
    return f"{config['data']}, {config['task']}: {shots} of each of {len(config['classes'])} classes, {seeds}"


def _clip(source: dict[str, Any]) -> str:
    return f"tiny CLIP of {source['tiny_steps']} steps" if "tiny_steps" in source else f"CLIP {source['folder']}"


def _recipe(config: dict[str, Any]) -> str:
    return (
        f"{_clip(config['clip'])}, {config['epochs']} epochs, batch {config['batch_size']}, learning rate "
        f"{config['learning_rate']:g}, transport with eps {config['eps']:g} and weight {config['ot_weight']:g}"
    )


def tables(config: dict[str, Any]) -> Tables:
    """The columns of a run, by its task.

    Args:
        config: the facts of the tasks are enough.
    """
    return Tables(
        scores={f"{name}, %": mean_and_spread(name, 1) for name in score_names(config)},
        costs={"parameters": "{parameters:,}", **TRAINING_COSTS},
        title=title,
        recipe=_recipe,
        cost_title="Learned numbers; training of one seed, memory beyond what is loaded",
        files="metrics.json, table.md, bars.png; per arm and seed the checkpoint and logs",
        heading="arm",
    )
