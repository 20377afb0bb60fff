"""Images of classes from folders or CoOp's split files, and what a run does with them: halves, shots, tasks."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._checkpoint import checksum, read_json
from pyml.methods._pictures import SUFFIXES, open_picture
from pyml.methods._recipe import COUNT, SHARE, Rule, among, require
from pyml.methods.enla.task import SCORES, TASKS, Split, Task

UNTAKEN = Rule("a folder that is not called as a score is", lambda name: name not in SCORES)
KEPT_BYTES = 2**30  # of images that are kept ready for the towers, so that few shots are read once


class Loader:
    """Opens an image by its key and makes it ready for the CLIP; keeps the first ones, up to a limit."""

    def __init__(self, open_: Callable[[Any], Any], preprocess: Callable[[Any], Tensor]) -> None:
        self.open, self.preprocess = open_, preprocess
        self.kept: dict[Any, Tensor] = {}
        self.bytes = 0

    def __call__(self, key: Any) -> Tensor:
        if key in self.kept:
            return self.kept[key]
        pixels = self.preprocess(self.open(key))
        if self.bytes < KEPT_BYTES:
            self.kept[key] = pixels
            self.bytes += pixels.numel() * pixels.element_size()
        return pixels


@dataclass(frozen=True)
class Pictures:
    """Images that are read when they are asked for."""

    keys: list[Any]
    load: Loader

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        return self.load(self.keys[index])


class Labelled(NamedTuple):
    """Picture files, their classes as indices into the names."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


class Data(NamedTuple):
    """One data set: what shots are drawn from, and what is scored."""

    name: str
    pool: Split
    test: Split


# --- files ------------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, names: dict[str, str] | None = None, what: str = "data") -> Labelled:
    """One folder a class with its pictures, in the order of the folders' names.

    Args:
        names: folder -> class name; without it the folder's own name, with spaces for underscores.

    Raises:
        UserError: no folder, no class, a class without a picture, two classes of one name, a folder without a name.
    """
    if not folder.is_dir():
        raise UserError(f"{what}: expected a folder with one folder a class, got {folder}")
    inside = sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    if not inside:
        raise UserError(f"{what}: expected one folder a class in {folder}, got none")
    if names is not None:
        for item in inside:
            if item.name not in names:
                raise UserError(f"class-names: no name for the folder {item}")
    found = Labelled([], [], [])
    for label, item in enumerate(inside):
        pictures = sorted(path for path in item.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not pictures:
            raise UserError(f"{what}: no picture ({', '.join(SUFFIXES)}) in the class folder {item}")
        found.paths.extend(pictures)
        found.labels.extend([label] * len(pictures))
        found.classes.append(plain(item.name) if names is None else names[item.name])
    check_classes(found.classes, f"{what}: {folder}")
    return found


def read_class_names(path: Path) -> dict[str, str]:
    """Lines ``folder class name`` -> folder: class name."""
    names: dict[str, str] = {}
    for line in read_lines(path, "class-names"):
        folder, _, name = line.partition(" ")
        if not name.strip():
            raise UserError(f"class-names: expected a folder, a space and a name in a line, got {line!r} in {path}")
        if folder in names:
            raise UserError(f"class-names: the folder {folder} is named twice in {path}")
        names[folder] = name.strip()
    return names


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, at least one."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {path} cannot be read ({error})") from error
    if not any(lines):
        raise UserError(f"{what}: expected lines of text in {path}, got none")
    return [line for line in lines if line]


