"""The benchmarks run, at tiny sizes, and the README's figures are made from what they write."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo

import extrope_kernels

BENCH = Path(extrope_kernels.__file__).parent.parent / "bench"
ALONE = "bench_launch"  # its kernels are compiled, and those of this process perhaps interpreted
SCRIPTS = sorted(path.stem for path in BENCH.glob("bench_*.py") if path.stem != ALONE)


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/; what --quick switches off is switched on again afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    pytest.importorskip("matplotlib")
    with torch._dynamo.config.patch(disable=True):
        yield importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(bench, tmp_path, capsys, script):
    bench(script).main(["--quick", "--out", str(tmp_path)])
    name = script.removeprefix("bench_")
    results = json.loads((tmp_path / f"{name}-{bench('harness').device()}.json").read_text())
    assert results["rows"] and results["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for row in results["rows"]:
        own = row.get("implementation", row.get("name"))
        assert own in printed
        assert "absent" in row or row.get("milliseconds", row.get("eager")) > 0
        if own == "extrope":
            assert "absent" not in row and (row["of_floor"] > 0)
    for plot in tmp_path.glob("scaling-*.json"):
        assert plot.with_suffix(".svg").exists()


def test_the_host_is_timed_up_to_a_launch(run_python, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    source = f"""
        import sys; sys.path.insert(0, {str(BENCH)!r})
        import bench_launch
        bench_launch.main(["--quick", "--out", {str(tmp_path)!r}])
    """
    run_python(source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="90")
    rows = json.loads((tmp_path / "launch-cpu.json").read_text())["rows"]
    counted = [row for row in rows if "most_kernels" in row]
    assert len(counted) == 10 and all(row["microseconds"] > 0 for row in rows)
    assert all(row["kernels"] <= row["most_kernels"] for row in counted)


def test_every_public_function_has_its_overhead_measured(bench):
    overhead = bench("bench_overhead")
    measured = {**overhead.rotations(), **overhead.attentions(), **overhead.permutes()}
    public = {name: getattr(extrope_kernels, name) for name in extrope_kernels.__all__}
    functions = {name for name, x in public.items() if callable(x) and not isinstance(x, type)}
    assert not functions - set(measured)
    for module in (extrope_kernels.methods.METHODS, extrope_kernels.positions.__all__):
        names = {**overhead.frequencies(), **overhead.position_strategies()}
        assert not [name for name in module if not any(key.endswith(f".{name}") for key in names)]


def test_a_part_replaces_its_own_rows(bench, tmp_path):
    harness = bench("harness")
    rows = [harness.Row(case, "extrope", "float32", "8", milliseconds=1.0) for case in "ab"]
    path = harness.save("some", rows, tmp_path)
    again = harness.Row("b", "extrope", "float32", "8", milliseconds=2.0, ratio=0.5, bar=1.0)
    harness.save("some", [again], tmp_path, merge=True)
    kept = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["milliseconds"]) for row in kept] == [("a", 1.0), ("b", 2.0)]
    assert kept[1]["verdict"] == "met" and "error" not in kept[0]
    other = json.loads(path.read_text()) | {"machine": {"device": "another"}}
    path.write_text(json.dumps(other))
    harness.save("some", [again], tmp_path, merge=True)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_peer_that_fails_is_absent_and_ours_ends_the_run(bench):
    harness, compare = bench("harness"), bench("compare")
    report = harness.Report("some", harness.arguments("some", ["--quick"]))
    floor = compare.Floor(lambda: torch.ones(9).clone())
    about = {"dtype": torch.float32, "shape": "9", "floor": floor}

    def works():
        return torch.ones(9)

    def fails():
        raise RuntimeError("at 3:4\ncannot compile")

    calls = {"extrope": works, "peer": fails, "other": "needs a GPU"}
    compare.compare(report, "a", calls, **about)
    assert [row.absent for row in report.rows] == ["", "RuntimeError: at 3:4", "needs a GPU"]
    with pytest.raises(RuntimeError, match="cannot compile"):
        compare.compare(report, "a", {"extrope": fails, "peer": works}, **about)
    own = {"yardsticks": {"no window": fails}, "own": ("no window",)}
    with pytest.raises(RuntimeError, match="cannot compile"):
        compare.compare(report, "a", {"extrope": works}, **own, **about)


def test_the_product_of_the_floor_fills_the_chip(bench):
    side = bench("compare").product_side
    assert [side(processors) for processors in (46, 108, 132, 148)] == [5120, 8192, 9216, 9216]


def test_verdicts_and_slopes(bench):
    harness, scaling = bench("harness"), bench("scaling")
    assert harness.verdict(1.2, 1.2) == "met" and harness.verdict(1.3, 1.2) == "missed"
    assert harness.verdict(math.nan, 1.0) == harness.verdict(1.0, math.nan) == ""
    rows = [
        {"implementation": "x", "seqlen": n, "threads": t, "milliseconds": n**2 / t, "megabytes": n}
        for n in (1024, 2048, 4096)
        for t in (1, 2)
    ]
    (own,) = scaling.curves(rows)[("x", 2)][-1:]
    assert own["seqlen"] == 4096
    assert scaling.slope(scaling.curves(rows)[("x", 1)], "milliseconds") == pytest.approx(2)
    assert scaling.slope(scaling.curves(rows)[("x", 1)], "megabytes") == pytest.approx(1)
    assert scaling.summary(rows)[1].endswith("2.00 times one thread at 4096 tokens")


def test_the_speed_plot_is_of_the_measured_files(bench):
    """Or run python bench/speed_plot.py."""
    speed = bench("speed_plot")
    drawn = (BENCH.parent / "docs" / "speed.svg").read_text()
    for shown in speed.SHOWN:
        times, best = speed.against_the_best(shown, BENCH / "results")
        rows = json.loads((BENCH / "results" / f"{shown.file}-cpu.json").read_text())["rows"]
        (ratio,) = (
            row["ratio"]
            for row in rows
            if (row["case"], row["dtype"], row["shape"]) == shown[2:5]
            and row["implementation"] == best
        )
        assert times == 1 / ratio > 1  # what the tables say
        assert speed.bar_text(shown, BENCH / "results") in drawn, shown.label


def test_the_readme_tells_speeds_and_numbers_of_models_as_measured(bench):
    """Those of the plot's first, second and fourth bar and its last; those of docs/models.md."""
    speed, root = bench("speed_plot"), BENCH.parent
    text, models = ((root / page).read_text() for page in ("README.md", "docs/models.md"))
    for shown in (*speed.SHOWN[:2], speed.SHOWN[3], speed.SHOWN[-1]):
        times, _ = speed.against_the_best(shown, BENCH / "results")
        assert f"{times:.1f} times" in text, shown.label
    rows = json.loads((BENCH / "results" / "generate-cpu.json").read_text())["rows"]
    row = next(row for row in rows if (row["name"], row["tokens"]) == ("rerope", 8000))
    told = "reads 8,000 tokens in {:.2f} of the plain one's time, and takes {:.2f}"
    assert told.format(row["prompt_of_plain"], row["steps_of_plain"]) in text
    frequency, score = re.findall(r"^- By a \w+ method: (\d+) of the", models, re.MULTILINE)
    assert f"all {frequency} by frequency methods, {score} by score methods" in text


