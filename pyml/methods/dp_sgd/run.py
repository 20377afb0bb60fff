"""One arm at one epsilon with one seed: its optimizer, its batches, its epsilon, and what it scores."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyml.methods._engine import Fitted, epoch_generator, few_threads, fit, seed_everything
from pyml.methods._measure import parameters
from pyml.methods._sweep import Report
from pyml.methods.dp_sgd.arms import ARMS, Arm, Guide, Scales, clipping, multiplier, parse_row, unit_of
from pyml.methods.dp_sgd.data import Records, Task
from pyml.methods.dp_sgd.federated import Clients, rounds, steps_an_epoch
from pyml.methods.dp_sgd.model import RELEASED, accuracy, build, known_hooks, losses_and_hits, save_model
from pyml.optim import HeteroNoiseOptimizer, PoissonBatches, make_private
from pyml.privacy import Epsilon, History, audit_membership, dp
from pyml.privacy import _arguments as arguments

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pyml.methods.dp_sgd.train import Options

MAIN, GUIDE = 0, 1  # each has a noise of its own


@dataclass(frozen=True)
class Point:
    """Of the tuning grid."""

    learning_rate: float
    clip: float | None


class Training:
    """A network on its way: what `fit` needs, and the privacy of what comes out."""

    def __init__(
        self, task: Task, options: "Options", arm: Arm, target: float | None, delta: float, epochs: int, point: Point,
        seed: int, role: int, guide: Guide | None, accelerator: "Accelerator",
    ) -> None:  # fmt: skip
        self.task, self.options, self.epochs, self.accelerator = task, options, epochs, accelerator
        seed_everything(seed)
        self.net = build(task.side, task.classes).to(accelerator.device)
        self.model: nn.Module = self.net
        self.private: HeteroNoiseOptimizer | None = None
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.net.parameters(), lr=point.learning_rate)
        self.scales = Scales(arm, self._twin() if arm.guide == "public" else None,
                             task.public.to(accelerator.device), guide, seed)  # fmt: skip
        clients = self._clients()
        self.loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]] = (
            self._loss if clients is None else clients.loss
        )
        if not arm.mode:
            self._draw = self._shuffled(seed) if clients is None else rounds(len(clients), options.client_share, seed)
            return
        assert target is not None and point.clip is not None
        size = min(options.batch_size, len(task.private))
        rate = size / len(task.private) if clients is None else options.client_share
        paid = () if guide is None else (guide.provenance,)
        steps = epochs * steps_an_epoch(rate)
        how: dict[str, Any] = {
            "noise_multiplier": multiplier(target, rate, steps, delta, paid or ("public",)),
            "seed": None if options.private else 2 * seed + role, **clipping(arm, self.scales, self.net, point.clip),
        }  # fmt: skip
        if clients is None:
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
        """A second network for gradients of public records: hooks of the first one have no part in them."""
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
        self.guide_history: History | None = None

    def validated(self, folder: Path, report: Report) -> float:
        """Train for the tuning; the validation accuracy."""
        training, _ = self._train(folder, report)
        return self._accuracy(training, self.task.valid)

    def go(self, folder: Path, report: Report) -> dict[str, Any]:
        """Train, score, release."""
        training, fitted = self._train(folder, report)
        model = self._facts(training)
        save_model(folder / RELEASED, training.net, {
            "side": self.task.side, "classes": self.task.classes, "arm": self.name, "delta": self.options.delta,
            # its lr and clip were chosen by trainings on the same records
            "epsilon": model["epsilon_with_tuning"], "noise": model["noise"], "unit": model["unit"],
            "source": self.task.source,
        })  # fmt: skip
        losses = [
            losses_and_hits(training.net, part.images, part.labels)[0]
            for part in (there.to(self.accelerator.device) for there in (self.task.private, self.task.test))
        ]
        audit = audit_membership(*losses, delta=self.options.delta, generator=epoch_generator(self.seed, 0))
        scores = {
            "accuracy": self._accuracy(training, self.task.test),
            "validation": self._accuracy(training, self.task.valid), "auc": audit.auc,
            "epsilon_lower": audit.epsilon_lower, "train_seconds": fitted.seconds, "train_peak_mb": fitted.peak_mb,
        }  # fmt: skip
        return {"model": model, "scores": scores}

    def _train(self, folder: Path, report: Report) -> tuple[Training, Fitted]:
        options = self.options
        info = {"method": "dp_sgd", "arm": self.name, "target": self.target, "seed": self.seed,
                "source": self.task.source}  # fmt: skip
        guide, before = self.file_guide, Fitted(0, 0.0, 0.0)
        if self.arm.guide == "parameters" and guide is None:
            assert self.target is not None
            share = options.guide_share
            first = Training(
                self.task, options, ARMS["isotropic"], share * self.target, share * options.delta,
                options.guide_epochs or math.ceil(options.epochs / 3), self.point, self.seed, GUIDE, None,
                self.accelerator,
            )  # fmt: skip
            before = first.fit(folder / "guide", {**info, "arm": "isotropic"})
            assert first.private is not None
            self.guide_history = first.private.history
            price = dp(float(first.private.epsilon(share * options.delta)), share * options.delta)
            guide = Guide([p.detach().clone() for p in first.net.parameters()], price, "trained first")
        training = Training(
            self.task, options, self.arm, self.target, options.delta, options.epochs, self.point, self.seed, MAIN,
            guide, self.accelerator,
        )  # fmt: skip
        fitted = training.fit(folder, info, report)
        seconds, peak = before.seconds + fitted.seconds, max(before.peak_mb, fitted.peak_mb)
        return training, Fitted(fitted.epochs, seconds, peak)

    def _accuracy(self, training: Training, records: Records) -> float:
        there = records.to(self.accelerator.device)
        return accuracy(training.net, there.images, there.labels)

    def _facts(self, training: Training) -> dict[str, Any]:
        """The plain values of a row."""
        unit = unit_of(self.options.federated, self.options.split_seed)
        found = {"arm": self.name, "target": self.target, "parameters": parameters(training.net), "unit": unit,
                 "learning_rate": self.point.learning_rate, "clip": self.point.clip,
                 "clip_shown": "-" if self.point.clip is None else f"{self.point.clip:g}"}  # fmt: skip
        private = training.private
        if private is None:
            none = dict.fromkeys(("epsilon", "epsilon_with_tuning", "multiplier", "gain", "noise", "privacy"))
            return {**found, **none, "epsilon_shown": "none", "tuning_shown": "none", "gain_shown": "-"}
        delta = self.options.delta
        spent = private.epsilon(delta)
        tuned = self._with_tuning(private.history, spent)
        scale = training.scales.scale(training.net) if self.arm.mode == "whitened" else None
        gain = None if scale is None else scale.gain
        return {
            **found, "epsilon": _plain(spent), "epsilon_with_tuning": _plain(tuned), "multiplier": private.multiplier,
            "gain": gain, "noise": spent.noise, "privacy": private.history.report(delta).splitlines(),
            "epsilon_shown": f"{float(spent):.3f}", "tuning_shown": f"{float(tuned):.2f}",
            "gain_shown": "-" if gain is None else f"{gain:.2f}",
        }  # fmt: skip

    def _with_tuning(self, history: History, spent: Epsilon) -> Epsilon:
        """The epsilon of all trainings that stand behind the released model, those of the grid too."""
        trainings = 1 + len(self.options.grid(self.name))
        if trainings == 2:  # one point: nothing was chosen
            return spent
        paid = "public" if self.file_guide is None else self.file_guide.provenance
        every = History(provenance=paid, noise=history.noise)
        for one in (history, self.guide_history):
            for m, rate, steps in () if one is None else one.phases:
                every.record(m, rate, steps * trainings)
        return every.epsilon(self.options.delta)


def _plain(epsilon: Epsilon) -> float | None:
    """JSON has no infinity."""
    return float(epsilon) if math.isfinite(epsilon) else None
