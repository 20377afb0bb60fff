"""Arms on a causal LM: its key heads, random heads, LoRA or all of it, learning the same lines under one budget."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import epoch_generator, few_threads, fit, seed_everything
from pyml.methods._language import (
    Language,
    Line,
    Told,
    answer_losses,
    behaviour_rate,
    collate,
    is_learned,
    score_answers,
    token_losses,
)
from pyml.methods._measure import Cost
from pyml.methods._recipe import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, SHARE, Recipe, Rule, among
from pyml.methods._sweep import Report

if TYPE_CHECKING:
    from accelerate import Accelerator

KEY, RANDOM, LORA, FULL = "key", "random", "lora", "full"
PROJECTIONS = ("q", "k", "v", "o")
BELOW = 0.05  # the default number of heads stays below this share of them all
TUNED = "heads.safetensors"
SOME_OF = Rule("some of q, k, v, o, each once", lambda v: 0 < len(v) == len(set(v)) and set(v) <= set(PROJECTIONS))


class Arm(NamedTuple):
    """What is trained (None: nothing), and whether it ends as soon as the training loss is small."""

    what: str | None
    early: bool = False


def arms(key: str) -> dict[str, Arm]:
    """The arms by their names; ``key`` is how the method calls the tuning of its key heads."""
    found = {"base": Arm(None)}
    for name, what in ((key, KEY), (RANDOM, RANDOM), (LORA, LORA), (FULL, FULL)):
        found |= {name: Arm(what), f"{name}-early": Arm(what, early=True)}
    return found


@dataclass(frozen=True)
class HeadOptions(Recipe):
    """What methods on heads have in common; `demo` and `files` of a method have its own numbers."""

    spelled: ClassVar = {"archs": "arms"}
    rules: ClassVar[Mapping[str, Rule]] = {
        "heads": FROM_ZERO, "mlps": FROM_ZERO, "projections": SOME_OF, "full_rate": POSITIVE, "stop_loss": POSITIVE,
        "weight_decay": NOT_NEGATIVE, "train_share": SHARE, "score_lines": COUNT,
        "difference": among(("relative", "plain")), "ablation": among(("zero", "mean")),
    }  # fmt: skip

    seeds: int = 3
    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 3e-3  # of heads and LoRA
    full_rate: float = 3e-4
    weight_decay: float = 0.0
    stop_loss: float = 0.02  # of the early arms
    heads: int = 0  # 0: as many as stay below 5 %
    mlps: int = 0
    projections: tuple[str, ...] = ("q", "o")
    scale_gradients: bool = False
    keep_prefix: bool = False
    train_share: float = 0.6
    score_lines: int = 256
    difference: str = "relative"
    ablation: str = "zero"


@dataclass(frozen=True)
class Task:
    """What one seed works on."""

    language: Language
    train: list[Line]  # with counterfactual prompts
    test: list[Line]
    controls: dict[str, list[Line]] = field(default_factory=dict)  # must not change
    transfer: list[Line] = field(default_factory=list)  # of another data set that nothing is learned from
    others: dict[str, list[Line]] = field(default_factory=dict)  # what else is told
    positive: list[int] = field(default_factory=list)  # record tokens; none: the first token of each answer
    negative: list[int] = field(default_factory=list)
    second: "Task | None" = None  # another behaviour of the same model, measured and steered too

    def metric(self, lines: Sequence[Line]) -> Any:
        """What path patching asks of these lines, see `pyml.heads.path_patch`."""
        if self.positive:
            return self.positive, self.negative
        return torch.tensor([line.target[0] for line in lines]), None

    def success(self, model: Any, lines: Sequence[Line], told: Told = nullcontext) -> float:
        """What knocking heads out should lower, in per cent."""
        if self.positive:
            return behaviour_rate(model, lines, self.positive, self.negative)
        return score_answers(model, lines, told)["exact"]

    def measure(self, model: Any, told: Told = nullcontext) -> dict[str, float]:
        """Per cent each, but for ``loss``."""

        def exact(lines: Sequence[Line]) -> float:
            return score_answers(model, lines, told)["exact"]

        scores = score_answers(model, self.test, told)
        found = {"answers": scores["exact"], "loss": scores["loss"]}
        if self.positive:
            found["behaviour"] = self.success(model, self.test, told)
        if self.transfer:
            found["transfer"] = exact(self.transfer)
            if self.positive:
                found["transfer_behaviour"] = self.success(model, self.transfer, told)
        found |= {f"control_{name}": exact(lines) for name, lines in self.controls.items()}
        if self.controls:
            found["control"] = sum(found[f"control_{name}"] for name in self.controls) / len(self.controls)
        found |= {f"other_{name}": exact(lines) for name, lines in self.others.items()}
        if self.second is not None:
            found["second_answers"] = exact(self.second.test)
            found["second_behaviour"] = self.second.success(model, self.second.test, told)
        return found


class Trained(nn.Module):
    """A causal LM whose state is what is trained of it: that alone goes into checkpoints.

    Args:
        what: `KEY` and `RANDOM` train slices of ``chosen``, `LORA` has about as many numbers, `FULL` is everything.
        chosen: ``{"heads": [(layer, head)], "mlps": [layer]}``.
    """

    def __init__(self, model: Any, what: str | None, chosen: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        from pyml.heads import HeadTuner

        self.tuner: Any = None
        model.requires_grad_(what == FULL)
        if what in (KEY, RANDOM, LORA):
            self.tuner = HeadTuner(
                model, [tuple(head) for head in chosen["heads"]], tuple(options["projections"]),
                mlps=tuple(chosen["mlps"]), grad_scale="heads" if options["scale_gradients"] else None, verbose=False,
            )  # fmt: skip
        if what == LORA:
            budget = self.tuner.report().trained
            model, self.tuner = with_lora(self.tuner.detach(), budget), None
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def learned(self) -> dict[str, nn.Parameter]:
        if self.tuner is not None:
            return dict(self.tuner.named_parameters())
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: p.detach() for name, p in self.learned().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        learned = self.learned()
        if learned.keys() != state_dict.keys() or any(p.shape != state_dict[n].shape for n, p in learned.items()):
            raise UserError("checkpoint: expected the tensors that this arm trains, got others")
        for name, parameter in learned.items():
            parameter.copy_(state_dict[name])

    def optimizer(self, rate: float, options: HeadOptions) -> torch.optim.Optimizer:
        """The same AdamW for every arm, with float32 copies where the weights are narrower: no arm loses small updates
        that another one keeps."""
        from pyml.heads import SliceAdamW

        return SliceAdamW(self.learned().values(), rate, weight_decay=options.weight_decay)


def has_peft() -> bool:
    from importlib.util import find_spec

    return find_spec("peft") is not None


def with_lora(model: Any, budget: int) -> Any:
    """LoRA in every layer's attention, of the rank that comes nearest to so many numbers."""
    from pyml.heads import adapter

    if not has_peft():
        raise UserError("arms: lora needs the package peft: pip install peft, or name other arms")
    from peft import LoraConfig, get_peft_model

    layers = adapter(model)
    inside = {id(m) for layer in range(layers.num_layers) for m in layers.attention(layer).modules()}
    matrices = {
        name: module for name, module in model.named_modules()
        if id(module) in inside and getattr(module, "weight", torch.empty(0)).dim() == 2
    }  # fmt: skip
    rank = max(round(budget / sum(sum(module.weight.shape) for module in matrices.values())), 1)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(matrices)))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of what an optimizer keeps for each number."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.dim())