def test_figures_replace_what_is_between_the_markers(bench, tmp_path):
    readme, harness = bench("readme"), bench("harness")
    rows = [
        harness.Row("forward", "extrope", "float32", "8 x 2", milliseconds=1.5, error=1e-7),
        harness.Row("forward", "peer 1.0", "float32", "8 x 2", ratio=0.5, bar=0.25),
        harness.Row("forward", "other", "float32", "8 x 2", absent="needs a GPU"),
    ]
    results = tmp_path / "results"
    own = harness.save("some", rows, results).stem
    harness.save("unmarked", [harness.Row("backward", "extrope", "float32", "8 x 2")], results)
    harness.save("some", rows[:1], results / "another")
    other = f"<!-- another/{own}: float32 back -->\n<!-- end of another/{own} -->\n"
    text = f"{other}before\n<!-- {own} -->\nold \\1\n<!-- end of {own} -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    readme.main(tmp_path, results)
    once = (tmp_path / "README.md").read_text()
    first, second = once.split("before\n")
    assert first.startswith(f"<!-- another/{own}: float32 back -->") and "| forward" not in first
    assert second.startswith(f"<!-- {own} -->") and second.endswith("-->\nafter\n")
    assert "old" not in once and "backward" not in once
    assert "| forward | float32 | 8 x 2 | 1.50 |  | 1.0e-07 |" in second
    assert "peer 1.0 0.50 (bar 0.25 missed)" in second
    assert "Not measured here: other: needs a GPU." in second
    readme.main(tmp_path, results)
    assert (tmp_path / "README.md").read_text() == once
    (tmp_path / "README.md").write_text("<!-- none -->\n<!-- end of none -->\n")
    with pytest.raises(ValueError, match=r"README.md: nothing measured is called 'none'"):
        readme.main(tmp_path, results)
    every = (results / "README.md").read_text()
    assert "| backward |" in every and every.index(f"## {own}") < every.index("## another/")
