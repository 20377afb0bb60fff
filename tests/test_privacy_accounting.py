"""Epsilon against closed forms and Opacus; what is refused."""

import copy
import json
import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from pyml.privacy import Epsilon, Provenance, accounting, dp, epsilon, noise_multiplier

needs = pytest.importorskip
needs("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")

PUBLIC = {"provenance": "public"}


def gaussian_delta(eps, multiplier):
    """The exact delta of one Gaussian release of sensitivity 1 (Balle and Wang, arXiv 1805.06530)."""
    half, middle = 0.5 / multiplier, eps * multiplier
    return norm.cdf(half - middle) - math.exp(eps + norm.logcdf(-half - middle))


def gaussian_epsilon(multiplier, delta):
    if gaussian_delta(0, multiplier) <= delta:
        return 0.0
    return brentq(lambda e: gaussian_delta(e, multiplier) - delta, 0, 1 / multiplier**2 + 10 / multiplier, xtol=1e-12)


def sampled_delta(eps, m, rate):
    """One step with Poisson sampling: the worse hockey-stick divergence of the two directions.

    With p = N(0, m^2) and the mixture q, q / p rises with x, so each divergence is that of a half-line.
    """

    def crossing(ratio):
        return m * m * math.log((ratio - 1 + rate) / rate) + 0.5 if ratio > 1 - rate else -math.inf

    x = crossing(math.exp(eps))
    removed = (1 - rate - math.exp(eps)) * norm.sf(x / m) + rate * norm.sf((x - 1) / m)
    x = crossing(math.exp(-eps))
    mixture = (1 - rate) * norm.cdf(x / m) + rate * norm.cdf((x - 1) / m)
    return max(removed, norm.cdf(x / m) - math.exp(eps) * mixture)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [0.3, 0.8, 2.0, 10.0, 300.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_one_release_is_the_analytic_gaussian_mechanism(multiplier, delta):
    exact = gaussian_epsilon(multiplier, delta)
    found = epsilon(multiplier, 1.0, 1, delta=delta, **PUBLIC)
    assert exact - 1e-7 <= found <= exact + 2e-4, "an upper bound, and a tight one"
    assert epsilon(multiplier, 1.0, 1, delta=delta, accountant="rdp", **PUBLIC) >= exact - 1e-7


def test_releases_without_sampling_add_up_by_their_squares():
    phases = [(2.0, 1.0, 3), (5.0, 1.0, 10), (1.5, 1.0, 1)]
    together = sum(n / m**2 for m, _, n in phases) ** -0.5
    assert epsilon(phases, delta=1e-5, **PUBLIC) == pytest.approx(gaussian_epsilon(together, 1e-5), abs=3e-4)


@pytest.mark.parametrize(("multiplier", "rate"), [(0.7, 0.1), (1.0, 0.01), (2.0, 0.5)])
def test_one_sampled_step_is_the_closed_form(multiplier, rate):
    delta = 1e-5
    found = epsilon(multiplier, rate, 1, delta=delta, **PUBLIC)
    assert sampled_delta(float(found), multiplier, rate) <= delta * (1 + 1e-6)
    assert sampled_delta(max(float(found) - 3e-4, 0.0), multiplier, rate) >= delta * (1 - 1e-6) or found < 3e-4


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [(1.0, 1.828), (0.5, 13.36), (math.sqrt(0.1 * 0.25 + 0.9 * 2.25), 0.98)],
)
def test_figures_that_were_measured_before(multiplier, expected):
    """Rate 0.01, 1000 steps, delta 1e-5; the last one is what an RMS in place of the least noise would claim."""
    assert epsilon(multiplier, 0.01, 1000, delta=1e-5, **PUBLIC) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("multiplier", "rate", "steps"), [(1.0, 0.01, 1000), (0.8, 0.02, 300), (3.3, 0.18, 200)])
