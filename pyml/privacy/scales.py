"""Sources of the scale: where the noise is small and where it is large.

With the whitened clip every positive scale has the same provable epsilon, so a scale is only a guess that is good or
bad. The best one for gradients of RMS r_j is s_j ~ sqrt(r_j) (AdaClip, arXiv 1908.07643). It needs mean(r^2) /
mean(r)^2 times less noise power than isotropic noise of the same expected norm before the clip: a rule of thumb about
power, which bounds no accuracy.

A scale from earlier parameters is motivated by DP-Hero (arXiv 2409.03344), which guides noise by a previously trained
model. Its formula was not at hand; this one is our own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.privacy import _arguments as arguments
from pyml.privacy import provenance as sources
from pyml.privacy.provenance import Provenance


@dataclass
class Scale:
    """An element-wise scale for a list of tensors, with mean square 1 over all elements.

    Attributes:
        tensors: float32, in the shapes of the tensors it is for.
        source: the name of the function that made it.
        provenance: what `epsilon` is to be told.
        gain: predicted factor by which the noise power falls against isotropic noise, None where nothing predicts it.
    """

    tensors: list[Tensor]
    source: str
    provenance: tuple[Provenance, ...]
    gain: float | None = None

    def __str__(self) -> str:
        flat = torch.cat([t.flatten() for t in self.tensors])
        gain = "not predicted" if self.gain is None else f"{self.gain:.3g}"
        return (
            f"scale {self.source} ({', '.join(map(str, self.provenance))}): min {float(flat.min()):.3g}, max "
            f"{float(flat.max()):.3g}, RMS {float(flat.square().mean().sqrt()):.3g}; predicted noise-power gain {gain}"
        )

    def permuted(self, generator: torch.Generator | None = None) -> "Scale":
        """The same values in a random order over all elements: a guide that knows nothing, to compare with."""
        flat = torch.cat([t.flatten() for t in self.tensors])
        flat = flat[torch.randperm(flat.numel(), generator=generator)]
        parts = flat.split([t.numel() for t in self.tensors])
        mixed = [part.view(t.shape) for part, t in zip(parts, self.tensors)]
        return Scale(mixed, f"{self.source}, permuted", self.provenance)


def uniform(tensors: Iterable[Tensor]) -> Scale:
    """The scale of isotropic noise: 1 everywhere."""
    return Scale([torch.ones(t.shape) for t in _listed("uniform", "tensors", tensors)], "uniform", _PUBLIC, 1.0)


def from_public_gradients(per_sample: Iterable[Tensor], *, floor: float = 1e-2) -> Scale:
    """s ~ sqrt(r), with r the RMS of each element over the gradients of public samples.

    Args:
        per_sample: one tensor ``[N, *shape]`` a parameter: the gradients of N samples that are public.
        floor: RMSs below floor * mean(RMS) count as that. An element that no public sample moves would otherwise have a
            scale of 0, and the whitened clip would drop it for good. With 0 such an element is refused.

    Returns:
        Scale with the shapes ``shape``, and the predicted gain.
    """
    op = "from_public_gradients"
    floor = arguments.not_negative(op, "floor", floor)
    given = _listed(op, "per_sample", per_sample)
    if any(g.dim() == 0 or g.shape[0] == 0 for g in given):
        _check.fail(op, "per_sample", "tensors [N, *shape] with N >= 1", [list(g.shape) for g in given])
    if len({g.shape[0] for g in given}) > 1:
        _check.fail(op, "per_sample", "the same number of samples in each tensor", [g.shape[0] for g in given])
    rms = [g.double().square().mean(0).sqrt() for g in given]
    raised = _raised(op, "per_sample", rms, floor)
    return Scale(_normalised([r.sqrt() for r in raised]), op, _PUBLIC, noise_power_gain(raised))


def from_parameters(
    parameters: Iterable[Tensor], *, provenance: Any, power: float = 0.5, floor: float = 0.1,
    rms: Iterable[Tensor] | None = None,
) -> Scale:  # fmt: skip
    """Less noise for the larger weights of an earlier model: s ~ (|w| / mean|w| + floor)^-power.

    Args:
        parameters: the weights of an earlier model, or the last released iterate of the same run.
        provenance: of these weights; see `epsilon`. A model that was trained on the private records without DP is
            "unknown", and leaves no finite epsilon.
        power: 0 is uniform; larger is more uneven.
        floor: above 0; it bounds the scale of a weight that is 0.
        rms: RMS of the gradients, where something public tells it, to predict the gain.

    Returns:
        Scale. The gain may be below 1: large weights need not have small gradients.
    """
    op = "from_parameters"
    found = sources.parse(op, provenance)
    power, floor = arguments.not_negative(op, "power", power), arguments.positive(op, "floor", floor)
    sizes = [w.double().abs() for w in _listed(op, "parameters", parameters)]
    mean = _mean(sizes)
    if mean == 0:
        _check.fail(op, "parameters", "weights of which some are not 0", "zeros only")
    tensors = _normalised([(w / mean + floor) ** -power for w in sizes])
    return Scale(tensors, op, found, None if rms is None else noise_power_gain(rms, tensors))


def noise_power_gain(rms: Iterable[Tensor], scale: Sequence[Tensor] | None = None) -> float:
    """How much less noise power a scale needs than isotropic noise, at the same expected squared norm before the clip.

    Args:
        rms: RMS r of each gradient element, >= 0, of a public sample.
        scale: the scale s; by default the best one, sqrt(r).

    Returns:
        n sum(r^2) / (sum(s^2) sum(r^2 / s^2)) over the n elements; for the best scale mean(r^2) / mean(r)^2, which is
        at least 1. An element with s = 0 has no noise, and no gradient that counts.
    """
    op = "noise_power_gain"
    r = torch.cat([t.double().flatten() for t in _listed(op, "rms", rms)])
    if r.min() < 0:
        _check.fail(op, "rms", "entries >= 0", float(r.min()))
    if not r.any():
        _check.fail(op, "rms", "entries of which some are not 0", "zeros only")
    if scale is None:
        return float(r.square().mean() / r.mean() ** 2)
    s = torch.cat([t.double().flatten() for t in _listed(op, "scale", scale)])
    if s.shape != r.shape:
        _check.fail(op, "scale", f"as many entries as rms, {r.numel()}", s.numel())
    if s.min() < 0 or not s.any():
        _check.fail(op, "scale", "entries >= 0, some above", float(s.min()))
    pressure = torch.where(s > 0, r / s.where(s > 0, torch.ones_like(s)), 0.0).square().sum()
    return float(r.numel() * r.square().sum() / (s.square().sum() * pressure)) if pressure > 0 else math.inf


_PUBLIC = (Provenance("public"),)


def _listed(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """A list of floating tensors with finite entries, some element among them, without their graphs."""
    if isinstance(tensors, Tensor):
        _check.fail(op, name, "a list of tensors", "a tensor", TypeError)
    found = list(tensors)
    for t in found:
        _check.tensors(op, t, first_name=name)
        if t.numel() and not bool(torch.isfinite(t.detach()).all()):
            _check.fail(op, name, "finite entries", "a NaN or an infinity")
    if not sum(t.numel() for t in found):
        _check.fail(op, name, "at least one element", "none")
    return [t.detach() for t in found]


def _mean(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.sum()) for t in tensors) / sum(t.numel() for t in tensors)


def _raised(op: str, name: str, rms: Sequence[Tensor], floor: float) -> list[Tensor]:
    least = floor * _mean(rms)
    raised = [r.clamp(min=least) for r in rms]
    if min(float(r.min()) for r in raised if r.numel()) <= 0:
        what = (
            "gradients of which some are not 0"
            if least == 0 and not any(bool(r.any()) for r in rms)
            else ("a floor above 0 where an element has no gradient")
        )
        _check.fail(op, name, what, "zeros")
    return raised


def _normalised(scale: Sequence[Tensor]) -> list[Tensor]:
    """Mean square 1: std then says how much noise there is. The provable epsilon does not change with it."""
    size = math.sqrt(_mean([s.square() for s in scale]))
    return [(s / size).float() for s in scale]
