"""Properties of `region_attention` that the generic tests do not see: what counts as a key, whose gradient it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyml import ops
from pyml.reference import topk_attention as reference
from pyml.testing import Sample, assert_accurate, check
from pyml.testing.topk_attention import SAMPLES
from tests.op_helpers import skip_on_tensor_cores

OP = ops.OPS["region_attention"]
HALF = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.kernels
everywhere = pytest.mark.usefixtures("kernel", "on_device")


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def choice(B: int, heads: int, P: int, K: int, regions: int) -> Tensor:
    return torch.rand(B, heads, P, regions).argsort(-1)[..., :K].contiguous()


def leaf(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def with_gradients(attention, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k, v and more, for a fixed upstream gradient."""
    inputs = leaf(q, k, v, *more)
    out = attention(*inputs)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def activations(channels: int, side: int, regions: int, heads: int) -> Tensor:
    """Features of a smooth picture with some noise, by a random projection: neighbours are alike, logits uneven."""
    picture = F.interpolate(torch.rand(1, 3, 9, 9), size=(side, side), mode="bicubic")
    picture = picture + 0.02 * torch.randn(1, 3, side, side)
    x = 3 * torch.einsum("nchw,dc->ndhw", picture - picture.mean((2, 3), keepdim=True), torch.randn(channels, 3))
    n, s = regions, side // regions
    x = x.view(1, heads, channels // heads, n, s, n, s)
    return x.permute(0, 1, 3, 5, 4, 6, 2).reshape(1, heads, n * n, s * s, channels // heads)


# --- against dense attention and the reference ------------------------------------------------------------------------


@everywhere
def test_all_regions_once_are_dense_attention():
    q, k, v = normal(2, 2, 5, 9, 24), normal(2, 2, 7, 11, 24), normal(2, 2, 7, 11, 6)
    index = choice(2, 1, 5, 7, 7)  # in any order

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))
        return flat.view(2, 2, 5, 9, 6)

    got = with_gradients(lambda q, k, v: ops.region_attention(q, k, v, index), q, k, v)
    torch.testing.assert_close(got, with_gradients(dense, q, k, v), rtol=1e-11, atol=1e-11)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accurate_on_activations_at_the_published_sizes(dtype):
    q, k, v = (activations(c, 64, 8, 2).to(dtype) for c in (48, 48, 12))
    index = ops.route_regions(q, k, None, 16)
    scale = 48**-0.5

    def run(attention, dtype: torch.dtype) -> list[Tensor]:
        return with_gradients(lambda *t: attention(*t, index, scale=scale), *(t.to(dtype) for t in (q, k, v)))

    found = run(ops.region_attention, dtype)
    truth, same = run(reference.region_attention, torch.float64), run(reference.region_attention, dtype)
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), found, truth, same):
        assert_accurate(name, a, b, c)


@everywhere
@pytest.mark.parametrize("sizes", [(49, 49), (63, 17), (1, 130), (200, 3)])
def test_any_number_of_tokens_in_a_region(sizes):
    S, Sk = sizes
    q, k, v = normal(1, 2, 3, S, 20), normal(1, 2, 4, Sk, 20), normal(1, 2, 4, Sk, 9)
    index = choice(1, 2, 3, 2, 4)
    got = with_gradients(lambda *t: ops.region_attention(*t, index), q, k, v)
    expected = with_gradients(lambda *t: reference.region_attention(*t, index), q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@everywhere
def test_a_region_named_twice_counts_twice():
    q, k, v = normal(1, 1, 1, 6, 4), normal(1, 1, 3, 5, 4), normal(1, 1, 3, 5, 2)
    twice = torch.tensor([[[[1, 2, 1]]]])

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.cat([t[:, :, n] for n in (1, 2, 1)], 2) for t in (k, v))
        return F.scaled_dot_product_attention(q[:, :, 0], keys, values).unsqueeze(2)

    got = with_gradients(lambda *t: ops.region_attention(*t, twice), q, k, v)
    torch.testing.assert_close(got, with_gradients(dense, q, k, v), rtol=1e-11, atol=1e-11)


