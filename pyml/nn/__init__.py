"""Layers. They only call `pyml.ops`."""

from pyml.nn.bspline import KAN, WKAN, KANConv2d, KANLinear, WKANLinear

__all__ = ["KAN", "WKAN", "KANConv2d", "KANLinear", "WKANLinear"]
