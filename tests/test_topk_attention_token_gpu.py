"""The GPU kernels of `topk_attention` apart from the generic tests: long rows, several tiles and parts, ties, NaN.

They run on Triton's interpreter (TRITON_INTERPRET=1), on the emulated CUDA kernels (tests/cuda_emulation.py), on a GPU
(--device cuda), and, because they claim nothing else of it, on the CPU kernels. `tight` makes the kernels hold next to
nothing, so that small inputs take the ways of large ones.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.reference.topk_attention import kept_keys
from pyml.testing import Sample, check
from tests.op_helpers import with_and_without_room
from tests.test_topk_attention_token import leaf, normal, ramps
from tests.test_triton import compiled, interpret

OP = ops.OPS["topk_attention"]

pytestmark = pytest.mark.kernels


@compiled
def test_in_the_interpreter():
    interpret(__file__)


def hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyml.triton_kernels import topk_attention_token_host as host

    monkeypatch.setattr(host, "HELD", dict.fromkeys(host.HELD, 0))
    for name in ("FEATURES", "STEP"):
        monkeypatch.setattr(host, name, dict.fromkeys(host.FEATURES, 16))


tight = with_and_without_room(hold_little)


def call(q: Tensor, k: Tensor, v: Tensor, topk: Any, **options: Any) -> dict[str, Any]:
    values = {"mask": None, "causal": False, "scale": None, "straight_through": False}
    return {"q": q, "k": k, "v": v, "topk": topk, **values, **options}


def agrees(values: dict[str, Any], kernel: str, dtype: torch.dtype, device: str) -> None:
    check(OP, Sample("given", lambda generator: values), kernel, dtype, device)


# --- which keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selection_is_exact_on_rows_that_mislead(kernel, tight, dtype, device):
    """Query i is a unit vector, so its logits are row i of the keys; values that are unit vectors show what is kept."""
    n = 150
    rows = torch.stack([*ramps(n).values(), -torch.zeros(n), torch.full((n,), 3e38), torch.arange(n) * 1e-43]).to(dtype)
    q, k = torch.eye(len(rows), dtype=dtype, device=device), rows.T.contiguous().to(device)
    eye = torch.eye(n, dtype=dtype, device=device)
    mask = torch.zeros(len(rows), n, dtype=dtype, device=device)
    for topk in (1, 51, 64, 149, 1000):
        expected = kept_keys(rows[None, None], topk).to(device)
        (leaf_mask,) = leaf(mask)
        inputs = (t[None, None] for t in (q, k, eye))
        out = ops.topk_attention(*inputs, topk, mask=leaf_mask, scale=1.0)
        assert (out.isfinite() & ((out > 0) <= expected)).all(), f"topk {topk}: a key is kept that should not be"
        top = rows.to(device).masked_fill(~expected[0, 0], -torch.inf).amax(-1, keepdim=True)
        weighs = expected & (rows.to(device) > top - 60)  # others are too small to show
        assert ((out > 0) | ~weighs).all(), f"topk {topk}: a key is missing"
        (slope,) = torch.autograd.grad(out, leaf_mask, torch.rand(out.shape, dtype=dtype, device=device) + 0.5)
        assert ((slope != 0) <= expected[0, 0]).all(), f"topk {topk}: the backward keeps other keys"


@pytest.mark.parametrize("topk", [1, 30, 64, 129])
def test_exactly_k_keys_are_kept_by_forward_and_backward_alike(kernel, tight, topk, device):
    q, k, v = (t.to(device) for t in (normal(1, 2, 35, 33), normal(1, 1, 130, 33), torch.eye(130)[None, None]))
    mask = torch.zeros(1, 2, 35, 130, device=device, requires_grad=True)
    out = ops.topk_attention(q, k, v, topk, mask=mask)
    assert ((out > 0).sum(-1) == topk).all()
    (slope,) = torch.autograd.grad(out, mask, torch.rand(out.shape).add(0.5).to(device))
    if topk > 1:
        assert torch.equal(slope != 0, out.detach() > 0)
    else:
        assert not slope.any(), "the probability of a single key is 1 whatever its logit"


@pytest.mark.parametrize("causal", [False, True])
def test_ties_across_tiles_stay_by_rising_index(kernel, tight, causal, device):
    """One logit for all: of M = 300 keys the first ones stay, of those that a query may see."""
    q, k, eye = torch.ones(1, 1, 20, 4), torch.ones(1, 1, 300, 4), torch.eye(300)[None, None]
    for topk in (1, 17, 129, 299):
        out = ops.topk_attention(*(t.to(device) for t in (q, k, eye)), topk, causal=causal).cpu()
        seen = torch.arange(1, 21)[:, None] if causal else 300
        expected = torch.arange(300).expand(20, 300) < torch.as_tensor(seen).clamp(max=topk)
        assert torch.equal(out[0, 0] > 0, expected)


def test_long_rows(kernel, device):
    """More keys than 16 rows of logits fit in shared memory, fewer than 8; many ties."""
    generator = torch.Generator().manual_seed(0)
    q, k = (0.5 * torch.randint(-2, 3, (1, 1, n, 4), generator=generator).double() for n in (9, 1500))
    v = torch.randn(1, 1, 1500, 3, generator=generator, dtype=torch.float64)
    agrees(call(q, k, v, [700, 3]), kernel, torch.float32, device)


def test_many_thresholds_are_the_single_ones(kernel, tight, device):
    q, k, v = (normal(1, 2, n, 12).to(device) for n in (20, 150, 150))
    thresholds = [5, 100, 64, 5, 400, 1, 2, 3, 149, 150, 33]  # more than one launch looks for at once
    out = ops.topk_attention(q, k, v, thresholds)
    for n, topk in list(enumerate(thresholds))[1::2]:
        assert torch.equal(out[n], ops.topk_attention(q, k, v, topk))


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "straight_through"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["float32", "straight-bfloat16"],
)
def test_parts_of_the_backward_and_steps_of_the_features(kernel, tight, dtype, straight_through, device):
    """Two query heads on one of keys, several blocks of queries, tiles of keys, steps of features and of values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 70, 20), (1, 1, 140, 20), (1, 1, 140, 24))
    q, k, v = (torch.randint(-2, 3, shape, generator=generator) * 0.5 for shape in shapes)
    topk = 20 if straight_through else [20, 139]
    values = call(q.double(), k.double(), v.double(), topk, scale=0.25, straight_through=straight_through)
    agrees(values, kernel, dtype, device)


