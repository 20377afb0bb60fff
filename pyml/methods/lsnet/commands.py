"""The options of ``pyml train lsnet`` and ``pyml predict lsnet``."""

from pathlib import Path
from typing import Annotated

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option

MADE = "Generated pairs (used when no data is given)"


def train(
    input: Annotated[Path | None, option("Folder of degraded images.", DATA)] = None,
    target: Annotated[Path | None, option("Folder of their targets, with the same names.", DATA)] = None,
    size: Annotated[int, option("Resize to a square of this side (bicubic); 0 keeps the sizes.", DATA, min=0)] = 256,
    test_fraction: Annotated[float, option("Share of the pairs to test on.", DATA)] = 0.25,
    split_seed: Annotated[int, option("Seed of the split, the same for every arch and seed.", DATA, min=0)] = 0,
    made_pairs: Annotated[int, option("Number of pairs.", MADE, min=2)] = 28,
    made_size: Annotated[int, option("Side of their images.", MADE, min=32)] = 160,
    made_seed: Annotated[int, option("Seed of the pairs; the same seed gives the same pairs.", MADE, min=0)] = 0,
    arch: Annotated[
        str,
        option("lsnet, lsnet-fixed, dense, identity, affine, raw; several with commas, or all (same split).", TRAIN),
    ] = "lsnet",
    crop_size: Annotated[int, option("Side of the random crops, even.", TRAIN, min=2)] = 128,
    seeds: shared.Seeds = 1,
    first_seed: shared.FirstSeed = 0,
    epochs: Annotated[int, option("Epochs; each takes one crop of every training pair.", TRAIN, min=1)] = 20,
    batch_size: Annotated[int, option("Crops a step, over all processes.", TRAIN, min=1)] = 4,
    learning_rate: Annotated[float, option("Adam's learning rate at the start; a cosine takes it to 0.", TRAIN)] = 5e-3,
    ssim_weight: Annotated[float, option("Weight of 1 - SSIM beside the L1 loss.", TRAIN)] = 0.2,
    ema: Annotated[float, option("Decay of an average of the weights that is used in the end; 0: none.", TRAIN)] = 0.0,
    validate_every: Annotated[int, option("Score the test images every so many epochs; 0: at the end.", TRAIN)] = 1,
    out: shared.Out = None,
    resume: shared.Resume = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.QuietRun = False,
) -> None:
    """Train LSNet (arXiv 2405.16197) to restore underwater images, on pairs of images.

    Without data, photographs are put under generated water. Works under torchrun too, and on GPUs under
    accelerate launch.
    """
    given = dict(locals())
    from pyml.methods.lsnet import train as training
    from pyml.methods.lsnet.archs import ARCHS
    from pyml.methods.lsnet.data import load_pairs
    from pyml.methods.lsnet.formation import generate_pairs
    from pyml.methods.lsnet.report import TABLES

    shared.set_threads(threads)
    options = training.Options(
        archs=shared.names(arch, ARCHS), crop_size=crop_size, test_fraction=test_fraction, split_seed=split_seed,
        seeds=seeds, first_seed=first_seed, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        ssim_weight=ssim_weight, ema=ema, validate_every=validate_every,
    )  # fmt: skip
    options.check()
    shared.check_out(out, resume, options)
    if (input is None) != (target is None):
        raise UserError(f"{'--input' if input is None else '--target'}: expected too, as some data is given")
    if size % 2:
        raise UserError(f"size: expected an even number, got {size}")
    if input is not None and target is not None:
        shared.refuse_unused(train, given, ["made_pairs", "made_size", "made_seed"], "no --input beside it")
        pairs, notes = load_pairs(input, target, size or None)
        for sentence in notes:
            shared.warn(sentence)
    else:
        shared.refuse_unused(train, given, ["size"], "--input and --target too")
        pairs = generate_pairs(made_pairs, made_size, made_seed)
    shared.train_and_show(
        "lsnet", training.train, pairs, options, TABLES, out=out, resume=resume, device=device, quiet=quiet
    )


def predict(
    checkpoint: Annotated[Path, option("checkpoint.safetensors of pyml train lsnet, or public weights.", DATA)],
    input: Annotated[Path, option("A picture, or a folder of pictures of any size.", DATA)],
    out: Annotated[Path, option("Folder for the results: one PNG a picture, with its name.")],
    maps: Annotated[
        bool, option("Also write the compensate and the exposed term as pictures, both on one scale.", None, "--maps")
    ] = False,
    size: Annotated[int, option("Resize to a square of this side first (bicubic); 0: as they are.", DATA, min=0)] = 0,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Restore pictures with a trained network. A picture that cannot be read is named, and the others go on."""
    import time

    from rich.console import Console

    from pyml.methods.lsnet.predict import predict_files

    device = shared.choose_device(device)
    shared.set_threads(threads)
    console = Console(quiet=quiet, soft_wrap=True, highlight=False)
    start, done, failed = time.perf_counter(), 0, 0
    for outcome in predict_files(checkpoint, input, out, maps=maps, size=size or None, device=device):
        if outcome.error is not None:
            shared.warn(outcome.error)
            failed += 1
            continue
        done += 1
        scale = "" if outcome.range is None else f" (maps: black {outcome.range[0]:.3f}, white {outcome.range[1]:.3f})"
        console.print(f"{outcome.written[0]}{scale}")
    if not done:
        raise UserError(f"input: no picture of {input} could be restored")
    console.print(f"{shared.plural(done, 'picture')}, {failed} left out, {time.perf_counter() - start:.1f} s")
