"""Properties of the B-spline ops that hold whatever the reference says."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import pyml
from pyml.ops import OPS, bspline_basis, kan_linear, outside_fraction, wkan_conv2d, wkan_linear
from pyml.reference import bspline as reference
from pyml.testing.bspline import clamped, inside, repeated, uneven, uniform

OP = OPS["kan_linear"]  # every backend that can run it can run the family
GRIDS = {f.__name__: f for f in (uniform, uneven, repeated, clamped)}


def grid_of(kind: str, intervals: int, order: int, device: str, dtype=torch.float64, rows=None) -> torch.Tensor:
    return GRIDS[kind](torch.Generator().manual_seed(intervals), rows, intervals, order).to(device, dtype)


# --- the basis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("intervals", [1, 5, 20])
@pytest.mark.parametrize("kind", GRIDS)
def test_partition_of_unity(kernel, kind, intervals, order, device):
    """On the inner grid the functions are positive and add up to 1, and their derivatives to 0."""
    grid = grid_of(kind, intervals, order, device)
    if kind == "repeated" and intervals == 1:  # no inner interval has a width: there is nothing to continue
        x = torch.linspace(-2, 2, 41, dtype=torch.float64, device=device).unsqueeze(-1)
        for extrapolation in ("clamp", "linear"):
            for derivative in (0, 1):
                assert not bspline_basis(x, grid, order=order, derivative=derivative, extrapolation=extrapolation).any()
        return
    x = inside(torch.Generator().manual_seed(1), (300, 1), grid.cpu(), order).to(device)
    basis = bspline_basis(x, grid, order=order)
    assert basis.shape == (300, 1, intervals + order)
    assert basis.min() >= -1e-15
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(x), rtol=0, atol=1e-12)
    slope = bspline_basis(x, grid, order=order, derivative=1)
    torch.testing.assert_close(slope.sum(-1), torch.zeros_like(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_integral_is_known(kernel, order, device):
    """The integral of function b over all knots is (t[b + k + 1] - t[b]) / (k + 1)."""
    grid = grid_of("uneven", 5, order, device)
    x = torch.linspace(grid[0].item(), grid[-1].item(), 20001, dtype=torch.float64, device=device).unsqueeze(-1)
    integral = torch.trapezoid(bspline_basis(x, grid, order=order)[:, 0], x[:, 0], dim=0)
    expected = (grid[order + 1 :] - grid[: -order - 1]) / (order + 1)
    torch.testing.assert_close(integral, expected, rtol=1e-5, atol=1e-7)


def test_cubic_values_are_those_of_the_textbook(kernel, device):
    """At the knots of a uniform cubic spline the values are 1/6, 4/6, 1/6; halfway 1/48, 23/48, 23/48, 1/48."""
    grid = torch.arange(-3.0, 9.0, device=device, dtype=torch.float64)  # G = 5 over [0, 5]
    basis = bspline_basis(torch.tensor([[2.0], [2.5]], device=device, dtype=torch.float64), grid)
    sixths, forty_eighths = basis[0, 0, 2:5] * 6, basis[1, 0, 2:6] * 48
    torch.testing.assert_close(sixths, torch.tensor([1.0, 4, 1], device=device, dtype=torch.float64))
    torch.testing.assert_close(forty_eighths, torch.tensor([1.0, 23, 23, 1], device=device, dtype=torch.float64))
    assert basis[0, 0, :2].abs().max() < 1e-15 and basis[0, 0, 5:].abs().max() < 1e-15


@pytest.mark.parametrize("intervals", [1, 5, 20])
def test_beyond_the_inner_grid(kernel, intervals, device):
    """Extrapolation "zero": the sum decays over the extension; at and beyond the last knot all is exactly 0."""
    grid = grid_of("uniform", intervals, 3, device)
    h = 2 / intervals
    at = torch.tensor([-1.0, 1.0, 1 + h, 1 + 2 * h, 1 + 2.9 * h, 1e4, -1e4], dtype=torch.float64, device=device)
    total = bspline_basis(at.unsqueeze(-1), grid).sum(-1).flatten()
    torch.testing.assert_close(total[:2], torch.ones_like(total[:2]), rtol=0, atol=1e-12)
    expected = torch.tensor([5 / 6, 1 / 6, 0.1**3 / 6], dtype=torch.float64, device=device)
    torch.testing.assert_close(total[2:5], expected, rtol=1e-9, atol=1e-12)
    ends = torch.stack([grid[-1], grid[-1] + 1e-6, grid[0] - 1e-6, at[5], at[6]]).unsqueeze(-1)
    assert not bspline_basis(ends, grid).any()
    for extreme in (math.inf, -math.inf):
        assert not bspline_basis(torch.full((1, 1), extreme, dtype=torch.float64, device=device), grid).any()


def test_gradient_is_zero_outside_and_the_base_goes_on(kernel, device):
    grid = grid_of("uniform", 5, 3, device)
    x = torch.tensor([[-9.0], [2.2001], [50.0]], dtype=torch.float64, device=device, requires_grad=True)
    coeff = torch.ones(1, 1, 8, dtype=torch.float64, device=device)
    kan_linear(x, grid, coeff).sum().backward()
    assert not x.grad.any()
    x.grad = None
    kan_linear(x, grid, coeff, torch.ones(1, 1, dtype=torch.float64, device=device)).sum().backward()
    slope = torch.autograd.grad(F.silu(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_intervals_are_half_open_and_a_repeated_last_knot_is_closed(kernel, dtype, device):
    """With knots k + 1 times at the ends the spline takes its end coefficients there, and nothing beyond."""
    order = 3
    grid = grid_of("clamped", 5, order, device, dtype)
    ends = torch.stack([grid[0], grid[-1]]).unsqueeze(-1)
    basis = bspline_basis(ends, grid, order=order)[:, 0]
    expected = torch.zeros(2, 8, dtype=dtype, device=device)
    expected[0, 0] = expected[1, -1] = 1
    torch.testing.assert_close(basis, expected)
    after = torch.nextafter(ends, torch.tensor([[-2.0], [2.0]], dtype=dtype, device=device))
    assert not bspline_basis(after, grid, order=order).any()
    # A knot k + 1 times inside is a jump, and the value there belongs to the right side.
    row = torch.tensor([0.0, 1, 2, 2, 3, 4], dtype=dtype, device=device)
    jump = bspline_basis(torch.tensor([[2.0]], dtype=dtype, device=device), row, order=1)[0, 0]
    torch.testing.assert_close(jump, torch.tensor([0.0, 0, 1, 0], dtype=dtype, device=device))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_repeated_knots_give_no_nan(kernel, order, device):
    """Any run of equal knots, also all of them: finite values and gradients, and a term over zero width is 0."""
    count = 5 + 2 * order + 1
    for start in range(count):
        for length in (2, order + 1, order + 3, count):
            grid = torch.linspace(-1, 1, count, dtype=torch.float64, device=device)
            grid[start : start + length] = grid[start]
            grid = grid.cummax(0).values
            x = torch.cat([grid, torch.linspace(-1.2, 1.2, 41, dtype=torch.float64, device=device)]).unsqueeze(-1)
            for extrapolation in ("zero", "clamp", "linear"):
                leaf = x.clone().requires_grad_()
                basis = bspline_basis(leaf, grid, order=order, extrapolation=extrapolation)
                basis.square().sum().backward()
                assert basis.isfinite().all() and leaf.grad.isfinite().all(), (start, length, extrapolation)


def test_values_at_knots_and_not_intervals(kernel, device):
    """A kernel may place a rounded knot in either neighbour: the values there must still be those of the spline."""
    for intervals in (1, 5, 20, 40):
        exact = grid_of("uniform", intervals, 3, device)
        step = torch.tensor(2 / intervals, dtype=torch.float32, device=device)
        rounded = torch.arange(-3, intervals + 4, device=device) * step - 1  # as efficient-kan builds its grid
        x = rounded[3:-3].unsqueeze(-1)
        got = bspline_basis(x, rounded)
        truth = reference.bspline_basis(x.double(), rounded.double())
        assert (got - truth).abs().max() < 4e-6 * max(1, intervals / 20)
        torch.testing.assert_close(got.double(), bspline_basis(x.double(), exact), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("intervals", "bound"), [(5, 3.2e-7), (20, 7.4e-7), (100, 5e-6)])
def test_float32_error_of_the_basis(kernel, intervals, bound, device):
    """At most twice what the recursion in float32 has (1.6e-7, 3.7e-7, 2.5e-6 for G = 5, 20, 100)."""
    grid = grid_of("uniform", intervals, 3, device, torch.float32)
    x = torch.linspace(-1, 1, 20001, device=device).unsqueeze(-1)
    truth = reference.bspline_basis(x.double(), grid.double())
    assert (bspline_basis(x, grid) - truth).abs().max() <= bound


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_derivatives_up_to_the_order_and_beyond(kernel, order, device):
    grid = grid_of("uneven", 5, order, device)
    x = torch.linspace(-0.9, 0.9, 50, dtype=torch.float64, device=device).unsqueeze(-1)
    for derivative in range(1, order + 1):
        leaf = x.clone().requires_grad_()
        lower = bspline_basis(leaf, grid, order=order, derivative=derivative - 1)
        weights = torch.linspace(-1, 1, lower.numel(), dtype=torch.float64, device=device).view(lower.shape)
        by_autograd = torch.autograd.grad((lower * weights).sum(), leaf)[0]
        direct = (bspline_basis(x, grid, order=order, derivative=derivative) * weights).sum(-1)
        torch.testing.assert_close(direct, by_autograd, rtol=1e-9, atol=1e-9)
    assert not bspline_basis(x, grid, order=order, derivative=order + 1).any()


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extrapolation_modes(kernel, dtype, device):
    """Past the inner grid: the end value (clamp), the end tangent (linear)."""
    grid = grid_of("uneven", 5, 3, device, dtype)
    low, high = grid[3], grid[-4]
    coeff = torch.linspace(-1, 2, 8, device=device, dtype=dtype).view(1, 1, 8).square()

    def curve(x: torch.Tensor, mode: str, derivative: int = 0) -> torch.Tensor:
        if derivative:
            return bspline_basis(x, grid, derivative=1, extrapolation=mode).flatten() @ coeff.flatten()
        return kan_linear(x, grid, coeff, extrapolation=mode)

    for end, step in ((low, -0.7), (high, 0.7)):
        inner = end.view(1, 1) + (1e-6 if step < 0 else -1e-6)
        beyond = (end + step).view(1, 1)
        value, slope = curve(inner, "zero"), curve(inner, "zero", 1)
        torch.testing.assert_close(curve(beyond, "clamp"), value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(curve(beyond, "linear"), value + step * slope, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(curve(beyond, "linear", 1), slope, rtol=1e-4, atol=1e-4)
        assert curve(beyond, "clamp", 1) == 0


def test_wkan_is_kan_with_shared_splines(kernel, device):
    """wkan_linear equals kan_linear whose coefficients are scaler[o, i] * coeff[i, b]."""
    g = torch.Generator().manual_seed(2)
    grid = grid_of("uneven", 5, 3, device, rows=4)
    x, coeff = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randn(4, 8, generator=g, dtype=torch.float64)
    scaler, base = (torch.randn(6, 4, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    x, coeff = x.to(device), coeff.to(device)
    expected = kan_linear(x, grid, scaler.unsqueeze(-1) * coeff, base)
    torch.testing.assert_close(wkan_linear(x, grid, coeff, base, scaler), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), ((1, 2), (2, 1))])
def test_conv_equals_unfolded_patches(kernel, mode, stride, dilation, device):
    g = torch.Generator().manual_seed(3)
    x = torch.rand(2, 3, 9, 8, generator=g, dtype=torch.float64).to(device) * 2 - 1
    grid = grid_of("uniform", 5, 3, device, rows=27)
    coeff = torch.randn(27, 8, generator=g, dtype=torch.float64).to(device)
    base, scaler = (torch.randn(4, 27, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    got = wkan_conv2d(
        x, grid, coeff, base, scaler, kernel_size=3, stride=stride, padding=2, dilation=dilation, padding_mode=mode
    )
    padded = F.pad(x, (2, 2, 2, 2), mode="constant" if mode == "zeros" else mode)
    columns = F.unfold(padded, 3, dilation=dilation, stride=stride).transpose(1, 2)
    expected = wkan_linear(columns, grid, coeff, base, scaler).transpose(1, 2).view(got.shape)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    one = wkan_conv2d(
        x[0], grid, coeff, base, scaler, kernel_size=3, stride=stride, padding=2, dilation=dilation, padding_mode=mode
    )
    torch.testing.assert_close(one, got[0], rtol=1e-12, atol=1e-12)


def test_knots_have_no_gradient(kernel, device):
    """In no backend: they are moved by `update_grid`, not by an optimizer."""
    g = torch.Generator().manual_seed(5)
    grid = grid_of("uneven", 5, 3, device).requires_grad_()
    x = torch.rand(7, 3, generator=g, dtype=torch.float64).to(device).requires_grad_()
    coeff, scaler = (torch.randn(*s, generator=g, dtype=torch.float64).to(device) for s in ((2, 3, 8), (2, 3)))
    for y in (
        bspline_basis(x, grid),
        bspline_basis(x, grid, derivative=1),
        kan_linear(x, grid, coeff),
        wkan_linear(x, grid, coeff[0], None, scaler),
        wkan_conv2d(x.expand(1, 1, 7, 3), grid, coeff[0, :1], None, scaler[:, :1], kernel_size=1),
    ):
        to_x, to_grid = torch.autograd.grad(y.square().sum(), (x, grid), allow_unused=True)
        assert to_grid is None and to_x.any()


def test_outside_fraction(device):
    grid = grid_of("uniform", 5, 3, device, torch.float32)
    x = torch.tensor([[0.0, 1.5], [0.5, -3.0], [1.0, 0.0], [-1.01, 2.3]], device=device)
    torch.testing.assert_close(outside_fraction(x, grid), torch.tensor([0.25, 0.75], device=device))
    torch.testing.assert_close(outside_fraction(x, grid, inner=False), torch.tensor([0.0, 0.5], device=device))


# --- what training relies on -----------------------------------------------------------------------------------------


def test_weight_gradients_have_the_same_bits_for_every_thread_count(kernel, device):
    """On a shape with many rows to each coefficient, where the order of a sum shows."""
    if kernel == "reference":
        pytest.skip("plain torch promises no bits")
    if kernel == "triton" and device == "cpu":
        pytest.skip("too large for Triton's interpreter; test_ops.py has small ones")
    g = torch.Generator().manual_seed(4)
    grid = grid_of("uniform", 5, 3, device, torch.float32)
    x = (torch.rand(20011, 25, generator=g) * 2.4 - 1.2).to(device)
    for kan in (True, False):
        coeff = torch.randn(*([16] if kan else []), 25, 8, generator=g).to(device).requires_grad_()
        base, scaler = (torch.randn(16, 25, generator=g).to(device).requires_grad_() for _ in range(2))
        weights = [coeff, base] if kan else [coeff, base, scaler]
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y = kan_linear(x, grid, *weights) if kan else wkan_linear(x, grid, *weights)
            found.append(torch.autograd.grad(y, weights, y.detach()))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_memory_of_the_backward_does_not_grow_with_the_grid(kernel, device):
    """Only x and the parameters are saved: nothing of the size of the basis."""
    if kernel == "reference":
        pytest.skip("the reference stores the basis")
    for intervals in (5, 20):
        grid = grid_of("uniform", intervals, 3, device, torch.float32)
        x = torch.rand(64, 5, device=device, requires_grad=True)
        coeff = torch.rand(7, 5, intervals + 3, device=device, requires_grad=True)
        saved: list[int] = []

        def note(t: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            kan_linear(x, grid, coeff)
        assert sum(saved) <= x.numel() + coeff.numel() + grid.numel()


@pytest.mark.parametrize("autocast", [False, True])
def test_training_step_compiles_once_for_every_batch_size(kernel, autocast, device):
    """A compiled layer with a loss: no recompile when only the batch changes, and the output keeps the dtype of x."""
    if kernel == "triton" and device == "cpu":
        pytest.skip("too large for Triton's interpreter; test_ops.py has small ones")
    grid = grid_of("uniform", 5, 3, device, torch.float32)
    coeff = torch.rand(7, 5, 8, device=device, requires_grad=True)
    base = torch.rand(7, 5, device=device, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            y = kan_linear(x, grid, coeff, base)
        assert y.dtype == x.dtype
        return y.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (16, 24, 40):
        x = torch.rand(rows, 5, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        tolerance = 2e-2 if autocast and kernel == "reference" else 1e-5
        torch.testing.assert_close(compiled(x), loss(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x), coeff), torch.autograd.grad(loss(x), coeff), rtol=tolerance, atol=tolerance
        )
    assert counter.frame_count == 1


def test_a_second_derivative_is_computed_in_the_widest_dtype(kernel, device):
    """As the first: a float64 grid makes all of it float64, whatever the dtype of x."""
    grid, g = grid_of("uneven", 5, 3, device), torch.Generator().manual_seed(6)
    x, coeff = torch.rand(9, 2, generator=g).to(device), torch.randn(3, 2, 8, generator=g).to(device)

    def second(x: torch.Tensor, coeff: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        slope = torch.autograd.grad(kan_linear(x, grid, coeff).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), x)[0]

    truth = second(x.double(), coeff.double())
    assert (second(x, coeff) - truth).abs().max() <= 1.2e-7 * truth.abs().max()


# --- sizes -----------------------------------------------------------------------------------------------------------


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0
    return int(facts["MemAvailable"].split()[0]) << 10


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.parametrize("side", ["input", "output"])
def test_more_elements_than_32_bits_count(kernel, side, device):
    """Elements 2^31 and later are read and written where they lie."""
    if kernel == "triton" and device == "cpu":
        pytest.skip("too large for Triton's interpreter")
    width, per_row = (1024, 1024) if side == "input" else (1, 8)  # per_row: of the larger tensor
    rows = 2**31 // per_row + 1000
    if free_bytes(device) < (need := 3 * 2**31 * 2):
        pytest.skip(f"needs {need >> 30} GiB of free memory")
    g = torch.Generator().manual_seed(7)
    x = torch.full((rows, width), 0.3, dtype=torch.bfloat16, device=device)
    spots = [slice(0, 5), slice(rows // 2 - 2, rows // 2 + 3), slice(rows - 1003, rows - 997), slice(rows - 5, rows)]
    for spot in spots:
        x[spot] = (torch.rand(x[spot].shape, generator=g) * 2 - 1).to(x)
    grid = grid_of("uniform", 5, 3, device, torch.float32)
    coeff = torch.randn(1, width, 8, generator=g).to(device)

    def run(x: torch.Tensor) -> torch.Tensor:
        return kan_linear(x, grid, coeff) if side == "input" else bspline_basis(x, grid)

    with torch.no_grad():
        y = run(x)
        assert max(x.numel(), y.numel()) > 2**31
        for spot in spots:
            with pyml.use_backend("reference"):
                torch.testing.assert_close(y[spot], run(x[spot]))
