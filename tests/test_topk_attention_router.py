"""`route_regions`: which regions, in which order, on any input; always decided in float32."""

import pytest
import torch
from torch import Tensor

from pyml import ops
from tests.conftest import INTERPRETED
from tests.test_triton import compiled, interpret


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


OP = ops.OPS["route_regions"]

everywhere = pytest.mark.usefixtures("kernel", "on_device")


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    interpret(__file__)


def by_hand(q: Tensor, k: Tensor, scale: float, per_head: bool) -> Tensor:
    """All logits [B, 1 or H, P, Pk] in float64."""
    qm, km = q.double().mean(3), k.double().mean(3)
    logits = torch.einsum("bhpd,bhrd->bhpr", qm, km) * scale
    return logits if per_head else logits.sum(1, keepdim=True)


@everywhere
@pytest.mark.parametrize("per_head", [False, True])
def test_the_chosen_regions_are_the_most_similar_ones(per_head):
    q, k = normal(2, 3, 20, 49, 16), normal(2, 3, 130, 49, 16)
    index, logits = ops.route_regions(q, k, None, 32, per_head=per_head, return_logits=True)
    expected = by_hand(q, k, (16 if per_head else 48) ** -0.5, per_head)
    assert index.shape == (2, 3 if per_head else 1, 20, 32) and index.dtype == torch.int64
    best, chosen = expected.topk(32)
    assert torch.equal(index, chosen)  # no ties among random numbers
    torch.testing.assert_close(logits, best.float(), rtol=1e-5, atol=1e-7)


@everywhere
def test_ties_go_to_the_lower_index():
    q, k = torch.ones(1, 1, 3, 4, 8), torch.ones(1, 1, 40, 4, 8)
    index = ops.route_regions(q, k, None, 9)
    assert torch.equal(index, torch.arange(9).expand(1, 1, 3, 9))
    k[:, :, 30] *= 2
    k[:, :, [5, 17]] *= -1
    index = ops.route_regions(q, k, None, 40)[0, 0, 0].tolist()
    assert index == [30, *(n for n in range(40) if n not in (5, 17, 30)), 5, 17]


