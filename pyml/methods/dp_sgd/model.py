"""The small network, and the models that a run releases: weights without keys, with what is known of their privacy."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._checkpoint import Checkpoint, load_checkpoint, save_checkpoint

RELEASED = "model.safetensors"
LARGE = 20  # from this side on MNIST's network
WRAPPED = "_module."  # Opacus' prefix


def build(side: int, classes: int) -> nn.Sequential:
    """A CNN with tanh, which keeps gradients bounded: 9,258 numbers at 8 x 8, 26,010 at 28 x 28, with ten classes."""
    first: list[nn.Module]
    if side < LARGE:
        first = [nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(),
                 nn.MaxPool2d(2)]  # fmt: skip
    else:
        first = [nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
                 nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)]  # fmt: skip
    with torch.no_grad():
        features = nn.Sequential(*first)(torch.zeros(1, 1, side, side)).numel()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, classes))


@contextmanager
def known_hooks() -> Iterator[None]:
    """Opacus' hooks stand on the first layer too, whose input needs no gradient: torch warns of that once a run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


@torch.no_grad()
def losses_and_hits(net: nn.Module, images: Tensor, labels: Tensor, size: int = 4096) -> tuple[Tensor, Tensor]:
    """Cross entropy of each record and whether its highest logit is right, both ``[N]`` on the CPU."""
    losses, hits = [], []
    for x, y in zip(images.split(size), labels.split(size)):
        logits = net(x)
        losses.append(nn.functional.cross_entropy(logits, y, reduction="none").cpu())
        hits.append((logits.argmax(1) == y).cpu())
    return torch.cat(losses), torch.cat(hits)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return 100 * losses_and_hits(net, images, labels)[1].double().mean().item()


def save_model(path: Path, net: nn.Module, info: dict[str, Any]) -> None:
    """What may be released: unlike a checkpoint it has no key of the noise."""
    tensors = {f"model.{name}": t.detach().cpu().contiguous().clone() for name, t in net.state_dict().items()}
    save_checkpoint(path, Checkpoint(tensors, {"method": "dp_sgd", **info}))


def load_model(path: Path, name: str = "checkpoint") -> tuple[nn.Sequential, dict[str, Any]]:
    """The network of a released model or of a checkpoint, in evaluation mode, and its info. Errors name the option that
    gave the file."""
    checkpoint = load_checkpoint(path, name)
    info = checkpoint.info
    if info.get("method") != "dp_sgd":
        raise UserError(f"{name}: {path} belongs to the method {info.get('method')!r}, expected 'dp_sgd'")
    net = build(info["side"], info["classes"])
    tensors = {key.removeprefix(WRAPPED): t for key, t in checkpoint.part("model").items()}
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{name}: {path} does not hold the network that it names") from error
    return net.eval(), info
