"""The tables of README.md and docs/ are made from the measured files."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import evaluations
import harness
import plots
import pytest
import readme
import tables

from extrope_kernels import methods, permuteformer_attention, positions, scores

ROOT = Path(__file__).parents[2]
METHODS = [
    *methods.METHODS.values(),
    *methods.WRAPPERS.values(),
    *scores.SCORES.values(),
    permuteformer_attention,
    *(getattr(positions, name) for name in positions.__all__),
]


def save(results: Path, name: str, rows: list[dict], **about) -> None:
    harness.write(results / "models" / f"{name}.json", {**about, "rows": rows})


# -------------------------------------------------------------------------------------------------
# Pages


def test_figures_replace_what_is_between_the_markers(tmp_path):
    rows = [
        harness.Row("forward", "extrope", "float32", "8 x 2", milliseconds=1.5, error=1e-7),
        harness.Row("forward", "peer 1.0", "float32", "8 x 2", ratio=0.5, bar=0.25),
        harness.Row("forward", "other", "float32", "8 x 2", absent="needs a GPU"),
        harness.Row("backward", "extrope", "float32", "8 x 2"),
    ]
    results = tmp_path / "results"
    harness.save("some", rows, results / "amx")
    name = "amx/some"
    text = f"<!-- {name}: float32 forw -->\nold \\1\n<!-- end of {name} -->\nafter\n"
    page = tmp_path / "README.md"
    page.write_text(text)
    assert readme.main(tmp_path, results, check=True) == 1 and page.read_text() == text
    assert readme.main(tmp_path, results) == 0 and readme.main(tmp_path, results, check=True) == 0
    once = page.read_text()
    assert "old" not in once and "backward" not in once and once.endswith("-->\nafter\n")
    assert "| forward | float32 | 8 x 2 | 1.50 |  | 1.0e-07 |" in once
    assert "peer 1.0 0.50 (bar 0.25 missed)" in once
    assert "Not measured here: other: needs a GPU." in once
    assert "| backward |" in (results / "README.md").read_text()
    page.write_text("<!-- none -->\n<!-- end of none -->\n")
    with pytest.raises(ValueError, match=r"README.md: nothing measured is called 'none'"):
        readme.main(tmp_path, results)


def test_the_readme_tells_speeds_and_numbers_of_models_as_measured():
    """Those of the plot's first, third and last bar; of generate; of docs/models.md."""
    text, models = ((ROOT / page).read_text() for page in ("README.md", "docs/models.md"))
    for index in (0, 2, -1):
        times, _ = plots.against_the_best(plots.SHOWN[index])
        assert f"{times:.1f} times" in text, plots.SHOWN[index].label
    rows = json.loads((harness.RESULTS / "avx512" / "generate.json").read_text())["rows"]
    row = next(row for row in rows if (row["name"], row["tokens"]) == ("rerope", 8000))
    told = "reads 8,000 tokens in {:.2f} of the plain one's time, and takes {:.2f}"
    assert told.format(row["prompt_of_plain"], row["steps_of_plain"]) in text
    frequency, score = re.findall(r"^- By a \w+ method: (\d+) of the", models, re.MULTILINE)
    assert f"all {frequency} by frequency methods, {score} by score methods" in text


@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_plot_is_drawn(name, tmp_path):
    plots.PLOTS[name](tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert (ROOT / "docs" / f"{name}.png").exists()


# -------------------------------------------------------------------------------------------------
# Methods


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_docstring_has_one_line_and_one_source(method):
    lines = inspect.getdoc(method).splitlines()
    assert re.fullmatch(r"[^|]+\.", lines[0]) and lines[1] == ""
    (source,) = (line for line in lines if line.startswith(("Paper: ", "Source: ")))
    assert re.match(r"(Paper|Source): https://\S+", source)


def test_the_table_has_every_method_once():
    rows = tables.method_rows()
    names = [row.name.removeprefix("positions.") for row in rows]
    assert sorted(names) == sorted(method.__name__ for method in METHODS)
    (yarn,) = (row for row in rows if row.name == "yarn")
    assert (yarn.axis, yarn.paper) == ("frequencies", "https://arxiv.org/abs/2309.00071")
    assert yarn.what.startswith("YaRN: ") and not yarn.what.endswith(".")


def test_measurements_stand_beside_their_method(tmp_path):
    """A real model's losses are compared piece by piece; the best parameters are shown."""

    def row(method, far, **params):
        return {"method": method, "params": params, "near": [9.0, 9.0], "far": far}

    last = [[3.0], [1.0, 2.0]]  # a loss for each seed
    small = [{"name": "pi", "last": last}, {"name": "abf, tuned", "last": last}]
    save(tmp_path, "length_generalization", small)
    yarn = row("yarn", [2.0, 3.0], factor=2.0)
    rows = [yarn, row("pi", [2.5, 3.7], factor=2.0), row("pi", [2.4, 3.4], factor=3.0)]
    rows.append({"method": "rerope", "params": {"window": 9}, "recall": [1.7, 0.25]})
    save(tmp_path, "smollm2-16k", rows)
    long = [yarn, row("pi", [2.0, 3.5], factor=4.0)]
    save(tmp_path, "smollm2-32k", [*long, row("yarn", [2.0, 3.7], factor=4.0, resonance=True)])
    found = evaluations.measured(tmp_path)
    assert found["yarn"][0].over_yarn == (0.0, 0.0)
    assert found["pi"][0].over_yarn == pytest.approx((0.6, 0.1))
    assert found["rerope"] == [({"window": 9}, None, None, (1.7, 0.25))]
    lines = tables.real(tmp_path, "smollm2-16k").splitlines()
    assert lines[3:] == [
        "| `pi` | factor=3 | 2.900 | 0.400 ± 0.000 |  |",
        "| `pi` | factor=2 | 3.100 | 0.600 ± 0.100 |  |",
        "| `rerope` | window=9 |  |  | 1.70 ± 0.25 |",
    ]
    assert "| `resonance` | method=yarn, factor=4 | 2.850 |" in tables.real(tmp_path, "smollm2-32k")
    whole = tables.method_table(tmp_path)
    paper = "[2306.15595](https://arxiv.org/abs/2306.15595)"
    assert f"| {paper} | 1.50 | factor=3 | 0.400 ± 0.000 |  | 0.250 ± 0.250 |" in whole
    by_name = {r.name: r for r in tables.method_rows(tmp_path)}
    assert by_name["abf"].trained == 1.5 and by_name["rope"].trained is None


# -------------------------------------------------------------------------------------------------
# Evaluations


def test_what_eval_wrote_is_kept_as_one_row_a_method(tmp_path):
    def wrote(task: str, **row) -> Path:
        own = {"method": "yarn", "params": {"factor": 1 / 3}, **row}
        (tmp_path / "eval.json").write_text(
            json.dumps({"training_length": 4, "texts": [], "rows": [own]})
        )
        evaluations.keep(tmp_path / "eval.json", "some", task, tmp_path)
        return tmp_path / "models" / "some.json"

    buckets = [{"start": at, "pieces": [at + 1.0, at + 2.0]} for at in (0, 4, 8)]
    wrote("loss", buckets=buckets)
    gains = [{"gain": 0.0, "error": 1.0}, {"gain": 1.7, "error": 0.25}]
    path = wrote("recall", gains=gains)
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["near"], row["far"], row["recall"]) == ([1.0, 2.0], [7.0, 8.0], [1.7, 0.25])


