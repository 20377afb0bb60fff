"""Membership inference by the loss: a check of a run's epsilon from below.

`audit_membership` takes the losses of any members and others; `audit_one_run` is a proof, for records that a coin
chose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.privacy import _arguments as arguments


@dataclass
class Audit:
    """What `audit_membership` found.

    Attributes:
        epsilon_lower: with the given confidence no smaller epsilon is right; 0 where nothing was shown. A run whose
            provable epsilon is below it has a bug, or fewer records alike than the bound assumes.
        auc: chance that a member's loss is below another's (ties count half), over all losses; 0.5 is no leak.
        threshold: records with a loss of at most this were called members.
        true_positive_rate, false_positive_rate: of that attack on the losses that did not choose it.
        confidence, delta: as given.
    """

    epsilon_lower: float
    auc: float
    threshold: float
    true_positive_rate: float
    false_positive_rate: float
    confidence: float
    delta: float

    def __str__(self) -> str:
        return (
            f"membership inference by loss: AUC {self.auc:.3f}, true positives {self.true_positive_rate:.3f} at false "
            f"positives {self.false_positive_rate:.3f}, epsilon at least {self.epsilon_lower:.3g} "
            f"(delta {self.delta:g}, confidence {self.confidence:g}); the absence of a leak proves nothing"
        )


def audit_membership(
    members: Tensor | Sequence[float],
    others: Tensor | Sequence[float],
    *,
    delta: float,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Audit:
    """Call records with a small loss members, and bound epsilon from below by how often that is right.

    An (epsilon, delta)-DP run allows no test with TPR > e^epsilon FPR + delta, nor TNR > e^epsilon FNR + delta (Kairouz
    et al., arXiv 1311.0776). Half of the losses choose the threshold, the other half give Clopper-Pearson bounds on the
    rates, which hold together with the given confidence. They take the losses for independent draws, which is true of
    one loss from each of many runs. Losses of many records of one run share its model: then this is a sanity check, not
    a proof.

    Args:
        members: losses of records that the model was trained on, ``[n]`` with n >= 2.
        others: losses of records of the same kind that it was not trained on, ``[m]`` with m >= 2.
        delta: that of the epsilon to be checked.
        confidence: of the lower bound.
        generator: draws the halves; by default torch's own.

    Returns:
        Audit.
    """
    op = "audit_membership"
    inside, outside = _losses(op, "members", members), _losses(op, "others", others)
    delta = arguments.number(op, "delta", delta, "a number from 0 to below 1", lambda v: 0 <= v < 1)
    confidence = arguments.number(op, "confidence", confidence, "a number between 0 and 1", lambda v: 0 < v < 1)
    choose_in, test_in = _halves(inside, generator)
    choose_out, test_out = _halves(outside, generator)
    level = (1 - confidence) / 2  # a lower bound of one rate and an upper bound of the other: both hold together

    def bound(threshold: float, ins: Tensor, outs: Tensor) -> tuple[float, float, float]:
        hits, alarms = int((ins <= threshold).sum()), int((outs <= threshold).sum())
        low_hit, _ = clopper_pearson(hits, len(ins), level)
        _, high_alarm = clopper_pearson(alarms, len(outs), level)
        value = max(_log_ratio(low_hit - delta, high_alarm), _log_ratio(1 - high_alarm - delta, 1 - low_hit))
        return value, hits / len(ins), alarms / len(outs)

    # Quantiles of the first half: enough to choose from, whatever the number of losses.
    pooled = torch.cat([choose_in, choose_out])
    steps = torch.linspace(0, 1, min(len(pooled), 200), dtype=torch.float64)
    candidates = torch.quantile(pooled, steps, interpolation="lower").unique()
    threshold = max(candidates.tolist(), key=lambda t: bound(t, choose_in, choose_out)[0])
    value, hit_rate, alarm_rate = bound(threshold, test_in, test_out)
    return Audit(max(value, 0.0), _auc(inside, outside), threshold, hit_rate, alarm_rate, confidence, delta)


@dataclass
class OneRunAudit:
    """What `audit_one_run` found.

    Attributes:
        epsilon_lower: with the given confidence no smaller epsilon is right; 0 where nothing was shown.
        auc: as in `Audit`.
        guesses, correct: how many records were called included or left out, and how many of these rightly.
        confidence, delta: as given.
    """

    epsilon_lower: float
    auc: float
    guesses: int
    correct: int
    confidence: float
    delta: float

    def __str__(self) -> str:
        return (
            f"membership inference in one run: AUC {self.auc:.3f}, {self.correct} of {self.guesses} guesses right, "
            f"epsilon at least {self.epsilon_lower:.3g} (delta {self.delta:g}, confidence {self.confidence:g}); "
            "the absence of a leak proves nothing"
        )


def audit_one_run(
    losses: Tensor | Sequence[float],
    included: Tensor | Sequence[bool],
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: int | None = None,
) -> OneRunAudit:
    """A lower bound on epsilon from a single run, for records each of which a fair coin put into the training set or
    not.

    The records of the least losses are called included, as many of the largest left out. Of r guesses under
    (epsilon, 0)-DP no more are right than coins of bias e^epsilon / (1 + e^epsilon) would give, and delta adds at most
    2 m delta max_i P[v > right >= v - i] / i to the chance of v or more (Steinke, Nasr and Jagielski, arXiv
    2305.08846).

    Args:
        losses: of all m records under the trained model, ``[m]`` with m >= 2; or any score that is smaller for members,
            such as the loss minus that of a public model.
        included: bool ``[m]``, the independent fair coins. All other training records are fixed.
        delta: that of the epsilon to be checked.
        confidence: of the lower bound.
        guesses: how many to make, even, chosen before looking; by default about a tenth of m.

    Returns:
        OneRunAudit.
    """
    op = "audit_one_run"
    values, coins = _losses(op, "losses", losses), torch.as_tensor(included).cpu()
    if coins.dtype != torch.bool or coins.shape != values.shape:
        _check.fail(op, "included", f"bool of shape [{len(values)}]", f"{coins.dtype} of {list(coins.shape)}")
    delta = arguments.number(op, "delta", delta, "a number from 0 to below 1", lambda v: 0 <= v < 1)
    confidence = arguments.number(op, "confidence", confidence, "a number between 0 and 1", lambda v: 0 < v < 1)
    made = 2 * max(len(values) // 20, 1) if guesses is None else arguments.count(op, "guesses", guesses)
    if made % 2 or not 2 <= made <= len(values):
        _check.fail(op, "guesses", f"an even number from 2 to {len(values)}", made)
    order = values.argsort(stable=True)  # ties by their place, which knows nothing of the coins
    correct = int(coins[order[: made // 2]].sum()) + int((~coins[order[-(made // 2) :]]).sum())
    low, high = 0.0, 50.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        wrong = one_run_p_value(len(values), made, correct, middle, delta) > 1 - confidence
        low, high = (low, middle) if wrong else (middle, high)
    return OneRunAudit(low, _auc(values[coins], values[~coins]), made, correct, confidence, delta)


def one_run_p_value(records: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the chance of so many right guesses, or more, under (epsilon, delta)-DP."""
    binom = arguments.package("audit_one_run", "scipy.stats").binom
    chance = 1 / (1 + math.exp(-epsilon))
    below = binom.pmf(range(correct - 1, -1, -1), guesses, chance).cumsum()  # P[correct > right >= correct - i]
    worst = max((mass / i for i, mass in enumerate(below.tolist(), 1)), default=0.0)
    return min(1.0, float(binom.sf(correct - 1, guesses, chance)) + 2 * records * delta * worst)


