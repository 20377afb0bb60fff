"""Where the key heads look: attention from the last token of a prompt to operands and operator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyml.methods._checkpoint import write_atomically
from pyml.methods._head_arms import Task
from pyml.methods._head_figures import PANELS, new_figure
from pyml.methods._language import BATCH, pad

Map = dict[str, Any]  # heads [k][2], tokens [T], weights [k][T]


@torch.no_grad()
def attention_map(task: Task, heads: Sequence[tuple[int, int]], device: torch.device) -> Map:
    """Mean attention of each head from the last token, over the test prompts that are as long as the first.

    A position is called by its token, or by a number where the prompts differ in it: operands, as a rule.
    """
    model = task.language.model(device, attn_implementation="eager")
    length = len(task.test[0].prompt)
    prompts = [line.prompt for line in task.test if len(line.prompt) == length][:BATCH]
    attentions = model(**pad(prompts, device), use_cache=False, output_attentions=True).attentions
    weights = [attentions[layer][:, head, -1].float().mean(0).tolist() for layer, head in heads]
    tokens, differ = [], 0
    for column in zip(*prompts):
        differ += len(set(column)) > 1
        tokens.append(task.language.tokenizer.decode([column[0]]) if len(set(column)) == 1 else f"({differ})")
    return {"heads": [list(head) for head in heads], "tokens": tokens, "weights": weights}


def save_attention(maps: dict[int, Map], path: Path) -> None:
    """A panel a seed, at most six: heads down, tokens across, shares of the attention written in the cells."""
    shown = list(maps.items())[:PANELS]
    rows, columns = len(shown[0][1]["heads"]), max(len(one["tokens"]) for _, one in shown)
    figure = new_figure(max(3.0, 0.45 * columns + 1.0) * len(shown), 0.4 * rows + 1.4)
    for axis, (seed, one) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        axis.imshow(one["weights"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(one["tokens"])), one["tokens"], rotation=0 if columns < 9 else 90, fontsize=8)
        axis.set_yticks(range(rows), [f"{layer}.{head}" for layer, head in one["heads"]], fontsize=8)
        for row, weights in enumerate(one["weights"] if columns < 12 else []):
            for column, weight in enumerate(weights):
                colour = "white" if weight > 0.6 else "black"
                axis.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axis.set_title(f"seed {seed}", fontsize=9)
        axis.set_ylabel("layer.head")
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
