"""The benchmarks run at tiny sizes, and keep what they measure."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

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
    with torch._dynamo.config.patch(
        disable=True, recompile_limit=8, fail_on_recompile_limit_hit=False
    ):
        yield importlib.import_module


def ran(script, folder: Path, capsys) -> list[dict]:
    """The rows of a script, each of which was printed."""
    name = script.__name__.removeprefix("bench_")
    results = json.loads((folder / f"{name}.json").read_text())
    assert results["rows"] and results["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for row in results["rows"]:
        own = row.get("implementation", row.get("name"))
        assert own in printed
        assert "absent" in row or row.get("milliseconds", row.get("microseconds")) > 0
        if own == "extrope":
            assert "absent" not in row and row["of_floor"] > 0
    return results["rows"]


@pytest.mark.thorough
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(bench, tmp_path, capsys, script):
    bench(script).main(["--quick", "--out", str(tmp_path)])
    ran(bench(script), tmp_path, capsys)


def test_any_score_method_can_be_measured(bench, tmp_path, capsys):
    script, names = bench("bench_attention"), ("plain", "self_extend", "string")
    words = [word for name in names for word in ("--score", name)]
    script.main(["--quick", "--out", str(tmp_path), *words])
    rows = ran(script, tmp_path, capsys)
    assert {row["case"].split(",")[0] for row in rows} == set(names)
    assert set(script.NAMES) == {"plain", *extrope_kernels.scores.SCORES}
    assert all(script.score_of(name, 8192, 64) is not None for name in script.NAMES[1:])


@pytest.mark.thorough
def test_the_host_is_timed_up_to_a_launch(run_python, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    source = f"""
        import sys; sys.path.insert(0, {str(BENCH)!r})
        import bench_launch
        bench_launch.main(["--quick", "--out", {str(tmp_path)!r}])
    """
    run_python(source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="90")
    rows = json.loads((tmp_path / "launch.json").read_text())["rows"]
    counted = [row for row in rows if "most_kernels" in row]
    assert len(counted) == 6 and all(row["microseconds"] > 0 for row in rows)
    assert all(row["kernels"] <= row["most_kernels"] for row in counted)


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


def test_results_are_recorded_only_when_asked_and_never_mixed(bench, tmp_path, monkeypatch):
    harness = bench("harness")
    monkeypatch.setattr(harness, "BUILD", tmp_path / "build")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert harness.arguments("some", []).out.parent == tmp_path / "build"
    args = harness.arguments("some", ["--record", "--only", "b"])
    assert args.out.parent == tmp_path / "results"
    monkeypatch.setattr(harness, "device", lambda: "cuda")  # no 3 GB of warm pages
    monkeypatch.setattr(harness, "machine", lambda: {"device": "a card", "date": "2026-12-02"})
    path = args.out / "some.json"
    for of in ({"device": "a card", "date": "2026-12-01"}, {"device": "b", "date": "2026-12-02"}):
        harness.write(path, {"machine": of, "rows": []})
        with pytest.raises(SystemExit, match=f"is of {of['device']}, {of['date']}"):
            harness.Report("some", args)
    harness.write(path, {"machine": harness.machine(), "rows": []})
    harness.Report("some", args)


def test_a_peer_that_fails_is_absent_and_ours_ends_the_run(bench):
    harness, compare = bench("harness"), bench("compare")
    report = harness.Report("some", harness.arguments("some", ["--quick"]))
    about = {"dtype": torch.float32, "shape": "9"}
    about["floor"] = compare.Floor(lambda: torch.ones(9).clone())

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


def test_a_peer_that_overwrites_its_input_spoils_no_other(bench, monkeypatch):
    peers, compare = bench("peers"), bench("compare")

    def rotary(q, k, cos, sin):
        return q.mul_(2), k.mul_(2)

    module = SimpleNamespace(liger_rotary_pos_emb=rotary)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.rope", module)
    q, k = (torch.randn(1, 8, heads, 4, requires_grad=True) for heads in (2, 1))
    before, cos = q.detach().clone(), torch.ones(1, 8, 4)
    (call,) = peers.liger(q, k, cos, cos).values()
    with torch.no_grad():
        call(), call()
        assert torch.equal(call.checked()[0], 2 * before.transpose(1, 2))
    assert torch.equal(q, before) and all(x.shape[2] < 3 for x in call.leaves)
    calls = compare.trained({"ours": lambda: (q * 1, k * 1), "liger": call}, (q, k))
    assert len(calls["ours"]()) == 2 and set(calls) == {"ours", "liger"}


def test_no_timed_call_pays_for_fresh_pages(bench):
    harness, compare, faults = bench("harness"), bench("compare"), []
    report = harness.Report("some", harness.arguments("some", ["--quick"]))

    def call():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)  # 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    about = {"dtype": torch.uint8, "shape": "9", "floor": compare.Floor(lambda: None)}
    compare.compare(report, "a", {"extrope": call}, **about)
    assert max(faults[1:-1]) < 1000  # the first, and the one whose peak is measured, may
    assert report.rows[0].megabytes > 60


def test_a_backend_that_refuses_a_case_is_absent(bench, tmp_path, monkeypatch):
    script = bench("bench_attention")
    monkeypatch.setattr(script, "backends", lambda: {"flash_attn": "flash_attn"})
    monkeypatch.setattr(script, "scaling", lambda *args, **more: None)
    script.main(["--quick", "--out", str(tmp_path), "--only", "options, forward sinks"])
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["absent"].split(":")[0] for row in rows] == ["NotImplementedError"] * 2