def test_agrees_with_opacus(multiplier, rate, steps):
    accountants = needs("opacus.accountants", reason="opacus is not installed (pip install 'pyml[privacy]')")
    prv, rdp = accountants.PRVAccountant(), accountants.RDPAccountant()
    prv.history = rdp.history = [(multiplier, rate, steps)]
    ours = {name: epsilon(multiplier, rate, steps, delta=1e-5, accountant=name, **PUBLIC) for name in ("pld", "rdp")}
    theirs = prv.get_epsilon(delta=1e-5)
    assert ours["pld"] <= theirs <= ours["pld"] + 0.012, "PRV adds its own error bound of 0.01"
    # Opacus has other orders; dp-accounting drops those that do not converge
    assert ours["rdp"] == pytest.approx(rdp.get_epsilon(delta=1e-5), rel=0.02)


def test_phases_that_differ_agree_with_opacus():
    accountants = needs("opacus.accountants", reason="opacus is not installed (pip install 'pyml[privacy]')")
    phases = [(1.2, 0.01, 400), (0.9, 0.02, 200), (2.0, 1.0, 2)]
    prv = accountants.PRVAccountant()
    prv.history = list(phases)
    ours = epsilon(phases, delta=1e-5, **PUBLIC)
    assert ours <= prv.get_epsilon(delta=1e-5) <= ours + 0.012
    assert ours > max(epsilon([p], delta=1e-5, **PUBLIC) for p in phases)
    assert epsilon(list(reversed(phases)), delta=1e-5, **PUBLIC) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_phases_of_nearly_one_multiplier_are_one_at_the_smallest(accountant):
    many = [(1 + (7 * i % 60) * 1e-6, 0.05, 1 + i % 2) for i in range(60)] + [(3.0, 0.05, 4), (1.0, 0.04, 5)]
    at = {"delta": 1e-5, "accountant": accountant, **PUBLIC}
    assert epsilon(many, **at) == epsilon([(1.0, 0.05, 90), (3.0, 0.05, 4), (1.0, 0.04, 5)], **at)
    apart = epsilon([(1.0, 0.05, 45), (1.001, 0.05, 45)], **at)
    assert epsilon(1.001, 0.05, 90, **at) < apart < epsilon(1.0, 0.05, 90, **at)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_monotone(accountant):
    def at(m=1.0, q=0.05, n=100, delta=1e-5):
        return epsilon(m, q, n, delta=delta, accountant=accountant, **PUBLIC)

    assert at(m=0.5) > at(m=0.9) > at() > at(m=2.0) > 0
    assert at(q=0.5) > at(q=0.1) > at() > at(q=0.01)
    assert at(n=1000) > at(n=101) > at() > at(n=1)
    assert at(delta=1e-9) > at() > at(delta=1e-2)


def test_renyi_is_never_below_the_loss_distributions():
    for m, q, n in [(0.6, 0.1, 50), (1.0, 0.01, 1000), (5.0, 1.0, 20)]:
        pld, rdp = (epsilon(m, q, n, delta=1e-5, accountant=a, **PUBLIC) for a in ("pld", "rdp"))
        assert pld <= rdp + 1e-6


def test_much_noise_and_many_steps_are_accounted_for_closely():
    """Rounding upwards 10000 times must not add up: near the central limit, of which this run is a case."""
    limit = 0.01 * math.sqrt(10_000 * math.expm1(200.0**-2))
    found = epsilon(200.0, 0.01, 10_000, delta=1e-5, **PUBLIC)
    assert gaussian_epsilon(1 / limit, 1e-5) * 0.999 < found < gaussian_epsilon(1 / limit, 1e-5) * 1.1


def test_orders_that_do_not_converge_are_no_users_business(caplog):
    epsilon(1e6, 0.5, 11, delta=1e-5, accountant="rdp", **PUBLIC)
    assert not caplog.records


