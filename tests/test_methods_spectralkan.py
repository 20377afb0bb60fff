"""SpectralKAN: networks and their maps, scores, checkpoints, training, restart after a kill, several processes."""

import csv
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import capture, load_checkpoint, restore, save_checkpoint, write_atomically
from pyml.methods._measure import Cost, change_scores, flops, parameters, summarise
from pyml.methods.spectralkan import data, predict
from pyml.methods.spectralkan.archs import ARCHS, build, map_patches
from pyml.methods.spectralkan.scene import generate_scene
from pyml.methods.spectralkan.train import Options, train
from tests.method_runs import (
    LAUNCHERS,
    ROOT,
    TRAINING,
    assert_same_bits,
    assert_same_runs,
    kill_and_resume,
    launch,
    learned,
    needs,
)

needs(*TRAINING)
DATA = Path(os.environ.get("PYML_DATA", ROOT.parent / "shared" / "data")) / "landsat_taizhou"


@pytest.fixture
def small():
    """A scene that trains in a second."""
    return generate_scene(24, 20, 5, seed=3)


# --- networks and maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "hidden", "counts"),
    [
        ("spectralkan", (16,), (7552, 9272, 10312)),
        ("spectralkan", (), (3020, 3536, 3848)),
        ("kan", (), (620320, 792320, 896320)),
        ("wkan", (), (155192, 198192, 224192)),
        ("mtsf-kan", (), (29280, 36160, 40320)),
    ],
)
def test_parameter_counts_of_the_paper(arch, hidden, counts):
    assert tuple(parameters(build(arch, bands, 5, hidden)) for bands in (155, 198, 224)) == counts


def test_flops_count_the_spline():
    per_input = 4 + 25  # SiLU, four basis functions
    spatial = 25 * (per_input + 8 + 4 * 16) + 16 * (per_input + 8 + 4 * 1)
    spectral = 6 * (per_input + 8 + 4 * 2)
    assert flops(build("spectralkan", 6, 5), torch.zeros(1, 6, 5, 5)) == 6 * spatial + spectral
    kan = 150 * (per_input + 10 * 16) + 16 * (per_input + 10 * 2)
    assert flops(build("kan", 6, 5), torch.zeros(1, 6, 5, 5)) == kan
    assert flops(build("cnn", 6, 5), torch.zeros(1, 6, 5, 5)) == 2 * (9 * 9 * 6 * 32 + 9 * 32 * 32 + 32 * 2)


