"""What the options of all methods share on the command line."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pyml.methods import UserError


def option(help_: str, panel: str | None = None, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, show_default=rest.pop("show_default", True), **rest)


Device = Annotated[str, option("auto, cpu or cuda.")]
Threads = Annotated[int | None, option("CPU threads; torch's own choice when left out.", min=1)]
Resume = Annotated[bool, option("Go on with the run in --out after a stop; gives the same bits.", None, "--resume")]
QuietRun = Annotated[bool, option("No progress bar and no table.", None, "--quiet")]
Quiet = Annotated[bool, option("Print nothing.", None, "--quiet")]


def names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """``"a,b"`` -> ("a", "b"), each once; ``"all"`` -> all that are known."""
    return known if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def choose_device(device: str) -> str:
    """``"auto"`` -> cuda where a GPU is visible, else cpu."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and no GPU is visible")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def default_folder(method: str) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("out: expected a folder where several processes train, as their clocks may differ")
    return Path("runs") / time.strftime(f"{method}-%Y%m%d-%H%M%S")


def is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process