def test_extreme_multipliers_end_and_stay_upper_bounds():
    for m in (1e-3, 0.02):
        exact = gaussian_epsilon(m, 1e-5)
        assert exact * (1 - 1e-9) <= epsilon(m, 1.0, 1, delta=1e-5, **PUBLIC) <= exact * 1.1
    for accountant in ("pld", "rdp"):
        at = {"delta": 1e-12, "accountant": accountant, **PUBLIC}
        assert 1e-9 < epsilon(1e9, 0.5, 10, **at) < 1e-3, "losses that vanish in rounding are not taken for none"
    assert epsilon(1.0, 0.0, 10, delta=1e-5, **PUBLIC) == 0 == epsilon([], delta=1e-5, **PUBLIC)
    assert epsilon(1.0, 0.5, 0, delta=1e-5, accountant="rdp", **PUBLIC) == 0


# --- provenance, labels, refusals -------------------------------------------------------------------------------------


def test_free_provenances_cost_nothing_and_a_dp_scale_its_price():
    plain = epsilon(1.0, 0.1, 20, delta=1e-5, **PUBLIC)
    assert epsilon(1.0, 0.1, 20, delta=1e-5, provenance="released_iterate") == plain
    for accountant in ("pld", "rdp"):
        alone = epsilon(1.0, 0.1, 20, delta=1e-5 - 1e-6, accountant=accountant, **PUBLIC)
        paid = epsilon(1.0, 0.1, 20, delta=1e-5, accountant=accountant, provenance=dp(0.5, 1e-6))
        assert plain < paid <= alone + 0.5 + 1e-3
        twice = epsilon(1.0, 0.1, 20, delta=1e-5, accountant=accountant, provenance=[dp(0.5, 1e-6), dp(0.5, 1e-6)])
        assert twice > paid + 0.1, "equal prices are two prices"
    assert epsilon([], delta=1e-5, provenance=dp(0.5, 1e-6)) == pytest.approx(0.5, abs=2e-4)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"provenance": "unknown"}, "may depend on the private records"),
        ({"provenance": "private_batch"}, "current private batch"),
        ({"provenance": ["public", dp(1.0, 1e-6), "unknown"]}, "may depend on the private records"),
        ({"provenance": dp(math.inf, 0.0)}, "without a finite epsilon"),
        ({"provenance": dp(1.0, 1e-5)}, "nothing is left of delta"),
        ({"provenance": "public", "sampling": "shuffled"}, "only Poisson sampling"),
        ({"provenance": "public", "sampling": "fixed_size"}, "only Poisson sampling"),
        ({"provenance": "public", "total_variation": 1e-5}, "nothing is left of delta"),
    ],
)
def test_no_finite_epsilon_without_a_proof(extra, reason, accountant):
    found = epsilon(1.0, 0.1, 20, delta=1e-5, accountant=accountant, **extra)
    assert found == math.inf and reason in found.reason
    assert reason in str(found) and "epsilon_provable inf" in str(found)


def test_an_infinite_epsilon_for_lack_of_a_proof_hides_the_claim_too():
    found = epsilon(0.5, 0.1, 20, delta=1e-5, provenance="unknown", claimed_multiplier=1.5, allow_unproven=True)
    assert found == math.inf and found.claimed_by_rule is None and "claimed" not in str(found)


def test_no_noise_is_no_privacy():
    found = epsilon([(1.0, 0.1, 5), (0.0, 0.1, 1)], delta=1e-5, **PUBLIC)
    assert found == math.inf and "without noise" in found.reason
    assert epsilon([(1.0, 0.1, 5), (0.0, 0.1, 0)], delta=1e-5, **PUBLIC) < math.inf, "it never ran"


