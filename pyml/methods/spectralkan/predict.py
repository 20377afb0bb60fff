"""Map a whole scene with a trained network: tile by tile, without patches where the network allows it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pyml.backend import pick
from pyml.methods import UserError, first_line
from pyml.methods._checkpoint import Checkpoint, load_checkpoint, write_atomically
from pyml.methods._recipe import COUNT, Rule, among, require
from pyml.methods.spectralkan.archs import build
from pyml.methods.spectralkan.data import (
    BORDERS,
    border_index,
    check_differ,
    difference,
    joint_range,
    load_pair,
    take,
)

TILE_VALUES = 2**18  # pixels x bands of a tile: its 16 hidden channels then take 17 MB
SCALES = Rule("pair or training", ("pair", "training").__contains__)
SUFFIXES = (".png", ".bmp", ".npy", ".tif", ".tiff")
REFERENCE_VALUES = 2**14  # the reference backend forms every patch and basis (some kB a value)


@torch.no_grad()
def predict_scene(
    model: nn.Module, difference: Tensor, tile_rows: int | None = None, border: str = "symmetric"
) -> Tensor:
    """Class scores of every pixel of a scene.

    Args:
        model: a network of `archs`; its ``map`` sees one tile and the ``patch_size // 2`` pixels around it.
        difference: the network's input ``[bands, H, W]`` (see `data.difference`), any size, on the model's device.
        tile_rows: rows a tile; None picks them by memory, and cuts the columns too where a single row is too large.
        border: ``"symmetric"``, ``"reflect"``, ``"replicate"`` or ``"zeros"``; the same as in training.

    Returns:
        ``[num_classes, H, W]`` logits; ``argmax(0)`` gives the labels (1 = changed).

    Raises:
        UserError: the scene has not the model's bands, or not three dimensions.
    """
    patch: int = model.patch_size  # type: ignore[assignment]
    require("border", border, among(BORDERS))
    if tile_rows is not None:
        require("tile_rows", tile_rows, COUNT)
    if difference.dim() != 3:
        raise UserError(f"predict: expected a scene [bands, H, W], got {list(difference.shape)}")
    bands, height, width = difference.shape
    if bands != model.bands:
        raise UserError(f"predict: expected {model.bands} bands, got {bands}")
    rows_index, columns_index = (
        border_index(size, patch // 2, border).to(difference.device) for size in (height, width)
    )
    tile_columns = width
    if tile_rows is None:
        pixels = max(1, _tile_values(difference.device.type) // bands)
        tile_columns = min(width, pixels)
        tile_rows = max(1, pixels // tile_columns)
    was_training = model.training
    model.eval()
    out: Tensor | None = None
    try:
        for row in range(0, height, tile_rows):
            rows = rows_index[row : row + tile_rows + patch - 1]
            for column in range(0, width, tile_columns):
                columns = columns_index[column : column + tile_columns + patch - 1]
                scores = model.map(take(difference, rows, columns))  # type: ignore[operator]
                if out is None:
                    out = scores.new_empty(scores.shape[0], height, width)
                out[:, row : row + scores.shape[1], column : column + scores.shape[2]] = scores
    finally:
        model.train(was_training)
    if out is None:
        raise UserError(f"predict: expected a scene with pixels, got {height} x {width}")
    return out


def _tile_values(device: str) -> int:
    from pyml.ops.bspline import WKAN_CONV2D

    return REFERENCE_VALUES if pick(WKAN_CONV2D, device, None) == "reference" else TILE_VALUES


def load_model(path: Path) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint of `pyml train spectralkan`, in evaluation mode, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    if info.get("method") != "spectralkan":
        raise UserError(f"checkpoint: {path} belongs to the method {info.get('method')!r}, expected 'spectralkan'")
    beyond = info.get("extrapolation", "zero")  # checkpoints without this entry come from layers of that form
    model = build(info["arch"], info["bands"], info["patch_size"], info["spectral_hidden"], beyond)
    try:
        model.load_state_dict(checkpoint.part("model"))
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not fit its own network: {first_line(error)}") from error
    return model.eval(), checkpoint


def predict_files(
    checkpoint: Path,
    before: str,
    after: str,
    *,
    axes: str = "auto",
    scale: str = "pair",
    device: str = "cpu",
    tile_rows: int | None = None,
) -> Tensor:
    """Read two images and map the changes between them -> labels ``[H, W]``, uint8, 1 = changed.

    ``scale="pair"`` scales every band by the range of these two images (the paper's way), ``"training"`` by the range
    seen in training. Equal images are an error: the network would see zeros everywhere and give all pixels one class,
    which may well be "changed".
    """
    import numpy as np

    model, saved = load_model(checkpoint)
    info = saved.info
    require("scale", scale, SCALES)
    advice = "this pair has no range to scale them by, use --scale training" if scale == "pair" else None
    first, second = load_pair(before, after, axes, tuple(info["dropped_bands"]), advice)
    if len(first) != info["bands"]:
        dropped = f" after dropping {len(info['dropped_bands'])}" if info["dropped_bands"] else ""
        raise UserError(
            f"before, after: expected the {info['bands']} bands of the checkpoint, got {len(first)}{dropped}"
        )
    check_differ(first, second)
    if scale == "training":
        low, high = (np.asarray(info[name], np.float32) for name in ("low", "high"))
    else:
        low, high = joint_range(first, second)
    image = difference(first, second, low, high).to(device)
    return predict_scene(model.to(device), image, tile_rows, info["border"]).argmax(0).to(torch.uint8).cpu()


def save_labels(labels: Tensor, path: Path) -> None:
    """Write ``[H, W]`` labels by suffix: ``.png`` and ``.bmp`` (0 and 255), ``.npy`` and ``.tif`` (0 and 1)."""
    import numpy as np

    suffix = path.suffix.lower()
    array = labels.numpy()
    if suffix in (".png", ".bmp"):
        from PIL import Image

        write_atomically(path, lambda part: Image.fromarray(array * np.uint8(255)).save(part))
    elif suffix == ".npy":
        write_atomically(path, lambda part: np.save(part, array))
    elif suffix in (".tif", ".tiff"):
        import tifffile

        write_atomically(path, lambda part: tifffile.imwrite(part, array))
    else:
        raise UserError(f"out: expected a name ending in {', '.join(SUFFIXES)}, got {path.name}")
