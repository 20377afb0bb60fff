"""The noise itself: known answers, its distribution and tail, and what its bits do not depend on."""

import hashlib
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyml.ops import hetero_noise, hetero_noise_
from pyml.reference import hetero_noise as reference
from pyml.testing.compare import twin

KEY = torch.tensor([0x0123456789ABCDEF])


def draws(count: int, step: int = 0, **options) -> Tensor:
    """Standard normals in float32."""
    t = torch.zeros(count)
    hetero_noise_([t], 1.0, 1.0, key=KEY, step=step, **options)
    return t


# --- the generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_gives_the_published_answers(counter, key, expected):
    """Those of Random123, which its authors publish with the generator."""
    as_int64 = (key[0] | key[1] << 32) - (1 << 64 if key[1] >> 31 else 0)
    found = reference.philox(torch.tensor([as_int64]), tuple(torch.tensor(c) for c in counter))
    assert [int(w) for w in found] == expected


def test_a_normal_is_box_muller_of_its_words():
    """Written out for single elements, apart from the vectorised reference."""
    for element in (0, 15, 16, 47, 63, 64, 1000, 2**34 + 77):
        words = [int(w) for w in reference.words(KEY, 5, 3, torch.tensor(element))]
        pair, other = words[2 * (element // 32 % 2) :][:2], element // 16 % 2
        r = math.sqrt(-2 * math.log((pair[0] + 0.5) / 2**32))
        low = pair[1] << 2 & 0xFFFFFFFF
        angle = (low - 2**32 if low >= 2**31 else low) * 2 * math.pi / 2**34
        both = [r * math.cos(angle) * (-1 if pair[1] >> 31 else 1), r * math.sin(angle)]
        expected = both[other ^ (pair[1] >> 30 & 1)]
        assert reference.normals(KEY, 5, 3, torch.tensor(element)).item() == pytest.approx(expected, rel=1e-14)
        got = draws(1, 5, ids=[3], offsets=[element]).item()
        assert got == pytest.approx(expected, abs=3 * 2**-23 * max(1, abs(expected)))


def test_normals_are_within_three_ulp_of_the_formula():
    found, truth = draws(200_000), reference.normals(KEY, 0, 0, torch.arange(200_000))
    ulp = torch.clamp(truth.abs(), min=1).log2().floor().exp2() * 2**-23
    assert ((found.double() - truth).abs() / ulp).max() <= 3


def test_the_stream_is_pinned():
    """The bits of the float32 normals, which CPUs and CUDA share: what a stored key gave once, it gives again."""
    digest = hashlib.sha256(torch.cat([draws(1000), draws(77, 3, offsets=[2**34 - 20])]).numpy().tobytes())
    assert digest.hexdigest()[:16] == "2a02a71bfa134675"


def found_on(isa: str, folder: Path) -> Tensor:
    code = (
        "import sys, torch; from tests.test_hetero_noise import draws; "
        "torch.save(torch.cat([draws(5000), draws(777, 3, offsets=[13])]), sys.argv[1])"
    )
    path = folder / f"{isa}.pt"
    subprocess.run([sys.executable, "-c", code, path], check=True, env=os.environ | {"PYML_CPU_ISA": isa})
    return torch.load(path)


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    here = torch.cat([draws(5000), draws(777, 3, offsets=[13])])
    for isa in ("default", "avx2", "avx512"):
        assert torch.equal(found_on(isa, tmp_path), here), isa


# --- its distribution -------------------------------------------------------------------------------------------------


def test_moments_and_distribution():
    from scipy.stats import kstest

    z = draws(10_000_000).double()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4.5 * math.sqrt(variance / n), f"moment {power}"
    assert kstest(z.numpy(), "norm").pvalue > 1e-4
    for shift in (1, 16, 32, 64):  # neighbours, halves of a pair, pairs of a counter, counters
        assert abs((z[:-shift] * z[shift:]).mean()) < 4.5 / math.sqrt(n), f"elements {shift} apart"


def test_the_tail_is_that_of_a_normal():
    """Counts beyond 4, 5 and 5.5 sigma of 2^28 draws; the refined lanes, with a radius word below 2^8, are exact."""
    beyond, refined, block = {4.0: 0, 5.0: 0, 5.5: 0}, 0, 1 << 24
    for step in range(16):
        z = draws(block, step)
        for limit in beyond:
            beyond[limit] += int((z.abs() > limit).sum())
        square = z.view(-1, 2, 2, 16).pow(2).sum(2)
        for g, pair, lane in (square > 2 * 24 * math.log(2) + 1e-4).nonzero().tolist():
            refined += 1
            elements = g * 64 + pair * 32 + lane + torch.tensor([0, 16])
            truth = reference.normals(KEY, step, 0, elements)
            assert torch.allclose(z[elements].double(), truth, rtol=0, atol=2 * 2**-23 * 8)
    for limit, count in beyond.items():
        expected = 16 * block * math.erfc(limit / math.sqrt(2))
        assert abs(count - expected) < 5 * math.sqrt(expected), f"beyond {limit}: {count}, expected {expected:.1f}"
    assert 0 < refined < 30  # 8 are expected


def test_the_largest_normal_is_beyond_nine_sigma(monkeypatch):
    """Words of zeros, refined by zeros; tests/cpp/test_hetero_noise.cpp has that of the kernels."""
    monkeypatch.setattr(reference, "words", lambda *args: [torch.zeros(1, dtype=torch.int64)] * 4)
    largest = reference.normals(KEY, 0, 0, torch.zeros(1, dtype=torch.int64)).item()
    assert largest == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-12) and largest > 9.4


# --- what its bits do not depend on -----------------------------------------------------------------------------------


def test_shards_are_pieces_of_the_whole():
    whole = draws(1000)
    edges = [0, 1, 63, 64, 130, 131, 700, 1000]
    pieces = [torch.zeros(b - a) for a, b in pairwise(edges)]
    hetero_noise_(pieces, 1.0, 1.0, key=KEY, step=0, ids=[0] * len(pieces), offsets=edges[:-1])
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("offset", [0, 4, 16, 20, 60, 64, 3, 2**34 - 20])
def test_alignment_does_not_matter(offset):
    """Memory at multiples of 16 bytes and beside them, with a number or a tensor as scale, as noise and as a step."""
    generator = torch.Generator().manual_seed(1)
    for size in (1, 3, 4, 5, 15, 16, 50, 64, 65, 130, 1003):
        values, at = torch.rand(3, size + 1, generator=generator) + 0.5, {"key": KEY, "step": 2, "offsets": [offset]}
        found = []
        for start in (0, 1):
            for scale in (0.7, "elements"):
                t, p, s = (values[n][:size].clone() if start == 0 else values[n].roll(1)[1:] for n in range(3))
                factor = s if scale == "elements" else scale
                hetero_noise_([t], [factor], 1.1, params=[p], lr=0.3, **at)
                hetero_noise_([t], [factor], 1.1, divide_by=3.0, **at)
                found.append(torch.cat([t, p]))
        truth = reference.normals(KEY, 2, 0, offset + torch.arange(size)) * 1.1
        for got, scale in zip(found, (0.7, values[2][:size], 0.7, values[2][:size])):
            noisy = values[0][:size] + truth * scale
            expected = torch.cat([noisy / 3, values[1][:size] - 0.3 * noisy])
            torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5)
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]), size


