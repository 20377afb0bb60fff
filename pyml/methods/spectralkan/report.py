"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._options import plural
from pyml.methods._sweep import TRAINING_COSTS, Tables, mean_and_spread


def _title(config: dict[str, Any]) -> str:
    seeds = plural(config["seeds"], "seed")
    return f"{config['scene']}: {config['train_fraction']:.3g} of each class to train on, {seeds}"


def _recipe(config: dict[str, Any]) -> str:
    return (
        f"split {config['split']}, {config['epochs']} epochs, batch {config['batch_size']}, "
        f"spectral_hidden {tuple(config['spectral_hidden'])}, knots {config['knots']}, "
        f"extrapolation {config['extrapolation']}"
    )


TABLES = Tables(
    scores={
        shown: mean_and_spread(name, 4)
        for shown, name in (("OA", "oa"), ("AA", "aa"), ("kappa", "kappa"), ("F1", "f1"))
    },
    costs={
        "parameters": "{parameters:,}",
        "FLOPs/pixel": "{flops_per_pixel:,}",
        **TRAINING_COSTS,
        "map s": "{map_seconds[mean]:.3f}",
        "map MB": "{map_peak_mb[mean]:.0f}",
    },
    title=_title,
    recipe=_recipe,
    cost_title="Cost of one seed: peak memory beyond the loaded images, one map of the whole scene",
    files="metrics.json, table.md; per arch and seed the checkpoint, logs and change map",
)