@everywhere
def test_views_of_one_projection_and_of_a_map():
    """Channels in the last dimension of one matrix, and a map [B, C, height, width] whose rows are the regions."""
    index = choice(1, 1, 6, 3, 6)
    joint = normal(1, 6, 8, 2 * (5 + 5 + 3))
    q, k, v = (t.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4) for t in joint.split([10, 10, 6], -1))
    assert not q.is_contiguous()
    torch.testing.assert_close(
        ops.region_attention(q, k, v, index),
        ops.region_attention(q.contiguous(), k.contiguous(), v.contiguous(), index), rtol=0, atol=0,
    )  # fmt: skip
    image = normal(1, 2 * 5, 6, 8)
    rows = image.view(1, 2, 5, 6, 8).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(
        with_gradients(lambda *t: ops.region_attention(*t, index), rows, rows, rows),
        with_gradients(lambda *t: reference.region_attention(*t, index), rows, rows, rows), rtol=1e-11, atol=1e-11,
    )  # fmt: skip


# --- what is no key ---------------------------------------------------------------------------------------------------


@everywhere
def test_missing_entries_by_minus_one_and_by_counts_are_the_same():
    q, k, v = normal(1, 2, 4, 6, 8), normal(1, 2, 5, 7, 8), normal(1, 2, 5, 7, 3)
    index = choice(1, 1, 4, 3, 5)
    counts = torch.tensor([[[3, 2, 0, 1]]])
    beyond = torch.arange(3) >= counts.unsqueeze(-1)
    by_sign = with_gradients(lambda *t: ops.region_attention(*t, index.masked_fill(beyond, -1)), q, k, v)
    garbage = index.masked_fill(beyond, 2**62)
    by_count = with_gradients(lambda *t: ops.region_attention(*t, garbage, counts=counts), q, k, v)
    for a, b in zip(by_sign, by_count):
        assert torch.equal(a, b)
    first = ops.region_attention(q, k, v, index[..., :1])
    torch.testing.assert_close(by_sign[0][:, :, 3], first[:, :, 3], rtol=1e-13, atol=1e-13)


@everywhere
@pytest.mark.parametrize("way", ["all -1", "masked", "no count"])
def test_a_query_without_keys_gives_zero_and_zero_gradient(way):
    q, k, v = normal(1, 2, 3, 5, 8), normal(1, 2, 4, 6, 8), normal(1, 2, 4, 6, 3)
    index = torch.tensor([[[[0, 1], [2, 2], [1, 3]]]])
    options: dict[str, Tensor] = {}
    if way == "all -1":
        index[:, :, 1] = -1
    elif way == "masked":
        options["key_mask"] = torch.ones(1, 4, 6, dtype=torch.bool).index_fill(1, torch.tensor([2]), False)
    else:
        options["counts"] = torch.tensor([[[2, 0, 2]]])
    out, dq, dk, dv = with_gradients(lambda *t: ops.region_attention(*t, index, **options), q, k, v)
    assert out[:, :, 1].eq(0).all() and dq[:, :, 1].eq(0).all()
    assert dk[:, :, 2].eq(0).all() and dv[:, :, 2].eq(0).all()
    assert out[:, :, [0, 2]].ne(0).all() and dk[:, :, [0, 1, 3]].ne(0).all()


@everywhere
def test_regions_that_nobody_chose_get_exact_zeros():
    """And one that everybody chose gets the sum over all, in whatever pieces it is added up."""
    q, k, v = normal(1, 2, 100, 8, 12), normal(1, 2, 90, 8, 12), normal(1, 2, 90, 8, 5)
    index = torch.randint(2, 40, (1, 1, 100, 4))
    index[..., 2] = 1
    _, _, dk, dv = with_gradients(lambda *t: ops.region_attention(*t, index), q, k, v)
    nobody = torch.ones(90, dtype=torch.bool).index_fill(0, index.flatten(), False)
    assert nobody[0] and nobody[40:].all()
    for gradient in (dk, dv):
        assert gradient[:, :, nobody].eq(0).all()
    expected = with_gradients(lambda *t: reference.region_attention(*t, index), q, k, v)
    torch.testing.assert_close(dk[:, :, 1], expected[2][:, :, 1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dv[:, :, 1], expected[3][:, :, 1], rtol=1e-11, atol=1e-11)


@everywhere
def test_masked_keys_are_as_if_they_were_not_there():
    q, k, v = normal(1, 2, 3, 5, 8), normal(1, 2, 4, 70, 8), normal(1, 2, 4, 70, 3)
    index = choice(1, 1, 3, 4, 4)
    mask = torch.rand(1, 4, 70) < 0.5
    hidden = ~mask[:, None, :, :, None]
    clean = with_gradients(lambda *t: ops.region_attention(*t, index, key_mask=mask), q, k, v)
    spoilt = with_gradients(
        lambda *t: ops.region_attention(*t, index, key_mask=mask),
        q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf),
    )  # fmt: skip
    for a, b in zip(clean, spoilt):
        assert torch.equal(a, b)
    assert clean[2].masked_select(hidden).eq(0).all() and clean[3].masked_select(hidden).eq(0).all()
    bias = torch.zeros(1, 1, 1, 280).masked_fill(~mask.flatten(1)[:, None, None], -torch.inf).double()
    dense = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), attn_mask=bias)
    torch.testing.assert_close(clean[0], dense.view(1, 2, 3, 5, 3), rtol=1e-11, atol=1e-11)


