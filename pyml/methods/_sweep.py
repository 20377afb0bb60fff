"""Several networks with several seeds in one run folder, and the tables that come out of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyml.methods._checkpoint import read_json, write_atomically, write_json
from pyml.methods._engine import progress
from pyml.methods._measure import environment, summarise

if TYPE_CHECKING:
    from accelerate import Accelerator

Columns = Mapping[str, str]  # heading -> format of one arch's row of metrics.json
Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Tables:
    """How a method shows its metrics: groups of columns (one table each on screen, together in table.md)."""

    scores: Columns
    costs: Columns
    title: Callable[[dict[str, Any]], str]  # of the config
    recipe: Callable[[dict[str, Any]], str]  # of the config, one line
    cost_title: str
    files: str  # what the run folder holds

    def show(self, metrics: dict[str, Any], folder: Path) -> None:
        """Print scores and costs of every arch of a run, as two tables that fit a narrow terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for columns, heading in ((self.scores, self.title(metrics["config"])), (self.costs, self.cost_title)):
            table = Table("arch", title=heading, title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for arch, row in metrics["archs"].items():
                table.add_row(arch, *(shown.format(**row) for shown in columns.values()))
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
            "| arch | " + " | ".join(columns) + " |",
            "|---" + "|---:" * len(columns) + "|",
        ]
        for arch, row in metrics["archs"].items():
            lines.append(f"| {arch} | " + " | ".join(shown.format(**row) for shown in columns.values()) + " |")
        return "\n".join(lines) + "\n"


def sweep(
    out: Path,
    config: dict[str, Any],
    tables: Tables,
    go: Callable[[str, int, Path, Report], dict[str, Any]],
    *,
    seeds: Sequence[int],
    note: Callable[[dict[str, float]], str],
    accelerator: "Accelerator",
    quiet: bool,
) -> dict[str, Any]:
    """Train ``config["archs"]`` with every seed under a progress bar; write ``metrics.json`` and ``table.md``.

    Args:
        go: ``go(arch, seed, folder, report)`` does one run; on the main process it returns ``{"model": plain values,
            "scores": numbers}``, which is kept in the run's own metrics.json: a run that is there is not done again.
        note: what the progress bar says of the values that ``report`` was called with.

    Returns:
        The content of ``metrics.json``.
    """
    results: dict[str, Any] = {}
    with progress(shown=accelerator.is_main_process and not quiet) as bar:
        for arch in config["archs"]:
            rows = []
            for seed in seeds:
                task = bar.add_task(f"{arch} seed {seed}", total=config["epochs"], note="")

                def report(epoch: int, values: dict[str, float], task: Any = task) -> None:
                    bar.update(task, completed=epoch, note=note(values))

                done = out / arch / f"seed{seed}" / "metrics.json"
                if not done.exists():
                    row = go(arch, seed, done.parent, report)
                    if accelerator.is_main_process:
                        write_json(done, row)
                    accelerator.wait_for_everyone()
                rows.append(read_json(done))
                bar.update(task, completed=config["epochs"])
            results[arch] = {**rows[0]["model"], **summarise([row["scores"] for row in rows])}
    metrics = {"config": config, "environment": environment(accelerator.device), "archs": results}
    if accelerator.is_main_process:
        write_atomically(out / "table.md", lambda part: part.write_text(tables.markdown(metrics)))
        write_json(out / "metrics.json", metrics)
    accelerator.wait_for_everyone()
    return metrics
