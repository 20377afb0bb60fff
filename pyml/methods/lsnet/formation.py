"""Pairs for when no data is at hand: photographs seen through water by the usual formation model. No download.

I = J t + A (1 - t), t = exp(-beta d) per colour: J the photograph, d the distance, beta the attenuation of the water
(red fades first), A the veiling light (Jaffe 1990; McGlamery 1980). Distances and waters are made up; the photographs
are those that scikit-learn and scikit-image bring along.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._pictures import read_picture, to_bytes, to_float
from pyml.methods.lsnet.data import Pairs

FAR = 6.0  # metres


def photographs() -> list[Path]:
    """The colour photographs inside the two packages."""
    import skimage
    import sklearn

    inside = Path(sklearn.__file__).parent / "datasets" / "images"
    paths = [inside / "china.jpg", inside / "flower.jpg"]
    inside = Path(skimage.__file__).parent / "data"
    paths += [inside / name for name in ("coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")]
    found = [path for path in paths if path.is_file()]
    if len(found) < 2:
        raise UserError(
            "input: expected --input and --target, as scikit-learn and scikit-image here have no photographs"
        )
    return found


def under_water(scene: Tensor, distance: Tensor, attenuation: Tensor, veil: Tensor) -> Tensor:
    """``[3, H, W]`` in 0..1, metres ``[H, W]``, 1/m ``[3]``, ``[3]`` -> ``[3, H, W]``."""
    transmission = torch.exp(-attenuation.view(3, 1, 1) * distance)
    return scene * transmission + veil.view(3, 1, 1) * (1 - transmission)


def generate_pairs(count: int = 28, size: int = 160, seed: int = 0) -> Pairs:
    """``count`` pairs of ``size`` x ``size`` pixels; the same seed gives the same pairs. A photograph is one group."""
    if count < 2 or size < 32 or size % 2:
        raise UserError(f"made: expected at least 2 pairs and an even side of at least 32, got {count} and {size}")
    generator = torch.Generator().manual_seed(seed)
    scenes = [read_picture(path) for path in photographs()]
    pairs = Pairs([], [], [], f"generated-{count}x{size}-{seed}-of-{len(scenes)}", groups=[])
    assert pairs.groups is not None
    for number in range(count):
        group = number % len(scenes)
        target = _view(scenes[group], size, generator)
        draws = torch.rand(8, generator=generator)
        green = 0.05 + 0.15 * draws[0]
        attenuation = torch.stack([0.25 + 0.45 * draws[1], green, green * (0.6 + 0.8 * draws[2])])
        veil = torch.stack([0.02 + 0.13 * draws[3], 0.35 + 0.35 * draws[4], 0.35 + 0.4 * draws[5]])
        distance = _distance(size, generator)
        pairs.inputs.append(to_bytes(under_water(to_float(target), distance, attenuation, veil)))
        pairs.targets.append(target)
        pairs.names.append(f"{number:03d}")
        pairs.groups.append(group)
    return pairs


def _view(scene: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random square of a photograph, at least half its height, scaled to ``size``."""
    height, width = scene.shape[1:]
    draws = torch.rand(4, generator=generator).tolist()
    side = int(min(height, width) * (0.5 + 0.5 * draws[0]))
    row, column = int(draws[1] * (height - side + 1)), int(draws[2] * (width - side + 1))
    cut = to_float(scene[:, row : row + side, column : column + side]).unsqueeze(0)
    cut = F.interpolate(cut, (size, size), mode="bicubic", antialias=True)[0]
    return to_bytes(cut.flip(2) if draws[3] < 0.5 else cut)


def _distance(size: int, generator: torch.Generator) -> Tensor:
    """A smooth map of metres ``[size, size]``: hills on a ground that runs away towards the top."""
    hills = F.interpolate(torch.rand(1, 1, 5, 5, generator=generator), (size, size), mode="bicubic")[0, 0]
    ground = torch.linspace(1, 0, size).unsqueeze(1)
    near = 0.3 + 1.2 * torch.rand((), generator=generator)
    return (near + (FAR - near) * (0.6 * hills + 0.4 * ground)).clamp(0.2, FAR)
