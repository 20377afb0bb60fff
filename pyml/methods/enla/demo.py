"""Drawn data sets as the tasks of a run, for ``pyml train enla`` without ``--data``."""

from functools import partial
from typing import Any

import torch

from pyml.methods._recipe import Rule, among, require
from pyml.methods.enla.clip import Clip
from pyml.methods.enla.data import Data, Loader, Pictures, Tasks, make_tasks
from pyml.methods.enla.shapes import DATASETS, drawn
from pyml.methods.enla.task import TASKS, Split

POOL, TEST = 32, 40  # images of every class to draw shots from, and to be scored on
SHIFT = {"shapes": 0.5, "pairs": 0.65}  # with these the tiny CLIP tells 60 to 70 % of the classes
SHIFTS = (0.3, 0.6, 0.9)  # of the targets of the task domain
SHARE = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)


def check_drawn(dataset: str, task: str, shots: int, shift: float | None) -> None:
    """Raise one sentence for a value that cannot work, before a CLIP is trained for it."""
    require("drawn", dataset, among(DATASETS))
    require("task", task, among(TASKS))
    if shift is not None:
        require("drawn_shift", shift, SHARE)
    require("shots", shots, Rule(f"from 1 to {POOL} for drawn images", lambda value: 1 <= value <= POOL))


def drawn_tasks(dataset: str, task: str, shots: int, clip: Clip, *, shift: float | None = None, seed: int = 0) -> Tasks:
    """The tasks of ``shapes`` or ``pairs``.

    base2novel and fewshot stay in one shifted domain. crossdata learns from one data set and is scored on the other
    too; domain learns without shift and is scored with several.
    """
    check_drawn(dataset, task, shots, shift)
    shift = SHIFT[dataset] if shift is None else shift
    make = partial(_data, clip=clip, seed=seed)
    targets: list[Data] = []
    if task == "domain":
        source = make(dataset, 0.0, "plain")
        targets = [make(dataset, each, f"shift{100 * each:.0f}") for each in SHIFTS]
    else:
        source = make(dataset, shift, dataset)
        if task == "crossdata":
            targets = [make(other, shift, other) for other in DATASETS if other != dataset]
    tasks = make_tasks(task, source, targets, DATASETS[dataset], shots)
    tasks.facts.update(drawn=dataset, drawn_shift=None if task == "domain" else shift, drawn_seed=seed)
    return tasks


def _data(dataset: str, shift: float, name: str, *, clip: Clip, seed: int) -> Data:
    pool, test = (
        _split(drawn(dataset, count, shift, 1000 * seed + part), clip) for part, count in ((1, POOL), (2, TEST))
    )
    return Data(name, pool, test)


def _split(made: Any, clip: Clip) -> Split:
    from PIL import Image

    pixels = made.images.permute(0, 2, 3, 1).contiguous().numpy()
    load = Loader(lambda index: Image.fromarray(pixels[index]), clip.preprocess)
    return Split(Pictures(list(range(len(pixels))), load), made.labels.to(torch.int64), made.classes)
