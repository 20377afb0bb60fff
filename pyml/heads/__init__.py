"""Heads of a causal LM: find those that carry a behaviour, train only their slices, steer them.

Finding: `path_patch`, `attribution_patch`, `knockout`. Choosing: `top_k`, `share`, `threshold`. Training: `HeadTuner`,
`SliceAdamW`, `merge`. Steering: `HeadSteering`, `LayerSteering`. Layouts: `adapter`. The page: docs/heads.md.
"""

from pyml.heads.adapters import LAYOUTS, Adapter, adapter
from pyml.heads.edits import ablate, head_means
from pyml.heads.knockout import KnockoutCurve, knockout
from pyml.heads.optimizer import SliceAdamW
from pyml.heads.patching import attribution_patch, path_patch
from pyml.heads.reference import path_patch_loop
from pyml.heads.selection import PathScores, Selection, random_heads, share, threshold, top_k
from pyml.heads.steering import HeadSteering, LayerSteering
from pyml.heads.tuned import TunerReport, detach
from pyml.heads.tuner import HeadTuner, merge

__all__ = [
    "LAYOUTS",
    "Adapter",
    "HeadSteering",
    "HeadTuner",
    "KnockoutCurve",
    "LayerSteering",
    "PathScores",
    "Selection",
    "SliceAdamW",
    "TunerReport",
    "ablate",
    "adapter",
    "attribution_patch",
    "detach",
    "head_means",
    "knockout",
    "merge",
    "path_patch",
    "path_patch_loop",
    "random_heads",
    "share",
    "threshold",
    "top_k",
]