class Batches:
    """The training lines in an order that follows from the seed and the epoch."""

    def __init__(self, lines: Sequence[Line], seed: int, size: int, device: torch.device) -> None:
        self.lines, self.seed, self.size, self.device = lines, seed, size, device

    def __len__(self) -> int:
        return math.ceil(len(self.lines) / self.size)

    def __call__(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.lines), generator=epoch_generator(self.seed, epoch))
        return (
            {**collate([self.lines[i] for i in part.tolist()], self.device), "numbers": part}
            for part in order.split(self.size)
        )

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the answers' tokens."""
        return _mean_and_sums(*answer_losses(model, batch)[:2])


class KeptPrefix:
    """The same loss of tuned heads, where the layers below the lowest trained one run once a line, and logits are made
    at answers alone."""

    def __init__(self, tuner: Any) -> None:
        from pyml.heads.files import Prefixes

        self.tuner, self.prefixes = tuner, Prefixes(tuner)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        prefix = self.prefixes(batch["numbers"].tolist(), inputs)
        wanted = torch.nn.functional.pad(is_learned(batch), (0, 1))
        logits = self.tuner.adapter.logits_at(inputs, wanted, prefix, self.tuner.lowest_layer)
        return _mean_and_sums(*token_losses(logits, batch)[:2])


