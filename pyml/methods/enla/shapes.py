"""Drawn images for a demonstration without downloads: coloured shapes on plain or disturbed ground, and their names.

A *kind* is a coloured shape, colour * 6 + shape. The data set ``shapes`` has one object an image and a class a kind.
In ``pairs`` a class is two kinds that stand in two corners, in any order; a third object, small and of another kind,
stands in a third corner. So what tells the classes apart is in two parts of the image, and every kind belongs to two
classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (1.0, 0.1, 0.1), "green": (0.1, 0.75, 0.1), "blue": (0.15, 0.25, 1.0), "yellow": (0.95, 0.9, 0.1),
    "magenta": (0.9, 0.1, 0.9), "cyan": (0.1, 0.9, 0.9), "white": (1.0, 1.0, 1.0), "orange": (1.0, 0.55, 0.05),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = {"top left": (8, 8), "top right": (24, 8), "bottom left": (8, 24), "bottom right": (24, 24)}
KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SIDE = 32  # pixels
LARGE, SMALL = (4.5, 7.0), (2.0, 3.0)  # radii
ORDER_SEED = 5  # of the classes: which are base and which novel

TEMPLATES = ["a photo of the {}", "a picture of the {}", "a drawing of the {}", "the {}"]
DATASETS = {
    "shapes": TEMPLATES,
    "pairs": ["a photo of the {}", "a photo of the {1}", "a photo of the {2}"],
}


class Drawn(NamedTuple):
    """Images uint8 ``[N, 3, 32, 32]``, labels int64 ``[N]`` into the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def draw(
    kinds: Tensor, places: Tensor, small: int | None = None, shift: float = 0.0, *, generator: torch.Generator
) -> Tensor:
    """Draw ``[B, n]`` kinds (-1: none) at ``[B, n]`` places -> float32 ``[B, 3, 32, 32]`` in 0..1.

    Args:
        small: this column holds small objects.
        shift: 0 draws on a plain dark ground; above it come brighter ground with a colour cast and waves, dimmed light
            and noise, all in proportion.
    """
    count, objects = kinds.shape
    each = (count, 1, 1, 1)
    ground = uniform(0, 0.25, (count, 3, 1, 1), generator)
    image = ground + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    if shift:
        waves = torch.sin(uniform(0.2, 0.8, each, generator) * _pixels()[0] + uniform(0, 6, each, generator))
        cast = torch.tensor([1.0, 0.9, 0.6]).view(1, 3, 1, 1)
        image = image + shift * (uniform(0.1, 0.35, each, generator) * cast + 0.12 * waves)
    colours, centres = torch.tensor(list(COLOURS.values())), torch.tensor(list(PLACES.values()), dtype=torch.float32)
    for column in range(objects):
        kind, bounds = kinds[:, column], SMALL if column == small else LARGE
        centre = centres[places[:, column]] + uniform(-2.5, 2.5, (count, 2), generator)
        radius = uniform(*bounds, (count, 1, 1), generator)
        turn = uniform(-0.3, 0.3, (count, 1, 1), generator)
        # a soft edge of one pixel
        inside = (0.5 - radius * _distance(kind % len(SHAPES), centre, radius, turn)).clamp(0, 1)
        inside = (inside * (kind >= 0).view(-1, 1, 1)).unsqueeze(1)
        paint = colours[kind // len(SHAPES)] + 0.08 * torch.randn(count, 3, generator=generator)
        image = image * (1 - inside) + paint[:, :, None, None] * inside
    if shift:
        light = (1 + shift * (torch.tensor([0.75, 1.0, 1.15]) - 1)).view(1, 3, 1, 1)
        image = image * light * (1 - shift * uniform(0.05, 0.4, each, generator))
        image = image + 0.07 * shift * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1)


def _pixels() -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return columns, rows


def _distance(shape: Tensor, centre: Tensor, radius: Tensor, turn: Tensor) -> Tensor:
    """How far every pixel is outside its image's shape, in radii (negative inside): ``[B, 32, 32]``."""
    columns, rows = _pixels()
    x, y = columns - centre[:, 0, None, None], rows - centre[:, 1, None, None]
    x, y = (turn.cos() * x - turn.sin() * y) / radius, (turn.sin() * x + turn.cos() * y) / radius
    across, along, far = x.abs(), y.abs(), torch.hypot(x, y)
    bars = [torch.maximum(across - wide, along - high) for wide, high in ((0.3, 1.0), (1.0, 0.3))]
    shapes = torch.stack(
        [
            far - 1,
            torch.maximum(across, along) - 0.85,
            torch.maximum(y - 0.7, 0.87 * across - 0.49 * (y + 1)),
            0.7 * (across + along - 1.1),
            torch.minimum(*bars),
            (far - 0.75).abs() - 0.22,
        ]
    )
    return shapes[shape, torch.arange(len(shape))]


def free_places(count: int, objects: int, generator: torch.Generator) -> Tensor:
    """Different corners for the objects of every image: ``[count, objects]``."""
    return torch.rand(count, len(PLACES), generator=generator).argsort(1)[:, :objects]


def class_kinds(dataset: str) -> Tensor:
    """The kinds of every class of a data set, ``[48, 1]`` or ``[48, 2]``; base classes first."""
    order = torch.randperm(len(KINDS), generator=torch.Generator().manual_seed(ORDER_SEED))
    # pairs: neighbours in a ring, so that every kind is in two classes
    return order[:, None] if dataset == "shapes" else torch.stack([order, order.roll(-1)], 1)


def class_names(dataset: str) -> list[str]:
    return [" and ".join(KINDS[kind] for kind in kinds) for kinds in class_kinds(dataset).tolist()]


def drawn(dataset: str, per_class: int, shift: float, seed: int) -> Drawn:
    """So many images of every class of ``shapes`` or ``pairs``; the same seed gives the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    of_class = class_kinds(dataset)
    labels = torch.arange(len(of_class)).repeat_interleave(per_class)
    kinds, small = of_class[labels], None
    if dataset == "pairs":
        # some kind that is neither of the two: a step in the ring that leads past both
        step = torch.randint(2, len(KINDS), (len(labels),), generator=generator)
        place_in_ring = torch.empty_like(of_class[:, 0])
        place_in_ring[of_class[:, 0]] = torch.arange(len(of_class))
        other = of_class[(place_in_ring[kinds[:, 0]] + step) % len(of_class), 0]
        kinds, small = torch.cat([kinds, other[:, None]], 1), 2
    places = free_places(len(labels), kinds.shape[1], generator)
    images = draw(kinds, places, small, shift, generator=generator)
    return Drawn((255 * images).round().to(torch.uint8), labels, class_names(dataset))
