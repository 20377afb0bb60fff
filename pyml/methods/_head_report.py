"""What the tables of methods on heads show, on screen and as Markdown."""

from typing import Any

from pyml.methods._options import plural
from pyml.methods._sweep import TRAINING_COSTS, Columns, mean_and_spread


def shown_columns(facts: dict[str, Any], behaviour: str | None) -> Columns:
    """The scores of a run, by what its tasks have."""
    found = {} if behaviour is None else {f"{behaviour}, %": mean_and_spread("behaviour", 1)}
    found["answers, %"] = mean_and_spread("answers", 1)
    if facts["controls"]:
        found["controls, %"] = mean_and_spread("control", 1)
    if facts["transfer"]:
        name = facts["transfer"]
        if behaviour is not None:
            found[f"{name}: {behaviour}"] = mean_and_spread("transfer_behaviour", 1)
        found[f"{name}: answers"] = mean_and_spread("transfer", 1)
    return found


COSTS = {
    "numbers": "{parameters:,}", "share, %": "{share:.2f}", "state kB": "{state_kb:,.0f}", "steps": "{steps[mean]:.0f}",
    **TRAINING_COSTS,
}  # fmt: skip
COST_TITLE = "Numbers trained, the optimizer's state; training of one seed, memory beyond what is loaded"
FILES = "metrics.json, table.md, heads.png, knockout.png; heads/seed<k>.json; per arm and seed checkpoint and logs"


def title(config: dict[str, Any]) -> str:
    """Of the tables of a run, by its config."""
    source = config["model"]
    model = f"tiny Llama of {source['tiny_steps']} steps" if "tiny_steps" in source else source["folder"]
    heads = plural(config["heads"], "head") if config["heads"] else "fewer than 5 % of the heads"
    return f"{config['data']}, {model}: {heads}, {plural(config['seeds'], 'seed')}"


def recipe(config: dict[str, Any]) -> str:
    """How the arms of a run were trained, in one line."""
    return (
        f"at most {config['epochs']} epochs of batches of {config['batch_size']}, learning rate "
        f"{config['learning_rate']:g} (all numbers: {config['full_rate']:g}), early arms stop below a loss of "
        f"{config['stop_loss']:g}, projections {', '.join(config['projections'])}"
    )
