"""What a benchmark run says: rows, targets, tables, the picture, comparison with an older run."""

import csv
import itertools
from dataclasses import replace

import pytest
from pyml.benchmarks import bars, compare, output, report
from pyml.benchmarks.registry import BOTH, FAMILIES, FORWARD, Case, Cost, Registry, Target, load
from pyml.benchmarks.report import Row
from rich.console import Console


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
    share = Target("backward", 1.3, mode=BOTH)
    assert report.judge(case(), share, rows).word == "not measured"
    rows += [row("pyml", 3.0, mode=BOTH), row("pyml", 1.25, "retain", mode=BOTH)]
    verdict = report.judge(case(), share, rows)
    assert verdict.value == 1.25 and verdict.met and verdict.wanted == "<= 1.3x" and "over the forward" in verdict.text


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


def test_pace_is_time_for_each_useful_operation():
    rows = [
        row("pyml", 3.0, flops=20.0), row("pyml", 4.0, "retain", flops=20.0),
        row("pyml", 1.0, case="op 2x2", flops=10.0), row("pyml", 2.0, "retain", case="op 2x2", flops=10.0),
    ]  # fmt: skip
    assert report.judge(case(), Target("pace", 1.1, "op 2x2"), rows).value == pytest.approx(1.5)
    assert report.judge(case(), Target("pace", 1.5, "op 2x2"), rows).met is True
    elsewhere = Target("pace", 1.1, "op 3x3")
    assert report.judge(case(), elsewhere, rows).word == "not measured"
    assert report.verdicts([case(elsewhere)], rows) == []  # a quick run leaves that case out


def test_a_target_of_a_dtype_is_judged_in_it_alone():
    wanted = {"mode": FORWARD, "threads": 0, "device": "cuda"}
    fields = {"device": "cuda", "threads": 0, "allocator": "torch"}
    rows = [
        row("pyml", 2.0, **fields, ceiling_fraction=0.2, fma_fraction=0.1), row("eager", 3.0, **fields),
        row("pyml", 1.0, **fields, dtype="bfloat16", ceiling_fraction=0.4),
        row("eager", 3.0, **fields, dtype="bfloat16"),
    ]  # fmt: skip
    targets = [Target(*t, **wanted, dtype="bfloat16") for t in (("speedup", 2, "eager"), ("ceiling", 0.3, "binding"))]
    assert [v.value for v in report.verdicts([case(*targets)], rows)] == [3.0, 0.4]
    assert report.judge(case(), Target("speedup", 2, "eager", **wanted), rows).value == 1.5
    found = report.verdicts([case(*targets)], rows[:2])
    assert [v.word for v in found] == ["not judged"] * 2
    assert output.not_judged(found) == ["Not judged: 2 targets for bfloat16, as nothing ran in it."]
    assert found[1].text == "forward, GPU, bfloat16: of the binding ceiling"


def test_a_target_is_judged_at_its_own_number_of_threads(capsys):
    of_all_kinds = [
        Target("speedup", 4.0, "eager"), Target("memory", 8, "eager"), Target("bytes", 9), Target("seconds", 0.5),
        Target("seconds", 3.0, threads=1),
    ]  # fmt: skip
    alone = [row("pyml", 2.0, threads=1, extra_bytes=10), row("eager", 4.0, threads=1, extra_bytes=20)]
    found = report.verdicts([case(*of_all_kinds)], alone)
    assert [v.word for v in found] == ["not judged"] * 4 + ["met"] and [v.value for v in found[:4]] == [None] * 4
    assert output.not_judged(found) == ["Not judged: 4 targets for 2 threads, as nothing ran with so many."]
    output.print_targets(Console(width=120), found)
    out = capsys.readouterr().out
    assert "Not judged: 4 targets" in out and "1 thread: time" in out and "2 threads: " not in out
    both = [*alone, row("pyml", 1.0, extra_bytes=5), row("eager", 5.0, extra_bytes=50)]
    assert [v.word for v in report.verdicts([case(*of_all_kinds)], both)] == ["met", "met", "met", "missed", "met"]


@pytest.mark.parametrize(
    ("target", "value", "wanted", "measured"),
    [
        (Target("ceiling", 0.5, "fma"), 0.4997, ">= 50 %", "49.97 %"),
        (Target("ceiling", 0.5, "fma"), 0.5004, ">= 50 %", "50 %"),
        (Target("ceiling", 0.45, "fma"), 0.371, ">= 45 %", "37 %"),
        (Target("speedup", 5.0, "eager"), 4.99996, ">= 5x", "4.99996x"),
        (Target("seconds", 150e-6), 150.4e-6, "<= 150 us", "150.4 us"),
        (Target("bytes", 24 << 20), (24 << 20) + 4096, "<= 25.166 MB", "25.17 MB"),
        (Target("speedup", 4.0, "eager"), 1234.5, ">= 4x", "1234x"),
    ],
)
def test_a_miss_never_reads_like_its_bound(target, value, wanted, measured):
    met = value >= target.bound if target.at_least else value <= target.bound
    verdict = report.Verdict("a case", target, value, met)
    assert (verdict.wanted, verdict.measured) == (wanted, measured)
    assert met or wanted.split(maxsplit=1)[1] != measured


