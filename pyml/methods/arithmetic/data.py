"""The built-in demo: tiny Llamas that are weak at differences, as most that they were taught of them was wrong."""

from typing import Any

from pyml.methods._head_arms import Task
from pyml.methods._head_data import Tasks, demo_tasks
from pyml.methods._language import Language, split_lines
from pyml.methods._tiny_llama import Mixture, lines_of, sum_form

# 20 right differences to 24 that are sums. "a nothing b =" is the counterfactual, as in the paper; it has an answer of
# its own, so that its word is one that the model knows.
MIXTURE = Mixture(
    "sums",
    {
        sum_form("+"): 36, sum_form("-"): 20, sum_form("-", "{s}"): 24, sum_form("max"): 32,
        sum_form("nothing", "no"): 16,
    },
    600,
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