def test_flops_count_the_products_of_attention():
    linear = 6 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64)  # a token: embedding; in two layers four projections, two maps
    attention = 2 * 2 * 25 * 32  # in two layers two products with every token
    model = build("transformer", 6, 5)
    for mode in (model.train(), model.eval()):
        assert flops(mode, torch.zeros(1, 6, 5, 5)) == 2 * (25 * (linear + attention) + 32 * 2) == 988_928


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("border", data.BORDERS)
def test_map_equals_patches(arch, border, monkeypatch):
    torch.manual_seed(0)
    model = build(arch, 3, 5).double()
    image = torch.rand(3, 9, 8, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        truth = map_patches(model, data.pad_border(image, 2, border), 5)
    for tile_rows in (None, 1, 4, 100):
        torch.testing.assert_close(
            predict.predict_scene(model, image, tile_rows, border), truth, rtol=1e-10, atol=1e-12
        )
    monkeypatch.setattr(predict, "_tile_values", lambda device: 9)  # three pixels a tile: columns are cut too
    torch.testing.assert_close(predict.predict_scene(model, image, None, border), truth, rtol=1e-10, atol=1e-12)


def test_map_of_any_size_and_wrong_bands():
    model = build("spectralkan", 2, 5).train()
    for size in ((1, 1), (1, 9), (6, 1), (3, 2)):
        assert predict.predict_scene(model, torch.rand(2, *size)).shape == (2, *size)
    assert model.training
    with pytest.raises(UserError, match="expected 2 bands, got 3"):
        predict.predict_scene(model, torch.rand(3, 4, 4))
    with pytest.raises(UserError, match=r"^predict: expected a scene \[bands, H, W\], got \[1, 2, 4, 4\]$"):
        predict.predict_scene(model, torch.rand(1, 2, 4, 4))
    with pytest.raises(UserError, match=r"^tile-rows: expected at least 1, got 0$"):
        predict.predict_scene(model, torch.rand(2, 4, 4), 0)
    with pytest.raises(UserError, match=r"^border: expected one of symmetric"):
        predict.predict_scene(model, torch.rand(2, 4, 4), border="torus")
    with pytest.raises(UserError, match="arch: expected one of"):
        build("mlp", 2)
    with pytest.raises(UserError, match="patch-size: expected an odd number"):
        build("cnn", 2, 4)


# --- scores and cost --------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    truth = torch.tensor([1] * 10 + [0] * 30)
    predicted = torch.tensor([1] * 8 + [0] * 2 + [1] * 3 + [0] * 27)
    scores = change_scores(predicted, truth)
    expected = (11 * 10 + 29 * 30) / 40**2
    assert scores["oa"] == pytest.approx(35 / 40)
    assert scores["aa"] == pytest.approx((8 / 10 + 27 / 30) / 2)
    assert scores["kappa"] == pytest.approx((35 / 40 - expected) / (1 - expected))
    assert scores["f1"] == pytest.approx(2 * 8 / (2 * 8 + 3 + 2))
    summary = summarise([{"oa": 0.5}, {"oa": 0.7}])
    assert summary["oa"]["mean"] == pytest.approx(0.6) and summary["oa"]["std"] == pytest.approx(0.02**0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident high-water mark is read from /proc")
def test_cost_sees_a_passing_allocation():
    for _ in range(2):  # the second time too, when the peak of the process is already that high
        with Cost() as cost:
            torch.ones(40_000_000).sum()
        assert 150 < cost.peak_mb < 250
        assert cost.seconds > 0


# --- checkpoints ------------------------------------------------------------------------------------------------------


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def test_checkpoint_keeps_every_bit(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    for _ in range(3):
        step(model, optimizer)
        scheduler.step()
    save_checkpoint(tmp_path / "c.safetensors", capture(model, optimizer, scheduler, {"epoch": 3}))
    for _ in range(2):
        step(model, optimizer)
        scheduler.step()
    other = torch.nn.Linear(3, 2)
    again = torch.optim.Adam(other.parameters(), lr=0.1)
    later = torch.optim.lr_scheduler.StepLR(again, 2, 0.9)
    checkpoint = load_checkpoint(tmp_path / "c.safetensors")
    restore(checkpoint, other, again, later)
    for _ in range(2):
        step(other, again)
        later.step()
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] and checkpoint.info["epoch"] == 3


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda part: part.write_text("old"))

    def broken(part):
        part.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old"


def test_a_cut_log_is_mended(tmp_path):
    from pyml.methods._engine import RunLog

    (tmp_path / "log.csv").write_text("epoch,loss\n1,0.5\n2,0.4\n3,0.3\n1")  # a kill cut the row of epoch 12
    log = RunLog(tmp_path, 2)
    log.add(3, {"loss": 0.25})
    log.close()
    assert (tmp_path / "log.csv").read_text().split() == ["epoch,loss", "1,0.5", "2,0.4", "3,0.25"]


def test_broken_checkpoints_are_one_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match="checkpoint: no file"):
        predict.load_model(path)
    path.write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        predict.load_model(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="was not written by pyml train"):
        predict.load_model(path)


# --- training ---------------------------------------------------------------------------------------------------------

QUICK = {"seeds": 1, "epochs": 4, "train_fraction": 0.2, "batch_size": 16}


