"""LSNet: baselines, training, restart after a kill, several processes."""

import csv
import dataclasses
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import write_json
from pyml.methods._measure import BEST_PSNR, Cost, flops, image_scores, parameters
from pyml.methods._pictures import to_float
from pyml.methods.lsnet import predict
from pyml.methods.lsnet.archs import Affine, attention_flops, build
from pyml.methods.lsnet.data import Pairs, load_pairs
from pyml.methods.lsnet.train import Options, train
from pyml.nn import LSNet
from tests.lsnet_pairs import tinted, write_folders
from tests.method_runs import (
    ROOT,
    TRAINING,
    TWO_PROCESSES,
    assert_same_bits,
    assert_same_runs,
    kill_and_resume,
    launch,
    learned,
    needs,
)

needs(*TRAINING)
DATA = Path(os.environ.get("PYML_DATA", ROOT.parent / "shared" / "data")) / "underwater"


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path)


# --- scores, cost, baselines ------------------------------------------------------------------------------------------


def test_scores_by_hand():
    truth = torch.rand(2, 3, 16, 16)
    error = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    found = image_scores(torch.where(truth > 0.5, truth - error, truth + error), truth)
    assert found["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3) and 0.5 < found["ssim"] < 1
    assert image_scores(truth + 3, torch.ones_like(truth))["ssim"] == pytest.approx(1)  # clipped


@pytest.mark.skipif(sys.platform != "linux", reason="the resident high-water mark is read from /proc")
def test_a_pause_costs_nothing():
    with Cost() as cost:
        torch.ones(10_000_000).sum()
        with cost.paused():
            torch.ones(60_000_000).sum()
            time.sleep(0.5)
        torch.ones(20_000_000).sum()
    assert 60 < cost.peak_mb < 120  # 80 of the last one
    assert cost.seconds < 0.5


def test_flops_count_the_attention():
    example = torch.zeros(1, 3, 64, 64)
    identity = flops(build("identity"), example)
    per_pixel = 2 * (48 + 81 + 51 * 32 + 32 * 3)
    assert identity == 2 * per_pixel * 64 * 64  # two paths
    tokens, inside = 32 * 32, 12 * 108 + 12 * 25
    routing = 256 * 256 * 48
    for arch, keys in (("lsnet", tokens // 8), ("dense", tokens)):
        attention = 2 * 2 * tokens * keys * 60
        model = build(arch)
        assert attention_flops(model, example.shape) == attention
        rest = 2 * 2 * (tokens * inside + (routing if arch == "lsnet" else 0))
        assert flops(model, example) == identity + attention + rest
    full = LSNet()
    assert attention_flops(full, (1, 3, 256, 256)) == 2 * 4_026_531_840
    assert parameters(full) == 7534


def test_affine_fit_is_exact_where_it_can_be():
    pairs = tinted(side=32)
    model = Affine()
    model.fit(pairs, [0, 1, 2])
    for i in range(6):
        after = model(to_float(pairs.inputs[i]).unsqueeze(0))[0]
        assert (after - to_float(pairs.targets[i])).abs().max() < 0.02  # rounding to bytes, times 1 / 0.3
    assert parameters(model) == 12
    flat = Pairs([torch.full((3, 8, 8), 7, dtype=torch.uint8)] * 2, pairs.targets, ["a", "b"], "flat")
    model.fit(Pairs(flat.inputs, [torch.full((3, 8, 8), 51, dtype=torch.uint8)] * 2, ["a", "b"], "flat"), [0, 1])
    torch.testing.assert_close(model(to_float(flat.inputs[0]).unsqueeze(0)), torch.full((1, 3, 8, 8), 0.2))


# --- training ---------------------------------------------------------------------------------------------------------

QUICK = {"epochs": 3, "crop_size": 16, "batch_size": 2}


def test_training_writes_everything(tmp_path):
    options = Options(archs=("raw", "affine", "identity", "lsnet"), seeds=2, **QUICK)
    metrics = train(tinted(), options, tmp_path / "run", quiet=True, device="cpu")
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    counts = {"raw": (0, 0), "affine": (12, 12), "identity": (4597, 3886), "lsnet": (8245, 7534)}
    for arch, (stored, used) in counts.items():
        row = metrics["archs"][arch]
        assert (row["parameters_stored"], row["parameters_used"]) == (stored, used)
        assert len(row["psnr"]["values"]) == 2 and {"ssim", "train_seconds", "image_seconds"} < row.keys()
        for seed in range(2):
            folder = tmp_path / "run" / arch / f"seed{seed}"
            assert (folder / "contact_sheet.png").stat().st_size > 0
            if arch in ("identity", "lsnet"):
                with (folder / "log.csv").open() as file:
                    log = list(csv.DictReader(file))
                assert [int(line["epoch"]) for line in log] == [1, 2, 3]
                assert all(float(line["test_psnr"]) > 0 for line in log)
                assert float(log[-1]["test_psnr"]) == row["psnr"]["values"][seed]
    assert metrics["archs"]["affine"]["psnr"]["mean"] > 35 > metrics["archs"]["raw"]["psnr"]["mean"]
    assert metrics["archs"]["lsnet"]["attention_flops"] == 2 * 2 * 256 * 32 * 60  # 12 x 12 pixels padded to 16 x 16
    table = (tmp_path / "run" / "table.md").read_text()
    assert all(f"| {arch} | {metrics['archs'][arch]['psnr']['mean']:.2f} ±" in table for arch in counts)


def test_training_learns(tmp_path):
    options = Options(
        archs=("raw", "lsnet"), epochs=30, crop_size=24, batch_size=2, learning_rate=5e-3, validate_every=0
    )
    archs = train(tinted(12), options, tmp_path / "run", quiet=True, device="cpu")["archs"]
    assert archs["lsnet"]["psnr"]["mean"] > archs["raw"]["psnr"]["mean"] + 4


def test_average_is_what_is_scored_and_saved(tmp_path):
    options = Options(ema=0.8, **QUICK)
    metrics = train(tinted(), options, tmp_path / "run", quiet=True, device="cpu")
    folder = tmp_path / "run" / "lsnet" / "seed0"
    tensors = learned(folder)
    name = "conv3.0.conv.weight"
    assert not torch.equal(tensors[f"model.{name}"], tensors[f"average.module.{name}"])
    assert tensors["average.n_averaged"] == 3 * 2  # epochs x batches
    model = predict.load_model(folder / "checkpoint.safetensors")
    assert torch.equal(model.state_dict()[name], tensors[f"average.module.{name}"])
    pairs, (test,) = tinted(), [json.loads((tmp_path / "run" / "config.json").read_text())["test_names"]]
    scores = []
    for i in map(int, test):
        after = predict.enhance(model, to_float(pairs.inputs[i]))
        scores.append(image_scores(after.unsqueeze(0), to_float(pairs.targets[i]).unsqueeze(0))["psnr"])
    assert metrics["archs"]["lsnet"]["psnr"]["mean"] == pytest.approx(np.mean(scores), rel=1e-6)


def test_validation_changes_no_bit(tmp_path):
    for name, every in (("often", 1), ("sometimes", 2), ("never", 0)):
        train(tinted(), Options(validate_every=every, **QUICK), tmp_path / name, quiet=True, device="cpu")
    first = learned(tmp_path / "often" / "lsnet" / "seed0")
    for name, measured in (("sometimes", [False, True, False]), ("never", [False] * 3)):
        folder = tmp_path / name / "lsnet" / "seed0"
        assert_same_bits(first, learned(folder))
        with (folder / "log.csv").open() as file:
            assert [line["test_psnr"] != "nan" for line in csv.DictReader(file)] == measured


def test_bad_runs_are_one_sentence(tmp_path):
    options = Options(**QUICK)
    for change, sentence in (
        ({"archs": ("unet",)}, "arch: expected one of raw, affine, identity, dense, lsnet, lsnet-fixed, got 'unet'"),
        ({"ema": 1.0}, "ema: expected a decay from 0"),
        ({"crop_size": 26}, "crop-size: expected at most the sides of every image"),
        ({"test_fraction": 0.01}, "test-fraction: 0.01 of 6 pairs leaves no pair"),
        ({"learning_rate": 0.0}, "learning-rate: expected a finite number > 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning-rate: expected a finite number > 0, got nan"),
        ({"learning_rate": math.inf}, "learning-rate: expected a finite number > 0, got inf"),
        ({"ssim_weight": math.nan}, "ssim-weight: expected a finite number >= 0, got nan"),
        ({"ssim_weight": -0.1}, "ssim-weight: expected a finite number >= 0, got -0.1"),
        ({"validate_every": -1}, "validate-every: expected at least 0, got -1"),
        ({"test_fraction": math.nan}, "test-fraction: expected a number between 0 and 1, got nan"),
        ({"ema": math.nan}, "ema: expected a decay from 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(tinted(), dataclasses.replace(options, **change), tmp_path / "run", quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()
    train(tinted(), dataclasses.replace(options, archs=("raw",)), tmp_path / "done", quiet=True, device="cpu")
    for change, pairs in (({"epochs": 4}, tinted()), ({}, tinted(side=26)), ({}, tinted(7)), ({}, tinted(seed=1))):
        again = dataclasses.replace(options, archs=("raw",), **change)
        with pytest.raises(UserError, match="was started with"):
            train(pairs, again, tmp_path / "done", resume=True, quiet=True, device="cpu")
    with pytest.raises(UserError, match=r"loss is (nan|inf) in epoch 1: no state was saved before it$"):
        bad = dataclasses.replace(options, learning_rate=1e30)
        train(tinted(), bad, tmp_path / "nan", quiet=True, device="cpu")


def test_equal_pictures_have_a_finite_score(tmp_path):
    """One pair among others may need no restoring; its PSNR is infinite, which JSON does not know."""
    pairs = tinted()
    assert image_scores(*[to_float(pairs.inputs[0]).unsqueeze(0)] * 2)["psnr"] == BEST_PSNR
    options = Options(archs=("raw",), test_fraction=0.5, **QUICK)
    names = train(pairs, options, tmp_path / "run", quiet=True, device="cpu")["config"]["test_names"]
    each = [image_scores(*(to_float(side[int(i)])[None] for side in (pairs.inputs, pairs.targets))) for i in names]
    pairs.targets[int(names[0])] = pairs.inputs[int(names[0])]
    train(pairs, options, tmp_path / "some", quiet=True, device="cpu")
    found = json.loads((tmp_path / "some" / "metrics.json").read_text(), parse_constant=pytest.fail)
    expected = (BEST_PSNR + sum(scores["psnr"] for scores in each[1:])) / len(each)
    assert found["archs"]["raw"]["psnr"]["mean"] == pytest.approx(expected)
    pairs.targets = pairs.inputs
    with pytest.raises(UserError, match=r"^input, target: expected pictures that differ, got the same in both$"):
        train(pairs, options, tmp_path / "none", quiet=True, device="cpu")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_file_holds_what_json_does_not_know(tmp_path, value):
    with pytest.raises(UserError, match=r"metrics\.json: expected finite numbers, got NaN or an infinity$"):
        write_json(tmp_path / "metrics.json", {"a": [value]})
    assert not list(tmp_path.iterdir())


# --- restart and processes --------------------------------------------------------------------------------------------

LONG = Options(epochs=12, crop_size=16, batch_size=2, ema=0.9, seeds=2)


def command(folders, out, *more):
    """A run of LONG on the folders, without the interpreter."""
    return [
        "-m", "pyml.cli", "train", "lsnet", "--input", str(folders / "input"), "--target", str(folders / "target"),
        "--epochs", "12", "--crop-size", "16", "--batch-size", "2", "--size", "0", "--ema", "0.9", "--seeds", "2",
        "--device", "cpu", "--threads", "1", "--quiet", "--out", str(out), *more,
    ]  # fmt: skip


def test_killed_run_resumes_with_the_same_weights(folders):
    whole, killed = folders / "whole", folders / "killed"
    torch.set_num_threads(1)
    train(load_pairs(folders / "input", folders / "target", None)[0], LONG, whole, quiet=True, device="cpu")
    assert 2 <= kill_and_resume(partial(command, folders), killed, "lsnet", rows=3) < LONG.epochs
    assert_same_runs(whole, killed, "lsnet")
    assert any(key.startswith("average.") for key in learned(killed / "lsnet" / "seed1"))
    rows = [json.loads((folder / "metrics.json").read_text())["archs"]["lsnet"] for folder in (whole, killed)]
    assert rows[0]["psnr"] == rows[1]["psnr"] and rows[0]["ssim"] == rows[1]["ssim"]


def test_two_processes_train_together(folders):
    """5 training pairs in batches of 4: the last batch leaves one process without a pair."""
    out = folders / "two"
    more = ("--epochs", "2", "--seeds", "1", "--batch-size", "4", "--test-fraction", "0.16", "--arch", "identity")
    launch(TWO_PROCESSES, command(folders, out, *more))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["processes"] == 2 and metrics["config"]["train_pairs"] == 5
    here = folders / "one"
    options = Options(archs=("identity",), epochs=2, crop_size=16, batch_size=4, ema=0.9, test_fraction=0.16)
    train(load_pairs(folders / "input", folders / "target", None)[0], options, here, quiet=True, device="cpu")
    first, second = (learned(folder / "identity" / "seed0") for folder in (here, out))
    for key in first:  # no BatchNorm in this arch: only the order of the sums differs
        torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.skipif(
    not DATA.exists(), reason="the real pairs are not here (PYML_DATA names the folder that holds them)"
)
def test_real_pairs(tmp_path):
    pairs, notes = load_pairs(DATA / "input", DATA / "target")
    assert len(pairs) == 80 and not notes
    torch.set_num_threads(1)
    options = Options(archs=("raw", "affine", "lsnet"), epochs=10, crop_size=64, validate_every=0)
    archs = train(pairs, options, tmp_path / "run", quiet=True, device="cpu")["archs"]
    psnr = {arch: row["psnr"]["mean"] for arch, row in archs.items()}
    assert psnr["affine"] > psnr["raw"] + 4
    assert psnr["lsnet"] > psnr["affine"]
