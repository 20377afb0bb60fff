"""Arms and options of precise arithmetic tuning, and a whole run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pyml.methods._checkpoint import write_json
from pyml.methods._engine import make_accelerator
from pyml.methods._head_arms import PROJECTIONS, HeadOptions, arms
from pyml.methods._head_data import Tasks
from pyml.methods._head_search import Experiment
from pyml.methods.arithmetic.data import sum_tasks as demo
from pyml.methods.arithmetic.figures import attention_map, save_attention
from pyml.methods.arithmetic.report import tables

__all__ = ["ARMS", "DEMO", "FILES", "Options", "demo", "tables", "train"]

KINDS = arms("precise")
ARMS = tuple(KINDS)
LOOKED_AT = 8  # heads in the attention map
# The tiny Llama's numbers are ours; 2e-5 over 2 epochs is what a reading note of the paper says, the paper itself was
# not read for it; the rate of full tuning is ours.
DEMO = {"epochs": 40, "learning_rate": 3e-3, "full_rate": 3e-4}
FILES = {"epochs": 2, "learning_rate": 2e-5, "full_rate": 1e-5}


@dataclass(frozen=True)
class Options(HeadOptions):
    """Those of all methods on heads; all four projections are tuned, with gradients scaled by the heads of a layer over
    its tuned ones."""

    known_archs: ClassVar = ARMS

    archs: tuple[str, ...] = ("precise",)
    projections: tuple[str, ...] = PROJECTIONS
    scale_gradients: bool = True
    ablation: str = "mean"


def train(
    tasks: Tasks, options: Options, out: Path, *, resume: bool = False, device: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Find the heads of every seed's model that compute, knock heads out, and train every arm.

    ``out`` gets what `pyml.methods.pinpoint.train.train` writes, and ``attention.png``.

    Returns:
        The content of ``metrics.json``.
    """
    options.check()
    experiment = Experiment("arithmetic", tasks, KINDS, options, out)
    metrics = experiment.run(tasks.facts, tables(tasks.facts), resume=resume, device=device, quiet=quiet)
    where = make_accelerator(device).device
    maps = {}
    for seed in options.seed_range:
        found = experiment.found(seed, where)
        heads = found.key_heads(min(LOOKED_AT, found.size[0] * found.size[1]))
        maps[seed] = attention_map(tasks(seed), heads, where)
        metrics["heads"][str(seed)]["attention"] = maps[seed]
    write_json(out / "metrics.json", metrics)
    save_attention(maps, out / "attention.png")
    return metrics
