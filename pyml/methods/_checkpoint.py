"""Files that a kill cannot break: atomic writes, and checkpoints from which a run goes on with the same tensors."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyml.methods import UserError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary neighbour and rename it: a kill leaves the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def to_json(value: Any, what: str, indent: int | None = None) -> str:
    """Plain values as JSON, which knows no NaN and no infinity; ``what`` they are, for the error."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{what}: expected finite numbers, got NaN or an infinity") from error


def write_json(path: Path, value: Any) -> None:
    text = to_json(value, str(path), indent=2) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def make_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary neighbour and rename it: a kill leaves no half of a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(part)
        part.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            part.rename(folder)
    finally:
        if part.is_dir():
            shutil.rmtree(part)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def checksum(parts: Iterable[Any]) -> str:
    """A fingerprint of arrays, CPU tensors and bytes: other values are other data, whatever their name and size."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):
            array = np.ascontiguousarray(part)
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            part = array.reshape(-1).view(np.uint8)
        digest.update(part)
    return digest.hexdigest()[:16]


@dataclass
class Checkpoint:
    """What a run needs to go on: ``tensors`` (model.*, average.*, optimizer.*, rng.*) and plain ``info``."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name.``, without that prefix."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    info: dict[str, Any],
    average: torch.nn.Module | None = None,
) -> Checkpoint:
    """The state of a run after an epoch. Optimizer numbers and the schedule go into ``info``: JSON keeps every bit."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": t for name, t in average.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    # keys, steps and history of a `HeteroNoiseOptimizer`
    privacy = state.get("privacy", {})
    tensors |= {f"privacy.{name}": value for name, value in privacy.items() if isinstance(value, Tensor)}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    # safetensors refuses tensors that share memory, and `state_dict` gives views
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    extra = {
        "optimizer_groups": state["param_groups"],
        "optimizer_plain": plain,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
    }
    if privacy:
        extra["privacy"] = {name: value for name, value in privacy.items() if not isinstance(value, Tensor)}
    return Checkpoint(tensors, {**info, **extra})


def restore(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    average: torch.nn.Module | None = None,
) -> None:
    """Put a captured state back, bit for bit."""
    model.load_state_dict(checkpoint.part("model"))
    if average is not None:
        average.load_state_dict(checkpoint.part("average"))
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in checkpoint.info["optimizer_plain"].items()}
    for key, value in checkpoint.part("optimizer").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    whole: dict[str, Any] = {"state": state, "param_groups": checkpoint.info["optimizer_groups"]}
    if "privacy" in checkpoint.info:
        whole["privacy"] = {**checkpoint.info["privacy"], **checkpoint.part("privacy")}
    optimizer.load_state_dict(whole)
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.info["scheduler"])
    rng = checkpoint.part("rng")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    metadata = {"pyml": to_json(checkpoint.info, str(path))}
    write_atomically(path, lambda part: save_file(checkpoint.tensors, str(part), metadata=metadata))


def load_checkpoint(path: Path, name: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint of `save_checkpoint`; a sentence when the file is absent, broken or of another program, which
    names the option that gave it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{name}: no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: {path} is not a whole safetensors file ({error})") from error
    if "pyml" not in metadata:
        raise UserError(f"{name}: {path} was not written by pyml train")
    return Checkpoint(tensors, json.loads(metadata["pyml"]))
