"""The history of a run: what it adds up, what it saves, what makes it worthless."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyml.privacy import History, dp, epsilon, secure_noise

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")

ROOT = Path(__file__).parents[1]


def recorded(**named):
    history = History(**{"provenance": "public", **named})
    for _ in range(3):
        history.record(1.1, 0.1)
    history.record(2.0, 0.05, 40, total_variation=1e-20)
    return history


def test_equal_steps_join_into_phases():
    history = recorded()
    history.record(1.1, 0.1, 7)
    assert history.phases == ((1.1, 0.1, 10), (2.0, 0.05, 40)) and history.steps == 50
    assert history.total_variation == pytest.approx(40e-20)
    assert history.epsilon(1e-5) == epsilon(history.phases, delta=1e-5, provenance="public", total_variation=40e-20)
    assert History(provenance="public").epsilon(1e-5) == 0, "nothing was released"


def test_survives_json_and_torch(tmp_path):
    history = recorded(provenance=["public", dp(0.25, 1e-7)], noise="seeded", facts={"norm": "whitened", "clip": 0.5})
    torch.save({"history": history.state_dict()}, tmp_path / "state.pt")
    states = (
        json.loads(json.dumps(history.state_dict())),
        torch.load(tmp_path / "state.pt", weights_only=True)["history"],
    )
    for state in states:
        other = History(provenance="unknown", sampling="shuffled")
        other.record(9.0, 1.0)
        other.load_state_dict(state)
        assert other.state_dict() == history.state_dict()
        assert str(other.epsilon(1e-5)) == str(history.epsilon(1e-5))
        other.record(1.1, 0.1)
        assert other.steps == history.steps + 1


def test_a_broken_state_is_refused_and_changes_nothing():
    history, good = recorded(), recorded().state_dict()
    before = copy.deepcopy(history.state_dict())
    for change, sentence in (
        ({"format": 2}, "state: expected format 1, got 2"),
        ({"phases": [[math.nan, 0.1, 1]]}, "multiplier: expected a finite number >= 0, got nan"),
        ({"sampling": "none"}, "sampling: expected one of"),
        ({"total_variation": -1.0}, "total_variation: expected a finite number >= 0"),
        ({"total_variation": None}, "total_variation: expected a finite number >= 0, got NoneType"),
        ({"phases": None}, "phases: expected a list of triples, got None"),
        ({"phases": [3.0]}, r"phases: expected a list of triples, got \[3.0\]"),
        ({"phases": [[1.0, 0.1]]}, r"phases: expected a list of triples, got \[\[1.0, 0.1\]\]"),
        ({"phases": [[1.0, 0.1, 2.5]]}, "steps: expected an integer >= 0, got 2.5"),
        ({"phases": [[1.0, None, 2]]}, "sample_rate: expected a number from 0 to 1, got NoneType"),
        ({"provenance": None}, "provenance: expected a list of triples, got None"),
        ({"provenance": "public"}, "provenance: expected a list of triples, got 'public'"),
        ({"provenance": ["dp1"]}, "provenance: expected a list of triples"),
        ({"provenance": []}, "provenance: expected one of public"),
        ({"provenance": [["dp", None, 0.0]]}, "provenance: epsilon: expected a number >= 0, got NoneType"),
        ({"provenance": [[["public"], 0.0, 0.0]]}, "provenance: kind: expected one of public"),
        ({"noise": ["fast"]}, "noise: expected one of secure, hardened, fast, seeded"),
        ({"adaptive": None}, "adaptive: expected a bool, got NoneType"),
        ({"facts": None}, "facts: expected a mapping, got NoneType"),
        ({"recorded": None}, "recorded: expected a list of lists of 5, got None"),
        ({"recorded": good["recorded"][:1]}, "recorded: expected what adds up to the phases"),
        ({"recorded": [[*good["recorded"][0][:4], -1.0]]}, "total_variation: expected a finite number >= 0"),
        ({"total_variation": 1e-3}, "recorded: expected what adds up to the phases"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^(History.*)?{sentence}"):
            history.load_state_dict({**good, **change})
    for state in (None, [], "state"):
        with pytest.raises(TypeError, match=r"^History.load_state_dict: state: expected the entries of state_dict\(\)"):
            history.load_state_dict(state)
    del good["noise"]
    with pytest.raises(ValueError, match=r"History.load_state_dict: state: expected .* got one without noise"):
        history.load_state_dict(good)
    assert history.state_dict() == before


def test_including_a_guide_keeps_the_worse_of_everything():
    run, guide = recorded(), recorded(provenance=dp(0.1, 1e-8), noise="seeded")
    before = run.epsilon(1e-5)
    run.include(guide)
    assert run.phases == ((1.1, 0.1, 6), (2.0, 0.05, 80)) and run.noise == "seeded"
    assert run.epsilon(1e-5) > before and "dp(epsilon=0.1" in run.report(1e-5)
    assert run.total_variation == pytest.approx(80e-20)
    run.include(recorded(provenance="unknown"))
    assert run.epsilon(1e-5) == math.inf
    shuffled = recorded()
    shuffled.include(recorded(sampling="shuffled"))
    assert shuffled.epsilon(1e-5) == math.inf


def test_a_schedule_that_looks_at_outputs_has_no_epsilon():
    history = recorded()
    history.record(1.0, 0.1, adaptive=True)
    found = history.epsilon(1e-5)
    assert found == math.inf and "schedule" in found.reason
    resumed = History(provenance="public")
    resumed.load_state_dict(history.state_dict())
    assert resumed.epsilon(1e-5) == math.inf


def test_the_report_says_all_that_belongs_beside_an_epsilon():
    report = recorded(facts={"clip": "0.5, whitened norm"}).report(1e-5)
    for part in (
        "epsilon_provable", "delta 1e-05", "pld, dp-accounting", "3 steps at multiplier 1.1", "sample rate 0.05",
        "sampling: poisson", "scale: public", "clip: 0.5, whitened norm", "add or remove one",
    ):  # fmt: skip
        assert part in report, part


def test_claims_of_a_history_need_the_opt_in():
    history = recorded()
    with pytest.raises(ValueError, match=r"History.epsilon: claimed_multiplier: expected allow_unproven=True"):
        history.epsilon(1e-5, claimed_multiplier=3.0)
    found = history.epsilon(1e-5, claimed_multiplier=[3.0, 4.0], allow_unproven=True)
    assert found.claimed_by_rule < found


def test_the_optional_packages_are_imported_when_they_are_needed(monkeypatch):
    code = (
        "import sys, pyml.privacy; "
        "assert not {'dp_accounting', 'cryptography', 'opacus'} & set(sys.modules); print('lazy')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "lazy", done.stderr
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp", None)
    with pytest.raises(ImportError, match=r"epsilon: dp_accounting is not installed \(pip install 'pyml\[privacy\]'\)"):
        epsilon(1.2345, 0.1, 7, delta=1e-5, provenance="public")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ImportError, match=r"secure: cryptography is not installed \(pip install 'pyml\[privacy\]'\)"):
        secure_noise((2,), 1.0)


def test_the_same_steps_count_once_and_others_of_one_make_do_not():
    first, second = recorded(), recorded()
    assert first.phases == second.phases
    saved = json.loads(json.dumps(first.state_dict()))
    again = History(provenance="public")
    again.load_state_dict(saved)
    again.record(1.1, 0.1, 7)  # in another process
    first.record(1.1, 0.1, 2)
    again.keep(first)
    assert again.phases == ((1.1, 0.1, 12), (2.0, 0.05, 40)) and again.total_variation == pytest.approx(40e-20)
    again.keep(again)
    again.keep(first)
    assert again.steps == 52
    twin = copy.deepcopy(again)
    twin.record(1.1, 0.1)
    again.record(1.1, 0.1)
    assert again.steps == twin.steps == 53
    again.keep(twin)
    assert again.steps == 54, "a copy is another one"
    again.include(again)
    assert again.steps == 108
    again = History(provenance="public")
    again.load_state_dict(saved)
    again.keep(second)
    assert again.phases == ((1.1, 0.1, 6), (2.0, 0.05, 80)) and again.total_variation == pytest.approx(80e-20)


def test_states_of_before_are_of_nobody_who_is_known():
    saved = recorded().state_dict()
    del saved["recorded"], saved["scales"]
    for _ in range(2):
        loaded = History(provenance="public")
        loaded.load_state_dict(saved)
        assert loaded.phases == recorded().phases and loaded.total_variation == pytest.approx(40e-20)
    other = History(provenance="public")
    other.load_state_dict(saved)
    other.keep(loaded)
    assert other.steps == 2 * 43
