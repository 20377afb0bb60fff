"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._head_report import COST_TITLE, COSTS, FILES, recipe, shown_columns, title
from pyml.methods._sweep import Tables


def tables(facts: dict[str, Any]) -> Tables:
    """The columns of a run, by what its tasks have."""
    return Tables(
        shown_columns(facts, facts.get("behaviour")), COSTS, title, recipe, COST_TITLE, f"attention.png, {FILES}", "arm"
    )
