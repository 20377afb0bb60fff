"""What a run learns from and is scored on: images of some classes, and the texts that stand for a class."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

PLACE = "{}"  # of the class name in a template
PARTS = ("{1}", "{2}")  # of the first and the last part of a name such as "red circle and blue square"
# a run's row in metrics.json holds these beside the accuracy of every split
SCORES = ("parameters", "harmonic", "mean", "train_seconds", "train_peak_mb", "score_seconds")
TASKS = ("base2novel", "fewshot", "crossdata", "domain")


class Images(Protocol):
    """Images as a CLIP wants them: float32 ``[3, R, R]``, normalised; a tensor ``[N, 3, R, R]`` is one too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Split:
    """Images of some classes: ``labels`` int64 ``[N]`` into ``classes``, the names as they go into the templates."""

    images: Images
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images ``[n, 3, R, R]`` of these indices, on the CPU."""
        if isinstance(self.images, Tensor):
            return self.images[torch.as_tensor(indices, dtype=torch.int64)]
        return torch.stack([self.images[int(index)] for index in indices])


@dataclass(frozen=True)
class Task:
    """Few images to learn from, and the splits that are scored.

    A model that is only to predict gets a task whose splits have classes and no images.
    """

    name: str  # one of TASKS
    train: Split
    evals: dict[str, Split]  # base2novel: base and novel; crossdata and domain: the source first, then the targets
    templates: list[str]  # N texts a class, so N text features a class
    facts: dict[str, Any] = field(default_factory=dict)  # plain values that identify the data

    def texts(self, classes: Sequence[str]) -> list[list[str]]:
        """The texts of some classes: ``[N][K]``, template by template."""
        return [[fill(template, name) for name in classes] for template in self.templates]

    def totals(self, accuracy: dict[str, float]) -> dict[str, float]:
        """What sums up the accuracies (per cent) of ``evals``: ``harmonic`` of base and novel, ``mean`` of targets."""
        if self.name == "base2novel":
            base, novel = accuracy["base"], accuracy["novel"]
            return {"harmonic": 2 * base * novel / (base + novel) if base + novel else 0.0}
        targets = [accuracy[name] for name in list(self.evals)[1:]]
        return {"mean": statistics.fmean(targets)} if len(targets) > 1 else {}


def fill(template: str, name: str) -> str:
    """A template with a class name, or with its parts, put in."""
    parts = name.split(" and ")
    for place, text in zip((PLACE, *PARTS), (name, parts[0], parts[-1])):
        template = template.replace(place, text)
    return template
