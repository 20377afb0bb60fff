"""What the tables of a run show, on screen and as Markdown."""

from typing import Any

from pyml.methods._head_report import COST_TITLE, COSTS, FILES, recipe, shown_columns, title
from pyml.methods._sweep import Tables, mean_and_spread


def tables(facts: dict[str, Any]) -> Tables:
    """The columns of a run, by what its tasks have."""
    scores = shown_columns(facts, "behaviour")
    if facts.get("second"):
        scores = {**scores, f"{facts['second']}, %": mean_and_spread("second_behaviour", 1)}
    scores = {**scores, **{f"{name}, %": mean_and_spread(f"other_{name}", 1) for name in facts.get("others", ())}}
    return Tables(scores, COSTS, title, recipe, COST_TITLE, FILES, "arm")
