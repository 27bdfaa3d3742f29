"""The comparison of length generalization: its quick form, all of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "length_generalization.py"
SEEDS = 2
# The methods that the comparison is about, by what stands in the table's first column.
EXPECTED = {
    "rope", "pi", "ntk_aware", "ntk_mixed", "ntk_by_parts", "yarn", "dynamic_ntk", "giraffe_power",
    "giraffe_truncation", "xpos", "xpos, blockwise (LEX)", "rerope", "leaky_rerope",
    "inverse_leaky", "self_extend", "dual_chunk", "permuteformer", "randomized", "shape",
    "random_padding", "abf",
}  # fmt: skip


def run_quick(build: Path) -> str:
    command = [sys.executable, SCRIPT, "--quick", "--seeds", str(SEEDS), "--build", build]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_method_is_trained_once_and_read(tmp_path):
    run_quick(tmp_path)
    results = json.loads((tmp_path / "length_generalization.json").read_text())
    losses = {row["name"]: row["last"] for row in results["rows"]}
    assert losses.keys() >= EXPECTED
    assert results["lengths"] == [results["setup"]["length"] * n for n in (1, 2, 4, 8)]
    for name, row in losses.items():
        assert [len(each) for each in row] == [SEEDS] * 4, name
        assert all(1 < loss < 2 * math.log(256) for each in row for loss in each), name
    # At the training length what leaves it alone is plain RoPE; past it nothing else is.
    assert losses["rope"][0][0] != losses["rope"][0][1], "seeds make other models"
    for name in ("dynamic_ntk", "dynamic_yarn", "rope, blockwise", "rerope, log-n"):
        assert losses[name][1:] != losses["rope"][1:], name
    assert losses["dynamic_ntk"][0] == losses["rope"][0] != losses["ntk_aware"][0]
    assert losses["rope, blockwise"][0] == pytest.approx(losses["rope"][0], abs=1e-5)
    assert losses["dynamic_ntk"][-1] == losses["ntk_aware"][-1]
    # SHAPE moves query and key alike, so its model is that of plain RoPE but for rounding.
    assert losses["shape"][0] == pytest.approx(losses["rope"][0], abs=1e-3)
    assert (tmp_path / "length_generalization.png").stat().st_size > 10_000
    # A second run does nothing again but what was lost.
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert len(kept) == SEEDS * (results["trainings"] + len(losses))
    lost = next(path for path in kept if path.name.startswith("read_pi_1-"))
    lost.unlink()
    again = run_quick(tmp_path)
    assert re.findall(r"^(trained|read) ([^:]+):", again, re.M) == [("read", "pi, seed 1")]
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {lost}
    assert json.loads((tmp_path / "length_generalization.json").read_text()) == results
