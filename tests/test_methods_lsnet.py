"""LSNet: baselines, training, restart after a kill, several processes, prediction, commands."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyml import cli
from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._measure import flops, image_scores, parameters
from pyml.methods._pictures import read_picture, save_png, to_bytes, to_float
from pyml.methods.lsnet import predict
from pyml.methods.lsnet.archs import ARCHS, Affine, attention_flops, build
from pyml.methods.lsnet.data import Pairs, load_pairs
from pyml.methods.lsnet.train import Options, train
from pyml.nn import LSNet

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("PYML_DATA", ROOT.parent / "shared" / "data")) / "underwater"


def tinted(count=6, side=24, seed=0):
    """Pairs whose inputs lost red; smooth pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    targets = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    inputs = targets * torch.tensor([0.3, 0.8, 0.9]).view(3, 1, 1) + torch.tensor([0.0, 0.15, 0.1]).view(3, 1, 1)
    names = [str(i) for i in range(count)]
    return Pairs([to_bytes(x) for x in inputs], [to_bytes(y) for y in targets], names, "tinted")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; its exit code, stdout and stderr."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def call(*arguments):
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folders(tmp_path):
    """The tinted pairs as files."""
    pairs = tinted()
    for side, images in (("input", pairs.inputs), ("target", pairs.targets)):
        (tmp_path / side).mkdir()
        for name, image in zip(pairs.names, images):
            save_png(image.permute(1, 2, 0), tmp_path / side / f"{name}.png")
    return tmp_path


# --- scores, cost, baselines ------------------------------------------------------------------------------------------


def test_scores_by_hand():
    truth = torch.rand(2, 3, 16, 16)
    error = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    found = image_scores(torch.where(truth > 0.5, truth - error, truth + error), truth)
    assert found["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3) and 0.5 < found["ssim"] < 1
    assert image_scores(truth + 3, torch.ones_like(truth))["ssim"] == pytest.approx(1)  # clipped


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


def state(folder):
    return {k: t for k, t in load_checkpoint(folder / "checkpoint.safetensors").tensors.items() if k[:3] != "rng"}


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
    options = Options(archs=("raw", "lsnet"), epochs=30, crop_size=24, batch_size=2, learning_rate=5e-3)
    archs = train(tinted(12), options, tmp_path / "run", quiet=True, device="cpu")["archs"]
    assert archs["lsnet"]["psnr"]["mean"] > archs["raw"]["psnr"]["mean"] + 4


def test_average_is_what_is_scored_and_saved(tmp_path):
    options = Options(ema=0.8, **QUICK)
    metrics = train(tinted(), options, tmp_path / "run", quiet=True, device="cpu")
    folder = tmp_path / "run" / "lsnet" / "seed0"
    tensors = state(folder)
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
    first = state(tmp_path / "often" / "lsnet" / "seed0")
    for name, measured in (("sometimes", [False, True, False]), ("never", [False] * 3)):
        folder = tmp_path / name / "lsnet" / "seed0"
        again = state(folder)
        assert all(torch.equal(first[key], again[key]) for key in first)
        with (folder / "log.csv").open() as file:
            assert [line["test_psnr"] != "nan" for line in csv.DictReader(file)] == measured


def test_bad_runs_are_one_sentence(tmp_path):
    options = Options(**QUICK)
    for change, sentence in (
        ({"archs": ("unet",)}, "arch: expected one of raw, affine, identity, dense, lsnet, lsnet-fixed, got 'unet'"),
        ({"ema": 1.0}, "ema: expected a decay from 0"),
        ({"crop_size": 26}, "crop-size: expected at most the sides of every image"),
        ({"test_fraction": 0.01}, "test-fraction: 0.01 of 6 pairs leaves no pair"),
        ({"learning_rate": 0.0}, "a rate above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(tinted(), dataclasses.replace(options, **change), tmp_path / "run", quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"loss is (nan|inf) in epoch"):
        bad = dataclasses.replace(options, learning_rate=1e30)
        train(tinted(), bad, tmp_path / "nan", quiet=True, device="cpu")


# --- restart and processes --------------------------------------------------------------------------------------------

LONG = ["--epochs", "12", "--crop-size", "16", "--batch-size", "2", "--size", "0", "--ema", "0.9", "--seeds", "2"]


def command(folders, out, *more):
    return [
        "-m", "pyml.cli", "train", "lsnet", "--input", str(folders / "input"), "--target", str(folders / "target"),
        *LONG, "--device", "cpu", "--threads", "1", "--quiet", "--out", str(out), *more,
    ]  # fmt: skip


def wait_for_rows(log, rows, process, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if log.exists() and log.read_text().count("\n") > rows:
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError(f"{log} has not reached {rows} rows")


def test_killed_run_resumes_with_the_same_bits(folders):
    whole, killed = folders / "whole", folders / "killed"
    subprocess.run([sys.executable, *command(folders, whole)], check=True, cwd=ROOT)
    process = subprocess.Popen([sys.executable, *command(folders, killed)], cwd=ROOT)
    try:
        wait_for_rows(killed / "lsnet" / "seed1" / "log.csv", 3, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "metrics.json").exists()
    assert 2 <= load_checkpoint(killed / "lsnet" / "seed1" / "checkpoint.safetensors").info["epoch"] < 12
    subprocess.run([sys.executable, *command(folders, killed, "--resume")], check=True, cwd=ROOT)
    for seed in ("seed0", "seed1"):
        one, two = (folder / "lsnet" / seed for folder in (whole, killed))
        first, second = state(one), state(two)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        assert any(key.startswith("average.") for key in first)
        assert (one / "log.csv").read_text() == (two / "log.csv").read_text()
    rows = [json.loads((folder / "metrics.json").read_text())["archs"]["lsnet"] for folder in (whole, killed)]
    assert rows[0]["psnr"] == rows[1]["psnr"] and rows[0]["ssim"] == rows[1]["ssim"]


def test_two_processes_train_together(folders):
    """5 training pairs in batches of 4: the last batch leaves one process without a pair."""
    out = folders / "two"
    more = ("--epochs", "2", "--seeds", "1", "--batch-size", "4", "--test-fraction", "0.16", "--arch", "identity")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command(folders, out, *more)]
    subprocess.run(
        [sys.executable, *launch], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["processes"] == 2 and metrics["config"]["train_pairs"] == 5
    here = folders / "one"
    options = Options(archs=("identity",), epochs=2, crop_size=16, batch_size=4, ema=0.9, test_fraction=0.16)
    train(load_pairs(folders / "input", folders / "target", None)[0], options, here, quiet=True, device="cpu")
    first, second = (state(folder / "identity" / "seed0") for folder in (here, out))
    for key in first:  # no BatchNorm in this arch: only the order of the sums differs
        torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-5, msg=key)


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    train(tinted(), Options(**{**QUICK, "epochs": 1}), tmp_path / "run", quiet=True, device="cpu")
    return tmp_path / "run" / "lsnet" / "seed0" / "checkpoint.safetensors"


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 20), (31, 35)])
def test_any_size(size):
    torch.manual_seed(0)
    model = LSNet().eval()
    image = torch.rand(3, *size)
    after = predict.enhance(model, image)
    assert after.shape == image.shape
    compensate, exposed = predict.terms(model, image)
    torch.testing.assert_close(image + compensate - exposed, after)
    height, width = (side + side % 2 for side in size)
    grown = F.pad(image.unsqueeze(0), (0, width - size[1], 0, height - size[0]), mode="replicate")
    torch.testing.assert_close(after, model(grown)[0, :, : size[0], : size[1]])