def test_a_shard_may_cross_where_a_counter_carries():
    """2^28 blocks in, the lower word of the counter starts again."""
    start = 2**34 - 100
    got = draws(300, offsets=[start])
    truth = reference.normals(KEY, 0, 0, torch.arange(300) + start)
    assert torch.allclose(got.double(), truth, atol=1e-6, rtol=0)
    assert len(got.unique()) == 300


def test_a_tensor_keeps_its_noise_wherever_it_is_listed():
    tensors = [torch.zeros(5, 7), torch.zeros(130), torch.zeros(3)]
    hetero_noise_(tensors, 1.0, 1.0, key=KEY, step=2)
    for n, t in enumerate(tensors):
        alone = torch.zeros_like(t)
        hetero_noise_([alone], 1.0, 1.0, key=KEY, step=2, ids=[n])
        assert torch.equal(alone, t)
    assert torch.equal(hetero_noise(torch.zeros(5, 7), 1.0, 1.0, key=KEY, step=2), tensors[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads):
    before = torch.get_num_threads()
    t = torch.zeros(1_000_003)
    expected = draws(1_000_003)
    try:
        torch.set_num_threads(threads)
        hetero_noise_([t], 1.0, 1.0, key=KEY, step=0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(t, expected)


def test_tensors_that_share_memory_are_refused():
    """They would get two noises, in an order that the threads choose; and none is written before the refusal."""
    x, p = torch.zeros(200), torch.zeros(30, 30)
    for tensors in ([x[:150], x[50:]], [x, x.view(10, 20)]):
        with pytest.raises(ValueError, match="memory does not meet"):
            hetero_noise_(tensors, 1.0, 1.0, key=KEY, step=0)
    with pytest.raises(ValueError, match="apart from those that are read"):
        hetero_noise_([p.t()], 1.0, 1.0, key=KEY, step=0, params=[p], lr=0.1)
    with pytest.raises(ValueError, match="apart from those that are read"):
        hetero_noise_([x[:100]], [x[50:150]], 1.0, key=KEY, step=0)
    assert not x.any() and not p.any()
    hetero_noise_([x[:100], x[100:]], 1.0, 1.0, key=KEY, step=0)
    assert x.all()


def test_one_noise_is_not_given_twice():
    a, b = torch.zeros(10), torch.zeros(10)
    with pytest.raises(
        ValueError, match=r"ids: expected shards of one tensor that do not meet.*got id 3 with elements"
    ):
        hetero_noise_([a, b], 1.0, 1.0, key=KEY, step=0, ids=[3, 3])
    hetero_noise_([a, b], 1.0, 1.0, key=KEY, step=0, ids=[3, 3], offsets=[0, 10])
    assert not (a == b).any()


def test_an_empty_list_is_nothing_to_do():
    hetero_noise_([], 1.0, 1.0, key=KEY, step=0)
    hetero_noise_([], 1.0, 1.0, key=KEY, step=0, params=[], lr=0.1)


def test_many_tensors_cost_little_each():
    """Checks are linear in the number of tensors."""
    few, many = ([torch.zeros(10) for _ in range(n)] for n in (100, 2000))
    took = []
    for tensors in (few, many):
        start = time.thread_time()
        for step in range(3):
            hetero_noise_(tensors, 1.0, 1.0, key=KEY, step=step)
        took.append((time.thread_time() - start) / len(tensors))
    assert took[1] < 4 * took[0]


def test_key_step_and_id_give_unrelated_noise():
    base = draws(100_000)
    others = [draws(100_000, step=1), draws(100_000, ids=[1])]
    t = torch.zeros(100_000)
    hetero_noise_([t], 1.0, 1.0, key=KEY + (1 << 40), step=0)
    for other in [*others, t]:
        assert abs((base * other).mean()) < 4.5 / math.sqrt(len(base))


# --- the step ---------------------------------------------------------------------------------------------------------


def test_with_params_the_gradients_stay():
    g, p = torch.randn(500), torch.randn(500)
    expected = p - 0.1 * (g + 2.0 * 3.0 * draws(500)) / 8
    before = twin(g)
    hetero_noise_([g], 3.0, 2.0, key=KEY, step=0, divide_by=8.0, params=[p], lr=0.1)
    assert torch.equal(g, before)
    assert torch.allclose(p, expected, atol=1e-6)


def test_a_parameter_may_have_another_dtype_than_its_gradient():
    g, p = torch.randn(100), torch.randn(100).bfloat16()
    expected = (p.float() - 0.5 * (g + draws(100))).bfloat16()
    hetero_noise_([g], 1.0, 1.0, key=KEY, step=0, params=[p], lr=0.5)
    assert (p.float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max()


def test_pairs_of_factors_are_rows_times_columns():
    rows, columns = torch.rand(6) + 0.5, torch.rand(20) + 0.5
    a, b = torch.zeros(6, 4, 5), torch.zeros(6, 4, 5)
    hetero_noise_([a], [(rows, columns)], 1.0, key=KEY, step=0)
    hetero_noise_([b], [(rows[:, None] * columns).view(6, 4, 5)], 1.0, key=KEY, step=0)
    assert torch.equal(a, b)


def test_std_is_that_of_the_sum():
    """Dividing comes after the noise: the noise of the mean is smaller by the same factor."""
    one, many = torch.zeros(64), torch.zeros(64)
    hetero_noise_([one], 1.0, 2.0, key=KEY, step=0)
    hetero_noise_([many], 1.0, 2.0, key=KEY, step=0, divide_by=256.0)
    assert torch.equal(one / 256, many)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": -1.0}, "hetero_noise_: std: expected a finite number of at least 0, got -1.0"),
        ({"key": torch.tensor([1.0])}, "hetero_noise_: key: expected an int64 tensor, got torch.float32"),
        ({"tensors": [torch.zeros(2).int()]}, r"hetero_noise_: tensors\[0\]: expected float32, float64, "),
        ({"tensors": [torch.zeros(2).to_sparse()]}, r"hetero_noise_: tensors\[0\]: expected a dense tensor, got torch"),
        ({"scale": [torch.ones(2).to_sparse()]}, r"hetero_noise_: scale\[0\]: expected a dense tensor"),
        ({"step": 2**32}, r"hetero_noise_: step: expected an integer in \[0, 2\^32\), got 4294967296"),
        ({"lr": 0.1}, "hetero_noise_: lr: expected None without params, got 0.1"),
        ({"scale": [1.0, 2.0]}, "hetero_noise_: scale: expected one tensor, or 1, got 2"),
        ({"offsets": [-1]}, r"hetero_noise_: offsets\[0\]: expected an integer in \[0, 2\^62\), got -1"),
        ({"divide_by": 0.0}, "hetero_noise_: divide_by: expected a finite number above 0, got 0.0"),
    ],
)
def test_bad_calls_change_nothing(change, message):
    t = torch.zeros(10)
    arguments = {"tensors": [t], "scale": 1.0, "std": 1.0, "key": KEY, "step": 0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        hetero_noise_(**arguments)
    assert not t.any()


PAIR = (torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    ("call", "scale", "message"),
    [
        (
            hetero_noise,
            [0.5, 3.0],
            "hetero_noise: scale: expected a number or a tensor, as x is one tensor .* list of 2",
        ),
        (hetero_noise, PAIR, "hetero_noise: scale: expected a number or a tensor, .*, got a tuple of 2"),
        (
            hetero_noise_,
            [(0.5, 3.0)],
            "hetero_noise_: scale: expected pairs of tensors with one dimension .*, got float",
        ),
        (
            hetero_noise_,
            [(PAIR[0], torch.tensor(2.0))],
            r"scale: expected pairs of tensors .* column factors\), got \[\]",
        ),
        (hetero_noise_, [(torch.ones(2, 3), PAIR[1])], r"scale: expected pairs of tensors .*, got \[2, 3\]"),
    ],
)
def test_no_part_of_a_scale_is_dropped(call, scale, message):
    t = torch.zeros(2, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        call(t if call is hetero_noise else [t], scale, 1.0, key=KEY, step=0)
    with pytest.raises((ValueError, TypeError), match="scale"):
        call(t[0] if call is hetero_noise else [t[0]], scale, 1.0, key=KEY, step=0)
    assert not t.any()
