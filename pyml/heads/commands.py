"""``pyml heads score | knockout | tune | steer | merge``: the heads of a causal LM in a local model directory."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pyml.methods import UserError
from pyml.methods import _options as shared
from pyml.methods._options import option

app = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a causal LM, as save_pretrained writes it.")]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="JSONL with the keys clean and counterfactual.")]
Positive = Annotated[str, option("Token (or '#ID', quoted; several with commas) whose logit counts.")]
Negative = Annotated[str | None, option("Token whose logit is taken off.")]
Heads = Annotated[str | None, option("Heads LAYER.HEAD with commas.")]
Scores = Annotated[Path | None, option("File of pyml heads score: the --top heads of it, most negative first.")]
Top = Annotated[int, option("How many heads of --scores.", min=1)]
SCORED, TOP = "scored", 10
Batch = Annotated[int, option("Rows at once.", min=1)]
Overwrite = Annotated[bool, option("Write over what is at --out.", None, "--overwrite")]


@app.command()
def score(
    model: Folder, data: Data, positive: Positive, negative: Negative = None,
    mlps: Annotated[bool, option("Also score the MLPs.", None, "--mlps")] = False,
    difference: Annotated[str, option("relative or plain.")] = "relative",
    attribution: Annotated[bool, option("Estimate by one backward instead.", None, "--attribution")] = False,
    batch: Batch = 32,
    out: Annotated[Path, option("JSON file for the scores.")] = Path("scores.json"),
    top: Annotated[int, option("How many to print.", min=1)] = 10,
    overwrite: Overwrite = False,
    device: shared.Device = "auto",
) -> None:  # fmt: skip
    """Score every head by path patching: what the last token's logits lose with its output of another prompt."""
    with _plain_errors():
        from pyml.heads import attribution_patch, path_patch, top_k
        from pyml.heads.files import Model, read_lines

        _check_out(out, overwrite)
        lm = Model(model, shared.choose_device(device))
        rows = read_lines(data, ["clean", "counterfactual"])
        clean, other = (
            lm.padded([lm.ids(row[key], f"data: {data}: {key}") for row in rows]) for key in ("clean", "counterfactual")
        )
        metric = (lm.tokens(positive, "positive"), None if negative is None else lm.tokens(negative, "negative"))
        start = time.perf_counter()
        if attribution:
            found = attribution_patch(lm.lm, clean, other, metric, mlps=mlps, difference=difference, batch_size=batch)
        else:
            found = path_patch(lm.lm, clean, other, metric, mlps=mlps, difference=difference, batch_size=batch)
        seconds = time.perf_counter() - start
        for what, values in (("heads", found.heads), ("MLPs", found.mlps)):
            if values is not None and not bool(values.isfinite().all()):
                many = int((~values.isfinite()).sum())
                hint = " (a relative score divides by the clean metric: see --difference plain)"
                hint = hint if difference == "relative" else ""
                raise UserError(f"model: expected finite scores of {what}, got {many} that are not{hint}")
        facts: dict[str, Any] = {
            "heads": found.heads.tolist(), "mlps": None if found.mlps is None else found.mlps.tolist(),
            "difference": difference, "kind": "attribution" if attribution else "path",
            "positive": metric[0], "negative": metric[1], "clean": float(found.clean.double().mean()),
            "samples": len(rows), "seconds": seconds,
        }  # fmt: skip
        _write(out, facts)
        best = top_k(found.heads, min(top, found.heads.numel())).heads
        typer.echo(
            f"{found.heads.numel()} heads, {len(rows)} samples, {seconds:.2f} s; clean metric {facts['clean']:.4g}"
        )
        for layer, head in best:
            value = float(found.heads[layer, head])
            shown = f"{100 * value:+.2f} %" if difference == "relative" else f"{value:+.4g}"
            typer.echo(f"  head {layer}.{head}: {shown}")
        typer.echo(f"scores: {out}")


