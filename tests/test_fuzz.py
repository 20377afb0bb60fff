"""Random arguments for the public ops: refused in one sentence, or computed as the reference does. Never a crash.

`make fuzz` runs thousands of examples. Grids that are not sorted, NaN and infinities have no right answer, but must not
lead a kernel out of bounds either.
"""

import pytest
import torch
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st  # noqa: E402

from pyml.ops import OPS, Op  # noqa: E402
from pyml.testing import arguments, assert_accurate, in_double, run, samples  # noqa: E402
from pyml.testing.compare import public  # noqa: E402
from tests.mutations import assert_refused_well, mutations, verdict  # noqa: E402

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 1e-40)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def spoil(data: st.DataObject, t: Tensor) -> Tensor:
    """Special values in a few places, or the order of the last dimension turned around."""
    t = t.detach().clone()
    if t.numel() and data.draw(st.booleans(), "special values"):
        for _ in range(data.draw(st.integers(1, 3), "how many")):
            position = data.draw(st.integers(0, t.numel() - 1), "position")
            t.view(-1)[position] = data.draw(st.sampled_from(SPECIAL), "value")
    elif t.dim():
        t = t.flip(-1)
    return t


def usable(values: dict) -> bool:
    """Whether the result is defined by the op's documentation: finite numbers, ascending knots."""
    tensors = [v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point()]
    grid = values.get("grid")
    ascending = not isinstance(grid, Tensor) or bool((grid[..., 1:] >= grid[..., :-1]).all())
    return ascending and all(bool(t.isfinite().all()) and bool((t.abs() < 1e4).all()) for t in tensors)


@pytest.mark.kernels
def test_random_arguments(op: Op, backend: str, device: str):
    pool = [s for s in samples(op) if s.tiny] if backend == "triton" and device == "cpu" else samples(op)

    @hypothesis.given(st.data())
    def go(data: st.DataObject) -> None:
        sample = data.draw(st.sampled_from(pool), "sample")
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        values = arguments(op, sample, dtype, device)
        label = sample.id
        for _ in range(data.draw(st.integers(0, 2), "mutations")):
            # A forced backend rightly refuses a call that has moved to another device as a whole.
            here = [m for m in mutations(values) if not m[0].endswith(":meta")]
            label, values = data.draw(st.sampled_from(here), "mutation")
        names = [n for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()]
        if names and data.draw(st.booleans(), "spoil"):
            name = data.draw(st.sampled_from(names), "argument")
            values[name] = spoil(data, values[name]) if values[name].device.type == device else values[name]
        expected, why = verdict(lambda: public(op)(**values, backend="reference"))
        got, error = verdict(lambda: public(op)(**values, backend=backend))
        for refusal in (why, error):
            if refusal is not None:
                assert_refused_well(op.name, label, refusal)
        assert why is None or error is not None, f"{op.name} {label}: reference says {why}, {backend} takes it"
        if error is not None:  # a kernel may also refuse numbers that have no right answer
            assert why is not None or not usable(values), f"{op.name} {label}: {backend} says {error}"
            return
        if not isinstance(expected, Tensor):
            return
        assert got.shape == expected.shape and got.dtype == expected.dtype, f"{op.name} {label}"
        for n in op.gradients:  # a backward pass over whatever it was must not crash
            if isinstance(values.get(n), Tensor) and values[n].is_floating_point():
                values[n] = values[n].detach().requires_grad_()
        found = run(op, values, backend)
        if usable(values) and sample.smooth:
            truth, same = run(op, in_double(values), "reference"), run(op, values, "reference")
            for name in truth:
                assert_accurate(f"{op.name} {label}, {name}", found[name], truth[name], same[name])

    go()


def test_the_pool_is_not_all_refused():
    """So that the property above is not empty."""
    for op in OPS.values():
        assert any(usable(arguments(op, s, torch.float32, "cpu")) for s in samples(op) if s.smooth or not op.gradients)
