"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._sweep import Tables


def _title(config: dict[str, Any]) -> str:
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    return f"{config['scene']}: {config['train_fraction']:.3g} of each class to train on, {seeds}"


def _recipe(config: dict[str, Any]) -> str:
    return (
        f"split {config['split']}, {config['epochs']} epochs, batch {config['batch_size']}, "
        f"spectral_hidden {tuple(config['spectral_hidden'])}, knots {config['knots']}, "
        f"extrapolation {config['extrapolation']}"
    )


TABLES = Tables(
    scores={
        shown: f"{{{name}[mean]:.4f}} ± {{{name}[std]:.4f}}"
        for shown, name in (("OA", "oa"), ("AA", "aa"), ("kappa", "kappa"), ("F1", "f1"))
    },
    costs={
        "parameters": "{parameters:,}",
        "FLOPs/pixel": "{flops_per_pixel:,}",
        "train s": "{train_seconds[mean]:.2f}",
        "train MB": "{train_peak_mb[mean]:.0f}",
        "map s": "{map_seconds[mean]:.3f}",
        "map MB": "{map_peak_mb[mean]:.0f}",
    },
    title=_title,
    recipe=_recipe,
    cost_title="Cost of one seed: peak memory beyond the loaded images, one map of the whole scene",
    files="metrics.json, table.md; per arch and seed the checkpoint, logs and change map",
)
