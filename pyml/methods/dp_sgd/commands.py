"""The options of ``pyml train dp_sgd`` and ``pyml predict dp_sgd``."""

from pathlib import Path
from typing import Annotated

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option

PRIVACY, GUIDE, CLIENTS = "Privacy", "Guide", "Federated"


def train(
    data: Annotated[
        Path | None, option("Folder with MNIST's four idx files, gzipped or not. Default: scikit-learn's digits.", DATA)
    ] = None,
    public_fraction: Annotated[float, option("Share of the records set aside as public, for every arm.", DATA)] = 0.1,
    valid_fraction: Annotated[float, option("Share of the records to choose rates and clip norms by.", DATA)] = 0.15,
    test_fraction: Annotated[float, option("Share of the records to test on, without --data.", DATA)] = 0.2,
    split_seed: Annotated[int, option("Seed of these splits, the same for every arm and seed.", DATA, min=0)] = 0,
    epsilon: Annotated[str, option("Provable epsilon of a whole training; several with commas.", PRIVACY)] = "1,3",
    delta: Annotated[float, option("Delta of a whole training.", PRIVACY)] = 1e-5,
    private: Annotated[
        bool, option("Secret noise and batches; without it they follow from the seed.", PRIVACY, "--private")
    ] = False,
    arms: Annotated[
        str,
        option(
            "non-private, isotropic, l2, whitened, whitened-permuted, group, parameters, parameters-permuted, iterate, "
            "iterate-permuted; several with commas, or all.",
            TRAIN,
        ),
    ] = "all",
    learning_rate: Annotated[str, option("SGD's rates to choose from, with commas.", TRAIN)] = "0.125,0.2,0.32",
    clip: Annotated[str, option("Clip norms to choose from. One rate and one norm: no choice.", TRAIN)] = "0.1,0.4,1.6",
    momentum: Annotated[
        float | None, option("Momentum of the noisy steps. Default: 0.9; 0 with --federated.", TRAIN)
    ] = None,
    seeds: shared.Seeds = 5,
    first_seed: shared.FirstSeed = 0,
    epochs: Annotated[int, option("Epochs; each draws as many records as there are, on average.", TRAIN, min=1)] = 30,
    batch_size: Annotated[int, option("Expected records of a Poisson batch.", TRAIN, min=1)] = 256,
    guide: Annotated[
        Path | None, option("Model of an earlier run, for the arms parameters. Default: trained first.", GUIDE)
    ] = None,
    guide_provenance: Annotated[
        str | None, option("public (other records), or dp:EPSILON:DELTA that it spent on these.", GUIDE)
    ] = None,
    guide_share: Annotated[float, option("Share of epsilon that a guide trained first alone spends.", GUIDE)] = 0.3,
    guide_epochs: Annotated[int, option("Its epochs; 0: a third.", GUIDE, min=0)] = 0,
    federated: Annotated[int, option("Clients to simulate; epsilon is then of a client. 0: none.", CLIENTS, min=0)] = 0,
    client_share: Annotated[float, option("Chance of a client to be in a round.", CLIENTS)] = 0.5,
    client_rate: Annotated[float, option("Learning rate of the clients.", CLIENTS)] = 0.5,
    client_passes: Annotated[int, option("Passes of a client over its records in a round.", CLIENTS, min=1)] = 1,
    client_batch: Annotated[int, option("Records of a client's step.", CLIENTS, min=1)] = 16,
    out: shared.Out = None,
    resume: shared.Resume = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.QuietRun = False,
) -> None:
    """Train with DP-SGD and noise that differs from element to element, against isotropic noise of the same epsilon.

    Every arm spends the same provable epsilon, its guide included. Motivated by DP-Hero (arXiv 2409.03344).
    """
    given = dict(locals())
    from pyml.methods._recipe import SHARE, Rule, require
    from pyml.methods.dp_sgd import data as records
    from pyml.methods.dp_sgd import train as training
    from pyml.methods.dp_sgd.arms import ARMS
    from pyml.methods.dp_sgd.report import TABLES

    shared.set_threads(threads)
    options = training.Options(
        arms=shared.names(arms, tuple(ARMS)), epsilons=_numbers("epsilon", epsilon), delta=delta, private=private,
        learning_rates=_numbers("learning-rate", learning_rate), clips=_numbers("clip", clip), seeds=seeds,
        first_seed=first_seed, epochs=epochs, batch_size=batch_size, guide_share=guide_share,
        guide_epochs=guide_epochs, federated=federated, client_share=client_share, learning_rate=client_rate,
        client_passes=client_passes, client_batch=client_batch, split_seed=split_seed, momentum=momentum,
    )  # fmt: skip
    options.check()
    require("public-fraction", public_fraction, Rule("from 0 to below 1", lambda value: 0 <= value < 1))
    require("valid-fraction", valid_fraction, SHARE)
    require("test-fraction", test_fraction, SHARE)
    if not federated:
        names = ["client_share", "client_rate", "client_passes", "client_batch"]
        shared.refuse_unused(train, given, names, "--federated too")
    else:
        shared.refuse_unused(train, given, ["batch_size"], "no --federated, where --client-share says it")
    if (guide is None) != (guide_provenance is None):
        missing = "guide" if guide is None else "guide-provenance"
        raise UserError(f"{missing}: expected too, as the other of --guide and --guide-provenance is given")
    if guide is not None:
        shared.refuse_unused(train, given, ["guide_share", "guide_epochs"], "no --guide beside it")
    if data is not None:
        shared.refuse_unused(train, given, ["test_fraction"], "no --data, whose files have a test part")
    name = "digits" if data is None else data.name
    whole, test = (records.load_digits(), None) if data is None else records.load_idx_folder(data)
    task = records.split(
        name, whole, test, public=public_fraction, valid=valid_fraction, test_share=test_fraction, seed=split_seed
    )
    if private:
        shared.warn(
            "epsilon covers model.safetensors of each seed alone: scores, logs and the choice of rates are made of the "
            "records without noise, and checkpoints hold the key of the noise"
        )

    def run(task: records.Task, options: training.Options, folder: Path, **rest: object) -> dict[str, object]:
        source = None if guide is None or guide_provenance is None else (guide, guide_provenance)
        return training.train(task, options, folder, guide=source, **rest)  # type: ignore[arg-type]

    shared.train_and_show(
        "dp_sgd", run, task, options, TABLES, out=out, resume=resume, device=device, quiet=quiet
    )  # fmt: skip


def predict(
    checkpoint: Annotated[Path, option("model.safetensors of a run of pyml train dp_sgd.", DATA)],
    input: Annotated[Path, option("idx file of images of bytes 0 to 255, gzipped or not.", DATA)],
    out: Annotated[Path, option("CSV file to write: index, class, probability.")],
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Tell the classes of images with a trained network."""
    import time

    from rich.console import Console

    from pyml.methods.dp_sgd.predict import predict_file, write_csv

    shared.check_file(out, reads={"checkpoint": checkpoint, "input": input})
    device = shared.choose_device(device)
    shared.set_threads(threads)
    start = time.perf_counter()
    found = predict_file(checkpoint, input, device)
    write_csv(found, out)
    spent = time.perf_counter() - start
    Console(quiet=quiet, soft_wrap=True, highlight=False).print(
        f"{out}: {shared.plural(len(found), 'image')}, {spent:.1f} s"
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{name}: expected numbers with commas, such as 1,3, got {text!r}") from None
