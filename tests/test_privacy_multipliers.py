"""`effective_multiplier` against what a record can really do: its contribution is searched for, not derived."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from pyml.ops import clip_sum, hetero_noise_
from pyml.privacy import effective_multiplier


def worst_move(std, allowed):
    """The largest whitened norm of many contributions: ``[m, n]`` of them, noise std ``[n]``."""
    return (allowed / std).norm(dim=1).max().item()


def directions(count, n):
    """Random ones and the axes."""
    g = torch.cat([torch.randn(count, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)])
    return g / g.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("seed", range(5))
def test_l2_clip_is_bound_by_the_least_noise_and_attains_it(seed):
    torch.manual_seed(seed)
    scale = torch.rand(6, dtype=torch.float64) + 0.1
    std, clip = 1.7, 0.6
    moved = worst_move(std * scale, clip * directions(20000, 6))
    found = effective_multiplier(std, clip, "l2", scale)
    assert found == pytest.approx(1 / moved, rel=1e-12), "the axis of least noise attains it"
    assert found == pytest.approx(std * scale.min().item() / clip, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_whitened_clip_has_the_same_multiplier_for_every_scale(seed):
    torch.manual_seed(seed)
    scale = 10 ** (4 * torch.rand(6, dtype=torch.float64) - 2)
    std, clip = 0.9, 0.3
    allowed = clip * directions(2000, 6) * scale  # all d with ||d / scale|| = clip
    found = effective_multiplier(std, clip, "whitened", scale)
    assert found == std / clip == effective_multiplier(std, clip)
    assert 1 / worst_move(std * scale, allowed) == pytest.approx(found, rel=1e-12)


def test_a_sigma_of_the_whitened_mode_is_kept_exactly():
    for sigma in (0.3, 1.1, 7.34):
        assert effective_multiplier(sigma * 0.5, 0.5, scale=[torch.rand(3), torch.rand(2, 2)]) == sigma


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("joint", [False, True])
def test_groups_against_linear_programming(seed, joint):
    rng = np.random.default_rng(seed)
    clips, scale, std = rng.uniform(0.2, 2, 5), rng.uniform(0.1, 3, 5), 1.3
    total = rng.uniform(0.3, 1.2) * math.sqrt((clips**2).sum()) if joint else None
    # x_k = ||d_k||^2: maximise sum x_k / (std s_k)^2 with x_k <= C_k^2, and sum x_k <= C^2
    budget = {"A_ub": np.ones((1, 5)), "b_ub": [total**2]} if joint else {}
    best = linprog(-1 / (std * scale) ** 2, bounds=[(0, c * c) for c in clips], **budget)
    found = effective_multiplier(std, list(clips), "group", list(scale), global_clip=total)
    assert found == pytest.approx(1 / math.sqrt(-best.fun), rel=1e-9)


def test_groups_never_exceed_either_bound_and_join_the_other_modes():
    clips, scale = [0.5, 0.7, 0.2], [1.0, 0.5, 2.0]
    free = effective_multiplier(1.0, clips, "group", scale)
    assert free == pytest.approx(sum((c / s) ** 2 for c, s in zip(clips, scale)) ** -0.5)
    wide = effective_multiplier(1.0, clips, "group", scale, global_clip=100.0)
    assert wide == free, "a global clip that binds nobody changes nothing"
    tight = effective_multiplier(1.0, clips, "group", scale, global_clip=0.6)
    assert tight > free and tight >= effective_multiplier(1.0, 0.6, "l2", scale)
    assert effective_multiplier(2.0, [0.5], "group", [0.4]) == pytest.approx(effective_multiplier(2.0, 0.5, "l2", 0.4))


def test_groups_of_any_size_stay_in_range():
    """Squares of tiny or huge clip norms are no doubles; the multiplier depends on ratios alone."""
    for unit in (1e-300, 1e-200, 1.0, 1e200):
        clips, scale = [3 * unit, 4 * unit], [unit, unit]
        assert effective_multiplier(1.0, clips, "group", scale) == pytest.approx(0.2, rel=1e-12)
        assert effective_multiplier(1.0, clips, "group", scale, 2.5 * unit) == pytest.approx(0.4, rel=1e-12)
    assert effective_multiplier(1.0, [1.0, 1.0], "group", [1e-200, 1.0]) == pytest.approx(1e-200, rel=1e-12)
    assert effective_multiplier(1e-200, [1e200, 1.0], "group", [1.0, 1.0]) == 0.0  # no double is that small
    assert effective_multiplier(1e300, [1e-300], "group") == math.inf == effective_multiplier(1e300, 1e-300)


def test_whitened_groups_are_one_whitened_norm():
    two = effective_multiplier(1.0, [1.0, 1.0], "whitened", [2.0, 2.0])
    assert two == pytest.approx(0.5**0.5) and two == effective_multiplier(1.0, [1.0, 1.0], "group")
    assert effective_multiplier(1.0, [3.0, 4.0], scale=[0.1, 9.0], global_clip=2.0) == 0.5
    assert effective_multiplier(1.0, [3.0, 4.0], global_clip=6.0) == 0.2, "a global clip that binds nobody"
    assert effective_multiplier(1.0, 4.0, global_clip=2.0) == 0.5 == effective_multiplier(1.0, [2.0])


def test_forms_of_the_scale():
    rows, columns = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0, 3.0])
    assert effective_multiplier(2.0, 1.0, "l2", [(rows, columns)]) == 2 * 0.125
    assert effective_multiplier(2.0, 1.0, "l2", [[rows, columns]]) == 2 * 0.125, "a pair, as in the op"
    assert effective_multiplier(2.0, [1.0], "group", [[[rows, columns], 0.5]]) == 2 * 0.125
    assert effective_multiplier(2.0, 1.0, "l2", rows[:, None] * columns) == 2 * 0.125
    assert effective_multiplier(2.0, 1.0, "l2", [torch.full((3, 2), 0.75), 0.5, torch.empty(0)]) == 1.0
    assert effective_multiplier(2.0, [1.0, 1.0], "group", [torch.tensor([3.0, 1.0]), 1.0]) == pytest.approx(2**0.5)
    nothing, some = torch.empty(0), torch.tensor([0.0, 1.0])
    assert effective_multiplier(2.0, 1.0, "l2", [(nothing, some), (some, nothing), 0.5]) == 1.0
    assert effective_multiplier(0.0, 1.0) == 0.0


def test_a_scale_is_read_as_the_op_reads_it():
    """The least noise of an element, over many draws, is what is accounted for."""
    rows, columns = torch.tensor([0.1, 2.0]), torch.tensor([0.1, 3.0])
    for scale, shapes in (
        ([[rows, columns]], [(2, 2)]), ([(rows, columns)], [(2, 2)]), ([rows, columns], [(2,), (2,)]),
        ([0.5, (rows, columns), torch.tensor(3.0)], [(4,), (2, 2), (2,)]), ([[rows, columns], rows], [(2, 2), (2,)]),
    ):  # fmt: skip
        total = [torch.zeros(s) for s in shapes]
        for step in range(2000):
            noise = [torch.zeros(s) for s in shapes]
            hetero_noise_(noise, scale, 1.0, key=torch.tensor([3]), step=step)
            for t, z in zip(total, noise):
                t += z.square()
        smallest = min(float(t.min()) for t in total) / 2000
        assert effective_multiplier(1.0, 1.0, "l2", scale) == pytest.approx(smallest**0.5, rel=0.1)


def test_an_element_without_noise_leaves_no_privacy_unless_it_is_dropped():
    scale = torch.tensor([1.0, 0.0])
    assert effective_multiplier(1.0, 1.0, "l2", scale) == 0
    assert effective_multiplier(1.0, [1.0, 1.0], "group", [1.0, 0.0]) == 0
    assert effective_multiplier(1.0, 1.0, "whitened", scale) == 1


SHAPES = [(4, 3), (5,), (2, 2)]
GROUPS = [0, 1, 1]


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize(("grouped", "joint"), [(False, None), (True, None), (True, 0.8)])
def test_what_clip_sum_lets_through_is_what_is_accounted_for(grouped, whitened, joint):
    """No gradient moves the sum by more, in units of the noise, than 1 / multiplier; along the worst axes it does."""
    std = 0.7
    scales = [torch.rand(shape, dtype=torch.float64) + 0.2 for shape in SHAPES]
    clip = [0.5, 0.9] if grouped else 0.6
    options = {"groups": GROUPS, "global_clip": joint} if grouped else {}
    if whitened:  # no norm but the whitened one is clipped, so the scale has no part
        found = effective_multiplier(std, clip, "whitened", scales, joint)
        assert found == effective_multiplier(std, clip, "whitened", None, joint)
    else:
        by_group = [[scales[0]], scales[1:]] if grouped else scales
        found = effective_multiplier(std, clip, "group" if grouped else "l2", by_group, joint)

    def moved(gradient):
        sums, _, bad = clip_sum([g[None] for g in gradient], clip, scale=scales if whitened else None, **options)
        assert bad == 0
        return sum((d / (std * s)).square().sum().item() for d, s in zip(sums, scales)) ** 0.5

    for size in (1e-2, 1.0, 1e6):
        for _ in range(20):
            assert moved([size * torch.randn(s, dtype=torch.float64) for s in SHAPES]) <= (1 + 1e-9) / found
    axes = [(s == s.min()).double() * (s if whitened else 1) for s in scales]  # the least noised one of each tensor
    parts = [(a, b, c) for a in (0, 1e3) for b in (0, 1e3) for c in (0, 1e3)]
    for angle in torch.linspace(0, math.pi / 2, 100).tolist() if joint else ():
        one, other = joint * math.cos(angle), joint * math.sin(angle)
        parts += [(one, other, 0), (one, 0, other)]
    reached = max(moved([axis * part for axis, part in zip(axes, each)]) for each in parts)
    assert 0.999 / found <= reached <= (1 + 1e-9) / found, "the bound is attained"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((math.nan, 1.0), "std: expected a finite number >= 0, got nan"),
        ((-1.0, 1.0), "std: expected a finite number >= 0, got -1.0"),
        (("1", 1.0), "std: expected a finite number >= 0, got str"),
        ((1.0, 0.0), "clip: expected a finite number above 0, got 0.0"),
        ((1.0, math.inf), "clip: expected a finite number above 0, got inf"),
        ((1.0, 1.0, "rms"), "mode: expected one of whitened, l2, group, got 'rms'"),
        ((1.0, 1.0, "l2", torch.tensor([1.0, -0.5])), "scale: expected finite entries >= 0, got -0.5"),
        ((1.0, 1.0, "whitened", torch.tensor([1.0, math.nan])), "scale: expected finite entries >= 0, got nan"),
        ((1.0, 1.0, "l2", [1.0, math.inf]), "scale: expected a finite number >= 0, got inf"),
        ((1.0, 1.0, "l2", []), "scale: expected a scale for each tensor, got an empty list"),
        ((1.0, 1.0, "l2", (torch.ones(2),)), "scale: expected a list of one scale for each tensor, .* a tuple of 1"),
        ((1.0, 1.0, "l2", (torch.ones(2), torch.ones(3))), "scale: expected a list of one .*, got a tuple of 2"),
        ((1.0, [1.0], "group", [(torch.ones(2), torch.ones(3))]), "scale: expected a list of one .*, got a tuple of 2"),
        ((1.0, 1.0, "l2", [[torch.ones(2)]]), r"scale: expected pairs \(row factors, column factors\), got 1 items"),
        ((1.0, 1.0, "l2", [(0.5, 2.0)]), "scale: expected pairs of tensors with one dimension .*, got float"),
        ((1.0, 1.0, "l2", [(torch.ones(2, 2), torch.ones(2))]), r"scale: expected pairs of tensors .*, got \[2, 2\]"),
        ((1.0, 1.0, "l2", torch.empty(0)), "scale: expected at least one entry, got none"),
        ((1.0, 1.0, "l2", [(torch.empty(0), torch.zeros(2))]), "scale: expected at least one entry, got none"),
        ((1.0, 1.0, "l2", None, 2.0), 'global_clip: expected none, for mode "l2", got 2.0'),
        ((1.0, [1.0], "l2"), "clip: expected a finite number above 0, got list"),
        ((1.0, [], "whitened"), 'clip: expected a list of one clip norm a group, for mode "whitened"'),
        ((1.0, [1.0, math.nan], "whitened"), "clip: expected a finite number above 0, got nan"),
        ((1.0, [1.0], "whitened", None, -1.0), "global_clip: expected a finite number above 0, got -1.0"),
        ((1.0, [1.0, 1.0], "whitened", [1.0, -1.0]), "scale: expected a finite number >= 0, got -1.0"),
        ((1.0, 1.0, "group"), 'clip: expected a list of one clip norm a group, for mode "group", got 1.0'),
        ((1.0, [1.0, 2.0], "group", [1.0]), "scale: expected a list of one scale for each of the 2 groups, got 1"),
        ((1.0, [1.0, 2.0], "group", (1.0, 2.0)), "scale: expected a list of one scale for each of .*, got tuple"),
        ((1.0, [1.0, -2.0], "group"), "clip: expected a finite number above 0, got -2.0"),
        ((1.0, [1.0], "group", [1.0], 0.0), "global_clip: expected a finite number above 0, got 0.0"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(arguments, sentence):
    with pytest.raises((ValueError, TypeError), match=f"^effective_multiplier: {sentence}"):
        effective_multiplier(*arguments)
