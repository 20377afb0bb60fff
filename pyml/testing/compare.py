"""The error rule of pyml, and running one op with its gradients.

A result may be at most twice as far from the float64 truth as plain torch in the same dtype, plus a few ulp of the
largest value. Results in float64 are compared with the float64 reference itself.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

import pyml.ops
from pyml.ops import Op
from pyml.testing.samples import Sample, arguments, each, in_double, tensors_of

TIMES = 2.0  # how much worse than torch in the same dtype
ULPS = 4.0  # of the largest true value
DOUBLE = 1e-12  # float64: relative to the largest true value


def assert_accurate(name: str, got: Tensor, truth: Tensor, same: Tensor) -> None:
    """Raise AssertionError, naming the tensor, the worst index and both errors, when ``got`` breaks the error rule.

    Args:
        name: of the tensor, for the message.
        got: result of a kernel.
        truth: the same result by the reference in float64.
        same: the same result by the reference in the dtype of ``got``.
    """
    assert got.shape == truth.shape, f"{name}: expected shape {list(truth.shape)}, got {list(got.shape)}"
    assert got.dtype == same.dtype, f"{name}: expected dtype {same.dtype}, got {got.dtype}"
    if truth.numel() == 0:
        return
    if not got.is_floating_point():
        wrong = got != same
        assert not wrong.any(), f"{name}{_at(wrong)}: expected {_one(same, wrong)}, got {_one(got, wrong)}"
        return
    got64, same64, truth = got.detach().double(), same.detach().double(), truth.detach()
    finite = truth.isfinite() & same64.isfinite()
    odd = ~finite & ~((got64 == same64) | (got64.isnan() & same64.isnan()))
    assert not odd.any(), f"{name}{_at(odd)}: expected {_one(same64, odd)} as torch gives, got {_one(got64, odd)}"
    zero = torch.zeros_like(truth)
    error = torch.where(finite, (got64 - truth).abs(), zero)
    allowed_error = torch.where(finite, (same64 - truth).abs(), zero).max().item()
    largest = torch.where(finite, truth.abs(), zero).max().item()
    if got.dtype == torch.float64:
        bound = DOUBLE * largest
    else:
        bound = TIMES * allowed_error + ULPS * torch.finfo(got.dtype).eps * largest
    above = ~(error <= bound)  # so that NaN counts as above
    worst = error.nan_to_num(torch.inf) == error.nan_to_num(torch.inf).max()
    assert not above.any(), (
        f"{name}{_at(worst)}: error {error.max().item():.3g} is above {bound:.3g} (torch in {got.dtype} is off by "
        f"{allowed_error:.3g}, largest value {largest:.3g}; {int(above.sum())} of {above.numel()} entries)"
    )


def _at(mask: Tensor) -> str:
    return str(mask.nonzero()[0].tolist()) if mask.dim() else ""


def twin(t: Tensor) -> Tensor:
    """A copy with the same strides and offset in memory of its own, what lies between its elements included."""
    storage = t.detach().untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())


def _one(t: Tensor, mask: Tensor) -> float:
    return t[mask][0].item()


def public(op: Op) -> Any:
    """The public function of an op has its name."""
    return getattr(pyml.ops, op.name)


def run(op: Op, values: dict[str, Any], backend: str, cotangent: Any = None) -> dict[str, Tensor]:
    """Outputs of one call and, where the op has them, its gradients for a fixed random cotangent, by name.

    Of an op that writes to arguments: these arguments afterwards. It writes to copies.

    Args:
        values: arguments by name; those that require a gradient get one.
        backend: what runs the call.
        cotangent: function (output number, output) -> upstream gradient; seeded noise by default.
    """
    values = {n: each(v, twin) if n in op.mutates else v for n, v in values.items()}
    result = public(op)(**values, backend=backend)
    outputs = [t for y in (result if isinstance(result, tuple) else (result,)) for t in tensors_of(y)]
    found = {("output" if len(outputs) == 1 else f"output {i}"): y for i, y in enumerate(outputs)}
    for n in op.mutates:
        found |= {f"{n} {i} afterwards": t for i, t in enumerate(tensors_of(values[n]))}
    wanted = [n for n in op.gradients if isinstance(values.get(n), Tensor) and values[n].requires_grad]
    if wanted and op.capability.gradient:
        upstream = [(cotangent or noise)(i, y) for i, y in enumerate(outputs) if y.requires_grad]
        live = [y for y in outputs if y.requires_grad]
        grads = torch.autograd.grad(live, [values[n] for n in wanted], upstream, allow_unused=True)
        for n, g in zip(wanted, grads):
            found[f"gradient of {n}"] = torch.zeros_like(values[n]) if g is None else g
    return {name: t.detach() for name, t in found.items()}


def noise(number: int, output: Tensor) -> Tensor:
    """A seeded upstream gradient: the same numbers for every backend and dtype, rounded to bfloat16 so that no cast
    between dtypes changes them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {tuple(output.shape)}".encode()))
    return torch.randn(output.shape, generator=generator).bfloat16().to(output)


def check(op: Op, sample: Sample, backend: str, dtype: torch.dtype, device: str) -> None:
    """Run one sample on one backend and hold outputs and gradients to the error rule."""
    values = arguments(op, sample, dtype, device)
    got = run(op, values, backend)
    truth = run(op, in_double(values), "reference")
    same = run(op, values, "reference")
    for name in truth:
        assert_accurate(f"{op.name} {sample.id} on {backend}, {name}", got[name], truth[name], same[name])
