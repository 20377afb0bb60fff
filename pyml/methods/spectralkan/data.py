"""A pair of images and its labels -> the network's input and the split into training and test pixels."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._options import plural
from pyml.methods._recipe import SHARE, among, require
from pyml.methods.spectralkan.readers import Array, read_image, read_mask

UNCHANGED, CHANGED, UNLABELLED = 0, 1, -1
MOST_BANDS = 2**16  # of any image
DROP = "add --drop-bands {}"  # what training can do about a band without a range
BORDERS = {"symmetric": "symmetric", "reflect": "reflect", "replicate": "edge", "zeros": "constant"}


@dataclass(frozen=True)
class Files:
    """One way a public scene is distributed: sources (see `readers`) and the values of its mask."""

    before: str
    after: str
    labels: str
    changed: int
    unchanged: int


def _one_file(name: str) -> Files:
    return Files(f"{name}:T1", f"{name}:T2", f"{name}:Binary", 1, 0)


# File, key and label facts come from public code that reads these files (the method's own demo.py among it). None of
# them has been checked against the files themselves. The first variant whose files are in the folder is taken.
PRESETS: dict[str, tuple[Files, ...]] = {
    "farmland": (
        Files("farm06.mat:imgh", "farm07.mat:imghl", "label.mat:label", 1, 0),
        Files("Farm1.mat:imgh", "Farm2.mat:imghl", "GTChina1.mat:label", 2, 1),
        _one_file("China_Change_Dataset.mat"),
    ),
    "river": (
        Files("river_before.mat:river_before", "river_after.mat:river_after", "groundtruth.mat:lakelabel_v1", 255, 0),
    ),
    "usa": (
        _one_file("USA_Change_Dataset.mat"),
        Files("Sa1.mat:T1", "Sa2.mat:T2", "SaGT.mat:GT", 1, 2),
    ),
    "bay-area": tuple(
        Files("Bay_Area_2013.mat:HypeRvieW", "Bay_Area_2015.mat:HypeRvieW", f"{labels}:HypeRvieW", 1, 2)
        for labels in ("bayArea_gtChanges2.mat.mat", "bayArea_gtChanges2.mat", "bayArea_gtChanges.mat")
    ),
    "santa-barbara": (
        Files("barbara_2013.mat:HypeRvieW", "barbara_2014.mat:HypeRvieW", "barbara_gtChanges.mat:HypeRvieW", 1, 2),
    ),
}


@dataclass
class Scene:
    """Two co-registered images ``[bands, H, W]`` and ``labels [H, W]`` int64: 1 changed, 0 unchanged, -1 unlabelled."""

    before: Array
    after: Array
    labels: Array
    name: str = "scene"
    dropped_bands: tuple[int, ...] = field(default=())

    @property
    def bands(self) -> int:
        return int(self.before.shape[0])


def preset_files(name: str, folder: Path) -> Files:
    """The sources of a public scene below ``folder``."""
    require("preset", name, among(PRESETS))
    for files in PRESETS[name]:
        sources = (files.before, files.after, files.labels)
        if all((folder / source.rpartition(":")[0]).is_file() for source in sources):
            before, after, labels = (str(folder / source) for source in sources)
            return Files(before, after, labels, files.changed, files.unchanged)
    first = PRESETS[name][0]
    wanted = sorted({source.rpartition(":")[0] for source in (first.before, first.after, first.labels)})
    raise UserError(f"preset: {name} expects {', '.join(wanted)} in {folder}, not all are there")


def parse_bands(text: str) -> tuple[int, ...]:
    """``"0-3,7"`` -> (0, 1, 2, 3, 7)."""
    bands: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = [whole_number(end) for end in part.split("-")]
        first, last = ends[0], ends[-1]
        if first is None or last is None or len(ends) > 2:
            raise UserError(f"drop-bands: expected numbers and ranges such as 0-3,7, got {text!r}")
        if not first <= last < MOST_BANDS:  # before the set is made: a range may be a slip of the keyboard
            raise UserError(f"drop-bands: expected ranges that rise, below {MOST_BANDS}, got {part!r}")
        bands.update(range(first, last + 1))
    return tuple(sorted(bands))


def whole_number(text: str) -> int | None:
    """A number in the digits 0 to 9, at most nine of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None


def load_pair(
    before: str, after: str, axes: str = "auto", drop_bands: tuple[int, ...] = (), constant: str | None = DROP
) -> tuple[Array, Array]:
    """Read and check two images -> ``[bands, H, W]`` each, as float32.

    Args:
        constant: what the error advises where bands are constant over both dates, with ``{}`` for a list of bands to
            leave out; None: such bands are let through.

    Raises:
        UserError: the images differ in size or bands, hold NaN or infinite values, or have a constant band.
    """
    return check_pair(read_image(before, "before", axes), read_image(after, "after", axes), drop_bands, constant)


