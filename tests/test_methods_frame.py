"""What all methods share: options and their checks, run folders, tables, a loss that is not finite."""

import importlib
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pyml.methods import UserError, method_names
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import SMALL_BATCH, few_threads, fit, make_accelerator, open_run
from pyml.methods._measure import summarise
from pyml.methods._options import check_file, check_folder, plural
from pyml.methods._recipe import FROM_ZERO, NOT_NEGATIVE, SHARE, Recipe
from pyml.methods._sweep import TRAINING_COSTS, Tables, mean_and_spread, sweep
from tests.method_runs import TRAINING, needs

needs(*TRAINING)

# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(Recipe):
    known_archs: ClassVar = ("a", "b")
    rules: ClassVar = {"every": FROM_ZERO, "weight": NOT_NEGATIVE, "test_share": SHARE}

    archs: tuple[str, ...] = ("a", "b")
    every: int = 0
    weight: float = 0.0
    test_share: float = 0.5


BAD = {
    "at least 1": (("seeds", "epochs", "batch_size"), (0, -3, math.nan, math.inf)),
    "at least 0": (("first_seed", "every"), (-1, math.nan, math.inf)),
    "a finite number > 0": (("learning_rate",), (0.0, -1e-3, math.nan, math.inf, -math.inf)),
    "a finite number >= 0": (("weight",), (-1e-9, math.nan, math.inf)),
    "a number between 0 and 1": (("test_share",), (0, 1, 1.5, math.nan)),
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, value, text) for text, (names, values) in BAD.items() for name in names for value in values],
)
def test_an_option_that_cannot_work_is_one_sentence(name, value, expected):
    with pytest.raises(UserError) as caught:
        Options(**{name: value}).check()
    assert str(caught.value) == f"{name.replace('_', '-')}: expected {expected}, got {value}"


def test_options_that_work():
    Options().check()
    options = Options(first_seed=2, seeds=3, every=4, weight=0.5, learning_rate=1e-9)
    options.check()
    assert list(options.seed_range) == [2, 3, 4]
    with pytest.raises(UserError, match=r"^arch: expected one of a, b, got 'c'$"):
        Options(archs=("a", "c")).check()


