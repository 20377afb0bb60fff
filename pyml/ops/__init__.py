"""The functional ops, one file a family. `OPS` lists all that are registered."""

from pyml.ops._registry import OPS, Capability, Op
from pyml.ops.batched_ot import SinkhornResult, pairwise_cost, sinkhorn, sinkhorn_plan, sinkhorn_points, sinkhorn_solve
from pyml.ops.bspline import bspline_basis, kan_linear, outside_fraction, wkan_conv2d, wkan_linear
from pyml.ops.head_update import adamw_slices_, head_edit, head_edit_, head_linear
from pyml.ops.hetero_noise import clip_sum, hetero_noise, hetero_noise_, hetero_noise_sgd_
from pyml.ops.topk_attention import region_attention, route_regions, topk_attention

__all__ = [
    "OPS",
    "Capability",
    "Op",
    "SinkhornResult",
    "adamw_slices_",
    "bspline_basis",
    "clip_sum",
    "head_edit",
    "head_edit_",
    "head_linear",
    "hetero_noise",
    "hetero_noise_",
    "hetero_noise_sgd_",
    "kan_linear",
    "outside_fraction",
    "pairwise_cost",
    "region_attention",
    "route_regions",
    "sinkhorn",
    "sinkhorn_plan",
    "sinkhorn_points",
    "sinkhorn_solve",
    "topk_attention",
    "wkan_conv2d",
    "wkan_linear",
]
