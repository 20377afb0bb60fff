"""The options of ``pyml train enla`` and ``pyml predict enla``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option

if TYPE_CHECKING:
    from pyml.methods.enla.clip import Clip
    from pyml.methods.enla.data import Tasks

MADE, NET = "Drawn images and the tiny CLIP (used when no --data is given)", "Prompts and transport"


def train(
    clip: Annotated[Path | None, option("Folder of a transformers CLIPModel; nothing is downloaded.", DATA)] = None,
    data: Annotated[
        Path | None, option("Folder of images: one folder a class, or train and test with the same classes.", DATA)
    ] = None,
    split_file: Annotated[
        Path | None, option("CoOp's split_zhou_<Dataset>.json; its paths are below --data.", DATA)
    ] = None,
    class_names: Annotated[
        Path | None, option("Lines 'folder class name'. Default: the names of the folders.", DATA)
    ] = None,
    templates: Annotated[
        Path | None, option("File with a text a line, {} for the class name. Default: a photo of a {}.", DATA)
    ] = None,
    test_fraction: Annotated[float, option("Share of each class to test on, where the data has no split.", DATA)] = 0.5,
    split_seed: Annotated[int, option("Seed of that split, the same for every arm and seed.", DATA, min=0)] = 0,
    task: Annotated[
        str, option("base2novel, fewshot, crossdata or domain (the last two score --eval-data too).", DATA)
    ] = "base2novel",
    eval_data: Annotated[
        list[str] | None, option("Folder to score on, or FOLDER:SPLIT.json; can be given several times.", DATA)
    ] = None,
    shots: Annotated[int, option("Training images of a class, drawn anew for every seed.", DATA, min=1)] = 16,
    drawn: Annotated[str, option("shapes (one object an image) or pairs (two, a class is both).", MADE)] = "shapes",
    drawn_shift: Annotated[
        float | None,
        option("How far from what the tiny CLIP saw, 0 to 1. Default: 0.5 (shapes), 0.65 (pairs).", MADE),
    ] = None,
    drawn_seed: Annotated[int, option("Seed of the images; the same seed gives the same images.", MADE, min=0)] = 0,
    tiny_steps: Annotated[
        int | None, option("Steps of the tiny CLIP's pre-training, which is kept in the cache. Default: 800.", MADE)
    ] = None,
    arms: Annotated[
        str,
        option(
            "zero-shot, coop, enla, enla-ot-loss, enla-no-ot, enla-no-strengthening, enla-no-visual; several with "
            "commas, or all (same images).",
            TRAIN,
        ),
    ] = "all",
    seeds: shared.Seeds = 3,
    first_seed: shared.FirstSeed = 1,
    epochs: Annotated[int, option("Passes over the training images.", TRAIN, min=1)] = 20,
    batch_size: Annotated[int, option("Images a step, over all processes.", TRAIN, min=1)] = 32,
    optimizer: Annotated[str, option("adamw or sgd (momentum 0.9).", TRAIN)] = "adamw",
    learning_rate: Annotated[float, option("Its rate after the warm-up; a cosine takes it to 0.", TRAIN)] = 2e-3,
    context_rate: Annotated[float, option("The same for the arm coop.", TRAIN)] = 2e-3,
    warmup_epochs: Annotated[int, option("Epochs in which the rate rises.", TRAIN, min=0)] = 1,
    weight_decay: Annotated[float, option("Weight decay.", TRAIN)] = 5e-4,
    prompts: Annotated[int, option("Visual prompts of a layer.", NET, min=1)] = 4,
    depth: Annotated[int, option("Layers with visual prompts, from the first on; 0: all.", NET, min=0)] = 0,
    hidden: Annotated[int, option("Width of the external layer; 0: a quarter of the features.", NET, min=0)] = 0,
    ot_weight: Annotated[float, option("Weight of the transport, as logit or as loss.", NET)] = 1.0,
    eps: Annotated[float, option("Regularisation of the transport; PLOT has 0.1.", NET)] = 0.1,
    iterations: Annotated[int, option("Sinkhorn iterations; PLOT has at most 100.", NET, min=1)] = 100,
    plan_grad: Annotated[str, option("detach (the plan is a constant, as in PLOT) or implicit.", NET)] = "detach",
    out: shared.Out = None,
    resume: shared.Resume = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.QuietRun = False,
) -> None:
    """Adapt a frozen CLIP with a few images a class: EnLa-style (arXiv 2407.19674), with PLOT's transport (2210.01253).

    Without --data, drawn shapes are used, and without --clip a tiny CLIP that is first trained on such shapes (some
    minutes, once). Works under torchrun too, and on GPUs under accelerate launch.
    """
    given = dict(locals())
    from pyml.methods._engine import make_accelerator
    from pyml.methods.enla import train as training
    from pyml.methods.enla.archs import ARMS
    from pyml.methods.enla.clip import load_clip, tiny_clip
    from pyml.methods.enla.demo import check_drawn, drawn_tasks
    from pyml.methods.enla.report import tables

    shared.set_threads(threads)
    options = training.Options(
        archs=shared.names(arms, ARMS), seeds=seeds, first_seed=first_seed, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, context_rate=context_rate, shots=shots, optimizer=optimizer,
        weight_decay=weight_decay, warmup_epochs=warmup_epochs, prompts=prompts, depth=depth, hidden=hidden,
        ot_weight=ot_weight, eps=eps, iterations=iterations, plan_grad=plan_grad,
    )  # fmt: skip
    options.check()
    if data is None:
        of_files = ("split_file", "class_names", "eval_data", "templates", "test_fraction", "split_seed")
        shared.refuse_unused(train, given, of_files, "--data too")
        check_drawn(drawn, task, shots, drawn_shift)
    elif clip is None:
        raise UserError("clip: expected --clip with --data, as the tiny CLIP knows drawn shapes only")
    else:
        shared.refuse_unused(train, given, ["drawn", "drawn_shift", "drawn_seed"], "no --data beside it")
        if split_file is not None:
            split = ("class_names", "test_fraction", "split_seed")
            shared.refuse_unused(train, given, split, "to be left out beside --split-file, which says it")
    if tiny_steps is not None and (clip is not None or tiny_steps < 1):
        raise UserError(f"tiny-steps: expected at least 1, and no --clip, got {tiny_steps}")
    shared.check_out(out, resume, options)
    make_accelerator(device)  # joins the other processes: who asks before that is told that it is alone
    frozen = tiny_clip(tiny_steps, shown=not quiet) if clip is None else load_clip(clip)
    if data is None:
        tasks = drawn_tasks(drawn, task, shots, frozen, shift=drawn_shift, seed=drawn_seed)
    else:
        how = {
            "split_file": split_file, "class_names": class_names, "test_fraction": test_fraction,
            "split_seed": split_seed,
        }  # fmt: skip
        tasks = _file_tasks(data, frozen, task, shots, templates, eval_data or [], options.seed_range, how, quiet)

    def run(tasks: "Tasks", options: Any, folder: Path, **rest: Any) -> dict[str, Any]:
        return train_arms(frozen, tasks, options, folder, **rest)

    shared.train_and_show(
        "enla", run, tasks, options, tables(tasks.facts), out=out, resume=resume, device=device, quiet=quiet
    )


def train_arms(
    clip: "Clip", tasks: "Tasks", options: Any, out: Path, *, resume: bool, device: str, quiet: bool
) -> dict[str, Any]:
    """Train every arm with every seed and score it, see `pyml.methods._sweep`; ``bars.png`` shows the table."""
    from accelerate import PartialState

    from pyml.methods._sweep import sweep
    from pyml.methods.enla.figures import save_bars
    from pyml.methods.enla.report import tables
    from pyml.methods.enla.train import check_arms, train_run

    check_arms(clip, tasks(options.first_seed), options)

    def go(arm: str, seed: int, folder: Path, accelerator: Any, report: Any) -> dict[str, Any]:
        return train_run(clip, tasks(seed), arm, seed, options, folder=folder, accelerator=accelerator, report=report)

    metrics = sweep(
        out, options, {"method": "enla", **tasks.facts, "clip": clip.source}, tables(tasks.facts), go,
        note=lambda values: f"loss {values['loss']:.3f} training images {values['accuracy']:.0f} %",
        resume=resume, device=device, quiet=quiet,
    )  # fmt: skip
    if PartialState().is_main_process:
        save_bars(metrics, out / "bars.png")
    return metrics


def predict(
    checkpoint: Annotated[Path, option("checkpoint.safetensors of a run of pyml train enla.", DATA)],
    input: Annotated[Path, option("A picture, or a folder of pictures.", DATA)],
    out: Annotated[Path, option("CSV file to write: file, class, probability.")],
    clip: Annotated[Path | None, option("Folder of the CLIP, where it has moved since the training.", DATA)] = None,
    classes: Annotated[
        Path | None, option("File with other class names, one a line. Default: those of the training.", DATA)
    ] = None,
    top: Annotated[int, option("So many classes a picture, the most probable first.", min=1)] = 1,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Tell the classes of pictures with a trained arm. A picture that cannot be read is named, and the others go on."""
    import time

    from rich.console import Console

    from pyml.methods.enla.data import read_lines
    from pyml.methods.enla.predict import Predictor, write_csv

    shared.check_file(out, reads={"checkpoint": checkpoint, "input": input, "classes": classes, "clip": clip})
    device = shared.choose_device(device)
    shared.set_threads(threads)
    names = None if classes is None else read_lines(classes, "classes")
    predictor = Predictor(checkpoint, clip, names, device, shown=not quiet)
    start, told = time.perf_counter(), []
    failed = 0
    for outcome in predictor.files(input, top):
        if outcome.error is None:
            told.append(outcome)
        else:
            shared.warn(outcome.error)
            failed += 1
    if not told:
        raise UserError(f"input: no picture of {input} could be read")
    write_csv(told, out)
    spent = time.perf_counter() - start
    Console(quiet=quiet, soft_wrap=True, highlight=False).print(
        f"{out}: {shared.plural(len(told), 'picture')}, {failed} left out, {spent:.1f} s"
    )


