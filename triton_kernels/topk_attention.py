"""Triton launchers of the top-k attention family, as the torch ops find them.

The kernels are in topk_attention_region*.py, topk_attention_route.py and topk_attention_token*.py.
"""

from pyml.triton_kernels.topk_attention_region import region_attention_fwd
from pyml.triton_kernels.topk_attention_region_bwd import region_attention_bwd
from pyml.triton_kernels.topk_attention_route import route_regions_fwd
from pyml.triton_kernels.topk_attention_token import topk_attention_fwd
from pyml.triton_kernels.topk_attention_token_bwd import topk_attention_bwd

__all__ = [
    "region_attention_bwd",
    "region_attention_fwd",
    "route_regions_fwd",
    "topk_attention_bwd",
    "topk_attention_fwd",
]
