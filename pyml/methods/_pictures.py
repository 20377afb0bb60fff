"""RGB picture files <-> tensors, for methods that work on photographs. Every error is one sentence with the file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyml.methods import UserError, first_line
from pyml.methods._checkpoint import write_atomically

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def list_pictures(folder: Path, what: str) -> tuple[list[Path], list[Path]]:
    """Picture files of a folder by suffix, and the other files (hidden ones aside), both sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{what}: expected a folder, got {folder}")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise UserError(f"{what}: no picture ({', '.join(SUFFIXES)}) in {folder}")
    return pictures, [path for path in files if path.suffix.lower() not in SUFFIXES]


def no_picture(path: Path) -> str:
    """The sentence for a file beside pictures that is passed over."""
    return f"{path} is no picture file and is left out"


def open_picture(path: Path, mode: str | None = None) -> Any:
    """A picture as Pillow reads it, decoded and turned upright, converted to ``mode`` where one is given.

    Raises:
        UserError: no such file, not a picture, cut off.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
        return picture if mode is None else picture.convert(mode)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path}: is no picture that can be read") from error
    except Exception as error:  # Pillow raises anything from OSError to struct.error on broken files
        raise UserError(f"{path}: {first_line(error)}") from error


def read_picture(path: Path, size: int | None = None) -> Tensor:
    """Read a picture of three 8-bit channels -> ``[3, H, W]`` uint8; with ``size`` resized (bicubic) to a square.

    Raises:
        UserError: no such file, not a picture, cut off, or other than three 8-bit channels.
    """
    from PIL import Image

    picture = open_picture(path)
    if picture.mode != "RGB":
        raise UserError(f"{path}: expected three 8-bit channels (RGB), got mode {picture.mode}")
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_float(picture: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return picture.to(torch.float32) / 255


def to_bytes(values: Tensor) -> Tensor:
    """Values in 0..1 -> uint8, clipped and rounded."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def save_png(picture: Any, path: Path) -> None:
    """Write an array of pixels (``[H, W]`` or ``[H, W, 3]``, uint8)."""
    from PIL import Image

    write_atomically(path, lambda part: Image.fromarray(np.asarray(picture)).save(part, optimize=True))