def test_plural():
    assert [plural(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_that_can_be_written_are_not_made(tmp_path):
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    folders = [tmp_path / "file", tmp_path / "file" / "inside"]
    for folder in [*folders, *([Path("/proc/x")] if sys.platform == "linux" else [])]:
        sentence = rf"^out: expected a folder that can be written, got {re.escape(str(folder))} \([^()]+\)$"
        with pytest.raises(UserError, match=sentence):
            check_folder(folder)
        with pytest.raises(UserError, match=sentence):
            open_run(folder, {}, False, make_accelerator("cpu"))


def test_a_file_that_is_read_is_not_written_over(tmp_path):
    """Under any name of it; a file that is not there, and an older result beside pictures, may be."""
    folder, model = tmp_path / "pictures", tmp_path / "model.safetensors"
    folder.mkdir()
    for file in (model, folder / "0.png", folder / "old.csv"):
        file.write_text("x")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "hard.png").hardlink_to(folder / "0.png")
    reads = {"checkpoint": model, "input": folder, "classes": None}
    for out in (tmp_path / "new.csv", folder / "new.csv", folder / "old.csv", tmp_path / "link" / "old.csv"):
        assert check_file(out, reads=reads) == out
    for out, of, what in (
        (folder / ".." / "model.safetensors", reads, "the file of --checkpoint"),
        (folder / "0.png", reads, "a file in the folder of --input"),
        (tmp_path / "link" / "0.png", reads, "a file in the folder of --input"),
        (tmp_path / "hard.png", {"input": folder / "0.png"}, "the file of --input"),
        (folder / "old.csv", {"input": tmp_path / "link" / "old.csv"}, "the file of --input"),
    ):
        with pytest.raises(UserError) as caught:
            check_file(out, reads=of)
        assert str(caught.value) == f"out: expected a new file, got {out}, {what}"


@pytest.mark.parametrize("method", ["arithmetic", "dp_sgd", "enla", "pinpoint"])
@pytest.mark.parametrize("name", ["checkpoint", "input"])
def test_a_prediction_keeps_what_it_reads(run, tmp_path, method, name):
    for file in ("checkpoint", "input"):
        (tmp_path / file).write_text("x")
    code, _, err = run("predict", method, "--checkpoint", tmp_path / "checkpoint", "--input", tmp_path / "input",
                       "--out", tmp_path / name)  # fmt: skip
    assert (code, err) == (1, f"error: out: expected a new file, got {tmp_path / name}, the file of --{name}\n")
    assert (tmp_path / name).read_text() == "x"


def test_only_a_run_can_be_resumed(tmp_path):
    accelerator = make_accelerator("cpu")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(UserError, match=r"^resume: expected the folder of a run, got .* without a config\.json$"):
            open_run(folder, {"epochs": 1}, True, accelerator)
    assert not (tmp_path / "absent").exists() and not list((tmp_path / "empty").iterdir())
    open_run(tmp_path / "empty", {"epochs": 1}, False, accelerator)
    open_run(tmp_path / "empty", {"epochs": 1}, True, accelerator)
    with pytest.raises(UserError, match="was started with epochs = 1, got 2"):
        open_run(tmp_path / "empty", {"epochs": 2}, True, accelerator)


def test_a_resumed_run_names_the_option_that_differs(tmp_path):
    accelerator, spelled = make_accelerator("cpu"), {"archs": "arms", "rates": "learning_rate"}
    config = {"archs": ["a", "b"], "rates": [0.1, 1.0], "data": "x"}
    open_run(tmp_path / "run", config, False, accelerator, spelled)
    for change, sentence in (
        ({"archs": ["a"]}, "--arms = a,b, got a"),
        ({"archs": ["a"], "rates": [0.1]}, "--learning-rate = 0.1,1.0, got 0.1"),  # the rows may follow from it
        ({"data": "y", "rates": [0.1]}, "--learning-rate = 0.1,1.0, got 0.1"),
        ({"data": "y"}, "data = 'x', got 'y'"),
    ):
        with pytest.raises(UserError, match=f"was started with {sentence}: use the same data and options, or another"):
            open_run(tmp_path / "run", {**config, **change}, True, accelerator, spelled)


@pytest.mark.parametrize("method", method_names())
def test_options_are_called_as_on_the_command_line(method):
    recipe = importlib.import_module(f"pyml.methods.{method}.train").Options
    command = importlib.import_module(f"pyml.methods.{method}.commands").train
    assert "archs" in recipe.spelled and set(recipe.spelled.values()) <= inspect.signature(command).parameters.keys()
    assert recipe.spelled.keys() <= {field.name for field in fields(recipe)}


# --- training loop and tables -----------------------------------------------------------------------------------------


def fit_one(folder, bad=None, epochs=3):
    """Fit one weight; the loss of the epoch ``bad`` is NaN."""
    model = torch.nn.Linear(1, 1)

    def loss(model, factor):
        value = model(torch.ones(1, 1)).sum() * factor
        return value, {"loss": value, "count": torch.ones(())}

    return fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), None, epochs=epochs, loss=loss, folder=folder, info={},
        batches=lambda epoch: [math.nan if epoch == bad else 1.0], accelerator=make_accelerator("cpu"),
    )  # fmt: skip


def test_a_loss_that_is_not_finite_names_only_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"^training: the loss is nan in epoch 1: no state was saved before it$"):
        fit_one(tmp_path / "one", bad=1)
    assert not list(tmp_path.glob("one/*.safetensors"))
    with pytest.raises(UserError, match=r"^training: the loss is nan in epoch 3: the state before it is in ") as caught:
        fit_one(tmp_path / "three", bad=3)
    path = Path(str(caught.value).rpartition(" in ")[2])
    assert load_checkpoint(path).info["epoch"] == 2


