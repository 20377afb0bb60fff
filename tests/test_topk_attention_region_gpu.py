"""The GPU kernels of region attention and its router apart from the generic tests: bad indices, wide rows, limits.

They run on a GPU (--device cuda), and those of CUDA emulated (a session of tests/test_cuda_build.py). What Triton does
with a bad index in its interpreter, where arguments are on a CPU, is in tests/test_topk_attention_triton.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.testing import Sample, check
from tests.op_helpers import emulated, torch_op

OP = ops.OPS["region_attention"]

pytestmark = pytest.mark.kernels


@pytest.fixture
def backend(kernel: str, device: str) -> str:
    """The name under which the kernels of a GPU run here."""
    if device == "cpu" and not emulated():
        pytest.skip("these tests are of a GPU, or of the emulated CUDA kernels")
    return kernel


def call(device: str, D: int = 4, Dv: int = 2, P: int = 4, S: int = 3, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Arguments of the torch op without its options: 4 regions, two choices a region."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, P, S, n, generator=g).to(device, dtype) for n in (D, D, Dv))
    return [q, k, v, torch.tensor([[[[0, 1], [1, 2], [2, -1], [1, 1]]]], device=device)]


def gradients(backend: str, arguments: list[Any], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    out, lse, exact, _ = outputs
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return torch_op(OP, backend, "bwd")(grad, *arguments, out, lse, exact, [True] * 4)


@pytest.mark.parametrize("bad", [4, -2, 2**62, -(2**63)])
def test_an_index_out_of_range_is_not_read_and_sets_the_status_word(backend, device, bad):
    fwd = torch_op(OP, backend, "fwd")
    q, k, v, clean = call(device)
    wrong = clean.clone()
    wrong[0, 0, 1, 0], clean[0, 0, 1, 0] = bad, -1
    options = [None, None, None, None]
    expected = fwd(q, k, v, clean, *options)
    found = fwd(q, k, v, wrong, *options)
    assert expected[3].item() == 0 and found[3].item() == 1
    assert torch.equal(found[0], expected[0])
    got, truth = (gradients(backend, [q, k, v, index, *options], expected) for index in (wrong, clean))
    assert all(torch.equal(a, b) for a, b in zip(got, truth))


@pytest.mark.parametrize("bad", [3, -1, 2**62])
def test_counts_out_of_range_are_clamped_and_set_the_status_word(backend, device, bad):
    fwd = torch_op(OP, backend, "fwd")
    q, k, v, index = call(device)
    counts = torch.tensor([[[2, bad, 2, 1]]], device=device)
    wrong, clean = ([q, k, v, index, None, t, None, None] for t in (counts, counts.clamp(0, 2)))
    expected, found = (fwd(*arguments) for arguments in (clean, wrong))
    assert expected[3].item() == 0 and found[3].item() == 1
    assert torch.equal(found[0], expected[0])
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(backend, wrong, expected), gradients(backend, clean, expected))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(300, 70), (33, 5), (3, 90), (0, 33), (256, 256)], ids=str)
def test_rows_that_do_not_fit_in_registers(backend, device, dtype, sizes):
    """Several blocks of columns, where D and Dv need different numbers of them; few rows a block for the widest."""
    D, Dv = sizes
    if D > 256 and dtype == torch.float64:
        D = 200
    q, k, v, index = call(device, D, Dv, S=37, dtype=torch.float64)
    weight = torch.rand(1, 1, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {"q": q, "k": k, "v": v, "index": index, "scale": None, "counts": None, "key_mask": None}
    for more in ({"region_weight": None}, {"region_weight": weight}):
        check(OP, Sample(str(sizes), lambda generator, more=more: values | more), backend, dtype, device)


@pytest.mark.parametrize(("dtype", "widest"), [(torch.float32, 512), (torch.float64, 256)], ids=str)
def test_the_widest_rows_run_and_wider_ones_are_refused(backend, device, dtype, widest):
    fwd = torch_op(OP, backend, "fwd")
    arguments = call(device, widest, widest, S=1, dtype=dtype)
    outputs = fwd(*arguments, None, None, None, None)
    found = gradients(backend, [*arguments, None, None, None, None], outputs)
    assert outputs[0].isfinite().all() and found[1].isfinite().all() and found[1].ne(0).any()
    for name, D, Dv in (("q", widest + 1, 4), ("v", 4, widest + 1)):
        arguments = call(device, D, Dv, S=1, dtype=dtype)
        with pytest.raises(ValueError, match=rf"^region_attention: {name}: expected at most {widest} features .* got "):
            fwd(*arguments, None, None, None, None)


def test_the_router_sorts_up_to_its_limit_and_says_so_beyond(backend, device):
    k = torch.randn(1, 1, 8193, 1, 1, generator=torch.Generator().manual_seed(2)).to(device)
    q = torch.ones(1, 1, 1, 1, 1, device=device)
    found = ops.route_regions(q, k[:, :, 1:], None, 700, backend=backend).flatten()
    assert torch.equal(found, k.flatten()[1:].sort(stable=True, descending=True).indices[:700])
    if backend == "triton":  # counts the regions before each, for rows of any length
        found = ops.route_regions(q, k, None, 700, backend=backend).flatten()
        assert torch.equal(found, k.flatten().sort(stable=True, descending=True).indices[:700])
        return
    with pytest.raises(ValueError, match=r"^route_regions: k: expected at most 8192 regions .* got 8193"):
        ops.route_regions(q, k, None, 1, backend=backend)