@everywhere
def test_nan_reaches_the_queries_that_see_it_and_no_others():
    q, k, v = normal(1, 1, 3, 5, 8, dtype=torch.float32), normal(1, 1, 4, 6, 8), normal(1, 1, 4, 6, 3)
    index = torch.tensor([[[[0, 1], [1, 2], [3, 3]]]])
    payload = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32).item()  # a NaN with bits of its own
    for name, spoil in (("q", (0, 0, 1, 2)), ("k", (0, 0, 2, 4)), ("v", (0, 0, 2, 4))):
        inputs = {"q": q.clone(), "k": k.float(), "v": v.float()}
        inputs[name][spoil] = payload
        out, dq, _, _ = with_gradients(lambda *t: ops.region_attention(*t, index), *inputs.values())
        seen = torch.zeros(1, 1, 3, 5, 3, dtype=torch.bool)
        seen[:, :, 1, 2 if name == "q" else slice(None)] = True
        assert torch.equal(out.isnan(), seen), name
        assert torch.equal(dq.isnan().any(-1), seen.any(-1)), name


def one_key_takes_all(large: float, weighted: bool, backend: str | None = None, features: int = 3) -> None:
    """Whether the others get nothing, in value and gradient; a weight only scales the value. `features` of the values:
    delta must be summed as the products of the gradient are, however many there are."""
    k = torch.eye(8).view(1, 1, 2, 4, 8)
    q = large * torch.eye(8)[[5, 2]].view(1, 1, 1, 2, 8)
    v = (torch.arange(8.0 * features) * (3 / features) ** 2).view(1, 1, 2, 4, features)
    index, weight = torch.tensor([[[[0, 1]]]]), torch.tensor([[[[0.7, 1.3]]]])

    def attention(q: Tensor, k: Tensor, v: Tensor, *weight: Tensor) -> Tensor:
        return ops.region_attention(q, k, v, index, region_weight=weight[0] if weight else None, backend=backend)

    out, dq, dk, dv, *dweight = with_gradients(attention, q, k, v, *([weight] if weighted else []))
    taken = v.view(8, features)[[5, 2]]
    assert torch.equal(out[0, 0, 0], taken * weight.view(2, 1).flip(0) if weighted else taken)
    terms = torch.linspace(-1, 2, 2 * features).view(2, features) * taken
    cancelled = 0.0 if features == 3 else 1e-6 * terms.abs().sum(-1).max().item()
    for found in dweight:
        torch.testing.assert_close(found.flatten(), terms.sum(-1).flip(0), rtol=1e-6, atol=cancelled)
    assert dq.abs().max() < 1e-30 and dk.abs().max() < 1e-30
    assert dv.view(8, features)[[0, 1, 3, 4, 6, 7]].abs().max() < 1e-30


@everywhere
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("features", [3, 16, 33])
@pytest.mark.parametrize("large", [1e3, 1e5])
def test_one_key_takes_all(large, features, weighted):
    one_key_takes_all(large, weighted, features=features)


def rows_of_p_add_up(weighted: bool, regions: int, backend: str | None = None) -> None:
    """dV of a region with one query is a row of P, made again from a log-sum-exp near 6000: whether it adds up to 1."""
    q = 1000 + normal(1, 1, regions, 1, 16, dtype=torch.float32)
    k = 1 + 1e-4 * normal(1, 1, regions, 40, 16, dtype=torch.float32)
    v = normal(1, 1, regions, 40, 3, dtype=torch.float32).requires_grad_()
    weight = 0.5 + torch.rand(1, 1, regions, 1) if weighted else None
    index = torch.arange(regions).view(1, 1, regions, 1)
    out = ops.region_attention(q, k, v, index, region_weight=weight, backend=backend)
    (dv,) = torch.autograd.grad(out.sum(), v)
    rows = dv.sum(3) if weight is None else dv.sum(3) / weight
    torch.testing.assert_close(rows, torch.ones(1, 1, regions, 3), rtol=0, atol=3e-6)


