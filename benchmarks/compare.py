"""An older result file against the rows of this run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyml.methods import UserError
from pyml.methods._options import plural

from .jobs import Job
from .report import OK, Row

MARGIN = 1.10  # slower by more than this, and outside both spreads, is a regression


@dataclass
class Change:
    """pyml's median then and now, in one setting."""

    row: Row
    before: Row

    @property
    def ratio(self) -> float:
        return (self.row.median_s or 0.0) / (self.before.median_s or 1.0)

    @property
    def regression(self) -> bool:
        return self.ratio > MARGIN and (self.row.p20_s or 0.0) > (self.before.p80_s or 0.0)

    @property
    def text(self) -> str:
        r = self.row
        where = f"{plural(r.threads, 'thread')}, {r.allocator}" if r.threads else r.device
        return f"{r.case}, {r.mode}, {r.contender}, {r.dtype}, {where}"


def _key(row: Row) -> tuple[str, ...]:
    return (row.case, row.mode, row.device, row.dtype, row.precision, str(row.threads), row.allocator, row.contender)


def timed(rows: Sequence[Row]) -> list[Row]:
    """Those with a time of pyml."""
    return [r for r in rows if r.contender.startswith("pyml") and r.status == OK and r.median_s]


def check_old(old: Sequence[Row], path: Path, plan: Sequence[Job]) -> None:
    """Raise one sentence where the older run timed nothing that this one will, before an hour is spent."""
    settings = {(j.case.name, j.device, j.dtype, j.threads, j.allocator) for j in plan if j.case and j.kind == "time"}
    if not any((r.case, r.device, r.dtype, r.threads, r.allocator) in settings for r in timed(old)):
        raise UserError(f"bench: compare: expected a time of pyml in a setting of this run, got none in {path}")


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Every pyml row that both runs timed, the worst change first."""
    before = {_key(r): r for r in timed(old)}
    found = [Change(row, before[_key(row)]) for row in timed(new) if _key(row) in before]
    return sorted(found, key=lambda c: c.ratio, reverse=True)


def other_machine(old: Sequence[Row], new: Sequence[Row]) -> str | None:
    """A sentence when the two runs are not of the same machine and versions."""
    for name in ("cpu", "gpu", "cores", "torch"):
        a, b = getattr(old[0], name), getattr(new[0], name)
        if a != b:
            return f"The older run had another {name} ({a or 'none'}, now {b or 'none'}): times are not comparable."
    return None
