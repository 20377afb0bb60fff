"""Triton kernels without a GPU: compiled ahead of time for GPUs, and interpreted on sizes that fill several blocks.

tests/test_ops.py runs the generic tests in the interpreter on tiny inputs; here are sizes with several blocks of rows,
columns and chunks, and the values at the edges of floating point.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from pyml.backend import triton_reason
from pyml.ops import OPS
from pyml.reference import bspline as reference
from pyml.testing import check
from tests.cases import samples
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(triton_reason() is not None, reason=triton_reason() or "")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
compiled = pytest.mark.skipif(
    INTERPRETED or triton_reason() is not None, reason=triton_reason() or "starts a process of its own"
)

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory that one block can have
SEVERAL_BLOCKS = {
    "bspline_basis": ("G40-rows-130", "order2-clamp"),
    "kan_linear": ("63-to-65", "130-to-3-shared", "G20", "order5-uneven"),
    "wkan_linear": ("63-to-65", "25-to-16", "G20", "G40-uneven", "on-knots-repeated"),
    "wkan_conv2d": ("5x5-shared", "stride", "dilation", "order4-G20"),
    "region_attention": ("63-per-head", "cross", "crowded-weights", "every-option", "odd-dims"),
    "route_regions": ("per-head", "cross", "equal"),
    "sinkhorn_plan": ("plot", "zeros", "square"),
    "topk_attention": ("ties", "groups", "causal-cross", "float-mask-heads", "straight-through"),
    "adamw_slices_": ("columns", "columns-stochastic", "more-dimensions"),
    "head_edit": ("rows", "odd-dims"),
}


def run(*arguments: str, **environment: str) -> str:
    names = ("TRITON_INTERPRET", "PYML_TRITON_FP32", "PYML_BACKEND")
    clean = {k: v for k, v in os.environ.items() if k not in names} | environment
    done = subprocess.run([sys.executable, "-m", *arguments], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def interpret(*arguments: str) -> None:
    """A pytest session in the interpreter."""
    out = run("pytest", *arguments, "-q", TRITON_INTERPRET="1")
    assert " passed" in out and "failed" not in out, out[-3000:]


ARCHES = [  # every kernel in every dtype; for one GPU also every sample
    pytest.param(90, False, id="sm_90"),
    pytest.param(90, True, id="sm_90-every", marks=pytest.mark.full),
    *(pytest.param(arch, False, id=f"sm_{arch}", marks=pytest.mark.full) for arch in SHARED if arch != 90),
]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "every"), ARCHES)
def test_every_kernel_compiles_ahead_of_time(arch, every):
    lines = run("tests.triton_aot", "--arch", str(arch), *(["--every"] if every else [])).splitlines()
    *variants, last = (json.loads(line) for line in lines)
    for variant in variants:
        assert variant["shared"] <= SHARED[arch], f"too much shared memory: {variant}"
        assert variant["cubin"] > 0
    seen = {variant["kernel"] for variant in variants}
    kernels = {name for name in last["functions"] if name.endswith("_kernel")}
    assert seen == kernels, f"never launched: {sorted(kernels - seen)}; not named *_kernel: {sorted(seen - kernels)}"


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    interpret(__file__, "-k", "interpreted")


@pytest.mark.parametrize(("rows", "block", "tiles"), [(1, 16, 1), (224000, 32, 2), (16384, 64, 8192), (1000, 16, 1)])
def test_chunks_cover_every_row_once(rows, block, tiles):
    from pyml.triton_kernels import chunks

    count, size = chunks(rows, block, tiles)
    assert size % block == 0 and (count - 1) * size < rows <= count * size
    assert count <= max(1, 528 // tiles)


def test_an_unknown_float32_dot_is_refused(monkeypatch):
    from pyml.triton_kernels import fp32_dot

    monkeypatch.setenv("PYML_TRITON_FP32", "fp19")
    with pytest.raises(ValueError, match="PYML_TRITON_FP32: expected one of ieee, tf32x3, tf32, got 'fp19'"):
        fp32_dot()


def one_chunk(rows: int, block: int, tiles: int, programs: int = 0) -> tuple[int, int]:
    return 1, -(-rows // block) * block


@interpreted
@pytest.mark.parametrize("split", [True, False], ids=["split", "one-chunk"])
@pytest.mark.parametrize(
    ("name", "case"),
    [(op, s) for op, ids in SEVERAL_BLOCKS.items() for s in samples(OPS[op]) if s.id in ids],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_interpreted_on_several_blocks(name, case, split, monkeypatch):
    """Rows in several chunks, and all in one: small inputs would else never repeat a loop over rows."""
    for module in list(sys.modules.values()):
        if not split and module.__name__.startswith("pyml.triton_kernels.") and hasattr(module, "chunks"):
            monkeypatch.setattr(module, "chunks", one_chunk)
    check(OPS[name], case, "triton", torch.float32, "cpu")


def rows_of_knots(order: int) -> dict[str, torch.Tensor]:
    uniform = -1 + 0.4 * torch.arange(-order, 5 + order + 1, dtype=torch.float64)
    ends = uniform.clone()
    ends[:order], ends[-order:] = ends[order], ends[-order - 1]
    inner = uniform.clone()
    inner[order + 2] = inner[order + 1]
    return {"uniform": uniform, "repeated ends": ends, "repeated inner": inner}


@interpreted
@pytest.mark.parametrize("extrapolation", reference.EXTRAPOLATIONS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_interpreted_at_the_edges(order, extrapolation):
    """NaN, infinities, knots: in every derivative the same values as the reference, NaN where it has NaN."""
    from pyml.triton_kernels.bspline import bspline_basis_fwd

    infinite = [] if extrapolation == "linear" else [float("inf"), -float("inf")]
    odd = [float("nan"), 0.0, -1.0, 1.0, 30.0, -30.0, *infinite]
    for name, grid in rows_of_knots(order).items():
        x = torch.cat([torch.tensor(odd, dtype=torch.float64), grid]).unsqueeze(-1)
        for derivative in range(order + 1):
            got = bspline_basis_fwd(x, grid, order, derivative, extrapolation)
            truth = reference.bspline_basis(x, grid, order, derivative, extrapolation)
            torch.testing.assert_close(
                got, truth, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m, n=name, d=derivative: f"{n}, {d}: {m}"
            )


@interpreted
@pytest.mark.parametrize("extrapolation", ["zero", "clamp"])
def test_interpreted_infinite_input(extrapolation):
    """An infinite x is outside the grid like any other; NaN gives NaN in the output and in all gradients it reaches."""
    from pyml.triton_kernels.bspline import kan_linear_bwd, kan_linear_fwd

    grid = rows_of_knots(3)["uniform"]
    x = torch.tensor([[float("inf"), 0.1], [-float("inf"), 0.2], [float("nan"), 0.3]], dtype=torch.float64)
    coeff = torch.randn(2, 2, 8, dtype=torch.float64)
    y = kan_linear_fwd(x, grid, coeff, None, 3, "silu", extrapolation)
    assert y[:2].isfinite().all() and y[2].isnan().all()
    torch.testing.assert_close(y[:2], reference.kan_linear(x, grid, coeff, None, 3, "silu", extrapolation)[:2])
    dx, dcoeff, _ = kan_linear_bwd(
        torch.ones_like(y), x, grid, coeff, None, 3, "silu", extrapolation, [True, True, False]
    )
    assert dx[2, 0].isnan() and (dx[:2, 0] == 0).all() and dx[:, 1].isfinite().all()
    assert dcoeff[:, 0].isnan().all() and dcoeff[:, 1].isfinite().all()