@everywhere
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_add_up_to_one_however_large_the_logits(weighted):
    rows_of_p_add_up(weighted, 64)


def large_logits_of_any_seed(name: str, seeds: int, kernel: str, device: str) -> None:
    """Rounding of the size of a logit is an error of its probability: torch makes as much of it, but no more."""
    build = next(s.build for s in SAMPLES["region_attention"] if s.id == name)
    for seed in range(seeds):
        check(OP, Sample(f"{name} {seed}", build), kernel, torch.float32, device)


@pytest.mark.parametrize(("name", "seeds"), [("large-logits", 40), ("large-logits-weights", 20)])
def test_large_logits_of_any_seed_are_as_accurate_as_those_of_torch(name, seeds, kernel, device):
    large_logits_of_any_seed(name, seeds, kernel, device)


# --- weights of regions -----------------------------------------------------------------------------------------------


@everywhere
def test_region_weight_multiplies_keys_and_values():
    q, k, v = normal(2, 2, 3, 5, 8), normal(2, 2, 4, 6, 8), normal(2, 2, 4, 6, 3)
    index, weight = choice(2, 1, 3, 2, 4), normal(2, 1, 3, 2)
    weight[0, 0, 0, 0] = 0

    def dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for p in range(3):
                w = weight[b, 0, p][:, None, None]
                keys, values = ((t[b][:, index[b, 0, p]] * w).flatten(1, 2) for t in (k, v))
                rows.append(F.scaled_dot_product_attention(q[b, :, p], keys, values))
        return torch.stack(rows).view(2, 3, 2, 5, 3).transpose(1, 2)

    got = with_gradients(lambda q, k, v, w: ops.region_attention(q, k, v, index, region_weight=w), q, k, v, weight)
    torch.testing.assert_close(got, with_gradients(dense, q, k, v, weight), rtol=1e-11, atol=1e-11)


@everywhere
def test_weights_of_entries_without_a_region_have_no_gradient():
    q, k, v = normal(1, 2, 2, 5, 8), normal(1, 2, 4, 6, 8), normal(1, 2, 4, 6, 3)
    index = torch.tensor([[[[0, -1, 3], [1, 2, -1]]]])
    weight = normal(1, 1, 2, 3)
    gradient = with_gradients(lambda q, k, v, w: ops.region_attention(q, k, v, index, region_weight=w), q, k, v, weight)
    assert torch.equal(gradient[4] == 0, index == -1)


# --- precision, bits --------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_inputs_are_computed_in_float32(dtype, kernel):
    """The output is the float32 one, rounded once; so are the gradients, also where one key takes almost everything."""
    skip_on_tensor_cores(kernel)
    q, k, v = normal(1, 2, 3, 9, 16, dtype=dtype) * 6, normal(1, 2, 4, 7, 16, dtype=dtype), normal(1, 2, 4, 7, 3)
    v = v.to(dtype)
    index = choice(1, 1, 3, 2, 4)
    low = with_gradients(lambda *t: ops.region_attention(*t, index), q, k, v)
    inputs = leaf(q.float(), k.float(), v.float())
    out = ops.region_attention(*inputs, index)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=dtype).view(out.shape)
    full = [out, *torch.autograd.grad(out, inputs, upstream.float())]
    for a, b in zip(low, full):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@everywhere
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads_where_many_work(threads):
    q, k, v = (normal(1, 2, 64, 64, d, dtype=torch.float32) for d in (24, 24, 6))
    index = choice(1, 1, 64, 12, 64)
    weight = torch.rand(1, 1, 64, 12)

    def run() -> list[Tensor]:
        return with_gradients(lambda q, k, v, w: ops.region_attention(q, k, v, index, region_weight=w), q, k, v, weight)

    torch.set_num_threads(3)
    expected = run()
    torch.set_num_threads(threads)
    for a, b in zip(run(), expected):
        assert torch.equal(a, b)