def test_predict_command(run, trained, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, side in (("a", 24), ("b", 25)):
        save_png(to_bytes(tinted(1, side).inputs[0] / 255).permute(1, 2, 0), pictures / f"{name}.png")
    (pictures / "broken.jpg").write_text("x")
    (pictures / "notes.txt").write_text("x")
    out = tmp_path / "out"
    code, text, err = run("predict", "lsnet", "--checkpoint", trained, "--input", pictures, "--out", out, "--maps")
    assert code == 0 and "2 pictures, 1 left out" in text
    assert f"warning: {pictures / 'broken.jpg'}: is no picture that can be read\n" in err
    names = {f"{stem}{end}.png" for stem in "ab" for end in ("", "_compensate", "_exposed")}
    assert {path.name for path in out.iterdir()} == names
    model = predict.load_model(trained)
    image = to_float(read_picture(pictures / "b.png"))
    expected = to_bytes(predict.enhance(model, image)).float()
    assert (read_picture(out / "b.png").float() - expected).abs().max() <= 1  # the sum of the terms may round elsewhere
    terms = torch.stack(predict.terms(model, image))
    scaled = to_bytes((terms - terms.min()) / (terms.max() - terms.min()))
    for name, term in zip(("compensate", "exposed"), scaled):
        assert torch.equal(read_picture(out / f"b_{name}.png"), term)
    low, high = (f"{float(bound):.3f}" for bound in (terms.min(), terms.max()))
    assert f"b.png (maps: black {low}, white {high})" in text

    code, _, err = run(
        "predict", "lsnet", "--checkpoint", trained, "--input", pictures / "a.png", "--out", out, "--size", 32
    )
    assert code == 0 and read_picture(out / "a.png").shape == (3, 32, 32), err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--checkpoint": "absent.safetensors"}, "checkpoint: no file"),
        ({"--checkpoint": "weights.pth"}, "is not a weight file of torch"),
        ({"--input": "absent"}, "no picture of"),
        ({"--input": "none"}, "input: no picture (.jpg"),
        ({"--out": "file"}, "out: expected a folder, got the file"),
        ({"--device": "tpu"}, "device: expected auto, cpu or cuda"),
    ],
)
def test_wrong_prediction_is_one_sentence(run, trained, tmp_path, change, sentence):
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "weights.pth").write_text("x")
    save_png(tinted(1).inputs[0].permute(1, 2, 0), tmp_path / "a.png")
    options = {"--checkpoint": trained, "--input": tmp_path / "a.png", "--out": tmp_path / "out"}
    options |= {key: value if key == "--device" else tmp_path / value for key, value in change.items()}
    code, _, err = run("predict", "lsnet", *(part for item in options.items() for part in item))
    assert code == 1 and not (tmp_path / "out").exists()
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sentence in lines[-1]
    assert all(line.startswith("warning: ") for line in lines[:-1])


