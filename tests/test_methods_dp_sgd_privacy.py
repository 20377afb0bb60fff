"""pyml train dp_sgd: what a released model tells, guides of one account, seeds that diverge, runs that are stopped."""

import dataclasses
import json

import pytest
import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import Diverged
from pyml.methods._measure import summarise
from pyml.methods.dp_sgd import run as running
from pyml.methods.dp_sgd.data import Records, load_digits, split
from pyml.privacy import epsilon, noise_multiplier
from tests.dp_sgd_runs import CLIENTS, digits, phases_of, privacy_of, run
from tests.method_runs import TRAINING, assert_same_bits, learned, needs

needs(*TRAINING, "sklearn", "opacus", "dp_accounting")


@pytest.fixture(scope="module")
def task():
    return digits()


# --- what leaves ------------------------------------------------------------------------------------------------------


def test_a_released_file_tells_nothing_of_one_record_but_by_its_weights(tmp_path, task):
    images, labels = task.private.images.clone(), task.private.labels.clone()
    images[7], labels[7] = 1 - images[7], (labels[7] + 1) % 10
    other = dataclasses.replace(task, private=Records(images, labels), source="another")
    assert other.facts() != task.facts(), "the run folder knows its data"
    found = []
    for name, one in (("one", task), ("two", other)):
        run(one, tmp_path / name, arms=("whitened",), learning_rates=(1.0, 2.0))
        found.append(load_checkpoint(tmp_path / name / "whitened@3" / "seed0" / "model.safetensors"))
    first, second = found
    assert first.info == second.info
    assert [(name, t.shape) for name, t in first.tensors.items()] == [
        (name, t.shape) for name, t in second.tensors.items()
    ]


def test_classes_follow_from_the_parts_without_protection(task):
    odd = task.private.labels.clone()
    odd[0] = 11
    assert dataclasses.replace(task, private=Records(task.private.images, odd)).classes == task.classes == 10
    whole = load_digits()
    labels = whole.labels.clone()
    labels[(whole.images == task.private.images[0]).flatten(1).all(1)] = 11
    with pytest.raises(UserError, match=r"^data: expected private labels below 10, as the .*, got 11$"):
        split("odd", Records(whole.images, labels), None, public=0.1, valid=0.15, test_share=0.2, seed=0)


# --- guides -----------------------------------------------------------------------------------------------------------


def test_a_guide_of_another_split_is_refused(tmp_path, task):
    """Its public and validation parts hold records that this run protects."""
    run(digits(seed=1), tmp_path / "first", arms=("isotropic",), epsilons=(1.0,))
    path = tmp_path / "first" / "isotropic@1" / "seed0" / "model.safetensors"
    for said in ("public", "dp:1:1e-4", "dp:2:1e-3"):
        with pytest.raises(UserError, match=r"^guide: expected a model with the same private records, got one of anot"):
            run(task, tmp_path / "run", arms=("parameters",), guide=(path, said))
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    with pytest.raises(UserError, match=r"^guide: expected a model in its run folder, whose config\.json tells its"):
        run(task, tmp_path / "run", arms=("parameters",), guide=(moved, "public"))


@pytest.mark.parametrize(("rate", "more"), [(256 / 988, {}), (0.5, CLIENTS)], ids=["records", "clients"])
def test_a_guide_trained_first_is_one_account_with_its_arm(tmp_path, task, rate, more):
    options = {"delta": 1e-4, **more}
    row = run(task, tmp_path / "run", arms=("parameters",), epochs=3, **options)["archs"]["parameters@3"]
    folder, delta = tmp_path / "run" / "parameters@3" / "seed0", options["delta"]
    (first,) = phases_of(folder / "guide")
    steps = 2 if more else 4
    assert first[1:] == (rate, steps)
    alone = epsilon([first], delta=delta, provenance="public")
    assert 0.85 < alone <= 0.9
    phases = phases_of(folder)
    assert phases == [first, (row["multiplier"], rate, 3 * steps)]
    assert row["epsilon"] == pytest.approx(float(epsilon(phases, delta=delta, provenance="public")), rel=1e-9)
    assert 2.97 < row["epsilon"] <= 3
    rest = epsilon(*phases[1], delta=delta, provenance="public")
    assert rest + alone > 1.05 * 3, "composed, both cost less than their sum"
    assert all(kind != "dp" for kind, *_ in privacy_of(folder)[0]["history"]["provenance"])


def test_phases_beside_are_part_of_a_target():
    beside = [(2.5, 0.2, 10), (1.5, 0.01, 100)]
    how = {"delta": 1e-5, "accountant": "rdp", "provenance": "public"}
    found = noise_multiplier(2.0, 0.2, 30, beside=beside, **how)
    spent = [epsilon([*beside, (m, 0.2, 30)], **how) for m in (found, found / 1.002)]
    assert spent[0] <= 2.0 < spent[1]
    with pytest.raises(ValueError, match=r"^noise_multiplier: target_epsilon: expected at least the \S+ that the ph"):
        noise_multiplier(0.5, 0.2, 30, beside=beside, **how)
    with pytest.raises(ValueError, match=r"^noise_multiplier: multiplier: expected a list of \(multiplier"):
        noise_multiplier(0.5, 0.2, 30, beside=[(1.0, 0.2)], **how)


