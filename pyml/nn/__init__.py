"""Layers. They only call `pyml.ops`."""

from pyml.nn.bspline import KAN, WKAN, KANConv2d, KANLinear, WKANLinear
from pyml.nn.lsnet import LSNet
from pyml.nn.topk_attention import BiLevelRoutingAttention, TopKAttention

__all__ = [
    "KAN",
    "WKAN",
    "BiLevelRoutingAttention",
    "KANConv2d",
    "KANLinear",
    "LSNet",
    "TopKAttention",
    "WKANLinear",
]
