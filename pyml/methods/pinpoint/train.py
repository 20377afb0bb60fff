"""Arms and options of pinpoint tuning, and a whole run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pyml.methods._head_arms import HeadOptions, arms
from pyml.methods._head_data import Tasks
from pyml.methods._head_search import Experiment, Other
from pyml.methods.pinpoint.data import talk_tasks as demo
from pyml.methods.pinpoint.report import tables
from pyml.methods.pinpoint.steering import steer_gaussian, steer_heads, steer_layer

__all__ = ["ARMS", "DEMO", "FILES", "Options", "demo", "tables", "train"]

KINDS = arms("spt")
OTHERS: dict[str, Other] = {"steer": steer_heads, "steer-gaussian": steer_gaussian, "steer-layer": steer_layer}
ARMS = (*KINDS, *OTHERS)
# The tiny Llama's numbers are ours; 3e-5 is what the published procedure's script has, the rate of full tuning is ours.
DEMO = {"epochs": 40, "learning_rate": 3e-3, "full_rate": 3e-4}
FILES = {"epochs": 3, "learning_rate": 3e-5, "full_rate": 1e-5}


@dataclass(frozen=True)
class Options(HeadOptions):
    """Those of all methods on heads; q and o are the projections that the published procedure trains."""

    known_archs: ClassVar = ARMS

    archs: tuple[str, ...] = ("spt",)


def train(
    tasks: Tasks, options: Options, out: Path, *, resume: bool = False, device: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Find the heads of every seed's model, knock heads out, and train or steer every arm.

    ``out`` gets ``config.json``, ``metrics.json``, ``table.md``, ``heads.png``, ``knockout.png``,
    ``heads/seed<k>.json``, and in ``<arm>/seed<k>/`` checkpoint (of what is trained alone), logs and, where heads were
    tuned, ``heads.safetensors`` for ``pyml heads merge``.

    Returns:
        The content of ``metrics.json``.
    """
    options.check()
    experiment = Experiment("pinpoint", tasks, KINDS, options, out, OTHERS)
    return experiment.run(tasks.facts, tables(tasks.facts), resume=resume, device=device, quiet=quiet)
