"""The claim of the methods on heads, on trained tiny Llamas: key heads learn it sooner and better than random ones."""

import json

import pytest

from tests.head_files import cache_in
from tests.method_runs import TRAINING, needs

needs(*TRAINING, "transformers")
pytestmark = pytest.mark.slow  # three tiny Llamas are trained first

COMMON = ["--seeds", 3, "--device", "cpu", "--threads", 1, "--quiet"]


def test_key_heads_beat_random_heads_over_three_seeds(run, tmp_path):
    with cache_in(tmp_path / "cache"):
        options = ["--arms", "base,spt,random,spt-early,random-early", "--out", tmp_path / "run"]
        assert run("train", "pinpoint", *COMMON, *options) == (0, "", "")
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["archs"]
    scores = ("behaviour", "answers", "control", "steps")
    base, spt, random, early, late = ({name: row[name]["mean"] for name in scores} for row in rows.values())
    assert base["behaviour"] > 95 and base["answers"] < 5 and base["control"] > 98
    assert spt["behaviour"] < 5 and spt["answers"] > 90 and spt["control"] > 95
    assert spt["answers"] + spt["control"] > random["answers"] + random["control"]
    assert early["answers"] > 90 and 2 * early["steps"] < late["steps"]