def check_pair(
    first: Array, second: Array, drop_bands: tuple[int, ...] = (), constant: str | None = DROP
) -> tuple[Array, Array]:
    """The checks of `load_pair` on arrays ``[bands, H, W]``."""
    if first.shape[1:] != second.shape[1:]:
        raise UserError(f"after: expected the size of before, {_size(first)}, got {_size(second)} (height x width)")
    if first.shape[0] != second.shape[0]:
        raise UserError(f"after: expected the {first.shape[0]} bands of before, got {second.shape[0]}")
    if 0 in first.shape:
        raise UserError(f"before: expected pixels and bands, got an empty image {list(first.shape)}")
    if drop_bands:
        if drop_bands[-1] >= first.shape[0]:
            raise UserError(f"drop-bands: expected bands 0 to {first.shape[0] - 1}, got {drop_bands[-1]}")
        first, second = (np.delete(image, drop_bands, axis=0) for image in (first, second))
        if not first.shape[0]:
            raise UserError("drop-bands: no band is left")
    first, second = first.astype(np.float32), second.astype(np.float32)
    for image, what in ((first, "before"), (second, "after")):
        bad = ~np.isfinite(image).all(axis=0)
        if bad.any():
            row, column = (int(v) for v in np.argwhere(bad)[0])
            raise UserError(
                f"{what}: {plural(int(bad.sum()), 'pixel')} with NaN or infinite values, the first at row {row}, "
                f"column {column}: fill them first"
            )
    low, high = joint_range(first, second)
    flat = [int(band) for band in np.flatnonzero(low == high)]
    if flat and constant is not None:
        original = [band for band in range(len(low) + len(drop_bands)) if band not in drop_bands]
        names = ",".join(str(band) for band in (*drop_bands, *(original[band] for band in flat)))
        raise UserError(
            f"before, after: {len(flat)} of {len(low)} bands are constant over both dates and carry nothing: "
            f"{constant.format(names)}"
        )
    return first, second


def _size(image: Array) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"


def check_differ(before: Array, after: Array) -> None:
    """Equal images have no change to learn, and their map would be one class: mostly one file was named twice."""
    if np.array_equal(before, after):
        raise UserError("before, after: expected two images that differ, got the same values in both")


def load_labels(
    labels: str,
    size: tuple[int, int],
    unchanged: str | None = None,
    values: tuple[int | None, int | None] = (None, None),
) -> Array:
    """Read the masks -> ``[H, W]`` int64 of 1 (changed), 0 (unchanged) and -1 (unlabelled).

    With a second mask ``unchanged``, nonzero pixels of each are labelled. With one mask, ``values`` are the numbers for
    changed and unchanged pixels; left out, 0 is unchanged and the one other number is changed.
    """
    mask = read_mask(labels, "labels")
    out = np.full(size, UNLABELLED, np.int64)
    if unchanged is not None:
        other = read_mask(unchanged, "unchanged")
        for array, what in ((mask, "labels"), (other, "unchanged")):
            _check_size(array, size, what)
        on = [mask == values[0] if values[0] is not None else mask != 0]
        on.append(other == values[1] if values[1] is not None else other != 0)
        both = int((on[0] & on[1]).sum())
        if both:
            raise UserError(f"labels, unchanged: {plural(both, 'pixel')} marked in both masks")
        out[on[0]], out[on[1]] = CHANGED, UNCHANGED
        return out
    _check_size(mask, size, "labels")
    changed_value, unchanged_value = values
    found = np.unique(mask)
    unchanged_value = 0 if unchanged_value is None else unchanged_value
    if changed_value is None:
        others = [v for v in found.tolist() if v != unchanged_value]
        if len(others) > 1:
            raise UserError(
                f"labels: {labels} holds the values {', '.join(f'{v:g}' for v in found[:8])}: "
                "say which mean what with --changed-value and --unchanged-value"
            )
        changed_value = others[0] if others else None
    if changed_value is not None:
        if changed_value == unchanged_value:
            raise UserError(f"changed-value: expected another number than --unchanged-value, got {changed_value}")
        out[mask == changed_value] = CHANGED
    out[mask == unchanged_value] = UNCHANGED
    return out


def _check_size(mask: Array, size: tuple[int, int], what: str) -> None:
    if mask.shape != size:
        raise UserError(
            f"{what}: expected the size of the images, {size[0]} x {size[1]}, got {mask.shape[0]} x {mask.shape[1]}"
        )


def check_labels(labels: Array) -> None:
    """Both classes must be there, with a pixel to train on and one to test."""
    for value, what in ((CHANGED, "changed"), (UNCHANGED, "unchanged")):
        count = int((labels == value).sum())
        if count < 2:
            raise UserError(f"labels: expected at least 2 {what} pixels, got {count}")


def joint_range(before: Array, after: Array) -> tuple[Array, Array]:
    """Smallest and largest value of every band over both dates, ``[bands]`` each."""
    low = np.minimum(before.min(axis=(1, 2)), after.min(axis=(1, 2)))
    high = np.maximum(before.max(axis=(1, 2)), after.max(axis=(1, 2)))
    return low, high