def _mean_and_sums(losses: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    count = losses.new_tensor(float(len(losses)))
    return losses.mean(), {"loss": losses.sum(), "right": 100 * right.sum(), "count": count}


def threads_for(task: Task, size: int, width: int) -> Any:
    """One CPU thread for a batch of a tiny model."""
    longest = max(len(line.prompt) + len(line.target) for line in task.train)
    return few_threads(size * longest * width)


def run_arm(
    method: str, task: Task, arm: str, kind: Arm, chosen: dict[str, Any], seed: int, options: HeadOptions, *,
    folder: Path, accelerator: "Accelerator", report: Report | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One arm, one seed: ``folder`` gets checkpoint and logs, and ``heads.safetensors`` where heads were tuned; a
    checkpoint that is there is gone on from.

    Returns:
        ``{"model": {"parameters", "share" (per cent), "state_kb"}, "scores": ...}``: those of `Task.measure`, steps,
        seconds and memory of the training, seconds of the scoring.
    """
    seed_everything(seed)
    model = task.language.model(accelerator.device)
    total = sum(p.numel() for p in model.parameters())
    how = {"projections": list(options.projections), "scale_gradients": options.scale_gradients}
    trained = Trained(model, kind.what, chosen, how)
    cost, state = {"steps": 0.0, "train_seconds": 0.0, "train_peak_mb": 0.0}, 0
    with threads_for(task, options.batch_size, model.config.hidden_size):
        if kind.what is not None:
            rate = options.full_rate if kind.what == FULL else options.learning_rate
            optimizer = trained.optimizer(rate, options)
            batches = Batches(task.train, seed, options.batch_size, accelerator.device)
            info = {
                "method": method, "arm": arm, "what": kind.what, "seed": seed, "source": task.language.source,
                "chosen": chosen, "options": how,
            }  # fmt: skip
            keeps = options.keep_prefix and trained.tuner is not None
            fitted = fit(
                trained, optimizer, None, epochs=options.epochs, batches=batches,
                loss=KeptPrefix(trained.tuner) if keeps else batches.loss, folder=folder,
                info=info, accelerator=accelerator, report=report,
                stop=(lambda values: values["loss"] < options.stop_loss) if kind.early else None,
            )  # fmt: skip
            steps = float(fitted.epochs * len(batches))
            cost = {"steps": steps, "train_seconds": fitted.seconds, "train_peak_mb": fitted.peak_mb}
            state = state_bytes(optimizer)
            if trained.tuner is not None:
                trained.tuner.save(folder / TUNED)
        trained.eval()
        with Cost(accelerator.device) as scoring:
            scores = task.measure(trained.model)
    count = sum(p.numel() for p in trained.learned().values())
    return {
        "model": {"parameters": count, "share": 100 * count / total, "state_kb": state / 1e3},
        "scores": {**scores, **cost, "score_seconds": scoring.seconds},
    }


def load_arm(checkpoint: Path, language: Callable[[dict[str, Any]], Language], method: str, device: str) -> Any:
    """The model of a checkpoint of `run_arm` and its language, which ``language`` finds by its source."""
    state = load_checkpoint(checkpoint)
    if state.info.get("method") != method:
        got = state.info.get("method")
        raise UserError(f"checkpoint: {checkpoint} belongs to the method {got!r}, expected {method!r}")
    found = language(state.info["source"])
    if found.source["fingerprint"] != state.info["source"]["fingerprint"]:
        raise UserError(f"model: {checkpoint} was learned on another model than that of {found.folder}")
    trained = Trained(found.model(device), state.info["what"], state.info["chosen"], state.info["options"])
    trained.load_state_dict(state.part("model"))
    return trained.model.eval(), found
