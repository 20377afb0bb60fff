"""Train every arm at every epsilon with several seeds, all with one tuning budget, and write what a table needs."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import checksum, read_json, write_json
from pyml.methods._engine import Diverged, make_accelerator
from pyml.methods._options import check_folder, choose_device
from pyml.methods._recipe import COUNT, FROM_ZERO, POSITIVE, SHARE, Recipe, Rule, among, require
from pyml.methods._sweep import Report, sweep
from pyml.methods.dp_sgd.arms import ARMS, parse_row, row_names
from pyml.methods.dp_sgd.data import Task
from pyml.methods.dp_sgd.figures import save_figure
from pyml.methods.dp_sgd.guides import Guide, load_guide, unit_of
from pyml.methods.dp_sgd.report import TABLES, findings
from pyml.methods.dp_sgd.run import Point, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

TUNING_SEED = 2**32  # no seed of a result
MOMENTUM = 0.9


@dataclass(frozen=True)
class Options(Recipe):
    """Our recipe. ``learning_rate`` is that of the clients; the others are a grid, from which validation chooses.

    ``momentum`` is that of the noisy steps, the server's with clients: by default `MOMENTUM`, with which a step reaches
    ten times as far as its rate says, and with clients 0, as in federated averaging.
    """

    rules: ClassVar = {
        "delta": SHARE, "guide_share": SHARE, "federated": FROM_ZERO,
        "client_share": Rule("above 0, at most 1", lambda v: 0 < v <= 1),
        "client_passes": COUNT, "client_batch": COUNT, "guide_epochs": FROM_ZERO,
        "momentum": Rule("from 0 to below 1", lambda value: 0 <= value < 1),
        "first_seed": Rule("from 0 to below 2^31", lambda value: 0 <= value < 2**31),
    }  # fmt: skip
    spelled: ClassVar = {
        **{name: name for name in ("arms", "seeds", "epochs", *rules, "batch_size", "private", "split_seed")},
        "archs": "arms", "epsilons": "epsilon", "learning_rates": "learning_rate", "clips": "clip",
        "learning_rate": "client_rate",
    }  # fmt: skip

    arms: tuple[str, ...] = tuple(ARMS)
    epsilons: tuple[float, ...] = (1.0, 3.0)
    delta: float = 1e-5
    learning_rates: tuple[float, ...] = (0.125, 0.2, 0.32)
    clips: tuple[float, ...] = (0.1, 0.4, 1.6)
    momentum: float | None = None
    seeds: int = 5
    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 0.5
    guide_share: float = 0.3
    guide_epochs: int = 0  # 0: a third
    private: bool = False
    federated: int = 0
    client_share: float = 0.5
    client_passes: int = 1
    client_batch: int = 16
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.momentum is None:
            object.__setattr__(self, "momentum", 0.0 if self.federated else MOMENTUM)
        # `sweep` goes over arms at epsilons
        if all(arm in ARMS for arm in self.arms):
            object.__setattr__(self, "archs", row_names(self.arms, self.epsilons))

    def check(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"arms: expected {among(ARMS).text}, got {arm!r}")
        for name in ("epsilons", "learning_rates", "clips"):
            if not getattr(self, name):
                raise UserError(f"{self.spelled[name].replace('_', '-')}: expected at least one number, got none")
            for value in getattr(self, name):
                require(self.spelled[name], value, POSITIVE)
        object.__setattr__(self, "known_archs", self.archs)
        super().check()

    def grid(self, arm: str) -> list[Point]:
        """As many points for each private arm. Without privacy nothing is clipped: a clipped step is at most rate x
        clip long, so these products are the rates; an update of clients is taken at the rates as they are."""
        pairs = list(itertools.product(self.learning_rates, self.clips))
        if ARMS[arm].mode:
            return [Point(rate, clip) for rate, clip in pairs]
        rates = self.learning_rates if self.federated else [rate * clip for rate, clip in pairs]
        return [Point(rate, None) for rate in dict.fromkeys(rates)]


def check_task(task: Task, options: Options) -> None:
    """One sentence for options that do not fit the data."""
    units, what = (options.federated, "client") if options.federated else (len(task.private), "private record")
    if options.federated == 1 or options.federated > len(task.private):
        expected = f"0, or from 2 to the {len(task.private)} private records"
        raise UserError(f"federated: expected {expected}, got {options.federated}")
    if options.delta * units >= 1:
        raise UserError(f"delta: expected less than 1 / {units}, one {what}, got {options.delta:g}")
    for arm in options.arms:
        if ARMS[arm].guide == "public" and not len(task.public):
            raise UserError(f"arms: expected a public part of the data for {arm}, got --public-fraction 0")


def train(
    task: Task, options: Options, out: Path, *, guide: tuple[Path, str] | None = None, resume: bool = False,
    device: str = "auto", quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train every arm of ``options`` at every epsilon with every seed.

    ``out`` gets ``config.json``, ``metrics.json``, ``table.md``, ``accuracy.png``; in ``<arm>@<epsilon>/`` the
    ``tuning.json``, and in ``seed<k>/`` there checkpoint, logs and ``model.safetensors``. After a kill,
    ``resume=True`` goes on from the last finished epoch and ends with the same weights, bit for bit.

    Args:
        guide: checkpoint of an earlier model and its provenance, for the arms ``parameters``. Without it they train a
            guide first, which alone would spend ``guide_share`` of their epsilon.

    Returns:
        The content of ``metrics.json``.
    """
    options.check()
    check_task(task, options)
    guided = [arm for arm in options.arms if ARMS[arm].guide == "parameters"]
    known: Guide | None = None
    if guide is not None:
        if not guided:
            raise UserError(f"guide: expected an arm that uses it (parameters), got {', '.join(options.arms)}")
        known = load_guide(*guide, task, private=options.private, unit=unit_of(options.federated, options.split_seed))
        for target in options.epsilons:
            if known.provenance.epsilon >= target:
                raise UserError(
                    f"epsilon: expected more than the guide has spent, {known.provenance.epsilon:g}, got {target:g}"
                )
    check_folder(out)
    if (processes := make_accelerator(device).num_processes) > 1:
        raise UserError(f"pyml train dp_sgd: expected one process, got {processes}")

    def go(row: str, seed: int, folder: Path, accelerator: "Accelerator", report: Report) -> dict[str, Any]:
        point = tuned(row, folder.parent, report, accelerator)
        run = Run(task, options, row, point, seed, known, accelerator)
        return run.go(folder, report)

    def tuned(row: str, folder: Path, report: Report, accelerator: "Accelerator") -> Point:
        points = options.grid(parse_row(row)[0])
        if len(points) == 1:
            return points[0]

        def validated(point: Point, place: Path, shown: Report) -> float:
            run = Run(task, options, row, point, TUNING_SEED, known, accelerator)
            return run.validated(place, shown)

        return best_point(points, folder, validated, report)

    # What is trained again after a kill must be the same, bit for bit: else two releases share one noise.
    machine = [
        torch.__version__,
        choose_device(device),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    ]
    here = machine if options.private else None
    facts = {
        "method": "dp_sgd", **task.facts(), "numerics": here,
        "guide": None if known is None else {
            "file": known.name, "provenance": str(known.provenance), "checksum": checksum(known.weights),
        },
    }  # fmt: skip
    metrics = sweep(out, options, facts, TABLES, go, note=note, resume=resume, device=device, quiet=quiet)
    metrics["findings"] = findings(metrics)
    write_json(out / "metrics.json", metrics)
    save_figure(metrics, out / "accuracy.png")
    return metrics


def best_point(
    points: Iterable[Point], folder: Path, validated: Callable[[Point, Path, Report], float], report: Report
) -> Point:
    """The point of the grid with the best validation accuracy; the first of equal ones. What is in ``tuning.json`` is
    not done again."""
    path = folder / "tuning.json"
    done: list[dict[str, Any]] = read_json(path) if path.exists() else []
    for number, point in enumerate(points):
        if number < len(done):
            continue

        def shown(epoch: int, values: dict[str, float], number: int = number) -> None:
            report(epoch, {**values, "tuning": number + 1})

        try:
            score = validated(point, folder / "tuning" / str(number), shown)
        except Diverged:
            score = 0.0  # a learning rate that is too high is no error of a grid
        done.append({**asdict(point), "accuracy": score})
        write_json(path, done)
    best = max(done, key=lambda row: row["accuracy"])
    return Point(best["learning_rate"], best["clip"])


def note(values: dict[str, float]) -> str:
    """What the progress bar says."""
    tuning = f"tuning {values['tuning']:.0f} " if "tuning" in values else ""
    loss = "" if math.isnan(values["loss"]) else f"loss {values['loss']:.3f} "
    return f"{tuning}{loss}validation {values['validation']:.1f} %"