def difference(before: Array, after: Array, low: Array | None = None, high: Array | None = None) -> Tensor:
    """The network's input ``[bands, H, W]``, float32: both dates scaled to [0, 1] by one range a band, before - after.

    ``low`` and ``high`` (``[bands]``) default to the joint range of the two images.
    """
    if low is None or high is None:
        low, high = joint_range(before, after)
    scale = 1 / (high.astype(np.float64) - low)
    out = np.empty(before.shape, np.float32)
    for band in range(len(out)):  # band by band: no second copy of both images
        out[band] = (before[band] - after[band].astype(np.float64)) * scale[band]  # the offset cancels
    return torch.from_numpy(out)


def border_index(size: int, radius: int, border: str) -> Tensor:
    """Source row (or column) of every row of the padded image; -1 means a row of zeros."""
    index = np.arange(size)
    if border == "zeros":
        padded = np.pad(index, radius, constant_values=-1)
    else:
        padded = np.pad(index, radius, mode=BORDERS[border])  # type: ignore[call-overload]
    return torch.from_numpy(padded)


def pad_border(image: Tensor, radius: int, border: str) -> Tensor:
    """``[bands, H, W]`` -> ``[bands, H + 2r, W + 2r]``; any size, even smaller than the radius."""
    rows, columns = (border_index(size, radius, border).to(image.device) for size in image.shape[1:])
    return take(image, rows, columns)


def take(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``image[:, rows][:, :, columns]`` with zeros where an index is -1."""
    out = image.index_select(1, rows.clamp_min(0)).index_select(2, columns.clamp_min(0))
    if (rows < 0).any() or (columns < 0).any():
        out = out * ((rows >= 0)[:, None] & (columns >= 0))
    return out


@dataclass
class Split:
    """Flat pixel indices (row * width + column), int64."""

    train: Tensor
    test: Tensor


def split_pixels(labels: Array, fraction: float, seed: int, mode: str, patch: int, block: int = 32) -> Split:
    """Training and test pixels: ``fraction`` of each class (at least one pixel) trains, the rest tests.

    ``mode="random"`` draws training pixels everywhere, as papers of this field do: training and test patches overlap.
    ``mode="block"`` cuts the image into ``block`` x ``block`` squares, draws training pixels in a random half of them
    and tests only where no patch shares a pixel with a training patch.
    """
    require("train_fraction", fraction, SHARE)
    rng = np.random.default_rng(seed)
    pool = np.ones(labels.shape, bool)
    if mode == "block":
        rows, columns = (-(-size // block) for size in labels.shape)
        chosen = np.zeros(rows * columns, bool)
        chosen[rng.permutation(rows * columns)[: max(1, rows * columns // 2)]] = True
        pool = chosen.reshape(rows, columns).repeat(block, 0).repeat(block, 1)[: labels.shape[0], : labels.shape[1]]
    elif mode != "random":
        raise UserError(f"split: expected random or block, got {mode!r}")
    train = []
    for value, what in ((UNCHANGED, "unchanged"), (CHANGED, "changed")):
        pixels = np.flatnonzero(labels == value)
        wanted = max(1, round(len(pixels) * fraction))
        usable = np.flatnonzero((labels == value) & pool)
        if len(usable) < wanted:
            raise UserError(
                f"split: {wanted} {what} training pixels are wanted and the training blocks hold {len(usable)}: "
                f"use a smaller --block-size than {block}, or --split random"
            )
        train.append(rng.permutation(usable)[:wanted])
    indices = np.concatenate(train)
    free = labels != UNLABELLED
    free.flat[indices] = False
    if mode == "block":
        free &= ~pool & ~_near(indices, labels.shape, patch - 1)
    test = np.flatnonzero(free)
    for value, what in ((UNCHANGED, "unchanged"), (CHANGED, "changed")):
        if not (labels.flat[test] == value).any():
            raise UserError(f"split: no {what} pixel is left to test on: lower --train-fraction or --block-size")
    return Split(torch.from_numpy(indices), torch.from_numpy(test))


def _near(indices: Array, shape: tuple[int, ...], distance: int) -> Array:
    """Pixels within ``distance`` rows and columns of any of the indices."""
    width = shape[1]
    near = np.zeros(shape, bool)
    for row, column in zip(*np.divmod(indices, width)):
        near[max(0, row - distance) : row + distance + 1, max(0, column - distance) : column + distance + 1] = True
    return near


def patch_view(padded: Tensor, patch: int) -> Tensor:
    """``[bands, H + 2r, W + 2r]`` -> a view ``[H, W, bands, patch, patch]`` without a copy; index it by pixel."""
    return padded.unfold(1, patch, 1).unfold(2, patch, 1).permute(1, 2, 0, 3, 4)
