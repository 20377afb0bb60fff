"""Files with what was trained and nothing else: safetensors, with what they fit in the header."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyml.heads.adapters import Adapter
from pyml.ops import _check

FORMAT = 1


def sizes(a: Adapter) -> dict[str, Any]:
    """What two models must share so that a delta of one fits the other."""
    return {
        "model_type": a.config.model_type, "num_layers": a.num_layers, "num_heads": a.num_heads,
        "num_kv_heads": a.num_kv_heads, "head_dim": a.head_dim, "hidden_size": a.hidden_size,
    }  # fmt: skip


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(metadata))


def write(path: str | Path, values: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """The file is whole or not there: it gets its name when it is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(path.name + ".part")
    header = {"pyml.heads": json.dumps({"format": FORMAT, **metadata})}
    try:
        save_file({name: t.cpu().contiguous() for name, t in values.items()}, part, metadata=header)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ValueError(f"save: path: expected a file that can be written, got {path} ({error})") from error


def read(op: str, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Values and metadata of a file of `write`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("pyml.heads")
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{op}: path: expected a delta that HeadTuner.save wrote, got {path}: {reason}") from error
    try:
        metadata = json.loads(header) if header else {}
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or metadata.pop("format", None) != FORMAT:
        _check.fail(op, "path", f"a delta that HeadTuner.save wrote, format {FORMAT}", path)
    return values, metadata


def check(op: str, what: str, metadata: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """One sentence where a file is not for a model with these facts; the order of heads is of no account."""
    for key, value in plain(own).items():
        given = metadata.get(key)
        same = _in_order(given) == _in_order(value) if key == "heads" else given == value
        if not same:
            _check.fail(op, "path", f"{what} with {key} {value}", given)


def _in_order(heads: Any) -> Any:
    """By projection, the heads in an order that does not depend on how they were chosen."""
    if not isinstance(heads, dict) or not all(isinstance(chosen, list) for chosen in heads.values()):
        return heads
    return {name: sorted(map(str, chosen)) for name, chosen in heads.items()}


def is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2
