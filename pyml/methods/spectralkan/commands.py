"""The options of ``pyml train spectralkan`` and ``pyml predict spectralkan``."""

from pathlib import Path
from typing import Annotated, Any

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option
from pyml.methods._recipe import require

Text = str | None
NET, MADE = "Network", "Generated scene (used when no data is given)"

Before = Annotated[Text, option("First date: ENVI, .tif, .mat, .npz or .npy; FILE:NAME picks one array.", DATA)]
After = Annotated[Text, option("Second date, same size and bands.", DATA)]
Axes = Annotated[
    str, option("Order of the axes in .mat, .npz, .npy and TIFF pages, which do not say it: hwc, chw or auto.", DATA)
]


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

    Without data, a generated scene is used. Works under torchrun too, and on GPUs under accelerate launch.
    """
    given = dict(locals())
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
    shared.check_out(out, resume, options)
    scene = _scene(given)
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
    from pyml.methods.spectralkan.readers import files_of

    if out.suffix.lower() not in prediction.SUFFIXES:
        raise UserError(f"out: expected a name ending in {', '.join(prediction.SUFFIXES)}, got {out.name}")
    shared.check_file(out, reads={"checkpoint": checkpoint})
    for name, source in (("before", before), ("after", after)):
        for path in files_of(source, name):
            shared.check_file(out, reads={name: path})
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


FILES = ("before", "after", "labels")
MASKS = ("unchanged", "changed_value", "unchanged_value")  # what the labels mean


def _scene(given: dict[str, Any]) -> Any:
    """The scene that the options of `train` name, or a generated one; options without effect are refused."""
    from pyml.methods.spectralkan import data
    from pyml.methods.spectralkan.readers import AXES

    dropped = data.parse_bands(given["drop_bands"])
    require("axes", given["axes"], AXES)
    before, after, labels = (given[name] for name in FILES)
    unchanged, *values = (given[name] for name in MASKS)
    preset, folder = given["preset"], given["data_dir"]
    if preset is None:
        shared.refuse_unused(train, given, ["data_dir"], "--preset too")
    else:
        if folder is None:
            raise UserError("preset: expected --data-dir too, the folder of its files")
        shared.refuse_unused(train, given, [*FILES, *MASKS], "to be left out beside --preset, which says it")
        files = data.preset_files(preset, folder)
        before, after, labels, values = files.before, files.after, files.labels, [files.changed, files.unchanged]
    if before is None and after is None and labels is None:
        shared.refuse_unused(train, given, [*MASKS, "axes", "drop_bands"], "--before, --after and --labels too")
        from pyml.methods.spectralkan.scene import generate_scene

        height, width = given["scene_size"]
        return generate_scene(height, width, given["scene_bands"], given["scene_seed"])
    missing = [f"--{name}" for name, value in zip(FILES, (before, after, labels)) if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)}: expected too, as some data is given")
    shared.refuse_unused(train, given, ["scene_size", "scene_bands", "scene_seed"], "no data beside it")
    first, second = data.load_pair(before, after, given["axes"], dropped)
    truth = data.load_labels(labels, (first.shape[1], first.shape[2]), unchanged, (values[0], values[1]))
    return data.Scene(first, second, truth, preset or Path(before).stem, dropped)


def _widths(text: str) -> tuple[int, ...]:
    from pyml.methods.spectralkan.data import whole_number

    widths = [whole_number(part.strip()) for part in text.strip("() ").split(",") if part.strip()]
    if None in widths:
        raise UserError(f"spectral-hidden: expected widths such as 16 or 32,16, got {text!r}")
    return tuple(width for width in widths if width is not None)
