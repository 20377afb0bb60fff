"""Image and mask files -> NumPy arrays: ENVI, GeoTIFF, MATLAB v5 and v7.3, npz, BMP and PNG.

A file that holds several arrays is read as ``FILE:NAME`` (``scene.mat:T1``). Every error is one sentence.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyml.methods import UserError, first_line
from pyml.methods._recipe import Rule, require

Array = np.ndarray[Any, Any]
MASK_SUFFIXES = (".bmp", ".png", ".gif", ".jpg", ".jpeg")
AXES = Rule("auto, hwc or chw", ("auto", "hwc", "chw").__contains__)


class Stored(NamedTuple):
    """An array as it lies in its file."""

    array: Array
    order: str  # of its axes, "hwc" or "chw": what the file says, or what such files mostly are
    said: bool  # the file says it


def read_image(source: str, what: str = "image", axes: str = "auto") -> Array:
    """Read a multi-band image.

    Args:
        source: a path, or ``path:name`` for one array of a MATLAB or npz file.
        what: how messages call it ("before", "after").
        axes: ``"hwc"`` or ``"chw"``: the order of the axes in a file that does not say it; ``"auto"``: height, width,
            bands in MATLAB, npz and npy files, pages of a TIFF as bands. An array of two axes is one band.

    Returns:
        ``[bands, height, width]`` in the dtype of the file.

    Raises:
        UserError: no such file or array, broken, not numbers of three axes; ``axes`` for a file that says its own.
    """
    require("axes", axes, AXES)
    array, order, said = _read(source, what, 3)
    if said and axes != "auto":
        raise UserError(f"axes: expected auto for {source}, whose format says where its bands are, got {axes!r}")
    if array.ndim == 2:
        array, axes = array[None], "chw"
    if array.ndim != 3:
        raise UserError(f"{what}: {source} holds shape {list(array.shape)}, expected height, width and bands")
    if array.dtype.kind not in "uif":
        raise UserError(f"{what}: {source} holds {array.dtype} values, expected integers or real numbers")
    if (axes if axes != "auto" else order) == "hwc":
        array = np.moveaxis(array, 2, 0)
    return np.ascontiguousarray(array)


def read_mask(source: str, what: str = "labels") -> Array:
    """Read a label mask -> ``[height, width]`` in the dtype of the file (a colour image must be grey)."""
    path, name = split_source(source, what)
    if name is None and path.suffix.lower() in MASK_SUFFIXES:
        array = _open(path, what, _read_picture)
    else:
        array, order, _ = _read(source, what, 2)
        if array.ndim == 3 and array.shape[0 if order == "chw" else 2] == 1:
            array = array.squeeze(0 if order == "chw" else 2)
    if array.ndim == 3 and array.shape[2] >= 3 and (array[..., :1] == array[..., :3]).all():
        array = array[..., 0]
    if array.ndim != 2:
        raise UserError(f"{what}: {source} holds an array of shape {list(array.shape)}, expected height and width")
    if array.dtype.kind not in "uifb":
        raise UserError(f"{what}: {source} holds {array.dtype} values, expected numbers")
    return array


def split_source(source: str, what: str) -> tuple[Path, str | None]:
    """``path`` or ``path:name`` -> the existing path and the array name."""
    path = Path(source)
    if path.exists():
        if path.is_dir():
            raise UserError(f"{what}: {path} is a folder, expected a file")
        return path, None
    head, colon, name = source.rpartition(":")
    if colon and Path(head).is_file():
        return Path(head), name
    raise UserError(f"{what}: no file {source}")


def files_of(source: str, what: str) -> list[Path]:
    """The files that a source is read from: an ENVI image has two."""
    path, _ = split_source(source, what)
    header = _envi_header(path)
    data = None if header is None else _envi_data(header)
    return [found for found in (path, header, data) if found is not None]


def _read(source: str, what: str, dims: int) -> Stored:
    """One array of any supported file."""
    path, name = split_source(source, what)
    suffix = path.suffix.lower()
    if suffix in (".mat", ".npz"):
        arrays = _open(path, what, _mat_arrays if suffix == ".mat" else _npz_arrays)
        return Stored(_choose(arrays, name, dims, path, what), "hwc", said=False)
    if name is not None:
        raise UserError(f"{what}: {path} holds one array, so {name!r} cannot be chosen from it")
    if suffix == ".npy":
        return Stored(_open(path, what, lambda p: np.load(p, allow_pickle=False)), "hwc", said=False)
    if suffix in (".tif", ".tiff"):
        tiff: Stored = _open(path, what, _read_tiff)
        return tiff
    if suffix in MASK_SUFFIXES:
        return Stored(_open(path, what, _read_picture), "hwc", said=True)
    header = _envi_header(path)
    if header is None:
        raise UserError(
            f"{what}: {path} has no known format: expected ENVI (a .hdr beside it), .tif, .mat, .npz, .npy, .bmp, .png"
        )
    return Stored(_read_envi(path, header, what), "hwc", said=True)


def _open(path: Path, what: str, reader: Callable[[Path], Any]) -> Any:
    """Call a library's reader; whatever it raises on a broken file becomes one sentence."""
    try:
        return reader(path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what}: {path.name} needs a missing package ({error}): install pyml[train]") from error
    except Exception as error:  # libraries raise anything from KeyError to struct.error on truncated files
        raise UserError(f"{what}: {path} cannot be read, it may be truncated ({first_line(error)})") from error


