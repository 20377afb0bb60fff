"""The command line: help for everything, one sentence and an exit code for every error, what the commands pass on."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from pyml import cli
from pyml.methods import Stopped, method_names
from pyml.methods.spectralkan.scene import generate_scene
from tests.method_runs import TRAINING, needs


@pytest.fixture
def files(tmp_path):
    """A small scene as files: before.npy, after.npy, labels.npy."""
    scene = generate_scene(20, 24, 4, seed=2)
    for name, array in (("before", scene.before), ("after", scene.after)):
        np.save(tmp_path / f"{name}.npy", np.moveaxis(array, 0, -1))
    np.save(tmp_path / "labels.npy", scene.labels + 1)  # 0 unlabelled, 1 unchanged, 2 changed
    return tmp_path


def data_options(folder):
    names = [part for name in ("before", "after", "labels") for part in (f"--{name}", folder / f"{name}.npy")]
    return [*names, "--changed-value", 2, "--unchanged-value", 1]


QUICK = ["--seeds", 1, "--epochs", 2, "--train-fraction", 0.2, "--device", "cpu"]


def commands():
    """Every command with its options: (path, command)."""

    def walk(path, command):
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk((*path, name), child)

    return list(walk((), typer.main.get_command(cli.app)))


def test_the_commands_are_there():
    names = {path for path, _ in commands()}
    assert {("info",), ("verify",), ("demo",), ("bench",), ("train",), ("predict",)} < names
    assert {(verb, name) for verb in ("train", "predict") for name in method_names()} < names


@pytest.mark.parametrize(
    ("path", "command"), commands(), ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_every_option_has_a_help_line(run, path, command):
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name} has no help line"
    code, out, _ = run(*path, "--help")
    assert code == 0 and "Usage:" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "No such command 'nothing' (see pyml --help)"),
        (["train", "nothing"], "No such command 'nothing' (see pyml train --help)"),
        (["train", "spectralkan", "--epoch", "3"], "No such option: --epoch"),
        (["train", "spectralkan", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["train", "spectralkan", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["predict", "spectralkan"], "Missing option '--checkpoint'"),
        (["bench", "--threads", "0"], "Invalid value for '--threads'"),
    ],
)
def test_wrong_options_exit_with_2(run, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--before", "absent.npy"], "--after and --labels: expected too, as some data is given"),
        (["--preset", "farmland"], "preset: expected --data-dir"),
        (["--preset", "mars", "--data-dir", "."], "preset: expected one of farmland, river"),
        (["--preset", "river", "--data-dir", "."], "preset: river expects groundtruth.mat, river_after.mat"),
        (["--arch", "spectralkan,mlp"], "arch: expected one of spectralkan, wkan"),
        (["--patch-size", "4"], "patch-size: expected an odd number, got 4"),
        (["--spectral-hidden", "big"], "spectral-hidden: expected widths such as 16"),
        (["--train-fraction", "2"], "train-fraction: expected a number between 0 and 1, got 2"),
        (["--split", "half"], "split: expected random or block, got 'half'"),
        (["--border", "torus"], "border: expected one of symmetric"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--scene-size", "4", "4"], "scene: expected at least 16 x 16 pixels"),
        (["--preset", "river", "--data-dir", ".", "--unchanged", "u.png"], "unchanged: expected to be left out"),
        (["--preset", "river", "--data-dir", ".", "--changed-value", "3"], "changed-value: expected to be left out"),
        (["--data-dir", "."], "data-dir: expected --preset too, got ."),
        (["--unchanged", "u.png"], "unchanged: expected --before, --after and --labels too, got u.png"),
        (["--unchanged-value", "0"], "unchanged-value: expected --before, --after and --labels too, got 0"),
        (["--axes", "chw"], "axes: expected --before, --after and --labels too, got chw"),
        (["--before", "a", "--after", "b", "--labels", "c"], "scene-bands: expected no data beside it, got 3"),
        (["--before", "a", "--after", "b", "--labels", "c", "--scene-size", "24", "20"], "scene-size: expected no"),
        (["--axes", "xyz"], "axes: expected auto, hwc or chw"),
        (["--patch-size", "31", "--scene-size", "24", "20"], "at most the sides of the images, 24 x 20, got 31"),
        (["--learning-rate", "nan"], "learning-rate: expected a finite number > 0, got nan"),
        (["--learning-rate", "inf"], "learning-rate: expected a finite number > 0, got inf"),
        (["--train-fraction", "nan"], "train-fraction: expected a number between 0 and 1, got nan"),
        (["--resume"], "resume: expected the folder of a run"),
    ],
)
def test_wrong_training_data_is_one_sentence(run, tmp_path, more, sentence):
    needs("accelerate")
    code, _, err = run("train", "spectralkan", "--out", tmp_path / "run", "--scene-bands", 3, *more)
    assert code == 1
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_resume_needs_the_folder_of_the_run(run, tmp_path, monkeypatch):
    needs("accelerate")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "spectralkan", "--scene-size", 24, 20, "--resume")
    assert code == 1 and err == "error: resume: expected --out too, the folder of the run to go on with\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="nobody can make a folder in /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "spectralkan", "--scene-size", 24, 20, "--train-fraction", 0.2, "--seeds", 1, "--out", "/proc/x"],
        ["train", "lsnet", "--made-size", 32, "--crop-size", 16, "--out", "/proc/x"],
        ["predict", "spectralkan", "--checkpoint", "c", "--before", "a", "--after", "b", "--out", "/proc/x/map.png"],
        ["demo", "--out", "/proc/x"],
        ["bench", "bspline", "--out", "/proc/x"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_a_folder_that_cannot_be_made_is_one_sentence(run, arguments):
    needs("accelerate", "skimage", "sklearn")
    code, _, err = run(*arguments)
    assert code == 1 and "out: expected a folder that can be written, got /proc/x" in err and err.count("\n") == 1


def test_debug_raises(run, tmp_path):
    with pytest.raises(ValueError, match="patch-size"):
        run("train", "spectralkan", "--patch-size", 4, "--debug")


def test_unexpected_errors_are_one_sentence(run, monkeypatch):
    def broken(**_):
        raise KeyError("a bug")

    monkeypatch.setattr("pyml.info.main", broken)
    code, _, err = run("info")
    assert code == 1 and err == "error: KeyError: 'a bug' (--debug shows where)\n"

    def incomplete(**_):
        import no_such_package  # noqa: F401

    monkeypatch.setattr("pyml.info.main", incomplete)
    code, _, err = run("info")
    assert code == 1 and err == "error: this command needs the package no_such_package: pip install 'pyml[train]'\n"

    def stopped(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyml.info.main", stopped)
    code, _, err = run("info")
    assert code == 130 and "--resume" in err

    def kept(*_, **__):
        raise Stopped("stopped; a.csv holds the 3 rows measured so far")

    monkeypatch.setattr("pyml.benchmarks.run.main", kept)
    assert run("bench") == (130, "", "error: stopped; a.csv holds the 3 rows measured so far\n")


def test_train_and_predict_files(run, files):
    needs(*TRAINING, "tifffile")
    from PIL import Image

    code, out, err = run(
        "train", "spectralkan", *data_options(files), *QUICK, "--arch", "spectralkan,cnn", "--out", files / "run"
    )
    assert code == 0, err
    for text in ("OA", "AA", "kappa", "F1", "parameters", "FLOPs/pixel", "cnn"):
        assert text in out
    metrics = json.loads((files / "run" / "metrics.json").read_text())
    assert list(metrics["archs"]) == ["spectralkan", "cnn"]
    assert metrics["config"]["size"] == [20, 24] and metrics["config"]["bands"] == 4
    checkpoint = files / "run" / "spectralkan" / "seed0" / "checkpoint.safetensors"
    pair = ["--before", files / "before.npy", "--after", files / "after.npy", "--device", "cpu"]
    maps = []
    for name in ("map.png", "map.npy", "map.tif"):
        code, out, err = run("predict", "spectralkan", "--checkpoint", checkpoint, *pair, "--out", files / name)
        assert code == 0 and "20 x 24 pixels" in " ".join(out.split()), err
        maps.append(np.load(files / name) if name == "map.npy" else np.array(Image.open(files / name)))
    saved = np.array(Image.open(checkpoint.with_name("change_map.png")))
    np.testing.assert_array_equal(maps[0], saved)
    np.testing.assert_array_equal(maps[1] * 255, saved)
    np.testing.assert_array_equal(maps[2], maps[1])
    code, _, err = run(
        "predict", "spectralkan", "--checkpoint", checkpoint, *pair, "--scale", "training", "--out", files / "b.png"
    )
    assert code == 0, err
    np.testing.assert_array_equal(np.array(Image.open(files / "b.png")), saved)

    code, _, err = run(
        "predict", "spectralkan", "--checkpoint", checkpoint, *pair, "--axes", "xyz", "--out", files / "c.png"
    )
    assert code == 1 and err == "error: axes: expected auto, hwc or chw, got 'xyz'\n"

    np.save(files / "three.npy", np.load(files / "before.npy")[..., :3])
    for options, sentence in (
        (
            ["--before", files / "three.npy", "--after", files / "three.npy"],
            "expected the 4 bands of the checkpoint, got 3",
        ),
        (
            ["--before", files / "three.npy", "--after", files / "after.npy"],
            "after: expected the 3 bands of before, got 4",
        ),
        ([*pair, "--scale", "none"], "scale: expected pair or training"),
        (
            ["--before", files / "before.npy", "--after", files / "before.npy"],
            "before, after: expected two images that differ, got the same values in both",
        ),
    ):
        code, _, err = run("predict", "spectralkan", "--checkpoint", checkpoint, *options, "--out", files / "c.png")
        assert code == 1 and sentence in err and err.count("\n") == 1
    twice = data_options(files)
    twice[3] = twice[1]
    code, _, err = run("train", "spectralkan", *twice, *QUICK, "--out", files / "twice")
    assert code == 1 and "before, after: expected two images that differ" in err and not (files / "twice").exists()
    (files / "folder.png").mkdir()
    code, _, err = run("predict", "spectralkan", "--checkpoint", checkpoint, *pair, "--out", files / "folder.png")
    assert code == 1 and "out: expected a file, got the folder" in err
    code, _, err = run("predict", "spectralkan", "--checkpoint", checkpoint, *pair, "--out", files / "c.jpg")
    assert code == 1 and "out: expected a name ending in .png" in err
    assert not (files / "c.png").exists()


def test_bench_and_verify_pass_their_options_on(run, monkeypatch, tmp_path):
    import importlib

    calls = []
    for module in ("pyml.benchmarks.run", "pyml.testing.verify"):
        parent, _, name = module.rpartition(".")
        fake = types.ModuleType(module)
        fake.main = lambda *args, **options: calls.append((args, options)) or 0
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(importlib.import_module(parent), name, fake, raising=False)
    assert (
        run(
            "bench",
            "bspline",
            "--threads",
            2,
            "--quick",
            "--out",
            tmp_path,
            "--dtype",
            "bfloat16",
            "--only",
            "kan",
            "--budget",
            9,
        )[0]
        == 0
    )
    assert run("verify", "--device", "cpu")[0] == 0
    assert calls == [
        (
            (["bspline"],),
            {"device": None, "threads": 2, "dtype": "bfloat16", "quick": True, "out": Path(tmp_path), "compare": None}
            | {"only": "kan", "budget": 9.0},
        ),
        ((), {"device": "cpu"}),
    ]
    sys.modules["pyml.testing.verify"].main = lambda **_: 3
    assert run("verify")[0] == 3


def test_version(run):
    from pyml import __version__

    assert run("--version")[:2] == (0, f"pyml {__version__}\n")


def test_info(run):
    code, out, err = run("info", "--ops")
    assert code == 0, err
    for text in ("wkan_conv2d", "kan_linear", torch.__version__):
        assert text in out


def test_demo(run, tmp_path, monkeypatch):
    needs(*TRAINING)
    import dataclasses

    from pyml.methods.spectralkan import demo

    monkeypatch.setattr(demo, "OPTIONS", dataclasses.replace(demo.OPTIONS, epochs=2))
    monkeypatch.setattr(demo, "generate_scene", lambda *_: generate_scene(20, 24, 4))
    code, out, err = run("demo", "--out", tmp_path / "demo", "--device", "cpu")
    assert code == 0, err
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert numbers["agreement"] > 0.99
    for row in (numbers["kernels"], numbers["torch"]):
        assert row["step_seconds"] > 0 and row["map_seconds"] > 0
    assert "plain torch" in out and "gain" in out
    assert (tmp_path / "demo" / "spectralkan" / "seed0" / "change_map.png").stat().st_size > 0
