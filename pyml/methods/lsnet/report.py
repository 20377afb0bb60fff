"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._sweep import Tables


def _title(config: dict[str, Any]) -> str:
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    return f"{config['data']}: {config['train_pairs']} pairs to train on, {len(config['test_names'])} to test, {seeds}"


def _recipe(config: dict[str, Any]) -> str:
    average = f", average of weights {config['ema']:g}" if config["ema"] else ""
    return (
        f"{config['epochs']} epochs of one {config['crop_size']} x {config['crop_size']} crop a pair, batch "
        f"{config['batch_size']}, Adam {config['learning_rate']:g} to 0 by a cosine, L1 + {config['ssim_weight']:g} "
        f"(1 - SSIM){average}"
    )


TABLES = Tables(
    scores={
        "PSNR, dB": "{psnr[mean]:.2f} ± {psnr[std]:.2f}",
        "SSIM": "{ssim[mean]:.4f} ± {ssim[std]:.4f}",
        "parameters": "{parameters_used:,}",
    },
    costs={
        "GFLOP": "{gflop:.2f}",
        "attention's": "{attention_gflop:.2f}",
        "train s": "{train_seconds[mean]:.1f}",
        "train MB": "{train_peak_mb[mean]:.0f}",
        "image s": "{image_seconds[mean]:.3f}",
        "image MB": "{image_peak_mb[mean]:.0f}",
    },
    title=_title,
    recipe=_recipe,
    cost_title="Operations of one test image; cost of one seed and of one image, memory beyond what is loaded",
    files="metrics.json, table.md; per arch and seed the checkpoint, logs and contact sheet",
)
