"""The benchmark harness: order of repetitions, statistics, rows, targets, comparison and one tiny run end to end."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from pyml.benchmarks import compare, harness, jobs, output, report, run
from pyml.benchmarks.registry import BOTH, FAMILIES, FORWARD, Case, Cost, Registry, Setup, Target, load
from pyml.benchmarks.registry import ops_without_cases as without_cases
from pyml.benchmarks.report import OK, Row

from pyml.methods import UserError
from pyml.ops import OPS


def test_every_op_has_a_case():
    assert without_cases() == []


def test_an_op_without_a_case_is_found(monkeypatch):
    stray = type("Stray", (), {"family": "bspline"})()
    monkeypatch.setitem(OPS, "an_op_nobody_measures", stray)
    assert without_cases() == ["an_op_nobody_measures"]


def test_targets_name_contenders_and_cases_that_exist():
    registry = load(FAMILIES)
    names = {case.name for case in registry.cases}
    for case in registry.cases:
        for target in case.targets:
            assert target.mode in case.modes and target.device in case.devices, (case.name, target)
            if target.measure == "growth":
                assert target.against in names


def test_costs_are_of_useful_work_only():
    registry = load(["bspline"])
    small, large = (registry.find(f"kan_linear 1024x256->256 G={g}") for g in (5, 20))
    for mode in (FORWARD, BOTH):
        assert small.cost(mode, 4).flops == large.cost(mode, 4).flops  # local support: the grid does not count
        assert small.cost(mode, 4).bytes < large.cost(mode, 4).bytes  # the coefficients are read once
    b, i, o = 1024, 256, 256
    expected = b * i * o * (2 * 4 + 2)  # four basis functions and the base branch an edge, two FLOPs each
    assert small.cost(FORWARD, 4).matrix == expected
    assert small.cost(FORWARD, 4).bytes == 4 * (b * i + b * o + i * o * 9)


# --- harness ----------------------------------------------------------------------------------------------------------


def test_repetitions_are_interleaved():
    assert harness.schedule({"a": 3, "b": 3}) == ["a", "b", "a", "b", "a", "b"]
    order = harness.schedule({"a": 6, "b": 2})
    assert order.count("a") == 6 and order.count("b") == 2
    assert order.index("b") == 3 and order[-1] == "b"  # spread over the rounds, not bunched


@pytest.mark.parametrize("n", [1, 4, 5, 7])
def test_quantiles(n):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n)).double()
    for q in (0.2, 0.5, 0.8):
        assert math.isclose(harness.quantile(values.tolist(), q), float(values.quantile(q)), rel_tol=1e-12)


def test_short_calls_are_batched_and_long_ones_are_not_repeated_for_long():
    repetitions, inner = harness.plan(2e-6, budget=0.5)
    assert inner * 2e-6 >= harness.LEAST_SLICE and repetitions == harness.MOST_REPETITIONS
    assert harness.plan(0.1, budget=1.0) == (10, 1)
    assert harness.plan(0.5, budget=0.1) == (5, 1)
    assert harness.plan(2.0, budget=0.1) == (3, 1)
    assert harness.plan(30.0, budget=0.1) == (1, 1)


def test_interleave_reports_median_and_spread():
    clock_times = {"a": [2.0, 1.0, 3.0, 2.0], "b": [0.5] * 50}  # a long call warms up once, a shorter one three times
    asked = []

    def clock(call, n):
        name = call()
        asked.append(name)
        values = clock_times[name]
        return values[min(asked.count(name) - 1, len(values) - 1)] * n

    found = harness.interleave({name: (lambda name=name: name) for name in clock_times}, 1.0, clock)
    assert asked[:4] == ["a", "b", "b", "b"]
    assert asked[4:] == harness.schedule({"a": found["a"].repetitions, "b": found["b"].repetitions})
    assert found["a"].repetitions == 3 and found["b"].repetitions == 5
    assert found["a"].median == 2.0 and found["b"].median == 0.5
    assert math.isclose(found["a"].p20, 1.4) and math.isclose(found["a"].p80, 2.6)


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    size = 64 << 20

    def call():
        buffer = torch.ones(size // 4)
        return buffer[:1].clone()

    extra = harness.peak_extra_bytes(call)
    assert 0.9 * size < extra < 1.3 * size
    assert harness.peak_extra_bytes(lambda: torch.ones(1)) < 4 << 20


def test_the_allocator_settings_reach_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    job = jobs.Job("time", "cpu", "float32", 2, "retain")
    kept = jobs.environment(job, tmp_path)
    assert kept["MALLOC_MMAP_THRESHOLD_"] == kept["MALLOC_TRIM_THRESHOLD_"] == "2147483647"
    assert kept["OMP_NUM_THREADS"] == "2"
    plain = jobs.environment(replace(job, allocator="default"), tmp_path)
    assert not [name for name in plain if name.startswith("MALLOC_")]


def test_plan_times_every_case_under_both_allocators_and_measures_each_contender_alone():
    case = load(["bspline"]).find("kan_linear 1024x256->256 G=5")
    plan = jobs.plan([case], "cpu", ["float32"], [1, 2], {case.name: {"pykan": "kan"}})
    assert [j.threads for j in plan if j.kind == "ceilings"] == [1, 2, 1, 2]  # before and after
    timed = {(j.threads, j.allocator) for j in plan if j.kind == "time"}
    assert timed == {(1, "default"), (1, "retain"), (2, "default"), (2, "retain")}
    alone = [j.names for j in plan if j.kind == "memory"]
    assert ("pyml",) in alone and ("eager",) in alone and ("pykan",) not in alone
    assert all(len(names) == 1 for names in alone)


# --- rows and targets -------------------------------------------------------------------------------------------------


def row(contender, median, allocator="default", **more):
    fields = {
        "family": "bspline", "case": "op 1x1", "op": "op", "shape": "1x1", "mode": FORWARD, "device": "cpu",
        "dtype": "float32", "precision": "exact", "threads": 2, "backend": "",
        "p20_s": median and 0.9 * median, "p80_s": median and 1.1 * median,
    }  # fmt: skip
    return Row(contender=contender, median_s=median, allocator=allocator, **{**fields, **more})


def case(*targets):
    names = dict.fromkeys(("pyml", "eager", "torch.nn.Linear"))
    return Case("bspline", "op", "1x1", lambda setup: {}, names, lambda mode, size: Cost(), targets=targets)


def test_a_target_counts_against_the_better_allocator_setting():
    rows = [row("pyml", 2.0), row("pyml", 1.0, "retain"), row("eager", 9.0), row("eager", 4.0, "retain")]
    verdict = report.judge(case(), Target("speedup", 4.5, "eager"), rows)
    assert verdict.value == 4.0 and verdict.met is False and verdict.word == "missed"
    assert report.judge(case(), Target("speedup", 4.0, "eager"), rows).met is True
    assert report.judge(case(), Target("seconds", 1.0), rows).met is True
    rows.append(row("torch.nn.Linear", 0.4))
    assert report.judge(case(), Target("slowdown", 3.0, "torch.nn.Linear"), rows).value == pytest.approx(2.5)
    assert report.judge(case(), Target("speedup", 1.0, "eager", BOTH), rows).word == "not measured"


def test_memory_and_ceiling_targets():
    rows = [
        row("pyml", 1.0, extra_bytes=10, ceiling_fraction=0.9, binds="copy", fma_fraction=0.3),
        row("eager", 1.0, extra_bytes=90),
        replace(row("pyml", None, extra_bytes=9), case="op 2x2"),
    ]
    assert report.judge(case(), Target("memory", 8, "eager"), rows).value == 9.0
    assert report.judge(case(), Target("bytes", 9), rows).met is False
    assert report.judge(case(), Target("growth", 1.1, "op 2x2"), rows).value == pytest.approx(10 / 9)
    assert report.judge(case(), Target("ceiling", 0.45, "fma"), rows).value == 0.3


def test_absent_rivals_are_listed_and_their_targets_left_out():
    rows = [row("pyml", 1.0), row("eager", None, status="not installed")]
    assert report.verdicts([case(Target("speedup", 1.0, "eager"))], rows) == []
    shown = report.lines(rows)
    assert [line.default for line in shown] == ["1 s", "not installed"]
    assert output.problems(rows) == []


def test_losses_are_printed_like_wins():
    rows = [row("pyml", 2.0), row("eager", 1.0), row("torch.nn.Linear", 4.0)]
    assert [line.faster for line in report.lines(rows)] == ["", "0.5x", "2x"]


def test_ceiling_shares_count_products_on_the_faster_unit():
    cost = Cost(flops=100.0, bytes=10.0, exps=1.0, matrix=80.0)
    on_cpu = report.shares(cost, 2.0, {"fma": 100.0, "matrix": 50.0, "copy": 100.0, "exp": None})
    assert on_cpu == {"copy": 0.05, "fma": 0.5}
    on_gpu = report.shares(cost, 2.0, {"fma": 100.0, "matrix": 400.0, "copy": 100.0, "exp": 1.0})
    assert on_gpu == {"copy": 0.05, "exp": 0.5, "fma": 0.1, "matrix": 0.1}


def test_csv_round_trip(tmp_path):
    rows = [
        row("pyml", 1.25e-5, p20_s=1e-5, p80_s=2e-5, extra_bytes=7, commit="abc"),
        row("eager", None, status="RuntimeError: a, b"),
    ]
    output.write_csv(rows, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        assert tuple(next(csv.reader(file))) == report.COLUMNS
    assert output.read_csv(tmp_path / "a.csv") == rows


# --- comparison -------------------------------------------------------------------------------------------------------


def test_compare_shows_what_became_slower():
    old = [row("pyml", 1.0), row("pyml", 1.0, "retain"), row("eager", 1.0), row("pyml", 1.0, threads=1)]
    new = [row("pyml", 1.5), row("pyml", 0.5, "retain"), row("eager", 3.0), row("pyml", 1.05, threads=1)]
    found = compare.changes(old, new)
    assert [c.ratio for c in found] == [1.5, 1.05, 0.5]
    assert [c.regression for c in found] == [True, False, False]


def test_a_wide_spread_is_no_regression():
    old, new = [row("pyml", 1.0, p80_s=2.0)], [row("pyml", 1.3, p20_s=1.2)]
    assert not compare.changes(old, new)[0].regression


def test_compare_says_when_the_machine_is_another():
    assert compare.other_machine([row("pyml", 1.0, cpu="A")], [row("pyml", 1.0, cpu="A")]) is None
    assert "another cpu" in compare.other_machine([row("pyml", 1.0, cpu="A")], [row("pyml", 1.0, cpu="B")])


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"families": ["splines"]}, "family: expected one of bspline"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda"),
        ({"dtype": "float32,int8"}, "dtype: expected one of float32"),
        ({"threads": 0}, "threads: expected integers >= 1"),
        pytest.param(
            {"device": "cuda"},
            "device: expected a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"budget": -1.0}, "budget: expected seconds > 0"),
        ({"only": "no such case"}, "'no such case'"),
    ],
)
def test_wrong_options_are_one_sentence(options, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        run.main(**{"families": ["bspline"], "device": "cpu", "out": tmp_path, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n", "\x00\x01"])
def test_a_file_that_is_no_result_is_refused(text, tmp_path):
    path = tmp_path / "old.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="expected a CSV written by pyml bench"):
        run.main(["bspline"], device="cpu", compare=path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: expected a folder that can be written"):
        run.main(["bspline"], device="cpu", out=tmp_path / "file")


def test_two_cases_of_one_name_and_unknown_contenders_are_refused():
    registry = Registry()
    registry.add(case())
    with pytest.raises(ValueError, match="two cases are called 'op 1x1'"):
        registry.add(case())
    with pytest.raises(ValueError, match="no contender called 'nobody'"):
        registry.add(replace(case(Target("speedup", 1.0, "nobody")), shape="2x2"))


# --- baselines and one run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["kan_linear 64x25->16 G=5", "wkan_linear 64x25->16 G=5", "KANLinear layer 64x25->16 G=5"]
)
@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_contenders_of_a_case_compute_the_same(name, mode):
    contenders = load(["bspline"]).find(name).setup(Setup("cpu", "float64", 1))
    ours = contenders["pyml"].build(mode)()
    theirs = contenders["eager"].build(mode)()
    pairs = list(zip(ours, theirs)) if mode == BOTH else [(ours, theirs)]
    assert len(pairs) == (1 if mode == FORWARD else len(theirs))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_closed_form_is_the_recursion():
    from pyml.reference import bspline as reference
    from pyml.reference import bspline_baselines as baselines

    knots = torch.arange(-3, 5 + 4, dtype=torch.float64) * 0.4 - 1
    x = torch.linspace(-2.5, 2.5, 400, dtype=torch.float64).reshape(-1, 4)
    truth = reference.bspline_basis(x, knots)
    torch.testing.assert_close(baselines.closed_basis(x, knots), truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(baselines.dense_basis(x, knots.expand(4, -1)), truth, rtol=0, atol=1e-12)


def test_a_run_writes_rows_under_both_allocators(tmp_path, capsys, monkeypatch):
    """The whole way once, in fresh processes; without torch.compile, which would take most of the time."""
    whole = load(["bspline"]).find("wkan_linear 64x25->16 G=5")
    few = Registry([replace(whole, contenders=dict.fromkeys(("pyml", "eager", "torch.nn.Linear", "pykan")))])
    few.cases[0].contenders["pykan"] = "no_such_module"
    monkeypatch.setattr(run, "load", lambda families: few)
    assert run.main(["bspline"], out=tmp_path, device="cpu", threads=1, quick=True, only="wkan", seed=3) == 0
    rows = output.read_csv(tmp_path / "bench.csv")
    assert {r.status for r in rows if r.contender == "pykan"} == {"not installed"}
    rows = [r for r in rows if r.contender != "pykan"]
    timed = [r for r in rows if r.contender == "pyml" and r.mode == FORWARD]
    assert {r.allocator for r in timed} == {"default", "retain"}
    for r in rows:
        assert r.status == OK, r.status
        assert r.median_s > 0 and r.p20_s <= r.median_s <= r.p80_s
        assert r.threads == 1 and r.seed == 3 and r.torch == torch.__version__ and r.cpu
    assert all(r.deviation < 1e-5 for r in rows if r.contender == "eager" and r.mode == FORWARD)
    assert [r.extra_bytes is not None for r in timed] == [True, False]  # the default setting's process measures it
    text = (tmp_path / "bench.md").read_text()
    assert "wkan_linear 64x25->16 G=5" in text and "## Targets" in text and "torch.nn.Linear" in text
    assert "pyml faster" in capsys.readouterr().out


def test_a_spent_budget_is_said_and_loses_nothing(tmp_path, capsys):
    code = run.main(["bspline"], device="cpu", threads=1, only="wkan_linear 64x25", out=tmp_path, budget=0.01)
    assert code == 1  # pyml itself was not measured
    rows = output.read_csv(tmp_path / "bench.csv")
    assert rows and {r.status for r in rows} == {"not run: the budget was spent"}
    assert "not run: the budget was spent" in capsys.readouterr().out
