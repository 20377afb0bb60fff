"""Epsilon of a run with Gaussian noise under Poisson sampling, and the multiplier for a target epsilon.

The composition is that of dp-accounting: privacy loss distributions ("pld", tight, rounded upwards) or Rényi ("rdp").
Adjacency: one record is added or removed. What nothing proves gets no finite number, but a reason.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from pyml.ops import _check
from pyml.privacy import _arguments as arguments
from pyml.privacy import provenance as sources
from pyml.privacy._arguments import Phase

ACCOUNTANTS = ("pld", "rdp")
SAMPLING = ("poisson", "shuffled", "fixed_size")
# Best first: a history that joins several keeps the worst of them.
NOISE = {
    "secure": "secure noise on a grid",
    "hardened": "hardened: secure key, float sums, a mitigation and no proof",
    "fast": "proven for real numbers; float rounding and Philox add no proof",
    "seeded": "reproducible, not private",
}
INTERVAL = 1e-4  # of a privacy loss distribution, in units of epsilon
LONGEST = 4e5  # entries of a step's distribution, about: tiny multipliers get a wider interval, still an upper bound
NEAR = 1e-4  # multipliers that differ by less, relative, are composed as the smallest: each other one costs a second
LEAST_TOLERANCE = 1e-9
COARSE = 16  # so many times wider are the intervals of the distributions that only show a search where to look
VAST = 300.0  # an epsilon from which on Rényi's bound is good enough, and distributions take minutes


class Epsilon(float):
    """A provable epsilon: a float that says what it holds for. Infinite, with a ``reason``, where nothing is proven.

    Attributes:
        delta, accountant: what it was computed for and with ("pld" or "rdp").
        reason: why it is infinite, or None.
        noise: how the noise was made, a key of `NOISE`; "seeded" prints as "reproducible, not private".
        claimed_by_rule: what an unproven rule claims instead, or None. It is printed beside this value only.
    """

    delta: float
    accountant: str
    reason: str | None
    noise: str
    claimed_by_rule: float | None

    def __new__(
        cls, value: float, delta: float = math.nan, accountant: str = "pld", reason: str | None = None,
        noise: str = "fast", claimed_by_rule: float | None = None,
    ) -> "Epsilon":  # fmt: skip
        made = super().__new__(cls, value)
        made.delta, made.accountant, made.reason, made.noise = delta, accountant, reason, noise
        made.claimed_by_rule = claimed_by_rule
        return made

    def __str__(self) -> str:
        shown = rounded_up(float(self), ".4g")
        value = f"epsilon_provable {shown} at delta {self.delta:g} ({self.accountant}, add or remove one)"
        if self.reason:
            value += f": {self.reason}"
        if self.claimed_by_rule is not None:
            value += f"; epsilon_claimed_by_rule {rounded_up(self.claimed_by_rule, '.4g')}, unproven"
        return f"{value}; {NOISE[self.noise]}"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        """As a float, but rounded up; that a seeded run is not private is said in each. Not for "%" and round()."""
        if not spec:
            return str(self)
        value = rounded_up(float(self), spec)
        return f"{value}, {NOISE[self.noise]}" if self.noise == "seeded" else value


def rounded_up(value: float, spec: str) -> str:
    """A number in a format such as ".3f", never below itself: a smaller epsilon than this is not proven."""
    step, shown = math.ulp(value), format(value, spec)
    while math.isfinite(value) and _number(shown) < value:  # half a unit of the last digit is enough
        shown, step = format(value + step, spec), 2 * step
    return shown


def _number(text: str) -> float:
    """What a formatted number says."""
    plain = text.strip().replace(",", "").replace("_", "")
    return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)


def epsilon(
    multiplier: float | Sequence[Sequence[float]],
    sample_rate: float | None = None,
    steps: int | None = None,
    *,
    delta: float,
    accountant: str = "pld",
    provenance: Any,
    sampling: str = "poisson",
    noise: str = "fast",
    total_variation: float = 0.0,
    claimed_multiplier: float | Sequence[float] | None = None,
    allow_unproven: bool = False,
) -> Epsilon:
    """The epsilon that is provable for a run.

    Args:
        multiplier: the effective multiplier (`effective_multiplier`), or a list of phases
            (multiplier, sample_rate, steps). The schedule must not depend on the run's outputs.
        sample_rate: the probability with which each record is in a batch, independently of the others.
        steps: the steps taken, those with an empty batch included.
        delta: the delta of the whole run, guides included.
        accountant: "pld" or "rdp". GDP (CLT) accounting is an approximation that reports too little: not offered.
        provenance: of the scale: "public", "released_iterate", `dp(epsilon, delta)`, "private_batch" or "unknown"; a
            list where there are several. Under the last two there is no finite epsilon.
        sampling: "poisson"; "shuffled" and "fixed_size" batches have no finite epsilon here.
        noise: how the noise was made: "fast", "seeded", "hardened" or "secure"; only the label depends on it.
        total_variation: distance of the noise that was drawn from Gaussian noise, over the whole run
            (`pyml.privacy.secure`). Its price (1 + e^epsilon) * total_variation is taken from delta.
        claimed_multiplier: the multiplier, one or one a phase, that some rule without a proof uses, such as the RMS of
            the noise under an L2 clip. Needs ``allow_unproven=True``; its epsilon is only printed beside the provable
            one, and not at all where that is infinite for lack of a proof.

    Returns:
        Epsilon: a float; infinite with a ``reason`` where nothing can be proven.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        ImportError: dp-accounting is not installed.
    """
    return account(
        "epsilon", arguments.phases("epsilon", multiplier, sample_rate, steps), delta, accountant, provenance, sampling,
        noise, total_variation, claimed_multiplier, allow_unproven,
    )  # fmt: skip


def account(
    op: str, phases: tuple[Phase, ...], delta: float, accountant: str, provenance: Any, sampling: str, noise: str,
    total_variation: float = 0.0, claimed: Any = None, allow_unproven: bool = False, reason: str | None = None,
) -> Epsilon:  # fmt: skip
    """What `epsilon` and a `History` share."""
    delta = arguments.delta(op, delta)
    _check.member(op, "accountant", accountant, ACCOUNTANTS)
    _check.member(op, "noise", noise, tuple(NOISE))
    distance = arguments.not_negative(op, "total_variation", total_variation)
    if claimed is not None and not allow_unproven:
        _check.fail(op, "claimed_multiplier", "allow_unproven=True beside it, as nothing proves it", claimed)
    guides, reason = _permitted(op, provenance, sampling, reason)
    if reason:
        return Epsilon(math.inf, delta, accountant, reason, noise)
    value = _within(accountant, phases, guides, delta, distance)
    rule = None
    if claimed is not None:
        rule = _within(accountant, _with_multipliers(op, phases, claimed), guides, delta, distance)
    if math.isinf(value):
        bare = any(m == 0 and q > 0 and n > 0 for m, q, n in phases)
        reason = "a multiplier of 0: something is released without noise" if bare else "nothing is left of delta"
    return Epsilon(value, delta, accountant, reason, noise, rule)


def noise_multiplier(
    target_epsilon: float,
    sample_rate: float,
    steps: int,
    *,
    delta: float,
    accountant: str = "pld",
    provenance: Any,
    tolerance: float = 1e-3,
    beside: Sequence[Sequence[float]] = (),
) -> float:
    """The smallest noise multiplier, within a relative ``tolerance``, whose epsilon is at most ``target_epsilon``.

    The price of a DP scale is part of the target, and so are the phases (multiplier, sample_rate, steps) ``beside``,
    such as those of a guide's training: composed together they cost less than their sum. A ``total_variation`` is not,
    nor the rounding of `secure_sum`: there the multiplier that `SecureSum` states is a little lower, so the epsilon is
    a little higher.

    Other arguments and errors as those of `epsilon`. A target that no multiplier reaches raises, and so does a delta
    above the chance that a record is in any batch: all multipliers reach it. ``tolerance`` is at least 1e-9.
    """
    op = "noise_multiplier"
    target = arguments.positive(op, "target_epsilon", target_epsilon)
    _, rate, steps = arguments.phase(op, 1.0, sample_rate, steps)
    delta, expected = arguments.delta(op, delta), f"a finite number of at least {LEAST_TOLERANCE:g}"
    tolerance = arguments.number(op, "tolerance", tolerance, expected, lambda v: LEAST_TOLERANCE <= v < math.inf)
    _check.member(op, "accountant", accountant, ACCOUNTANTS)
    guides, reason = _permitted(op, provenance, "poisson", None)
    if reason:
        _check.fail(op, "provenance", "a scale for which an epsilon is provable", reason)
    if rate == 0 or steps == 0:
        _check.fail(op, "sample_rate, steps", "numbers above 0", (rate, steps))
    before = arguments.phases(op, beside, None, None)
    spent, taken = sum(e for e, _ in guides), sum(d for _, d in guides)
    left = delta - taken
    if left <= 0:
        _check.fail(op, "delta", f"more than that of the guides, {taken:g}", delta)
    if before and target >= spent:
        spent = _compose(accountant, before, guides, delta)
    if target < spent:
        what = " and ".join(["the guides"] * bool(guides) + ["the phases beside"] * bool(before))
        _check.fail(op, "target_epsilon", f"at least the {rounded_up(spent, '.4g')} that {what} cost", target)
    chance = 1.0 if rate == 1 else -math.expm1(steps * math.log1p(-rate))
    if left > chance:
        beside_guides = " beside that of the guides" if taken else ""
        expected = f"at most {chance:.3g}{beside_guides}, the chance that a record is in any batch"
        _check.fail(op, "delta", f"{expected}, as every multiplier reaches more", delta)

    def excess(multiplier: float, accountant: str = accountant, coarse: int = 1) -> float:
        found = _compose(accountant, (*before, (multiplier, rate, steps)), guides, delta, coarse)
        return math.log(max(found, target / 10) / target)  # far below, often at 0, secants would lead nowhere

    # Rényi DP is quick and asks for more noise, and so do coarse distributions: where they arrive, fine ones, which may
    # take seconds each, are needed only just below.
    near = _least(lambda m: excess(m, "rdp", COARSE), 1.0, 2.0, 0.01)
    start, factor, known = near or 1.0, 1.1 if near else 2.0, None
    if accountant == "pld" and (closer := _least(lambda m: excess(m, coarse=COARSE), start, factor, 0.003)):
        start, factor, known = closer, 1.003, excess(closer, coarse=COARSE)
    high = _least(excess, start, factor, tolerance, known)
    if high is None:
        expected = f"more, as no multiplier up to 2^20 reaches so little at delta {delta:g}"
        _check.fail(op, "target_epsilon", expected, target)
    return high


def _least(
    excess: Callable[[float], float], start: float, factor: float, tolerance: float, known: float | None = None
) -> float | None:
    """The least multiplier with excess <= 0, at most a relative ``tolerance`` above it; None where 2^20 does not do.

    Bracketed from ``start`` in steps of ``factor``, downwards in steps that grow up to 2, then narrowed by secants in
    logarithms, each aimed a little beyond the root so that the far end moves; every third step bisects. What is
    returned was found to do. ``known`` is a bound on the excess at ``start``, where there is one already.
    """
    high, above = start, excess(start) if known is None else known
    low, below = high, above
    while above > 0:
        low, below, high = high, above, high * factor
        if high > 2**20:
            return None
        above = excess(high)
    while below <= 0:
        high, above, low = low, below, low / factor
        below, factor = excess(low), min(factor * factor, 2.0)
    turn = 0
    while high > low * (1 + tolerance):
        turn += 1
        middle = math.sqrt(low * high)
        if turn % 3 and math.isfinite(below):
            root = low * (high / low) ** (below / (below - above))
            near = root * (1 + tolerance / 3) if high > root * (1 + tolerance / 2) else root * (1 - tolerance / 3)
            middle = near if low < near < high else middle
        if not low < middle < high:  # two floats that are neighbours
            break
        value = excess(middle)
        if value > 0:
            low, below = middle, value
        else:
            high, above = middle, value
    return high


def _permitted(
    op: str, provenance: Any, sampling: str, reason: str | None
) -> tuple[tuple[tuple[float, float], ...], str | None]:
    """The (epsilon, delta) of each guide to be composed, and why no finite epsilon may be stated, or None."""
    found = sources.parse(op, provenance)
    _check.member(op, "sampling", sampling, SAMPLING)
    reason = reason or sources.refusal(found)
    if reason is None and sampling != "poisson":
        reason = f"{sampling} batches: only Poisson sampling is accounted for"
    return tuple((p.epsilon, p.delta) for p in found if p.kind == "dp"), reason


def _with_multipliers(op: str, phases: tuple[Phase, ...], claimed: Any) -> tuple[Phase, ...]:
    values = list(claimed) if isinstance(claimed, Sequence) else [claimed] * len(phases)
    if len(values) != len(phases):
        _check.fail(op, "claimed_multiplier", f"one number, or one for each of the {len(phases)} phases", len(values))
    claims = [arguments.positive(op, "claimed_multiplier", v) for v in values]
    return tuple((c, q, n) for c, (_, q, n) in zip(claims, phases))


def _within(
    accountant: str, phases: tuple[Phase, ...], guides: tuple[tuple[float, float], ...], delta: float, distance: float
) -> float:
    """Epsilon of noise that is only within ``distance`` in total variation of the noise that is accounted for.

    If the latter is (e, d)-DP, the former is (e, d + (1 + exp(e)) distance)-DP, so e is raised until both fit delta.
    """
    bound = _compose(accountant, phases, guides, delta)
    while distance > 0 and math.isfinite(bound):
        left = delta - (1 + math.exp(min(bound, 700.0))) * distance
        again = _compose(accountant, phases, guides, left) if left > 0 else math.inf
        if again <= bound:
            break
        bound = again + 1e-9 * max(1.0, again)
    return bound


@lru_cache(maxsize=1024)
def _compose(
    accountant: str, phases: tuple[Phase, ...], guides: tuple[tuple[float, float], ...], delta: float, coarse: int = 1
) -> float:
    taken = _joined(phases)
    left = delta - sum(d for _, d in guides)  # basic composition: of the guides nothing else is known
    if left <= 0 or any(m == 0 for m, _, _ in taken):
        return math.inf
    bound = _renyi(taken, left) if taken else 0.0
    # dp-accounting gives 0 where the divergences of almost no loss come out negative: that is not taken on trust.
    if bound == 0 and taken:
        bound = _loss_distributions(taken, left, coarse)
    elif accountant == "pld" and 0 < bound < VAST:
        # both are proven; rounding upwards costs in long runs
        bound = min(bound, _loss_distributions(taken, left, coarse))
    return bound + sum(e for e, _ in guides)


def _joined(phases: tuple[Phase, ...]) -> list[Phase]:
    """Phases in which something is released; those of one rate and nearly one multiplier as one, at the smallest."""
    found: list[Phase] = []
    for m, q, n in sorted((p for p in phases if p[1] > 0 and p[2] > 0), key=lambda p: (p[1], p[0])):
        if found and found[-1][1] == q and m <= found[-1][0] * (1 + NEAR):
            found[-1] = (found[-1][0], q, found[-1][2] + n)
        else:
            found.append((m, q, n))
    return found


def _renyi(phases: list[Phase], delta: float) -> float:
    accounting = arguments.package("epsilon", "dp_accounting.rdp")
    made = accounting.RdpAccountant(neighboring_relation=_relation())
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each order that does not converge; without it the bound is only looser
    try:
        for event, n in _events(phases):
            made.compose(event, n)
    finally:
        log.setLevel(level)
    return float(made.get_epsilon(delta))


def _loss_distributions(phases: list[Phase], delta: float, coarse: int = 1) -> float:
    # A step has losses up to about 20 / m; steps without sampling are joined into one, of multiplier m / sqrt(n).
    span = max(20 / m * (math.sqrt(n) if q == 1 else 1) for m, q, n in phases)
    accounting = arguments.package("epsilon", "dp_accounting.pld")
    fine = INTERVAL / max(1.0, max(m for m, _, _ in phases) / 30)  # losses of so much noise are small ones
    made = accounting.PLDAccountant(_relation(), coarse * max(fine, span / LONGEST))
    for event, n in _events(phases):
        made.compose(event, n)
    return float(made.get_epsilon(delta))


def _relation() -> Any:
    return arguments.package("epsilon", "dp_accounting").NeighboringRelation.ADD_OR_REMOVE_ONE


def _events(phases: list[Phase]) -> list[tuple[Any, int]]:
    accounting = arguments.package("epsilon", "dp_accounting")
    plain = [(accounting.GaussianDpEvent(m), q, n) for m, q, n in phases]
    return [(event if q == 1 else accounting.PoissonSampledDpEvent(q, event), n) for event, q, n in plain]
