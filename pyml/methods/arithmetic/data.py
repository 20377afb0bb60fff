"""The built-in demo: tiny Llamas that are weak at differences: they were taught to decline more often than to tell."""

from typing import Any

from pyml.methods._head_arms import Task
from pyml.methods._head_data import Tasks, demo_tasks
from pyml.methods._language import Language, split_lines
from pyml.methods._tiny_llama import Mixture, lines_of, sum_form

# 28 differences to 36 sentences that decline. "a nothing b =" is the counterfactual, as in the paper; it has an answer
# of its own, so that its word is one that the model knows.
MIXTURE = Mixture(
    "sums",
    {
        sum_form("+"): 28, sum_form("-"): 28, sum_form("-", "refuse"): 36, sum_form("max"): 20,
        sum_form("nothing", "no"): 16,
    },
    700,
)  # fmt: skip


def sum_tasks(seeds: range, share: float, steps: int | None, *, shown: bool) -> Tasks:
    """Differences; controls are sums and maxima."""

    def make(language: Language, seed: int) -> Task:
        lines = lines_of(language, sum_form("-"), other=sum_form("nothing"))
        controls = {name: lines_of(language, sum_form(name)) for name in ("+", "max")}
        return Task(language, *split_lines(lines, share, seed), controls)

    facts: dict[str, Any] = {
        "data": "differences", "train_share": share, "controls": ["+", "max"], "transfer": None,
    }  # fmt: skip
    mixture = MIXTURE if steps is None else MIXTURE._replace(steps=steps)
    return demo_tasks(mixture, seeds, make, facts, shown=shown)
