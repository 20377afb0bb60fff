"""What a run has spent: phases of (multiplier, sample rate, steps), kept and saved with the optimizer."""

import os
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
        by: a mark of whoever records here, random and new in each process: steps of one mark are those of one run,
            so that two histories which have them count them once, and other runs with the same settings are others.
        adaptive: whether a multiplier depended on outputs of the run; then there is no finite epsilon.
        scales: the prices of the scales that were paid for, by their digests; and of runs that `include` has added.
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
        self.adaptive = False
        self.scales: dict[str, tuple[sources.Provenance, ...]] = {}
        self.by = _mark()
        # (by, multiplier, rate): steps and their total variation
        self._recorded: dict[tuple[str, float, float], tuple[int, float]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another one, who may record what this one does not."""
        self.__dict__.update(state, by=_mark(), _recorded=dict(state["_recorded"]))

    @property
    def phases(self) -> tuple[arguments.Phase, ...]:
        found: dict[tuple[float, float], int] = {}
        for (_, multiplier, rate), (steps, _) in self._recorded.items():
            found[multiplier, rate] = found.get((multiplier, rate), 0) + steps
        return tuple((multiplier, rate, steps) for (multiplier, rate), steps in found.items())

    @property
    def total_variation(self) -> float:
        return sum(distance for _, distance in self._recorded.values())

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self._recorded.values())

    def record(
        self, multiplier: float, sample_rate: float, steps: int = 1, *, total_variation: float = 0.0,
        adaptive: bool = False, by: str | None = None,
    ) -> None:  # fmt: skip
        """Count steps, those with an empty batch too.

        Each pair of multiplier and rate is a phase, and `epsilon` takes about a second for each: where a schedule
        lowers the noise, lower it once an epoch, not at each step. Multipliers within 1e-4 are accounted for together.

        Args:
            multiplier, sample_rate, steps: as in `epsilon`.
            total_variation: of one step.
            adaptive: the multiplier or the rate was chosen from earlier outputs of the run.
            by: the mark of the run, by default that of this history.
        """
        multiplier, rate, steps = arguments.phase("History.record", multiplier, sample_rate, steps)
        distance = arguments.not_negative("History.record", "total_variation", total_variation)
        key = (self.by if by is None else by, multiplier, rate)
        before, so_far = self._recorded.get(key, (0, 0.0))
        self._recorded[key] = before + steps, so_far + steps * distance
        self.adaptive |= bool(adaptive)

    def include(self, other: "History") -> None:
        """Add another run on the same records, such as the training of the guide: both are released.

        Everything of the other counts, its provenance, its sampling and its noise too; the worse of the two stays.
        """
        known = {by for by, _, _ in self._recorded}
        marks: dict[str, str] = {}
        for (by, multiplier, rate), spent in list(other._recorded.items()):
            if by not in marks:
                marks[by] = by
                while marks[by] in known:  # included again: it counts again
                    marks[by] += "+"
                known.add(marks[by])
            self._recorded[marks[by], multiplier, rate] = spent
        self.adaptive |= other.adaptive
        self.pay("run " + next(iter(marks.values()), other.by), other.provenance)
        self._worse(other)

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

    def keep(self, before: "History") -> None:
        """Take in what this history, of a checkpoint, does not have of the one whose place it takes."""
        for key, (steps, distance) in before._recorded.items():
            known = self._recorded.get(key, (0, 0.0))
            self._recorded[key] = max(steps, known[0]), max(distance, known[1])
        self.adaptive |= before.adaptive
        self._worse(before)
        for digest, prices in before.scales.items():
            if digest not in self.scales:
                self.pay(digest, prices)
        self.provenance += tuple(p for p in before.provenance if p not in self.provenance)

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
            "recorded": [[*key, *spent] for key, spent in self._recorded.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place of a saved history. A state that is not whole is refused, and nothing changes."""
        op = "History.load_state_dict"
        if not isinstance(state, Mapping):
            _check.fail(op, "state", "the entries of state_dict()", type(state).__name__, TypeError)
        missing = {"format", *self.state_dict()} - {"scales", "recorded"} - set(state)  # states of before have neither
        if missing:
            _check.fail(op, "state", "the entries of state_dict()", f"one without {', '.join(sorted(missing))}")
        if state["format"] != FORMAT:
            _check.fail(op, "state", f"format {FORMAT}", state["format"])
        phases = [list(arguments.phase(op, *phase)) for phase in _lists(op, "phases", state["phases"], 3)]
        whole = arguments.not_negative(op, "total_variation", state["total_variation"])
        # not known whose they are: of nobody who is known
        nobody = [[self.by, *phase, 0.0 if n else whole] for n, phase in enumerate(phases)]
        state = {"scales": {}, "recorded": nobody, **state}
        for name, kind in (("adaptive", bool), ("facts", Mapping), ("scales", Mapping)):
            if not isinstance(state[name], kind):
                _check.fail(op, name, f"a {kind.__name__.lower()}", type(state[name]).__name__, TypeError)
        provenance = _sources(op, "provenance", state["provenance"])
        loaded = History(provenance=provenance, sampling=state["sampling"], noise=state["noise"], facts=state["facts"])
        for by, multiplier, rate, steps, distance in _lists(op, "recorded", state["recorded"], 5):
            multiplier, rate, steps = arguments.phase(op, multiplier, rate, steps)
            distance = arguments.not_negative(op, "total_variation", distance)
            loaded._recorded[str(by), multiplier, rate] = steps, distance
        if [list(phase) for phase in loaded.phases] != phases or loaded.total_variation < whole * (1 - 1e-9):
            _check.fail(op, "recorded", f"what adds up to the phases {phases}", loaded.phases)
        loaded.adaptive = state["adaptive"]
        loaded.scales = {str(name): tuple(_sources(op, "scales", one)) for name, one in state["scales"].items()}
        self.__dict__.update(loaded.__dict__)


def _mark() -> str:
    return os.urandom(8).hex()


def _lists(op: str, name: str, found: Any, size: int) -> list[list[Any]]:
    if not isinstance(found, list | tuple) or any(not isinstance(a, list | tuple) or len(a) != size for a in found):
        _check.fail(op, name, f"a list of {'triples' if size == 3 else f'lists of {size}'}", repr(found), TypeError)
    return [list(one) for one in found]


def _plain(provenance: Sequence[sources.Provenance]) -> list[list[Any]]:
    return [[p.kind, p.epsilon, p.delta] for p in provenance]


def _sources(op: str, name: str, found: Any) -> list[sources.Provenance]:
    return [sources.Provenance(*one) for one in _lists(op, name, found, 3)]
