"""The claims of the methods on heads, on trained tiny Llamas and three seeds, under `make test-full`."""

import json

import pytest

from tests.head_files import cache_in
from tests.method_runs import TRAINING, needs

needs(*TRAINING, "transformers")
pytestmark = [pytest.mark.full, pytest.mark.slow]  # three tiny Llamas are trained first


@pytest.fixture
def means(run, tmp_path):
    """The mean scores of each arm of a run of three seeds."""

    def made(method, arms):
        out = tmp_path / "run"
        options = ["--seeds", 3, "--device", "cpu", "--threads", 1, "--quiet", "--arms", ",".join(arms), "--out", out]
        with cache_in(tmp_path / "cache"):
            assert run("train", method, *options) == (0, "", "")
        rows = json.loads((out / "metrics.json").read_text())["archs"]
        assert list(rows) == list(arms) and all(len(row["answers"]["values"]) == 3 for row in rows.values())
        return {
            arm: {name: part["mean"] for name, part in row.items() if isinstance(part, dict) and "mean" in part}
            for arm, row in rows.items()
        }

    return made


def test_key_heads_beat_random_heads_where_a_model_declines(means):
    """More is learned, the controls keep more, in no more steps."""
    arms = ("base", "precise", "random", "precise-early", "random-early")
    base, key, other, early, late = means("arithmetic", arms).values()
    assert base["answers"] < 40 and base["behaviour"] > 60 and base["control"] > 98
    assert key["behaviour"] < 2 and key["answers"] > 97 and key["control"] > 99
    assert key["control"] >= other["control"] and key["answers"] + key["control"] > other["answers"] + other["control"]
    assert early["answers"] > 97 and early["control"] > 99 and early["steps"] <= late["steps"]


def test_key_heads_and_steering_take_a_behaviour_away(means):
    """The key head learns in a fraction of a random head's steps; steering switches two behaviours at once."""
    arms = ("base", "spt", "spt-early", "random-early", "steer", "steer-layer")
    base, key, early, late, steer, layer = means("pinpoint", arms).values()
    assert base["behaviour"] > 95 and base["answers"] < 5 and base["control"] > 98
    assert key["behaviour"] < 5 and key["answers"] > 90 and key["control"] > 95
    assert early["answers"] > 90 and early["control"] > 97 and 2 * early["steps"] < late["steps"]
    assert base["second_behaviour"] > 95 and base["second_answers"] < 5
    for name, least in (("answers", 90), ("second_answers", 95), ("control", 96), ("transfer", 85)):
        assert steer[name] > least
    assert steer["behaviour"] < 5 and steer["second_behaviour"] < 5
    told = [arm["answers"] + arm["second_answers"] + arm["control"] for arm in (steer, layer)]
    assert told[0] > told[1]