def test_a_fine_tune_is_compared_with_the_model_before(tmp_path):
    """With the same parameters, piece by piece, up to the training length and behind it."""

    def row(near, far, gain, factor):
        own = {"method": "yarn", "params": {"factor": factor}, "near": near, "far": far}
        return {**own, "recall": [gain, 0.5]}

    others = row([0.0, 0.0], [0.0, 0.0], 0.0, 3.0)
    save(tmp_path, "smollm2-16k", [others, row([3.0, 5.0], [2.0, 3.0], 1.0, 2.0)])
    save(tmp_path, "smollm2-tuned", [row([2.5, 4.5], [1.0, 2.4], 1.5, 2)])
    assert tables.tuned(tmp_path).splitlines()[2] == (
        "| `yarn` | factor=2 | 4.000 | 3.500 | -0.500 ± 0.000 | 2.500 | 1.700 | -0.800 ± 0.200 "
        "| 1.00 ± 0.50 | 1.50 ± 0.50 |"
    )


def test_searches_stand_side_by_side_by_the_kind_of_what_they_found(tmp_path):
    def finalist(method, to_yarn, **params):
        named = " ".join([method, *(f"{name}={value:g}" for name, value in params.items())])
        row = {"name": named, "method": method, "params": params, "pieces": [2.0 + to_yarn] * 2}
        errors = dict.fromkeys(("loss_error", "to_yarn_error"), 0.01)
        return row | {"loss": 2.0 + to_yarn, "to_yarn": to_yarn} | errors

    assert tables.searched(tmp_path).splitlines()[0] == "|  |"
    yarn, score = finalist("yarn", 0.0, factor=2.0), finalist("rerope", -0.5, window=9)
    searched, plain = finalist("longrope", 0.25), finalist("plain", 3.0)
    # The best published method at one length is YaRN itself, at the other with another factor.
    long, short = [finalist("yarn", -0.1, factor=24.0), plain], [score, yarn, searched, plain]
    save(tmp_path, "search-128k", long, length=131072, training_length=8192)
    save(tmp_path, "search-16k", short, length=16384, training_length=8192)
    head, _, *lines = tables.searched(tmp_path).splitlines()
    assert head == "|  | 16,384 tokens | 131,072 tokens |"
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "+3.000 ± 0.010 | +3.000 ± 0.010 |",
        "0 (a loss of 2.000 ± 0.010) |  |",
        "YaRN | `yarn factor=24` -0.100 ± 0.010 |",
        "+0.250 ± 0.010 |  |",
        "`rerope window=9` -0.500 ± 0.010 |  |",
    ]


def test_passkeys_stand_by_length_below_their_method(tmp_path):
    def row(method, length, *shares):
        intervals = [[share - 0.1, share + 0.1] for share in shares]
        return {"method": method, "length": length, "accuracy": shares, "intervals": intervals}

    rows = [row("rope", 16, 0.5, 0.9), row("yarn", 8, 0.4, 0.3), row("rope", 8, 0.2, 0.1)]
    save(tmp_path, "passkey", rows, depths=[0.0, 1.0])
    lines = tables.passkey(tmp_path).splitlines()
    assert lines[0] == "| method | tokens | 0% deep | 100% deep |"
    assert lines[2:] == [
        "| `rope` | 8 | 20% (10-30) | 10% (0-20) |",
        "| `rope` | 16 | 50% (40-60) | 90% (80-100) |",
        "| `yarn` | 8 | 40% (30-50) | 30% (20-40) |",
    ]
