"""Layers. They only call `pyml.ops`."""

from pyml.nn.batched_ot import OTAlignment
from pyml.nn.bspline import KAN, WKAN, KANConv2d, KANLinear, WKANLinear
from pyml.nn.enla import EnLa
from pyml.nn.head_update import HeadLinear, HeadLora
from pyml.nn.hetero_noise import HeteroNoise
from pyml.nn.lsnet import LSNet
from pyml.nn.topk_attention import BiLevelRoutingAttention, TopKAttention

__all__ = [
    "KAN",
    "WKAN",
    "BiLevelRoutingAttention",
    "EnLa",
    "HeadLinear",
    "HeadLora",
    "HeteroNoise",
    "KANConv2d",
    "KANLinear",
    "LSNet",
    "OTAlignment",
    "TopKAttention",
    "WKANLinear",
]
