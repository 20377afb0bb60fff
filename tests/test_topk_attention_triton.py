"""Triton kernels of region attention in the interpreter: the inverted list, NaN, masks, bad indices.

On a GPU tests/test_topk_attention_region.py and tests/test_topk_attention_region_gpu.py run on them.
"""

import pytest
import torch

from pyml.backend import triton_reason
from pyml.reference import topk_attention as reference
from tests.conftest import INTERPRETED
from tests.test_topk_attention_region import large_logits_of_any_seed, one_key_takes_all, rows_of_p_add_up
from tests.test_triton import run

pytestmark = pytest.mark.skipif(triton_reason() is not None, reason=triton_reason() or "")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter: TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETED, reason="starts a process of its own")
def test_in_the_interpreter():
    out = run("pytest", __file__, "-q", TRITON_INTERPRET="1")
    assert " passed" in out and "failed" not in out and "skipped" not in out.replace("1 skipped", ""), out[-3000:]


def members(lists, row: int) -> tuple[list[int], list[int]]:
    """The slots of one row of the inverted list, and the numbers of its chunks."""
    begin, end = lists.first_slot[row : row + 2].tolist()
    chunks = (lists.row_of_chunk == row).nonzero().flatten().tolist()
    return lists.slots[begin:end].tolist(), chunks


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("counted", [False, True])
def test_the_inverted_list_names_every_slot_once_in_order(heads, counted, device):
    from pyml.triton_kernels.topk_attention_host import choosers

    B, P, K, regions = 2, 40, 5, 7
    index = torch.randint(-1, regions - 1, (B, heads, P, K))
    index[..., 0] = 1  # a long row; nobody names the last region
    counts = torch.randint(K + 1, (B, heads, P)) if counted else None
    lists = choosers(index.to(device), None if counts is None else counts.to(device), regions)
    used = index if counts is None else index.where(torch.arange(K) < counts.unsqueeze(-1), -1)
    assert len(lists.row_of_chunk) <= B * heads * regions * 2 + 1
    for group in range(B * heads):
        for region in range(regions):
            row = group * regions + region
            inside = torch.full_like(used, -1).view(B * heads, P, K)
            inside[group] = used.reshape(B * heads, P, K)[group]
            expected = (inside.flatten() == region).nonzero().flatten().tolist()
            slots, chunks = members(lists, row)
            assert slots == expected
            first, last = lists.first_chunk[row : row + 2].tolist()
            assert chunks == list(range(first, last)) and len(chunks) == -(-len(expected) // lists.size)
            assert region != 1 or counted or len(chunks) > 1


def test_the_list_of_an_index_without_regions_is_empty(device):
    from pyml.triton_kernels.topk_attention_host import choosers

    lists = choosers(torch.full((1, 1, 3, 2), -1, device=device), None, 4)
    assert lists.first_slot.tolist() == [0] * 5 and lists.first_chunk.tolist() == [0] * 5
    assert (lists.row_of_chunk == 4).all()  # beyond the last row: no work


def given(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 4, 3, n, generator=g, dtype=torch.float64) for n in (4, 4, 2))
    return {"q": q, "k": k, "v": v, "index": torch.tensor([[[[0, 1], [1, 2], [2, -1], [1, 1]]]])}


def both_ways(q, k, v, index, key_mask=None):
    """Output and gradients of the Triton kernels, and of the reference."""
    from pyml.triton_kernels.topk_attention import region_attention_bwd, region_attention_fwd

    arguments = (q, k, v, index, None, None, key_mask, None)
    out, lse, exact, _ = region_attention_fwd(*arguments)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    mask = [True, True, True, False]
    got = [out, *region_attention_bwd(grad, *arguments, out, lse, exact, mask)[:3]]
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = reference.region_attention(*inputs, index, key_mask=key_mask)
    return got, [truth, *torch.autograd.grad(truth, inputs, grad)]


