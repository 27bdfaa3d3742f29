"""Tables of configurations as files, and how `make gpu` chooses among candidates."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from audit import report
from audit.case import CAPABILITIES, Case
from audit.chips import CHIPS
from audit.entries import all_cases
from audit.measured import MOST_STACK, allowed_stack
from gpu import tune
from gpu.config_table import ConfigTable, dumped, fields_of, rows_for
from gpu.step import Deadline

ROOT = Path(__file__).parents[2]


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
    assert list(configs) == ["80", "86", "89", "90"]
    # What was measured on the A100 was not measured here.
    assert configs["89"] == {"64": leaf(8, measured=True, card="NVIDIA L4"), "128": leaf(32)}


@pytest.mark.parametrize(("op", "kernel"), tune.KERNELS.values(), ids=list(tune.KERNELS))
@pytest.mark.parametrize("measured", [80, 86, 89, 90, 100, 103, 120, 121])
def test_a_winner_changes_no_other_audited_chip(tmp_path, op, kernel, measured):
    """In the tables that ship; one token's has rows of sm_80 and sm_120 alone."""
    from extrope_kernels.ops._shared.triton.tiles import tile

    table = tmp_path / "configs.json"
    dims = (32, 64, 96, 128, 192, 256)

    def tiles() -> dict:
        tile.__globals__["_load"].cache_clear()
        return {
            (chip, dim, size): tile("op", table, kernel, dim, size, chip)
            for chip in (*CAPABILITIES, measured, "gfx942")
            for dim in dims
            for size in (2, 4)
        }

    shipped = json.loads((ConfigTable.of(op).folder / "configs.json").read_text())
    for by_dim in shipped[kernel].values():  # as if none had been measured yet
        by_dim.update({dim: fields_of(leaf) for dim, leaf in by_dim.items()})
    table.write_text(json.dumps(shipped))
    before = tiles()
    ConfigTable(tmp_path).replace(kernel, measured, 128, leaf(16), "some card")
    after = tiles()
    changed = {key for key in before if before[key] != after[key]}
    assert changed and {(chip, size) for chip, _, size in changed} == {(measured, 2)}
    assert (measured, 128, 2) in changed and (measured, 256, 2) not in changed
    assert after[measured, 128, 2]["card"] == "some card"
    claimed = [key for key, x in after.items() if "measured" in x]
    assert {chip for chip, _, _ in claimed} == {measured}


def loaded_at_once(kernel: str, dim: int, tile: dict) -> int:
    """Bytes of 16-bit rows of the other side that all stages of a loop hold: at least so much is
    in shared memory.
    """
    return tile["stages"] * tile["block_m" if kernel == "dkv" else "block_n"] * 2 * dim * 2


def test_stages_take_no_more_shared_memory_than_was_compiled():
    """Or what is said of candidates is not so."""
    tables = json.loads((ConfigTable.of("attention").folder / "configs.json").read_text())
    for case, row in report.load(ROOT / "bench" / "results" / "gpu_audit.json").items():
        name = case.kernel.removeprefix("attention ")
        by_dim = rows_for(tables.get(name, {}), case.capability)
        tile = by_dim.get(str(case.head_dim))
        if tile is not None and (case.dtype, case.variant) == ("bfloat16", "R2"):
            assert loaded_at_once(name, case.head_dim, tile) <= row.shared, case


@pytest.mark.parametrize("op", ["attention", "decode"])
def test_candidates_are_tiles_of_audited_chips(op):
    configs = importlib.import_module(f"extrope_kernels.ops.{op}.triton.configs")
    listed = json.loads((ConfigTable.of(op).folder / "candidates.json").read_text())
    every = [
        (kernel, int(chip), int(dim), leaves)
        for kernel, chips in listed.items()
        for chip, dims in chips.items()
        for dim, leaves in dims.items()
    ]
    assert {chip for _, chip, _, _ in every} <= set(CAPABILITIES)
    for kernel, chip, dim, leaves in every:
        assert 3 <= len(leaves) <= 6, (kernel, chip, dim)
        for number, fields in enumerate(leaves):
            tile = configs.Config(**fields)  # knows every field
            assert fields not in leaves[:number]
            blocks = tile.block_m, tile.block_n
            assert all(16 <= n <= 128 and n & (n - 1) == 0 for n in blocks), (kernel, chip, fields)
            assert tile.warps in (4, 8) and 1 <= tile.stages <= 4
            shared = loaded_at_once(kernel, dim, fields) // (2 if "fp8" in kernel else 1)
            assert shared <= CHIPS[chip].block_shared, (kernel, chip, dim, fields)


def test_the_candidates_are_for_the_tuner():
    """Every kernel that it tunes has some for every audited chip, beside the one that ships."""
    for op, kernel in tune.KERNELS.values():
        for chip in CAPABILITIES:
            found = ConfigTable.of(op).candidates(kernel, chip)
            assert len(found[128]) > 2, (kernel, chip)


def test_the_pipelined_gradient_of_keys_stays_a_candidate_on_hopper():
    """By wgmma, as the shipped tile is not. It spills, so that only a measurement can ship it."""
    listed = ConfigTable.of("attention").candidates("dkv", 90)[128]
    assert {"block_m": 32, "block_n": 128, "warps": 8, "stages": 2} in listed


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
    rows = timed(1.0, 0.8, 0.9)
    rows[1].reason = "too much"
    assert tune.winner(rows) is rows[2]


