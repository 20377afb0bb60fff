"""The benchmark harness: cases, order of repetitions, statistics, wrong options and one tiny run end to end."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from pyml.benchmarks import harness, jobs, output, run, worker
from pyml.benchmarks.registry import BOTH, FAMILIES, FORWARD, KNOWN, OF_CASES, Registry, Setup, load
from pyml.benchmarks.registry import ops_without_cases as without_cases
from pyml.benchmarks.report import OK

from pyml.methods import Stopped, UserError
from pyml.ops import OPS


def test_every_op_has_a_case():
    assert without_cases() == []


def test_an_op_without_a_case_is_found(monkeypatch):
    stray = type("Stray", (), {"family": "bspline"})()
    monkeypatch.setitem(OPS, "an_op_nobody_measures", stray)
    assert without_cases() == ["an_op_nobody_measures"]


def test_only_families_with_cases_are_offered():
    assert set(FAMILIES) == {n for n in KNOWN if importlib.util.find_spec(f"pyml.benchmarks.cases.{n}") is not None}
    for family in FAMILIES:
        assert load([family]).cases
    for other in {*KNOWN, "splines"} - set(FAMILIES):
        with pytest.raises(UserError, match=f"^bench: family: expected one of {', '.join(FAMILIES)}, got '{other}'$"):
            load([other])


def test_targets_name_contenders_and_cases_that_exist():
    registry = load(FAMILIES)
    names = {case.name for case in registry.cases}
    for case in registry.cases:
        for target in case.targets:
            assert target.mode in case.modes and target.device in case.devices, (case.name, target)
            if target.measure in OF_CASES:
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


def test_memory_counts_what_a_first_call_keeps():
    size = 64 << 20

    def build():
        kept = []

        def call():
            if not kept:
                kept.append(torch.ones(size // 4))

        return call

    assert harness.peak_extra_bytes(build()) < 4 << 20
    assert 0.9 * size < harness.peak_extra_bytes(build(), build) < 1.3 * size


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
    for counts, at in (([1, 2], 2), ([2, 4], 2), ([1], 1), ([1, 4], 4)):  # targets are for 2 threads
        plan = jobs.plan([case], "cpu", ["float32"], counts, {case.name: {}})
        assert {j.threads for j in plan if j.kind == "memory"} == {at}


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


def spent(tmp_path, **options):
    """A run of one case that measures nothing, as its budget is spent."""
    return run.main(["bspline"], device="cpu", threads=1, only="wkan_linear 64x25", budget=0.01, **options)


def test_a_second_run_of_a_day_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert spent(tmp_path) == 1
    day, *more = sorted((tmp_path / "bench-results").iterdir())
    assert [folder.name for folder in more] == [f"{day.name}-2", f"{day.name}-3"]
    assert all((folder / "bench.csv").exists() for folder in (day, *more))


@pytest.fixture
def old(tmp_path):
    """The CSV of a run with times of pyml."""
    assert spent(tmp_path, out=tmp_path / "old") == 1
    path = tmp_path / "old" / "bench.csv"
    rows = [replace(r, status=OK, median_s=1.0, p20_s=1.0, p80_s=1.0) for r in output.read_csv(path)]
    output.write_csv(rows, path)
    return path


def test_the_file_that_is_compared_with_is_not_written_over(tmp_path, old):
    before = old.read_bytes()
    (tmp_path / "link").symlink_to(old.parent)
    for out in (old.parent, tmp_path / "link"):
        with pytest.raises(UserError, match=r"^bench: out: expected another folder than that of --compare, got "):
            spent(tmp_path, out=out, compare=old)
    assert old.read_bytes() == before


def test_a_comparison_of_nothing_is_an_error(tmp_path, old, capsys, monkeypatch):
    rows = output.read_csv(old)
    for change in ({"case": "another"}, {"threads": 7}, {"device": "cuda"}, {"dtype": "float64"}, {"status": "failed"}):
        output.write_csv([replace(r, **change) for r in rows], old)
        with pytest.raises(UserError, match=r"^bench: compare: expected a time of pyml in a setting of this run, got "):
            spent(tmp_path, out=tmp_path / "new", compare=old)
        assert not (tmp_path / "new").exists()
    output.write_csv(rows, old)
    monkeypatch.setattr(run, "_failed", lambda rows: False)  # whatever became of this run otherwise
    assert spent(tmp_path, out=tmp_path / "new", compare=old) == 1  # its own times are missing
    assert "Compared nothing: this run and the older one have no time of pyml in common.\n" in capsys.readouterr().out
    new = [replace(r, status=OK, median_s=1.0, p20_s=1.0, p80_s=1.0) for r in output.read_csv(old)]
    monkeypatch.setattr(run.Collector, "add", lambda self, *_: self.rows.__init__(new))
    assert spent(tmp_path, out=tmp_path / "new", compare=old) == 0
    assert "0 regressions." in capsys.readouterr().out


# --- baselines and one run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "kan_linear 64x25->16 G=5",
        "wkan_linear 64x25->16 G=5",
        "KANLinear layer 64x25->16 G=5",
        "bspline_basis 14336x25 G=5",
    ],
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


def test_the_gradient_of_the_basis_case_is_more_than_rounding():
    """In float32 it is that of float64: nearly equal weights of the functions of one input would leave only noise."""
    case = load(["bspline"]).find("bspline_basis 14336x25 G=5")
    single, double = (case.setup(Setup("cpu", d, 1))["pyml"].build(BOTH)()[1] for d in ("float32", "float64"))
    assert (single - double).abs().max() < 1e-4 * double.abs().max()


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
        rate = None if r.contender == "torch.nn.Linear" else pytest.approx(r.flops / r.median_s / 1e9, rel=1e-4)
        assert r.gflops == rate  # that layer does other work
    assert all(r.deviation < 1e-5 for r in rows if r.contender == "eager" and r.mode == FORWARD)
    assert [r.extra_bytes is not None for r in timed] == [True, False]  # the default setting's process measures it
    text = (tmp_path / "bench.md").read_text()
    assert "wkan_linear 64x25->16 G=5" in text and "## Targets" in text and "torch.nn.Linear" in text
    assert "pyml faster" in capsys.readouterr().out


def test_ctrl_c_keeps_the_rows_so_far(tmp_path, monkeypatch, capsys):
    answers = []

    def start(job, **_):
        answers.append(job)
        if len(answers) == 4:  # ceilings, two allocator settings, then the memory of the first contender
            raise KeyboardInterrupt
        return {"error": "failed: out of order"}

    monkeypatch.setattr(jobs, "start", start)
    arguments = ["bspline", "--device", "cpu", "--threads", "1", "--only", "wkan_linear 64x25", "--out", str(tmp_path)]
    assert run.cli(arguments) == 130
    rows = output.read_csv(tmp_path / "bench.csv")
    assert rows and {r.case for r in rows} == {"wkan_linear 64x25->16 G=5"}
    last = capsys.readouterr().err
    assert last == f"stopped; {tmp_path / 'bench.csv'} holds the {len(rows)} rows measured so far\n"
    answers[:] = [None] * 3
    with pytest.raises(Stopped, match=r"^stopped before anything was measured$"):
        run.main(["bspline"], device="cpu", threads=1, out=tmp_path)
    assert output.read_csv(tmp_path / "bench.csv") == rows


def test_a_spent_budget_is_said_and_loses_nothing(tmp_path, capsys):
    code = run.main(["bspline"], device="cpu", threads=1, only="wkan_linear 64x25", out=tmp_path, budget=0.01)
    assert code == 1  # pyml itself was not measured
    rows = output.read_csv(tmp_path / "bench.csv")
    assert rows and {r.status for r in rows} == {"not run: the budget was spent"}
    assert "not run: the budget was spent" in capsys.readouterr().out


def test_a_result_that_is_no_number_differs():
    nan, inf = float("nan"), float("inf")
    ours = [torch.tensor([1.0, 2.0, 4.0])]
    assert worker._deviation(torch.tensor([1.0, 2.0, 3.0]), ours) == 0.25
    assert worker._deviation(torch.tensor([1.0, nan, 4.0]), ours) == inf
    assert worker._deviation(ours[0], [torch.tensor([1.0, nan, 4.0])]) == inf
    both = torch.tensor([1.0, nan, 4.0])
    assert worker._deviation(both, [both]) == 0 and worker._deviation(both, [ours[0][:2]]) is None