@everywhere
def test_signed_zeros_tie_and_nan_comes_first():
    q = torch.ones(1, 1, 1, 1, 1)
    k = torch.tensor([-0.0, 0.0, 1.0, -0.0, torch.nan, -torch.inf, 1.0, torch.nan, torch.inf]).view(1, 1, 9, 1, 1)
    index = ops.route_regions(q, k, None, 9)
    assert index.flatten().tolist() == [4, 7, 8, 2, 6, 0, 1, 3, 5]


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_always_decided_in_float32(dtype):
    q, k = normal(1, 2, 12, 9, 8, dtype=dtype), normal(1, 2, 30, 9, 8, dtype=dtype)
    k[:, :, 20] = k[:, :, 3]
    got = ops.route_regions(q, k, None, 11, return_logits=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = ops.route_regions(q.to(wide), k.to(wide), None, 11, return_logits=True, backend="reference")
    assert got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    if dtype == torch.float64:  # a difference that float32 does not see is a tie
        k = torch.tensor([1.0, 1.0 + 1e-12]).double().view(1, 1, 2, 1, 1)
        index = ops.route_regions(torch.ones(1, 1, 1, 1, 1).double(), k, None, 1)
        assert index.item() == 0


@everywhere
def test_the_kernel_is_the_reference_to_the_bit():
    q, k = (normal(1, 2, 18, 9, 24), normal(1, 2, 70, 9, 24)) if INTERPRETED else (
        normal(3, 2, 64, 64, 24), normal(3, 2, 256, 64, 24))  # fmt: skip
    for options in ({}, {"per_head": True}, {"scale": -0.3}):
        got = ops.route_regions(q, k, None, 32, return_logits=True, **options)
        expected = ops.route_regions(q, k, None, 32, return_logits=True, backend="reference", **options)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@everywhere
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_more_regions_tokens_and_features_than_a_program_takes_at_once(dtype, masked):
    """All places of a row, among ties; masks, and heads that choose for themselves."""
    q, k = normal(1, 2, 34, 70, 150, dtype=dtype), normal(1, 2, 66, 5, 150, dtype=dtype)
    k[:, :, [1, 40, 65]] = k[:, :, 20:21].clone()
    options = {"per_head": masked}
    if masked:
        options |= {"query_mask": torch.rand(1, 34, 70) < 0.5, "key_mask": torch.rand(1, 66, 5) < 0.3}
        options["key_mask"][:, [1, 40, 65]] = options["key_mask"][:, 20:21].clone()
        options["key_mask"][:, [0, 64]] = False
    got = ops.route_regions(q, k, None, 66, return_logits=True, **options)
    expected = ops.route_regions(q, k, None, 66, return_logits=True, backend="reference", **options)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(got[0].sort(-1).values, torch.arange(66).expand(1, 2 if masked else 1, 34, 66))


@everywhere
def test_masked_tokens_do_not_count_and_empty_regions_come_last():
    q, k = normal(1, 2, 4, 6, 8), normal(1, 2, 5, 6, 8)
    query_mask, key_mask = torch.rand(1, 4, 6) < 0.6, torch.rand(1, 5, 6) < 0.6
    query_mask[:, :, 0] = key_mask[:, :, 0] = True
    key_mask[:, 2] = False
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    index, logits = ops.route_regions(q, k, None, 5, return_logits=True, **masks)
    assert index[..., 4].eq(2).all() and logits[..., 4].eq(-torch.inf).all()
    spoilt = (
        q.masked_fill(~query_mask[:, None, :, :, None], torch.nan),
        k.masked_fill(~key_mask[:, None, :, :, None], torch.nan),
    )
    assert torch.equal(ops.route_regions(*spoilt, None, 5, **masks), index)
    keep = query_mask[:, None, :, :, None]
    means = torch.where(keep, q, 0).double().sum(3) / keep.sum(3)
    keep = key_mask[:, None, :, :, None]
    others = torch.where(keep, k, 0).double().sum(3) / keep.sum(3).clamp(min=1)
    expected = torch.einsum("bhpd,bhrd->bpr", means, others).unsqueeze(1) * 16**-0.5
    torch.testing.assert_close(logits[..., :4], expected.gather(-1, index)[..., :4].float(), rtol=1e-5, atol=1e-6)


@everywhere
def test_maps_are_cut_into_a_grid():
    q, k = normal(2, 10, 12, 20), normal(2, 10, 12, 20)
    regions = [
        t.view(2, 10, 4, 3, 5, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 1, 20, 12, 10) for t in (q, k)
    ]  # 4 x 5 regions of 3 x 4 pixels  # fmt: skip
    expected = ops.route_regions(*regions, None, 6)
    assert torch.equal(ops.route_regions(q, k, (4, 5), 6), expected)
    assert torch.equal(ops.route_regions(q, k, None, 6, region_size=(3, 4)), expected)
    assert ops.route_regions(q, k[..., :8, :], None, 3, region_size=4).shape == (2, 1, 15, 3)


@everywhere
def test_no_gradient():
    q, k = normal(1, 2, 4, 6, 8).requires_grad_(), normal(1, 2, 5, 6, 8).requires_grad_()
    _, logits = ops.route_regions(q, k, None, 2, return_logits=True)
    assert not logits.requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk: expected an integer from 1 to Pk = 4, got 0"),
        ({"topk": 5}, "topk: expected an integer from 1 to Pk = 4, got 5"),
        ({"topk": 2.0}, "topk: expected an integer from 1 to Pk = 4, got 2.0"),
        ({"k": torch.ones(1, 2, 4, 6, 7)}, r"k: expected shape \[B, H, Pk, Sk, D\]"),
        ({"q": torch.ones(1, 8, 6, 6)}, r"q: expected shape \[B, H, regions, tokens, D\], got \[1, 8, 6, 6\]"),
        ({"grid": 2}, r"q: expected a map \[B, C, height, width\], got \[1, 2, 3, 6, 8\]"),
        ({"scale": torch.inf}, "scale: expected a finite number or None, got inf"),
        ({"query_mask": torch.ones(1, 3, 6)}, "query_mask: expected torch.bool, got torch.float32"),
    ],
)
def test_errors_are_one_sentence(change, message, backend):
    good = {"q": torch.ones(1, 2, 3, 6, 8), "k": torch.ones(1, 2, 4, 6, 8), "grid": None, "topk": 2}
    ops.route_regions(**good, backend=backend)
    with pytest.raises((ValueError, TypeError), match=f"^route_regions: {message}"):
        ops.route_regions(**{**good, **change}, backend=backend)


def test_wrong_grids_are_named():
    image = torch.ones(1, 3, 12, 20)
    for options, message in (
        ({"grid": 5}, r"grid: expected divisors of the size \[12, 20\] of q, got 5"),
        ({"grid": (0, 2)}, "grid: expected an integer or a pair of integers >= 1"),
        ({"grid": None, "region_size": (3, 7)}, r"region_size: expected divisors of the size \[12, 20\] of q"),
        ({"grid": 2, "region_size": 2}, "region_size: expected None, or a grid of None"),
    ):
        with pytest.raises(ValueError, match=f"^route_regions: {message}"):
            ops.route_regions(image, image, topk=2, **options)
