"""Train one arm with one seed on the few images of a task, and score it on every split."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyml.methods._engine import epoch_generator, few_threads, fit, seed_everything
from pyml.methods._measure import Cost, parameters
from pyml.methods._recipe import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, Recipe, Rule, among, require
from pyml.methods._sweep import Report
from pyml.methods.enla.archs import ARMS, Arm, Images, build
from pyml.methods.enla.clip import Clip
from pyml.methods.enla.task import Split, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIMIZERS = ("adamw", "sgd")
PLAN_GRADS = ("detach", "implicit")
Batch = tuple[Images, Tensor, Tensor, int]


@dataclass(frozen=True)
class Options(Recipe):
    """Our recipe: only eps and the iterations are PLOT's; those of EnLa (arXiv 2407.19674) are not known to us."""

    known_archs: ClassVar = ARMS
    spelled: ClassVar = {"archs": "arms"}
    rules: ClassVar = {
        "shots": COUNT, "optimizer": among(OPTIMIZERS), "weight_decay": NOT_NEGATIVE, "warmup_epochs": FROM_ZERO,
        "prompts": COUNT, "depth": FROM_ZERO, "hidden": FROM_ZERO, "ot_weight": NOT_NEGATIVE, "eps": POSITIVE,
        "iterations": COUNT, "plan_grad": among(PLAN_GRADS),
        "context_rate": Rule("a finite number > 0", lambda value: 0 < value < math.inf),
    }  # fmt: skip

    archs: tuple[str, ...] = ("enla",)
    seeds: int = 3
    first_seed: int = 1
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 2e-3
    context_rate: float = 2e-3  # of the arm coop
    shots: int = 16
    optimizer: str = "adamw"
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    prompts: int = 4
    depth: int = 0  # 0: every layer
    hidden: int = 0  # 0: a quarter of the joint space
    ot_weight: float = 1.0
    eps: float = 0.1
    iterations: int = 100
    plan_grad: str = "detach"

    def network(self) -> dict[str, Any]:
        """What `build` needs, kept in the checkpoints."""
        return {
            "n_prompts": self.prompts, "depth": self.depth or None, "hidden": self.hidden or None,
            "ot_weight": self.ot_weight, "eps": self.eps, "max_iter": self.iterations, "plan_grad": self.plan_grad,
        }  # fmt: skip


def check_arms(clip: Clip, task: Task, options: Options) -> None:
    """Raise one sentence for what cannot work with this CLIP and these texts, so that no arm is trained before it."""
    layers = clip.layers
    require("depth", options.depth, Rule(f"at most {layers}, the layers of the image tower", lambda n: n <= layers))
    if "coop" in options.archs:
        build("coop", clip, task)


def train_run(
    clip: Clip, task: Task, arm: str, seed: int, options: Options, *,
    folder: Path, accelerator: "Accelerator", report: Report | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One arm, one seed: ``folder`` gets checkpoint and logs; a checkpoint that is there is gone on from.

    Args:
        clip: moved to the device of the accelerator, and frozen.
        task: its training images are those of this seed.
        report: called after every epoch with its number and ``loss``, ``accuracy`` (of the training images, per cent).

    Returns:
        On the main process ``{"model": {"parameters": learned numbers}, "scores": ...}``: accuracy in per cent of each
        split and what sums them up, seconds and memory of the training, seconds of the scoring; elsewhere ``{}``.
    """
    clip.model.to(accelerator.device)
    seed_everything(seed)
    model = build(arm, clip, task, **options.network())
    cost = {"train_seconds": 0.0, "train_peak_mb": 0.0}
    side = clip.side
    with few_threads(options.batch_size * 3 * side**2):
        if parameters(model):
            batches = Batches(model, task.train, seed, options.batch_size, accelerator)
            optimizer = make_optimizer(model, arm, options)
            info = {
                "method": "enla", "arm": arm, "seed": seed, "network": options.network(), "clip": clip.source,
                "task": task.name, "templates": task.templates, "classes": task.train.classes,
            }  # fmt: skip
            fitted = fit(
                model, optimizer, schedule(optimizer, options), epochs=options.epochs, batches=batches,
                loss=batches.loss, folder=folder, info=info, accelerator=accelerator, report=report,
            )  # fmt: skip
            cost = {"train_seconds": fitted.seconds, "train_peak_mb": fitted.peak_mb}
        if not accelerator.is_main_process:
            return {}
        model.eval()
        with Cost(accelerator.device) as scoring:
            scores = {
                name: accuracy(model, name, split, options.batch_size, accelerator.device)
                for name, split in task.evals.items()
            }
    scores |= task.totals(scores)
    return {
        "model": {"parameters": parameters(model)},
        "scores": {**scores, **cost, "score_seconds": scoring.seconds},
    }


def make_optimizer(model: Arm, arm: str, options: Options) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9. Gates have no weight decay."""
    rate = options.context_rate if arm == "coop" else options.learning_rate
    plain = [p for name, p in model.named_parameters() if name.endswith("gates")]
    decayed = [p for name, p in model.named_parameters() if not name.endswith("gates")]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate)