def _choose(arrays: dict[str, Array], name: str | None, dims: int, path: Path, what: str) -> Array:
    listing = ", ".join(f"{key} {list(a.shape)}" for key, a in arrays.items()) or "none"
    if name is not None:
        if name not in arrays:
            raise UserError(f"{what}: {path} holds no array {name!r}; it holds: {listing}")
        return arrays[name]
    fitting = [key for key, a in arrays.items() if a.ndim == dims]
    if len(fitting) != 1:
        raise UserError(f"{what}: name the array of {path} as {path.name}:NAME; it holds: {listing}")
    return arrays[fitting[0]]


def _npz_arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _mat_arrays(path: Path) -> dict[str, Array]:
    import h5py

    if h5py.is_hdf5(path):  # MATLAB v7.3 is HDF5, written column-major: the axes come out reversed
        with h5py.File(path) as file:
            found: dict[str, Array] = {}

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset) and item.dtype.kind in "uif" and not name.startswith("#"):
                    found[name] = item[()].T

            file.visititems(visit)
            return found
    from scipy.io import loadmat

    return {
        name: value
        for name, value in loadmat(path).items()
        if not name.startswith("__") and isinstance(value, np.ndarray) and value.dtype.kind in "uifb"
    }


def _read_tiff(path: Path) -> Stored:
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        array, axes = series.asarray(), series.axes
    bands = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if array.ndim != 3 or len(bands) != 1:
        return Stored(array, "hwc", said=False)
    if axes[bands[0]] in "SC" or bands[0] == 1:  # samples of a pixel, channels; bands between rows and columns
        return Stored(np.moveaxis(array, bands[0], 0), "chw", said=True)
    return Stored(array, "chw" if bands[0] == 0 else "hwc", said=False)  # a page a band, unless told otherwise


def _read_picture(path: Path) -> Array:
    from PIL import Image

    with Image.open(path) as picture:
        return np.array(picture)  # loads every pixel: a truncated file raises here


def _envi_header(path: Path) -> Path | None:
    if path.suffix.lower() == ".hdr":
        return path
    for candidate in (path.with_name(path.name + ext) for ext in (".hdr", ".HDR")):
        if candidate.exists():
            return candidate
    for ext in (".hdr", ".HDR"):
        if path.suffix and path.with_suffix(ext).exists():
            return path.with_suffix(ext)
    return None


def _envi_data(header: Path) -> Path | None:
    stem = header.with_suffix("")
    for ext in ("", ".img", ".dat", ".raw", ".bsq", ".bil", ".bip", ".IMG", ".DAT"):
        candidate = stem.with_name(stem.name + ext)
        if candidate.is_file():
            return candidate
    return None


def _read_envi(path: Path, header: Path, what: str) -> Array:
    data = path if path != header else _envi_data(header)
    if data is None:
        raise UserError(f"{what}: no data file beside the ENVI header {header}")

    def read(_: Path) -> Array:
        import spectral.io.envi as envi

        image = envi.open(str(header), str(data))
        expected = image.offset + math.prod(image.shape) * np.dtype(image.dtype).itemsize
        size = data.stat().st_size
        if size < expected:
            raise UserError(
                f"{what}: {data} is truncated: {' x '.join(map(str, image.shape))} need {expected} bytes, got {size}"
            )
        return np.array(image.open_memmap(interleave="bip"))

    array: Array = _open(header, what, read)
    return array