TABLES = Tables(
    scores={"OA": mean_and_spread("oa", 4)}, costs=TRAINING_COSTS, title=lambda config: "title",
    recipe=lambda config: "recipe", cost_title="cost", files="files",
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "cell"), [([0.5], "| a | 0.5000 | 1.00 | 2 |"), ([0.4, 0.6], "| a | 0.5000 ± 0.1414 | 1.00 | 2 |")]
)
def test_one_seed_has_no_deviation(capsys, values, cell):
    rows = [{"oa": value, "train_seconds": 1.0, "train_peak_mb": 2.0} for value in values]
    here = {"device": "cpu", "threads": 1, "torch": "2", "pyml": "0"}
    metrics = {"config": {"seeds": len(rows)}, "environment": here, "archs": {"a": summarise(rows)}}
    assert cell in TABLES.markdown(metrics) and "| arch | OA |" in TABLES.markdown(metrics)
    assert "| arm | OA |" in replace(TABLES, heading="arm").markdown(metrics)
    TABLES.show(metrics, Path("folder"))
    out = capsys.readouterr().out
    assert "0.5000" in out and ("±" in out) == (len(rows) > 1)


def test_sweep_does_every_run_once(tmp_path):
    """Archs x seeds in their order; after a stop only the runs that are missing."""
    done, stops = [], [("b", 4)]

    def go(arch, seed, folder, accelerator, report):
        if (arch, seed) in stops:
            raise RuntimeError(stops.pop())
        done.append((arch, seed))
        report(1, {"loss": 0.0})
        return {"model": {"name": arch}, "scores": {"oa": seed / 10, "train_seconds": 1.0, "train_peak_mb": 1.0}}

    options = Options(seeds=2, first_seed=3)
    how = {"note": lambda values: f"{values['loss']}", "device": "cpu", "quiet": True}
    with pytest.raises(RuntimeError):
        sweep(tmp_path / "run", options, {"data": "x"}, TABLES, go, resume=False, **how)
    assert done == [("a", 3), ("a", 4), ("b", 3)] and not (tmp_path / "run" / "metrics.json").exists()
    metrics = sweep(tmp_path / "run", options, {"data": "x"}, TABLES, go, resume=True, **how)
    assert done[3:] == [("b", 4)]
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["data"] == "x" and metrics["config"]["archs"] == ["a", "b"]
    for arch in "ab":
        assert metrics["archs"][arch]["name"] == arch and metrics["archs"][arch]["oa"]["values"] == [0.3, 0.4]
    assert (tmp_path / "run" / "table.md").read_text() == TABLES.markdown(metrics)


def test_the_threads_of_the_training_are_recorded(tmp_path):
    """Not those of the command: few values take one. A resumed run may have been begun with others."""
    before = torch.get_num_threads()

    def go(arch, seed, folder, accelerator, report):
        with few_threads(SMALL_BATCH if arch == "b" else 8):
            assert torch.get_num_threads() == (3 if arch == "b" else 1)
        return {"model": {}, "scores": {"oa": 0.0, "train_seconds": 1.0, "train_peak_mb": 1.0}}

    how = {"note": str, "device": "cpu", "quiet": True}
    torch.set_num_threads(3)
    try:
        for archs, threads in ((("a",), 1), (("b",), 3), (("a", "b"), "1 and 3")):
            out = tmp_path / "".join(archs)
            sweep(out, Options(archs=archs), {}, TABLES, go, resume=False, **how)
            (out / "metrics.json").unlink()
            torch.set_num_threads(2)
            metrics = sweep(out, Options(archs=archs), {}, TABLES, go, resume=True, **how)
            torch.set_num_threads(3)
            assert metrics["environment"]["threads"] == threads
            assert f"CPU threads: {threads}," in (out / "table.md").read_text()
    finally:
        torch.set_num_threads(before)
