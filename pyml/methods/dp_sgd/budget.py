"""What a training may spend: its noise and that of the guide that it trains first, fixed before either begins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pyml.methods import UserError
from pyml.methods.dp_sgd.arms import Arm
from pyml.methods.dp_sgd.federated import steps_an_epoch
from pyml.privacy import History, Provenance, noise_multiplier

if TYPE_CHECKING:
    from pyml.methods.dp_sgd.train import Options

Phase = tuple[float, float, int]  # multiplier, sample rate, steps
PUBLIC = Provenance("public")


@dataclass(frozen=True)
class Plan:
    """The phases of one training, which does not depend on its outputs, and the price of a guide from a file."""

    main: Phase
    guide: Phase | None
    paid: Provenance

    def history(self, noise: str) -> History:
        """As it is when all is done."""
        made = History(provenance=self.paid, noise=noise)
        for phase in (self.guide, self.main):
            if phase is not None:
                made.record(*phase)
        return made


def sample_rate(records: int, options: "Options") -> float:
    """The chance of a record, or of a client, to be in a batch."""
    return options.client_share if options.federated else min(options.batch_size, records) / records


def guide_epochs(options: "Options") -> int:
    return options.guide_epochs or math.ceil(options.epochs / 3)


def make_plan(arm: Arm, target: float | None, records: int, options: "Options", paid: Provenance | None) -> Plan | None:
    """None without privacy. ``paid`` is the price of a guide from a file.

    A guide that is trained first would alone spend its share of epsilon. The rest is not what is left of a sum: both
    trainings are composed as one, which leaves the second one more.
    """
    if target is None:
        return None
    rate = sample_rate(records, options)
    steps = steps_an_epoch(rate)
    first: Phase | None = None
    if arm.guide == "parameters" and paid is None:
        count = guide_epochs(options) * steps
        first = (_multiplier(options.guide_share * target, rate, count, options.delta, PUBLIC, ()), rate, count)
    count = options.epochs * steps
    beside = () if first is None else (first,)
    return Plan((_multiplier(target, rate, count, options.delta, paid or PUBLIC, beside), rate, count), first,
                paid or PUBLIC)  # fmt: skip


@lru_cache(maxsize=256)
def _multiplier(
    target: float, rate: float, steps: int, delta: float, paid: Provenance, beside: tuple[Phase, ...]
) -> float:
    """Searches take seconds, and every point and seed asks for the same."""
    try:
        return noise_multiplier(target, rate, steps, delta=delta, provenance=paid, beside=beside)
    except ValueError as error:
        raise UserError(str(error)) from error


def all_trainings(history: History, trainings: int, paid: Sequence[Provenance]) -> History:
    """The trainings of a whole grid and that of the model, each as ``history`` has it; a guide was paid for once."""
    every = History(provenance=list(paid), noise=history.noise)
    for multiplier, rate, steps in history.phases:
        every.record(multiplier, rate, steps * trainings)
    return every