@pytest.mark.parametrize(
    "shape", [(2, 2, 20, 130), (1, 1, 1, 130), (1, 2, 20, 1), (2, 1, 1, 1), (1, 1, 1, 1), (1, 1, 20, 130)], ids=str
)
def test_masks_of_every_shape_have_a_gradient(kernel, tight, shape, device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 5, generator=generator, dtype=torch.float64) for n in (20, 130, 130))
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = call(q, k, v, [9, 100], mask=mask, causal=shape[2] == 1)
    if shape[3] > 1:
        agrees(values, kernel, torch.float64, device)
        return
    # One number for all keys changes nothing: its gradient is 0, of terms that are not.
    (leaf_mask,) = leaf(mask.to(device))
    values = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in values.items()} | {"mask": leaf_mask}
    out = ops.topk_attention(**values)
    (found,) = torch.autograd.grad(out, leaf_mask, torch.randn_like(out))
    assert found.shape == shape and found.abs().max() < 1e-11


def test_fewer_valid_keys_than_topk(kernel, tight, device):
    """None, one, less than topk, exactly topk, more."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 140, 140))
    valid = torch.tensor([0, 1, 8, 10, 140])
    order = torch.rand(5, 140, generator=generator).argsort(-1)
    mask = torch.zeros(5, 140, dtype=torch.float64).masked_fill(order >= valid[:, None], -torch.inf)
    for given in (mask, mask == 0):
        agrees(call(q, k, v, 10, mask=given), kernel, torch.float64, device)
    inputs = leaf(*(t.to(device) for t in (q, k, v)))
    out = ops.topk_attention(*inputs, 10, mask=mask.to(device))
    dq = torch.autograd.grad(out, inputs, torch.ones_like(out))[0]
    assert (out[:, :, 0] == 0).all() and (dq[:, :, :2] == 0).all() and (dq[:, :, 2:] != 0).any()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_nan_reaches_what_may_see_it_and_nothing_else(kernel, tight, device):
    q, k, v = (normal(1, 1, n, 8).to(device) for n in (20, 90, 90))
    q[0, 0, 5] = torch.nan
    inputs = leaf(q, k, v)
    out = ops.topk_attention(*inputs, 4)
    wrong = torch.arange(20, device=device) == 5
    assert out[0, 0, wrong].isnan().all() and out[0, 0, ~wrong].isfinite().all()
    dq, dk, _ = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert dq[0, 0, wrong].isnan().all() and dq[0, 0, ~wrong].isfinite().all() and dk.isnan().all()
    q, k = normal(1, 1, 20, 8).to(device), k.clone()
    k[0, 0, 7] = torch.nan
    allowed = torch.ones(20, 90, dtype=torch.bool, device=device)
    allowed[10:, 7] = False
    for mask in (allowed, torch.zeros(20, 90, device=device).masked_fill(~allowed, -torch.inf)):
        out = ops.topk_attention(q, k, v, 4, mask=mask)
        assert out[0, 0, :10].isnan().all() and out[0, 0, 10:].isfinite().all()


@pytest.mark.parametrize("large", [1e4, 1e18])
def test_large_logits_do_not_overflow(kernel, tight, large, device):
    q, k, v = (normal(1, 1, n, 8).to(device) for n in (10, 70, 70))
    out = ops.topk_attention(large * q, k, v, 5)
    best = (q @ k.transpose(-1, -2)).argmax(-1)
    torch.testing.assert_close(out, v[:, :, best[0, 0]], rtol=1e-3, atol=1e-3)


def test_infinite_logits(kernel, tight, device):
    """+inf is a logit like any other: alone it takes all, and it is kept; -inf in a product is no key."""
    q, k = torch.ones(1, 1, 2, 1, device=device), torch.zeros(1, 1, 40, 1, device=device)
    k[0, 0, 3], k[0, 0, 7] = -torch.inf, torch.inf
    out = ops.topk_attention(q, k, torch.eye(40, device=device)[None, None], 3)
    reference = ops.topk_attention(q, k, torch.eye(40, device=device)[None, None], 3, backend="reference")
    assert torch.equal(out.isnan().any(-1), reference.isnan().any(-1))


@pytest.mark.parametrize("depth", [3, 70])
@pytest.mark.parametrize("topk", [2, 12, 40, 70, [70, 3]])
def test_a_key_that_takes_all_has_no_gradient(kernel, tight, topk, depth, device):
    """Its product with the upstream gradient is then delta: summed in another order, it would leave rounding, which the
    large queries turn into a gradient."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.eye(70)
    q, v = 1e6 * keys[[5, 2, 69]], torch.randn(70, depth, generator=generator)
    inputs = leaf(*(t[None, None].to(device) for t in (q, keys, v, torch.zeros(3, 70))))
    out = ops.topk_attention(*inputs[:3], topk, mask=inputs[3])
    assert torch.equal(out, inputs[2][:, :, [5, 2, 69]].expand_as(out))
    upstream = torch.randn(out.shape, generator=generator).to(device)
    dq, dk, dv, dmask = torch.autograd.grad(out, inputs, upstream)
    assert all(g.abs().max() < 1e-30 for g in (dq, dk, dmask))
    total = upstream if upstream.dim() == 4 else upstream.sum(0)
    torch.testing.assert_close(dv[:, :, [5, 2, 69]], total)
