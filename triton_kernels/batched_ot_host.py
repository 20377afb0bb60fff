"""What the launchers of optimal transport work out before they launch: dtypes, where problems lie, block shapes."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyml.triton_kernels import next_power
from torch import Tensor

from pyml.reference.batched_ot import compute_dtype

MOST_IN_REGISTERS = 16384  # entries of a problem, padded to powers of two
LANGUAGE = {torch.float64: tl.float64, torch.float32: tl.float32}
Place = tuple[int, int, int, int, int]  # see `located`


@dataclass(frozen=True)
class Problems:
    """Host-side facts of one call: weights as dense rows, the cost where it lies."""

    wide: torch.dtype  # every sum runs in it
    batch: int
    n: int
    m: int
    cost: Tensor
    place: Place  # of the cost
    weights: tuple[Tensor, Tensor]  # the cost stands for what is missing
    eps: Tensor
    constants: dict[str, Any]

    def rows(self, t: Tensor) -> Tensor:
        """Small tensors, dense and in the dtype of the sums."""
        return t.to(self.wide).contiguous()

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.cost.device)

    def number(self, value: float) -> Tensor:
        """A float argument would have 32 bits."""
        return torch.full((1,), value, dtype=self.wide, device=self.cost.device)

    @property
    def single(self) -> bool:
        """Whether a whole problem is one tile in registers."""
        return self.constants["N"] * self.constants["M"] <= MOST_IN_REGISTERS

    @property
    def options(self) -> dict[str, int]:
        entries = self.constants["N"] * self.constants["M"]
        warps = min(16, max(1, entries // 1024)) if self.single else 8
        return {"num_warps": warps, "num_stages": 1}

    def scratch(self, rows: int, columns: int) -> Tensor:
        """Room of a program for its matrix and some vectors, where registers do not hold them."""
        if self.single:
            return self.new(self.batch, 0)
        return self.new(self.batch, self.n * self.m + rows * self.n + columns * self.m)


def located(t: Tensor) -> tuple[Tensor, Place]:
    """A tensor ``[..., n, m]`` and where its entries lie: inner, outer stride, inner stride, the strides of n and m.

    Problem q begins at q // inner * outer stride + q % inner * inner stride. Leading dimensions that lie one behind the
    other count as one; three or more that do not are copied.
    """
    found: list[list[int]] = []
    for size, stride in zip(t.shape[:-2], t.stride()[:-2]):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = [found[-1][0] * size, stride]
        else:
            found.append([size, stride])
    if len(found) > 2:
        return located(t.contiguous())
    outer, inner = [[1, 0]] * (2 - len(found)) + found
    return t, (inner[0], outer[1], inner[1], t.stride(-2), t.stride(-1))


def grid(batch: int, n: int, m: int, block_n: int, block_m: int) -> tuple[int]:
    """A program for each block of a matrix ``[batch, n, m]``, see `block_of`."""
    return (batch * triton.cdiv(n, block_n) * triton.cdiv(m, block_m),)


def problems(cost: Tensor, a: Tensor | None, b: Tensor | None, eps: float, in_double: bool = False) -> Problems:
    wide = torch.float64 if in_double else compute_dtype(cost, a, b)
    n, m = cost.shape[-2:]
    t, place = located(cost)
    batch = cost.shape[:-2].numel()
    dense = tuple(t if w is None else w.to(wide).contiguous() for w in (a, b))
    constants = {
        "HAS_A": a is not None, "HAS_B": b is not None, "ACC": LANGUAGE[wide], "N": next_power(n), "M": next_power(m),
    }  # fmt: skip
    number = torch.full((1,), eps, dtype=wide, device=cost.device)
    return Problems(wide, batch, n, m, t, place, (dense[0], dense[1]), number, constants)
