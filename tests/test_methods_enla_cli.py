"""EnLa from the command line: training on drawn images and on files, resuming, predicting, wrong options."""

import csv
import json
import shutil

import pytest
import torch

from pyml.methods._checkpoint import load_checkpoint
from pyml.methods.enla import demo, tiny
from pyml.methods.enla.predict import Predictor
from tests.enla_files import COMMON, STEPS, write_pictures, write_split
from tests.method_runs import LAUNCHERS, TRAINING, assert_same_bits, launch, learned, needs

needs(*TRAINING, "transformers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with the tiny CLIP after a few steps; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny.tiny_clip_folder(STEPS, shown=False)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Fewer drawn images of a class than a demonstration has."""
    monkeypatch.setattr(demo, "POOL", 3)
    monkeypatch.setattr(demo, "TEST", 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_pictures(folder / "images", classes=4, each=6)
    write_pictures(folder / "other", classes=3, each=2, seed=1)
    write_split(folder / "split.json", folder / "images", train=3, test=3)
    return folder


@pytest.fixture(scope="module")
def trained(cache, files, tmp_path_factory):
    """The checkpoint of an arm that was trained on files with the tiny CLIP's own folder."""
    from pyml import cli

    out = tmp_path_factory.mktemp("enla") / "run"
    arguments = ["train", "enla", "--clip", cache, "--data", files / "images", "--task", "fewshot", "--shots", 2]
    arguments += ["--arms", "enla-no-visual", "--seeds", 1, "--epochs", 2, "--device", "cpu", "--quiet", "--out", out]
    assert cli.main([str(a) for a in arguments]) == 0
    return out / "enla-no-visual" / "seed1" / "checkpoint.safetensors"


# --- training ---------------------------------------------------------------------------------------------------------


def test_drawn_images_without_any_option(run, cache, tmp_path):
    out = tmp_path / "run"
    options = [*COMMON, "--arms", "zero-shot,enla-no-visual", "--seeds", 2, "--shots", 1, "--out", out]
    code, _, err = run("train", "enla", *options)
    assert (code, err) == (0, "")
    metrics = json.loads((out / "metrics.json").read_text())
    config, arms = metrics["config"], metrics["archs"]
    assert config["method"] == "enla" and config["clip"]["tiny_steps"] == STEPS and len(config["classes"]) == 24
    assert config["eval_images"] == {"base": 24 * 2, "novel": 24 * 2}
    assert list(arms) == ["zero-shot", "enla-no-visual"] and arms["zero-shot"]["parameters"] == 0
    for row in arms.values():
        for base, novel, mean in zip(*(row[name]["values"] for name in ("base", "novel", "harmonic"))):
            assert 0 <= base <= 100 and mean == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0)
    assert arms["zero-shot"]["base"]["std"] == 0  # the seed chooses the training images alone
    table = (out / "table.md").read_text()
    assert f"| zero-shot | {arms['zero-shot']['base']['mean']:.1f} ± 0.0 |" in table
    assert "shapes, base2novel: 1 shot of each of 24 classes, 2 seeds" in table
    assert (out / "bars.png").read_bytes()[:4] == b"\x89PNG"
    before = {file: file.read_bytes() for file in out.glob("*/seed*/metrics.json")}
    assert len(before) == 4 and run("train", "enla", *options, "--resume")[0] == 0
    assert before == {file: file.read_bytes() for file in before}
    code, _, err = run("train", "enla", *options, "--resume", "--drawn-seed", 1)
    assert code == 1 and "was started with drawn_seed = 0, got 1" in err


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_under_a_launcher(run, cache, files, tmp_path, processes):
    """One process under accelerate launch gives the same bits; two under torchrun differ by the order of sums."""
    here, there = tmp_path / "here", tmp_path / "there"
    options = ["train", "enla", "--clip", cache, "--data", files / "images", "--task", "fewshot", "--shots", 2]
    options += ["--arms", "zero-shot,enla", "--seeds", 1, "--epochs", 2, "--batch-size", 3, "--threads", 1]
    device = "cpu" if torch.cuda.is_available() else "auto"
    options = [str(option) for option in (*options, "--device", device, "--quiet", "--out")]
    launch(LAUNCHERS[processes], ["-m", "pyml.cli", *options, str(there)])
    assert run(*options, here) == (0, "", "")
    alone, together = (json.loads((folder / "metrics.json").read_text()) for folder in (here, there))
    assert together["config"] == alone["config"] | {"processes": processes}
    assert together["archs"]["zero-shot"]["test"] == alone["archs"]["zero-shot"]["test"]
    assert (there / "table.md").exists() and (there / "bars.png").exists()
    first, second = (learned(folder / "enla" / "seed1") for folder in (here, there))
    if processes == 1:
        assert_same_bits(first, second)
        assert alone["archs"]["enla"]["test"] == together["archs"]["enla"]["test"]
    else:
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_learned_follows_from_the_seed(run, cache, tmp_path):
    tensors = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = [*COMMON, "--arms", "enla-no-visual", "--seeds", 1, "--first-seed", seed, "--shots", 1]
        assert run("train", "enla", *options, "--out", tmp_path / name)[0] == 0
        part = load_checkpoint(tmp_path / name / "enla-no-visual" / f"seed{seed}" / "checkpoint.safetensors").part(
            "model"
        )
        tensors.append(part)
    first, again, other = tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("task", "dataset", "evals", "total"),
    [
        ("fewshot", "pairs", ["test"], None),
        ("crossdata", "shapes", ["shapes", "pairs"], None),
        ("domain", "pairs", ["plain", "shift30", "shift60", "shift90"], "mean"),
    ],
)
def test_every_task_on_drawn_images(run, cache, tmp_path, task, dataset, evals, total):
    options = ["--arms", "zero-shot", "--seeds", 1, "--shots", 1, "--task", task, "--drawn", dataset]
    assert run("train", "enla", *COMMON, *options, "--out", tmp_path / "run") == (0, "", "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["config"]["eval_images"]) == evals
    row = metrics["archs"]["zero-shot"]
    assert all(0 <= row[name]["mean"] <= 100 for name in evals) and ("mean" in row) == (total == "mean")


def test_drawn_tasks_share_no_image(cache):
    from pyml.methods.enla.clip import load_clip

    tasks = demo.drawn_tasks("shapes", "fewshot", 2, load_clip(cache))
    assert len(tasks.pool) == 48 * 3 and len(tasks.evals["test"]) == 48 * 2
    task = tasks(3)
    train, test = task.train.batch(range(96)), task.evals["test"].batch(range(96))
    assert (train.flatten(1).unsqueeze(1) - test.flatten(1).unsqueeze(0)).abs().amax(2).min() > 0.1
    assert torch.equal(tasks(3).train.batch([5]), train[5:6]) and task.train.labels.tolist() == [
        i // 2 for i in range(96)
    ]


def test_files_train_and_are_scored(run, cache, files, tmp_path):
    (tmp_path / "names.txt").write_text(
        "\n".join(f"{item.name} thing {i}" for i, item in enumerate(sorted((files / "images").iterdir())))
    )
    (tmp_path / "texts.txt").write_text("a photo of the {}\n\nthe {}\n")
    base = [
        "train",
        "enla",
        "--clip",
        cache,
        "--data",
        files / "images",
        *COMMON[2:],
        "--arms",
        "zero-shot",
        "--seeds",
        1,
    ]
    for name, more, evals in (
        ("split", ["--split-file", files / "split.json", "--shots", 2], {"base": 6, "novel": 6}),
        ("names", ["--class-names", tmp_path / "names.txt", "--shots", 2], {"base": 6, "novel": 6}),
        ("cross", ["--task", "crossdata", "--eval-data", files / "other", "--shots", 1], {"images": 12, "other": 6}),
        ("texts", ["--task", "fewshot", "--templates", tmp_path / "texts.txt", "--shots", 1], {"test": 12}),
    ):
        code, _, err = run(*base, *more, "--out", tmp_path / name)
        assert (code, err) == (0, ""), name
        config = json.loads((tmp_path / name / "metrics.json").read_text())["config"]
        assert config["eval_images"] == evals and config["data"] == "images"
        assert config["templates"] == (["a photo of the {}", "the {}"] if name == "texts" else ["a photo of a {}."])
        assert config["classes"][0].startswith("thing 0") == (name == "names")
    copy = tmp_path / "few" / "images"
    shutil.copytree(files / "images", copy)
    few = [copy if part == files / "images" else part for part in base]
    code, _, err = run(*few, "--shots", 16, "--out", tmp_path / "few" / "run")
    assert code == 0 and "warning: the class " in err and "has fewer than 16 training images (and 1 more)" in err
    one, two, *_ = sorted(copy.glob("*/*.png"))
    two.write_bytes(one.read_bytes())  # another picture under the same name
    code, _, err = run(*few, "--shots", 16, "--out", tmp_path / "few" / "run", "--resume")
    assert code == 1 and "was started with data_checksum = " in err


def test_names_of_classes_belong_to_the_run(run, cache, files, tmp_path):
    """Those of other data too, and those that no image is learned from."""
    names = tmp_path / "names.txt"
    inside = sorted(item.name for item in (files / "images").iterdir())
    names.write_text("\n".join(f"{item} thing {i}" for i, item in enumerate(inside)))
    copy = tmp_path / "train"  # a folder of this name is a target like any other
    shutil.copytree(files / "images", copy)
    base = ["train", "enla", "--clip", cache, "--data", files / "images", "--class-names", names, *COMMON[2:]]
    base += ["--arms", "zero-shot", "--seeds", 1, "--shots", 1]
    assert run(*base, "--task", "domain", "--eval-data", copy, "--out", tmp_path / "domain") == (0, "", "")
    row = json.loads((tmp_path / "domain" / "metrics.json").read_text())["archs"]["zero-shot"]
    assert 0 <= row["images"]["mean"] <= 100 and 0 <= row["train"]["mean"] <= 100
    code, _, err = run(*base, "--task", "crossdata", "--eval-data", copy, "--out", tmp_path / "cross")
    assert (code, err) == (0, "")
    crossed = json.loads((tmp_path / "cross" / "metrics.json").read_text())["archs"]["zero-shot"]
    assert crossed["train"]["mean"] == row["train"]["mean"]  # the same names
    assert run(*base, "--out", tmp_path / "novel") == (0, "", "")
    names.write_text(names.read_text().replace("thing 3", "gadget 3"))
    code, _, err = run(*base, "--out", tmp_path / "novel", "--resume")
    assert code == 1 and "was started with data_checksum = " in err


def test_a_run_is_looked_at_before_anything_is_read(run, cache, files, tmp_path, monkeypatch):
    from pyml.methods.enla import clip, data

    base = ["train", "enla", *COMMON[2:], "--arms", "zero-shot", "--seeds", 1, "--shots", 1]
    out = tmp_path / "run"
    with_data = ["--clip", cache, "--data", files / "images", "--task", "fewshot"]
    assert run(*base, *with_data, "--out", out) == (0, "", "")

    def read(*_, **__):
        raise AssertionError("read before the run was looked at")

    monkeypatch.setattr(clip, "load_clip", read)
    monkeypatch.setattr(clip, "tiny_clip", read)
    monkeypatch.setattr(data, "load_data", read)
    for options, sentence in (
        (["--resume"], "resume: expected --out too, the folder of the run to go on with"),
        (["--resume", "--out", tmp_path / "none"], f"resume: expected the folder of a run, got {tmp_path / 'none'} "),
        (["--out", out], f"out: {out} already holds a run"),
        (["--resume", "--out", out, "--epochs", 2], f"resume: {out} was started with epochs = 1, got 2"),
    ):
        for some in ([], with_data):
            code, _, err = run(*base, *some, *options)
            assert code == 1 and err.count("\n") == 1 and err.startswith(f"error: {sentence}"), err


def test_what_the_clip_cannot_do_is_said_before_training(run, cache, files, tmp_path):
    (tmp_path / "texts.txt").write_text("{}\n")
    data = ["--clip", cache, "--data", files / "images", "--templates", tmp_path / "texts.txt"]
    for options, sentence in (
        (["--depth", 99], "depth: expected at most 3, the layers of the image tower, got 99"),
        (data, "templates: the arm coop needs words before the class name, got '{}'"),
    ):
        out = tmp_path / "run"
        common = COMMON[2:] if "--data" in options else COMMON
        code, _, err = run("train", "enla", *common, "--arms", "zero-shot,coop,enla", "--shots", 1, "--seeds", 1,
                           *options, "--out", out)  # fmt: skip
        assert (code, err) == (1, f"error: {sentence}\n")
        assert not out.exists()


def test_wrong_data_is_one_sentence_before_training(run, cache, files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images").glob("*/*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    with_data = ["--data", tmp_path / "images"]
    for options, sentence in (
        ([*with_data, "--clip", cache, "--task", "fewshot", "--shots", 2], f"{broken}: "),
        (with_data, "clip: expected --clip with --data, as the tiny CLIP knows drawn shapes only"),
        (["--eval-data", "x"], "eval-data: expected --data too"),
        (["--split-file", "x"], "split-file: expected --data too"),
        (["--split-seed", 3], "split-seed: expected --data too, got 3"),
        ([*with_data, "--clip", cache, "--drawn", "pairs"], "drawn: expected no --data beside it, got pairs"),
        (
            [*with_data, "--clip", cache, "--split-file", "x", "--class-names", "y"],
            "class-names: expected to be left out beside --split-file, which says it, got y",
        ),
        (["--clip", tmp_path], f"clip: expected the folder of a CLIPModel, got {tmp_path} without config.json"),
        (["--clip", cache, "--tiny-steps", 3], "tiny-steps: expected at least 1, and no --clip, got 3"),
        (["--tiny-steps", 0], "tiny-steps: expected at least 1, and no --clip, got 0"),
        (["--drawn", "letters"], "drawn: expected one of shapes, pairs, got 'letters'"),
        (["--drawn-shift", "nan"], "drawn-shift: expected a number from 0 to 1, got nan"),
        (["--shots", 40], "shots: expected from 1 to 3 for drawn images, got 40"),
        (["--task", "zero"], "task: expected one of base2novel, fewshot, crossdata, domain, got 'zero'"),
        (["--arms", "maple"], "arms: expected one of zero-shot, coop, enla, "),
        (["--eps", 0], "eps: expected a finite number > 0, got 0.0"),
    ):
        code, _, err = run("train", "enla", *COMMON[2:], "--shots", 1, *options, "--out", tmp_path / "run")
        assert code == 1 and err.count("\n") == 1, err
        assert err.startswith(f"error: {sentence}"), err
        assert not (tmp_path / "run").exists()


# --- prediction -------------------------------------------------------------------------------------------------------


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predict_writes_a_table(run, trained, files, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, file in enumerate(sorted((files / "images").glob("*/0.png"))):
        shutil.copy(file, pictures / f"{number}.png")
    (pictures / "broken.png").write_text("x")
    (pictures / "notes.txt").write_text("x")
    code, out, err = run("predict", "enla", "--checkpoint", trained, "--input", pictures, "--out", tmp_path / "a.csv")
    assert code == 0 and "4 pictures, 2 left out" in out
    assert err.startswith(f"warning: {pictures / 'notes.txt'} is no picture file and is left out\nwarning: {pictures}")
    assert "broken.png: is no picture that can be read" in err
    rows = read_csv(tmp_path / "a.csv")
    assert [row["file"] for row in rows] == [str(pictures / f"{number}.png") for number in range(4)]
    known = load_checkpoint(trained).info["classes"]
    assert all(row["class"] in known and 0.25 <= float(row["probability"]) <= 1 for row in rows)
    more = ["--top", 9, "--quiet", "--out", tmp_path / "b.csv"]
    code, out, err = run("predict", "enla", "--checkpoint", trained, "--input", pictures / "2.png", *more)
    assert (code, out, err) == (0, "", "")
    top = read_csv(tmp_path / "b.csv")
    assert len(top) == 4 and sum(float(row["probability"]) for row in top) == pytest.approx(1, abs=1e-5)
    assert top[0]["class"] == rows[2]["class"] and {row["class"] for row in top} == set(known)


def test_prediction_is_what_was_scored(trained, cache, files):
    """The accuracy of the run, counted again from the predictions of its test pictures."""
    from pyml.methods.enla.data import part, read_folder

    test = part(read_folder(files / "images"), 0.5, 0)[1]
    predictor = Predictor(trained)
    found = [next(iter(predictor.files(path))).found[0][0] for path in test.paths]
    right = sum(name == test.classes[label] for name, label in zip(found, test.labels))
    scores = json.loads((trained.parent / "metrics.json").read_text())["scores"]
    assert scores["test"] == pytest.approx(100 * right / len(found))


def test_predict_tells_other_classes(run, trained, files, tmp_path):
    (tmp_path / "classes.txt").write_text("red circle\nblue ring\nwhite cross\n")
    picture = next((files / "images").glob("*/0.png"))
    options = ["--classes", tmp_path / "classes.txt", "--top", 3, "--out", tmp_path / "c.csv"]
    assert run("predict", "enla", "--checkpoint", trained, "--input", picture, *options)[0] == 0
    rows = read_csv(tmp_path / "c.csv")
    assert {row["class"] for row in rows} == {"red circle", "blue ring", "white cross"}


def test_wrong_predictions_are_one_sentence(run, trained, cache, files, tmp_path):
    (tmp_path / "twins.txt").write_text("a\na\n")
    (tmp_path / "empty").mkdir()
    moved = tmp_path / "clip"
    shutil.copytree(cache, moved)
    picture = next((files / "images").glob("*/0.png"))
    base = {"--checkpoint": trained, "--input": picture, "--out": tmp_path / "d.csv"}
    for change, sentence in (
        ({"--checkpoint": tmp_path / "none"}, "checkpoint: no file "),
        ({"--checkpoint": cache / "model.safetensors"}, "checkpoint: "),
        ({"--input": tmp_path / "none.png"}, "input: no file or folder "),
        ({"--input": tmp_path / "empty"}, "input: no picture "),
        ({"--input": tmp_path / "twins.txt"}, "input: no picture of "),
        ({"--classes": tmp_path / "twins.txt"}, "classes: expected one class of each name, got several called 'a'"),
        ({"--out": tmp_path}, "out: expected a file, got the folder "),
    ):
        options = [part for pair in {**base, **change}.items() for part in pair]
        code, _, err = run("predict", "enla", *options, "--quiet")
        assert code == 1 and err.splitlines()[-1].startswith(f"error: {sentence}"), err
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(picture, pictures / "0.png")
    for change in (
        {"--input": pictures, "--out": pictures / "0.png"},
        {"--classes": tmp_path / "twins.txt", "--out": tmp_path / "twins.txt"},
        {"--clip": moved, "--out": moved / "config.json"},
    ):
        there = change["--out"].read_bytes()
        code, _, err = run("predict", "enla", *[part for pair in {**base, **change}.items() for part in pair])
        assert code == 1 and err.startswith("error: out: expected a new file, got ") and err.count("\n") == 1, err
        assert change["--out"].read_bytes() == there
    options = [part for pair in base.items() for part in pair]
    assert run("predict", "enla", *options, "--clip", moved)[0] == 0
    other = tiny.make_model(seed=9)
    other.save_pretrained(moved)
    code, _, err = run("predict", "enla", *options, "--clip", moved)
    assert code == 1 and "was learned on the CLIP" in err