def test_an_input_is_never_overwritten(run, trained, tmp_path):
    save_png(tinted(1).inputs[0].permute(1, 2, 0), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    code, _, err = run("predict", "lsnet", "--checkpoint", trained, "--input", tmp_path / "a.png", "--out", tmp_path)
    assert code == 1 and "would overwrite it" in err and (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("wrapped", [None, "state_dict", "module."])
def test_public_weight_files_load(tmp_path, wrapped):
    model = LSNet().eval()
    state = model.state_dict()
    if wrapped == "module.":
        state = {f"module.{name}": t for name, t in state.items()}
    torch.save({"state_dict": state} if wrapped == "state_dict" else state, tmp_path / "weight.pth")
    image = torch.rand(3, 16, 16)
    torch.testing.assert_close(predict.load_model(tmp_path / "weight.pth")(image[None]), model(image[None]))
    state.popitem()
    torch.save(state, tmp_path / "weight.pth")
    with pytest.raises(UserError, match=r"weight\.pth: expected (module\.)?finallconv\.conv2\.bias of shape"):
        predict.load_model(tmp_path / "weight.pth")
    torch.save([1, 2], tmp_path / "weight.pth")
    with pytest.raises(UserError, match="holds a list, expected 60 named tensors"):
        predict.load_model(tmp_path / "weight.pth")


# --- commands ---------------------------------------------------------------------------------------------------------


def test_train_command_on_folders(run, folders):
    (folders / "input" / "notes.txt").write_text("x")
    code, out, err = run(
        "train", "lsnet", "--input", folders / "input", "--target", folders / "target", "--size", 16, "--crop-size", 16,
        "--epochs", 1, "--arch", "raw,identity", "--out", folders / "run", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "notes.txt is no picture file and is left out" in err
    for text in ("PSNR", "SSIM", "GFLOP", "identity", "metrics.json"):
        assert text in out
    config = json.loads((folders / "run" / "metrics.json").read_text())["config"]
    assert config["train_pairs"] == 4 and len(config["test_names"]) == 2


def test_train_command_without_data(run, tmp_path):
    pytest.importorskip("skimage")
    code, out, err = run(
        "train", "lsnet", "--made-pairs", 12, "--made-size", 32, "--crop-size", 16, "--epochs", 1, "--device", "cpu",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "lsnet" in out and (tmp_path / "run" / "lsnet" / "seed0" / "contact_sheet.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--input", "here"], "--target: expected too, as some data is given"),
        (["--input", "absent", "--target", "absent"], "input: expected a folder, got absent"),
        (["--size", "25", "--input", "a", "--target", "b"], "size: expected an even number, got 25"),
        (["--arch", "lsnet,unet"], "arch: expected one of raw"),
        (["--crop-size", "13"], "crop-size: expected an even number"),
        (["--made-size", "33"], "made: expected at least 2 pairs and an even side"),
        (["--validate-every", "-1"], "validate-every: expected no negative number"),
    ],
)
def test_wrong_training_is_one_sentence(run, tmp_path, more, sentence):
    code, _, err = run("train", "lsnet", "--out", tmp_path / "run", *more)
    assert code == 1
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    not DATA.exists(), reason="the real pairs are not here (PYML_DATA names the folder that holds them)"
)
def test_real_pairs(tmp_path):
    pairs, notes = load_pairs(DATA / "input", DATA / "target")
    assert len(pairs) == 80 and not notes
    options = Options(archs=("raw", "affine", "lsnet"), epochs=8, validate_every=0)
    archs = train(pairs, options, tmp_path / "run", quiet=True, device="cpu")["archs"]
    psnr = {arch: row["psnr"]["mean"] for arch, row in archs.items()}
    assert psnr["affine"] > psnr["raw"] + 4
    assert psnr["lsnet"] > psnr["raw"] + 4


def test_every_arch_has_a_name_in_the_help(run):
    _, out, _ = run("train", "lsnet", "--help")
    words = set(out.replace(",", " ").replace("│", " ").replace(";", " ").split())
    assert set(ARCHS) <= words
