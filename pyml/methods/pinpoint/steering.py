"""The arms that train nothing: heads steered by the maps of Sparse Activation Control, and a vector for a layer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pyml.methods._head_arms import Task, threads_for
from pyml.methods._head_search import Experiment, Row, score_heads
from pyml.methods._language import BATCH, Line, pad, score_answers
from pyml.methods._measure import Cost

if TYPE_CHECKING:
    from accelerate import Accelerator

HEAD_COUNTS, HEAD_STRENGTHS = (4, 8, 16, 32), (0.25, 0.5, 0.75, 1.0)
LAYER_STRENGTHS = (0.5, 1.0, 2.0, 4.0)
Steered = Callable[[Any, Sequence[Task], float, float], Any]  # model, behaviours, place, strength: a context


def steer_heads(experiment: Experiment, seed: int, accelerator: "Accelerator") -> Row:
    """`pyml.heads.HeadSteering`: all behaviours of the task are controls that are on at once."""
    task, model = experiment.tasks(seed), experiment.tasks(seed).language.model(accelerator.device)
    options = experiment.options
    ranked = []
    for each in _behaviours(task):
        scores = score_heads(model, each, each.train[: options.score_lines], options.difference)
        ranked.append(sorted(_pairs(scores.heads.tolist()), key=lambda pair: pair[0]))
    counts = [count for count in HEAD_COUNTS if count <= len(ranked[0])]

    @contextmanager
    def steered(model: Any, tasks: Sequence[Task], count: float, strength: float) -> Iterator[None]:
        from pyml.heads import HeadSteering

        steering = HeadSteering(model)
        try:
            for number, (each, order) in enumerate(zip(tasks, ranked)):
                heads = [head for _, head in order[: int(count)]]
                steering.add(f"behaviour {number}", heads, *_sides(each, options.score_lines, model), strength=strength)
            with steering:
                yield
        finally:
            steering.close()

    return _best(model, task, steered, counts, HEAD_STRENGTHS, options, accelerator)


def steer_layer(experiment: Experiment, seed: int, accelerator: "Accelerator") -> Row:
    """`pyml.heads.LayerSteering`, the rival: the difference of the means is added to the residual stream of a layer,
    one vector for each behaviour."""
    task, model = experiment.tasks(seed), experiment.tasks(seed).language.model(accelerator.device)
    options = experiment.options

    @contextmanager
    def steered(model: Any, tasks: Sequence[Task], layer: float, strength: float) -> Iterator[None]:
        from pyml.heads import LayerSteering

        with ExitStack() as stack:
            made = [
                LayerSteering(model, int(layer), *_sides(each, options.score_lines, model), strength=strength)
                for each in tasks
            ]
            for vector in made:
                stack.callback(vector.close)
                stack.enter_context(vector)
            yield

    layers = range(model.config.num_hidden_layers)
    return _best(model, task, steered, layers, LAYER_STRENGTHS, options, accelerator)


def _behaviours(task: Task) -> list[Task]:
    return [task] if task.second is None else [task, task.second]


def _pairs(scores: list[list[float]]) -> list[tuple[float, tuple[int, int]]]:
    return [(score, (layer, head)) for layer, row in enumerate(scores) for head, score in enumerate(row)]


def _sides(task: Task, most: int, model: Any) -> tuple[list[Any], list[Any]]:
    """Batches of the prompts that are as they should be, and of those that show the behaviour."""

    def batches(prompts: list[list[int]]) -> list[Any]:
        return [pad(prompts[start : start + BATCH], model.device) for start in range(0, len(prompts), BATCH)]

    lines = task.train[:most]
    return batches([line.counterfactual or line.prompt for line in lines]), batches([line.prompt for line in lines])


def _best(
    model: Any, task: Task, steered: Steered, places: Sequence[int], strengths: Sequence[float], options: Any,
    accelerator: "Accelerator",
) -> Row:  # fmt: skip
    """The point of the grid with the best mean of right answers to training lines of all behaviours and to controls;
    its scores on what it was not chosen by, the controls aside."""
    tasks = _behaviours(task)
    learned: list[Sequence[Line]] = [each.train[: options.score_lines] for each in tasks]
    checked = [lines[: options.score_lines] for lines in task.controls.values()]

    def worth(point: tuple[int, float]) -> float:
        with steered(model, tasks, *point):
            right = [score_answers(model, lines)["exact"] for lines in learned]
            kept = [score_answers(model, lines)["exact"] for lines in checked]
        return sum(right) / len(right) + (sum(kept) / len(kept) if kept else 0.0)

    with threads_for(task, BATCH, model.config.hidden_size):
        with Cost(accelerator.device) as cost:
            best = max(itertools.product(places, strengths), key=worth)
        with steered(model, tasks, *best), Cost(accelerator.device) as scoring:
            scores = task.measure(model)
    return {
        "model": {"parameters": 0, "share": 0.0, "state_kb": 0.0},
        "scores": {
            **scores, "place": float(best[0]), "strength": best[1], "steps": 0.0, "train_seconds": cost.seconds,
            "train_peak_mb": cost.peak_mb, "score_seconds": scoring.seconds,
        },
    }  # fmt: skip