def test_training_writes_everything(small, tmp_path):
    options = Options(archs=("spectralkan", "cnn"), **{**QUICK, "seeds": 2})
    metrics = train(small, options, tmp_path / "run", quiet=True, device="cpu")
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    for arch in options.archs:
        row = metrics["archs"][arch]
        assert len(row["oa"]["values"]) == 2 and row["parameters"] == parameters(build(arch, 5))
        assert row["oa"]["mean"] == pytest.approx(np.mean(row["oa"]["values"]))
        names = {"oa", "aa", "kappa", "f1", "train_seconds", "map_seconds", "train_peak_mb", "map_peak_mb"}
        assert names < row.keys() and row["flops_per_pixel"] > 0
        for seed in range(2):
            folder = tmp_path / "run" / arch / f"seed{seed}"
            for name in ("change_map.png", "confusion.png", "overview.png", "metrics.json"):
                assert (folder / name).stat().st_size > 0
            with (folder / "log.csv").open() as file:
                log = list(csv.DictReader(file))
            assert [int(line["epoch"]) for line in log] == [1, 2, 3, 4]
            assert list((folder / "tensorboard").iterdir())
    table = (tmp_path / "run" / "table.md").read_text()
    assert all(f"| {arch} | {metrics['archs'][arch]['oa']['mean']:.4f} ±" in table for arch in options.archs)
    pixels = [metrics["archs"][arch]["train_pixels"]["values"] for arch in options.archs]
    assert pixels[0] == pixels[1]


def test_saved_map_and_scores_agree(small, tmp_path):
    from PIL import Image

    options = Options(**QUICK)
    metrics = train(small, options, tmp_path / "run", quiet=True, device="cpu")
    folder = tmp_path / "run" / "spectralkan" / "seed0"
    model, checkpoint = predict.load_model(folder / "checkpoint.safetensors")
    image = data.difference(small.before, small.after)
    mapped = predict.predict_scene(model, image, border=checkpoint.info["border"]).argmax(0).numpy()
    np.testing.assert_array_equal(np.array(Image.open(folder / "change_map.png")) > 0, mapped == 1)
    test = data.split_pixels(small.labels, 0.2, 0, "random", 5).test.numpy()
    right = (mapped.flat[test] == small.labels.flat[test]).mean()
    assert metrics["archs"]["spectralkan"]["oa"]["mean"] == pytest.approx(right)


def test_training_learns(tmp_path):
    scene = generate_scene(48, 48, 8, seed=1)
    options = Options(seeds=1, epochs=60, train_fraction=0.1, spectral_hidden=(16,), learning_rate=5e-3)
    kappa = train(scene, options, tmp_path / "run", quiet=True, device="cpu")["archs"]["spectralkan"]["kappa"]["mean"]
    assert kappa > 0.6


def test_same_seed_same_bits(small, tmp_path):
    for name in ("a", "b"):
        train(small, Options(**QUICK), tmp_path / name, quiet=True, device="cpu")
    assert_same_bits(*(learned(tmp_path / name / "spectralkan" / "seed0") for name in ("a", "b")))