def schedule(optimizer: torch.optim.Optimizer, options: Options) -> torch.optim.lr_scheduler.LRScheduler:
    """The factor on the learning rate, one an epoch: up in equal steps, then down to 0 by a cosine."""

    def factor(epoch: int) -> float:
        if epoch < options.warmup_epochs:
            return (epoch + 1) / (options.warmup_epochs + 1)
        done = (epoch - options.warmup_epochs) / max(options.epochs - options.warmup_epochs, 1)
        return (1 + math.cos(math.pi * done)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Batches:
    """The training images of one seed as batches of this process; where CLIP's tower is frozen, as its features.

    The order follows from the seed and the epoch, whatever the number of processes.
    """

    def __init__(self, model: Arm, split: Split, seed: int, size: int, accelerator: "Accelerator") -> None:
        self.split, self.seed, self.size, self.device = split, seed, size, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.features: tuple[Tensor, ...] | None = None
        if model.frozen_images:
            parts = [model.encode(images) for images in _in_order(split, size, self.device)]
            self.features = tuple(torch.cat(both) for both in zip(*parts))

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """(images or their features, labels ``[B]``, which of them count ``[B]``, images over all processes)."""
        order = torch.randperm(len(self.split), generator=epoch_generator(self.seed, epoch))
        for batch in order.split(self.size):
            mine = batch[self.rank :: self.world]
            counted = torch.full((len(mine) or 1,), float(len(mine) > 0), device=self.device)
            # a process without an image in a short last batch takes part in the step with one that does not count
            mine = mine if len(mine) else batch[:1]
            yield self._images(mine), self.split.labels[mine].to(self.device), counted, len(batch)

    def _images(self, chosen: Tensor) -> Images:
        if self.features is None:
            return self.split.batch(chosen).to(self.device)
        image, local = (t[chosen.to(self.device)] for t in self.features)
        return image, local

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the whole batch: processes average their gradients, hence the factor."""
        images, labels, counted, whole = batch
        each, logits = model(images, labels)
        total = (each * counted).sum()
        right = ((logits.argmax(1) == labels) * counted).sum()
        return total * self.world / whole, {"loss": total, "accuracy": 100 * right, "count": counted.sum()}


@torch.no_grad()
def accuracy(model: Arm, name: str, split: Split, size: int, device: torch.device) -> float:
    """Per cent of a split's images whose highest logit is that of their class."""
    right, seen = 0, 0
    for images in _in_order(split, size, device):
        found = model.logits(images, name).argmax(1).cpu()
        right += int((found == split.labels[seen : seen + len(found)]).sum())
        seen += len(found)
    return 100 * right / max(seen, 1)


def _in_order(split: Split, size: int, device: torch.device) -> Iterator[Tensor]:
    for chosen in torch.arange(len(split)).split(size):
        yield split.batch(chosen).to(device)
