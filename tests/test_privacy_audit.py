"""The membership audit on mechanisms whose epsilon is known."""

import math

import pytest
import torch
from scipy.stats import binom

from pyml.privacy import audit_membership
from pyml.privacy.auditing import clopper_pearson


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
