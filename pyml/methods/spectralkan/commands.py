"""The options of ``pyml train spectralkan`` and ``pyml predict spectralkan``."""

from pathlib import Path
from typing import Annotated, Any

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option

Text = str | None
NET, MADE = "Network", "Generated scene (used when no data is given)"

Before = Annotated[Text, option("First date: ENVI, .tif, .mat, .npz or .npy; FILE:NAME picks one array.", DATA)]
After = Annotated[Text, option("Second date, same size and bands.", DATA)]
Axes = Annotated[str, option("Order of the axes in the files: hwc, chw, or auto (what the format says).", DATA)]


def train(
    before: Before = None,
    after: After = None,
    labels: Annotated[Text, option("Mask of changed pixels, or of all labels; also BMP and PNG.", DATA)] = None,
    unchanged: Annotated[Text, option("Second mask, nonzero where a pixel is known to be unchanged.", DATA)] = None,
    changed_value: Annotated[
        int | None, option("Mask value of changed pixels. Default: the one value beside --unchanged-value.", DATA)
    ] = None,
    unchanged_value: Annotated[
        int | None, option("Mask value of unchanged pixels; other values are unlabelled. Default: 0.", DATA)
    ] = None,
    preset: Annotated[
        Text, option("A public scene: farmland, river, usa, bay-area or santa-barbara; needs --data-dir.", DATA)
    ] = None,
    data_dir: Annotated[Path | None, option("Folder with the files of --preset.", DATA)] = None,
    axes: Axes = "auto",
    drop_bands: Annotated[str, option("Bands to leave out, counted from 0, such as 0-3,7.", DATA)] = "",
    scene_size: Annotated[tuple[int, int], option("Height and width.", MADE)] = (128, 128),
    scene_bands: Annotated[int, option("Number of bands.", MADE, min=2)] = 64,
    scene_seed: Annotated[int, option("Seed of the scene; the same seed gives the same scene.", MADE, min=0)] = 0,
    arch: Annotated[
        str,
        option("spectralkan, wkan, kan, mtsf-kan, cnn, transformer; several with commas, or all (same splits).", NET),
    ] = "spectralkan",
    spectral_hidden: Annotated[
        str, option("Hidden widths of SpectralKAN's spectral part; 16 gives the paper's counts. Default: none.", NET)
    ] = "",
    patch_size: Annotated[int, option("Side of the patch around a pixel, odd.", NET, min=1)] = 5,
    border: Annotated[
        str, option("Beyond the image: symmetric, reflect, replicate or zeros; prediction uses the same.", NET)
    ] = "symmetric",
    knots: Annotated[
        str,
        option("First spline layer's knots: data (quantiles of the training pixels) or uniform (public code).", NET),
    ] = "data",
    extrapolation: Annotated[
        str, option("Splines beyond their knots: linear, clamp, or zero (public code).", NET)
    ] = "linear",
    train_fraction: Annotated[float, option("Share of each class's labelled pixels to train on.", TRAIN)] = 0.01,
    split: Annotated[str, option("random, or block (training and test regions share no pixel).", TRAIN)] = "random",
    block_size: Annotated[int, option("Side of the squares of --split block, in pixels.", TRAIN, min=1)] = 32,
    seeds: shared.Seeds = 5,
    first_seed: shared.FirstSeed = 0,
    epochs: Annotated[int, option("Passes over the training pixels.", TRAIN, min=1)] = 200,
    batch_size: Annotated[int, option("Pixels a step, over all processes.", TRAIN, min=1)] = 64,
    learning_rate: Annotated[float, option("Adam's learning rate; times 0.9 every 10 epochs.", TRAIN)] = 1e-3,
    out: shared.Out = None,
    resume: shared.Resume = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.QuietRun = False,
) -> None:
    """Train SpectralKAN (arXiv 2407.00949) to find what changed between two hyperspectral images.

    Without data, a generated scene is used. Works under accelerate launch too.
    """
    from pyml.methods.spectralkan import train as training
    from pyml.methods.spectralkan.archs import ARCHS
    from pyml.methods.spectralkan.report import TABLES

    shared.set_threads(threads)
    options = training.Options(
        archs=shared.names(arch, tuple(ARCHS)), spectral_hidden=_widths(spectral_hidden), patch_size=patch_size,
        border=border, knots=knots, extrapolation=extrapolation, train_fraction=train_fraction, split=split,
        block_size=block_size, seeds=seeds, first_seed=first_seed, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate,
    )  # fmt: skip
    options.check()
    scene = _scene(
        before, after, labels, unchanged, (changed_value, unchanged_value), preset, data_dir, axes, drop_bands,
        (*scene_size, scene_bands, scene_seed),
    )  # fmt: skip
    shared.train_and_show(
        "spectralkan", training.train, scene, options, TABLES, out=out, resume=resume, device=device, quiet=quiet
    )


