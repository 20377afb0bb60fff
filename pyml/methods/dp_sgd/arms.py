"""The arms of a comparison: which norm is clipped, where the noise is small, and what that knowledge costs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyml.methods._engine import Diverged, epoch_generator
from pyml.methods.dp_sgd.data import Records
from pyml.methods.dp_sgd.guides import Guide
from pyml.methods.dp_sgd.model import WRAPPED, known_hooks
from pyml.privacy import (
    Provenance,
    Scale,
    effective_multiplier,
    from_parameters,
    from_public_gradients,
    noise_power_gain,
)

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
    "iterate-permuted": Arm("whitened", "iterate", permuted=True),
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


class Scales:
    """The scales of one run, from the network as it was last released.

    Args:
        make_twin: makes a second network with gradients of samples; hooks of the first one have no part in it.
    """

    def __init__(
        self, arm: Arm, make_twin: Callable[[], nn.Module], public: Records, guide: Guide | None, seed: int
    ) -> None:  # fmt: skip
        self.arm, self.make_twin, self.guide, self.seed = arm, make_twin, guide, seed
        self.public = public.take(torch.arange(min(GUIDING, len(public))))
        self._twin: nn.Module | None = None

    def gradients(self, net: nn.Module) -> list[Tensor]:
        """Per-sample gradients of the public records at the weights of ``net``, one tensor a parameter."""
        twin = self._twin = self._twin or self.make_twin()
        twin.load_state_dict({f"{WRAPPED}{name}": t for name, t in net.state_dict().items()})
        twin.zero_grad()
        with torch.enable_grad(), known_hooks():
            nn.functional.cross_entropy(twin(self.public.images), self.public.labels).backward()
        found = [p.grad_sample.detach() for p in twin.parameters()]  # type: ignore[attr-defined]
        for p in twin.parameters():
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]
        require_finite(found, "gradients of public records")
        return found

    def gain(self, net: nn.Module, how: dict[str, Any]) -> float | None:
        """By which factor the noise power is predicted to fall against isotropic noise of the same epsilon.

        Whitened: at the same expected norm before the clip. L2 and groups: at the same clip norm. It says nothing of
        the clip's bias nor of the accuracy. None without public records, which tell how large the gradients are.
        """
        if not len(self.public):
            return None
        rms = [g.double().square().mean(0).sqrt() for g in self.gradients(net)]
        if self.arm.mode == "whitened":
            scale = self.scale(net)
            return 1.0 if scale is None else noise_power_gain(rms, scale.tensors)
        numbers = sum(t.numel() for t in rms)
        if self.arm.mode == "group":
            by_group = dict(zip(how["groups"], how["scale"]))
            scales: list[Any] = [by_group[group] for group in range(len(how["clip"]))]
            squares = sum(t.numel() * s**2 for t, s in zip(rms, how["scale"]))
            reach = math.hypot(*how["clip"])
        else:
            made = self.scale(net)
            assert made is not None
            scales, reach = made.tensors, how["clip"]
            squares = sum(float(s.double().square().sum()) for s in made.tensors)
        unit = effective_multiplier(1.0, how["clip"], self.arm.mode, scales)
        return numbers * (unit * reach) ** 2 / squares

    def scale(self, net: nn.Module) -> Scale | None:
        """None is isotropic noise."""
        if not self.arm.guide:
            return None
        require_finite(list(net.parameters()), "weights")
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


def require_finite(tensors: Sequence[Tensor], what: str) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise Diverged(f"training: {what} are no longer finite")


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