def read_split_file(path: Path, folder: Path) -> tuple[Labelled, Labelled]:
    """CoOp's ``split_zhou_<Dataset>.json`` -> the pictures to train on and to test on, below ``folder``.

    Its keys ``train``, ``val`` and ``test`` hold entries ``[path, label, class name]``; ``val`` is not used.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"train", "test"} <= content.keys():
        raise UserError(f"split-file: expected the keys train, val and test in {path}")
    names: dict[int, str] = {}
    halves = []
    for key in ("train", "test"):
        half: list[tuple[Path, int]] = []
        for entry in content[key] if isinstance(content[key], list) else [None]:
            match entry:
                case [str(file), int(label), str(name)] if label >= 0:
                    known = names.setdefault(label, plain(name))
                    if known != plain(name):
                        raise UserError(f"split-file: label {label} is called {known!r} and {plain(name)!r} in {path}")
                    half.append((folder / file, label))
                case _:
                    raise UserError(f"split-file: expected entries [path, label, class] in {key} of {path}")
        halves.append(half)
    order = {label: index for index, label in enumerate(sorted(names))}
    classes = [names[label] for label in order]
    check_classes(classes, f"split-file: {path}")
    result = [Labelled([file for file, _ in half], [order[label] for _, label in half], classes) for half in halves]
    for key, found in zip(("train", "test"), result):
        missing = sorted(set(range(len(classes))) - set(found.labels))
        if missing:
            raise UserError(f"split-file: no picture of the class {classes[missing[0]]!r} in {key} of {path}")
        absent = [file for file in found.paths if not file.is_file()]
        if absent:
            raise UserError(f"{absent[0]}: no such file, and {path} names it{_more(absent)}")
    return result[0], result[1]


def plain(name: str) -> str:
    """A class name as it goes into a sentence."""
    return " ".join(name.replace("_", " ").split())


def check_classes(classes: Sequence[str], where: str, what: str = "class") -> None:
    """Raise one sentence where two have the same name."""
    twins = [name for name, count in Counter(classes).items() if count > 1]
    if twins:
        raise UserError(f"{where}: expected one {what} of each name, got several called {twins[0]!r}")


def _more(wrong: Sequence[Any]) -> str:
    return f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""


def part(found: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Split every class at random -> (train, test), at least one picture of each class on both sides."""
    require("test_fraction", share, SHARE)
    chooser = random.Random(seed)
    sides: tuple[list[int], list[int]] = ([], [])
    for label, name in enumerate(found.classes):
        rows = [row for row, of in enumerate(found.labels) if of == label]
        if len(rows) < 2:
            raise UserError(f"data: expected at least 2 pictures of every class, got 1 of {name!r}")
        chooser.shuffle(rows)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        sides[1].extend(rows[:count])
        sides[0].extend(rows[count:])
    train, test = (
        Labelled([found.paths[row] for row in sorted(rows)], [found.labels[row] for row in sorted(rows)], found.classes)
        for rows in sides
    )
    return train, test


def load_data(
    folder: Path,
    load: Loader,
    *,
    split_file: Path | None = None,
    class_names: Path | None = None,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    what: str = "data",
) -> Data:
    """A folder of images as one data set.

    With a split file: what it says. Else the folders ``train`` and ``test`` in it where both are there, with the same
    class folders; else one folder a class, of which a share is kept to test on.
    """
    if not folder.is_dir():
        raise UserError(f"{what}: expected a folder with one folder a class, got {folder}")
    names = None if class_names is None else read_class_names(class_names)
    if split_file is not None:
        train, test = read_split_file(split_file, folder)
    elif all((folder / side).is_dir() for side in ("train", "test")):
        train, test = (read_folder(folder / side, names, what) for side in ("train", "test"))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UserError(f"{what}: expected the classes of train in test of {folder} too, got {odd[0]!r} in one")
    else:
        train, test = part(read_folder(folder, names, what), test_fraction, split_seed)
    return Data(_called(folder), _split(train, load), _split(test, load))


def load_target(text: str, load: Loader, class_names: Path | None = None) -> Data:
    """An ``--eval-data`` value, ``DIR`` or ``DIR:SPLIT.json``: its test pictures, or all where there is no split.

    The names of classes are for it too, where they name any of its folders.
    """
    before, _, after = text.rpartition(":")
    if before and after.endswith(".json"):
        return load_data(Path(before), load, split_file=Path(after), what="eval-data")
    folder = Path(text)
    names = None if class_names is None else read_class_names(class_names)
    inside = folder / "test" if (folder / "test").is_dir() and (folder / "train").is_dir() else folder
    if names is not None and inside.is_dir() and names.keys().isdisjoint(item.name for item in inside.iterdir()):
        names = None
    found = _split(read_folder(inside, names, "eval-data"), load)
    return Data(_called(folder), found, found)


def _called(folder: Path) -> str:
    """A folder's name, without what the format of a table's column does not take."""
    name = re.sub(r"[^\w-]+", "-", folder.resolve().name)
    return name if name.strip("-") and not name.isdecimal() else f"data-{name}".rstrip("-")


def _split(found: Labelled, load: Loader) -> Split:
    return Split(Pictures(found.paths, load), torch.tensor(found.labels), found.classes)


def open_file(path: Path) -> Any:
    """A picture file of any mode as RGB."""
    return open_picture(path, "RGB")


def check_pictures(splits: Iterable[Split], tick: Callable[[], None] = lambda: None) -> None:
    """Read every picture of these splits once; the first that cannot be read is named, the others are counted."""
    wrong: dict[Any, str] = {}
    seen: set[Any] = set()
    for split in splits:
        assert isinstance(split.images, Pictures)
        for key in split.images.keys:
            tick()
            if key in seen:
                continue
            seen.add(key)
            try:
                split.images.load(key)
            except UserError as error:
                wrong[key] = str(error)
    if wrong:
        raise UserError(f"{next(iter(wrong.values()))}{_more(list(wrong))}")


