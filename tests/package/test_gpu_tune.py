"""Tables of configurations as files, and how `make gpu` chooses among candidates."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys

import pytest

pytest.importorskip("triton")

from gpu import tune
from gpu.config_table import ConfigTable, dumped
from gpu.step import Deadline


def leaf(block_m, **more):
    return {"block_m": block_m, "block_n": 64, "warps": 8, "stages": 2, **more}


@pytest.fixture
def table(tmp_path):
    """sm_80 up to head_dim 64 and 128, sm_90 up to 128."""
    configs = {"dq": {"80": {"64": leaf(16), "128": leaf(32)}, "90": {"128": leaf(64)}}}
    candidates = {"dq": {"80": {"64": [leaf(128), leaf(16)], "128": [leaf(64)]}}}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    (tmp_path / "candidates.json").write_text(json.dumps(candidates))
    return ConfigTable(tmp_path)


def test_candidates_are_those_of_the_chip_or_the_one_before(table):
    assert table.candidates("dq", 89) == {64: [leaf(16), leaf(128)], 128: [leaf(32), leaf(64)]}
    assert table.candidates("dq", 90) == {64: [leaf(64), leaf(128), leaf(16)], 128: [leaf(64)]}
    assert table.candidates("dq", 75) == {}


def test_a_winner_is_written_and_nothing_else_changes(table):
    table.replace("dq", 80, 128, leaf(64), "NVIDIA A100")
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert configs["80"]["128"] == leaf(64, measured=True, card="NVIDIA A100")
    assert configs["80"]["64"] == leaf(16) and configs["90"] == {"128": leaf(64)}
    text = (table.folder / "configs.json").read_text()
    table.replace("dq", 80, 128, leaf(64, measured=True, card="x"), "NVIDIA A100")
    assert (table.folder / "configs.json").read_text() == text == dumped(json.loads(text))
    table.replace("dq", 89, 64, leaf(8), "NVIDIA L4")  # gets rows of its own
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert list(configs) == ["80", "89", "90"]
    assert configs["89"] == {**configs["80"], "64": leaf(8, measured=True, card="NVIDIA L4")}


def test_a_candidate_is_forced_where_launches_look_it_up():
    configs = importlib.import_module("extrope_kernels.ops.attention.triton.configs")
    plans = importlib.import_module("extrope_kernels.ops.attention.triton.plans")
    before = configs.config("dkv", 128, 2, 90)
    with tune.forced("attention", "dkv", 128, leaf(32)):
        for config in (configs.config, plans.config):
            assert config("dkv", 128, 2, 90) == configs.Config(32, 64, 8, 2)
            assert config("dkv", 64, 2, 90).block_m != 32 or before.block_m == 32
            assert config("dkv", 128, 4, 90) != configs.Config(32, 64, 8, 2)
            assert config("dq", 128, 2, 90) != configs.Config(32, 64, 8, 2)
    assert plans.config("dkv", 128, 2, 90) == configs.config("dkv", 128, 2, 90) == before


def test_the_shipped_configuration_stays_unless_another_gains():
    def timed(*times):
        return [tune.Timed(128, leaf(16 * i), time) for i, time in enumerate(times)]

    assert tune.winner(rows := timed(1.0, 0.995, None)) is rows[0]
    assert tune.winner(rows := timed(1.0, 1.2, 0.9)) is rows[2]
    assert tune.winner(timed(None, 1.0)) is None


def test_what_does_not_compile_is_told_and_the_shipped_one_has_to(monkeypatch):
    def problems(room, kernel, dim):
        return (lambda: None), lambda: times.pop(0)()

    def fails():
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "forced", lambda *args: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "gpu.tune_problems", type("", (), {"problems": problems}))
    times = [lambda: 2.0, fails, lambda: 1.0]
    found = tune.time_all("attention", "dq", 128, [leaf(1), leaf(2), leaf(3)], Deadline())
    assert [one.milliseconds for one in found] == [2.0, None, 1.0]
    verdict = tune.verdict(found, 1, ["128: block_m 3"])
    assert not verdict.ok and verdict.line == (
        "2 of 4 configurations timed, 1 refused; written: 128: block_m 3"
    )
    assert verdict.content["table"]["rows"][1][-1] == "RuntimeError: out of resource: shared memory"
    assert verdict.content["table"]["rows"][2][2:4] == ["1.000", "0.50"]
    times = [fails]
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.time_all("attention", "dq", 128, [leaf(1)], Deadline())


def test_without_tables_there_is_nothing_to_choose_from(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.config_table.ROOT", tmp_path)
    missing = ConfigTable(tmp_path / "room").missing()
    assert missing == "room has no configs.json and no candidates.json"
