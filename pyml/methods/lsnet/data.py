"""Pairs of images -> a split into training and test pairs, and batches of crops."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._checkpoint import checksum
from pyml.methods._engine import epoch_generator
from pyml.methods._pictures import list_pictures, no_picture, read_picture, to_float
from pyml.methods._recipe import SHARE, require

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Pairs:
    """Degraded inputs and their targets, each ``[3, H, W]`` uint8, even sides; ``groups`` that a split keeps whole."""

    inputs: list[Tensor]
    targets: list[Tensor]
    names: list[str]
    source: str
    groups: list[int] | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass
class Split:
    """Indices into `Pairs`."""

    train: list[int]
    test: list[int]


def load_pairs(inputs: Path, targets: Path, size: int | None = 256) -> tuple[Pairs, list[str]]:
    """Read two folders whose files go together by name (the suffix may differ).

    Args:
        size: resize every image to a square of this side, bicubic; None: keep the sizes (an odd side loses a pixel).

    Returns:
        The pairs, sorted by name, and one sentence for each file that was passed over because it is no picture.

    Raises:
        UserError: a file without partner, a partner of another size, a file that cannot be read or has not three 8-bit
            channels; the first is named, the others are counted.
    """
    found, notes, wrong = [], [], []
    for folder, what in ((inputs, "input"), (targets, "target")):
        pictures, others = list_pictures(folder, what)
        notes += [no_picture(path) for path in others]
        by_name: dict[str, Path] = {}
        for path in pictures:
            if path.stem in by_name:
                wrong.append(f"{path}: expected one picture of that name, got {by_name[path.stem].name} too")
            by_name[path.stem] = path
        found.append(by_name)
    first, second = found
    for one, other, folder in ((first, second, targets), (second, first, inputs)):
        wrong += [f"{path}: no picture of that name in {folder}" for stem, path in one.items() if stem not in other]
    pairs = Pairs([], [], [], inputs.resolve().parent.name or "pairs")
    for stem in sorted(first.keys() & second.keys()):
        try:
            images = [read_picture(path) for path in (first[stem], second[stem])]
            if images[0].shape != images[1].shape:
                shapes = [f"{image.shape[1]} x {image.shape[2]}" for image in images]
                raise UserError(f"{second[stem]}: expected the size of its input, {shapes[0]}, got {shapes[1]}")
            if min(images[0].shape[1:]) < 2:
                raise UserError(f"{first[stem]}: expected at least 2 x 2 pixels, got {list(images[0].shape[1:])}")
        except UserError as error:
            wrong.append(str(error))
            continue
        if size is not None:
            images = [read_picture(path, size) for path in (first[stem], second[stem])]
        height, width = (side // 2 * 2 for side in images[0].shape[1:])
        for kept, image in zip((pairs.inputs, pairs.targets), images):
            kept.append(image[:, :height, :width].contiguous())
        pairs.names.append(stem)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}")
    return pairs, notes


def split_pairs(pairs: Pairs, test_fraction: float, seed: int) -> Split:
    """A random split; pairs of one group stay together."""
    require("test_fraction", test_fraction, SHARE)
    groups = list(range(len(pairs))) if pairs.groups is None else pairs.groups
    kinds = sorted(set(groups))
    count = round(test_fraction * len(kinds))
    if not 0 < count < len(kinds):
        raise UserError(
            f"test-fraction: {test_fraction:g} of {len(kinds)} pairs leaves no pair to train or to test on: "
            "expected more pairs or another share"
        )
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {kinds[i] for i in order[:count]}
    return Split(*([i for i, group in enumerate(groups) if (group in held) == test] for test in (False, True)))


def check_crop(pairs: Pairs, crop: int) -> None:
    """The crop is even, not smaller than SSIM's window, and fits into every image."""
    if crop < 12 or crop % 2:
        raise UserError(f"crop-size: expected an even number >= 12, got {crop}")
    for name, image in zip(pairs.names, pairs.inputs):
        if min(image.shape[1:]) < crop:
            size = f"{image.shape[1]} x {image.shape[2]}"
            raise UserError(f"crop-size: expected at most the sides of every image, got {crop} and {name} with {size}")


def check_differ(pairs: Pairs) -> None:
    """Where every input is its own target there is nothing to restore: mostly one folder was named twice."""
    if all(torch.equal(one, other) for one, other in zip(pairs.inputs, pairs.targets)):
        raise UserError("input, target: expected pictures that differ, got the same in both")


class Batches:
    """One random crop of every training pair an epoch, flipped at random, as batches of this process.

    Everything random follows from the seed and the epoch, whatever the number of processes.
    """

    def __init__(
        self, pairs: Pairs, train: list[int], crop: int, size: int, seed: int, accelerator: "Accelerator"
    ) -> None:
        self.pairs, self.train, self.crop, self.size, self.seed = pairs, train, crop, size, seed
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """(inputs, targets ``[B, 3, crop, crop]`` in 0..1, which of them count ``[B]``, pairs over all processes)."""
        generator = epoch_generator(self.seed, epoch)
        order = torch.randperm(len(self.train), generator=generator)
        draws = torch.rand(len(self.train), 4, generator=generator).tolist()
        for batch in order.split(self.size):
            mine = batch[self.rank :: self.world].tolist()
            counted = torch.full((len(mine) or 1,), float(bool(mine)), device=self.device)
            # a process without a pair in a short last batch takes part in the step with one that does not count
            crops = [self._crop(self.train[i], draws[i]) for i in mine or [int(batch[0])]]
            inputs, targets = (to_float(torch.stack(side).to(self.device)) for side in zip(*crops))
            yield inputs, targets, counted, len(batch)

    def _crop(self, index: int, draws: list[float]) -> tuple[Tensor, Tensor]:
        sides = self.pairs.inputs[index].shape[1:]
        row, column = (int(draw * (side - self.crop + 1)) for draw, side in zip(draws, sides))
        turned = [axis for axis, draw in zip((1, 2), draws[2:]) if draw < 0.5]

        def cut(image: Tensor) -> Tensor:
            return image[:, row : row + self.crop, column : column + self.crop].flip(turned)

        return cut(self.pairs.inputs[index]), cut(self.pairs.targets[index])


def describe(pairs: Pairs, split: Split) -> dict[str, Any]:
    """What identifies the data of a run, for its config."""
    names = [pairs.names[i] for i in split.test]
    first = list(pairs.inputs[0].shape[1:])
    return {
        "data": pairs.source, "first_size": first, "train_pairs": len(split.train), "test_names": names,
        "data_checksum": checksum([*pairs.inputs, *pairs.targets]),
    }  # fmt: skip