def test_what_does_not_compile_is_told_and_the_shipped_one_has_to(monkeypatch):
    def problems(op, kernel, dim):
        return (lambda: None), lambda: times.pop(0)()

    def fails():
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "forced", lambda *args: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "gpu.tune_problems", type("", (), {"problems": problems}))
    times = [lambda: 2.0, fails, lambda: 1.0]
    every = [leaf(1), leaf(2), leaf(3)]
    found = list(tune.each_timed("attention", "dq", 128, every, Deadline()))
    assert [one.milliseconds for one in found] == [2.0, None, 1.0]
    verdict = tune.verdict(found, 1, ["128: block_m 3"])
    assert not verdict.ok and verdict.line == (
        "2 of 4 configurations timed, 1 refused; written: 128: block_m 3. Now: python "
        "bench/gpu_audit.py, python bench/triton_versions.py, python bench/readme.py"
    )
    assert verdict.content["table"]["rows"][1][-1] == "RuntimeError: out of resource: shared memory"
    assert verdict.content["table"]["rows"][2][2:4] == ["1.000", "0.50"]
    times = [fails]
    with pytest.raises(RuntimeError, match="shared memory"):
        next(tune.each_timed("attention", "dq", 128, [leaf(1)], Deadline()))


def test_each_time_is_kept_and_a_winner_of_the_spills_is_none(table, monkeypatch):
    """The fastest holds more stack than the tests allow a tile that was measured."""
    kept, stack = [], {"a": 0}

    def problems(op, kernel, dim):
        return (lambda: None), lambda: times.pop(0)

    def forced(op, kernel, dim, fields):
        stack[str(fields)] = {32: 96, 64: MOST_STACK, 128: MOST_STACK + 4}[fields["block_m"]]
        return contextlib.nullcontext()

    monkeypatch.setattr(tune, "forced", forced)
    monkeypatch.setattr(tune, "stack_of_binaries", lambda op, kernel: dict(stack))
    monkeypatch.setitem(sys.modules, "gpu.tune_problems", type("", (), {"problems": problems}))
    monkeypatch.setattr("gpu.build.capability", lambda: 80)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(ConfigTable, "of", classmethod(lambda cls, op: table))
    (table.folder / "candidates.json").write_text(
        json.dumps({"dq": {"80": {"128": [leaf(128), leaf(64)]}}})
    )
    times = [2.0, 1.0, 1.5]
    verdict = tune.run("dq", Deadline(keep=kept.append))
    assert [len(x.content["table"]["rows"]) for x in kept] == [1, 2, 3]
    assert kept[0].line == "1 of 3 configurations timed, 0 refused; nothing written"
    assert verdict.ok and verdict.line.startswith("2 of 3 configurations timed, 1 refused; written")
    assert verdict.content["table"]["rows"][1][2:] == [
        *("1.000", "0.50", f"{MOST_STACK + 4} bytes of stack, allowed are {MOST_STACK}")
    ]
    configs = json.loads((table.folder / "configs.json").read_text())["dq"]
    assert configs["80"]["128"] == leaf(64, measured=True, card="NVIDIA A100")
    assert configs["86"]["128"] == leaf(32)


def test_a_tile_that_was_measured_may_spill(tmp_path, monkeypatch):
    """And no other: neither of another chip, head_dim, dtype nor kernel."""
    for op, kernel, name, variant in (
        ("attention", "dkv", "attention dkv", "R2 wide"),
        ("decode", "one_token", "cache decode", "slow paged one-token"),
    ):
        table = tmp_path / "configs.json"
        table.write_text((ConfigTable.of(op).folder / table.name).read_text())
        before = {case for case in all_cases() if allowed_stack(case)}
        ConfigTable(tmp_path).replace(kernel, 89, 128, leaf(16), "NVIDIA L4")
        table = table.rename(tmp_path / f"{op}.json")
        module = importlib.import_module(f"extrope_kernels.ops.{op}.triton.configs")
        monkeypatch.setattr(module, "TABLE", table)
        now = {case for case in all_cases() if allowed_stack(case)} - before
        assert Case(name, 89, 128, "bfloat16", variant) in now
        assert {(case.kernel, case.capability) for case in now} == {(name, 89)}
        assert all(case.head_dim <= 128 and case.dtype != "float32" for case in now)
        assert not any(case.has("chunk") or case.has("fp8") for case in now)
        assert {allowed_stack(case) for case in now} == {MOST_STACK}


def test_the_driver_tells_what_a_kernel_spills(run_python):
    """Compiled for an H100, and loaded by a driver that says 20 words."""
    run_python(
        """
        import sys; sys.path.insert(0, "bench")
        import null_driver, torch
        driver = null_driver.install()
        driver.utils.load_binary = lambda name, kernel, shared, device: (1, name, 32, 20, 1024)
        import extrope_kernels as ek
        from gpu.stack import stack_of_binaries

        from extrope_kernels.ops.decode.triton import launch
        assert stack_of_binaries("decode", "one_token") == {}
        q, cache = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16) for n in (1, 32))
        call = {"cache_seqlens": torch.ones(1, dtype=torch.int32), "backend": "triton"}
        freqs = ek.methods.rope(64)
        ek.rerope_attention_with_kvcache(q, cache, cache, freqs, window=8, **call)
        assert list(stack_of_binaries("decode", "one_token").values()) == [80]
        """,
        TRITON_INTERPRET="0",
        EXTROPE_TRITON_CHIP="90",
    )


def test_without_tables_there_is_nothing_to_choose_from(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.config_table.ROOT", tmp_path)
    missing = ConfigTable(tmp_path / "op").missing()
    assert missing == "op has no configs.json and no candidates.json"
