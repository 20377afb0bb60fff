"""Optimizers. `HeteroNoiseOptimizer` trains with differential privacy around any torch optimizer; `make_private` sets
it up with Opacus' per-sample gradients and Poisson batches. What is private, and when: `pyml.privacy`."""

from pyml.optim.ghost import GhostNoiseOptimizer
from pyml.optim.hetero_noise import HeteroNoiseOptimizer
from pyml.optim.private import PoissonBatches, make_private

__all__ = ["GhostNoiseOptimizer", "HeteroNoiseOptimizer", "PoissonBatches", "make_private"]
