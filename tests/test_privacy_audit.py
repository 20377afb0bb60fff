"""The membership audit on mechanisms whose epsilon is known."""

import math

import pytest
import torch
from scipy.stats import binom

from pyml.privacy import audit_membership, audit_one_run, effective_multiplier, epsilon, secure_sum
from pyml.privacy.auditing import clopper_pearson, one_run_p_value


def test_clopper_pearson_is_the_binomial_tail():
    for successes, trials in ((3, 20), (0, 7), (7, 7), (50, 1000)):
        low, high = clopper_pearson(successes, trials, 0.01)
        assert 0 <= low <= successes / trials <= high <= 1
        if successes:
            assert binom.sf(successes - 1, trials, low) == pytest.approx(0.01, rel=1e-6)
        if successes < trials:
            assert binom.cdf(successes, trials, high) == pytest.approx(0.01, rel=1e-6)
    assert clopper_pearson(0, 7, 0.01)[0] == 0 and clopper_pearson(7, 7, 0.01)[1] == 1


def test_equal_losses_show_nothing():
    found = audit_membership(torch.randn(4000), torch.randn(4000), delta=1e-5)
    assert found.epsilon_lower < 0.15 and found.auc == pytest.approx(0.5, abs=0.03)
    assert "the absence of a leak proves nothing" in str(found)


@pytest.mark.parametrize("true_epsilon", [0.5, 1.5, 3.0])
def test_bounds_randomised_response_from_below_and_comes_near(true_epsilon):
    """A "loss" of one bit that is told truly with chance e^eps / (1 + e^eps) is exactly eps-DP."""
    truth = 1 / (1 + math.exp(-true_epsilon))
    bounds = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        members = (torch.rand(4000, generator=generator) > truth).double()
        others = (torch.rand(4000, generator=generator) < truth).double()
        found = audit_membership(members, others, delta=0.0, generator=generator)
        bounds.append(found.epsilon_lower)
        assert 1 - found.auc < 1 / (1 + math.exp(true_epsilon)) + 0.05
    wrong = sum(bound > true_epsilon for bound in bounds)
    assert wrong <= 6, "one in twenty is expected at most"
    assert sum(bounds) / len(bounds) > true_epsilon - 0.3


def test_a_model_that_knows_its_members_is_found_out():
    members, others = torch.rand(500), 2 + torch.rand(500)
    found = audit_membership(members, others, delta=1e-5)
    assert found.auc == 1 and found.true_positive_rate > 0.9 and found.false_positive_rate == 0
    assert found.epsilon_lower > 3.5
    assert audit_membership(members, others, delta=1e-5, confidence=0.999).epsilon_lower < found.epsilon_lower
    assert audit_membership(members, others, delta=0.5).epsilon_lower < found.epsilon_lower


