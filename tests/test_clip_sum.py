"""Clipped sums of per-sample gradients: the rules at their edges. What they compute in general: test_ops.py."""

import pytest
import torch

from pyml.ops import clip_sum

INF, NAN = torch.inf, torch.nan


def test_no_sample_counts_with_more_than_its_clip_norm():
    g = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    sums, norms, bad = clip_sum([g], 1.0)
    assert torch.allclose(norms[:, 0], g.norm(dim=1), rtol=1e-6)
    expected = (g / g.norm(dim=1, keepdim=True).clamp(min=1)).sum(0)
    assert torch.allclose(sums[0], expected, atol=1e-6) and bad == 0
    for n in range(9):
        assert clip_sum([g[n : n + 1]], 1.0)[0][0].norm() <= 1 + 1e-6


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_a_bad_sample_takes_no_part(wrong):
    g, h = torch.randn(5, 30), torch.randn(5, 2, 3)
    expected = clip_sum([g[[0, 1, 3, 4]], h[[0, 1, 3, 4]]], 2.0)
    g[2, 7] = wrong
    sums, norms, bad = clip_sum([g, h], 2.0)
    assert bad == 1 and not norms[2].isfinite().any() and norms[[0, 1, 3, 4]].isfinite().all()
    for got, right in zip(sums, expected[0]):
        assert torch.allclose(got, right, atol=1e-6) and got.isfinite().all()


def test_a_bad_group_takes_the_whole_sample():
    g, h = torch.randn(3, 4), torch.randn(3, 5)
    h[1, 0] = NAN
    sums, _, bad = clip_sum([g, h], [10.0, 10.0], groups=[0, 1])
    assert bad == 1
    assert torch.allclose(sums[0], g[0] + g[2], atol=1e-6)


def test_large_gradients_do_not_overflow():
    g = torch.full((2, 100), 1e30)
    sums, norms, bad = clip_sum([g], 3.0)
    assert bad == 0 and torch.allclose(norms, torch.full((2, 1), 1e31), rtol=1e-6)
    assert torch.allclose(sums[0], torch.full((100,), 0.6), rtol=1e-6)


def test_the_whitened_norm_is_that_of_g_over_scale():
    g, s = torch.randn(6, 50), torch.rand(50) + 0.1
    norms = clip_sum([g], 1.0, scale=[s])[1]
    assert torch.allclose(norms[:, 0], (g / s).norm(dim=1), rtol=1e-6)


def test_tiny_scales_make_no_sample_bad():
    """1 / scale has no float32 there."""
    sums, norms, bad = clip_sum([torch.tensor([[1.0, 0.0], [0.0, 1e-20]])], 1.0, scale=[torch.tensor([1.0, 1e-39])])
    assert bad == 0 and norms[0, 0] == 1 and norms[1, 0] == pytest.approx(1e19, rel=1e-3)
    assert sums[0][0] == 1


def test_an_element_of_scale_zero_is_dropped():
    g, s = torch.randn(4, 6), torch.tensor([1.0, 0, 2, 0, 1, 1])
    g[1, 1], g[2, 3] = NAN, INF
    sums, _, bad = clip_sum([g], 100.0, scale=[s])
    assert bad == 0 and sums[0][[1, 3]].tolist() == [0, 0]
    assert torch.allclose(sums[0][[0, 2, 4, 5]], g[:, [0, 2, 4, 5]].sum(0), atol=1e-6)


def test_a_global_clip_bounds_all_groups_together():
    g, h = torch.randn(7, 20) * 5, torch.randn(7, 30) * 5
    for n in range(7):
        sums = clip_sum([g[n : n + 1], h[n : n + 1]], [3.0, 4.0], groups=[0, 1], global_clip=2.0)[0]
        assert torch.cat(sums).norm() <= 2 + 1e-5
        assert sums[0].norm() / sums[1].norm() == pytest.approx(0.75, rel=1e-5)


def test_no_samples_give_zeros():
    sums, norms, bad = clip_sum([torch.zeros(0, 3, 4), torch.zeros(0)], 1.0)
    assert [tuple(s.shape) for s in sums] == [(3, 4), ()] and not any(s.any() for s in sums)
    assert norms.shape == (0, 1) and bad == 0


def test_sixteen_bit_gradients_are_summed_in_float32():
    g = torch.full((3000, 2), 1.0).bfloat16()
    assert clip_sum([g], 10.0)[0][0].tolist() == [3000, 3000]


def test_how_many_samples_are_held_at_once_changes_no_bit():
    """Small tensors are taken whole, large ones a few samples at a time: the same tensor beside a large one."""
    g = torch.randn(64, 1000)
    beside = torch.zeros(64, 200_000)
    alone, together = clip_sum([g], 20.0)[0][0], clip_sum([g, beside], 20.0)[0][0]
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_sample_grads": []}, "clip_sum: per_sample_grads: expected at least one tensor, got none"),
        (
            {"per_sample_grads": [torch.ones(3, 2).int()]},
            r"clip_sum: per_sample_grads\[0\]: expected float32, float64, ",
        ),
        ({"clip": -1.0}, "clip_sum: clip: expected finite numbers of at least 0, got -1.0"),
        ({"clip": [1.0, 2.0]}, "clip_sum: groups: expected the group of each tensor, for 2 clip norms, got None"),
        ({"groups": [0, 1]}, r"clip_sum: groups: expected groups in \[0, 1\), as many as clip norms, got 1"),
        ({"columns": [torch.ones(2)]}, "clip_sum: columns: expected none without a scale, got list"),
    ],
)
def test_bad_calls_are_refused(change, message):
    arguments = {"per_sample_grads": [torch.randn(3, 4), torch.randn(3, 2)], "clip": 1.0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        clip_sum(**arguments)
