"""Where a scale comes from, and so what it costs: a scale that saw private records is itself a release about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyml.ops import _check
from pyml.privacy import _arguments as arguments

FREE = {
    "public": "made without the private records",
    "released_iterate": "an earlier output of the same run: post-processing",
}
REFUSED = {
    "unknown": "the provenance of the scale is unknown: it may depend on the private records",
    "private_batch": "the scale depends on the current private batch, and its use releases it",
}


@dataclass(frozen=True)
class Provenance:
    """Where a scale, or a model that guides it, comes from.

    Attributes:
        kind: "public" (made without the private records), "released_iterate" (an earlier DP output of the same run,
            such as its last weights; free by post-processing), "dp" (made from the private records by a mechanism with
            ``epsilon`` and ``delta``, which are composed with the run), "private_batch" or "unknown" (no finite
            epsilon).
        epsilon, delta: of "dp": add/remove adjacency, as everywhere here.
    """

    kind: str
    epsilon: float = 0.0
    delta: float = 0.0

    def __post_init__(self) -> None:
        op = "provenance"
        _check.member(op, "kind", self.kind, (*FREE, "dp", *REFUSED))
        if self.kind == "dp":
            arguments.number(op, "epsilon", self.epsilon, "a number >= 0", lambda v: v >= 0)
            arguments.share(op, "delta", self.delta)
        elif self.epsilon or self.delta:
            expected = f'nothing beside "{self.kind}" (only "dp" has a price)'
            _check.fail(op, "epsilon, delta", expected, (self.epsilon, self.delta))

    def __str__(self) -> str:
        return f"dp(epsilon={self.epsilon:g}, delta={self.delta:g})" if self.kind == "dp" else self.kind


def dp(epsilon: float, delta: float) -> Provenance:
    """A scale made from the private records by an (epsilon, delta)-DP mechanism; its price is added to the run's."""
    price = arguments.number("provenance", "epsilon", epsilon, "a number >= 0", lambda v: v >= 0)
    return Provenance("dp", price, arguments.share("provenance", "delta", delta))


def parse(op: str, provenance: Any) -> tuple[Provenance, ...]:
    """A name, a `Provenance`, or a list of them: a scale made of several sources pays for all."""
    if isinstance(provenance, Provenance):
        return (provenance,)
    if isinstance(provenance, str):
        if provenance == "dp":
            _check.fail(op, "provenance", "pyml.privacy.dp(epsilon, delta), as a DP scale has a price", "'dp' alone")
        _check.member(op, "provenance", provenance, (*FREE, *REFUSED))
        return (Provenance(provenance),)
    if isinstance(provenance, Sequence) and provenance:
        return tuple(p for one in provenance for p in parse(op, one))
    expected = "one of " + ", ".join((*FREE, *REFUSED)) + ", pyml.privacy.dp(epsilon, delta), or a list of them"
    _check.fail(op, "provenance", expected, repr(provenance))


def refusal(sources: Sequence[Provenance]) -> str | None:
    """Why no finite epsilon may be stated, or None."""
    for source in sources:
        if source.kind in REFUSED:
            return REFUSED[source.kind]
        if source.kind == "dp" and math.isinf(source.epsilon):
            return "the scale was made by a mechanism without a finite epsilon"
    return None
