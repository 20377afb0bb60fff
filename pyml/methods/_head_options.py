"""The options that the commands of methods on heads share, and what these commands do with them."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import DATA, TRAIN, option

HEADS = "Heads"

Model = Annotated[
    Path | None,
    option(
        "Folder of a causal LM (safetensors) with its tokenizer; nothing is downloaded. Default: a tiny Llama.", DATA
    ),
]
Data = Annotated[
    Path | None,
    option("JSONL file to learn from and, in part, to be scored on: prompt, counterfactual, answer.", DATA),
]
Control = Annotated[
    list[Path] | None, option("JSONL file (prompt, answer) that should not change; can be given several times.", DATA)
]
Transfer = Annotated[Path | None, option("JSONL file of other data that nothing is learned from.", DATA)]
TrainShare = Annotated[float, option("Share of --data to learn from, drawn by the seed; the rest is scored.", DATA)]
Dtype = Annotated[str, option("Of the weights: float32 or bfloat16.", DATA)]
TinySteps = Annotated[int | None, option("Steps of the tiny Llama's pre-training, which is kept in the cache.", DATA)]
Epochs = Annotated[int | None, option("Passes over the training lines. Default: 40 without --model, else 3.", TRAIN)]
BatchSize = Annotated[int, option("Lines a step.", TRAIN, min=1)]
WeightDecay = Annotated[float, option("Weight decay of what is trained.", TRAIN)]
StopLoss = Annotated[float, option("The arms *-early end with the epoch whose training loss is below.", TRAIN)]
HeadCount = Annotated[int, option("How many heads are chosen; 0: as many as stay below 5 % of all.", HEADS, min=0)]
MlpCount = Annotated[int, option("How many whole MLPs are tuned beside the heads, by their scores.", HEADS, min=0)]
KeepPrefix = Annotated[
    bool,
    option("Tuned heads: run the layers below the lowest trained one once a line, and keep what they put out.", HEADS),
]
ScoreLines = Annotated[int, option("Lines to score heads and knockouts on, at most.", HEADS, min=1)]
Difference = Annotated[str, option("Of the metric: relative, or plain (where it may be near 0).", HEADS)]
Checkpoint = Annotated[Path, option("checkpoint.safetensors of a run of pyml train.", DATA)]
Prompts = Annotated[Path, option("JSONL file with a prompt a line.", DATA)]
Answers = Annotated[Path, option("JSONL file to write: the lines with their answers.")]
Moved = Annotated[Path | None, option("Folder of the model, where it has moved since the training.", DATA)]
Length = Annotated[int, option("Tokens of an answer, at most.", min=1)]


def arm_names(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The arms of ``--arms``; of all of them LoRA is left out where it cannot run."""
    from pyml.methods._head_arms import LORA, has_peft

    known = tuple(known)
    if text == "all" and not has_peft():
        known = tuple(name for name in known if not name.startswith(LORA))
    return shared.names(text, known)


def run_training(method: str, command: Callable[..., None], given: dict[str, Any], method_parts: Any) -> None:
    """What a training command does after its options were read.

    Args:
        command: the function whose options were ``given``.
        method_parts: ``Options``, ``ARMS``, ``DEMO``, ``FILES`` (defaults without and with a model), ``train``,
            ``tables`` and ``demo(seeds, train_share, steps, shown=...)``, the tasks without a model.
    """
    from pyml.methods._head_arms import PROJECTIONS
    from pyml.methods._head_data import Behaviour, file_tasks
    from pyml.methods._recipe import COUNT, SHARE, among, require

    shared.set_threads(given["threads"])
    model, share, quiet = given["model"], given["train_share"], given["quiet"]
    defaults = method_parts.DEMO if model is None else method_parts.FILES
    values = {field.name: given[field.name] for field in fields(method_parts.Options) if field.name in given}
    values = {name: defaults[name] if value is None else value for name, value in values.items()}
    values["projections"] = shared.names(given["projections"], PROJECTIONS)
    options = method_parts.Options(archs=arm_names(given["arms"], method_parts.ARMS), **values)
    options.check()
    require("train_share", share, SHARE)
    require("dtype", given["dtype"], among(("float32", "bfloat16")))
    words = [name for name in ("positive", "negative") if name in given]
    second = [name for name in ("second_data", "second_positive", "second_negative") if name in given]
    if model is None:
        shared.refuse_unused(command, given, ["data", *words, *second, "control", "transfer", "dtype"], "--model too")
        if given["tiny_steps"] is not None:
            require("tiny_steps", given["tiny_steps"], COUNT)
    else:
        shared.refuse_unused(command, given, ["tiny_steps"], "no --model beside it")
        asked = [name for name in second if given[name] is not None]
        for name in ("data", *words, *(second if asked else [])):
            if given[name] is None:
                beside = asked[0].replace("_", "-") if name in second else "model"
                raise UserError(f"{name.replace('_', '-')}: expected too, with --{beside}")
    shared.check_out(given["out"], given["resume"], options)  # before a tiny model is trained
    if model is None:
        tasks = method_parts.demo(options.seed_range, share, given["tiny_steps"], shown=not quiet)
    else:
        behaviours = [Behaviour(given["data"], given.get("positive"), given.get("negative"))]
        if asked:
            path, positive, negative = (given[name] for name in second)
            behaviours.append(Behaviour(path, positive, negative, "second-"))
        tasks = file_tasks(
            model, behaviours, given["control"] or [], given["transfer"], share, given["dtype"]
        )  # fmt: skip
    if given["arms"] == "all" and len(options.archs) < len(method_parts.ARMS) and not quiet:
        shared.warn("the arms of LoRA are left out, as the package peft is not installed")
    shared.train_and_show(
        method, method_parts.train, tasks, options, method_parts.tables(tasks.facts), out=given["out"],
        resume=given["resume"], device=given["device"], quiet=quiet,
    )  # fmt: skip


def predict_lines(
    method: str, language: Callable[[dict[str, Any]], Any], checkpoint: Path, source: Path, out: Path, *,
    most: int, device: str, quiet: bool,
) -> None:  # fmt: skip
    """Answer every prompt of a JSONL file by greedy decoding with a trained arm."""
    import torch
    from rich.console import Console

    from pyml.methods._checkpoint import write_atomically
    from pyml.methods._engine import progress
    from pyml.methods._head_arms import load_arm
    from pyml.methods._language import ANSWER, PROMPT, read_prompt, read_rows

    shared.check_file(out, reads={"checkpoint": checkpoint, "input": source})
    start = time.perf_counter()
    model, found = load_arm(checkpoint, language, method, shared.choose_device(device))
    rows = [
        (values, read_prompt(found, values, PROMPT, "input", where)) for where, values in read_rows(source, "input")
    ]
    lines = []
    with progress(not quiet) as bar:
        task = bar.add_task("answers", total=len(rows), note="")
        for values, prompt in rows:
            ids = torch.tensor([prompt], device=model.device)
            room = min(most, found.longest - len(prompt))
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                pad_token_id=found.tokenizer.pad_token_id or 0,
            )  # fmt: skip
            answer = found.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
            lines.append(json.dumps({**values, ANSWER: answer}, ensure_ascii=False))
            bar.advance(task)
    write_atomically(out, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    spent = time.perf_counter() - start
    Console(quiet=quiet, soft_wrap=True, highlight=False).print(
        f"{out}: {shared.plural(len(lines), 'answer')}, {spent:.1f} s"
    )