def data_checksum(splits: Iterable[Split]) -> str:
    """A fingerprint of the files of these splits and their classes."""

    @cache
    def file(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    return checksum(
        part
        for split in splits
        if isinstance(split.images, Pictures)
        for part in (split.labels, repr(split.classes).encode(), *map(file, split.images.keys))
    )


# --- splits -----------------------------------------------------------------------------------------------------------


def take(split: Split, rows: Tensor) -> Split:
    """Some images of a split, with the same classes."""
    assert isinstance(split.images, Pictures)
    keys = [split.images.keys[row] for row in rows.tolist()]
    return Split(Pictures(keys, split.images.load), split.labels[rows], split.classes)


def of_classes(split: Split, chosen: Sequence[int]) -> Split:
    """The images of some classes, which are counted anew in this order."""
    place = torch.full((len(split.classes),), -1)
    place[torch.tensor(chosen)] = torch.arange(len(chosen))
    kept = take(split, (place[split.labels] >= 0).nonzero().flatten())
    return Split(kept.images, place[kept.labels], [split.classes[index] for index in chosen])


def shots_of(split: Split, shots: int, seed: int) -> Split:
    """So many images of every class, drawn with this seed; all of a class that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in range(len(split.classes)):
        of_class = (split.labels == label).nonzero().flatten()
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:shots]])
    return take(split, torch.cat(rows))


def halves(split: Split) -> tuple[Split, Split]:
    """Base and novel classes: the first half, rounded up, and the rest."""
    count = len(split.classes)
    if count < 2:
        raise UserError(f"data: expected at least 2 classes for the task base2novel, got {count}")
    middle = (count + 1) // 2
    return of_classes(split, range(middle)), of_classes(split, range(middle, count))


def known_classes(target: Data, source: Data) -> Split:
    """A target of the task domain: images of classes of the source, which they are told from."""
    unknown = [name for name in target.test.classes if name not in source.test.classes]
    if unknown:
        raise UserError(
            f"eval-data: expected classes of {source.name} for the task domain, got {unknown[0]!r} in {target.name}"
            f"{_more(unknown)}"
        )
    return target.test


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, one a seed: they differ in the shots only."""

    name: str
    pool: Split
    evals: dict[str, Split]
    templates: list[str]
    shots: int
    facts: dict[str, Any]

    def short_classes(self) -> list[str]:
        """Classes with fewer images than shots."""
        counts = self.pool.labels.bincount(minlength=len(self.pool.classes)).tolist()
        return [name for name, count in zip(self.pool.classes, counts) if count < self.shots]

    def __call__(self, seed: int) -> Task:
        return Task(self.name, shots_of(self.pool, self.shots, seed), self.evals, self.templates, self.facts)


def make_tasks(name: str, source: Data, targets: Sequence[Data], templates: Sequence[str], shots: int) -> Tasks:
    """What ``--task`` asks for, of one data set to learn from and others to be scored on."""
    require("task", name, among(TASKS))
    require("shots", shots, COUNT)
    for template in templates:
        if not any(place in template for place in ("{}", "{1}", "{2}")):
            raise UserError(f"templates: expected {{}} for the class name in every template, got {template!r}")
    if not templates:
        raise UserError("templates: expected at least one")
    if (name in ("crossdata", "domain")) != bool(targets):
        wanted = "at least one" if not targets else "none"
        raise UserError(f"eval-data: expected {wanted} for the task {name}, got {len(targets)}")
    called = [source.name, *(target.name for target in targets)]
    check_classes(called, "eval-data", "folder")
    pool = source.pool
    if name == "base2novel":
        pool = halves(pool)[0]
        evals = dict(zip(("base", "novel"), halves(source.test)))
    elif name == "fewshot":
        evals = {"test": source.test}
    else:
        kept = partial(known_classes, source=source) if name == "domain" else (lambda target: target.test)
        for key in called:
            require("data" if key == source.name else "eval_data", key, UNTAKEN)
        evals = {source.name: source.test} | {target.name: kept(target) for target in targets}
    facts = {
        "task": name, "data": source.name, "shots": shots, "templates": list(templates), "classes": pool.classes,
        "eval_images": {key: len(split) for key, split in evals.items()},
    }  # fmt: skip
    return Tasks(name, pool, evals, list(templates), shots, facts)