def test_a_claim_needs_the_opt_in_and_stands_beside_the_provable_one():
    with pytest.raises(ValueError, match="claimed_multiplier: expected allow_unproven=True"):
        epsilon(0.5, 0.01, 1000, delta=1e-5, claimed_multiplier=1.43, **PUBLIC)
    found = epsilon(0.5, 0.01, 1000, delta=1e-5, claimed_multiplier=1.43, allow_unproven=True, **PUBLIC)
    assert float(found) == epsilon(0.5, 0.01, 1000, delta=1e-5, **PUBLIC)
    assert found.claimed_by_rule == epsilon(1.43, 0.01, 1000, delta=1e-5, **PUBLIC) < float(found) / 10
    assert "epsilon_provable 13." in str(found) and "epsilon_claimed_by_rule 0.9" in f"{found}"
    assert epsilon(0.5, 0.01, 9, delta=1e-5, allow_unproven=True, **PUBLIC).claimed_by_rule is None


def test_seeded_runs_say_so():
    seeded = epsilon(1.0, 0.1, 20, delta=1e-5, noise="seeded", **PUBLIC)
    assert "reproducible, not private" in str(seeded) and "reproducible, not private" in repr(seeded)
    assert "no proof" in str(epsilon(1.0, 0.1, 20, delta=1e-5, noise="hardened", **PUBLIC))


@pytest.mark.parametrize("value", [3.0004, 0.99951, 9.181, 2.999, 1e-7 / 3, 123456.7, 0.0, 8.0])
def test_an_epsilon_is_printed_rounded_up(value):
    found = Epsilon(value, 1e-5)
    assert float(str(found).split()[1]) >= value
    for spec in (".4g", ".3f", ".2f", ".0f", "8.2f", ".1%", ",.2f", ".3e", "g"):
        text = f"{found:{spec}}".replace(",", "").strip()
        shown = float(text.rstrip("%")) / (100 if "%" in text else 1)
        nearest = float(format(value, spec).replace(",", "").rstrip("%")) / (100 if "%" in text else 1)
        assert value <= shown and (shown == nearest or nearest < value), spec
    assert (f"{Epsilon(3.0004):.4g}", f"{Epsilon(9.181):.2f}", f"{Epsilon(2.9991):.3f}") == ("3.001", "9.19", "3.000")
    assert f"{Epsilon(math.inf):.2f}" == "inf" and f"{Epsilon(3.0):.2f}" == "3.00"


def test_an_epsilon_is_a_float_that_copies_whole():
    found = epsilon(1.0, 0.1, 20, delta=1e-5, **PUBLIC)
    up = f"{math.ceil(100 * found) / 100:.2f}"
    assert isinstance(found, Epsilon) and f"{found:.2f}" == up and f"{found}" == str(found)
    found = epsilon(1.0, 0.1, 20, delta=1e-5, noise="seeded", **PUBLIC)
    assert f"{found:.2f}" == f"{up}, reproducible, not private"
    assert f"{found}" == str(found) and str(found).endswith("; reproducible, not private")
    twin = copy.deepcopy(found)
    assert (float(twin), str(twin)) == (float(found), str(found))
    assert json.loads(json.dumps(found)) == float(found)


