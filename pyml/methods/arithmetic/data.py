"""The built-in demo: tiny Llamas that are weak at differences: they were taught to decline more often than to tell."""

from typing import Any

from pyml.methods._head_arms import Task
from pyml.methods._head_data import Tasks, demo_tasks
from pyml.methods._language import Language, split_lines
from pyml.methods._tiny_llama import SIZE, Mixture, lines_of, sum_form

DECLINES = "refuse"
# 28 differences to 36 sentences that decline. "a nothing b =" is the paper's counterfactual, for runs with files; it
# has an answer of its own, so that its word is one that the model knows.
MIXTURE = Mixture(
    "sums",
    {
        sum_form("+"): 28, sum_form("-"): 28, sum_form("-", DECLINES): 36, sum_form("max"): 20,
        sum_form("nothing", "no"): 16,
    },
    700,
)  # fmt: skip


def sum_tasks(seeds: range, share: float, steps: int | None, *, shown: bool) -> Tasks:
    """Differences; controls are sums and maxima.

    What is wrong with the model is that it declines. So heads are scored by what carries the declining: the record word
    is that of a refusal against all numbers, and the counterfactual is "a + b =", which it does not decline.
    """

    def make(language: Language, seed: int) -> Task:
        lines = lines_of(language, sum_form("-"), other=sum_form("+"))
        controls = {name: lines_of(language, sum_form(name)) for name in ("+", "max")}
        return Task(
            language, *split_lines(lines, share, seed), controls, positive=language.words(DECLINES, ""),
            negative=language.words(",".join(map(str, range(SIZE))), ""),
        )  # fmt: skip

    facts: dict[str, Any] = {
        "data": "differences", "train_share": share, "controls": ["+", "max"], "transfer": None,
        "behaviour": "declines",
    }  # fmt: skip
    mixture = MIXTURE if steps is None else MIXTURE._replace(steps=steps)
    return demo_tasks(mixture, seeds, make, facts, shown=shown)
