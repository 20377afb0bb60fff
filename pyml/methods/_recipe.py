"""The numbers of a training run that every method has, and one sentence for a number that cannot work."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from pyml.methods import UserError


class Rule(NamedTuple):
    """What a value must be. Every comparison with NaN is false, so no rule of comparisons lets it through."""

    text: str
    holds: Callable[[Any], bool]


COUNT = Rule("at least 1", lambda value: 1 <= value < math.inf)
FROM_ZERO = Rule("at least 0", lambda value: 0 <= value < math.inf)
POSITIVE = Rule("a finite number > 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("a finite number >= 0", lambda value: 0 <= value < math.inf)
SHARE = Rule("a number between 0 and 1", lambda value: 0 < value < 1)


def among(known: Iterable[str]) -> Rule:
    """One of these names."""
    names = tuple(known)
    return Rule(f"one of {', '.join(names)}", names.__contains__)


def require(name: str, value: Any, rule: Rule) -> None:
    """Raise one sentence where the value breaks the rule; a field is called as its option is."""
    if not rule.holds(value):
        raise UserError(f"{name.replace('_', '-')}: expected {rule.text}, got {value!r}")


@dataclass(frozen=True)
class Recipe:
    """The options that every method has. A method adds its own with their rules, and its own defaults."""

    known_archs: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[Mapping[str, Rule]] = {}  # of the fields that a method adds
    spelled: ClassVar[Mapping[str, str]] = {"archs": "arch"}  # options of the command line, where fields are no name

    archs: tuple[str, ...] = ()
    seeds: int = 1
    first_seed: int = 0
    epochs: int = 1
    batch_size: int = 1
    learning_rate: float = 1e-3

    @property
    def seed_range(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def check(self) -> None:
        """Raise one sentence for a value that cannot work."""
        for arch in self.archs:
            require(self.spelled["archs"], arch, among(self.known_archs))
        shared = {
            "seeds": COUNT, "first_seed": FROM_ZERO, "epochs": COUNT, "batch_size": COUNT, "learning_rate": POSITIVE,
        }  # fmt: skip
        for name, rule in {**shared, **self.rules}.items():
            require(self.spelled.get(name, name), getattr(self, name), rule)
