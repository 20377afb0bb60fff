"""One arm at one epsilon with one seed: its optimizer, its batches, its epsilon, and what it scores."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyml.methods._engine import Diverged, Fitted, epoch_generator, few_threads, fit, seed_everything
from pyml.methods._measure import parameters
from pyml.methods._sweep import Report
from pyml.methods.dp_sgd.arms import ARMS, Arm, Scales, clipping, parse_row, require_finite
from pyml.methods.dp_sgd.budget import Phase, all_trainings, guide_epochs, make_plan
from pyml.methods.dp_sgd.data import Records, Task
from pyml.methods.dp_sgd.federated import Clients, rounds
from pyml.methods.dp_sgd.guides import Guide, unit_of
from pyml.methods.dp_sgd.model import RELEASED, accuracy, build, known_hooks, losses_and_hits, save_model
from pyml.optim import HeteroNoiseOptimizer, PoissonBatches, make_private
from pyml.privacy import Epsilon, History, Provenance, audit_membership
from pyml.privacy import _arguments as arguments

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pyml.methods.dp_sgd.train import Options

MAIN, GUIDE = 0, 1  # each has a noise of its own
TOGETHER = 0.95  # confidence that no audit of a whole run is above the truth


@dataclass(frozen=True)
class Point:
    """Of the tuning grid."""

    learning_rate: float
    clip: float | None


class Training:
    """A network on its way: what `fit` needs, and the privacy of what comes out."""

    def __init__(
        self, task: Task, options: "Options", arm: Arm, phase: Phase | None, epochs: int, point: Point, seed: int,
        role: int, guide: Guide | None, accelerator: "Accelerator",
    ) -> None:  # fmt: skip
        self.task, self.options, self.epochs, self.accelerator = task, options, epochs, accelerator
        seed_everything(seed)
        self.net = build(task.side, task.classes).to(accelerator.device)
        self.model: nn.Module = self.net
        self.private: HeteroNoiseOptimizer | None = None
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.net.parameters(), lr=point.learning_rate, momentum=options.momentum or 0.0
        )
        self.scales = Scales(arm, self._twin, task.public.to(accelerator.device), guide, seed)
        clients = self._clients()
        self.loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]] = (
            self._loss if clients is None else clients.loss
        )
        if phase is None:
            self._draw = self._shuffled(seed) if clients is None else rounds(len(clients), options.client_share, seed)
            return
        assert point.clip is not None
        multiplier, rate, _ = phase
        self.how = clipping(arm, self.scales, self.net, point.clip)
        how: dict[str, Any] = {
            "noise_multiplier": multiplier, "seed": None if options.private else 2 * seed + role,
            # nothing here is random but noise and batches, and `config.json` pins the rest; a GPU adds up in any order
            "resume": "repeat" if accelerator.device.type == "cpu" else "fresh",
            **self.how,
        }  # fmt: skip
        if clients is None:
            size = min(options.batch_size, len(task.private))
            loader = DataLoader(TensorDataset(task.private.images, task.private.labels), batch_size=size)
            self.model, self.private, drawn = make_private(self.net, self.optimizer, loader, **how)
            batches: Iterable[Any] = drawn
        else:
            self.private = HeteroNoiseOptimizer(
                self.optimizer, sample_rate=rate, expected_batch_size=rate * len(clients), **how
            )
            batches = PoissonBatches(len(clients), rate, key=self.private.batch_key, start=self.private.discard)
        self.optimizer = self.private
        self._draw = lambda epoch: batches

    @property
    def gain(self) -> float | None:
        """As `Scales.gain`, at the last weights."""
        return None if self.private is None else self.scales.gain(self.net, self.how)

    def fit(self, folder: Path, info: dict[str, Any], report: Report | None = None) -> Fitted:
        """Train to the end, or go on from the checkpoint in ``folder``."""
        valid = self.task.valid.to(self.accelerator.device)

        with known_hooks(), few_threads(self.options.batch_size * self.task.side**2):
            fitted = fit(
                self.model, self.optimizer, None, epochs=self.epochs, batches=self._batches, loss=self.loss,
                folder=folder, info={"side": self.task.side, "classes": self.task.classes, **info},
                accelerator=self.accelerator, report=report,
                validate=lambda epoch: {"validation": accuracy(self.net, valid.images, valid.labels)},
            )  # fmt: skip
        self.model.eval()
        return fitted

    def _batches(self, epoch: int) -> Iterable[Any]:
        if self.private is not None and self.scales.changes:  # from the weights that the last epoch released
            self.private.set_scale(self.scales.scale(self.net))
        return self._draw(epoch)

    def _twin(self) -> nn.Module:
        """A second network for gradients of public records."""
        gradients = arguments.package("pyml train dp_sgd", "opacus.grad_sample")
        return gradients.GradSampleModule(build(self.task.side, self.task.classes).to(self.accelerator.device))

    def _clients(self) -> Clients | None:
        options = self.options
        if not options.federated:
            return None
        return Clients(
            self.task.private.to(self.accelerator.device), options.federated, options.split_seed,
            rate=options.learning_rate, size=options.client_batch, passes=options.client_passes,
        )  # fmt: skip

    def _shuffled(self, seed: int) -> Callable[[int], Iterable[Any]]:
        records = self.task.private

        def of(epoch: int) -> Iterable[Any]:
            order = torch.randperm(len(records), generator=epoch_generator(seed, epoch))
            return ((records.images[part], records.labels[part]) for part in order.split(self.options.batch_size))

        return of

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch, which may be empty."""
        images, labels = (t.to(self.accelerator.device) for t in batch)
        total = nn.functional.cross_entropy(model(images), labels, reduction="sum")
        return total / max(len(labels), 1), {"loss": total, "count": total.new_tensor(float(len(labels)))}


