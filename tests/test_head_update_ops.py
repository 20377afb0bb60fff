"""AdamW on slices: torch's own numbers, nothing outside of a slice, masters, stochastic rounding.

What every op promises is tested in test_ops*.py; edits of heads are in test_head_update_edit.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyml.ops import OPS, adamw_slices_
from pyml.reference import head_update as reference
from tests.conftest import INTERPRETED

OP = OPS["adamw_slices_"]
KEY = torch.tensor([0x0123456789ABCDEF])
FORMS = ("rows", "columns", "transposed", "one-dimension", "three-dimensions")


def slices(weights: list[Tensor], form: str) -> list[Tensor]:
    """Two slices of each weight [48, 64], as views."""
    found = []
    for w in weights:
        if form == "rows":
            found += [w[8:16], w[32:40]]
        elif form == "columns":
            found += [w[:, 16:32], w[:, 32:48]]
        elif form == "transposed":
            found += [w.t()[16:32], w.t()[48:]]
        elif form == "one-dimension":
            found += [w[3], w[:, 5][4:]]
        else:
            found += [w.view(4, 3, 4, 64)[:, 1, :, 7:20], w.view(4, 3, 4, 64)[:, 2, :, 7:20]]
    return found


class Adam:
    """The state of a few slices, and the step."""

    def __init__(self, params: list[Tensor], state: torch.dtype = torch.float32, **options) -> None:
        self.params, self.options, self.count = params, options, 0
        self.m, self.v = ([torch.zeros(p.shape, dtype=state) for p in params] for _ in range(2))

    def step(self, grads: list[Tensor]) -> None:
        self.count += 1
        adamw_slices_(self.params, grads, self.m, self.v, step=self.count, **self.options)


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_equals_torch_adamw(kernel, form, dtype, bound):
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    weights = [torch.randn(48, 64, dtype=dtype) for _ in range(2)]
    ours = slices([w.clone() for w in weights], form)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    adam, torch_adam = Adam(ours, dtype, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for _ in range(2 if INTERPRETED else 5):
        grads = [torch.randn(p.shape, dtype=dtype) for p in ours]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        adam.step(grads)
        torch_adam.step()
    for n, (p, q) in enumerate(zip(ours, theirs)):
        state = torch_adam.state[q]
        for got, expected in ((p, q.detach()), (adam.m[n], state["exp_avg"]), (adam.v[n], state["exp_avg_sq"])):
            torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_in_a_slice_keeps_its_bits(kernel, form):
    """With weight decay, over several steps."""
    weights = [torch.randn(48, 64) for _ in range(2)]
    before, inside = [w.clone() for w in weights], [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    for mask in slices(inside, form):
        mask.fill_(True)
    adam = Adam(slices(weights, form), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        adam.step([torch.randn(p.shape) for p in adam.params])
    for w, old, mask in zip(weights, before, inside):
        assert torch.equal(w[~mask], old[~mask])
        assert (w[mask] != old[mask]).all()


def test_the_fused_step_of_torch_writes_outside_of_a_strided_view(unguarded):
    """Why `adamw_slices_` is not torch's: on a CPU `AdamW(fused=True)` takes a parameter's elements one after the other
    in memory, whatever its strides. Where this fails torch is mended, and the refusal of fused optimizers can go."""
    unguarded()
    weight = torch.ones(6, 8)
    p = torch.nn.Parameter(weight[:, 2:4])
    p.grad = torch.ones(6, 2)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()
    changed = weight != 1
    outside = changed.clone()
    outside[:, 2:4] = False
    assert outside.any() and not changed[:, 2:4].all()
    ours = torch.ones(6, 8)
    Adam([ours[:, 2:4]], lr=0.1).step([torch.ones(6, 2)])
    assert torch.equal(ours != 1, (torch.arange(8) // 2 == 1).expand(6, 8))


def test_other_dtypes_of_gradient_and_state(kernel):
    """bfloat16 parameters with float32 state; a float64 tensor makes the whole slice compute in double."""
    p, g = torch.randn(20, 30).bfloat16(), torch.randn(20, 30)
    m, v, expected = torch.zeros(20, 30), torch.zeros(20, 30), p.float()
    adamw_slices_([p], [g], [m], [v], step=1, lr=0.1)
    new = reference.adamw(expected, g, torch.zeros(20, 30), torch.zeros(20, 30), 1, 0.1, (0.9, 0.999), 1e-8, 0.0)
    assert (p.float() - new[0]).abs().max() <= 2.0**-8 * new[0].abs().max()
    torch.testing.assert_close(m, new[1])
    p, m, v = torch.randn(6), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    wide = reference.adamw(*(t.double() for t in (p, g[0, :6], m, v)), 1, 0.1, (0.9, 0.999), 1e-8, 0.0)
    adamw_slices_([p], [g[0, :6]], [m], [v], step=1, lr=0.1)
    assert torch.equal(p, wide[0].float())
    torch.testing.assert_close(m, wide[1], rtol=1e-14, atol=0)


def test_the_number_of_a_step_may_be_large(kernel):
    p, g = torch.ones(5), torch.full((5,), 2.0)
    m, v = g.clone(), g**2
    adamw_slices_([p], [g], [m], [v], step=2**32 - 1, lr=0.5, eps=0.0)
    torch.testing.assert_close(p, torch.full((5,), 0.5))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75])
def test_the_first_moment_is_torchs_lerp(kernel, beta):
    """From the nearer end: with a beta of 0 a large old moment goes without a trace."""
    old, g = torch.tensor([[3e7, -2.0, 0.0, 5e-3]]), torch.tensor([[1.0, 4.0, -7.0, 2e6]])
    p, m, v = torch.zeros(1, 4), old.clone(), torch.ones(1, 4)
    adamw_slices_([p], [g], [m], [v], step=3, lr=0.1, betas=(beta, 0.999))
    torch.testing.assert_close(m, torch.lerp(old, g, 1 - beta), rtol=2e-7, atol=0)
    if beta == 0:
        assert torch.equal(m, g)


# --- masters and rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_keeps_what_rounding_cuts_off(kernel, dtype):
    """Steps far below an ulp of the parameter: with a master they add up, without one nothing ever moves."""
    p, plain, master = torch.ones(40, dtype=dtype), torch.ones(40, dtype=dtype), torch.ones(40)
    kept, lost = Adam([p], lr=1e-5, masters=[master]), Adam([plain], lr=1e-5)
    steps = 30 if INTERPRETED else 400
    for _ in range(steps):
        for adam in (kept, lost):
            adam.step([torch.ones(40)])
    assert torch.equal(plain, torch.ones(40, dtype=dtype))
    torch.testing.assert_close(master, torch.full((40,), 1 - steps * 1e-5), rtol=0, atol=steps * 2.0**-25)
    assert torch.equal(p, master.to(dtype))


def written_to(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, masters, and what a step starts from: the master where nothing has written to the parameter."""
    half = dtype == torch.float16
    inf, nan = torch.inf, torch.nan
    cases = [  # parameter, master, whether the master rounds to the parameter
        (1.0, 1 + 2.0**-12, True), (1.0, 1.5, False), (-2.0, 2.0, False), (0.0, -0.0, True), (-0.0, 0.0, True),
        (nan, 1.0, False), (1.0, nan, False), (nan, nan, False), (inf, inf, True), (inf, 1e30, half),
        (-inf, 3.0, False), (0.0, 2.0**-40, half), (2.0**-24, 1.25 * 2.0**-24, half),
        (1 + 2.0**-7, 1 + 2.0**-6 - 2.0**-12, False),
    ]  # fmt: skip
    p, master, kept = (torch.tensor(column) for column in zip(*cases))
    return p.to(dtype), master.float(), torch.where(kept, master, p).float()


