"""The training loop that every method uses: epochs, log, checkpoint after each epoch, resume, several processes.

A method gives its model, optimizer, batches and loss; `fit` does the rest. Everything random in an epoch must follow
from the seed and the epoch number (see `epoch_generator`): so a resumed run ends with the same tensors, bit for bit.
"""

import csv
import io
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._checkpoint import (
    capture,
    load_checkpoint,
    read_json,
    restore,
    save_checkpoint,
    write_atomically,
    write_json,
)
from pyml.methods._measure import Cost
from pyml.methods._options import check_folder, choose_device

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

CHECKPOINT = "checkpoint.safetensors"
SMALL_BATCH = 2**17  # input values
_used: ContextVar[set[int] | None] = ContextVar("numbers of CPU threads", default=None)


class Diverged(UserError):
    """The loss is not finite: the learning rate is too high, or the data is broken."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that depends on the seed and the epoch only, so that nothing has to be carried over a restart."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def make_accelerator(device: str = "auto") -> "Accelerator":
    """Hugging Face accelerate on ``"auto"``, ``"cpu"`` or ``"cuda"``; joins the processes of ``accelerate launch``."""
    device = choose_device(device)
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu", mixed_precision="no")  # on a CPU it looks for others only when told


class RunLog:
    """``log.csv`` and a TensorBoard log of one run. Rows of epochs that a resumed run repeats are dropped first."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.csv"
        self.rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill may cut the last row
            self.rows = [row for row in whole if row["epoch"].isdigit() and int(row["epoch"]) <= done]
        if self.rows:
            text = io.StringIO()
            self._write(text, self.rows, header=True)
            write_atomically(self.path, lambda part: part.write_text(text.getvalue()))
        else:
            self.path.unlink(missing_ok=True)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    @staticmethod
    def _write(file: Any, rows: list[dict[str, str]], header: bool) -> None:
        writer = csv.DictWriter(file, list(rows[0]))
        if header:
            writer.writeheader()
        writer.writerows(rows)

    def add(self, epoch: int, values: dict[str, float]) -> None:
        row = {"epoch": str(epoch), **{name: repr(value) for name, value in values.items()}}
        with self.path.open("a", newline="") as file:
            self._write(file, [row], header=file.tell() == 0)
        for name, value in values.items():
            if not math.isnan(value):
                self.board.add_scalar(name, value, epoch)

    def close(self) -> None:
        self.board.close()


@dataclass
class Fitted:
    """What `fit` did: all epochs ever run, seconds of training over all restarts, peak extra memory of this process."""

    epochs: int
    seconds: float
    peak_mb: float


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    epochs: int,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]],
    folder: Path,
    info: dict[str, Any],
    accelerator: "Accelerator",
    report: Callable[[int, dict[str, float]], None] | None = None,
    validate: Callable[[int], dict[str, float]] | None = None,
    average: "AveragedModel | None" = None,
    stop: Callable[[dict[str, float]], bool] | None = None,
) -> Fitted:
    """Train for ``epochs`` epochs, or go on from the checkpoint in ``folder``.

    Args:
        model, optimizer, scheduler: the scheduler (or None) steps once an epoch. The model is trained in place.
        batches: ``batches(epoch)`` gives this process's batches of one epoch, counted from 1.
        loss: ``loss(model, batch)`` gives the scalar to minimise and sums to log: a dict of 0-d tensors with ``count``,
            the number of samples; every other entry is divided by it.
        folder: takes ``checkpoint.safetensors`` (after every epoch), ``log.csv`` and ``tensorboard/``.
        info: plain values stored in every checkpoint.
        report: called after every epoch with its number and the logged values.
        validate: called by the main process after every epoch with its number, in evaluation mode: more values to log,
            the same names each time (NaN: not measured). Its time and memory are not those of the training.
        average: follows the weights after every step and goes into the checkpoints.
        stop: asked after every epoch, with the logged values, whether the training ends with it.

    Raises:
        Diverged: the loss is not finite; the checkpoint of the epoch before, if there was one, stays.
    """
    path = folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    trained, stepper = accelerator.prepare(model, optimizer)
    done, last, before, peak = 0, epochs, 0.0, 0.0
    if path.exists():
        checkpoint = load_checkpoint(path)
        restore(checkpoint, model, optimizer, scheduler, average)
        done = checkpoint.info["epoch"]
        last = done if checkpoint.info.get("stopped") else epochs
        before, peak = checkpoint.info["train_seconds"], checkpoint.info["train_peak_mb"]
    accelerator.wait_for_everyone()
    log = RunLog(folder, done) if accelerator.is_main_process else None
    trained.train()
    try:
        with Cost(accelerator.device) as cost:
            for epoch in range(done + 1, last + 1):
                values = _epoch(trained, stepper, batches(epoch), loss, accelerator, model, average)
                values["lr"] = optimizer.param_groups[0]["lr"]
                if not math.isfinite(values["loss"]):
                    kept = f"the state before it is in {path}" if path.exists() else "no state was saved before it"
                    raise Diverged(f"training: the loss is {values['loss']} in epoch {epoch}: {kept}")
                stopped = stop is not None and stop(values)
                if scheduler is not None:
                    scheduler.step()
                if log is not None:
                    if validate is not None:
                        with cost.paused(), torch.no_grad():
                            trained.eval()
                            values |= validate(epoch)
                            trained.train()
                    log.add(epoch, values)
                    so_far: dict[str, Any] = {
                        "epoch": epoch,
                        "train_seconds": before + cost.running(),
                        "train_peak_mb": max(peak, cost.peak_mb),
                    }
                    if stopped:
                        so_far["stopped"] = True
                    save_checkpoint(path, capture(model, optimizer, scheduler, {**info, **so_far}, average))
                if report is not None:
                    report(epoch, values)
                if stopped:
                    last = epoch
                    break
    finally:
        if log is not None:
            log.close()
    accelerator.wait_for_everyone()
    return Fitted(last, before + cost.seconds, max(peak, cost.peak_mb))


