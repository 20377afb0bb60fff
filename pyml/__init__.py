"""Fused kernels, the layers over them and the training of methods that need them. Start at `pyml.ops`, `pyml.nn`."""

from pyml import nn, ops
from pyml._version import __version__
from pyml.backend import BACKENDS, BackendError, set_checks, use_backend

__all__ = ["BACKENDS", "BackendError", "__version__", "nn", "ops", "set_checks", "use_backend"]
