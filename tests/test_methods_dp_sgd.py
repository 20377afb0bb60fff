"""pyml train dp_sgd: arms of equal epsilon, tuning, restart after a kill, clients, guides, what is printed."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from pyml import cli
from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import Diverged
from pyml.methods.dp_sgd import report
from pyml.methods.dp_sgd.arms import ARMS, row_names
from pyml.methods.dp_sgd.federated import Clients, rounds
from pyml.methods.dp_sgd.model import build, load_model
from pyml.methods.dp_sgd.run import Point
from pyml.methods.dp_sgd.train import Options, best_point
from pyml.privacy import epsilon
from tests.dp_sgd_runs import CLIENTS, digits, phases_of, privacy_of, run
from tests.method_runs import TRAINING, assert_same_runs, kill_and_resume, learned, needs
from tests.test_methods_dp_sgd_data import idx

needs(*TRAINING, "sklearn", "opacus", "dp_accounting")


@pytest.fixture(scope="module")
def task():
    return digits()


# --- arms and their epsilon -------------------------------------------------------------------------------------------


def test_every_arm_spends_the_same_epsilon(tmp_path, task):
    out = tmp_path / "run"
    metrics = run(task, out, arms=tuple(ARMS), seeds=2)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert tuple(metrics["archs"]) == row_names(tuple(ARMS), (3.0,))
    for name, row in metrics["archs"].items():
        assert len(row["accuracy"]["values"]) == 2 and 0 <= row["accuracy"]["mean"] <= 100
        assert {"train_seconds", "train_peak_mb", "auc", "epsilon_lower"} < row.keys()
        if name == "non-private":
            assert row["epsilon"] is None and row["noise"] is None
            continue
        assert 2.9 < row["epsilon"] <= 3.0 and row["noise"] == "seeded"
        assert row["epsilon_with_tuning"] == row["epsilon"], "nothing was chosen"
        phases = phases_of(out / name / "seed1")
        assert phases[-1] == (row["multiplier"], 256 / 988, 8), "four steps an epoch"
        assert len(phases) == 1 + name.startswith("parameters"), "and those of its guide"
        assert all(kind != "dp" for kind, *_ in privacy_of(out / name / "seed1")[0]["history"]["provenance"])
        assert row["epsilon"] == pytest.approx(float(epsilon(phases, delta=1e-4, provenance="public")), rel=1e-9)
        gains = row["gain"]["values"]
        assert all(gain == 1 for gain in gains) if name == "isotropic@3" else all(gain > 0 for gain in gains)
        assert name != "l2@3" or max(gains) < 0.9, "with an L2 clip uneven noise is more noise"
    table = (out / "table.md").read_text()
    assert "reproducible, not private" in table and "| l2@3 | 3.0" in table.replace("2.99", "3.0")
    assert metrics["findings"] == report.findings(metrics) and all(
        f"- {line}\n" in table for line in metrics["findings"]
    )
    assert sum("-permuted@3" in line for line in metrics["findings"]) == 3
    assert (out / "accuracy.png").stat().st_size > 0


def test_arms_differ_and_share_their_start(tmp_path, task):
    """With a clip norm of almost nothing the weights stay those of the seed."""
    names = ("isotropic", "whitened", "whitened-permuted", "group", "l2", "iterate")
    run(task, tmp_path / "run", arms=names, clips=(1e-12,))
    still = [load_model(tmp_path / "run" / f"{arm}@3" / "seed0" / "model.safetensors")[0] for arm in names]
    run(task, tmp_path / "moved", arms=names)
    moved = [load_model(tmp_path / "moved" / f"{arm}@3" / "seed0" / "model.safetensors")[0] for arm in names]
    first = [next(net.parameters()) for net in still]
    assert all(torch.allclose(first[0], other, atol=1e-6) for other in first)
    weights = [next(net.parameters()) for net in moved]
    for i, one in enumerate(weights):
        assert all(not torch.allclose(one, two, atol=1e-4) for two in weights[:i])


def test_training_learns(tmp_path, task):
    """Much epsilon, so that noise is no excuse."""
    options = {"epsilons": (50.0,), "epochs": 40, "learning_rates": (0.2,), "clips": (0.5,), "momentum": 0.9}
    archs = run(task, tmp_path / "run", arms=("non-private", "isotropic", "whitened", "group"), **options)["archs"]
    assert {name: round(row["accuracy"]["mean"]) for name, row in archs.items() if row["accuracy"]["mean"] < 70} == {}


def test_released_models_have_no_key(tmp_path, task):
    run(task, tmp_path / "run", arms=("whitened",), private=True)
    folder = tmp_path / "run" / "whitened@3" / "seed0"
    released = load_checkpoint(folder / "model.safetensors")
    assert all(name.startswith("model.") for name in released.tensors)
    assert released.info.keys() == {
        "method", "side", "classes", "arm", "delta", "epsilon", "noise", "unit",
    }  # fmt: skip
    assert released.info["noise"] == "fast" and released.info["epsilon"] <= 3
    _, keys = privacy_of(folder)
    assert keys.keys() == {"key", "batches"}
    assert "reproducible" not in (tmp_path / "run" / "table.md").read_text()
    run(task, tmp_path / "again", arms=("whitened",), private=True)
    other = load_checkpoint(tmp_path / "again" / "whitened@3" / "seed0" / "model.safetensors")
    assert not torch.equal(released.tensors["model.0.weight"], other.tensors["model.0.weight"])


def test_empty_batches_count(tmp_path, task):
    """One record a batch, on average: more than a third of the batches have none."""
    run(task, tmp_path / "run", arms=("isotropic",), batch_size=1, epochs=1, learning_rates=(0.01,))
    folder = tmp_path / "run" / "isotropic@3" / "seed0"
    assert privacy_of(folder)[0]["history"]["phases"][0][1:] == [1 / 988, 988]
    weights = load_checkpoint(folder / "model.safetensors").tensors
    assert all(bool(t.isfinite().all()) for t in weights.values())


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_the_price_of_tuning_is_said(tmp_path, task):
    grid = {"learning_rates": (1.0, 2.0), "clips": (0.2,)}
    metrics = run(task, tmp_path / "run", arms=("non-private", "isotropic", "parameters"), **grid)
    for name, row in metrics["archs"].items():
        points = json.loads((tmp_path / "run" / name / "tuning.json").read_text())
        best = max(points, key=lambda point: point["accuracy"])
        assert len(points) == 2 and row["learning_rate"] == best["learning_rate"] and row["clip"] == best["clip"]
    assert [p["learning_rate"] for p in json.loads((tmp_path / "run" / "non-private" / "tuning.json").read_text())] == [
        0.2, 0.4,
    ]  # fmt: skip
    row = metrics["archs"]["isotropic@3"]
    three = epsilon(row["multiplier"], 256 / 988, 3 * 8, delta=1e-4, provenance="public")
    assert row["epsilon_with_tuning"] == pytest.approx(float(three), rel=1e-9) and row["epsilon_with_tuning"] > 3
    guided = metrics["archs"]["parameters@3"]
    phases = phases_of(tmp_path / "run" / "parameters@3" / "seed0")
    every = epsilon([(m, rate, 3 * steps) for m, rate, steps in phases], delta=1e-4, provenance="public")
    assert len(phases) == 2 and guided["epsilon_with_tuning"] == pytest.approx(float(every), rel=1e-9)
    released = load_checkpoint(tmp_path / "run" / "isotropic@3" / "seed0" / "model.safetensors")
    assert released.info["epsilon"] == row["epsilon_with_tuning"]


def test_tuning_takes_the_best_and_does_nothing_twice(tmp_path):
    points, scores, asked = [Point(float(i), 0.1) for i in range(4)], [20.0, math.nan, 70.0, 70.0], []

    def validated(point, folder, shown):
        asked.append(point.learning_rate)
        if math.isnan(scores[int(point.learning_rate)]):
            raise Diverged("training: the loss is nan")
        return scores[int(point.learning_rate)]

    assert best_point(points, tmp_path, validated, lambda *_: None) == points[2]
    assert asked == [0, 1, 2, 3]
    done = json.loads((tmp_path / "tuning.json").read_text())
    assert [row["accuracy"] for row in done] == [20, 0, 70, 70]
    (tmp_path / "tuning.json").write_text(json.dumps(done[:3]))
    assert best_point(points, tmp_path, validated, lambda *_: None) == points[2] and asked[4:] == [3]


# --- restart ----------------------------------------------------------------------------------------------------------


def command(out, *more):
    return [
        "-m", "pyml.cli", "train", "dp_sgd", "--arms", "whitened", "--epsilon", "3", "--delta", "1e-4", "--clip", "0.2",
        "--learning-rate", "2", "--epochs", "20", "--seeds", "2", "--device", "cpu", "--threads", "1", "--quiet",
        "--out", str(out), *more,
    ]  # fmt: skip


def test_killed_run_resumes_with_the_same_weights_and_spends_the_same(tmp_path, task):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)
    run(task, whole, arms=("whitened",), epochs=20, seeds=2, momentum=0.9)
    assert 2 <= kill_and_resume(command, killed, "whitened@3", rows=3) < 20
    assert_same_runs(whole, killed, "whitened@3")
    histories = [privacy_of(folder / "whitened@3" / "seed1")[0]["history"] for folder in (whole, killed)]
    assert histories[0] == histories[1] and histories[0]["phases"][0][2] == 20 * 4
    rows = [json.loads((folder / "metrics.json").read_text())["archs"]["whitened@3"] for folder in (whole, killed)]
    assert all(rows[0][name] == rows[1][name] for name in ("accuracy", "auc", "epsilon", "privacy"))


# --- clients ----------------------------------------------------------------------------------------------------------


def test_an_update_is_what_sgd_takes_away(task):
    clients = Clients(task.private, 10, 0, rate=0.3, size=16, passes=2)
    assert len(clients) == 10 and sum(map(len, clients.parts)) == len(task.private)
    torch.manual_seed(0)
    net = build(8, 10)
    update, first = clients.update(net, 4)
    own = build(8, 10)
    own.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.3)
    losses = []
    for _ in range(2):
        for images, labels in zip(clients.parts[4].images.split(16), clients.parts[4].labels.split(16)):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(own(images), labels))
            losses[-1].backward()
            optimizer.step()
    assert first.item() == pytest.approx(losses[0].item())
    for sent, before, after in zip(update, net.parameters(), own.parameters()):
        torch.testing.assert_close(sent, (before - after).detach(), rtol=1e-4, atol=1e-6)


def test_a_round_leaves_updates_and_their_mean(task):
    clients = Clients(task.private, 10, 0, rate=0.3, size=64, passes=1)
    net = build(8, 10)
    for chosen in ([2, 7, 3], []):
        value, sums = clients.loss(net, chosen)
        value.backward()
        assert sums["count"] == len(chosen)
        for i, p in enumerate(net.parameters()):
            sent = [clients.update(net, client)[0][i] for client in chosen]
            assert p.grad_sample.shape == (len(chosen), *p.shape)
            mean = torch.stack(sent).mean(0) if sent else torch.zeros_like(p)
            torch.testing.assert_close(p.grad, mean)
            p.grad = p.grad_sample = None
    drawn = [list(rounds(50, 0.4, seed)(epoch)) for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert drawn[0] == drawn[1] and drawn[0] not in drawn[2:] and len(drawn[0]) == 3


def test_clients_are_what_epsilon_protects(tmp_path, task):
    out = tmp_path / "run"
    metrics = run(task, out, arms=("non-private", "isotropic", "group"), **CLIENTS)
    assert metrics["archs"]["non-private"]["learning_rate"] == 1, "updates without privacy are taken as they are"
    for name in ("isotropic@3", "group@3"):
        (phase,) = privacy_of(out / name / "seed0")[0]["history"]["phases"]
        assert phase[1:] == [0.5, 4], "two rounds an epoch"
        row = metrics["archs"][name]
        assert row["unit"] == "client of 40, split 0"
        assert row["epsilon"] == pytest.approx(float(epsilon([phase], delta=1e-3, provenance="public")), rel=1e-9)
    table = (out / "table.md").read_text()
    assert "epsilon of one client of 40 at delta 0.001" in table and "clip norm 0.5, not chosen" in table
    assert "each client with chance 0.5 in a round, there with rate 0.5, batch 16 and passes 1" in table
    assert "batch 256" not in table and "guides" not in table
    assert (Options().momentum, Options(federated=40).momentum) == (0.9, 0)
    run(task, tmp_path / "again", arms=("isotropic",), **CLIENTS)
    one, two = (learned(folder / "isotropic@3" / "seed0") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with (out / "non-private" / "seed0" / "log.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file)]
    assert all(0 < loss < 5 for loss in losses)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_runs_are_one_sentence(tmp_path, task):
    for change, sentence in (
        ({"arms": ("isotropic", "dense")}, "arms: expected one of non-private, isotropic, l2, .*, got 'dense'"),
        ({"epsilons": (1.0, 0.0)}, "epsilon: expected a finite number > 0, got 0.0$"),
        ({"epsilons": (math.inf,)}, "epsilon: expected a finite number > 0, got inf$"),
        ({"learning_rates": ()}, "learning-rate: expected at least one number, got none$"),
        ({"federated": 40, "learning_rate": -1.0}, "client-rate: expected a finite number > 0, got -1.0$"),
        ({"clips": (math.nan,)}, "clip: expected a finite number > 0, got nan$"),
        ({"delta": 0.0}, "delta: expected a number between 0 and 1, got 0.0"),
        ({"delta": 0.01}, "delta: expected less than 1 / 988, one private record, got 0.01"),
        ({"federated": 40, "delta": 0.03}, "delta: expected less than 1 / 40, one client, got 0.03"),
        ({"federated": 1}, "federated: expected 0, or from 2 to the 988 private records, got 1"),
        ({"federated": 989}, "federated: expected 0, or from 2 to the 988 private records, got 989"),
        ({"client_share": 0.0}, "client-share: expected above 0, at most 1, got 0.0"),
        ({"momentum": 1.0}, "momentum: expected from 0 to below 1, got 1.0"),
        ({"guide_share": 1.0}, "guide-share: expected a number between 0 and 1, got 1.0"),
        ({"first_seed": 2**31}, r"first-seed: expected from 0 to below 2\^31"),
        ({"guide": (tmp_path / "none", "public")}, "guide: expected an arm that uses it"),
        ({"guide": (tmp_path / "none", "public"), "arms": ("parameters",)}, "guide: no file"),
        ({"guide": (tmp_path / "none", "unknown"), "arms": ("parameters",)}, "as unknown leaves no finite epsilon"),
    ):
        with pytest.raises(UserError, match=f"^{sentence}" if not sentence.startswith("as ") else sentence):
            run(task, tmp_path / "run", **{"arms": ("isotropic",), **change})
        assert not (tmp_path / "run").exists()
    bare = dataclasses.replace(task, public=task.public.take(torch.arange(0)))
    with pytest.raises(UserError, match=r"^arms: expected a public part of the data for l2, got --public-fraction 0$"):
        run(bare, tmp_path / "run", arms=("isotropic", "l2"))


def test_a_guide_of_a_file_is_paid_for(tmp_path, task):
    run(task, tmp_path / "first", arms=("isotropic",), epsilons=(1.0,), delta=1e-5)
    path = tmp_path / "first" / "isotropic@1" / "seed0" / "model.safetensors"
    unsaid = path.with_name("checkpoint.safetensors")  # it knows its data, and no price
    with pytest.raises(UserError, match=r"^guide: expected a model with a finite epsilon, as .* on the same data$"):
        run(task, tmp_path / "run", arms=("parameters",), guide=(unsaid, "public"))
    with pytest.raises(UserError, match=r"^guide-provenance: expected at least dp:0\.99"):
        run(task, tmp_path / "run", arms=("parameters",), guide=(path, "public"))
    with pytest.raises(UserError, match=r"^epsilon: expected more than the guide has spent, 1, got 0\.5$"):
        run(task, tmp_path / "run", arms=("parameters",), guide=(path, "dp:1:1e-5"), epsilons=(0.5,))
    row = run(task, tmp_path / "run", arms=("parameters",), guide=(path, "dp:1:1e-5"))["archs"]["parameters@3"]
    state, _ = privacy_of(tmp_path / "run" / "parameters@3" / "seed0")
    assert ["dp", 1.0, 1e-5] in state["history"]["provenance"]
    rest = epsilon([tuple(p) for p in state["history"]["phases"]], delta=9e-5, provenance="public")
    assert row["epsilon"] == pytest.approx(float(rest) + 1) and 2.9 < row["epsilon"] <= 3
    assert not (tmp_path / "run" / "parameters@3" / "seed0" / "guide").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epsilon", "0"], "epsilon: expected a finite number > 0, got 0.0\n"),
        (["--clip", "-1"], "clip: expected a finite number > 0, got -1.0\n"),
        (["--epsilon", "1;3"], "epsilon: expected numbers with commas, such as 1,3, got '1;3'"),
        (["--guide", "x"], "guide-provenance: expected too, as the other of --guide and --guide-provenance is given"),
        (["--guide-provenance", "public"], "guide: expected too"),
        (["--client-passes", "2"], "client-passes: expected --federated too, got 2"),
        (["--federated", "9", "--batch-size", "8"], "batch-size: expected no --federated"),
        (["--public-fraction", "1"], "public-fraction: expected from 0 to below 1, got 1.0"),
        (["--valid-fraction", "0"], "valid-fraction: expected a number between 0 and 1, got 0.0"),
        (["--data", "nowhere"], "data: expected a folder with MNIST's idx files, got nowhere"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(capsys, options, sentence):
    assert cli.main(["train", "dp_sgd", *options]) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


# --- prediction -------------------------------------------------------------------------------------------------------


def test_prediction(tmp_path, task, capsys):
    run(task, tmp_path / "run", arms=("non-private",), epochs=20, learning_rates=(1.0,), clips=(0.3,))
    checkpoint = tmp_path / "run" / "non-private" / "seed0" / "model.safetensors"
    images = (task.test.images.squeeze(1) * 255).round().to(torch.uint8)
    (tmp_path / "test.idx").write_bytes(idx(images))
    options = ["predict", "dp_sgd", "--checkpoint", checkpoint, "--input", tmp_path / "test.idx", "--out"]
    assert cli.main([*map(str, options), str(tmp_path / "out.csv")]) == 0
    assert f"{len(images)} images" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    found = torch.tensor([int(row["class"]) for row in rows])
    right = 100 * (found == task.test.labels).double().mean().item()
    score = json.loads((tmp_path / "run" / "metrics.json").read_text())["archs"]["non-private"]["accuracy"]["mean"]
    assert right == pytest.approx(score, abs=0.6) and right > 50
    (tmp_path / "large.idx").write_bytes(idx(torch.zeros(2, 28, 28, dtype=torch.uint8)))
    options[5] = tmp_path / "large.idx"
    assert cli.main([*map(str, options), str(tmp_path / "none.csv")]) == 1
    assert "input: expected images of side 8, got 28 in" in capsys.readouterr().err
    options[5] = tmp_path / "nothing.idx"
    assert cli.main([*map(str, options), str(tmp_path / "none.csv")]) == 1
    assert capsys.readouterr().err == f"error: input: {options[5]} cannot be read (No such file or directory)\n"
