"""pyml train pinpoint: all arms on tiny Llamas and on files, restart after a kill, steering, prediction, errors."""

import json

import pytest
import torch

from pyml.heads import HeadSteering
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import make_accelerator
from pyml.methods._head_arms import has_peft, load_arm
from pyml.methods._head_data import Behaviour, file_tasks
from pyml.methods._head_search import Experiment, search
from pyml.methods._language import pad, score_answers, split_lines
from pyml.methods._options import no_bars
from pyml.methods._tiny_llama import lines_of, sum_form, tiny_llama
from pyml.methods.pinpoint import steering
from pyml.methods.pinpoint.data import AGREES, HELPS, MIXTURE, STAYS, TELLS, talk_tasks
from pyml.methods.pinpoint.train import KINDS, OTHERS, Options
from tests.head_files import SOME_PAIRS, STEPS, cache_in, rows_of, write_rows
from tests.method_runs import TRAINING, assert_same_runs, kill_and_resume, needs

needs(*TRAINING, "transformers")

LORA = ("lora",) if has_peft() else ()  # without the package the other arms are still tested
SHOWN = ("base", "spt", "spt-early", "random", *LORA, "full", "steer", "steer-gaussian", "steer-layer")
QUICK = ["--epochs", 2, "--score-lines", 16, "--device", "cpu", "--threads", 1, "--quiet"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with cache_in(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module")
def language(cache):
    return tiny_llama(MIXTURE._replace(steps=STEPS), 0, shown=False)


@pytest.fixture(scope="module")
def files(language, tmp_path_factory):
    """The demo's sentences as a user's files, and the options that name them."""
    folder = tmp_path_factory.mktemp("files")
    data = write_rows(folder / "doubt.jsonl", rows_of(STAYS["+"], SOME_PAIRS, AGREES["+"]))
    sums = write_rows(folder / "sums.jsonl", rows_of(sum_form("+"), SOME_PAIRS))
    other = write_rows(folder / "other.jsonl", rows_of(STAYS["-"], SOME_PAIRS))
    options = ["--model", language.folder, "--data", data, "--positive", "sorry", "--negative", "sure,here"]
    return [*options, "--control", sums, "--transfer", other]


def read(path):
    return json.loads(path.read_text())


# --- a run ------------------------------------------------------------------------------------------------------------


def test_every_arm_of_the_demo(run, cache, tmp_path):
    out = tmp_path / "run"
    options = [*QUICK, "--tiny-steps", STEPS, "--seeds", 2, "--heads", 2, "--out", out]
    code, _, err = run("train", "pinpoint", *options, "--arms", ",".join(SHOWN))
    assert (code, err) == (0, "")
    metrics = read(out / "metrics.json")
    rows, config = metrics["archs"], metrics["config"]
    assert tuple(rows) == SHOWN and config["model"]["tiny_steps"] == STEPS
    assert len(set(config["model"]["fingerprints"])) == 2
    total = sum(p.numel() for p in tiny_llama(MIXTURE._replace(steps=STEPS), 0, shown=False).model().parameters())
    for name, row in rows.items():
        for score in ("behaviour", "answers", "control", "transfer", "second_behaviour", "other_admits"):
            assert len(row[score]["values"]) == 2 and all(0 <= value <= 100 for value in row[score]["values"])
        parts = [row[f"control_{one}"]["mean"] for one in ("+", "-", "max")]
        assert row["control"]["mean"] == pytest.approx(sum(parts) / 3)
        heads = name.startswith(("spt", "random"))
        numbers = 2 * 2 * 8 * 64 if heads else total if name.startswith("full") else 0
        numbers = 4 * 4 * (64 + 64) if name == "lora" else numbers  # of rank 1, in q, k, v and o of each layer
        assert row["parameters"] == numbers and row["state_kb"] == 8 * numbers / 1000
        steps = row["steps"]["values"]
        assert set(steps) == {0.0} if not numbers else set(steps) <= {4.0, 8.0}
        assert name.endswith("-early") or not numbers or set(steps) == {8.0}
    for seed in ("0", "1"):
        found = metrics["heads"][seed]
        assert len(found["key"]["heads"]) == 2 and found["knockout"]["counts"] == [0, 1, 2, 4, 8]
        assert not {tuple(h) for h in found["key"]["heads"]} & {tuple(h) for h in found["random"]["heads"]}
        base = read(out / "base" / f"seed{seed}" / "metrics.json")["scores"]
        assert found["knockout"]["key"][0] == found["knockout"]["random"][0]
        assert 0 <= base["behaviour"] <= 100 and base["steps"] == 0
    table = (out / "table.md").read_text()
    assert "talk, tiny Llama of 3 steps: 2 heads, 2 seeds" in table and "| spt-early |" in table
    for name in ("heads.png", "knockout.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    again = {file: file.read_bytes() for file in out.glob("*/seed*/metrics.json")}
    assert run("train", "pinpoint", *options, "--arms", ",".join(SHOWN), "--resume")[0] == 0
    assert again == {file: file.read_bytes() for file in again} and len(again) == 2 * len(SHOWN)
    code, _, err = run("train", "pinpoint", *options, "--arms", ",".join(SHOWN), "--resume", "--heads", 1)
    assert code == 1 and "was started with heads = 2, got 1" in err


@pytest.mark.skipif(not has_peft(), reason="peft is not installed (pip install 'pyml[train]')")
def test_predictions_of_lora_are_of_its_checkpoint(run, files, language, tmp_path):
    out = tmp_path / "run"
    options = [*files, *QUICK, "--arms", "base,lora", "--seeds", 1, "--learning-rate", 3e-2, "--out", out]
    assert run("train", "pinpoint", *options) == (0, "", "")
    base, lora = (read(out / arm / "seed0" / "metrics.json")["scores"] for arm in ("base", "lora"))
    assert lora["loss"] != base["loss"] and lora["steps"] > 0
    path = out / "lora" / "seed0" / "checkpoint.safetensors"
    assert all("lora_" in name for name in load_checkpoint(path).part("model"))
    model, _ = load_arm(path, lambda source: language, "pinpoint", "cpu")
    task = file_tasks(language.folder, [Behaviour(files[3], "sorry", "sure,here")], [], None, 0.6, "float32")(0)
    found = task.measure(model)
    assert {name: found[name] for name in ("answers", "behaviour")} == {n: lora[n] for n in ("answers", "behaviour")}
    assert found["loss"] == pytest.approx(lora["loss"], rel=1e-6)
    source = write_rows(tmp_path / "in.jsonl", rows_of(STAYS["+"], [(1, 4)]))
    code, _, err = run("predict", "pinpoint", "--checkpoint", path, "--input", source, "--out", tmp_path / "a.jsonl",
                       "--max-tokens", 2, "--device", "cpu", "--quiet")  # fmt: skip
    assert (code, err) == (0, "")
    (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    ids = torch.tensor([language.prompt(row["prompt"])])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert row["answer"] == language.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_files_and_a_model_folder(run, files, language, tmp_path):
    out = tmp_path / "run"
    arms = ["--arms", "base,spt,steer", "--seeds", 1]
    code, _, err = run("train", "pinpoint", *files, *QUICK, *arms, "--learning-rate", 1e-2, "--out", out)
    assert (code, err) == (0, "")
    metrics = read(out / "metrics.json")
    config, rows = metrics["config"], metrics["archs"]
    assert config["model"]["fingerprint"] == language.source["fingerprint"] and config["controls"] == ["sums"]
    words = {name: language.tokens(name)[0] for name in ("sorry", "sure", "here")}
    assert config["record_tokens"] == [[words["sorry"]], [words["sure"], words["here"]]]
    assert rows["spt"]["parameters"] == 1 * 2 * 8 * 64  # 1 of 32 heads is what stays below 5 %
    assert rows["spt"]["loss"]["mean"] != rows["base"]["loss"]["mean"]
    assert "| other: behaviour |" in (out / "table.md").read_text()
    path = out / "spt" / "seed0" / "checkpoint.safetensors"
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": STAYS["+"](a, 4)[0], "number": a} for a in range(5)])
    code, _, err = run("predict", "pinpoint", "--checkpoint", path, "--input", source, "--out", tmp_path / "a.jsonl",
                       "--max-tokens", 2, "--device", "cpu", "--quiet")  # fmt: skip
    assert (code, err) == (0, "")
    rows = [json.loads(row) for row in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(5))
    assert all(len(row["answer"].split()) <= 2 for row in rows)


def test_a_second_behaviour_of_the_users_own(run, files, language, tmp_path, monkeypatch):
    monkeypatch.setattr(steering, "HEAD_COUNTS", (4,))  # a small grid
    monkeypatch.setattr(steering, "HEAD_STRENGTHS", (1.0,))
    add, controls = HeadSteering.add, {}

    def noted(self, name, heads, *sides, **how):
        controls[name] = len(heads)
        add(self, name, heads, *sides, **how)

    monkeypatch.setattr(HeadSteering, "add", noted)
    data = write_rows(tmp_path / "danger.jsonl", rows_of(HELPS, SOME_PAIRS, TELLS))
    second = ["--second-data", data, "--second-positive", "refuse", "--second-negative", "here"]
    out = tmp_path / "run"
    options = [*files, *QUICK, "--arms", "base,steer", "--seeds", 1]
    assert run("train", "pinpoint", *options, *second, "--out", out) == (0, "", "")
    config, rows = (read(out / "metrics.json")[name] for name in ("config", "archs"))
    assert config["second"] == "danger"
    assert config["second_records"] == [language.tokens("refuse"), language.tokens("here")]
    task = talk_tasks(range(1), 0.6, STEPS, shown=False)(0)
    lines = lines_of(language, HELPS, SOME_PAIRS, TELLS)
    _, test = split_lines(lines, 0.6, 0)
    assert rows["base"]["second_behaviour"]["mean"] == task.second.success(language.model(), test)
    assert len(controls) == 2 and all(count == 4 for count in controls.values())
    tasks = file_tasks(language.folder, [Behaviour(data, "refuse", "here")], [], None, 0.6, "float32")
    assert tasks(0).second is None and tasks(0).test == test
    assert "| danger, % |" in (out / "table.md").read_text()
    for drop, sentence in (
        (0, "second-data: expected too, with --second-positive"), (2, "second-positive: expected too, with --second-d"),
        (4, "second-negative: expected too, with --second-data"),
    ):  # fmt: skip
        code, _, err = run("train", "pinpoint", *options, *second[:drop], *second[drop + 2 :], "--out", tmp_path / "r")
        assert code == 1 and err.startswith(f"error: {sentence}"), err
    code, _, err = run("train", "pinpoint", *options, *second[:5], "refuse", "--out", tmp_path / "r")
    assert code == 1 and "second-negative: expected words with other first tokens than --second-positive" in err
    code, _, err = run("train", "pinpoint", *second)
    assert (code, err) == (1, f"error: second-data: expected --model too, got {data}\n")


def test_predictions_are_of_what_was_trained(run, files, language, tmp_path):
    """The slices that training saved, written into the plain model by `pyml.heads.merge`, answer the same."""
    from pyml.heads import merge

    out = tmp_path / "run"
    options = [*files, *QUICK, "--arms", "spt", "--seeds", 1, "--learning-rate", 3e-2, "--epochs", 5, "--out", out]
    options.append("--keep-prefix")
    assert run("train", "pinpoint", *options)[0] == 0
    place = out / "spt" / "seed0"
    merged = merge(language.model(), place / "heads.safetensors").eval()
    assert load_checkpoint(place / "checkpoint.safetensors").info["what"] == "key"
    task_lines = [(row["prompt"], row["answer"]) for row in rows_of(STAYS["+"], SOME_PAIRS)]
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt, _ in task_lines])
    told = tmp_path / "told.jsonl"
    options = ["--input", source, "--out", told, "--max-tokens", 2, "--device", "cpu", "--quiet"]
    assert run("predict", "pinpoint", "--checkpoint", place / "checkpoint.safetensors", *options)[0] == 0
    for row in map(json.loads, told.read_text().splitlines()):
        ids = torch.tensor([language.prompt(row["prompt"])])
        made = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        assert row["answer"] == language.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    other = tiny_llama(MIXTURE._replace(steps=STEPS), 1, shown=False).folder
    code, _, err = run("predict", "pinpoint", "--checkpoint", place / "checkpoint.safetensors", *options,
                       "--model", other)  # fmt: skip
    assert code == 1 and "was learned on another model" in err


@pytest.mark.parametrize("arm", ["spt", *LORA])
def test_a_killed_run_resumes_with_the_same_weights(arm, run, cache, tmp_path):
    def command(out, *more):
        return [
            "-m", "pyml.cli", "train", "pinpoint", "--tiny-steps", str(STEPS), "--arms", arm, "--epochs", "20",
            "--seeds", "2", "--score-lines", "16", "--device", "cpu", "--threads", "1", "--quiet", "--out", str(out),
            *more,
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*command(whole)[2:]) == (0, "", "")
    assert 2 <= kill_and_resume(command, killed, arm, rows=3) < 20
    assert_same_runs(whole, killed, arm, files=("heads.safetensors",) if arm == "spt" else ())


# --- what is found, and steering --------------------------------------------------------------------------------------


def test_scores_and_knockouts_are_those_of_the_library(language):
    from pyml.heads import ablate, path_patch

    task = talk_tasks(range(1), 0.6, STEPS, shown=False)(0)
    options = Options(heads=2, score_lines=20)
    found = search(task, options, 0, torch.device("cpu"))
    model, lines = language.model(), task.train[:20]
    scores = path_patch(
        model, pad([line.prompt for line in lines]), pad([line.counterfactual for line in lines]),
        (task.positive, task.negative), mlps=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.tensor(found.heads), scores.heads.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.mlps), scores.mlps.float(), rtol=1e-4, atol=1e-6)
    assert found.heads[found.key_heads(1)[0][0]][found.key_heads(1)[0][1]] == min(map(min, found.heads))
    with ablate(model, found.key_heads(4)):
        controls = [score_answers(model, lines[:20])["exact"] for lines in task.controls.values()]
        assert found.knockout["key"][3] == task.success(model, task.test[:20])
    assert found.knockout["control-key"][3] == pytest.approx(sum(controls) / 3)


def test_steering_acts_and_leaves_no_trace(language, tmp_path):
    tasks = talk_tasks(range(1), 0.6, STEPS, shown=False)
    experiment = Experiment("pinpoint", tasks, KINDS, Options(score_lines=24), tmp_path, OTHERS)
    accelerator = make_accelerator("cpu")
    plain = tasks(0).measure(language.model())
    for name in ("steer", "steer-gaussian", "steer-layer"):
        strengths = steering.LAYER_STRENGTHS if name == "steer-layer" else steering.HEAD_STRENGTHS
        row = OTHERS[name](experiment, 0, accelerator)
        assert row["scores"].keys() >= plain.keys() and row["model"]["parameters"] == 0
        assert row["scores"]["strength"] in strengths and row["scores"]["loss"] != plain["loss"]
    assert tasks(0).measure(language.model()) == plain


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_wrong_options_are_one_sentence(run, files, cache, language, tmp_path):
    def changed(name, value):
        place = files.index(name) + 1
        return [*files[:place], value, *files[place + 1 :]]

    alone = write_rows(tmp_path / "one.jsonl", rows_of(STAYS["+"], [(1, 2)], AGREES["+"]))
    for options, sentence in (
        (["--data", "x"], "data: expected --model too, got x"),
        (["--positive", "x"], "positive: expected --model too, got x"),
        (["--dtype", "bfloat16"], "dtype: expected --model too, got bfloat16"),
        (["--tiny-steps", 0], "tiny-steps: expected at least 1, got 0"),
        (files[:2], "data: expected too, with --model"),
        (files[:6], "negative: expected too, with --model"),
        ([*files, "--tiny-steps", 3], "tiny-steps: expected no --model beside it, got 3"),
        ([*files, "--dtype", "int8"], "dtype: expected one of float32, bfloat16, got 'int8'"),
        (changed("--data", alone), "data: expected two lines at least"),
        (
            changed("--negative", "sorry"),
            "negative: expected words with other first tokens than --positive, got",
        ),
        ([*files, "--control", files[-3]], "control: expected files with names that differ"),
        (["--arms", "magic"], "arms: expected one of base, spt, "),
        (["--projections", "q,x"], "projections: expected some of q, k, v, o, each once, got ('q', 'x')"),
        (["--ablation", "half"], "ablation: expected one of zero, mean, got 'half'"),
        (["--train-share", 1], "train-share: expected a number between 0 and 1, got 1.0"),
        (["--stop-loss", 0], "stop-loss: expected a finite number > 0, got 0.0"),
        (["--tiny-steps", STEPS, "--heads", 17], "heads: expected --heads up to 16, half of all"),
    ):
        code, _, err = run(
            "train", "pinpoint", "--arms", "base", "--seeds", 1, *options, "--quiet", "--out", tmp_path / "r"
        )
        assert code == 1 and err.count("\n") == 1 and err.startswith(f"error: {sentence}"), err


def test_a_model_of_an_unknown_layout_is_one_sentence(run, files, language, tmp_path):
    import transformers

    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    with no_bars():
        transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    language.tokenizer.save_pretrained(tmp_path / "opt")
    options = [tmp_path / "opt" if part == language.folder else part for part in files]
    code, _, err = run("train", "pinpoint", *options, *QUICK, "--arms", "spt", "--seeds", 1, "--out", tmp_path / "run")
    assert code == 1 and err.startswith("error: model: ") and "opt" in err and err.count("\n") == 1