def _file_tasks(
    folder: Path, clip: "Clip", task: str, shots: int, templates: Path | None, targets: list[str], seeds: range,
    how: dict[str, Any], quiet: bool,
) -> "Tasks":  # fmt: skip
    """The tasks of image folders, after every picture that will be used was read once."""
    from accelerate import PartialState

    from pyml.methods._engine import progress
    from pyml.methods.enla.data import (
        Loader,
        check_pictures,
        data_checksum,
        load_data,
        load_target,
        make_tasks,
        open_file,
        read_lines,
    )

    texts = ["a photo of a {}."] if templates is None else read_lines(templates, "templates")
    load = Loader(open_file, clip.preprocess)
    source = load_data(folder, load, **how)
    others = [load_target(target, load, how["class_names"]) for target in targets]
    tasks = make_tasks(task, source, others, texts, shots)
    few = tasks.short_classes()
    if few:
        more = f" (and {len(few) - 1} more)" if len(few) > 1 else ""
        shared.warn(f"the class {few[0]!r} has fewer than {shots} training images{more}: all of them are used")
    splits = [*(tasks(seed).train for seed in seeds), *tasks.evals.values()]
    with progress(shown=PartialState().is_main_process and not quiet) as bar:
        line = bar.add_task("reading the pictures", total=sum(len(split) for split in splits), note="")
        check_pictures(splits, lambda: bar.advance(line))
    tasks.facts["data_checksum"] = data_checksum(splits)
    return tasks
