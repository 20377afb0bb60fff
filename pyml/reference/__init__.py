"""Plain torch versions of every op: slow, shaped like the papers; the truth for tests, the baselines of benchmarks."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that ops compute in: float64 when any input has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
