"""The tables of a run, on screen and as Markdown."""

from pathlib import Path
from typing import Any

SCORES = {
    shown: f"{{{name}[mean]:.4f}} ± {{{name}[std]:.4f}}"
    for shown, name in (("OA", "oa"), ("AA", "aa"), ("kappa", "kappa"), ("F1", "f1"))
}
COSTS = {
    "parameters": "{parameters:,}",
    "FLOPs/pixel": "{flops_per_pixel:,}",
    "train s": "{train_seconds[mean]:.2f}",
    "train MB": "{train_peak_mb[mean]:.0f}",
    "map s": "{map_seconds[mean]:.3f}",
    "map MB": "{map_peak_mb[mean]:.0f}",
}


def print_tables(metrics: dict[str, Any], folder: Path) -> None:
    """Scores and costs of every arch of a run, as two tables that fit a narrow terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = "Cost of one seed: peak memory beyond the loaded images, one map of the whole scene"
    for columns, heading in ((SCORES, _title(metrics)), (COSTS, title)):
        table = Table("arch", title=heading, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for arch, row in metrics["archs"].items():
            table.add_row(arch, *(shown.format(**row) for shown in columns.values()))
        console.print(table)
    console.print(f"{folder}: metrics.json, table.md; per arch and seed the checkpoint, logs and change map")


def markdown(metrics: dict[str, Any]) -> str:
    """The same as one Markdown table, with the recipe and the machine above it."""
    columns = {**SCORES, **COSTS}
    config, machine = metrics["config"], metrics["environment"]
    lines = [
        f"{_title(metrics)}; split {config['split']}, {config['epochs']} epochs, batch {config['batch_size']}, "
        f"spectral_hidden {tuple(config['spectral_hidden'])}.",
        f"{machine['device']}, CPU threads: {machine['threads']}, torch {machine['torch']}, pyml {machine['pyml']}.",
        "",
        "| arch | " + " | ".join(columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for arch, row in metrics["archs"].items():
        lines.append(f"| {arch} | " + " | ".join(shown.format(**row) for shown in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def _title(metrics: dict[str, Any]) -> str:
    config = metrics["config"]
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    return f"{config['scene']}: {config['train_fraction']:.3g} of each class to train on, {seeds}"
