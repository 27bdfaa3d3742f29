"""The table of methods is made from docstrings, so each must hold what the table shows."""

import inspect
import json
import re

import eval_tables
import method_table as table
import pytest
import search_table
import smollm2_table
import smollm2_tuned

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
    lengths = [{"last": [3.0]}, {"last": [1.0, 2.0]}]  # a loss for each seed
    trained = {
        "rows": [{"name": "pi", "lengths": lengths}, {"name": "abf, tuned", "lengths": lengths}]
    }
    (tmp_path / "length_generalization-cpu.json").write_text(json.dumps(trained))
    losses = {row.name: (row.trained, row.real) for row in table.method_rows(tmp_path)}
    assert losses["pi"] == losses["abf"] == (1.5, None) and losses["rope"] == (None, None)
    (cells,) = (line for line in table.table_lines(tmp_path) if line[0] == "`pi`")
    assert cells[2:] == ["[2306.15595](https://arxiv.org/abs/2306.15595)", "1.50", "", "", "", ""]


def test_a_real_models_losses_are_compared_piece_by_piece(tmp_path):
    """Behind the training length alone; the best of several parameters goes into the README."""

    def save(name, **results):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(results))

    def row(method, far, **params):
        buckets = [{"start": 0, "pieces": [9.0, 9.0]}, {"start": 4, "pieces": far}]
        return {"method": method, "params": params, "buckets": buckets}

    yarn = row("yarn", [2.0, 3.0], factor=2.0)
    rows = [yarn, row("pi", [2.5, 3.7], factor=2.0), row("pi", [2.4, 3.4], factor=3.0)]
    save("smollm2/loss.json", training_length=4, rows=rows)
    long = [yarn, row("pi", [2.0, 3.5], factor=4.0)]
    long.append(row("yarn", [2.0, 3.7], factor=4.0, resonance=True))
    long.append(row("longrope", [2.0, 3.9], short_factor=[1.0, 2.0], long_factor=[1.0, 2.0]))
    save("smollm2-32k/loss.json", training_length=4, rows=long)
    gains = [{"gain": 0.0, "error": 1.0}, {"gain": 1.7, "error": 0.25}]
    save(
        "smollm2/recall.json", rows=[{"method": "rerope", "params": {"window": 9}, "gains": gains}]
    )
    found = smollm2_table.measured(tmp_path)
    assert found["yarn"][0].over_yarn == (0.0, 0.0)
    assert found["pi"][0].over_yarn == pytest.approx((0.6, 0.1))
    assert found["rerope"] == [({"window": 9}, None, None, (1.7, 0.25))]
    assert smollm2_table.table_lines(tmp_path)[1:] == [
        ["`pi`", "factor=3", "2.900", "0.400 ± 0.000", ""],
        ["`pi`", "factor=2", "3.100", "0.600 ± 0.100", ""],
        ["`rerope`", "window=9", "", "", "1.70 ± 0.25"],
    ]
    assert smollm2_table.table_lines(tmp_path, smollm2_table.FOUR_TIMES)[1:] == [
        ["`pi`", "factor=4", "2.750", "0.250 ± 0.250", ""],
        ["`resonance`", "method=yarn, factor=4", "2.850", "0.350 ± 0.350", ""],
        ["`longrope`", "factors=searched", "2.950", "0.450 ± 0.450", ""],
    ]
    lines = {cells[0]: cells[4:] for cells in table.table_lines(tmp_path)}
    assert lines["`pi`"] == ["factor=3", "0.400 ± 0.000", "", "0.250 ± 0.250"]
    assert lines["`rerope`"] == ["window=9", "", "1.70 ± 0.25", ""]
    assert lines["`resonance`"] == ["", "", "", "0.350 ± 0.350"]


