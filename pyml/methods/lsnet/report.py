"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._options import plural
from pyml.methods._sweep import TRAINING_COSTS, Tables, mean_and_spread


def _title(config: dict[str, Any]) -> str:
    seeds = plural(config["seeds"], "seed")
    pairs = plural(config["train_pairs"], "pair")
    return f"{config['data']}: {pairs} to train on, {len(config['test_names'])} to test, {seeds}"


def _recipe(config: dict[str, Any]) -> str:
    average = f", average of weights {config['ema']:g}" if config["ema"] else ""
    return (
        f"{config['epochs']} epochs of one {config['crop_size']} x {config['crop_size']} crop a pair, batch "
        f"{config['batch_size']}, Adam {config['learning_rate']:g} to 0 by a cosine, L1 + {config['ssim_weight']:g} "
        f"(1 - SSIM){average}"
    )


TABLES = Tables(
    scores={
        "PSNR, dB": mean_and_spread("psnr", 2),
        "SSIM": mean_and_spread("ssim", 4),
        "parameters": "{parameters_used:,}",
    },
    costs={
        "GFLOP": "{gflop:.2f}",
        "attention's": "{attention_gflop:.2f}",
        **TRAINING_COSTS,
        "image s": "{image_seconds[mean]:.3f}",
        "image MB": "{image_peak_mb[mean]:.0f}",
    },
    title=_title,
    recipe=_recipe,
    cost_title="Operations of one test image; cost of one seed and of one image, memory beyond what is loaded",
    files="metrics.json, table.md; per arch and seed the checkpoint, logs and contact sheet",
)
