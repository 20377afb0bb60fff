"""Which heads of a model matter for a task, once a seed, and all arms of a run on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import read_json, write_json
from pyml.methods._engine import make_accelerator
from pyml.methods._head_arms import BELOW, KEY, LORA, RANDOM, Arm, HeadOptions, Task, run_arm, threads_for
from pyml.methods._head_figures import save_heat_map, save_knockout
from pyml.methods._language import BATCH, Line, pad, score_answers
from pyml.methods._measure import Cost
from pyml.methods._options import check_folder
from pyml.methods._sweep import Report, Tables, sweep

if TYPE_CHECKING:
    from accelerate import Accelerator

Head = tuple[int, int]
Row = dict[str, Any]
Other = Callable[["Experiment", int, "Accelerator"], Row]  # an arm that trains nothing


@dataclass(frozen=True)
class Found:
    """What path patching and knockouts told of one model. The most negative score is that of the head without whose
    own output the behaviour falls most."""

    heads: list[list[float]]  # [L, H]
    mlps: list[float]  # [L]
    clean: float  # mean of what the scores are changes of
    seconds: float
    knockout: dict[str, list[float]]  # counts, and by what was knocked out: key, random, control-key, control-random

    def key_heads(self, count: int) -> list[Head]:
        from pyml.heads import top_k

        return top_k(torch.tensor(self.heads), count).heads

    def key_mlps(self, count: int) -> list[int]:
        return sorted(range(len(self.mlps)), key=self.mlps.__getitem__)[:count]

    @property
    def size(self) -> tuple[int, int]:
        """Layers and heads of a layer."""
        return len(self.heads), len(self.heads[0])

    def random_heads(self, count: int, seed: int, beside: Sequence[Head]) -> list[Head]:
        from pyml.heads import random_heads

        return random_heads(*self.size, count, seed=seed, exclude=beside)


def head_count(options: HeadOptions, size: tuple[int, int]) -> int:
    """How many heads are chosen: as many as the option says, else as stay below 5 %."""
    every = size[0] * size[1]
    if 2 * options.heads > every or options.mlps > size[0]:
        most = f"--heads up to {every // 2}, half of all, and --mlps up to {size[0]}"
        raise UserError(f"heads: expected {most}, got {options.heads} and {options.mlps}")
    return options.heads or max(math.ceil(BELOW * every) - 1, 1)


def score_heads(model: Any, task: Task, lines: Sequence[Line], difference: str) -> Any:
    """`pyml.heads.path_patch` on these lines, MLPs too.

    Raises:
        UserError: the layout of the model is not known, or a score is not finite.
    """
    from pyml.heads import adapter, path_patch

    try:
        adapter(model)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    others = [line.counterfactual or line.prompt for line in lines]
    scores = path_patch(
        model, pad([line.prompt for line in lines], model.device), pad(others, model.device), task.metric(lines),
        mlps=True, difference=difference, batch_size=BATCH,
    )  # fmt: skip
    assert scores.mlps is not None
    if not (scores.heads.isfinite().all() and scores.mlps.isfinite().all()):
        raise UserError("difference: expected plain, as a relative score is not finite where the clean metric is 0")
    return scores


def search(task: Task, options: HeadOptions, seed: int, device: torch.device) -> Found:
    """Score all heads on training lines, and knock heads out in the order of their scores and in a random one."""
    from pyml.heads import knockout

    model = task.language.model(device)
    lines, scored = task.train[: options.score_lines], task.test[: options.score_lines]
    with threads_for(task, BATCH, model.config.hidden_size):
        with Cost(device) as cost:
            scores = score_heads(model, task, lines, options.difference)
        found = Found(
            scores.heads.tolist(), scores.mlps.tolist(), scores.clean.double().mean().item(), cost.seconds, {}
        )
        layers, heads = found.size
        chosen = found.key_heads(head_count(options, found.size))
        most = min(layers * heads // 2, max(8, 4 * len(chosen)))
        counts = [0, *(2**power for power in range(most.bit_length()))]
        counts = [count for count in counts if count <= most]
        means = [pad([line.prompt for line in lines[i : i + BATCH]], device) for i in range(0, len(lines), BATCH)]
        measures: dict[str, Callable[[Any], float]] = {"": lambda model: task.success(model, scored)}
        if task.controls:
            measures["control-"] = lambda model: _controls(model, task, options.score_lines)
        for name, order in (
            (KEY, found.key_heads(most)), (RANDOM, found.random_heads(most, seed, chosen)),
        ):  # fmt: skip
            for prefix, evaluate in measures.items():
                curve = knockout(
                    model, means if options.ablation == "mean" else None, order, options.ablation, evaluate=evaluate,
                    counts=counts,
                )  # fmt: skip
                found.knockout[prefix + name] = [float(value) for value in curve.values]
        found.knockout["counts"] = [float(count) for count in counts]
    return found


def _controls(model: Any, task: Task, most: int) -> float:
    return sum(score_answers(model, lines[:most])["exact"] for lines in task.controls.values()) / len(task.controls)


class Experiment:
    """The arms of a method; what was found in the model of a seed is kept in ``out/heads/seed<k>.json``."""

    def __init__(
        self, method: str, tasks: Callable[[int], Task], kinds: dict[str, Arm], options: HeadOptions, out: Path,
        others: dict[str, Other] | None = None,
    ) -> None:  # fmt: skip
        self.method, self.tasks, self.kinds, self.options, self.out = method, tasks, kinds, options, out
        self.others = others or {}

    def found(self, seed: int, device: torch.device) -> Found:
        path = self.out / "heads" / f"seed{seed}.json"
        if not path.exists():
            write_json(path, asdict(search(self.tasks(seed), self.options, seed, device)))
        return Found(**read_json(path))

    def chosen(self, what: str | None, found: Found, seed: int) -> Row:
        """The heads and MLPs of an arm; LoRA is measured by those of the key arm."""
        from pyml.heads import random_heads

        count = head_count(self.options, found.size)
        heads, mlps = found.key_heads(count), found.key_mlps(self.options.mlps)
        if what == RANDOM:
            heads = found.random_heads(count, seed, heads)
            layers, key = len(found.mlps), [(layer, 0) for layer in mlps]
            beside = key if 2 * len(mlps) <= layers else []  # none of the key ones, where there are as many others
            mlps = [layer for layer, _ in random_heads(layers, 1, len(mlps), seed=seed, exclude=beside)]
        return {"heads": [list(head) for head in heads], "mlps": mlps} if what in (KEY, RANDOM, LORA) else {}

    def go(self, arm: str, seed: int, folder: Path, accelerator: "Accelerator", report: Report) -> Row:
        if arm in self.others:
            return self.others[arm](self, seed, accelerator)
        kind = self.kinds[arm]
        chosen = self.chosen(kind.what, self.found(seed, accelerator.device), seed)
        return run_arm(
            self.method, self.tasks(seed), arm, kind, chosen, seed, self.options, folder=folder,
            accelerator=accelerator, report=report,
        )  # fmt: skip

    def run(self, facts: Row, tables: Tables, *, resume: bool, device: str, quiet: bool) -> Row:
        """Every arm with every seed, see `pyml.methods._sweep`; then the heat map and the knockout curves.

        Returns:
            The content of ``metrics.json``; ``heads`` has what was found in the model of each seed.
        """
        check_folder(self.out)
        accelerator = make_accelerator(device)
        if accelerator.num_processes > 1:
            raise UserError(f"pyml train {self.method}: expected one process, got {accelerator.num_processes}")
        metrics = sweep(
            self.out, self.options, {"method": self.method, **facts}, tables, self.go,
            note=lambda values: f"loss {values['loss']:.3f}", resume=resume, device=device, quiet=quiet,
        )  # fmt: skip
        every = {seed: self.found(seed, accelerator.device) for seed in self.options.seed_range}
        metrics["heads"] = {
            str(seed): {
                "key": self.chosen(KEY, found, seed), "random": self.chosen(RANDOM, found, seed),
                "clean": found.clean, "seconds": found.seconds, "knockout": found.knockout,
            }
            for seed, found in every.items()
        }  # fmt: skip
        write_json(self.out / "metrics.json", metrics)
        count = head_count(self.options, next(iter(every.values())).size)
        save_heat_map(every, count, self.options.difference, self.out / "heads.png")
        title = tables.title(metrics["config"])
        save_knockout(list(every.values()), self.options.ablation, title, self.out / "knockout.png")
        return metrics
