"""EnLa's data: folders, split files and what can be wrong with them, shots, halves, tasks, drawn images."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from pyml.methods import UserError
from pyml.methods.enla import shapes
from pyml.methods.enla.data import (
    Labelled,
    Loader,
    check_pictures,
    data_checksum,
    halves,
    load_data,
    load_target,
    make_tasks,
    open_file,
    part,
    read_class_names,
    read_folder,
    read_split_file,
    shots_of,
)
from pyml.methods.enla.task import Split, Task, fill
from tests.enla_files import write_pictures, write_split


def ready(picture):
    """As much of an image processor as the data asks for."""
    return torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1)


@pytest.fixture
def load():
    return Loader(open_file, ready)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "images", classes=4, each=6)
    return tmp_path / "images"


# --- folders and split files ------------------------------------------------------------------------------------------


def test_a_folder_a_class(folder):
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").mkdir()
    found = read_folder(folder)
    inside = sorted(item for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
    assert found.classes == [item.name.replace("_", " ") for item in inside] and len(found.paths) == 24
    assert all(path.parent == inside[label] for path, label in zip(found.paths, found.labels))


def test_class_names_from_a_file(folder, tmp_path):
    names = {item.name: f"thing {number}" for number, item in enumerate(sorted(folder.iterdir()))}
    file = tmp_path / "names.txt"
    file.write_text("\n".join(f"{key} {name}" for key, name in names.items()) + "\n\n")
    assert read_class_names(file) == names
    assert read_folder(folder, names).classes == ["thing 0", "thing 1", "thing 2", "thing 3"]
    with pytest.raises(UserError, match="class-names: no name for the folder "):
        read_folder(folder, {"other": "x"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "class-names: expected lines of text in "),
        ("word\n", "expected a folder, a space and a name in a line, got 'word'"),
        ("a one\na two\n", "class-names: the folder a is named twice"),
    ],
)
def test_wrong_class_names_are_one_sentence(tmp_path, text, sentence):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_class_names(tmp_path / "names.txt")


def test_wrong_folders_are_one_sentence(folder, tmp_path, load):
    for path, sentence in (
        (tmp_path / "absent", "data: expected a folder with one folder a class, got "),
        (next(folder.iterdir()), "data: expected one folder a class in "),
    ):
        with pytest.raises(UserError, match=sentence):
            load_data(path, load)
    (folder / "zebra").mkdir()
    with pytest.raises(UserError, match=r"data: no picture \(.*\) in the class folder .*zebra"):
        load_data(folder, load)
    (folder / "zebra").rmdir()
    first = sorted(folder.iterdir())[0]
    twin = folder / first.name.replace("_", "__")
    twin.mkdir()
    (twin / "a.png").write_bytes((first / "0.png").read_bytes())
    with pytest.raises(UserError, match=f"got several called '{first.name.replace('_', ' ')}'"):
        load_data(folder, load)


def test_a_split_file_is_read(folder, tmp_path, load):
    content = write_split(tmp_path / "split.json", folder, train=4, test=2)
    train, test = read_split_file(tmp_path / "split.json", folder)
    for key, found in (("train", train), ("test", test)):
        assert [str(path.relative_to(folder)) for path in found.paths] == [file for file, _, _ in content[key]]
        assert found.labels == [label for _, label, _ in content[key]]
    assert train.classes == test.classes == read_folder(folder).classes
    data = load_data(folder, load, split_file=tmp_path / "split.json")
    assert (data.name, len(data.pool), len(data.test)) == ("images", 16, 8)


def spoil(content, how):
    entry = content["test"][0]
    if how == "no test":
        del content["test"]
    elif how == "short entry":
        content["test"][0] = entry[:2]
    elif how == "negative label":
        entry[1] = -1
    elif how == "text for entries":
        content["test"] = "none"
    elif how == "two names":
        entry[2] = "zebra"
    elif how == "absent file":
        entry[0] = "zebra/0.png"
    elif how == "no test of a class":
        content["test"] = [entry for entry in content["test"] if entry[1]]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no test", "split-file: expected the keys train, val and test in "),
        ("short entry", "split-file: expected entries [path, label, class] in test of "),
        ("negative label", "split-file: expected entries [path, label, class] in test of "),
        ("text for entries", "split-file: expected entries [path, label, class] in test of "),
        ("two names", "split-file: label 0 is called "),
        ("absent file", "zebra/0.png: no such file, and "),
        ("no test of a class", "split-file: no picture of the class "),
    ],
)
def test_a_wrong_split_file_is_one_sentence(folder, tmp_path, how, sentence):
    content = write_split(tmp_path / "split.json", folder, train=4, test=2)
    spoil(content, how)
    (tmp_path / "split.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_split_file(tmp_path / "split.json", folder)


def test_folders_train_and_test(tmp_path, load):
    for side, each in (("train", 5), ("test", 2)):
        classes = write_pictures(tmp_path / side, classes=3, each=each)
    data = load_data(tmp_path, load)
    assert (len(data.pool), len(data.test)) == (15, 6) and data.pool.classes == data.test.classes == classes
    write_pictures(tmp_path / "train", classes=4, each=1)
    with pytest.raises(UserError, match="data: expected the classes of train in test of "):
        load_data(tmp_path, load)


def test_a_share_of_every_class_is_kept_to_test_on(folder):
    found = read_folder(folder)
    train, test = part(found, 0.3, 0)
    assert sorted(train.paths + test.paths) == sorted(found.paths)
    assert test.labels == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part(found, 0.3, 0) == (train, test) and part(found, 0.3, 1) != (train, test)
    assert len(part(found, 0.999, 0)[0].paths) == len(part(found, 0.001, 0)[1].paths) == 4  # never none
    with pytest.raises(UserError, match="expected at least 2 pictures of every class, got 1 of 'a'"):
        part(Labelled(found.paths[:1], [0], ["a"]), 0.5, 0)
    with pytest.raises(UserError, match="test-fraction: expected a number between 0 and 1"):
        part(found, 1.5, 0)


def test_pictures_are_read_before_anything_else(folder, load):
    data = load_data(folder, load)
    ticks = []
    check_pictures([data.pool, data.test, data.test], lambda: ticks.append(1))
    assert len(ticks) == 36 and len(load.kept) == 24
    wrong = sorted(folder.iterdir())[1]
    (wrong / "1.png").write_bytes((wrong / "1.png").read_bytes()[:300])
    (wrong / "2.png").write_text("x")
    again = load_data(folder, Loader(open_file, ready))
    with pytest.raises(UserError, match=rf"^{re.escape(str(wrong))}.*\(and 1 more\)$"):
        check_pictures([again.pool, again.test])


def test_pictures_of_any_mode_are_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (5, 4)).save(tmp_path / f"{mode}.{suffix}")
        assert open_file(tmp_path / f"{mode}.{suffix}").mode == "RGB"


# --- shots and tasks --------------------------------------------------------------------------------------------------


def test_shots_follow_from_the_seed(folder, load):
    pool = load_data(folder, load).pool
    first, again, other = (shots_of(pool, 2, seed) for seed in (1, 1, 2))
    assert first.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and first.images.keys == again.images.keys
    assert first.images.keys != other.images.keys and len(set(first.images.keys)) == 8
    assert set(first.images.keys) <= set(shots_of(pool, 3, 1).images.keys)  # more shots keep the ones before
    assert torch.equal(first.batch([3]), ready(open_file(first.images.keys[3])).unsqueeze(0))


def test_base_and_novel_classes(folder, load):
    data = load_data(folder, load)
    tasks = make_tasks("base2novel", data, [], ["a {}"], 9)
    task = tasks(0)
    assert task.train.classes == task.evals["base"].classes == data.test.classes[:2]
    assert task.evals["novel"].classes == data.test.classes[2:]
    for split in task.evals.values():
        for key, label in zip(split.images.keys, split.labels.tolist()):
            assert key.parent.name.replace("_", " ") == split.classes[label]
    assert tasks.short_classes() == task.train.classes  # 3 of 6 pictures are there to train on
    assert task.totals({"base": 60.0, "novel": 40.0}) == {"harmonic": 48.0}
    assert task.totals({"base": 0.0, "novel": 0.0}) == {"harmonic": 0.0}
    with pytest.raises(UserError, match="expected at least 2 classes for the task base2novel, got 1"):
        halves(Split(torch.empty(0, 3, 2, 2), torch.empty(0, dtype=torch.int64), ["one"]))


def test_other_data_is_scored(folder, tmp_path, load):
    write_pictures(tmp_path / "other", classes=3, each=2, seed=1)
    write_split(tmp_path / "split.json", tmp_path / "other", train=1, test=1)
    source = load_data(folder, load)
    whole, tested = (
        load_target(str(tmp_path / "other"), load),
        load_target(f"{tmp_path / 'other'}:{tmp_path / 'split.json'}", load),
    )
    assert (len(whole.test), len(tested.test)) == (6, 3)
    for name in ("crossdata", "domain"):
        task = make_tasks(name, source, [whole], ["a {}"], 1)(0)
        assert list(task.evals) == ["images", "other"] and task.evals["other"].classes == whole.test.classes
        assert task.totals({"images": 50.0, "other": 30.0}) == {}
    third = whole._replace(name="third")
    assert make_tasks("domain", source, [whole, third], ["a {}"], 1)(0).totals(
        {"images": 50.0, "other": 30.0, "third": 10.0}
    ) == {"mean": 20.0}
    (tmp_path / "other" / "zebra").mkdir()
    (tmp_path / "other" / "zebra" / "0.png").write_bytes(open_bytes(folder))
    strange = load_target(str(tmp_path / "other"), load)
    with pytest.raises(UserError, match="expected classes of images for the task domain, got 'zebra' in other"):
        make_tasks("domain", source, [strange], ["a {}"], 1)
    make_tasks("crossdata", source, [strange], ["a {}"], 1)


def test_names_of_data_are_apart_from_scores(folder, tmp_path, load):
    source = load_data(folder, load)
    whole = source._replace(name="third")
    for name in ("mean", "harmonic", "parameters", "train_seconds", "train_peak_mb", "score_seconds"):
        for order in ([source._replace(name=name), whole], [whole, source._replace(name=name)]):
            with pytest.raises(UserError) as caught:
                make_tasks("crossdata", order[0], order[1:], ["a {}"], 1)
            option = "data" if order[0].name == name else "eval-data"
            assert str(caught.value) == f"{option}: expected a folder that is not called as a score is, got {name!r}"
    assert list(make_tasks("fewshot", source._replace(name="mean"), [], ["a {}"], 1).evals) == ["test"]
    shutil.copytree(folder, tmp_path / "x" / "2024")
    assert load_target(str(tmp_path / "x" / "2024"), load).name == "data-2024"  # a number is no name of a column


def test_class_names_are_of_other_data_too(folder, tmp_path, load):
    shutil.copytree(folder, tmp_path / "other")
    inside = sorted(item.name for item in folder.iterdir())
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{item} thing {i}" for i, item in enumerate(inside)))
    source = load_data(folder, load, class_names=names)
    target = load_target(str(tmp_path / "other"), load, names)
    assert target.test.classes == source.test.classes == [f"thing {i}" for i in range(4)]
    assert list(make_tasks("domain", source, [target], ["a {}"], 1).evals) == ["images", "other"]
    write_pictures(tmp_path / "own", classes=9, each=1, seed=1)
    for item in inside:
        shutil.rmtree(tmp_path / "own" / item, ignore_errors=True)
    own = load_target(str(tmp_path / "own"), load, names)  # the file names none of its folders
    assert own.test.classes == sorted(item.name.replace("_", " ") for item in (tmp_path / "own").iterdir())
    (tmp_path / "other" / inside[0]).rename(tmp_path / "other" / "nameless")
    with pytest.raises(UserError, match=r"class-names: no name for the folder .*nameless"):
        load_target(str(tmp_path / "other"), load, names)


def test_the_checksum_knows_every_name(folder, load):
    split = load_data(folder, load).test
    first = data_checksum([split])
    other = Split(split.images, split.labels, [*split.classes[:-1], "another name"])
    joined = Split(split.images, split.labels, ["".join(split.classes[:2]), "", *split.classes[2:]])
    assert len({first, data_checksum([other]), data_checksum([joined])}) == 3
    assert data_checksum([Split(split.images, split.labels, list(split.classes))]) == first


def open_bytes(folder):
    return next(folder.glob("*/0.png")).read_bytes()


def test_wrong_tasks_are_one_sentence(folder, load):
    data = load_data(folder, load)
    for arguments, sentence in (
        (("few", data, [], ["{}"], 1), "task: expected one of base2novel, fewshot, crossdata, domain, got 'few'"),
        (("fewshot", data, [], ["{}"], 0), "shots: expected at least 1, got 0"),
        (("fewshot", data, [], ["a photo"], 1), "templates: expected {} for the class name in every template"),
        (("fewshot", data, [], [], 1), "templates: expected at least one"),
        (("fewshot", data, [data], ["{}"], 1), "eval-data: expected none for the task fewshot, got 1"),
        (("domain", data, [], ["{}"], 1), "eval-data: expected at least one for the task domain, got 0"),
        (("domain", data, [data], ["{}"], 1), "eval-data: expected one folder of each name, got several"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            make_tasks(*arguments)


def test_texts_of_a_class():
    assert fill("a photo of the {}", "red ring") == "a photo of the red ring"
    assert [fill(f"the {place}", "red ring and blue cross") for place in ("{}", "{1}", "{2}")] == [
        "the red ring and blue cross", "the red ring", "the blue cross",
    ]  # fmt: skip
    split = Split(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ["x", "y"])
    assert Task("fewshot", split, {}, ["a {}", "b {}"]).texts(["x", "y"]) == [["a x", "a y"], ["b x", "b y"]]
    assert split.batch(torch.tensor([1, 0, 1])).shape == (3, 3, 4, 4) and len(split) == 2


# --- drawn images -----------------------------------------------------------------------------------------------------


def test_objects_have_their_colour_and_place():
    colours = torch.tensor(list(shapes.COLOURS.values()))
    square = shapes.SHAPES.index("square")
    kinds = torch.arange(len(colours)).repeat_interleave(4) * len(shapes.SHAPES) + square
    places = torch.arange(4).repeat(len(colours))
    images = shapes.draw(kinds[:, None], places[:, None], generator=torch.Generator().manual_seed(0))
    assert images.shape == (32, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    for image, kind, place in zip(images, kinds.tolist(), places.tolist()):
        brightest = [image[:, y - 2 : y + 2, x - 2 : x + 2].mean((1, 2)) for x, y in shapes.PLACES.values()]
        assert (brightest[place] - colours[kind // len(shapes.SHAPES)]).abs().max() < 0.35
        assert max(range(4), key=lambda corner: brightest[corner].max()) == place


def test_every_shape_is_another():
    kinds = torch.arange(len(shapes.SHAPES)) + len(shapes.SHAPES) * list(shapes.COLOURS).index("white")
    draw = [
        shapes.draw(
            kinds[i : i + 1, None], torch.zeros(1, 1, dtype=torch.int64), generator=torch.Generator().manual_seed(3)
        )
        for i in range(len(kinds))
    ]
    areas = [float((image > 0.6).float().mean()) for image in draw]
    assert all(0.01 < area < 0.3 for area in areas)
    assert all((a - b).abs().mean() > 0.01 for i, a in enumerate(draw) for b in draw[:i])


def test_drawn_data_is_seeded_and_shifted():
    first, again, other = (shapes.drawn("shapes", 2, 0.6, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.uint8 and first.labels.tolist() == [i // 2 for i in range(96)]
    assert sorted(first.classes) == sorted(shapes.KINDS)
    brightness = [shapes.drawn("shapes", 4, shift, 0).images.float().mean() for shift in (0.0, 0.5, 1.0)]
    assert brightness[0] < brightness[1] < brightness[2]


def test_pairs_are_a_ring():
    kinds = shapes.class_kinds("pairs")
    assert kinds.flatten().bincount().tolist() == [2] * 48
    assert (kinds[:, 0] != kinds[:, 1]).all() and torch.equal(kinds[:, 1], kinds[:, 0].roll(-1))
    assert shapes.class_names("pairs")[0] == f"{shapes.KINDS[kinds[0, 0]]} and {shapes.KINDS[kinds[0, 1]]}"
    made = shapes.drawn("pairs", 3, 0.0, 0)
    assert len(made.images) == 144 and len(set(made.classes)) == 48
    places = shapes.free_places(500, 3, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in places.tolist()) and set(places.flatten().tolist()) == {0, 1, 2, 3}
