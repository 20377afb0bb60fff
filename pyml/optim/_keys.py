"""The two secrets of a run: the key of its noise and that of its batches."""

import hashlib
import os

import torch
from torch import Tensor

from pyml.ops import _check
from pyml.privacy import new_key


def keys(op: str, seed: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The key of the noise, int64 ``[1]``, and that of the batches, uint8 ``[32]``."""
    if seed is None:
        return new_key(device), torch.tensor(list(os.urandom(32)), dtype=torch.uint8, device=device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        _check.fail(op, "seed", "None, or an integer of 64 bits", repr(seed))
    batches = list(hashlib.sha256(seed.to_bytes(8, "little", signed=True)).digest())
    key = torch.tensor([seed], dtype=torch.int64, device=device)
    return key, torch.tensor(batches, dtype=torch.uint8, device=device)