def test_a_distance_from_gaussian_noise_is_paid_from_delta():
    plain = epsilon(1.0, 0.1, 20, delta=1e-5, **PUBLIC)
    paid = epsilon(1.0, 0.1, 20, delta=1e-5, total_variation=1e-8, **PUBLIC)
    assert paid > plain
    left = 1e-5 - (1 + math.exp(paid)) * 1e-8
    assert epsilon(1.0, 0.1, 20, delta=left, **PUBLIC) <= paid, "what was promised holds with what is left"
    assert epsilon(1.0, 0.1, 20, delta=1e-5, total_variation=1e-25, **PUBLIC) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("positional", "named", "sentence"),
    [
        ((math.nan, 0.1, 1), {}, "multiplier: expected a finite number >= 0, got nan"),
        ((-1.0, 0.1, 1), {}, "multiplier: expected a finite number >= 0, got -1.0"),
        ((1.0, 1.5, 1), {}, "sample_rate: expected a number from 0 to 1, got 1.5"),
        ((1.0, 0.1, -1), {}, "steps: expected an integer >= 0, got -1"),
        ((1.0, 0.1, 1.5), {}, "steps: expected an integer >= 0, got 1.5"),
        ((1.0, 0.1), {}, "steps: expected a number beside a single multiplier, got None"),
        (([(1.0, 0.1, 1)], 0.1), {}, "sample_rate: expected nothing beside a list"),
        (([(1.0, 0.1)],), {}, r"multiplier: expected a list of \(multiplier, sample_rate, steps\)"),
        ((1.0, 0.1, 1), {"delta": 0.0}, "delta: expected a number between 0 and 1, got 0.0"),
        ((1.0, 0.1, 1), {"delta": math.nan}, "delta: expected a number between 0 and 1, got nan"),
        ((1.0, 0.1, 1), {"accountant": "gdp"}, "accountant: expected one of pld, rdp, got 'gdp'"),
        ((1.0, 0.1, 1), {"provenance": "mine"}, "provenance: expected one of public, released_iterate, unknown"),
        ((1.0, 0.1, 1), {"provenance": None}, "provenance: expected one of public"),
        ((1.0, 0.1, 1), {"provenance": "dp"}, r"provenance: expected pyml.privacy.dp\(epsilon, delta\)"),
        ((1.0, 0.1, 1), {"sampling": "cyclic"}, "sampling: expected one of poisson, shuffled, fixed_size"),
        ((1.0, 0.1, 1), {"noise": "quiet"}, "noise: expected one of secure, hardened, fast, seeded"),
        ((1.0, 0.1, 1), {"total_variation": -1.0}, "total_variation: expected a finite number >= 0"),
        ((1.0, 0.1, 1), {"claimed_multiplier": [1.0, 2.0], "allow_unproven": True},
         "claimed_multiplier: expected one number, or one for each of the 1 phases, got 2"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(positional, named, sentence):
    with pytest.raises((ValueError, TypeError), match=f"^epsilon: {sentence}"):
        epsilon(*positional, **{"delta": 1e-5, **PUBLIC, **named})


def test_a_provenance_that_contradicts_itself_is_refused():
    with pytest.raises(TypeError):
        epsilon(1.0, 0.1, 1, delta=1e-5)
    with pytest.raises(ValueError, match='provenance: epsilon, delta: expected nothing beside "public"'):
        Provenance("public", 1.0, 1e-6)
    with pytest.raises(ValueError, match="provenance: epsilon: expected a number >= 0, got nan"):
        dp(math.nan, 0.0)
    with pytest.raises(ValueError, match="provenance: delta: expected a number from 0 to 1, got 2"):
        dp(1.0, 2.0)
    with pytest.raises(TypeError, match="provenance: epsilon: expected a number >= 0, got str"):
        dp("1.0", 1e-6)


# --- the multiplier for a target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.18, 180), (3.0, 0.01, 500), (40.0, 1.0, 1)])
def test_the_multiplier_for_a_target_is_the_least(target, rate, steps, accountant):
    found = noise_multiplier(target, rate, steps, delta=1e-4, accountant=accountant, **PUBLIC)
    at = {"delta": 1e-4, "accountant": accountant, **PUBLIC}
    assert epsilon(found, rate, steps, **at) <= target < epsilon(found / 1.0011, rate, steps, **at)


def test_the_target_includes_the_guide():
    guided = noise_multiplier(1.0, 0.1, 50, delta=1e-4, provenance=dp(0.4, 1e-6))
    assert guided > noise_multiplier(1.0, 0.1, 50, delta=1e-4, **PUBLIC)
    assert epsilon(guided, 0.1, 50, delta=1e-4, provenance=dp(0.4, 1e-6)) <= 1.0
    with pytest.raises(ValueError, match=r"target_epsilon: expected at least the 0.4 that the guides cost, got 0.3"):
        noise_multiplier(0.3, 0.1, 50, delta=1e-4, accountant="rdp", provenance=dp(0.4, 1e-6))
    with pytest.raises(ValueError, match="provenance: expected a scale for which an epsilon is provable"):
        noise_multiplier(1.0, 0.1, 50, delta=1e-4, provenance="unknown")


def test_phases_beside_are_composed_and_not_added():
    at, guide = {"delta": 1e-4, "accountant": "rdp", **PUBLIC}, (4.0, 0.1, 20)
    found = noise_multiplier(1.0, 0.1, 50, beside=[guide], **at)
    assert epsilon([guide, (found, 0.1, 50)], **at) <= 1.0 < epsilon([guide, (found / 1.0011, 0.1, 50)], **at)
    price = dp(float(epsilon(*guide, **at)), 0.0)
    assert found < noise_multiplier(1.0, 0.1, 50, **{**at, "provenance": price})
    with pytest.raises(ValueError, match=r"expected at least the 0\.\d+ that the phases beside cost, got 0.1"):
        noise_multiplier(0.1, 0.1, 50, beside=[guide], **at)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 1.0])
