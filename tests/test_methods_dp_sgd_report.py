"""pyml train dp_sgd: what a run says of its seeds, its tuning and its audits."""

import pytest

from pyml.methods.dp_sgd import report
from tests.method_runs import TRAINING, needs

needs(*TRAINING, "sklearn", "opacus", "dp_accounting")


def made_metrics(**accuracies):
    names = {"whitened_permuted": "whitened-permuted"}
    rows = {
        f"{names.get(arm, arm)}@3": {
            "accuracy": {"values": values}, "epsilon_with_tuning": 3.0, "epsilon_lower": {"values": [0.5]},
            "diverged": {"values": [0.0]}, "learning_rate": 4.0, "clip": 0.1,
        }
        for arm, values in accuracies.items()
    }  # fmt: skip
    config = {"epsilons": [3.0], "arms": [name.partition("@")[0] for name in rows], "clips": [0.1], "federated": 0}
    return {"config": {**config, "learning_rates": [1.0, 4.0, 16.0]}, "archs": rows}


def test_findings_say_what_the_seeds_show():
    made = made_metrics(
        isotropic=[80.0, 81.0, 82.0], whitened=[85.0, 86.2, 86.8], whitened_permuted=[84.0, 88.0, 86.0],
        l2=[70.0, 71.0, 72.5],
    )  # fmt: skip
    assert report.findings(made) == [
        "whitened@3 against isotropic@3: +5.00 ± 0.50 points (95%, 3 seeds): better",
        "whitened@3 against whitened-permuted@3: +0.00 ± 3.88 points (95%, 3 seeds): the guide is not shown to be "
        "better than its permutation",
        "l2@3 against isotropic@3: -9.83 ± 0.72 points (95%, 3 seeds): worse",
    ]
    one = made_metrics(isotropic=[80.0], whitened=[85.0])
    assert report.findings(one) == ["whitened@3 against isotropic@3: +5.00 points; one seed shows nothing"]
    one["archs"]["whitened@3"]["epsilon_lower"]["values"] = [3.5]
    one["archs"]["isotropic@3"]["learning_rate"] = 16.0
    assert report.findings(one)[1:] == [
        "isotropic@3: rate x norm 1.6 (16 x 0.1) at the edge of the grid: a wider one may do better",
        "whitened@3: suspicious, as the audit says epsilon is at least 3.5, above 3",
    ]
    one["config"] |= {"clips": [0.1, 0.5], "federated": 9}
    assert report.findings(one)[1:] == [
        "isotropic@3: learning rate 16 and clip norm 0.1 at the edge of the grid: a wider one may do better",
        "whitened@3: clip norm 0.1 at the edge of the grid: a wider one may do better",
    ], "an audit of records says nothing of clients"
    plain = made_metrics(**{"non-private": [80.0]})
    plain["archs"] = {"non-private": {**plain["archs"]["non-private@3"], "clip": None, "learning_rate": 0.1}}
    plain["config"]["clips"] = [0.1, 0.5]
    assert report.findings(plain) == [
        "non-private: learning rate 0.1 at the edge of the grid: a wider one may do better"
    ]


@pytest.mark.parametrize(
    ("guided", "others", "verdict"),
    [
        ([85.0, 86.0, 87.0], [80.0, 81.5, 82.0], "+4.83 ± 0.72 points (95%, 3 seeds): the guide is better than its"),
        ([80.0, 81.5, 82.0], [85.0, 86.0, 87.0], "-4.83 ± 0.72 points (95%, 3 seeds): the guide is worse than its"),
        ([60.0, 90.0, 70.0], [85.0, 86.0, 87.0], "-12.67 ± 37.21 points (95%, 3 seeds): the guide is not shown to be"),
        ([85.0, 86.0], [80.0, 81.0], "+5.00 points; 2 seeds show nothing"),
    ],
)
def test_a_guide_is_judged_by_three_seeds_at_least(guided, others, verdict):
    (line,) = report.findings(made_metrics(whitened=guided, whitened_permuted=others))
    assert line.startswith(f"whitened@3 against whitened-permuted@3: {verdict}")


@pytest.mark.parametrize(
    ("rate", "clip", "edge"),
    [
        (0.25, 0.1, "rate x norm 0.025 (0.25 x 0.1)"),
        (0.63, 1.6, "rate x norm 1.008 (0.63 x 1.6)"),
        (0.25, 1.6, None),  # the least rate and the largest norm: a product in the middle
        (0.63, 0.1, None),
        (0.025, None, "learning rate 0.025"),
        (0.25, None, None),
    ],
)
def test_the_edge_of_a_grid_is_that_of_its_products(rate, clip, edge):
    made = made_metrics(isotropic=[80.0])
    made["config"] |= {"learning_rates": [0.25, 0.4, 0.63], "clips": [0.1, 0.4, 1.6]}
    made["archs"]["isotropic@3"] |= {"learning_rate": rate, "clip": clip}
    said = [] if edge is None else [f"isotropic@3: {edge} at the edge of the grid: a wider one may do better"]
    assert report.findings(made) == said


def test_what_is_proven_is_rounded_up():
    assert [report.rounded_up(v, 3) for v in (None, 2.9991, 3.0001, 3.0)] == ["none", "3.000", "3.001", "3.000"]
    assert report.rounded_up(9.181, 2) == "9.19"
