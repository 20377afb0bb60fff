"""Properties of `topk_attention` that the generic tests do not see: which keys are kept, and what the others may do."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pyml import ops
from pyml.reference.topk_attention import kept_keys, token_logits
from pyml.testing import Sample, check
from tests.op_helpers import skip_on_tensor_cores

OP = ops.OPS["topk_attention"]

pytestmark = pytest.mark.kernels
everywhere = pytest.mark.usefixtures("kernel", "on_device")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def kept_by(q: Tensor, k: Tensor, topk, **options) -> Tensor:
    """Which keys have a weight: values that are unit vectors show them."""
    v = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return ops.topk_attention(q, k, v, topk, **options) > 0


def leaf(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


# --- which keys -------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("topk", [1, 7, 64, 100, 299])
def test_of_equal_logits_the_lower_index_stays(topk):
    kept = kept_by(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 300, 4), topk)
    assert kept[..., :topk].all() and not kept[..., topk:].any()


@everywhere
def test_signed_zeros_are_equal():
    k = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, -1.0] * 30).view(1, 1, 180, 1)
    kept = kept_by(torch.ones(1, 1, 2, 1), k, 100)
    expected = (k.flatten() == 0).nonzero().flatten()[:100]
    for row in kept[0, 0]:
        assert torch.equal(row.nonzero().flatten(), expected)


def ramps(n: int) -> dict[str, Tensor]:
    """Rows of logits that mislead a sample: sorted, constant, two values, outliers, periodic, nearly equal."""
    line = torch.linspace(-20, 20, n)
    return {
        "rising": line,
        "falling": line.flip(0),
        "constant": torch.zeros(n),
        "two values": (torch.arange(n) % 3 == 0).float(),
        "outliers": torch.where(torch.arange(n) % 97 == 5, 20.0, 1e-3 * line),
        "period of the sample": torch.where(torch.arange(n) % max(n // 64, 1) == 0, 20.0, line),
        "neighbouring numbers": torch.nextafter(torch.ones(n), torch.full((n,), 2.0)).where(
            torch.arange(n) % 2 == 0, 1
        ),
        "powers": torch.exp(-torch.arange(n) / 40.0),
        "random": 5 * torch.randn(n),
        "coarse": torch.randint(-3, 4, (n,)).float(),
    }


@everywhere
@pytest.mark.parametrize("n", [5, 64, 65, 200, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selection_is_exact_on_rows_that_mislead(n, dtype):
    for name, row in ramps(n).items():
        k = row.to(dtype).view(1, 1, n, 1)
        q, v = torch.ones(1, 1, 1, 1, dtype=dtype), normal(1, 1, n, 3, dtype=dtype)
        for topk in sorted({1, 2, n // 3 + 1, min(63, n), min(64, n), n // 2 + 1, n - 1, n}):
            order = k.flatten().sort(descending=True, stable=True).indices[:topk].sort().values
            expected = k.flatten()[order].softmax(0) @ v[0, 0, order]
            got = ops.topk_attention(q, k, v, topk, scale=1.0).flatten()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, x=(name, topk): f"{x}: {m}")


@everywhere
@pytest.mark.parametrize("topk", [1, 30, 64, 699])
def test_exactly_k_keys_are_kept_by_forward_and_backward_alike(topk):
    """The backward makes the logits again: a rounding apart, and it would take other keys."""
    q, k, v = normal(1, 2, 45, 33), normal(1, 2, 700, 33), torch.eye(700).expand(1, 2, 700, 700)
    mask = torch.zeros(1, 2, 45, 700, requires_grad=True)
    out = ops.topk_attention(q, k, v, topk, mask=mask)
    assert ((out > 0).sum(-1) == topk).all()
    (slope,) = torch.autograd.grad(out, mask, torch.rand(out.shape).add(0.5))
    if topk > 1:
        assert torch.equal(slope != 0, out.detach() > 0)
    else:
        assert not slope.any(), "the probability of a single key is 1 whatever its logit"


@everywhere
def test_several_thresholds_are_the_single_ones():
    q, k, v = normal(2, 4, 50, 16), normal(2, 2, 333, 16), normal(2, 2, 333, 8)
    thresholds = [5, 200, 64, 5, 400]
    together = leaf(q, k, v)
    out = ops.topk_attention(*together, thresholds)
    assert out.shape == (5, 2, 4, 50, 8)
    upstream = torch.randn(out.shape)
    grads, apart = torch.autograd.grad(out, together, upstream), [torch.zeros_like(t) for t in (q, k, v)]
    for n, topk in enumerate(thresholds):
        single = leaf(q, k, v)
        one = ops.topk_attention(*single, topk)
        assert torch.equal(out[n], one)
        for total, g in zip(apart, torch.autograd.grad(one, single, upstream[n])):
            total += g
    torch.testing.assert_close(list(grads), apart, rtol=1e-4, atol=1e-5)
    assert ops.topk_attention(q, k, v, [7]).shape == (1, 2, 4, 50, 8)


# --- masks, heads -----------------------------------------------------------------------------------------------------


@everywhere
def test_causal_is_the_lower_triangle():
    q, k, v = normal(1, 2, 90, 8), normal(1, 2, 120, 8), normal(1, 2, 120, 8)
    first, second = leaf(q, k, v), leaf(q, k, v)
    a = ops.topk_attention(*first, 11, causal=True)
    b = ops.topk_attention(*second, 11, mask=torch.ones(90, 120, dtype=torch.bool).tril())
    assert torch.equal(a, b)
    upstream = torch.randn(a.shape)
    for x, y in zip(torch.autograd.grad(a, first, upstream), torch.autograd.grad(b, second, upstream)):
        assert torch.equal(x, y)


@everywhere
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_without_keys_gives_zero_and_zero_gradient(kind):
    q, k, v = leaf(normal(1, 2, 20, 8), normal(1, 2, 70, 8), normal(1, 2, 70, 4))
    allowed = torch.rand(20, 70) < 0.5
    allowed[3] = allowed[17] = False
    mask = allowed if kind == "bool" else torch.zeros(20, 70).masked_fill(~allowed, -torch.inf)
    out = ops.topk_attention(q, k, v, 5, mask=mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not out[:, :, [3, 17]].any() and not grads[0][:, :, [3, 17]].any()
    assert all(g.isfinite().all() for g in (out, *grads)) and out[:, :, 4].any()


@everywhere
def test_groups_of_heads_share_keys_in_the_order_of_sdpa():
    q, k, v = normal(2, 6, 40, 16), normal(2, 2, 80, 16), normal(2, 2, 80, 12)
    shared, repeated = leaf(q, k, v), leaf(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    a, b = ops.topk_attention(*shared, 9), ops.topk_attention(*repeated, 9)
    assert torch.equal(a, b)
    upstream = torch.randn(a.shape)
    found, expected = torch.autograd.grad(a, shared, upstream), torch.autograd.grad(b, repeated, upstream)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for x, y in zip(found[1:], expected[1:]):
        torch.testing.assert_close(x, y.unflatten(1, (2, 3)).sum(2), rtol=1e-4, atol=1e-5)


@everywhere
def test_all_keys_are_dense_attention():
    q, k, v = leaf(normal(2, 3, 50, 16), normal(2, 3, 90, 16), normal(2, 3, 90, 16))
    upstream = normal(2, 3, 50, 16)
    out = ops.topk_attention(q, k, v, 90)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense)
    found, expected = (torch.autograd.grad(y, (q, k, v), upstream) for y in (out, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@everywhere
@pytest.mark.parametrize(
    "shape", [(70,), (20, 70), (2, 1, 20, 70), (1, 3, 20, 70), (2, 3, 1, 70), (1, 1, 20, 1)], ids=str
)
@pytest.mark.parametrize("step", [1, 2])
def test_masks_broadcast(shape, step):
    q, k, v = normal(2, 3, 20, 8, dtype=torch.float64), *(normal(2, 3, 70, 8, dtype=torch.float64) for _ in range(2))
    wide = torch.randn(*shape[:-1], shape[-1] * step, dtype=torch.float64)[..., ::step]
    full = wide.expand(2, 3, 20, 70).contiguous().requires_grad_()
    small = wide.detach().requires_grad_()
    upstream = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    a, b = ops.topk_attention(q, k, v, 9, mask=small), ops.topk_attention(q, k, v, 9, mask=full)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (found,), (expected,) = torch.autograd.grad(a, small, upstream), torch.autograd.grad(b, full, upstream)
    torch.testing.assert_close(found, expected.sum_to_size(shape), rtol=1e-10, atol=1e-12)
    bools = ops.topk_attention(q, k, v, 9, mask=wide > 0)
    assert torch.equal(bools, ops.topk_attention(q, k, v, 9, mask=full > 0))


@everywhere
def test_vmap_over_queries_under_one_mask():
    q, k, v = (normal(2, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(1, 1, 6, 6, dtype=torch.float64)

    def loss(q, mask):
        return ops.topk_attention(q, k, v, 3, mask=mask).sin().sum()

    rows = torch.stack([q, 2 * q, -q])
    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(rows, mask)
    for n in range(3):
        expected = torch.func.grad(loss, argnums=(0, 1))(rows[n], mask)
        torch.testing.assert_close([t[n] for t in found], list(expected))


# --- numbers ----------------------------------------------------------------------------------------------------------


@everywhere
def test_nan_reaches_what_may_see_it_and_nothing_else():
    q, k, v = normal(1, 1, 20, 8), normal(1, 1, 90, 8), normal(1, 1, 90, 8)
    q[0, 0, 5] = torch.nan
    inputs = leaf(q, k, v)
    out = ops.topk_attention(*inputs, 4)
    wrong = torch.tensor([i == 5 for i in range(20)])
    assert out[0, 0, wrong].isnan().all() and out[0, 0, ~wrong].isfinite().all()
    dq = torch.autograd.grad(out, inputs, torch.ones_like(out))[0]
    assert dq[0, 0, wrong].isnan().all() and dq[0, 0, ~wrong].isfinite().all()
    q, k = normal(1, 1, 20, 8), k.clone()
    k[0, 0, 7] = torch.nan
    allowed = torch.ones(20, 90, dtype=torch.bool)
    allowed[10:, 7] = False
    for mask in (allowed, torch.zeros(20, 90).masked_fill(~allowed, -torch.inf)):
        out = ops.topk_attention(q, k, v, 4, mask=mask)
        assert out[0, 0, :10].isnan().all() and out[0, 0, 10:].isfinite().all()


@everywhere
def test_a_key_that_is_not_kept_has_no_influence(kernel):
    if kernel == "triton":
        pytest.skip("triton: a NaN in v reaches every query of its tile, as the op's docstring allows")
    q, k, v = torch.ones(1, 1, 9, 4), torch.ones(1, 1, 30, 4), normal(1, 1, 30, 4)
    v[0, 0, 20:] = torch.nan
    assert ops.topk_attention(q, k, v, 20).isfinite().all()
    assert ops.topk_attention(q, k, v, 21).isnan().all()


@everywhere
@pytest.mark.parametrize("large", [1e4, 1e18])
def test_large_logits_do_not_overflow(large):
    q, k, v = normal(1, 1, 10, 8), normal(1, 1, 50, 8), normal(1, 1, 50, 8)
    out = ops.topk_attention(large * q, k, v, 5)
    best = (q @ k.transpose(-1, -2)).argmax(-1)
    torch.testing.assert_close(out, v[:, :, best[0, 0]], rtol=1e-3, atol=1e-3)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_compared_in_float32(dtype, kernel):
    skip_on_tensor_cores(kernel)
    q, k, v = (normal(2, 2, 60, 24, dtype=dtype) for _ in range(3))
    inputs, wide = leaf(q, k, v), leaf(q.float(), k.float(), v.float())
    a, b = ops.topk_attention(*inputs, 7), ops.topk_attention(*wide, 7)
    assert torch.equal(a, b.to(dtype))
    upstream = normal(*a.shape, dtype=dtype)
    found, expected = torch.autograd.grad(a, inputs, upstream), torch.autograd.grad(b, wide, upstream.float())
    torch.testing.assert_close([g.float() for g in found], list(expected), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sums_are_as_accurate_as_those_of_torch(dtype, kernel, device):
    """Attention over channels has few tokens and a depth of all pixels."""

    def build(g: torch.Generator) -> dict:
        q, k, v = (torch.randn(2, 1, 12, n, generator=g, dtype=torch.float64) for n in (20000, 20000, 3001))
        return {"q": q, "k": k, "v": v, "topk": [12], "mask": None, "causal": False, "scale": None,
                "straight_through": False}  # fmt: skip

    def many_keys(g: torch.Generator) -> dict:
        q, k, v = (torch.randn(1, 1, n, 16, generator=g, dtype=torch.float64) for n in (200, 8192, 8192))
        return {"q": q, "k": k, "v": v, "topk": [8192], "mask": None, "causal": False, "scale": None,
                "straight_through": False}  # fmt: skip

    check(OP, Sample("long", build), kernel, dtype, device)
    check(OP, Sample("many", many_keys), kernel, dtype, device)


@everywhere
def test_straight_through_is_hard_forward_and_dense_backward():
    q, k, v = (normal(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    inputs = leaf(q, k, v)
    out = ops.topk_attention(*inputs, 4, straight_through=True)
    assert torch.equal(out, ops.topk_attention(q, k, v, 4))
    upstream = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, inputs, upstream)
    q2, k2 = leaf(q, k)
    logits = q2 @ k2.transpose(-1, -2) * 8**-0.5
    dense = torch.autograd.grad(logits.softmax(-1) @ v, (q2, k2), upstream)
    torch.testing.assert_close((dq, dk), dense, rtol=1e-10, atol=1e-12)
    hard = logits.detach().masked_fill(~kept_keys(logits, 4), -torch.inf).softmax(-1)
    torch.testing.assert_close(dv, hard.transpose(-1, -2) @ upstream, rtol=1e-10, atol=1e-12)


@everywhere
def test_kept_keys_of_the_reference_are_those_of_the_kernel():
    q, k = 0.5 * torch.randint(-2, 3, (1, 2, 40, 6)).float(), 0.5 * torch.randint(-2, 3, (1, 2, 150, 6)).float()
    expected = kept_keys(token_logits(q, k, None, True, None, torch.float32), 9)
    assert torch.equal(kept_by(q, k, 9, causal=True), expected)


@everywhere
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads_where_the_backward_splits_its_rows(threads):
    q, k, v = leaf(normal(1, 4, 700, 24), normal(1, 1, 600, 24), normal(1, 1, 600, 20))
    mask = normal(1, 1, 700, 600).requires_grad_()
    upstream = torch.randn(1, 4, 700, 20)

    def run() -> list[Tensor]:
        out = ops.topk_attention(q, k, v, 100, mask=mask)
        return [out, *torch.autograd.grad(out, (q, k, v, mask), upstream)]

    torch.set_num_threads(3)
    expected = run()
    torch.set_num_threads(threads)
    for x, y in zip(run(), expected):
        assert torch.equal(x, y)


# --- memory, errors ---------------------------------------------------------------------------------------------------

MEMORY = """
import resource, torch
from pyml import ops
q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for n in (12288, 12288, 12288))
ops.topk_attention(*(t[:, :, :64] for t in (q, k, v)), 32).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.topk_attention(q, k, v, 64).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_matrix_of_logits_is_never_in_memory():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300)
    assert float(result.stdout) < 64, "MiB; the matrix alone is 576"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk: expected an integer >= 1 or a list of them, got .0."),
        ({"topk": []}, "topk: expected an integer >= 1 or a list of them"),
        ({"topk": [3, 2.5]}, "topk: expected an integer >= 1 or a list of them"),
        ({"topk": True}, "topk: expected an integer >= 1 or a list of them"),
        ({"topk": [1, 2], "straight_through": True}, "straight_through: expected False with several topk, got True"),
        ({"mask": torch.ones(7, 9)}, r"mask: expected a shape that broadcasts to \[B, H, N, M\] = \[1, 4, 5, 9\]"),
        ({"mask": torch.ones(5, 9, dtype=torch.int32)}, "mask: expected float32, float64, bfloat16 or float16, got"),
        ({"k": torch.ones(1, 3, 9, 6), "v": torch.ones(1, 3, 9, 6)}, "k: expected Hkv that divides H = 4, got 3"),
        ({"v": torch.ones(1, 2, 8, 6)}, r"v: expected shape \[B, Hkv, M, Dv\]"),
        ({"q": torch.ones(4, 5, 6)}, r"q: expected shape \[B, H, N, D\], got \[4, 5, 6\]"),
        ({"q": torch.ones(1, 4, 5, 6, dtype=torch.int64)}, "q: expected float32, float64, bfloat16 or float16, got"),
        ({"scale": torch.inf}, "scale: expected a finite number or None, got inf"),
    ],
)
def test_errors_are_one_sentence(change, message):
    good = {"q": torch.ones(1, 4, 5, 6), "k": torch.ones(1, 2, 9, 6), "v": torch.ones(1, 2, 9, 6), "topk": 3}
    ops.topk_attention(**good)
    with pytest.raises((ValueError, TypeError), match="topk_attention: " + message):
        ops.topk_attention(**{**good, **change})