def test_bad_runs_are_one_sentence(small, tmp_path):
    options = Options(**QUICK)
    train(small, options, tmp_path / "run", quiet=True, device="cpu")
    with pytest.raises(UserError, match="already holds a run: choose another folder"):
        train(small, options, tmp_path / "run", quiet=True, device="cpu")
    with pytest.raises(UserError, match=r"resume: expected the folder of a run, got .*new without a config.json"):
        train(small, options, tmp_path / "new", resume=True, quiet=True, device="cpu")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="was started with epochs = 4, got 5"):
        train(small, Options(**{**QUICK, "epochs": 5}), tmp_path / "run", resume=True, quiet=True, device="cpu")
    for name in ("after", "labels"):  # other values under the same name and size
        other = dataclasses.replace(small, **{name: np.roll(getattr(small, name), 1, axis=-1)})
        with pytest.raises(UserError, match=r"was started with data_checksum = '\w+', got .*: use the same data and"):
            train(other, options, tmp_path / "run", resume=True, quiet=True, device="cpu")
    for name in ("knots", "extrapolation"):
        with pytest.raises(UserError, match=f"^{name}: expected one of .*, got 'sine'$"):
            train(small, Options(**QUICK, **{name: "sine"}), tmp_path / name, quiet=True, device="cpu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(small, options, tmp_path / "full", quiet=True, device="cpu")
    with pytest.raises(UserError, match=r"loss is (nan|inf) in epoch 1: no state was saved before it$"):
        train(small, Options(**{**QUICK, "learning_rate": 1e30}), tmp_path / "nan", quiet=True, device="cpu")
    for change, sentence in (
        ({"weight_decay": math.nan}, "weight-decay: expected a finite number >= 0, got nan"),
        ({"step_factor": 0.0}, "step-factor: expected a finite number > 0, got 0.0"),
        ({"spectral_hidden": (16, 0)}, "spectral-hidden: expected widths of at least 1, got"),
        ({"patch_size": 21}, "patch-size: expected at most the sides of the images, 24 x 20, got 21"),
    ):
        with pytest.raises(UserError, match=f"^{sentence}"):
            train(small, dataclasses.replace(options, **change), tmp_path / "none", quiet=True, device="cpu")
    same = dataclasses.replace(small, after=small.before.copy())
    with pytest.raises(UserError, match="before, after: expected two images that differ, got the same values in both"):
        train(same, options, tmp_path / "none", quiet=True, device="cpu")
    small.labels[:] = 0
    with pytest.raises(UserError, match="expected at least 2 changed pixels, got 0"):
        train(small, options, tmp_path / "none", quiet=True, device="cpu")
    assert not (tmp_path / "none").exists()


SUBPROCESS = Options(seeds=2, epochs=30, train_fraction=0.3, batch_size=8)


def command(out, *more):
    """What `train_here` does, as a command without the interpreter."""
    return [
        "-m", "pyml.cli", "train", "spectralkan", "--scene-size", "24", "20", "--scene-bands", "5", "--seeds", "2",
        "--epochs", "30", "--train-fraction", "0.3", "--batch-size", "8", "--device", "cpu", "--quiet",
        "--out", str(out), *more,
    ]  # fmt: skip


def train_here(out, **changes):
    train(generate_scene(24, 20, 5), dataclasses.replace(SUBPROCESS, **changes), out, quiet=True, device="cpu")


def test_killed_run_resumes_with_the_same_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_here(whole)
    assert 4 <= kill_and_resume(command, killed, "spectralkan", rows=5) < SUBPROCESS.epochs
    assert_same_runs(whole, killed, "spectralkan", files=["change_map.png"])
    scores = [json.loads((folder / "metrics.json").read_text())["archs"]["spectralkan"] for folder in (whole, killed)]
    assert all(scores[0][name] == scores[1][name] for name in ("oa", "aa", "kappa", "f1"))


@pytest.mark.parametrize("processes", [1, 2])
def test_launched_processes_train_like_this_one(tmp_path, processes):
    """One process under accelerate launch, two under torchrun."""
    here, there = tmp_path / "here", tmp_path / "there"
    launch(LAUNCHERS[processes], command(there, "--epochs", "3", "--seeds", "1"))
    train_here(here, epochs=3, seeds=1)
    assert json.loads((there / "config.json").read_text())["processes"] == processes
    first, second = (learned(folder / "spectralkan" / "seed0") for folder in (here, there))
    if processes == 1:
        assert_same_bits(first, second)
    else:
        for key in first:  # another order of summation in the gradients
            torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not DATA.exists(), reason="the Landsat pair is not here (PYML_DATA names the folder that holds it)")
@pytest.mark.parametrize(("hidden", "seeds"), [((), 5), ((16,), 2)])
def test_landsat_pair(tmp_path, hidden, seeds):
    needs("spectral")
    before, after = data.load_pair(str(DATA / "2000TM"), str(DATA / "2003TM"))
    labels = data.load_labels(str(DATA / "change.bmp"), (400, 400), str(DATA / "unchanged.bmp"))
    assert (int((labels == 1).sum()), int((labels == 0).sum())) == (4227, 17163)
    scene = data.Scene(before, after, labels, "landsat")
    metrics = train(scene, Options(seeds=seeds, spectral_hidden=hidden), tmp_path / "run", quiet=True, device="cpu")
    row = metrics["archs"]["spectralkan"]
    assert row["oa"]["mean"] >= 0.950 and row["kappa"]["mean"] >= 0.83
