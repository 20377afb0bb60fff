"""What a run has spent: phases of (multiplier, sample rate, steps), kept and saved with the optimizer."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pyml.ops import _check
from pyml.privacy import _arguments as arguments
from pyml.privacy import provenance as sources
from pyml.privacy.accounting import NOISE, SAMPLING, Epsilon, account

FORMAT = 1
ADAPTIVE = "a multiplier was chosen from outputs of the run: composition needs a schedule that was fixed before"


class History:
    """The privacy history of a run.

    Args:
        provenance: of the scale, as in `epsilon`.
        sampling: how batches are drawn, as in `epsilon`.
        noise: how the noise is made, as in `epsilon`: "fast", "seeded", "hardened" or "secure".
        facts: what a report should say besides, such as the clip norm and which norm it is: plain JSON values.

    Attributes:
        phases: (multiplier, sample_rate, steps), in the order in which each first came.
        total_variation: distance of all noise so far from Gaussian noise (`pyml.privacy.secure`).
        adaptive: whether a multiplier depended on outputs of the run; then there is no finite epsilon.
        scales: the prices of the scales that were paid for, by their digests.
        included: the states of the other runs that `include` has added.
    """

    def __init__(
        self, *, provenance: Any, sampling: str = "poisson", noise: str = "fast", facts: Mapping[str, Any] | None = None
    ) -> None:
        op = "History"
        self.provenance = sources.parse(op, provenance)
        _check.member(op, "sampling", sampling, SAMPLING)
        _check.member(op, "noise", noise, tuple(NOISE))
        self.sampling, self.noise = sampling, noise
        self.facts: dict[str, Any] = dict(facts or {})
        self.total_variation = 0.0
        self.adaptive = False
        self.scales: dict[str, tuple[sources.Provenance, ...]] = {}
        self.included: list[dict[str, Any]] = []
        self._steps: dict[tuple[float, float], int] = {}

    @property
    def phases(self) -> tuple[arguments.Phase, ...]:
        return tuple((multiplier, rate, steps) for (multiplier, rate), steps in self._steps.items())

    @property
    def steps(self) -> int:
        return sum(self._steps.values())

    def record(
        self, multiplier: float, sample_rate: float, steps: int = 1, *, total_variation: float = 0.0,
        adaptive: bool = False,
    ) -> None:  # fmt: skip
        """Count steps, those with an empty batch too.

        Each pair of multiplier and rate is a phase, and `epsilon` takes about a second for each: where a schedule
        lowers the noise, lower it once an epoch, not at each step. Multipliers within 1e-4 are accounted for together.

        Args:
            multiplier, sample_rate, steps: as in `epsilon`.
            total_variation: of one step.
            adaptive: the multiplier or the rate was chosen from earlier outputs of the run.
        """
        multiplier, rate, steps = arguments.phase("History.record", multiplier, sample_rate, steps)
        distance = arguments.not_negative("History.record", "total_variation", total_variation)
        self._steps[multiplier, rate] = self._steps.get((multiplier, rate), 0) + steps
        self.total_variation += steps * distance
        self.adaptive |= bool(adaptive)

    def include(self, other: "History") -> None:
        """Add another run on the same records, such as the training of the guide: both are released.

        Everything of the other counts, its provenance, its sampling and its noise too; the worse of the two stays.
        """
        for multiplier, rate, steps in other.phases:
            self.record(multiplier, rate, steps)
        self.total_variation += other.total_variation
        self.adaptive |= other.adaptive
        self.provenance += tuple(p for p in other.provenance if p.kind == "dp" or p not in self.provenance)
        self._worse(other)
        self.included.append({**other.state_dict(), "facts": {}})

    def pay(self, scale: str, provenance: Sequence[sources.Provenance]) -> None:
        """Another scale, by its digest, is used from here on: each mechanism that made it is paid for.

        Args:
            provenance: of the scale; none for the one that this history was made with.
        """
        known = self.provenance
        self.provenance += tuple(p for p in provenance if p.kind == "dp" or p not in known)
        prices = tuple(p for p in provenance or known if p.kind == "dp")
        if prices:  # what has none is free for ever
            self.scales[scale] = prices

    def keep(self, before: "History", *, same: bool) -> None:
        """Take in what this history, of a checkpoint, does not have of the one whose place it takes.

        Args:
            same: the checkpoint is one of that very run: a phase of both is then one, and the longer one counts.
        """
        known = list(self.included)
        own, mine = before._alone(), self._alone()
        for state in before.included:
            if state in known:
                known.remove(state)
            else:
                self.include(_restored(state))
        for (multiplier, rate), steps in own._steps.items():
            more = steps - (mine._steps.get((multiplier, rate), 0) if same else 0)
            if more > 0:
                self.record(multiplier, rate, more)
        self.total_variation += max(own.total_variation - (mine.total_variation if same else 0.0), 0.0)
        self.adaptive |= before.adaptive
        self._worse(before)
        for digest, prices in before.scales.items():
            if digest not in self.scales:
                self.pay(digest, prices)
        self.provenance += tuple(p for p in before.provenance if p not in self.provenance)

    def _alone(self) -> "History":
        """The phases and the distance without those of the runs that were included."""
        found = History(provenance=self.provenance)
        found._steps, found.total_variation = dict(self._steps), self.total_variation
        for state in self.included:
            for multiplier, rate, steps in state["phases"]:
                found._steps[multiplier, rate] = found._steps.get((multiplier, rate), 0) - steps
            found.total_variation -= state["total_variation"]
        return found

    def _worse(self, other: "History") -> None:
        if other.sampling != "poisson":
            self.sampling = other.sampling
        self.noise = max(self.noise, other.noise, key=list(NOISE).index)

    def epsilon(
        self, delta: float, accountant: str = "pld", *, claimed_multiplier: Any = None, allow_unproven: bool = False
    ) -> Epsilon:
        """The epsilon that is provable for all that was recorded; arguments as those of `pyml.privacy.epsilon`."""
        return account(
            "History.epsilon", self.phases, delta, accountant, self.provenance, self.sampling, self.noise,
            self.total_variation, claimed_multiplier, allow_unproven, ADAPTIVE if self.adaptive else None,
        )  # fmt: skip

    def report(self, delta: float, accountant: str = "pld") -> str:
        """Everything that belongs beside an epsilon, one fact a line."""
        lines = [
            str(self.epsilon(delta, accountant)),
            f"accountant: {accountant}, dp-accounting {version('dp-accounting')}",
        ]
        lines += [f"{n} steps at multiplier {m:.6g}, sample rate {q:.6g}" for m, q, n in self.phases]
        lines += [f"sampling: {self.sampling}", "scale: " + ", ".join(map(str, self.provenance))]
        if self.total_variation:
            lines.append(f"distance of the noise from Gaussian noise: {self.total_variation:.3g} (total variation)")
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.facts.items())])

    def state_dict(self) -> dict[str, Any]:
        """Plain values that JSON, safetensors' metadata and torch.save keep."""
        return {
            "format": FORMAT,
            "phases": [list(phase) for phase in self.phases],
            "provenance": _plain(self.provenance),
            "sampling": self.sampling,
            "noise": self.noise,
            "total_variation": self.total_variation,
            "adaptive": self.adaptive,
            "facts": dict(self.facts),
            "scales": {digest: _plain(prices) for digest, prices in self.scales.items()},
            "included": list(self.included),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place of a saved history. A state that is not whole is refused, and nothing changes."""
        op = "History.load_state_dict"
        if not isinstance(state, Mapping):
            _check.fail(op, "state", "the entries of state_dict()", type(state).__name__, TypeError)
        state = {"scales": {}, "included": [], **state}  # states of before had none
        missing = {"format", *self.state_dict()} - set(state)
        if missing:
            _check.fail(op, "state", "the entries of state_dict()", f"one without {', '.join(sorted(missing))}")
        if state["format"] != FORMAT:
            _check.fail(op, "state", f"format {FORMAT}", state["format"])
        for name, kind in (("adaptive", bool), ("facts", Mapping), ("scales", Mapping), ("included", list)):
            if not isinstance(state[name], kind):
                _check.fail(op, name, f"a {kind.__name__.lower()}", type(state[name]).__name__, TypeError)
        provenance = _sources(op, "provenance", state["provenance"])
        loaded = History(provenance=provenance, sampling=state["sampling"], noise=state["noise"], facts=state["facts"])
        for phase in _triples(op, "phases", state["phases"]):
            loaded.record(*phase)
        loaded.total_variation = arguments.not_negative(op, "total_variation", state["total_variation"])
        loaded.adaptive = state["adaptive"]
        loaded.scales = {str(name): tuple(_sources(op, "scales", one)) for name, one in state["scales"].items()}
        loaded.included = [_restored(one).state_dict() for one in state["included"]]
        if any(steps < 0 for steps in loaded._alone()._steps.values()):
            _check.fail(op, "included", "runs whose phases are among these", "others")
        self.__dict__.update(loaded.__dict__)


def _triples(op: str, name: str, found: Any) -> list[list[Any]]:
    if not isinstance(found, list | tuple) or any(not isinstance(one, list | tuple) or len(one) != 3 for one in found):
        _check.fail(op, name, "a list of triples", repr(found), TypeError)
    return [list(one) for one in found]


def _plain(provenance: Sequence[sources.Provenance]) -> list[list[Any]]:
    return [[p.kind, p.epsilon, p.delta] for p in provenance]


def _sources(op: str, name: str, found: Any) -> list[sources.Provenance]:
    return [sources.Provenance(*one) for one in _triples(op, name, found)]


def _restored(state: Mapping[str, Any]) -> History:
    made = History(provenance="public")
    made.load_state_dict(state)
    return made
