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
    assert "| dtype | shape | peer 1.0 | ms | floor/ours | error |" in once
    assert "| forward | float32 | 8 x 2 | 2.00x | 1.50 |  | 1.0e-07 |" in once
    assert "Not measured here: other: needs a GPU." in once
    assert "| backward |" in (results / "amx.md").read_text()
    page.write_text("<!-- none -->\n<!-- end of none -->\n")
    with pytest.raises(ValueError, match=r"README.md: nothing measured is called 'none'"):
        readme.main(tmp_path, results)


# The thresholds that recorded runs miss: file, words of the case, dtype, beside what, how many.
MISSED = {
    ("amx/attention", "rerope, forward", "float32", "no window"): 1,
    ("amx/attention", "rerope, forward", "bfloat16", "no window"): 2,
    ("amx/attention", "softcap", "bfloat16", "without"): 4,
    ("amx/attention", "sliding window", "bfloat16", "without"): 4,
    ("amx/decode", "fp8 cache", "bfloat16", "bfloat16 cache"): 2,
    ("amx/decode", "chunk, pages of 16", "float32", "contiguous cache"): 1,
}


def test_recorded_runs_keep_their_thresholds():
    missed = []
    for name, path in readme.measured(harness.RESULTS).items():
        for row in (x for x in json.loads(path.read_text())["rows"] if "ratio" in x and "bar" in x):
            assert row["verdict"] == harness.verdict(row["ratio"], row["bar"])
            if row["verdict"] == "missed":
                missed.append((name, row["case"], row["dtype"], row["implementation"]))
    for (name, words, *rest), count in MISSED.items():
        found = [x for x in missed if (x[0], *x[2:]) == (name, *rest) and words in x[1]]
        assert len(found) == count, (name, words)
        missed = [x for x in missed if x not in found]
    assert not missed


def sign_test(ours, theirs):
    """How many texts only ours finds, theirs none alone; the chance of that, two-sided."""
    only, others = (sum(a > b for a, b in zip(*x)) for x in ((ours, theirs), (theirs, ours)))
    assert others == 0
    return only, 2 * 0.5**only


def test_pages_tell_needles_losses_and_recall_as_measured():
    """What README says beside its table, and the p-values of docs/guide/measured.md."""
    text, measured = ((ROOT / page).read_text() for page in ("README.md", "docs/guide/measured.md"))
    yarn_2, yarn_4, rerope = (
        tables.needles_at(harness.RESULTS, *each)
        for each in (("yarn", "factor=2"), ("yarn", "factor=4"), ("rerope", "window=4096"))
    )
    assert len(yarn_2) == len(yarn_4) == len(rerope) == 50
    assert f"Factor 4 finds more needles, {sum(yarn_4):.0f} of 50, at a higher loss" in text
    leaky = tables.needles_at(harness.RESULTS, "leaky_rerope", "window=4096, factor=16")
    assert sum(rerope[:10]) == sum(leaky[:10]) == 10, "both find all of the unmodified model's ten"
    assert f"YaRN finds {sum(yarn_2[:10]):.0f} of these 10, the other two all" in text
    (_, by_chance), (_, over_4) = sign_test(rerope, yarn_2), sign_test(rerope, yarn_4)
    assert f"YaRN with 2 misses (sign test: p = {by_chance:.3f})" in measured
    assert f"YaRN with 4 misses (p = {over_4:.2f})" in measured
    first = {row["method"]: fmean(row["positions"][0])
             for row in evaluations.read("smollm2-64k")["rows"]
             if row["params"].get("factor") != 16 or row["method"] != "yarn"}  # fmt: skip
    assert f"at factor 8 it adds {first['yarn'] - first['rope']:.2f}" in text
    short: dict[str, list[float]] = {}
    rows = evaluations.read("short")["rows"]
    plain = {row["length"]: row["loss"] for row in rows if row["method"] == "rope"}
    for row in rows:
        name = f"{row['method']} {row['params'].get('factor', '')}"
        short.setdefault(name, []).append(row["loss"] - plain[row["length"]])
    told = "at factor 2 adds {:.2f} to {:.2f} nats a token within the trained length"
    assert told.format(min(short["yarn 2.0"]), max(short["yarn 2.0"])) in text
    kin = max(max(x) for name, x in short.items() if not name.startswith("yarn"))
    assert f"as they were, to {kin:.3f} nats" in text
    yarns = {row.parameters["factor"]: row for row in evaluations.measured()["yarn"]}
    told = "rises from {:.2f} to {:.2f} nats a token"
    assert told.format(yarns[2].recall[0], yarns[3].recall[0]) in text


def test_pages_tell_speeds_and_classes_as_measured():
    """Captions are of their pictures' files; generate by processor; docs/models.md's classes."""
    pages = ("README.md", "docs/guide/transformers.md", "docs/models.md")
    text, guide, models = ((ROOT / page).read_text() for page in pages)
    for index in (0, 2, -1):
        times, _ = plots.against_the_best(plots.SHOWN[index])
        assert f"{times:.1f} times as fast" in text, plots.SHOWN[index].label
    steps = []
    for processor in ("amx", "avx512"):
        rows = json.loads((harness.RESULTS / processor / "generate.json").read_text())["rows"]
        found = {row["tokens"]: row for row in rows if row["name"] == "rerope"}
        steps += [found[tokens]["step_times"] for tokens in (2000, 8000)]
    told = "is {:.2f} times as fast at 2,000 tokens and {:.2f} at 8,000; on an Intel without AMX "
    assert (told + "{:.2f} and {:.2f}").format(*steps) in text
    read = found[8000]["prompt_times"]
    told = "reads 8,000 tokens {:.2f} times as fast as unmodified, and writes each new one {:.2f}"
    assert told.format(read, steps[-1]) in guide
    frequency, score = re.findall(r"^- By a \w+ method: (\d+) of the", models, re.MULTILINE)
    classes = re.search(r"(\d+) classes with rotary", models)[1]
    assert f"work on {frequency} of the {classes} model classes of transformers" in text
    assert f"score methods on {score}" in text and f"{score} by score methods" in guide


def test_the_first_screen_of_readme_is_one():
    """Five lines of Python by line 20; what it does, whether it helps and how to try it by 40."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 95
    assert lines.index("```python") < 20
    assert next(n for n, line in enumerate(lines) if line.startswith("make test")) < 40


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
