"""What tests of ops share: the layouts of a tensor in memory, the arguments of a batch, which kernels run here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyml.backend import load_extension
from pyml.ops import Op
from tests.cases import Sample, samples, tensors_of

GENERIC = ("tests/test_ops.py", "tests/test_ops_torch.py", "tests/test_ops_inplace.py")


def leaves(op: Op, values: dict[str, Any]) -> list[str]:
    return [n for n in op.gradients if isinstance(values[n], Tensor)]


def first(op: Op, *flags: str) -> Sample:
    return next(s for s in samples(op) if all(getattr(s, flag) for flag in flags) and not s.empty)


def batch_of(op: Op, values: dict[str, Any]) -> list[str]:
    """Names of the tensors that share the free batch dimension 0."""
    names = op.batched or [n for n, v in values.items() if isinstance(v, Tensor)][:1]
    return [n for n in names if isinstance(values[n], Tensor)]


def of_rows(t: Tensor, rows: int) -> Tensor:
    """The tensor repeated along its batch dimension until it has this size there."""
    return torch.cat([t.detach()] * rows)[:rows].clone().requires_grad_(t.requires_grad)


def total(result: Any) -> Tensor:
    """One number that every output moves."""
    outputs = [t for y in (result if isinstance(result, tuple) else (result,)) for t in tensors_of(y)]
    return torch.stack([(y if y.is_floating_point() else y.double()).sin().sum().double() for y in outputs]).sum()


def skip_unless(claimed: bool, what: str) -> None:
    if not claimed:
        pytest.skip(f"the op does not claim {what}")


def torch_op(op: Op, backend: str, direction: str) -> Any:
    return getattr(torch.ops.pyml, f"{op.name}_{direction}{'_triton' if backend == 'triton' else ''}").default


def strided(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.dim() > 1 else t


DENSE_LAYOUTS = (strided, transposed, offset)  # every element has a place of its own


# --- tests of the GPU kernels of one family, which run on every kind of kernel ------------------------------------


def emulated() -> bool:
    """Whether the extension is the CUDA kernels on a CPU, see tests/cuda_emulation.py."""
    if load_extension() is not None:
        return False
    from pyml import _C

    return "emulation" in _C.build_info()["isa"]


def skip_on_tensor_cores(backend: str) -> None:
    """For a test of what plain float32 sums give: Triton's products of 16 bits are those of a GPU's tensor cores."""
    if backend == "triton":
        pytest.skip("triton: products of 16-bit inputs are those of the tensor cores")


def with_and_without_room(triton_holds_little: Callable[[pytest.MonkeyPatch], None]) -> Any:
    """A fixture for a module to call ``tight``: once, the ``kernel`` holds next to nothing, so that small inputs take
    the ways of large ones."""

    @pytest.fixture(params=[False, True], ids=["roomy", "tight"])
    def tight(request: pytest.FixtureRequest, kernel: str, monkeypatch: pytest.MonkeyPatch) -> bool:
        if not request.param:
            return False
        if kernel == "triton":
            triton_holds_little(monkeypatch)
        elif emulated():
            monkeypatch.setenv("PYML_EMULATION_PROGRAMS", "1")
        else:
            pytest.skip(f"{kernel}: its sizes are fixed")
        return True

    return tight