@pytest.mark.parametrize("form", ["dense", "columns", "long columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_starts_from_what_was_written_to_the_parameter(kernel, dtype, form):
    """Of a snapshot, a checkpoint, the user. NaN stays NaN, and zeros are equal whatever their signs."""
    times = 3 if form == "columns" else 50
    p, master, start = (t.expand(times, len(t)).t().contiguous() for t in written_to(dtype))
    if form != "dense":
        p = torch.stack([p, torch.full_like(p, 7.0)], 2).flatten(1)[:, ::2]
    moments = [torch.zeros(start.shape), torch.ones(start.shape)]
    zero = torch.zeros(start.shape)
    adamw_slices_([p], [zero], *([t] for t in moments), step=1, lr=0.0, masters=[master])
    torch.testing.assert_close(master, start, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(p, start.to(dtype), rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(start.shape)
    new = reference.adamw(start, grad, *moments, 2, 0.1, (0.9, 0.999), 1e-8, 0.5)
    adamw_slices_([p], [grad], *([t] for t in moments), step=2, lr=0.1, weight_decay=0.5, masters=[master])
    torch.testing.assert_close(master, new[0], rtol=2e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(p, master.to(dtype), rtol=0, atol=0, equal_nan=True)


def decayed(start: Tensor, step: int = 1, key: Tensor = KEY, **options) -> tuple[Tensor, Tensor]:
    """A step that is exact in float32, start * (1 - 2^-10), rounded stochastically; and what it was before."""
    p = start.clone()
    state = [torch.zeros(p.shape), torch.ones(p.shape)]
    adamw_slices_(
        [p], [torch.zeros(p.shape)], *([s] for s in state), step=step, lr=2.0**-10, weight_decay=1.0, key=key, **options
    )  # fmt: skip
    return p, start.float() * (1 - 2.0**-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_has_the_bits_of_the_reference(kernel, dtype):
    """In every layout, and wherever a slice is listed."""
    size = (5, 70) if INTERPRETED else (37, 700)
    scales = torch.logspace(-9, 4, size[1])  # from denormal halves on
    start = (torch.randn(size) * scales).to(dtype)
    whole = torch.zeros(size[0], 2 * size[1], dtype=dtype)
    whole[:, 3 : 3 + size[1]] = start
    for step, tensor_id, given in ((1, 0, start), (2**32 - 1, 5, whole[:, 3 : 3 + size[1]])):
        got, exact = decayed(given, step, ids=[tensor_id])
        words = reference.rounding_words(KEY, step, tensor_id, start)
        expected = reference.stochastic_rounding(exact, dtype, words)
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(dtype):
    """Also among denormal halves. The mean of n roundings is within 4.5 of its standard deviations."""
    small = 3e-6 if dtype == torch.float16 else 3e-30
    for value in (1.3, -1.7, small, -small):
        start = torch.full((1 << 17,), value, dtype=dtype)
        got, exact = decayed(start)
        x = exact[0].double()
        near = exact[:1].to(dtype)
        up, down = (torch.nextafter(near, torch.tensor([to], dtype=dtype)).double() for to in (torch.inf, -torch.inf))
        low, high = (near.double(), up) if near.double() <= x else (down, near.double())
        assert ((got.double() == low) | (got.double() == high)).all()
        share = ((x - low) / (high - low)).item()
        assert 0 < share < 1
        count = (got.double() == high).double().mean().item()
        assert abs(count - share) < 4.5 * (share * (1 - share) / len(got)) ** 0.5 + 2.0**-13


def test_rounding_leaves_what_is_exact_or_not_finite(kernel):
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.tensor([1.0, -2.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 6e-8]).to(dtype)
        before = p.clone()
        zeros = [torch.zeros(9)]
        adamw_slices_([p], zeros, [torch.zeros(9)], [torch.ones(9)], step=1, lr=0.1, key=KEY)
        assert torch.equal(p.view(torch.int16)[:6], before.view(torch.int16)[:6]) and p[6].isnan()
        assert torch.equal(p[7:], before[7:])


def test_key_step_and_id_choose_the_rounding(kernel):
    start = torch.full((400,), 1.5, dtype=torch.bfloat16)
    first = decayed(start)[0]
    assert torch.equal(decayed(start)[0], first)
    for other in (decayed(start, key=KEY + 1), decayed(start, step=2), decayed(start, ids=[1])):
        assert 0.05 < (other[0] != first).double().mean() < 0.95
    listed = [torch.zeros(3, dtype=torch.bfloat16), start.clone()]
    moments = [[torch.full(t.shape, float(n)) for t in listed] for n in (0, 1)]
    adamw_slices_(
        listed, [torch.zeros(t.shape) for t in listed], *moments, step=1, lr=2.0**-10, weight_decay=1.0, key=KEY,
        ids=[7, 0],
    )  # fmt: skip
    assert torch.equal(listed[1], first)


def test_the_rounding_is_pinned():
    """What a stored key gave once, it gives again. Chosen from the words of the published Philox."""
    like = torch.zeros(70)
    expected = reference.words(KEY ^ reference.ROUNDING, 9, 4, torch.arange(70))
    word = torch.stack([expected[(e >> 4) & 3][e] for e in range(70)])
    assert torch.equal(reference.rounding_words(KEY, 9, 4, like), word)
    x = torch.tensor([1 + 2.0**-8])  # half an ulp of bfloat16 above 1
    for low, rounded in ((0x7FFF, 1.0), (0x8000, 1 + 2.0**-7)):
        assert reference.stochastic_rounding(x, torch.bfloat16, torch.tensor([low])).item() == rounded


def found_on(isa: str, folder: Path) -> Tensor:
    code = "import sys, torch, tests.test_head_update_ops as t; torch.save(t.steps_of_all(), sys.argv[1])"
    path = folder / f"{isa}.pt"
    subprocess.run([sys.executable, "-c", code, path], check=True, env=os.environ | {"PYML_CPU_ISA": isa})
    return torch.load(path)


def steps_of_all() -> Tensor:
    """Three steps of every form and dtype, as one tensor."""
    torch.manual_seed(3)
    found = []
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            params = slices([torch.randn(48, 64).to(dtype)], form)
            adam = Adam(params, lr=0.03, weight_decay=0.1, key=KEY)
            for _ in range(3):
                adam.step([torch.randn(p.shape) for p in params])
            found += [t.float().flatten() for t in (*params, *adam.m, *adam.v)]
    return torch.cat(found)


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    here = steps_of_all()
    assert here.isfinite().all()
    for isa in ("default", "avx2", "avx512"):
        assert torch.equal(found_on(isa, tmp_path), here), isa
