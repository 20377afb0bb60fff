"""Several networks with several seeds in one run folder, and the tables that come out of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyml.methods._checkpoint import read_json, to_json, write_atomically, write_json
from pyml.methods._engine import make_accelerator, open_run, progress, threads_used
from pyml.methods._measure import environment, summarise
from pyml.methods._recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

Columns = Mapping[str, str]  # heading -> format of one arch's row of metrics.json
Report = Callable[[int, dict[str, float]], None]
Go = Callable[[str, int, Path, "Accelerator", Report], dict[str, Any]]
SPREAD = " ± "
TRAINING_COSTS = {"train s": "{train_seconds[mean]:.2f}", "train MB": "{train_peak_mb[mean]:.0f}"}


def mean_and_spread(name: str, digits: int) -> str:
    """The format of a score's column. One seed has no deviation: `Tables` leaves that part out."""
    return f"{{{name}[mean]:.{digits}f}}{SPREAD}{{{name}[std]:.{digits}f}}"


@dataclass(frozen=True)
class Tables:
    """How a method shows its metrics: groups of columns (one table each on screen, together in table.md)."""

    scores: Columns
    costs: Columns
    title: Callable[[dict[str, Any]], str]  # of the config
    recipe: Callable[[dict[str, Any]], str]  # of the config, one line
    cost_title: str
    files: str  # what the run folder holds
    heading: str = "arch"  # of the first column

    def show(self, metrics: dict[str, Any], folder: Path) -> None:
        """Print scores and costs of every arch of a run, as two tables that fit a narrow terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for columns, heading in ((self.scores, self.title(metrics["config"])), (self.costs, self.cost_title)):
            table = Table(self.heading, title=heading, title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for cells in _cells(metrics, columns):
                table.add_row(*cells)
            console.print(table)
        console.print(f"{folder}: {self.files}")

    def markdown(self, metrics: dict[str, Any]) -> str:
        """The same as one Markdown table, with the recipe and the machine above it."""
        columns = {**self.scores, **self.costs}
        config, here = metrics["config"], metrics["environment"]
        lines = [
            f"{self.title(config)}; {self.recipe(config)}.",
            f"{here['device']}, CPU threads: {here['threads']}, torch {here['torch']}, pyml {here['pyml']}.",
            "",
            f"| {self.heading} | " + " | ".join(columns) + " |",
            "|---" + "|---:" * len(columns) + "|",
        ]
        lines += ["| " + " | ".join(cells) + " |" for cells in _cells(metrics, columns)]
        return "\n".join(lines) + "\n"


def _cells(metrics: dict[str, Any], columns: Columns) -> list[list[str]]:
    """One row an arch: its name, then its columns."""
    formats = list(columns.values())
    if metrics["config"]["seeds"] == 1:
        formats = [shown.partition(SPREAD)[0] for shown in formats]
    return [[arch, *(shown.format(**row) for shown in formats)] for arch, row in metrics["archs"].items()]


def sweep(
    out: Path,
    options: Recipe,
    facts: dict[str, Any],
    tables: Tables,
    go: Go,
    *,
    note: Callable[[dict[str, float]], str],
    resume: bool,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    """Train every arch with every seed under a progress bar.

    ``out`` gets ``config.json``, ``metrics.json`` and ``table.md``, and a folder ``<arch>/seed<k>/`` a run.

    Args:
        options: checked already.
        facts: what identifies method and data; with the options it is the config, which a resumed run must share.
        go: ``go(arch, seed, folder, accelerator, report)`` does one run; on the main process it returns ``{"model":
            plain values, "scores": numbers}``, kept in the run's own metrics.json: what is there is not done again.
        note: what the progress bar says of the values that ``report`` was called with.

    Returns:
        The content of ``metrics.json``.
    """
    accelerator = make_accelerator(device)
    config = {**facts, **asdict(options), "processes": accelerator.num_processes}
    config = json.loads(to_json(config, "config"))  # as it will be read again
    open_run(out, config, resume, accelerator, options.spelled)
    results: dict[str, Any] = {}
    threads: set[int] = set()  # of the runs: the command may have more
    with progress(shown=accelerator.is_main_process and not quiet) as bar:
        for arch in options.archs:
            rows = []
            for seed in options.seed_range:
                task = bar.add_task(f"{arch} seed {seed}", total=options.epochs, note="")

                def report(epoch: int, values: dict[str, float], task: Any = task) -> None:
                    bar.update(task, completed=epoch, note=note(values))

                done = out / arch / f"seed{seed}" / "metrics.json"
                if not done.exists():
                    with threads_used() as used:
                        row = go(arch, seed, done.parent, accelerator, report)
                    if accelerator.is_main_process:
                        write_json(done, {**row, "threads": sorted(used) or [torch.get_num_threads()]})
                    accelerator.wait_for_everyone()
                rows.append(read_json(done))
                bar.update(task, completed=options.epochs)
                threads.update(rows[-1].get("threads", ()))
            results[arch] = {**rows[0]["model"], **summarise([row["scores"] for row in rows])}
    here = environment(accelerator.device)
    if threads:
        here["threads"] = min(threads) if len(threads) == 1 else " and ".join(map(str, sorted(threads)))
    metrics = {"config": config, "environment": here, "archs": results}
    if accelerator.is_main_process:
        write_atomically(out / "table.md", lambda part: part.write_text(tables.markdown(metrics)))
        write_json(out / "metrics.json", metrics)
    accelerator.wait_for_everyone()
    return metrics