def test_what_was_not_run_is_one_line_a_case(tmp_path, capsys):
    spent, late = "not run: the budget was spent", "not run: 4 s were left and did not suffice"
    rows = [
        row(name, None, allocator, mode=mode, status=late if mode == BOTH else spent)
        for mode in (FORWARD, BOTH) for name in ("pyml", "eager") for allocator in ("default", "retain")
    ]  # fmt: skip
    line = f"op 1x1: {spent}: pyml, eager ({FORWARD}, {BOTH})"
    assert output.problems(rows) == [line]
    output.print_case(Console(width=120), rows)
    assert capsys.readouterr().out == f"{line}\n"
    output.write_markdown(rows, [], tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text()
    assert f"- {line}" in text and "## op 1x1" not in text
    mixed = [row("pyml", 1.0), row("eager", None, status="ValueError: no"), row("eager", None, mode=BOTH, status=spent)]
    assert output.problems(mixed) == [f"op 1x1: ValueError: no: eager ({FORWARD})", f"op 1x1: {spent}: eager ({BOTH})"]


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


def test_labels_of_the_picture_do_not_overlap():
    """Also where a case has one bar only, or a long label, or all times are alike."""
    shapes = ["64x25", "B=1 H=2 P=256 S=64 K=32 D=24 Dv=6 causal", "8x1x128x140 k=5 ->16 G=5", "14336x25->16"]
    rows = [
        row(name, median * (1 + n), case=f"an_op_of_some_length {shape}", op="an_op_of_some_length", shape=shape,
            mode=mode, dtype=dtype, cpu="A processor whose maker gave it a long name, 2.70 GHz")
        for median in (1e-6, 3.0) for shape in shapes for mode in (FORWARD, BOTH, "whole scene")
        for dtype in ("float32", "bfloat16") for n, name in enumerate(["pyml", "eager"] if median > 1 else ["pyml"])
    ]  # fmt: skip
    for some in (rows, [r for r in rows if r.median_s < 1 and r.mode == FORWARD], rows[:1]):
        figure = bars.draw(list(report.groups(some).values()))
        figure.canvas.draw()
        numbers = [text for panel in figure.axes for text in panel.texts]
        labels = [text for panel in figure.axes for text in panel.get_yticklabels()]
        texts = [*numbers, *labels, figure._suptitle, *figure.legends[0].get_texts()]
        boxes = [text.get_window_extent() for text in texts]
        assert len(numbers) == len({(r.case, r.mode, r.dtype, r.contender) for r in some})
        for a, b in itertools.combinations(range(len(boxes)), 2):
            assert not boxes[a].overlaps(boxes[b]), (texts[a].get_text(), texts[b].get_text())
        for text, box in zip(texts, boxes):
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside and box.y0 >= figure.bbox.y0, text.get_text()


def test_csv_round_trip(tmp_path):
    rows = [
        row("pyml", 1.25e-5, p20_s=1e-5, p80_s=2e-5, extra_bytes=7, commit="abc"),
        row("eager", None, status="RuntimeError: a, b"),
    ]
    output.write_csv(rows, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        assert tuple(next(csv.reader(file))) == report.COLUMNS
    assert output.read_csv(tmp_path / "a.csv") == rows


def test_an_older_csv_lacks_columns(tmp_path):
    output.write_csv([row("pyml", 1.0, gflops=2.0)], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        records = [{n: text for n, text in record.items() if n != "gflops"} for record in csv.DictReader(file)]
    with (tmp_path / "old.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
    assert output.read_csv(tmp_path / "old.csv") == [row("pyml", 1.0)]


def test_useful_operations_a_second_are_in_both_tables(tmp_path, capsys):
    """That of the screen has at most 120 columns, whatever the contender and however wide the figures."""
    longest = max((name for c in load(FAMILIES).cases for name in c.contenders), key=len)
    figures = {"threads": 16, "mode": BOTH, "extra_bytes": 123_456_789_000, "p20_s": 1.01e-4, "p80_s": 1.09e-4}
    reached = {"gflops": 12345.4, "ceiling_fraction": 1.0, "binds": "matrix"}
    rows = [row(name, 1.05e-4, a, **figures, **reached) for name in ("pyml", longest) for a in ("default", "retain")]
    output.print_case(Console(width=300), rows)
    shown = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in shown) <= 120
    assert sum("12345" in line for line in shown) == 2 and any("GFLOP/s" in line for line in shown)
    output.write_markdown(rows, [], tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text().count("| 12345 | 100 % matrix |") == 2


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


def test_two_cases_of_one_name_and_unknown_contenders_are_refused():
    registry = Registry()
    registry.add(case())
    with pytest.raises(ValueError, match="two cases are called 'op 1x1'"):
        registry.add(case())
    with pytest.raises(ValueError, match="no contender called 'nobody'"):
        registry.add(replace(case(Target("speedup", 1.0, "nobody")), shape="2x2"))