def test_ties_infinities_and_lists():
    constant = audit_membership([1.0] * 50, [1.0] * 50, delta=0.0)
    assert constant.auc == 0.5 and constant.epsilon_lower == 0
    infinite = audit_membership([0.1] * 100, [math.inf] * 100, delta=0.0)
    assert infinite.auc == 1 and infinite.epsilon_lower > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([1.0], [1.0, 2.0], 0.0), r"members: expected losses of shape \[n\] with n >= 2, got \[1\]"),
        (([1.0, 2.0], torch.ones(2, 2), 0.0), r"others: expected losses of shape \[n\] with n >= 2, got \[2, 2\]"),
        (([1.0, math.nan], [1.0, 2.0], 0.0), "members: expected losses that are numbers, got a NaN"),
        (([1.0, 2.0], [1.0, 2.0], 1.0), "delta: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_refusals_are_one_sentence(arguments, sentence):
    members, others, delta = arguments
    with pytest.raises(ValueError, match=f"^audit_membership: {sentence}"):
        audit_membership(members, others, delta=delta)
    with pytest.raises(ValueError, match=r"audit_membership: confidence: expected a number between 0 and 1, got 1.0"):
        audit_membership([1.0, 2.0], [1.0, 2.0], delta=0.0, confidence=1.0)


# --- one run ----------------------------------------------------------------------------------------------------------


def answers(truth, m, generator):
    """Coins, and "losses" that tell each with chance ``truth``: m answers of randomised response."""
    coins = torch.rand(m, generator=generator) < 0.5
    told = torch.rand(m, generator=generator) < truth
    return (coins != told).double(), coins


@pytest.mark.parametrize("true_epsilon", [0.0, 0.5, 2.0])
def test_one_run_bounds_randomised_response_from_below_and_comes_near(true_epsilon):
    generator = torch.Generator().manual_seed(5)
    bounds = []
    for _ in range(60):
        losses, coins = answers(1 / (1 + math.exp(-true_epsilon)), 4000, generator)
        bounds.append(audit_one_run(losses, coins, delta=0.0, guesses=2000).epsilon_lower)
    assert sum(bound > true_epsilon for bound in bounds) <= 8, "three of sixty are expected at most"
    assert sum(bounds) / len(bounds) > true_epsilon - 0.2


def test_the_p_value_against_its_definition():
    for m, r, v, eps, delta in ((100, 60, 40, 0.3, 1e-3), (50, 50, 50, 1.0, 1e-4), (10, 4, 0, 0.0, 1e-2)):
        chance = 1 / (1 + math.exp(-eps))
        right = [binom.pmf(k, r, chance) for k in range(r + 1)]
        worst = max((sum(right[v - i : v]) / i for i in range(1, v + 1)), default=0)
        exact = min(1, sum(right[v:]) + 2 * m * delta * worst)
        assert one_run_p_value(m, r, v, eps, delta) == pytest.approx(exact, rel=1e-9)


def test_delta_and_confidence_lower_the_bound_of_one_run():
    coins = torch.arange(400) % 2 == 0
    losses = torch.where(coins, 0.0, 1.0)
    found = audit_one_run(losses, coins, delta=0.0)
    assert (found.guesses, found.correct, found.auc) == (40, 40, 1.0)
    assert found.epsilon_lower == pytest.approx(-math.log(0.05 ** (-1 / 40) - 1), abs=1e-5), "p^40 = 0.05"
    assert audit_one_run(losses, coins, delta=1e-4).epsilon_lower < found.epsilon_lower
    assert audit_one_run(losses, coins, delta=0.0, confidence=0.999).epsilon_lower < found.epsilon_lower
    assert "40 of 40 guesses right" in str(found)
    assert audit_one_run(losses, ~coins, delta=0.0).epsilon_lower == 0, "wrong guesses show nothing"
    assert audit_one_run([0.0, 1.0], [True, True], delta=0.0).auc == 0.5


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"included": [1, 0, 1]}, r"included: expected bool of shape \[3\], got torch.int64"),
        ({"included": [True, False]}, r"included: expected bool of shape \[3\], got torch.bool of \[2\]"),
        ({"guesses": 3}, "guesses: expected an even number from 2 to 3, got 3"),
        ({"guesses": 4}, "guesses: expected an even number from 2 to 3, got 4"),
        ({"losses": [0.0, math.nan, 1.0]}, "losses: expected losses that are numbers, got a NaN"),
        ({"delta": -0.1}, "delta: expected a number from 0 to below 1, got -0.1"),
    ],
)
def test_refusals_of_one_run_are_one_sentence(named, sentence):
    good = {"losses": [0.0, 0.5, 1.0], "included": [True, False, True], "delta": 0.0}
    with pytest.raises(ValueError, match=f"^audit_one_run: {sentence}"):
        audit_one_run(**{**good, **named})


# --- one run of a real mechanism --------------------------------------------------------------------------------------

RECORDS = 1000  # each with a gradient along an axis of its own, in or out by a coin


def test_the_rms_of_the_noise_is_refuted_and_the_least_noise_is_not():
    """L2 clip 1, a tenth of the elements at std 0.3 and the rest at 1.5: the counter-example of the documentation."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")
    generator = torch.Generator().manual_seed(0)
    scale = torch.full((10 * RECORDS,), 1.5)
    scale[:RECORDS] = 0.3
    coins = torch.rand(RECORDS, generator=generator) < 0.5
    released = scale * torch.randn(10 * RECORDS, generator=generator)
    released[:RECORDS] += coins.float()
    found = audit_one_run(-released[:RECORDS], coins, delta=1e-5, guesses=400)
    at = {"sample_rate": 1.0, "steps": 1, "delta": 1e-5, "provenance": "public"}
    provable = epsilon(effective_multiplier(1.0, 1.0, "l2", scale), **at)
    claimed = epsilon(scale.square().mean().sqrt().item(), **at)
    assert claimed < found.epsilon_lower < provable


@pytest.mark.parametrize(("std", "shown"), [(0.3, 0.5), (1.0, 0.0)])
def test_secure_whitened_noise_keeps_what_is_promised(std, shown):
    for package in ("dp_accounting", "cryptography"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'pyml[privacy]')")
    generator = torch.Generator().manual_seed(1)
    scale = 0.2 + 2 * torch.rand(RECORDS, generator=generator)
    coins = torch.rand(RECORDS, generator=generator) < 0.5
    found = secure_sum([torch.eye(RECORDS)[coins] * 100], 1.0, std, scale=[scale])
    audit = audit_one_run(-found.sums[0] / scale, coins, delta=1e-5, guesses=200)
    provable = epsilon(found.multiplier, 1.0, 1, delta=1e-5, provenance="public", total_variation=found.total_variation)
    assert shown <= audit.epsilon_lower < provable
    assert found.bad == 0 and provable == pytest.approx(epsilon(std, 1.0, 1, delta=1e-5, provenance="public"), rel=1e-3)
