"""The table of methods is made from docstrings, so each must hold what the table shows."""

import inspect
import json
import re

import method_table as table
import pytest
import smollm2_table

from extrope_kernels import methods, permuteformer_attention, positions, scores

METHODS = [
    *methods.METHODS.values(),
    *methods.WRAPPERS.values(),
    *scores.SCORES.values(),
    permuteformer_attention,
    *(getattr(positions, name) for name in positions.__all__),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_docstring_has_one_line_and_one_source(method):
    lines = inspect.getdoc(method).splitlines()
    assert re.fullmatch(r"[^|]+\.", lines[0]) and lines[1] == ""
    (source,) = (line for line in lines if line.startswith(("Paper: ", "Source: ")))
    assert re.match(r"(Paper|Source): https://\S+", source)


def test_the_table_has_every_method_once():
    rows = table.method_rows()
    names = [row.name.removeprefix("positions.") for row in rows]
    assert sorted(names) == sorted(method.__name__ for method in METHODS)
    (yarn,) = (row for row in rows if row.name == "yarn")
    assert (yarn.axis, yarn.paper) == ("frequencies", "https://arxiv.org/abs/2309.00071")
    assert yarn.what.startswith("YaRN: ") and not yarn.what.endswith(".")


def test_measured_losses_stand_beside_their_method(tmp_path):
    lengths = [{"last": 3.0}, {"last": 1.5}]
    trained = {
        "rows": [{"name": "pi", "lengths": lengths}, {"name": "abf, tuned", "lengths": lengths}]
    }
    (tmp_path / "length_generalization-cpu.json").write_text(json.dumps(trained))
    losses = {row.name: (row.trained, row.real) for row in table.method_rows(tmp_path)}
    assert losses["pi"] == losses["abf"] == (1.5, None) and losses["rope"] == (None, None)
    (cells,) = (line for line in table.table_lines(tmp_path) if line[0] == "`pi`")
    assert cells[2:] == ["[2306.15595](https://arxiv.org/abs/2306.15595)", "1.50", "", ""]


def test_a_real_models_losses_are_compared_piece_by_piece(tmp_path):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    pieces = {"yarn": [2.0, 3.0], "pi": [2.5, 3.7]}
    losses = [
        {"method": name, "params": {"factor": 2.0}, "buckets": [{}, {"loss": 2.5, "pieces": each}]}
        for name, each in pieces.items()
    ]
    recalls = [
        {"method": "rerope", "params": {"window": 9}, "gains": [{"gain": 1.7, "error": 0.25}]}
    ]
    (folder / "loss.json").write_text(json.dumps({"rows": losses}))
    (folder / "recall.json").write_text(json.dumps({"rows": recalls}))
    found = smollm2_table.measured(folder)
    assert found["yarn"].over_yarn == (0.0, 0.0)
    assert found["pi"].over_yarn == pytest.approx((0.6, 0.1))
    assert found["rerope"] == ({"window": 9}, None, None, (1.7, 0.25))
    assert smollm2_table.table_lines(folder)[1] == [
        "`pi`", "factor=2", "2.50", "0.600 ± 0.100", ""
    ]  # fmt: skip
    (cells,) = (line for line in table.table_lines(tmp_path) if line[0] == "`rerope`")
    assert cells[-2:] == ["", "1.70 ± 0.25"]
