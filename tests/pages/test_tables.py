"""The tables of README.md and docs/ are made from the measured files."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from statistics import fmean

import evaluations
import harness
import plots
import pytest
import readme
import ruler
import tables
from PIL import Image

from extrope_kernels import methods, permuteformer_attention, positions, scores

ROOT = Path(__file__).parents[2]
METHODS = [
    *methods.METHODS.values(),
    *methods.WRAPPERS.values(),
    *scores.SCORES.values(),
    permuteformer_attention,
    *(getattr(positions, name) for name in positions.__all__),
]


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
    row = "| forward | peer 1.0 0.50 (bar 0.25 missed) | float32 | 8 x 2 | 1.50 |  | 1.0e-07 |"
    assert row in once
    assert "Not measured here: other: needs a GPU." in once
    assert "| backward |" in (results / "README.md").read_text()
    page.write_text("<!-- none -->\n<!-- end of none -->\n")
    with pytest.raises(ValueError, match=r"README.md: nothing measured is called 'none'"):
        readme.main(tmp_path, results)


def sign_test(ours, theirs):
    """How many texts only ours finds, theirs none alone; the chance of that, two-sided."""
    only, others = (sum(a > b for a, b in zip(*x)) for x in ((ours, theirs), (theirs, ours)))
    assert others == 0
    return only, 2 * 0.5**only


def test_pages_tell_speeds_and_numbers_of_models_as_measured():
    """Captions are of their pictures' files: needles, curves, speed; then recall by YaRN's factor,
    generate, and the classes of docs/models.md."""
    pages = ("README.md", "docs/guide/transformers.md", "docs/models.md")
    text, guide, models = ((ROOT / page).read_text() for page in pages)
    for index in (0, 2, -1):
        times, _ = plots.against_the_best(plots.SHOWN[index])
        assert f"{times:.1f} times" in text, plots.SHOWN[index].label
    cells = ruler.read(harness.RESULTS / "ruler/smollm2.csv")
    needles = {cell.key[3:]: cell.scores for cell in cells
               if (cell.task, cell.length) == (ruler.TASKS[0], 16384)}  # fmt: skip
    plain, yarn_2, yarn_4, rerope = (
        needles[name]
        for name in (
            ("rope", ""),
            ("yarn", "factor=2"),
            ("yarn", "factor=4"),
            ("rerope", "window=4096"),
        )
    )
    assert len(yarn_2) == len(yarn_4) == len(rerope) == 50 and sum(plain) == 0
    told = "it finds none in {} texts as it is. In {} texts, the same for all, it finds {:.0f} with"
    assert told.format(len(plain), len(rerope), sum(yarn_2)) in text
    assert f"{sum(yarn_4):.0f} at factor 4, and **{sum(rerope):.0f} with ReRoPE**" in text
    only, by_chance = sign_test(rerope, yarn_2)
    told = f"all {only} that factor 2 misses among them (sign test: p = {by_chance:.3f})"
    assert told in text
    assert f"its lead over factor 4 may be chance (p = {sign_test(rerope, yarn_4)[1]:.2f})" in text
    ends = {(row["method"], row["params"].get("factor")): row["positions"][-1]
            for row in evaluations.read("smollm2-64k")["rows"]}  # fmt: skip
    shown = [ends[each] for each in
             (("rope", None), ("yarn", 8.0), ("rerope", None), ("leaky_rerope", 16.0))]  # fmt: skip
    assert all(list(each) == sorted(each, reverse=True) for each in zip(*shown, strict=True))
    told = "{:.2f} nats as it is, {:.2f} with YaRN at factor 8, {:.2f} with ReRoPE and **{:.2f}"
    assert told.format(*map(fmean, shown)) in text
    kept = {name: evaluations.read(name)["rows"] for name in ("demo", "recall")}
    last = {row["method"]: row["losses"][-1] for row in kept["demo"]}
    told = "the model as it is {rope:.2f} nats, with YaRN {yarn:.2f}, with ReRoPE {rerope:.2f}"
    assert told.format(**last) in text
    farthest = {row["method"]: row["gains"][-1][0] for row in kept["recall"]}
    told = "saves {yarn:.2f} nats a token with YaRN, {rerope:.2f} with ReRoPE"
    assert told.format(**farthest) in text
    yarns = {row.parameters["factor"]: row for row in evaluations.measured()["yarn"]}
    told = "recall rises from {:.2f} to {:.2f} nats a token"
    assert told.format(yarns[2].recall[0], yarns[3].recall[0]) in text
    assert f"and [{len(METHODS) - 5} more](#methods)" in text
    rows = json.loads((harness.RESULTS / "avx512" / "generate.json").read_text())["rows"]
    row = next(row for row in rows if (row["name"], row["tokens"]) == ("rerope", 8000))
    told = "reads 8,000 tokens in {:.2f} of the plain model's time, and takes {:.2f} of it"
    assert told.format(row["prompt_of_plain"], row["steps_of_plain"]) in guide
    frequency, score = re.findall(r"^- By a \w+ method: (\d+) of the", models, re.MULTILINE)
    assert f"All {frequency} rotary model classes of transformers take methods that change" in text
    assert f"{score} also take score methods" in text and f"on {score} by score methods" in guide


def test_losses_are_kept_by_piece_and_never_beside_those_of_other_texts(tmp_path):
    def buckets(*losses):
        return [{"start": start, "pieces": pieces} for start, pieces in zip((0, 4, 8), losses)]

    rows = [
        {"method": "rerope", "params": {"window": 4}, "buckets": buckets([1, 2], [3, 6], [5, 7])},
        {"method": "yarn", "params": {}, "buckets": buckets([1, 2], [3, 6], [4, 8])},
    ]
    eval_json = tmp_path / "loss.json"

    def keep(rows, digest):
        about = {"training_length": 8, "texts": [{"name": "t", "tokens": 12, "digest": digest}]}
        eval_json.write_text(json.dumps(about | {"rows": rows}))
        evaluations.keep(eval_json, "tiny", "loss", tmp_path)

    keep(rows[:1], "a")
    keep(rows[1:], "a")
    kept = evaluations.read("tiny", tmp_path)
    assert [row["near"] for row in kept["rows"]] == [[2, 4]] * 2
    (rerope,) = evaluations.measured(tmp_path, "tiny")["rerope"]
    assert rerope.loss == 6 and rerope.over_yarn == (0, 1)  # of 1 and -1
    with pytest.raises(ValueError, match=r"tiny\.json is of other texts than"):
        keep(rows, "b")
    assert evaluations.read("tiny", tmp_path) == kept


@pytest.mark.thorough
@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_plot_is_drawn(name, tmp_path):
    plots.PLOTS[name](tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert (ROOT / "docs" / f"{name}.png").exists()


@pytest.mark.parametrize("name", plots.SOURCES)
def test_a_picture_of_real_models_or_speed_is_drawn_from_its_files_as_they_are(name):
    """Or run python bench/plots.py; its caption is compared with the same files above."""
    drawn = Image.open(ROOT / "docs" / f"{name}.png").text["Source"]
    assert drawn == plots.digest(*plots.sources(name))
    pages = (ROOT / "README.md", ROOT / "docs" / "guide" / "measured.md")
    assert any(f"/{name}.png)" in page.read_text() for page in pages)


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
    for table in (tables.method_table(harness.RESULTS, only) for only in ("", "papers")):
        assert all(f"`{row.name}`" in table for row in rows)