# --- seeds that diverge -----------------------------------------------------------------------------------------------


def test_a_seed_that_diverges_scores_nothing_and_the_others_go_on(tmp_path, task, monkeypatch):
    fit = running.Training.fit

    def broken(self, folder, *rest):
        if "seed1" in folder.parts:
            raise Diverged("training: the loss is nan in epoch 1")
        return fit(self, folder, *rest)

    monkeypatch.setattr(running.Training, "fit", broken)
    metrics = run(task, tmp_path / "run", arms=("non-private", "isotropic", "parameters"), seeds=3)
    for name, row in metrics["archs"].items():
        values = row["accuracy"]["values"]
        assert values[1] == 0 < min(values[0], values[2]) and row["diverged"]["values"] == [0, 1, 0]
        assert row["auc"]["values"][1] is None and row["auc"]["mean"] > 0
        assert f"{name}: 1 seed diverged: accuracy counted as 0, no model" in metrics["findings"]
        assert not (tmp_path / "run" / name / "seed1" / "model.safetensors").exists()


def test_rates_that_are_far_too_high_diverge_in_every_arm(tmp_path, task):
    arms = ("non-private", "isotropic", "whitened", "iterate", "parameters")
    metrics = run(task, tmp_path / "run", arms=arms, learning_rates=(3e38,), clips=(0.9,))
    for name, row in metrics["archs"].items():
        assert (row["accuracy"]["mean"], row["auc"]["mean"], row["gain"]["mean"]) == (0, None, None), name
        if row["epsilon"] is not None:
            assert 2.9 < row["epsilon"] <= 3, "what the whole training may spend"
    lines = (tmp_path / "run" / "table.md").read_text().splitlines()
    cells = next(line for line in lines if line.startswith("| isotropic@3 ")).split(" | ")
    assert cells[3:5] == ["0.00", "-"], "accuracy and gain"


def test_missing_scores_have_no_part_in_a_mean():
    assert summarise([{"a": 1.0, "b": None}, {"a": None, "b": None}, {"a": 3.0, "b": None}]) == {
        "a": {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, None, 3.0]},
        "b": {"mean": None, "std": 0.0, "values": [None, None, None]},
    }


# --- runs that are stopped --------------------------------------------------------------------------------------------


def stopped_again_and_again(monkeypatch, start, every=3):
    """Call ``start(resume)`` until it ends; each attempt is stopped after two epochs, before the third is saved."""
    calls, stops, score = 0, 0, running.accuracy

    def stopping(*given):
        nonlocal calls
        calls += 1
        if calls % every == 0:
            raise KeyboardInterrupt
        return score(*given)

    with monkeypatch.context() as patch:
        patch.setattr(running, "accuracy", stopping)
        while stops < 30:
            try:
                return start(stops > 0), stops
            except KeyboardInterrupt:
                stops += 1
    raise AssertionError("a resumed run makes no progress")


@pytest.mark.parametrize(
    "options",
    [
        {"arms": ("parameters",), "learning_rates": (1.0, 2.0), "guide_epochs": 3, "momentum": 0.9},
        {"arms": ("whitened", "group"), "clips": (0.1, 0.2)},
        {**CLIENTS, "arms": ("iterate",), "learning_rates": (0.5, 1.0)},
    ],
    ids=["guide", "whitened", "clients"],
)
def test_a_run_stopped_in_tuning_or_in_its_guide_ends_with_the_same_weights(tmp_path, task, monkeypatch, options):
    options = {**options, "epochs": 3}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    metrics = run(task, whole, **options)
    again, stops = stopped_again_and_again(monkeypatch, lambda resume: run(task, stopped, resume=resume, **options))
    assert stops >= 4
    for name, row in metrics["archs"].items():
        assert_same_bits(learned(whole / name / "seed0"), learned(stopped / name / "seed0"))
        assert json.loads((whole / name / "tuning.json").read_text()) == json.loads(
            (stopped / name / "tuning.json").read_text()
        )
        assert phases_of(whole / name / "seed0") == phases_of(stopped / name / "seed0")
        for score in ("accuracy", "epsilon", "epsilon_with_tuning", "gain", "privacy"):
            assert row[score] == again["archs"][name][score]
        files = [load_checkpoint(place / name / "seed0" / "model.safetensors") for place in (whole, stopped)]
        assert files[0].info == files[1].info


def test_a_secret_run_that_was_stopped_spends_what_it_may(tmp_path, task, monkeypatch):
    options = {"arms": ("parameters",), "epochs": 3, "guide_epochs": 3, "private": True}
    metrics, stops = stopped_again_and_again(
        monkeypatch, lambda resume: run(task, tmp_path / "run", resume=resume, **options)
    )
    assert stops >= 2
    row, folder = metrics["archs"]["parameters@3"], tmp_path / "run" / "parameters@3" / "seed0"
    assert 2.9 < row["epsilon"] <= 3 and row["noise"] == "fast"
    assert [steps for *_, steps in phases_of(folder)] == [12, 12]
    keys = [privacy_of(place)[1]["key"] for place in (folder, folder / "guide")]
    assert not torch.equal(*keys), "each training has a noise of its own"
    with pytest.raises(UserError, match=r"^resume: .* was started with numerics = "):
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            run(task, tmp_path / "run", resume=True, **options)
        finally:
            torch.set_num_threads(threads)
