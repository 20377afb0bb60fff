"""What the commands of all methods share: options, the folder of a run, threads and device, what is printed."""

import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyml.methods import UserError
from pyml.methods._recipe import Recipe, Rule, require

if TYPE_CHECKING:
    from pyml.methods._sweep import Tables

DATA, TRAIN = "Data", "Training"  # headings in the help
RESULTS = (".csv", ".jsonl")  # names of what a prediction writes
DEVICE = Rule("auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__)


def option(help_: str, panel: str | None = None, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, show_default=rest.pop("show_default", True), **rest)


Seeds = Annotated[int, option("Number of seeds; scores are their mean and standard deviation.", TRAIN, min=1)]
FirstSeed = Annotated[int, option("The first seed; the others follow it.", TRAIN, min=0)]
Out = Annotated[
    Path | None, option("Folder for checkpoints, logs, metrics.json, pictures. Default: runs/METHOD-<time>.")
]
Resume = Annotated[
    bool,
    option(
        "Go on with the run in --out after a stop: repeat all its options. Ends with the same weights, bit for bit.",
        None,
        "--resume",
    ),
]
Device = Annotated[str, option("auto, cpu or cuda.")]
Threads = Annotated[int | None, option("CPU threads; torch's own choice when left out.", min=1)]
QuietRun = Annotated[bool, option("No progress bar and no table.", None, "--quiet")]
Quiet = Annotated[bool, option("Print nothing.", None, "--quiet")]


def names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """``"a,b"`` -> ("a", "b"), each once; ``"all"`` -> all that are known."""
    return known if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def refuse_unused(command: Callable[..., Any], given: Mapping[str, Any], names: Iterable[str], expected: str) -> None:
    """Raise one sentence for an option that was given (it is not at its default) and would have no effect.

    Args:
        command: the function whose parameters the options are.
        given: the values of its parameters.
        names: those without effect, and ``expected``, what they would need.
    """
    parameters = inspect.signature(command).parameters
    for name in names:
        value = given[name]
        if value != parameters[name].default and value != []:
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            raise UserError(f"{name.replace('_', '-')}: expected {expected}, got {shown}")


def plural(count: int, word: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {sentence}\n")


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars that transformers shows for its files."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def choose_device(device: str) -> str:
    """``"auto"`` -> cuda where a GPU is visible, else cpu."""
    import torch

    require("device", device, DEVICE)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and no GPU is visible")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def default_folder(method: str) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("out: expected a folder where several processes train, as their clocks may differ")
    return Path("runs") / time.strftime(f"{method}-%Y%m%d-%H%M%S")


def check_folder(folder: Path, name: str = "out") -> Path:
    """Raise one sentence where nothing can be written into a folder, there or still to be made. Makes nothing."""
    nearest = folder
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest, prefix=".pyml-"):
            return folder
    except OSError as error:
        # some file systems say of a new file what is said of a folder that is not there
        missing = isinstance(error, FileNotFoundError)
        reason = f"{nearest} takes no files" if missing else error.strerror or error
        raise UserError(f"{name}: expected a folder that can be written, got {folder} ({reason})") from None


def check_file(path: Path, name: str = "out", reads: Mapping[str, Path | None] = MappingProxyType({})) -> Path:
    """Raise one sentence where a file cannot be written, is a folder, or is one that is read. Makes nothing.

    Args:
        reads: what the command reads, by option: it is not written over. In a folder that is read everything stays but
            an older result.
    """
    check_folder(path.parent, name)
    try:
        if path.is_dir():
            raise UserError(f"{name}: expected a file, got the folder {path}")
        for option_, source in reads.items() if path.exists() else ():
            if source is None or not source.exists():
                continue
            inside = source.is_dir() and path.suffix.lower() not in RESULTS and path.parent.samefile(source)
            if inside or path.samefile(source):
                what = f"a file in the folder of --{option_}" if inside else f"the file of --{option_}"
                raise UserError(f"{name}: expected a new file, got {path}, {what}")
    except OSError as error:
        raise UserError(f"{name}: expected a file that can be written, got {path} ({error.strerror})") from None
    return path


def check_out(out: Path | None, resume: bool, options: Recipe | None = None) -> None:
    """Raise one sentence where a run cannot begin in --out, or go on there with these options: before anything that
    takes long is read or made."""
    if out is None:
        if resume:
            raise UserError("resume: expected --out too, the folder of the run to go on with")
    elif options is not None:
        from pyml.methods._engine import check_run

        check_run(out, json.loads(json.dumps(asdict(options))), resume, options.spelled, part=True)


def train_and_show(
    method: str, train: Callable[..., dict[str, Any]], data: Any, options: Recipe, tables: "Tables",
    *, out: Path | None, resume: bool, device: str, quiet: bool,
) -> None:  # fmt: skip
    """The second half of every training command: the folder, the run, its tables on screen."""
    check_out(out, resume)
    folder = out or default_folder(method)
    metrics = train(data, options, folder, resume=resume, device=device, quiet=quiet)
    if quiet:
        return
    from accelerate import PartialState

    if PartialState().is_main_process:
        tables.show(metrics, folder)
