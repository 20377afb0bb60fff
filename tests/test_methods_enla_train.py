"""EnLa's arms and their training: zero-shot, learning, frozen features, restart, checkpoints, several processes."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods.enla import archs
from pyml.methods.enla.archs import ARMS, build, load_arm
from pyml.methods.enla.task import Split, Task
from pyml.methods.enla.train import Options, accuracy, make_optimizer, schedule
from tests.enla_tiny import CLASSES, JOINT, make_clip, make_split, make_task, run, tokenize
from tests.method_runs import TRAINING, TWO_PROCESSES, assert_same_bits, launch, learned, needs

needs(*TRAINING, "transformers")
LEARNED = {  # names of the learned tensors, without the external layer's
    "coop": {"context"},
    "enla": {"enla.prompts", "enla.gates", "enla.strengthen.weight"},
    "enla-no-strengthening": {"enla.prompts", "enla.gates"},
    "enla-no-visual": set(),
}
EXTERNAL = {f"enla.external.{name}" for name in ("down.weight", "down.bias", "up.weight", "up.bias")}


@pytest.fixture
def clip():
    return make_clip()


@pytest.fixture
def task():
    return make_task()


# --- arms -------------------------------------------------------------------------------------------------------------


def test_text_features_are_clips_own(clip, task, monkeypatch):
    monkeypatch.setattr(archs, "TEXTS", 3)  # several batches, of texts of different lengths
    found = archs.text_features(clip, task.texts(CLASSES))
    assert found.shape == (2, 6, JOINT)
    for row, template in zip(found, task.templates):
        for feature, name in zip(row, CLASSES):
            pooled = clip.model.text_model(**tokenize([template.replace("{}", name)])).pooler_output
            torch.testing.assert_close(feature, F.normalize(clip.model.text_projection(pooled)[0], dim=-1))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_from_zero_shot(clip, task, arm):
    images = task.evals["novel"].batch(range(5))
    model = build(arm, clip, task, ot_weight=0.0)  # or the transport would be in the logits of some
    if arm == "coop":
        task = dataclasses.replace(task, templates=task.templates[:1])
    plain = build("zero-shot", clip, task)
    for split, classes in (("novel", 2), (archs.TRAIN, 4)):
        expected = plain.logits(images, split)
        assert expected.shape == (5, classes)
        torch.testing.assert_close(model.logits(images, split), expected, rtol=1e-4, atol=1e-4)


def test_a_target_called_train_leaves_the_training_classes(clip, task):
    from pyml.methods.enla.data import _called

    assert _called(Path("train")) == "train"
    other = dataclasses.replace(task, evals={**task.evals, "train": task.evals["novel"]})
    for arm in ARMS:
        model = build(arm, clip, other)
        assert model.classes[archs.TRAIN] == CLASSES[:4] and model.classes["train"] == CLASSES[4:]
        images = other.train.batch([0, 1])
        assert model.logits(images).shape == (2, 4) and model.logits(images, "train").shape == (2, 2)


@pytest.mark.parametrize("arm", ARMS)
def test_learned_tensors_of_an_arm(clip, task, arm):
    names = build(arm, clip, task).state_dict().keys()
    expected = LEARNED.get(arm, LEARNED["enla"]) if arm != "zero-shot" else set()
    assert names == (expected | EXTERNAL if arm.startswith("enla") else expected)


def test_context_stands_for_the_words_before_the_name(clip, task):
    model = build("coop", clip, task)
    assert (model.start, model.stop) == (1, 4) and model.context.shape == (3, 32)  # a photo of
    embedding = model._embedding
    assert torch.equal(model.context, embedding(tokenize(["a photo of"])["input_ids"])[0, 1:4])
    with torch.no_grad():
        model.context.copy_(embedding(tokenize(["drawing the the"])["input_ids"])[0, 1:4])
    swapped = build("zero-shot", clip, dataclasses.replace(task, templates=["drawing the the {}"]))
    images = task.train.batch([0, 7])
    torch.testing.assert_close(model.logits(images, "novel"), swapped.logits(images, "novel"))
    assert len(embedding._forward_hooks) == 0
    with pytest.raises(UserError, match=r"the arm coop needs words before the class name, got '\{\}'"):
        build("coop", clip, dataclasses.replace(task, templates=["{}"]))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_training_learns_and_scores(tmp_path, arm):
    row = run(arm, tmp_path, epochs=30, learning_rate=2e-2, context_rate=5e-2)
    scores = row["scores"]
    base, novel = scores["base"], scores["novel"]
    assert scores["harmonic"] == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0)
    clip, task = make_clip(), make_task()
    zero = accuracy(build("zero-shot", clip, task), "base", task.evals["base"], 8, torch.device("cpu"))
    if arm == "zero-shot":
        assert base == zero and row["model"]["parameters"] == 0
        assert list(tmp_path.iterdir()) == []
        return
    with (tmp_path / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert len(log) == 30 and float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert base > max(zero, 25.0) and scores["train_seconds"] > 0
    model = load_arm(tmp_path / "checkpoint.safetensors", clip, task)
    assert row["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert accuracy(model, "base", task.evals["base"], 5, torch.device("cpu")) == base
    assert accuracy(model, "novel", task.evals["novel"], 5, torch.device("cpu")) == novel


def test_frozen_features_change_nothing(tmp_path, monkeypatch):
    run("enla-no-visual", tmp_path / "cached")
    monkeypatch.setattr(archs.Adapted, "frozen_images", False)
    run("enla-no-visual", tmp_path / "again")
    first, second = (learned(tmp_path / name) for name in ("cached", "again"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_transport_as_loss_and_as_logit_learn_otherwise(tmp_path):
    found = {arm: run(arm, tmp_path / arm, epochs=1) for arm in ("enla", "enla-ot-loss", "enla-no-ot")}
    assert len(found) == 3
    logs = {}
    for arm in found:
        with (tmp_path / arm / "log.csv").open() as file:
            logs[arm] = float(next(csv.DictReader(file))["loss"])
    assert logs["enla-ot-loss"] > logs["enla-no-ot"]  # the value of the transport is positive
    assert len(set(logs.values())) == 3


def test_warm_up_then_a_cosine(clip, task):
    options = Options(epochs=6, warmup_epochs=2, learning_rate=0.3, optimizer="sgd")
    optimizer = make_optimizer(build("enla", clip, task), "enla", options)
    plan = schedule(optimizer, options)
    rates = []
    for _ in range(options.epochs):
        rates.append(optimizer.param_groups[0]["lr"] / 0.3)
        optimizer.step()
        plan.step()
    expected = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    assert rates == pytest.approx(expected)
    groups = [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(options.weight_decay, 6), (0.0, 1)]
    assert isinstance(make_optimizer(build("coop", clip, task), "coop", Options()), torch.optim.AdamW)


def test_wrong_options_are_one_sentence():
    for change, words in (
        ({"archs": ("clip",)}, "arms: expected one of zero-shot, coop, enla, "),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, got 'lion'"),
        ({"shots": 0}, "shots: expected at least 1, got 0"),
        ({"eps": 0.0}, "eps: expected a finite number > 0, got 0.0"),
        ({"ot_weight": math.nan}, "ot-weight: expected a finite number >= 0, got nan"),
        ({"plan_grad": "unroll"}, "plan-grad: expected one of detach, implicit"),
        ({"context_rate": -1.0}, "context-rate: expected a finite number > 0"),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            Options(**change).check()


# --- restart, checkpoints, processes ----------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize(("arm", "optimizer"), [("enla", "adamw"), ("enla-ot-loss", "sgd"), ("coop", "adamw")])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, arm, optimizer):
    def stop(epoch: int, _: dict[str, float]) -> None:
        if epoch == 2:
            raise Killed

    whole = run(arm, tmp_path / "whole", optimizer=optimizer, epochs=4)
    with pytest.raises(Killed):
        run(arm, tmp_path / "stopped", stop, optimizer=optimizer, epochs=4)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.safetensors").info["epoch"] == 2
    resumed = run(arm, tmp_path / "stopped", optimizer=optimizer, epochs=4)
    assert_same_bits(learned(tmp_path / "whole"), learned(tmp_path / "stopped"))
    assert (tmp_path / "whole" / "log.csv").read_bytes() == (tmp_path / "stopped" / "log.csv").read_bytes()
    for name in ("base", "novel", "harmonic"):
        assert whole["scores"][name] == resumed["scores"][name]


def test_a_checkpoint_holds_what_is_learned(tmp_path):
    run("enla", tmp_path, epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    assert checkpoint.part("model").keys() == LEARNED["enla"] | EXTERNAL
    assert path.stat().st_size < 100_000
    info = checkpoint.info
    assert (info["method"], info["arm"], info["seed"]) == ("enla", "enla", 1)
    assert info["classes"] == CLASSES[:4] and info["templates"] == make_task().templates
    task = Task("fewshot", Split(torch.empty(0), torch.empty(0), CLASSES[4:]), {}, info["templates"])
    model = load_arm(path, make_clip(), task)  # a task without images: prediction
    assert model.logits(make_split(CLASSES, 1, 0).batch([0, 1])).shape == (2, 2)
    with pytest.raises(UserError, match=r"was learned on the CLIP \{'fingerprint': 'tiny 2'\}, got .*tiny 3"):
        load_arm(path, make_clip(seed=3), task)
    with pytest.raises(UserError, match="checkpoint: no file"):
        load_arm(tmp_path / "none.safetensors", make_clip(), task)


def test_two_processes_train_together(tmp_path):
    """17 images in batches of 8: the last one leaves one process without an image."""
    arms = ("enla-ot-loss", "coop")  # one on images, one on the features of the frozen tower
    launch(TWO_PROCESSES, ["-m", "tests.enla_tiny", str(tmp_path / "two"), "17", *arms])
    for arm in arms:
        alone = run(arm, tmp_path / "one" / arm, task=make_task(17))
        together = json.loads((tmp_path / "two" / arm / "row.json").read_text())
        first, second = (learned(tmp_path / name / arm) for name in ("one", "two"))
        for name in first:  # only the order of the sums differs
            torch.testing.assert_close(second[name], first[name], rtol=1e-2, atol=1e-4, msg=name)
        assert together["scores"]["base"] == pytest.approx(alone["scores"]["base"], abs=5)