@app.command()
def knockout(
    model: Folder, data: Data, positive: Positive, negative: Negative = None, heads: Heads = None,
    scores: Scores = None, top: Top = TOP,
    mode: Annotated[str, option("zero (SPT) or mean (the arithmetic paper): two different experiments.")] = "zero",
    control: Annotated[int, option("Seeds of random heads beside them.", min=0)] = 1,
    batch: Batch = 32,
    out: Annotated[Path | None, option("JSON file for the curves.")] = None,
    overwrite: Overwrite = False,
    device: shared.Device = "auto",
) -> None:  # fmt: skip
    """The mean metric on the clean prompts with the first 0, 1, 2, ... heads silent, and with random heads silent."""
    with _plain_errors():
        from pyml.heads import adapter, knockout, random_heads
        from pyml.heads.files import Model, prompts

        _check_out(out, overwrite)
        lm = Model(model, shared.choose_device(device))
        chosen = _heads(lm, heads, scores, top)
        metric = (lm.tokens(positive, "positive"), None if negative is None else lm.tokens(negative, "negative"))
        several = prompts(lm, data, "clean", batch)
        curves = {"chosen": knockout(lm.lm, several, chosen, mode, metric)}
        a = adapter(lm.lm)
        count = min(len(chosen), a.num_layers * a.num_heads - len(chosen))
        for seed in range(control):
            others = random_heads(a.num_layers, a.num_heads, count, seed=seed, exclude=chosen)
            curves[f"random {seed}"] = knockout(lm.lm, several, others, mode, metric)
        for name, curve in curves.items():
            typer.echo(f"{name}: " + "  ".join(f"{n}: {value:.4g}" for n, value in zip(*curve)))
        if out is not None:
            facts = {name: {"counts": curve.counts, "values": curve.values} for name, curve in curves.items()}
            _write(out, {"mode": mode, "heads": chosen, "curves": facts})