def test_a_fine_tune_is_compared_with_the_model_before(tmp_path):
    """With the same parameters, piece by piece, up to the training length and behind it."""

    def save(folder, *rows):
        (tmp_path / folder).mkdir(parents=True)
        for task in ("loss", "recall"):
            results = {"training_length": 4, "rows": rows}
            (tmp_path / folder / f"{task}.json").write_text(json.dumps(results))

    def row(near, far, gain, **params):
        buckets = [{"start": 0, "pieces": near}, {"start": 4, "pieces": far}]
        gains = [{"gain": 9.0, "error": 0.0}, {"gain": gain, "error": 0.5}]
        return {"method": "yarn", "params": params, "buckets": buckets, "gains": gains}

    assert smollm2_tuned.table_lines(tmp_path) == []
    others = row([0.0, 0.0], [0.0, 0.0], 0.0, factor=3.0)
    save("smollm2", others, row([3.0, 5.0], [2.0, 3.0], 1.0, factor=2.0))
    save("smollm2-tuned/yarn", row([2.5, 4.5], [1.0, 2.4], 1.5, factor=2))
    (cells,) = smollm2_tuned.table_lines(tmp_path)
    assert cells[:5] == ["`yarn`", "factor=2", "4.000", "3.500", "-0.500 ± 0.000"]
    assert cells[5:] == ["2.500", "1.700", "-0.800 ± 0.200", "1.00 ± 0.50", "1.50 ± 0.50"]


def test_searches_stand_side_by_side_by_the_kind_of_what_they_found(tmp_path):
    def finalist(method, to_yarn, **params):
        named = " ".join([method, *(f"{name}={value:g}" for name, value in params.items())])
        row = {"name": named, "method": method, "params": params, "pieces": [2.0 + to_yarn] * 2}
        return row | {"loss": 2.0 + to_yarn, "to_yarn": to_yarn} | dict.fromkeys(ERRORS, 0.01)

    def save(name, length, *rows):
        results = {"length": length, "training_length": 8192, "finalists": rows}
        (tmp_path / name).write_text(json.dumps(results))

    ERRORS = ("loss_error", "to_yarn_error")
    assert search_table.by_kind(tmp_path)[0] == [""]
    yarn, score = finalist("yarn", 0.0, factor=2.0), finalist("rerope", -0.5, window=9)
    searched, plain = finalist("longrope", 0.25), finalist("plain", 3.0)
    # The best published method at one length is YaRN itself, at the other with another factor.
    save("search-128k.json", 131072, finalist("yarn", -0.1, factor=24.0), plain)
    save("search-16k.json", 16384, score, yarn, searched, plain)
    head, lines = search_table.by_kind(tmp_path)
    assert head == ["", "16,384 tokens", "131,072 tokens"]
    assert [line[1:] for line in lines] == [
        ["+3.000 ± 0.010", "+3.000 ± 0.010"],
        ["0 (a loss of 2.000 ± 0.010)", ""],
        ["YaRN", "`yarn factor=24` -0.100 ± 0.010"],
        ["+0.250 ± 0.010", ""],
        ["`rerope window=9` -0.500 ± 0.010", ""],
    ]


def test_passkeys_stand_by_length_below_their_method():
    def row(method, length, *shares):
        intervals = [[share - 0.1, share + 0.1] for share in shares]
        return {"method": method, "length": length, "accuracy": shares, "intervals": intervals}

    rows = [row("rope", 16, 0.5, 0.9), row("yarn", 8, 0.4, 0.3), row("rope", 8, 0.2, 0.1)]
    lines = eval_tables.passkey_table({"depths": [0.0, 1.0], "rows": rows}).splitlines()
    assert lines[0] == "| method | tokens | 0% deep | 100% deep |"
    assert lines[2:] == [
        "| `rope` | 8 | 20% (10-30) | 10% (0-20) |",
        "| `rope` | 16 | 50% (40-60) | 90% (80-100) |",
        "| `yarn` | 8 | 40% (30-50) | 30% (20-40) |",
    ]
