"""The arms that train nothing: heads steered by a map of their outputs, and a vector for a layer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyml.methods._head_arms import Task, threads_for
from pyml.methods._head_search import Experiment, Row, score_heads
from pyml.methods._language import BATCH, Line, Told, pad, score_answers
from pyml.methods._measure import Cost

if TYPE_CHECKING:
    from accelerate import Accelerator

# All of these arms have a grid of 48 points where there are four layers.
HEAD_COUNTS, HEAD_STRENGTHS = (4, 8, 16, 32), (0.25, 0.5, 0.75, 1.0)
LAYER_STRENGTHS = (0.5, 1.0, 2.0, 4.0)
ACTS = ("all", "last", "once")
Point = tuple[int, float, str]  # how many heads or which layer, strength, where it acts
Steered = Callable[[Any, Sequence[Task], Point], AbstractContextManager[Told]]


def steer_heads(experiment: Experiment, seed: int, accelerator: "Accelerator", map: str = "direction") -> Row:
    """`pyml.heads.HeadSteering`: all behaviours of the task are controls that are on at once. With the map "direction"
    each leaves the prompts of the other behaviours and half of the control prompts alone."""
    task, model = experiment.tasks(seed), experiment.tasks(seed).language.model(accelerator.device)
    options = experiment.options
    ranked = []
    for each in _behaviours(task):
        scores = score_heads(model, each, each.train[: options.score_lines], options.difference)
        ranked.append(sorted(_pairs(scores.heads.tolist()), key=lambda pair: pair[0]))
    counts = [count for count in HEAD_COUNTS if count <= len(ranked[0])] or [len(ranked[0])]

    @contextmanager
    def steered(model: Any, tasks: Sequence[Task], point: Point) -> Iterator[Told]:
        from pyml.heads import HeadSteering

        count, strength, act = point
        steering = HeadSteering(model)
        sides = [_sides(each, options.score_lines, model) for each in tasks]
        for number, (side, order) in enumerate(zip(sides, ranked)):
            others = [batch for other in sides if other is not side for part in other for batch in part]
            kept = [*others, *_batches([line.prompt for line in _seen(task, options.score_lines)], model)]
            steering.add(
                f"behaviour {number}", [head for _, head in order[:count]], *side, strength=strength, act=act, map=map,
                kept=kept if kept and map == "direction" else None,
            )  # fmt: skip
        with steering:
            yield steering.prompt_ends

    return _best(model, task, steered, counts, HEAD_STRENGTHS, options, accelerator)


def steer_gaussian(experiment: Experiment, seed: int, accelerator: "Accelerator") -> Row:
    """The same with the map of Sparse Activation Control, as far as it is known."""
    return steer_heads(experiment, seed, accelerator, "gaussian")


def steer_layer(experiment: Experiment, seed: int, accelerator: "Accelerator") -> Row:
    """`pyml.heads.LayerSteering`, the rival: the difference of the means is added to the residual stream of a layer,
    one vector for each behaviour."""
    task, model = experiment.tasks(seed), experiment.tasks(seed).language.model(accelerator.device)
    options = experiment.options

    @contextmanager
    def steered(model: Any, tasks: Sequence[Task], point: Point) -> Iterator[Told]:
        from pyml.heads import LayerSteering

        layer, strength, act = point
        made = [
            LayerSteering(model, layer, *_sides(each, options.score_lines, model), strength=strength, act=act)
            for each in tasks
        ]

        @contextmanager
        def told(ends: Tensor) -> Iterator[None]:
            with ExitStack() as stack:
                for vector in made:
                    stack.enter_context(vector.prompt_ends(ends))
                yield

        with ExitStack() as stack:
            for vector in made:
                stack.enter_context(vector)
            yield told

    layers = range(model.config.num_hidden_layers)
    return _best(model, task, steered, layers, LAYER_STRENGTHS, options, accelerator)


def _behaviours(task: Task) -> list[Task]:
    return [task] if task.second is None else [task, task.second]


def _pairs(scores: list[list[float]]) -> list[tuple[float, tuple[int, int]]]:
    return [(score, (layer, head)) for layer, row in enumerate(scores) for head, score in enumerate(row)]


def _batches(prompts: list[list[int]], model: Any) -> list[Any]:
    return [pad(prompts[start : start + BATCH], model.device) for start in range(0, len(prompts), BATCH)]


def _sides(task: Task, most: int, model: Any) -> tuple[list[Any], list[Any]]:
    """Batches of the prompts that are as they should be, and of those that show the behaviour."""
    lines = task.train[:most]
    return (
        _batches([line.counterfactual or line.prompt for line in lines], model),
        _batches([line.prompt for line in lines], model),
    )


def _seen(task: Task, most: int) -> list[Line]:
    """Every second control line is for fits and for the choice of a point; the others are for the scores."""
    return [line for lines in task.controls.values() for line in lines[:most:2]]


def _best(
    model: Any, task: Task, steered: Steered, places: Sequence[int], strengths: Sequence[float], options: Any,
    accelerator: "Accelerator",
) -> Row:  # fmt: skip
    """The point of the grid with the best mean of right answers to training lines of all behaviours and to half of the
    controls; its scores on what it was not chosen by."""
    tasks = _behaviours(task)
    learned: list[Sequence[Line]] = [each.train[: options.score_lines] for each in tasks]
    checked = [lines[: options.score_lines : 2] for lines in task.controls.values()]
    unseen = {name: lines[1::2] or lines for name, lines in task.controls.items()}

    def worth(point: Point) -> float:
        with steered(model, tasks, point) as told:
            right = [score_answers(model, lines, told)["exact"] for lines in learned]
            kept = [score_answers(model, lines, told)["exact"] for lines in checked]
        return sum(right) / len(right) + (sum(kept) / len(kept) if kept else 0.0)

    with threads_for(task, BATCH, model.config.hidden_size):
        with Cost(accelerator.device) as cost:
            best = max(itertools.product(places, strengths, ACTS), key=worth)
        with steered(model, tasks, best) as told, Cost(accelerator.device) as scoring:
            scores = replace(task, controls=unseen).measure(model, told)
    return {
        "model": {"parameters": 0, "share": 0.0, "state_kb": 0.0},
        "scores": {
            **scores, "place": float(best[0]), "strength": best[1], "act": float(ACTS.index(best[2])), "steps": 0.0,
            "train_seconds": cost.seconds, "train_peak_mb": cost.peak_mb, "score_seconds": scoring.seconds,
        },
    }  # fmt: skip
