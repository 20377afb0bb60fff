"""Ways to get an argument wrong. Such a call must be refused in one sentence, or do what the reference does."""

from typing import Any

import torch
from torch import Tensor


def of_tensor(name: str, t: Tensor) -> dict[str, Any]:
    """Wrong shapes, dtypes and types of one tensor argument, by a short description."""
    wrong: dict[str, Any] = {
        f"{name}=text": "text",
        f"{name}=list": [1.0],
        f"{name}:int64": t.detach().long(),
        f"{name}:bool": t.detach().bool(),
        f"{name}:complex": t.detach().to(torch.complex64),
        f"{name}:meta": t.detach().to("meta"),
        f"{name}:scalar": t.detach().new_zeros(()),
        f"{name}:extra dim": t.detach().unsqueeze(0),
    }
    for dim in range(t.dim()):
        more = [1 if d == dim else 0 for d in range(t.dim())]
        grown = t.detach().new_zeros([n + m for n, m in zip(t.shape, more)])
        wrong[f"{name}:dim {dim} + 1"] = grown
        if t.shape[dim]:
            wrong[f"{name}:dim {dim} - 1"] = t.detach().narrow(dim, 0, t.shape[dim] - 1)
            wrong[f"{name}:no dim {dim}"] = t.detach().select(dim, 0)
            wrong[f"{name}:dim {dim} empty"] = t.detach().narrow(dim, 0, 0)
    return wrong


def of_option(name: str, value: Any) -> dict[str, Any]:
    """Wrong values of one plain option."""
    if isinstance(value, str):
        wrong = ["nonsense", "", 3, None]
    elif isinstance(value, bool):
        wrong = ["yes", None]
    elif isinstance(value, int):
        wrong = [-1, 99, 2**40, "3", None, 1.5]
    elif isinstance(value, float):
        wrong = [float("nan"), float("inf"), -1.0, "1"]
    elif isinstance(value, (list, tuple)):
        wrong = [[], [*value, 1], [-1 for _ in value], [0 for _ in value], [99 for _ in value], "x", None]
    else:
        wrong = []
    return {f"{name}={bad!r}": bad for bad in wrong}


def mutations(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(description, all arguments) for every wrong version of every argument."""
    found = []
    for name, value in values.items():
        wrong = of_tensor(name, value) if isinstance(value, Tensor) else of_option(name, value)
        if isinstance(value, Tensor):
            wrong[f"{name}=None"] = None
        found += [(label, {**values, name: bad}) for label, bad in wrong.items()]
    return found


def verdict(call: Any) -> tuple[Any, Exception | None]:
    """(result, None) or (None, the error)."""
    try:
        return call(), None
    except Exception as error:  # every kind: which one it may be is what the caller checks
        return None, error


def assert_refused_well(op_name: str, label: str, error: Exception) -> None:
    """One sentence that names the op, of a kind that says whose fault it is."""
    text = str(error)
    assert isinstance(error, ValueError | TypeError), f"{label}: {type(error).__name__}: {text}"
    assert text.startswith(f"{op_name}: "), f"{label}: expected a message that starts with the op, got {text!r}"
    assert "\n" not in text and "expected" in text, f"{label}: expected one sentence with 'expected', got {text!r}"