def clopper_pearson(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Bounds on a rate, each wrong with a chance of at most ``level``."""
    beta = arguments.package("audit_membership", "scipy.stats").beta
    low = 0.0 if successes == 0 else float(beta.ppf(level, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - level, successes + 1, trials - successes))
    return low, high


def _losses(op: str, name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values)
    if found.dim() != 1 or len(found) < 2 or found.is_complex():
        _check.fail(op, name, "losses of shape [n] with n >= 2", list(found.shape))
    found = found.detach().cpu().double()
    if found.isnan().any():
        _check.fail(op, name, "losses that are numbers", "a NaN")
    return found.nan_to_num(posinf=torch.finfo(torch.float64).max)  # an infinite loss is one that is above all others


def _halves(losses: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    mixed = losses[torch.randperm(len(losses), generator=generator)]
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def _log_ratio(rate: float, other: float) -> float:
    return math.log(rate / other) if rate > 0 and other > 0 else -math.inf


def _auc(inside: Tensor, outside: Tensor) -> float:
    if not len(inside) or not len(outside):
        return 0.5
    ordered = outside.sort().values
    above = len(ordered) - torch.searchsorted(ordered, inside, right=True)
    ties = torch.searchsorted(ordered, inside, right=True) - torch.searchsorted(ordered, inside)
    return float((above + ties / 2).mean() / len(ordered))
