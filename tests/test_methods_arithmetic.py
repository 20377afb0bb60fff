"""pyml train arithmetic: all arms on tiny Llamas and on files, the attention map, prediction, errors."""

import json

import pytest
import torch

from pyml.methods._head_arms import PROJECTIONS, has_peft
from pyml.methods._tiny_llama import sum_form, tiny_llama
from pyml.methods.arithmetic.data import MIXTURE, sum_tasks
from pyml.methods.arithmetic.figures import attention_map
from pyml.methods.arithmetic.train import ARMS, Options
from tests.head_files import SOME_PAIRS, STEPS, cache_in, rows_of, write_rows
from tests.method_runs import TRAINING, needs

needs(*TRAINING, "transformers")

QUICK = ["--epochs", 2, "--score-lines", 16, "--device", "cpu", "--threads", 1, "--difference", "plain", "--quiet"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with cache_in(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


def test_every_arm_of_the_demo(run, cache, tmp_path):
    out, arms = tmp_path / "run", [name for name in ARMS if has_peft() or not name.startswith("lora")]
    options = [*QUICK, "--tiny-steps", STEPS, "--seeds", 2, "--heads", 2, "--mlps", 1, "--out", out]
    assert run("train", "arithmetic", *options, "--arms", ",".join(arms)) == (0, "", "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["archs"]) == arms and metrics["config"]["projections"] == list(PROJECTIONS)
    heads, mlp = 2 * 4 * 8 * 64, 3 * 64 * 172
    for name in ("precise", "random", "precise-early"):
        assert metrics["archs"][name]["parameters"] == heads + mlp
    if has_peft():  # about as many numbers, of a rank that is the same for all matrices
        unit = 4 * 4 * (64 + 64)
        for name in ("lora", "lora-early"):
            assert metrics["archs"][name]["parameters"] == round((heads + mlp) / unit) * unit
            assert (out / name / "seed1" / "checkpoint.safetensors").is_file()
    for seed in ("0", "1"):
        found = metrics["heads"][seed]
        assert len(found["key"]["mlps"]) == len(found["random"]["mlps"]) == 1
        assert found["key"]["mlps"] != found["random"]["mlps"]
        assert found["attention"]["tokens"] == ["<s>", "(1)", "-", "(2)", "="]
        assert found["attention"]["heads"][:2] == found["key"]["heads"]
        for weights in found["attention"]["weights"]:
            assert sum(weights) == pytest.approx(1, abs=1e-4) and min(weights) >= 0
    for name in ("heads.png", "knockout.png", "attention.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert "| precise-early |" in (out / "table.md").read_text()


def test_files_and_predictions(run, cache, tmp_path):
    language = tiny_llama(MIXTURE._replace(steps=STEPS), 0, shown=False)
    data = write_rows(tmp_path / "minus.jsonl", rows_of(sum_form("-"), SOME_PAIRS, sum_form("nothing")))
    out = tmp_path / "run"
    options = ["--model", language.folder, "--data", data, *QUICK, "--arms", "base,random", "--seeds", 1, "--out", out]
    assert run("train", "arithmetic", *options) == (0, "", "")
    config = json.loads((out / "metrics.json").read_text())["config"]
    assert config["record_tokens"] == [[], []] and config["controls"] == [] and config["transfer"] is None
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "3 - 4 ="}])
    path = out / "random" / "seed0" / "checkpoint.safetensors"
    options = ["--input", source, "--out", tmp_path / "a.jsonl", "--max-tokens", 1, "--device", "cpu", "--quiet"]
    assert run("predict", "arithmetic", "--checkpoint", path, *options) == (0, "", "")
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "3 - 4 ="
    code, _, err = run("predict", "pinpoint", "--checkpoint", path, *options)
    assert code == 1 and "belongs to the method 'arithmetic', expected 'pinpoint'" in err
    code, _, err = run("train", "arithmetic", "--arms", "base", "--data", data)
    assert (code, err) == (1, f"error: data: expected --model too, got {data}\n")


def test_the_attention_map_is_the_models_own(cache):
    task = sum_tasks(range(1), 0.6, STEPS, shown=False)(0)
    found = attention_map(task, [(2, 5), (0, 1)], torch.device("cpu"))
    model = task.language.model(attn_implementation="eager")
    ids = torch.tensor([line.prompt for line in task.test[:64]])
    attentions = model(ids, output_attentions=True).attentions
    for row, (layer, head) in zip(found["weights"], ((2, 5), (0, 1))):
        torch.testing.assert_close(torch.tensor(row), attentions[layer][:, head, -1].mean(0), rtol=1e-4, atol=1e-6)


def test_gradients_are_scaled_by_default():
    options = Options()
    options.check()
    assert options.scale_gradients and options.projections == PROJECTIONS and options.ablation == "mean"