class Run:
    """One arm, one epsilon, one seed."""

    def __init__(
        self, task: Task, options: "Options", row: str, point: Point, seed: int, guide: Guide | None,
        accelerator: "Accelerator",
    ) -> None:  # fmt: skip
        self.task, self.options, self.row, self.point, self.seed = task, options, row, point, seed
        self.accelerator = accelerator
        self.name, self.target = parse_row(row)
        self.arm = ARMS[self.name]
        self.file_guide = guide if self.arm.guide == "parameters" else None
        paid = None if self.file_guide is None else self.file_guide.provenance
        self.plan = make_plan(self.arm, self.target, len(task.private), options, paid)

    def validated(self, folder: Path, report: Report) -> float:
        """Train for the tuning; the validation accuracy."""
        training, _ = self._train(folder, report)
        return self._accuracy(training, self.task.valid)

    def go(self, folder: Path, report: Report) -> dict[str, Any]:
        """Train, score, release. A training that diverges scores 0 and releases nothing, and the other seeds go on."""
        start = time.perf_counter()
        try:
            training, fitted = self._train(folder, report)
            losses = self._losses(training)
            gain = training.gain
        except Diverged:
            noise = "fast" if self.options.private else "seeded"
            model = self._facts(None if self.plan is None else self.plan.history(noise))
            none: dict[str, Any] = dict.fromkeys(("auc", "epsilon_lower", "gain", "train_peak_mb"))
            seconds = time.perf_counter() - start
            scores = {"accuracy": 0.0, "validation": 0.0, "diverged": 1.0, **none, "train_seconds": seconds}
            return {"model": model, "scores": scores}
        model = self._facts(None if training.private is None else training.private.history)
        save_model(folder / RELEASED, training.net, {
            "side": self.task.side, "classes": self.task.classes, "arm": self.name, "delta": self.options.delta,
            # its lr and clip were chosen by trainings on the same records
            "epsilon": model["epsilon_with_tuning"], "noise": model["noise"], "unit": model["unit"],
        })  # fmt: skip
        every = len(self.options.archs) * self.options.seeds
        audit = audit_membership(
            *losses, delta=self.options.delta, confidence=1 - (1 - TOGETHER) / every,
            generator=epoch_generator(self.seed, 0),
        )  # fmt: skip
        scores = {
            "accuracy": self._accuracy(training, self.task.test),
            "validation": self._accuracy(training, self.task.valid), "diverged": 0.0, "auc": audit.auc,
            "epsilon_lower": audit.epsilon_lower, "gain": gain, "train_seconds": fitted.seconds,
            "train_peak_mb": fitted.peak_mb,
        }  # fmt: skip
        return {"model": model, "scores": scores}

    def _train(self, folder: Path, report: Report) -> tuple[Training, Fitted]:
        options, plan = self.options, self.plan
        info = {"method": "dp_sgd", "arm": self.name, "target": self.target, "seed": self.seed}
        guide, before = self.file_guide, Fitted(0, 0.0, 0.0)
        spent: History | None = None
        if plan is not None and plan.guide is not None:
            first = Training(
                self.task, options, ARMS["isotropic"], plan.guide, guide_epochs(options), self.point, self.seed, GUIDE,
                None, self.accelerator,
            )  # fmt: skip
            before = first.fit(folder / "guide", {**info, "arm": "isotropic"})
            assert first.private is not None
            spent = first.private.history
            # an earlier output of the same run, whose phases the history has: nothing is paid beside them
            weights = [p.detach().clone() for p in first.net.parameters()]
            require_finite(weights, "weights of the guide")
            guide = Guide(weights, Provenance("released_iterate"), "trained first")
        training = Training(
            self.task, options, self.arm, None if plan is None else plan.main, options.epochs, self.point, self.seed,
            MAIN, guide, self.accelerator,
        )  # fmt: skip
        if spent is not None:
            assert training.private is not None
            training.private.history.include(spent)  # a checkpoint's history, if there is one, has it too
        fitted = training.fit(folder, info, report)
        seconds, peak = before.seconds + fitted.seconds, max(before.peak_mb, fitted.peak_mb)
        return training, Fitted(fitted.epochs, seconds, peak)

    def _losses(self, training: Training) -> list[Tensor]:
        """Of members and of others from the same pool: test records may come from elsewhere."""
        require_finite(list(training.net.parameters()), "weights")
        losses = [
            losses_and_hits(training.net, part.images, part.labels)[0]
            for part in (there.to(self.accelerator.device) for there in (self.task.private, self.task.valid))
        ]
        require_finite(losses, "losses")
        return losses

    def _accuracy(self, training: Training, records: Records) -> float:
        there = records.to(self.accelerator.device)
        return accuracy(training.net, there.images, there.labels)

    def _facts(self, history: History | None) -> dict[str, Any]:
        """The plain values of a row."""
        unit = unit_of(self.options.federated, self.options.split_seed)
        numbers = parameters(build(self.task.side, self.task.classes))
        found = {"arm": self.name, "target": self.target, "parameters": numbers, "unit": unit,
                 "learning_rate": self.point.learning_rate, "clip": self.point.clip}  # fmt: skip
        if history is None or self.plan is None:
            none = dict.fromkeys(("epsilon", "epsilon_with_tuning", "multiplier", "noise", "privacy"))
            return {**found, **none}
        delta = self.options.delta
        spent = history.epsilon(delta)
        trainings = 1 + len(self.options.grid(self.name))
        # one point: nothing was chosen
        tuned = spent if trainings == 2 else all_trainings(history, trainings, [self.plan.paid]).epsilon(delta)
        return {
            **found, "epsilon": _plain(spent), "epsilon_with_tuning": _plain(tuned), "multiplier": self.plan.main[0],
            "noise": spent.noise, "privacy": history.report(delta).splitlines(),
        }  # fmt: skip


def _plain(epsilon: Epsilon) -> float | None:
    """JSON has no infinity."""
    return float(epsilon) if math.isfinite(epsilon) else None