def _epoch(
    model: nn.Module,
    optimizer: Any,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]],
    accelerator: "Accelerator",
    bare: nn.Module,
    average: "AveragedModel | None",
) -> dict[str, float]:
    totals: dict[str, Tensor] = {}
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        value, sums = loss(model, batch)
        accelerator.backward(value)
        optimizer.step()
        if average is not None:
            average.update_parameters(bare)
        for name, total in sums.items():
            totals[name] = totals[name] + total.detach() if name in totals else total.detach()
    if accelerator.num_processes > 1:
        totals = {name: accelerator.reduce(total, "sum") for name, total in totals.items()}
    count = totals.pop("count").item() or 1  # all batches of an epoch may be empty where they are drawn at random
    return {name: total.item() / count for name, total in totals.items()}


def check_run(
    folder: Path, config: dict[str, Any], resume: bool, spelled: Mapping[str, str] = MappingProxyType({}), *,
    part: bool = False,
) -> None:  # fmt: skip
    """Raise one sentence where a run with this config cannot begin in the folder, or go on there. Makes nothing.

    Args:
        spelled: options of the command line, by entry of the config: so an error names what is to be repeated.
        part: the config is a part of what there will be.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, or its config differs; there is none to resume; nothing
            can be written there.
    """
    path = check_folder(folder) / "config.json"
    if path.exists():
        if not resume:
            raise UserError(
                f"out: {folder} already holds a run: choose another folder, or go on with it by pyml train --resume"
            )
        old = read_json(path)
        names = config.keys() if part else old.keys() | config.keys()
        differ = [name for name in names if old.get(name) != config.get(name)]
        if differ:
            # the rows of a run last: they may follow from other options
            name = min(differ, key=lambda name: (name == "archs", name not in spelled, name))
            called = f"--{spelled[name].replace('_', '-')}" if name in spelled else name
            before, now = (
                ",".join(map(str, value)) if isinstance(value, list) else repr(value)
                for value in (old.get(name), config.get(name))
            )
            raise UserError(
                f"resume: {folder} was started with {called} = {before}, got {now}: use the same data and options, or "
                "another --out"
            )
    elif resume:
        raise UserError(f"resume: expected the folder of a run, got {folder} without a config.json")
    elif folder.is_dir() and not all(item.name.startswith(".") for item in folder.iterdir()):
        raise UserError(f"out: {folder} is not empty and holds no run of pyml: choose another folder")


def open_run(
    folder: Path, config: dict[str, Any], resume: bool, accelerator: "Accelerator",
    spelled: Mapping[str, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Make a run folder with ``config.json`` where `check_run` has nothing against it."""
    check_run(folder, config, resume, spelled)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / "config.json", config)
    accelerator.wait_for_everyone()


@contextmanager
def threads_used() -> Iterator[set[int]]:
    """Collects how many CPU threads `few_threads` left to what ran inside."""
    used: set[int] = set()
    before = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(before)


@contextmanager
def few_threads(values: int) -> Iterator[None]:
    """One CPU thread where a batch has few input values: two gain nothing there, and with any other busy process on the
    machine every OpenMP barrier then waits for a scheduler tick (60 ms a step instead of 0.8 ms, measured)."""
    before = torch.get_num_threads()
    if values < SMALL_BATCH:
        torch.set_num_threads(1)
    if (used := _used.get()) is not None:
        used.add(torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress(shown: bool) -> Any:
    """A rich progress bar that also prints the values of the last epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar
