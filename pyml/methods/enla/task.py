"""What a run learns from and is scored on: images of some classes, and the texts that stand for a class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

PLACE = "{}"  # of the class name in a template


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

    ``evals`` of the task base2novel are called ``base`` and ``novel``: only there a harmonic mean is computed.
    A model that is only to predict gets a task whose splits have classes and no images.
    """

    name: str  # base2novel, fewshot, crossdata or domain
    train: Split
    evals: dict[str, Split]
    templates: list[str]  # N texts a class, so N text features a class
    facts: dict[str, Any] = field(default_factory=dict)  # plain values that identify the data

    def texts(self, classes: Sequence[str]) -> list[list[str]]:
        """The texts of some classes: ``[N][K]``, template by template."""
        return [[template.replace(PLACE, name) for name in classes] for template in self.templates]