@app.command()
def tune(
    model: Folder,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL with the keys prompt and answer.")],
    heads: Heads = None, scores: Scores = None, top: Top = TOP,
    projections: Annotated[str, option("Of q, k, v, o, with commas.")] = "q,o",
    lora_rank: Annotated[int | None, option("Train products of this rank within the slices.", min=1)] = None,
    grad_scale: Annotated[str | None, option("A number, or heads for H/h.")] = None,
    mlps: Annotated[
        str | None, option("Layers whose MLP is trained whole, with commas; or scored: MLPs of --scores beside heads.")
    ] = None,
    share: Annotated[float | None, option("Of --scores, as many as stay below this share of all of them.")] = None,
    threshold: Annotated[float | None, option("Of --scores, those below this score (-0.05: -5 %).")] = None,
    keep_prefix: Annotated[
        bool,
        option("Run the layers below the lowest trained one once a line, and keep what they put out.", None,
               "--keep-prefix"),
    ] = False,
    steps: Annotated[int, option("Steps.", min=1)] = 100,
    batch: Batch = 16,
    learning_rate: Annotated[float, option("AdamW's rate, constant.")] = 1e-4,
    weight_decay: Annotated[float, option("Of the slices; nothing else moves.")] = 0.0,
    clip: Annotated[float, option("Norm that gradients are clipped to; 0: not.", min=0)] = 1.0,
    seed: Annotated[int, option("Of the order of the data.", min=0)] = 0,
    out: Annotated[Path, option("File for the delta.")] = Path("delta.safetensors"),
    overwrite: Overwrite = False,
    device: shared.Device = "auto",
) -> None:  # fmt: skip
    """Train only the slices of some heads on prompts and answers; writes the delta alone."""
    with _plain_errors():
        import torch

        from pyml.heads import HeadTuner, Selection
        from pyml.heads.files import Model, Prefixes, dialogues, training_batches

        scale, layers = _scale(grad_scale), [] if mlps == SCORED else _layers(mlps)
        if share is not None or threshold is not None:
            shared.refuse_unused(tune, {"top": top}, ["top"], "no --share or --threshold beside it")
        _check_out(out, overwrite)
        lm = Model(model, shared.choose_device(device))
        if layers and all(value is None for value in (heads, scores, share, threshold)):
            chosen = Selection([], [])  # MLPs alone
        else:
            chosen = _chosen(lm, heads, scores, top, share, threshold, mlps=mlps == SCORED)
        layers = layers or chosen.mlps
        rows = dialogues(lm, data)
        tuner = HeadTuner(
            lm.lm, chosen.heads, shared.names(projections, ("q", "k", "v", "o")), layers, lora_rank=lora_rank,
            grad_scale=scale,
        )  # fmt: skip
        kept = Prefixes(tuner) if keep_prefix else None
        optimizer = tuner.optimizer(learning_rate, weight_decay=weight_decay)
        lm.lm.train()
        losses = []
        start = time.perf_counter()
        for step, (numbers, inputs) in zip(range(1, steps + 1), training_batches(rows, batch, seed)):
            loss = tuner.loss(inputs, prefix=None if kept is None else kept(numbers, inputs))
            if not bool(loss.isfinite()):
                raise UserError(f"loss: expected finite ones, got {loss.item()} at step {step}: nothing was written")
            optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(tuner.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
            if step == 1 or step % max(1, steps // 10) == 0:
                typer.echo(f"step {step}: loss {losses[-1]:.4f}")
        seconds = time.perf_counter() - start
        if not all(bool(values.isfinite().all()) for values in tuner.delta().values()):
            raise UserError(f"learning-rate: expected finite values after {steps} steps, got others: nothing written")
        out.parent.mkdir(parents=True, exist_ok=True)
        tuner.save(out)
        size = out.stat().st_size / 1e6
        typer.echo(f"{steps} steps, {seconds:.1f} s; loss {losses[0]:.4f} to {losses[-1]:.4f}; {out} ({size:.3g} MB)")


@app.command()
def steer(
    model: Folder,
    positive: Annotated[Path, option("JSONL with the key prompt: with the behaviour.")],
    negative: Annotated[Path, option("JSONL with the key prompt: without it.")],
    prompt: Annotated[str, option("What to continue: a text, or #ID,#ID,...")],
    heads: Heads = None, scores: Scores = None, top: Top = TOP,
    strength: Annotated[float, option("1 moves the one Gaussian onto the other.")] = 1.0,
    shrinkage: Annotated[float, option("How far covariances are drawn to multiples of the identity.")] = 0.1,
    act: Annotated[str, option("Where: all positions, from the last one of the prompt on, or there once.")] = "all",
    map: Annotated[str, option("gaussian to gaussian, or along the direction between their means.")] = "gaussian",
    kept: Annotated[
        Path | None, option("JSONL with the key prompt: what should stay as it is, for --map direction.")
    ] = None,
    tokens: Annotated[int, option("New tokens, greedy.", min=1)] = 20,
    batch: Batch = 32,
    out: Annotated[Path | None, option("File for the control.")] = None,
    overwrite: Overwrite = False,
    device: shared.Device = "auto",
) -> None:  # fmt: skip
    """Continue a prompt without and with the outputs of some heads moved from the one behaviour to the other."""
    with _plain_errors():
        import torch

        from pyml.heads import HeadSteering
        from pyml.heads.files import Model, prompts

        _check_out(out, overwrite)
        lm = Model(model, shared.choose_device(device))
        steering = HeadSteering(lm.lm)
        sides = [prompts(lm, path, "prompt", batch) for path in (positive, negative)]
        others = None if kept is None else prompts(lm, kept, "prompt", batch)
        steering.add(
            "control", _heads(lm, heads, scores, top), *sides, strength=strength, shrinkage=shrinkage, act=act, map=map,
            kept=others,
        )  # fmt: skip
        by_id = re.fullmatch(r"#-?[0-9]+(,#-?[0-9]+)*", prompt) is not None
        start = lm.tokens(prompt, "prompt") if by_id else lm.ids(prompt, "prompt")
        given = lm.padded([start], room=tokens - 1)  # nothing comes after the last one

        def continued() -> str:
            with torch.no_grad():
                found = lm.lm.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            new = found[0, given["input_ids"].shape[1] :].tolist()
            return " ".join(f"#{i}" for i in new) if by_id else lm.tokenizer.decode(new)

        typer.echo(f"without: {continued()}")
        with steering:
            typer.echo(f"with:    {continued()}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            steering.save(out)


@app.command()
def merge(
    model: Folder,
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="File of pyml heads tune.")],
    out: Annotated[Path, option("Folder for the merged model.")],
    overwrite: Overwrite = False,
    device: shared.Device = "cpu",
) -> None:
    """Write a model directory with the delta in its weights."""
    with _plain_errors():
        from pyml.heads import merge
        from pyml.heads.files import Model

        if out.resolve() == model.resolve():
            raise UserError(f"out: expected another folder than the model's, got {out}")
        _check_out(out, overwrite, folder=True)
        lm = Model(model, shared.choose_device(device))
        merge(lm.lm, delta)
        with shared.no_bars():
            lm.lm.save_pretrained(out)
        try:
            lm.tokenizer.save_pretrained(out)
        except UserError:  # a model without a tokenizer is merged without one
            typer.echo(f"{model} has no tokenizer")
        typer.echo(f"merged: {out}")


def _check_out(out: Path | None, overwrite: bool, folder: bool = False) -> None:
    """One sentence, before any work, where a result cannot be written or would be written over something."""
    if out is None:
        if overwrite:
            raise UserError("overwrite: expected --out beside it, got none")
        return
    if folder:
        shared.check_folder(out)
    else:
        shared.check_file(out)
    there = any(out.iterdir()) if folder and out.is_dir() else out.exists() or out.is_symlink()
    if there and not overwrite:
        kind = "an empty folder, one that is not there" if folder else "a file that is not there"
        raise UserError(f"out: expected {kind}, or --overwrite beside it, got {out}")


def _heads(lm: Any, heads: str | None, scores: Path | None, top: int) -> list[tuple[int, int]]:
    """The heads of --heads, or the best of --scores."""
    return _chosen(lm, heads, scores, top).heads


def _chosen(
    lm: Any, heads: str | None, scores: Path | None, top: int, share: float | None = None,
    threshold: float | None = None, mlps: bool = False,
) -> Any:  # fmt: skip
    """The same by one of the rules, with MLPs among them where they are asked for, as a `Selection`."""
    from pyml.heads import Selection, adapter, selection
    from pyml.heads.files import read_scores

    rules = {"share": share, "threshold": threshold}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) == 2:
        raise UserError("share: expected --share or --threshold, one of the two, got both")
    if (given or mlps) and scores is None:
        raise UserError(f"{given[0] if given else 'mlps'}: expected --scores beside it, got none")
    if (heads is None) == (scores is None):
        got = "neither" if heads is None else "both"
        raise UserError(f"heads: expected --heads or --scores, one of the two, got {got}")
    if heads is not None and top != TOP:
        raise UserError(f"top: expected no --heads beside it, which names them, got {top}")
    if scores is not None:
        found = read_scores(scores)
        a = adapter(lm.lm)
        shape = found.heads.shape
        if shape != (a.num_layers, a.num_heads):
            raise UserError(f"scores: expected scores of {a.num_layers} x {a.num_heads} heads, got {list(shape)}")
        if mlps and found.mlps is None:
            raise UserError("mlps: expected scores of pyml heads score --mlps, got none of MLPs")
        if share is not None:
            return selection.share(found, share, mlps=mlps)
        if threshold is not None:
            return selection.threshold(found, threshold, mlps=mlps)
        most = found.heads.numel() + mlps * a.num_layers
        if top > most and top != TOP:
            raise UserError(f"top: expected at most the {most} of --scores, got {top}")
        return selection.top_k(found, min(top, most), mlps=mlps)
    try:
        pairs = [tuple(map(int, part.split("."))) for part in str(heads).split(",")]
        return Selection([(layer, head) for layer, head in pairs], [])
    except ValueError:
        raise UserError(f"heads: expected LAYER.HEAD with commas, got {heads}") from None


def _scale(text: str | None) -> Any:
    try:
        return text if text in (None, "heads") else float(text)
    except ValueError:
        raise UserError(f"grad-scale: expected a number or heads, got {text}") from None


def _layers(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"mlps: expected layers with commas, or {SCORED}, got {text}") from None


def _write(path: Path, value: Any) -> None:
    from pyml.methods._checkpoint import write_json

    write_json(path, value)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The library's sentences are the user's: wrong arguments, not a fault of the program."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        if ": expected " not in str(error):
            raise
        raise UserError(str(error)) from error