def predict(
    checkpoint: Annotated[Path, option("checkpoint.safetensors of a run of pyml train spectralkan.", DATA)],
    before: Annotated[str, option("First date: ENVI, .tif, .mat, .npz or .npy; FILE:NAME picks one array.", DATA)],
    after: Annotated[str, option("Second date, same size and bands.", DATA)],
    out: Annotated[Path, option("Change map to write: .png, .bmp (0 and 255), .npy or .tif (0 and 1).")],
    axes: Axes = "auto",
    scale: Annotated[
        str, option("Scale bands by the range of this pair (pair), or by the one seen in training (training).", DATA)
    ] = "pair",
    tile_rows: Annotated[int | None, option("Image rows mapped at a time. Default: by memory.", min=1)] = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Map the changes between two images of any size with a trained network."""
    import time

    from rich.console import Console

    from pyml.methods.spectralkan import predict as prediction

    if out.suffix.lower() not in prediction.SUFFIXES:
        raise UserError(f"out: expected a name ending in {', '.join(prediction.SUFFIXES)}, got {out.name}")
    if out.is_dir():
        raise UserError(f"out: expected a file, got the folder {out}")
    shared.check_folder(out.parent)
    device = shared.choose_device(device)
    shared.set_threads(threads)
    start = time.perf_counter()
    found = prediction.predict_files(
        checkpoint, before, after, axes=axes, scale=scale, device=device, tile_rows=tile_rows
    )
    prediction.save_labels(found, out)
    if not quiet:
        changed = int(found.sum())
        Console().print(
            f"{out}: {found.shape[0]} x {found.shape[1]} pixels, {changed} changed ({changed / found.numel():.1%}), "
            f"{time.perf_counter() - start:.1f} s with reading and writing"
        )


def _scene(
    before: Text,
    after: Text,
    labels: Text,
    unchanged: Text,
    values: tuple[int | None, int | None],
    preset: Text,
    data_dir: Path | None,
    axes: str,
    drop_bands: str,
    made: tuple[int, int, int, int],
) -> Any:
    from pyml.methods.spectralkan import data

    dropped = data.parse_bands(drop_bands)
    if axes not in ("auto", "hwc", "chw"):
        raise UserError(f"axes: expected auto, hwc or chw, got {axes!r}")
    name = preset
    if preset is not None:
        if data_dir is None or before or after or labels:
            raise UserError("preset: expected --data-dir, and no --before, --after or --labels")
        files = data.preset_files(preset, data_dir)
        before, after, labels, values = files.before, files.after, files.labels, (files.changed, files.unchanged)
    if before is None and after is None and labels is None:
        if data_dir is not None or unchanged is not None or dropped:
            raise UserError(
                "before: expected --before, --after and --labels, or --preset, beside the other data options"
            )
        from pyml.methods.spectralkan.scene import generate_scene

        return generate_scene(*made)
    if before is None or after is None or labels is None:
        missing = [f"--{n}" for n, v in (("before", before), ("after", after), ("labels", labels)) if v is None]
        raise UserError(f"{' and '.join(missing)}: expected too, as some data is given")
    first, second = data.load_pair(before, after, axes, dropped)
    truth = data.load_labels(labels, (first.shape[1], first.shape[2]), unchanged, values)
    return data.Scene(first, second, truth, name or Path(before).stem, dropped)


def _widths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.strip("() ").split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"spectral-hidden: expected widths such as 16 or 32,16, got {text!r}")
    return tuple(int(part) for part in parts)
