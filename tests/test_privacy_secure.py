"""Secure noise: the table, the sampler, its statistics, and the exact sensitivity on the grid."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyml.privacy import _gaussian as gaussian
from pyml.privacy import epsilon, new_key, noise_kind, secure, secure_batch, secure_noise, secure_sum

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")


def seeded(seed):
    """A stream for tests of the sampler; the library has none that repeats."""
    return np.random.default_rng(seed).bytes


# --- the table and the joins ------------------------------------------------------------------------------------------


def base_chances(width=4.6, reach=70):
    n = np.arange(-reach, reach + 1)
    chance = np.exp(-(n**2) / (2 * width**2))
    return n, chance / chance.sum()


def test_the_table_is_the_discrete_gaussian():
    n, chance = base_chances()
    table = [(int(high) << 64) + int(low) for high, low in gaussian.thresholds()]
    assert len(table) == gaussian.LAST and table == sorted(table, reverse=True) and table[-1] > 0
    for j, threshold in enumerate(table, 1):
        tail = chance[np.abs(n) >= j].sum()
        assert threshold / 2**128 == pytest.approx(tail, rel=1e-9), j
    beyond = 2 * sum(math.exp(-(j**2) / (2 * 4.6**2)) for j in range(gaussian.LAST + 1, 200))
    assert beyond / np.exp(-(n**2) / (2 * 4.6**2)).sum() < 2.0**-128


def test_all_128_bits_are_compared():
    """At a threshold exactly, one below it, and with the halves of two thresholds crossed."""
    for j, (high, low) in enumerate(gaussian.thresholds(), 1):
        value = (int(high) << 64) + int(low)
        for number, expected in ((value, j - 1), (value - 1, j), (value + 1, j - 1)):
            halves = np.array([number >> 64], np.uint64), np.array([number & (2**64 - 1)], np.uint64)
            assert gaussian.base_draws(*halves)[0] == expected
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert gaussian.base_draws(ends, ends).tolist() == [gaussian.LAST, 0]
    above = sum(int(high) > 0 for high, _ in gaussian.thresholds())
    assert gaussian.base_draws(ends, ends[::-1].copy()).tolist() == [above, 0]


@pytest.mark.parametrize("joins", [1, 2, 3])
def test_a_join_is_a_discrete_gaussian(joins):
    """The exact distribution of x + k y, by convolution, against the wider discrete Gaussian, in the tails too."""
    n, chance = base_chances()
    width = 4.6
    for k in gaussian.FACTORS[:joins]:
        spread = np.zeros(k * (len(chance) - 1) + 1)
        spread[::k] = chance
        chance = np.convolve(chance, spread)
        width *= math.sqrt(1 + k * k)
    n = np.arange(len(chance)) - len(chance) // 2
    wanted = np.exp(-(n**2) / (2 * width**2))
    wanted /= wanted.sum()
    near = np.abs(n) < 12 * width
    np.testing.assert_allclose(chance[near], wanted[near], rtol=1e-10)


def test_the_stated_distance_covers_its_parts():
    width, ripples = 4.6, []
    for k in gaussian.FACTORS:
        inner = width / math.sqrt(1 + k * k)
        exact = 2 * sum(math.exp(-2 * math.pi**2 * inner**2 * m**2) for m in range(1, 5))
        assert exact <= gaussian._ripple(inner) < 1e-29
        ripples.append(exact)
        width *= math.sqrt(1 + k * k)
    assert width**2 == pytest.approx(gaussian.VARIANCE, rel=1e-12) and gaussian.WIDTH > 2**20
    lost = gaussian.VARIANCE - gaussian.WIDTH**2
    assert lost == pytest.approx(gaussian.ROUNDING**2, rel=1e-3)
    assert sum(ripples) < gaussian.TOTAL_VARIATION < 1e-28


# --- statistics -------------------------------------------------------------------------------------------------------


def test_moments_and_distribution():
    drawn = gaussian.integers(200_000, seeded(1)) / math.sqrt(gaussian.VARIANCE)
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((drawn**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    cells = stats.norm.ppf(np.linspace(0, 1, 101))
    assert stats.chisquare(np.histogram(drawn, cells)[0]).pvalue > 1e-3
    lagged = (drawn[1:] * drawn[:-1]).mean()
    assert abs(lagged) < 4 / math.sqrt(n)
    low = np.bincount((gaussian.integers(50_000, seeded(2)) % 8).astype(int), minlength=8)
    assert stats.chisquare(low).pvalue > 1e-3, "every residue: the grid has no holes"


def test_bits_depend_on_the_stream_alone_and_chunks_join():
    first = gaussian.integers(3 * gaussian.CHUNK + 5, seeded(3))
    assert np.array_equal(first, gaussian.integers(3 * gaussian.CHUNK + 5, seeded(3)))
    assert len(np.unique(first)) > 0.99 * len(first) and gaussian.integers(0, seeded(3)).shape == (0,)


def test_the_stream_is_chacha20_under_fresh_keys(monkeypatch):
    """RFC 8439, the first key stream of its appendix: key 0, nonce 0; and a new key where the old one is used up."""
    asked = []
    monkeypatch.setattr(secure.os, "urandom", lambda n: asked.append(n) or bytes(n))
    monkeypatch.setattr(secure, "REKEY", 64)
    stream = secure.SecureStream()
    first = stream(64)
    assert first.hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7") and asked == [32]
    assert stream(1) == first[:1] and asked == [32, 32], "the fake key is the same"
    assert len(stream(1000)) == 1000 and asked == [32] * 3


def test_noise_fills_any_shape_and_never_repeats():
    drawn = secure_noise((3, 0, 2), 1.0)
    assert drawn.shape == (3, 0, 2)
    torch.manual_seed(0)
    first = secure_noise((100, 200), 2.5)
    torch.manual_seed(0)
    second = secure_noise((100, 200), 2.5)
    assert first.dtype == torch.float32 and (first == second).float().mean() < 1e-3
    assert first.std().item() == pytest.approx(2.5, rel=0.03) and abs(first.mean().item()) < 0.08
    grid = secure_noise((50,), 1.0, dtype=torch.float64) * gaussian.WIDTH
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-6)
    scale = torch.tensor([0.0, 1.0, 100.0])
    columns = secure_noise((4000, 3), 1.0, scale=scale)
    assert not columns[:, 0].any() and columns[:, 2].std().item() == pytest.approx(100, rel=0.06)
    assert not secure_noise((4,), 0.0).any() and secure_noise((), 1.0, dtype=torch.bfloat16).dtype == torch.bfloat16


# --- sums -------------------------------------------------------------------------------------------------------------


def per_sample(batch, *shapes, dtype=torch.float32):
    return [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("radius", [3.0, 1000.0, 1.1e6])
def test_no_record_moves_the_sum_by_more_than_is_accounted_for(radius):
    """Each record is taken out in turn; the exact integer norm of the change stays within the limit."""
    given = per_sample(12, (5, 3), (7,), dtype=torch.float64)
    given[0][3] *= 1e6
    given[1][4] = 0
    scales = [torch.rand(5, 3, dtype=torch.float64) + 0.1, torch.rand(7, dtype=torch.float64)]
    whole, norms, kept, limit = secure.grid_sum(given, scales, 0.7, radius)
    assert kept.all() and limit <= (radius + math.sqrt(22) / 2) ** 2
    wanted = sum((g / s).flatten(1).square().sum(1) for g, s in zip(given, scales)).sqrt()
    torch.testing.assert_close(norms, wanted)
    for i in range(12):
        rest = [torch.cat([g[:i], g[i + 1 :]]) for g in given]
        without = secure.grid_sum(rest, scales, 0.7, radius)[0]
        moved = sum(int((a - b).square().sum()) for a, b in zip(whole, without))
        assert moved <= limit
        if norms[i] > 0.7:
            assert moved >= (radius - math.sqrt(22) / 2) ** 2 or radius < 4, "it is clipped, not dropped"


def test_adversarial_rounding_stays_within_the_limit():
    """All coordinates just above a half, so that each is rounded up: the worst case of the bound."""
    for n in (1, 16, 400):
        step = torch.full((1, n), 0.5 + 1e-9, dtype=torch.float64)
        radius = step.norm().item()
        totals, _, kept, limit = secure.grid_sum([step], [torch.ones(n, dtype=torch.float64)], radius, radius)
        assert kept.all() and int(totals[0].square().sum()) == n <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sum_is_the_clipped_sum_and_noise(dtype):
    given = [g.to(dtype) for g in per_sample(40, (3, 4), (6,), ())]
    scales = [torch.rand(3, 4) + 0.5, 0.25, 2.0]
    found = secure_sum(given, 1.5, 1e-2, scale=scales)
    white = [g.double() / s for g, s in zip(given, [scales[0].double(), 0.25, 2.0])]
    norms = torch.stack([w.reshape(40, -1).square().sum(1) for w in white]).sum(0).sqrt()
    factor = (1.5 / norms).clamp(max=1)
    wanted = [(w.movedim(0, -1) * factor).sum(-1) * s for w, s in zip(white, [scales[0].double(), 0.25, 2.0])]
    torch.testing.assert_close(found.norms, norms)
    for sums, want in zip(found.sums, wanted):
        assert sums.dtype == dtype
        torch.testing.assert_close(sums.double(), want, rtol=1e-2, atol=0.15 if dtype != torch.bfloat16 else 0.3)
    assert found.bad == 0


def test_noise_of_the_sum_has_the_stated_size():
    scale = torch.linspace(0, 3, 50)
    drawn = torch.stack([secure_sum([torch.zeros(0, 50)], 1.0, 0.8, scale=[scale]).sums[0] for _ in range(400)])
    assert not drawn[:, 0].any(), "a scale of 0 drops the element, noise and all"
    z = drawn[:, 1:] / (0.8 * scale[1:])
    assert z.std().item() == pytest.approx(1, abs=0.03) and abs(z.mean().item()) < 0.04


def test_the_multiplier_pays_for_the_rounding():
    small = secure_sum([torch.zeros(2, 10)], 0.5, 0.55)
    assert small.multiplier < 1.1 and small.multiplier == pytest.approx(1.1, rel=1e-5)
    large = secure_sum([torch.zeros(1, 10_000)], 0.5, 0.55)
    expected = 1.1 / (1 + 50 * 1.1 / gaussian.WIDTH)
    assert large.multiplier == pytest.approx(expected, rel=1e-9) and large.multiplier < small.multiplier
    assert large.total_variation == 10_000 * gaussian.TOTAL_VARIATION < 1e-24
    needs = pytest.importorskip
    needs("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")
    at = {"delta": 1e-5, "provenance": "public"}
    ideal = epsilon(1.1, 0.1, 100, **at)
    paid = epsilon(large.multiplier, 0.1, 100, total_variation=100 * large.total_variation, noise="secure", **at)
    assert paid == pytest.approx(ideal, rel=1e-3) and "secure noise on a grid" in str(paid)


def test_the_ends_of_the_multiplier():
    for std in (secure.LEAST_MULTIPLIER, secure.MOST_MULTIPLIER):
        for shape in ((2, 1), (2, 3), (0, 5)):
            found = secure_sum([torch.ones(shape)], 1.0, std)
            assert 0.2 * std < found.multiplier < std and found.bad == 0
        assert math.isfinite(secure_sum([torch.ones(2, 0)], 1.0, std).multiplier), "nothing is released, and no error"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_bad_records_are_left_out_and_counted(bad):
    given = per_sample(6, (4,), (3,), dtype=torch.float64)
    spoiled = [g.clone() for g in given]
    spoiled[1][2, 1] = bad
    scales = [torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    totals, _, kept, _ = secure.grid_sum(spoiled, scales, 1.0, 1000.0)
    assert kept.tolist() == [True, True, False, True, True, True]
    rest = [torch.cat([g[:2], g[3:]]) for g in given]
    for a, b in zip(totals, secure.grid_sum(rest, scales, 1.0, 1000.0)[0]):
        assert torch.equal(a, b)
    assert secure_sum(spoiled, 1.0, 1.0).bad == 1
    dropped = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert secure.grid_sum(spoiled, [scales[0], dropped], 1.0, 1000.0)[2].all(), "its element is dropped anyway"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: secure_sum([], 1.0, 1.0), "secure_sum: per_sample: expected at least one tensor, got none"),
        (lambda: secure_sum([torch.ones(2, 3), torch.ones(3, 3)], 1.0, 1.0), "per_sample: expected tensors"),
        (lambda: secure_sum([torch.ones(2).long()], 1.0, 1.0), "per_sample: expected float32"),
        (lambda: secure_sum([torch.ones(2, device="meta")], 1.0, 1.0), "per_sample: expected a CPU tensor"),
        (lambda: secure_sum([torch.ones(2)], 0.0, 1.0), "clip: expected a finite number above 0, got 0.0"),
        (lambda: secure_sum([torch.ones(2)], 1.0, math.nan), "std: expected a finite number above 0, got nan"),
        (lambda: secure_sum([torch.ones(2)], 1.0, 1e-4), "std: expected from 0.00195312 to 1.0.*e.06 clip, got 0.0001"),
        (lambda: secure_sum([torch.ones(2, 1)], 1.0, 1e7), "std: expected from .* to 1.04858e.06 clip, got 1e.07 clip"),
        (lambda: secure_sum([torch.ones(2)], 1e-300, 1e300), "std: expected from .* clip, got inf clip"),
        (lambda: secure_sum([torch.ones(2)], 1.0, 1.0, scale=[1.0, 2.0]), "scale: expected a list of 1, one for each"),
        (lambda: secure_sum([torch.ones(2, 3)], 1.0, 1.0, scale=[torch.ones(2)]), r"a shape that broadcasts to \[3\]"),
        (lambda: secure_sum([torch.ones(2, 3)], 1.0, 1.0, scale=[-1.0]), "scale: expected a finite number >= 0, got"),
        (lambda: secure_noise((2, -1), 1.0), "secure_noise: shape: expected an integer >= 0, got -1"),
        (lambda: secure_noise((2,), -1.0), "secure_noise: std: expected a finite number >= 0, got -1"),
        (lambda: secure_noise((2,), 1.0, dtype=torch.int64), "secure_noise: dtype: expected one of"),
        (lambda: secure_noise((2,), 1.0, scale=torch.tensor([1.0, math.nan])), "scale: expected finite entries >= 0"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


# --- batches, keys and labels -----------------------------------------------------------------------------------------


def test_batches_take_each_record_with_the_same_chance():
    drawn = [secure_batch(500, 0.1) for _ in range(400)]
    assert drawn[0].dtype == torch.int64 and all(torch.equal(b, b.unique()) for b in drawn)
    each = torch.bincount(torch.cat(drawn), minlength=500).numpy()
    assert len(each) == 500
    chi = ((each - 40) ** 2 / 36).sum()
    assert stats.chi2(500).sf(chi) > 1e-6 and stats.chi2(500).cdf(chi) > 1e-6
    sizes = np.array([len(b) for b in drawn])
    assert abs(sizes.mean() - 50) < 5 * math.sqrt(45 / 400) and 30 < sizes.var() < 65
    assert secure_batch(7, 1.0).tolist() == list(range(7))
    assert len(secure_batch(7, 0.0)) == 0 == len(secure_batch(0, 0.5))
    with pytest.raises(ValueError, match="secure_batch: sample_rate: expected a number from 0 to 1, got 2"):
        secure_batch(7, 2)


def test_keys_come_from_the_operating_system():
    torch.manual_seed(0)
    first = new_key()
    torch.manual_seed(0)
    keys = torch.cat([first, *(new_key() for _ in range(255))])
    assert keys.dtype == torch.int64 and first.shape == (1,) and len(keys.unique()) == 256
    ones = sum(int((keys >> bit & 1).sum()) for bit in range(64))
    assert abs(ones - 128 * 64) < 6 * 64, "half of all bits"


def test_the_label_is_the_least_that_is_true():
    assert noise_kind() == "fast" and noise_kind(seed=0) == "seeded" and noise_kind(ghost=True) == "fast"
    assert noise_kind(secure=True) == "secure" and noise_kind(secure=True, ghost=True) == "hardened"
    with pytest.raises(ValueError, match="noise_kind: seed: expected none, as secure noise has no seed, got 3"):
        noise_kind(seed=3, secure=True)