def test_a_target_that_all_or_none_reach_is_refused_at_once(rate, monkeypatch):
    def composed(*_):
        raise AssertionError("no distribution is needed")

    monkeypatch.setattr(accounting, "_compose", composed)
    chance = 1 - (1 - rate) ** 10
    if rate < 1:
        with pytest.raises(ValueError, match=r"^noise_multiplier: delta: expected at most \S+, the chance that a"):
            noise_multiplier(1.0, rate, 10, delta=chance * 1.01, **PUBLIC)
        with pytest.raises(ValueError, match=r"delta: expected at most \S+ beside that of the guides, the"):
            noise_multiplier(1.0, rate, 10, delta=chance * 1.01 + 1e-3, provenance=dp(0.1, 1e-3))
    for guide, sentence in (
        (dp(2.0, 0.0), "target_epsilon: expected at least the 2 that the guides cost, got 1.0"),
        (dp(0.1, 1e-7), "delta: expected more than that of the guides, 1e-07, got 1e-07"),
    ):
        with pytest.raises(ValueError, match=f"^noise_multiplier: {sentence}$"):
            noise_multiplier(1.0, rate, 10, delta=1e-7, provenance=guide)
    with pytest.raises(AssertionError, match="needed"):
        noise_multiplier(1.0, rate, 10, delta=chance * 0.99, **PUBLIC)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_delta_near_the_chance_to_be_sampled_still_has_a_least_multiplier(accountant, monkeypatch):
    """Where epsilon falls from a lot to nothing within a tenth of the multiplier, and distributions are largest."""
    fine, whole = [], accounting._loss_distributions

    def counted(phases, delta, coarse=1):
        fine.extend([phases] if coarse == 1 else [])
        return whole(phases, delta, coarse)

    monkeypatch.setattr(accounting, "_loss_distributions", counted)
    monkeypatch.setattr(accounting, "LONGEST", 2e4)  # or each would take seconds, as it does for users
    at = {"delta": 0.98 * (1 - 0.9**2), "accountant": accountant, **PUBLIC}
    found = noise_multiplier(1.0, 0.1, 2, **at)
    assert len(fine) <= (4 if accountant == "pld" else 0)
    assert epsilon(found, 0.1, 2, **at) <= 1.0 < epsilon(found / 1.0011, 0.1, 2, **at)


def test_the_search_ends_at_every_tolerance():
    wide, fine = (noise_multiplier(2.0, 1.0, 3, delta=1e-5, tolerance=t, **PUBLIC) for t in (1e-3, 1e-9))
    assert fine <= wide * (1 + 1e-9) and wide <= fine * 1.001
    for tolerance in (1e-17, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance: expected a finite number of at least 1e-09, got"):
            noise_multiplier(1.0, 0.1, 10, delta=1e-5, tolerance=tolerance, **PUBLIC)
    calls = []
    root = accounting._least(lambda m: calls.append(m) or (1.0 if m < 1.7 else -1.0), 1.0, 2.0, 1e-30)
    assert root == 1.7 and len(calls) < 400, "neighbouring floats end it"
