"""An earlier model as a guide: what it may say of the private records, and what that costs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyml.methods import UserError
from pyml.methods._checkpoint import read_json
from pyml.methods.dp_sgd.data import Task
from pyml.methods.dp_sgd.model import load_model
from pyml.privacy import Provenance, dp

CONFIG = "config.json"  # of a run folder; it is not released with the model
DEPTH = 4  # folders between a model and it, at most


@dataclass(frozen=True)
class Guide:
    """An earlier model: its weights in the order of the network's parameters, and what was known of it."""

    weights: list[Tensor]
    provenance: Provenance
    name: str


def parse_provenance(text: str) -> Provenance:
    """``public`` or ``dp:EPSILON:DELTA``. What leaves no finite epsilon is refused: no arm could be compared."""
    kind, *numbers = text.split(":")
    if kind == "public" and not numbers:
        return Provenance("public")
    if kind in ("unknown", "private_batch"):
        raise UserError(f"guide-provenance: expected public or dp:EPSILON:DELTA, as {kind} leaves no finite epsilon")
    try:
        if kind == "dp" and len(numbers) == 2 and math.isfinite(float(numbers[0])):
            return dp(*map(float, numbers))
    except ValueError as error:
        raise UserError(f"guide-provenance: expected public or dp:EPSILON:DELTA, got {text!r} ({error})") from error
    raise UserError(f"guide-provenance: expected public or dp:EPSILON:DELTA, got {text!r}")


def load_guide(path: Path, provenance: str, task: Task, *, private: bool, unit: str) -> Guide:
    """A model of an earlier run. What its run folder says of its data and its privacy is believed before the option.

    Args:
        private: whether this run is to be private: then a guide from the same data must have been too.
        unit: whom the epsilon of this run protects, as `unit_of` names it.
    """
    said = parse_provenance(provenance)
    found, info = load_model(path, "guide")
    if (info["side"], info["classes"]) != (task.side, task.classes):
        raise UserError(
            f"guide: expected a network for images of side {task.side} and {task.classes} classes, got {info['side']} "
            f"and {info['classes']} in {path}"
        )
    trained_on = _data_of(path)
    if trained_on["source"] == task.source:
        if trained_on["private_checksum"] != task.private_checksum:  # it saw some of them without protection
            raise UserError(f"guide: expected a model with the same private records, got one of another split, {path}")
        _check_price(path, info, said, provenance, private, unit)
    return Guide([p.detach() for p in found.parameters()], said, str(path))


def _data_of(path: Path) -> dict[str, Any]:
    """Fingerprints of the data that a model was trained on, from its run folder: no released file has them."""
    for folder in list(path.absolute().parents)[:DEPTH]:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        if config.get("method") == "dp_sgd" and {"source", "private_checksum"} <= config.keys():
            return config
    raise UserError(f"guide: expected a model in its run folder, whose {CONFIG} tells its data, got {path} without one")


def _check_price(path: Path, info: dict[str, Any], said: Provenance, provenance: str, private: bool, unit: str) -> None:
    price = info.get("epsilon")
    if price is None:
        raise UserError(f"guide: expected a model with a finite epsilon, as {path} was trained on the same data")
    if private and info["noise"] == "seeded":
        raise UserError(f"guide: expected noise without a seed beside --private, got a seeded run, {path}")
    # One record more changes a client's update by up to twice the clip norm, so clients do not stand for records.
    if unit != info["unit"]:
        raise UserError(f"guide: expected an epsilon of one {unit}, got one of a {info['unit']} in {path}")
    if said.kind != "dp" or said.epsilon < price or said.delta < info["delta"]:
        raise UserError(
            f"guide-provenance: expected at least dp:{price}:{info['delta']:g}, which {path} spent on the same "
            f"data, got {provenance}"
        )


def unit_of(clients: int, split_seed: int) -> str:
    """Whom an epsilon protects."""
    return f"client of {clients}, split {split_seed}" if clients else "record"
