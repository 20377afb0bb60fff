"""The arms of a comparison: which norm is clipped, where the noise is small, and what that knowledge costs."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._engine import epoch_generator
from pyml.methods.dp_sgd.data import Records, Task
from pyml.methods.dp_sgd.model import WRAPPED, known_hooks, load_model
from pyml.privacy import Provenance, Scale, dp, from_parameters, from_public_gradients, noise_multiplier

GUIDING = 256  # public records that give a scale: their gradients are all in memory
LEAST_SHARE = 1e-2  # of a group in the clip norm


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        mode: of `HeteroNoiseOptimizer`; "" is training without privacy.
        guide: what tells the scale: "" (isotropic noise), "public" (gradients of public records at the last released
            iterate), "parameters" (of an earlier model), "iterate" (parameters of the last released iterate).
        permuted: the scale's values in random places, to see whether the guide knows anything.
    """

    mode: str
    guide: str = ""
    permuted: bool = False


ARMS = {
    "non-private": Arm(""),
    "isotropic": Arm("whitened"),
    "l2": Arm("l2", "public"),
    "whitened": Arm("whitened", "public"),
    "whitened-permuted": Arm("whitened", "public", permuted=True),
    "group": Arm("group", "public"),
    "parameters": Arm("whitened", "parameters"),
    "parameters-permuted": Arm("whitened", "parameters", permuted=True),
    "iterate": Arm("whitened", "iterate"),
}


def row_name(arm: str, target: float) -> str:
    """An arm at an epsilon, as tables and folders name it."""
    return f"{arm}@{target!r}".removesuffix(".0") if ARMS[arm].mode else arm  # all digits: it is what may be spent


def row_names(arms: Sequence[str], targets: Sequence[float]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row_name(arm, target) for arm in arms for target in targets))


def parse_row(name: str) -> tuple[str, float | None]:
    """An arm and its epsilon; None without privacy."""
    arm, _, target = name.partition("@")
    return arm, float(target) if target else None


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
    """A model of an earlier run. What its file says of its privacy is believed before the option.

    Args:
        private: whether this run is to be private: then a guide from the same data must have been too.
        unit: whom the epsilon of this run protects, as `unit_of` names it.
    """
    said = parse_provenance(provenance)
    found, info = load_model(path)
    if (info["side"], info["classes"]) != (task.side, task.classes):
        raise UserError(
            f"guide: expected a network for images of side {task.side} and {task.classes} classes, got {info['side']} "
            f"and {info['classes']} in {path}"
        )
    if info.get("source") == task.source:  # another split of it shares records too
        price = info.get("epsilon")
        if price is None:
            raise UserError(f"guide: expected a model with a finite epsilon, as {path} was trained on the same data")
        if private and info["noise"] == "seeded":
            raise UserError(f"guide: expected noise without a seed beside --private, got a seeded run, {path}")
        if unit not in ("record", info["unit"]):
            raise UserError(f"guide: expected an epsilon of one {unit}, got one of a {info['unit']} in {path}")
        if said.kind != "dp" or said.epsilon < price or said.delta < info["delta"]:
            raise UserError(
                f"guide-provenance: expected at least dp:{price}:{info['delta']:g}, which {path} spent on the same "
                f"data, got {provenance}"
            )
    return Guide([p.detach() for p in found.parameters()], said, str(path))


def unit_of(clients: int, split_seed: int) -> str:
    """Whom an epsilon protects. One of a client protects each of its records too, not the other way round."""
    return f"client of {clients}, split {split_seed}" if clients else "record"


class Scales:
    """The scales of one run, from the network as it was last released."""

    def __init__(self, arm: Arm, twin: nn.Module | None, public: Records, guide: Guide | None, seed: int) -> None:
        self.arm, self.twin, self.guide, self.seed = arm, twin, guide, seed
        self.public = public.take(torch.arange(min(GUIDING, len(public))))

    def gradients(self, net: nn.Module) -> list[Tensor]:
        """Per-sample gradients of the public records at the weights of ``net``, one tensor a parameter."""
        assert self.twin is not None
        weights = {f"{WRAPPED}{name}": t for name, t in net.state_dict().items()}
        self.twin.load_state_dict(weights)
        self.twin.zero_grad()
        loss = nn.functional.cross_entropy(self.twin(self.public.images), self.public.labels)
        with known_hooks():
            loss.backward()
        found = [p.grad_sample.detach() for p in self.twin.parameters()]  # type: ignore[attr-defined]
        for p in self.twin.parameters():
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]
        return found

    def scale(self, net: nn.Module) -> Scale | None:
        """None is isotropic noise."""
        if not self.arm.guide:
            return None
        if self.arm.guide == "public":
            made = from_public_gradients(self.gradients(net))
            released = (*made.provenance, Provenance("released_iterate"))  # the gradients are at its weights
            made = dataclasses.replace(made, provenance=released)
        elif self.arm.guide == "iterate":
            made = from_parameters(list(net.parameters()), provenance="released_iterate")
        else:
            assert self.guide is not None
            made = from_parameters(self.guide.weights, provenance=self.guide.provenance)
        # one permutation for the whole run: it knows nothing, and does not average out
        return made.permuted(epoch_generator(self.seed, 0)) if self.arm.permuted else made

    @property
    def changes(self) -> bool:
        """Whether the next epoch may have another scale. Clip norms of groups stay as they are, so theirs does too."""
        return self.arm.guide in ("public", "iterate") and self.arm.mode != "group"


def clipping(arm: Arm, scales: Scales, net: nn.Module, clip: float) -> dict[str, Any]:
    """Clip norms and scale, as `HeteroNoiseOptimizer` takes them.

    Groups are layers. Group k has the share of its public gradients in the clip norm, C_k, and noise of the scale s_k ~
    sqrt(C_k) / n_k^(1/4): of all with the same epsilon that has the least power.
    """
    if arm.mode != "group":
        return {"mode": arm.mode, "clip": clip, "scale": scales.scale(net)}
    names = [name.rpartition(".")[0] for name, _ in net.named_parameters()]
    layers = list(dict.fromkeys(names))
    groups = [layers.index(name) for name in names]
    power, sizes = [0.0] * len(layers), [0] * len(layers)
    for group, gradient in zip(groups, scales.gradients(net)):
        power[group] += float(gradient.double().square().flatten(1).sum(1).mean())
        sizes[group] += gradient[0].numel()
    share = [max(math.sqrt(p / (sum(power) or 1.0)), LEAST_SHARE) for p in power]
    clips = [clip * s / math.hypot(*share) for s in share]
    scale = [math.sqrt(c) / n**0.25 for c, n in zip(clips, sizes)]
    return {"mode": "group", "clip": clips, "groups": groups, "scale": [scale[group] for group in groups],
            "provenance": "public"}  # fmt: skip


@lru_cache(maxsize=256)
def multiplier(target: float, rate: float, steps: int, delta: float, paid: tuple[Provenance | str, ...]) -> float:
    """The noise multiplier of a run that may spend ``target`` together with its guide; searches take seconds."""
    try:
        return noise_multiplier(target, rate, steps, delta=delta, provenance=list(paid))
    except ValueError as error:
        raise UserError(str(error)) from error