@interpreted
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_what_it_reaches_in_the_reference(name):
    values = given()
    values[name][0, 0, 1, 1, 0] = torch.nan
    got, truth = both_ways(**values)
    for found, expected in zip(got, truth):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_add_up_to_one_however_large_the_logits(weighted):
    rows_of_p_add_up(weighted, 16, "triton")


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("large", [1e3, 1e5])
def test_one_key_takes_all(large, weighted):
    one_key_takes_all(large, weighted, "triton")


@interpreted
@pytest.mark.parametrize("name", ["large-logits", "large-logits-weights"])
def test_large_logits_of_some_seeds_are_as_accurate_as_those_of_torch(name):
    large_logits_of_any_seed(name, 6, "triton", "cpu")


@interpreted
def test_masked_keys_are_never_seen_not_even_nan():
    values = given()
    key_mask = torch.ones(1, 4, 3, dtype=torch.bool)
    key_mask[0, 1, 1] = key_mask[0, 2] = False
    clean = both_ways(**values, key_mask=key_mask)[0]
    for name in ("k", "v"):
        values[name] = values[name].masked_fill(~key_mask[:, None, :, :, None], torch.nan)
    got, truth = both_ways(**values, key_mask=key_mask)
    for found, before, expected in zip(got, clean, truth):
        assert torch.equal(found, before)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    assert (got[0][0, :, 2] == 0).all() and (got[1][0, :, 2] == 0).all()  # a query region without a valid key
    assert (got[2][0, :, 2:] == 0).all() and (got[3][0, :, 2:] == 0).all()


@interpreted
@pytest.mark.parametrize("bad", [4, -2, 2**62, -(2**63)])
def test_an_index_out_of_range_is_not_read_and_sets_the_status_word(bad, monkeypatch):
    """On a CPU the launcher refuses it; on a GPU the kernel meets it."""
    from pyml.triton_kernels import topk_attention_region as module

    values = given()
    wrong, clean = values["index"].clone(), values["index"].clone()
    wrong[0, 0, 1, 0], clean[0, 0, 1, 0] = bad, -1
    q, k, v = (values[n] for n in "qkv")
    with pytest.raises(ValueError, match=rf"index: expected regions from 0 to 3 or -1 for none, got {bad}"):
        module.region_attention_fwd(q, k, v, wrong, None, None, None, None)
    expected, _, _, status = module.region_attention_fwd(q, k, v, clean, None, None, None, None)
    assert status.item() == 0
    monkeypatch.setattr(module, "check_regions", lambda *arguments: None)
    out, _, _, status = module.region_attention_fwd(q, k, v, wrong, None, None, None, None)
    assert status.item() == 1 and torch.equal(out, expected)


@interpreted
@pytest.mark.parametrize("bad", [3, -1, 2**62])
def test_counts_out_of_range_are_clamped_and_set_the_status_word(bad, monkeypatch):
    from pyml.triton_kernels import topk_attention_region as module

    values = given()
    counts = torch.tensor([[[2, bad, 2, 1]]])
    arguments = (values["q"], values["k"], values["v"], values["index"], None)
    with pytest.raises(ValueError, match="counts: expected numbers from 0 to K = 2"):
        module.region_attention_fwd(*arguments, counts, None, None)
    expected = module.region_attention_fwd(*arguments, counts.clamp(0, 2), None, None)[0]
    monkeypatch.setattr(module, "check_regions", lambda *arguments: None)
    out, _, _, status = module.region_attention_fwd(*arguments, counts, None, None)
    assert status.item() == 1 and torch.equal(out, expected)


def test_rows_too_wide_for_shared_memory_are_refused(device):
    from pyml.triton_kernels.topk_attention import region_attention_fwd

    q = torch.zeros(1, 1, 1, 1, 513, device=device)
    with pytest.raises(ValueError, match=r"region_attention: q: expected at most 512 features .* got 513"):
        region_attention_fwd(q, q, q, torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device), None, None, None, None)
