"""The tables of README.md and docs/, in Markdown, each from one file of bench/results/.

A method's docstring starts with the line that the table of methods shows, and names its source:

    Paper: https://arxiv.org/abs/2309.00071
"""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple
from urllib.parse import urlsplit

import evaluations
import ruler
import scaling
from evaluations import between, named
from harness import Row, cell, columns, table

import extrope_kernels
from extrope_kernels import methods, positions, scores
from extrope_kernels.evaluation.report import mean_and_error, with_error

# -------------------------------------------------------------------------------------------------
# Benchmarks


def benchmark(path: Path, only: str = "") -> str:
    """Show what a benchmark wrote."""
    results = json.loads(path.read_text())
    if path.stem.startswith("scaling-"):
        slopes = "\n".join(f"- {line}" for line in scaling.summary(results["rows"]))
        return f"{results['about']}; {machine(results)}.\n\n{slopes}"
    if path.stem == "vllm":
        return speeds(results)
    if path.stem in ("distributed", "generate", "launch"):
        return by_columns(columns(import_module(f"bench_{path.stem}").Row), results)
    return comparison(results, only)


def machine(results: dict) -> str:
    where = results["machine"]
    triton = f", Triton {results['triton']}" if "triton" in results else ""
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}{triton}, "
        f"{where['date']}"
    )


THRESHOLDS = ("bar", "most_kernels", "verdict")  # kept in the files alone, where a test reads them


def comparison(results: dict, only: str = "") -> str:
    """Make a line per case with the words of `only`, and a column per other implementation."""
    cases: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        name = row["case"], row["dtype"], row["shape"]
        if all(word in " ".join(name) for word in only.split()):
            cases.setdefault(name, []).append(row)
    every = [row for rows in cases.values() for row in rows]
    others = list(dict.fromkeys(row["implementation"] for row in every if "ratio" in row))
    left_out = ("case", "implementation", "dtype", "shape", "backend", "ratio", *THRESHOLDS)
    shown = {name: about for name, about in columns(Row).items() if name not in left_out}
    lines = []
    for (case, dtype, shape), rows in cases.items():
        (ours,) = (row for row in rows if row["implementation"] == "extrope")
        ratios = {row["implementation"]: row["ratio"] for row in rows if "ratio" in row}
        words = (cell(ours.get(name), form) for name, (_, form) in shown.items())
        heads = re.search(r" \d+/\d+ x \d+", case)  # the shape says it too
        about = case.replace(heads[0], "") if heads and heads[0] in shape else case
        lines.append([about, dtype, shape, *(times(ratios.get(x)) for x in others), *words])
    headings = (head.replace("/it", "/ours") for head, _ in shown.values())
    parts = [f"{machine(results)}; medians in one run.",
             table(["", "dtype", "shape", *others, *headings], lines)]  # fmt: skip
    absent = {row["implementation"]: row["absent"] for row in every if "absent" in row}
    if absent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        parts.append(f"Not measured here: {reasons}.")
    return "\n\n".join(parts)


def times(ratio: float | None) -> str:
    """Write how many times as fast ours is: the files keep our time over the other's."""
    return "" if ratio is None else f"{1 / ratio:.{2 if ratio > 0.1 else 1}f}x"


def by_columns(shown: dict, results: dict) -> str:
    """Make a line per row, with the benchmark's own columns."""
    shown = {name: about for name, about in shown.items() if name not in THRESHOLDS}
    lines = [[cell(row.get(name), form) for name, (_, form) in shown.items()]
             for row in results["rows"]]  # fmt: skip
    return f"{machine(results)}.\n\n{table([head for head, _ in shown.values()], lines)}"


def speeds(results: dict) -> str:
    """Make vLLM's tokens a second, and their ratio to plain with the same cache."""
    plain = {row["name"]: row for row in results["rows"] if row["name"].startswith("plain")}
    lines = []
    for row in results["rows"]:
        base = plain.get("plain fp8" if row["name"].endswith("fp8") else "plain", row)
        parts = (f"{row[x]:,.1f} ({row[x] / base[x]:.2f})" for x in ("prefill", "decode"))
        lines.append([f"`{row['name']}`", *parts])
    about = f"{machine(results)}; a prompt of {results['tokens']:,} tokens in {results['dtype']}"
    return f"{about}.\n\n{table(['', 'prefill, tokens a second', 'decode'], lines)}"


def audit(path: Path) -> str:
    """Make the compiled kernels at head_dim 128; three numbers if the chips differ."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    held = [f"{r['kernel']} {r['variant']}, sm_{r['chip']}, head_dim {r['head_dim']}: "
            f"{r['stack']} B" for r in rows if int(r["stack"])]  # fmt: skip
    shown = {"registers": "registers", "stack": "stack, bytes", "shared": "shared, KiB",
             "warps_of_sm": "warps of an SM", "products": "a tile: tensor core instructions",
             "special": "exponentials", "instructions": "all instructions",
             "bound_us": "at least, us", "bound_by": "bound by"}  # fmt: skip
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        row["shared"] = f"{int(row['shared']) / 1024:.0f}"
        if row["head_dim"] == "128":
            groups.setdefault((row["kernel"], row["variant"]), []).append(row)
    lines = []
    for names, found in groups.items():
        chips = [[row[field] for row in found] for field in shown]
        cells = [" / ".join(each if len(set(each)) > 1 else each[:1]) for each in chips]
        lines.append([", ".join(filter(None, names)), *cells])
    head = ["bfloat16, head_dim 128", *shown.values()]
    stack = f"{len(held)} hold stack ({'; '.join(held)})" if held else "None holds stack (a spill)"
    chips = " / ".join(dict.fromkeys(f"sm_{row['chip']}" for row in rows))
    return f"{len(rows)} kernels compiled, none run; {stack}. {chips}:\n\n{table(head, lines)}"


# -------------------------------------------------------------------------------------------------
# Evaluations of real models


def demo(found: dict) -> str:
    rows, step = found["rows"], found["bucket"] // 1024
    head = [f"{step * i}-{step * (i + 1)}k" for i in range(len(rows[0]["losses"]))]
    lines = [[f"`{row['method']}`", *(f"{loss:.2f}" for loss in row["losses"])] for row in rows]
    minutes, threads = sum(row["seconds"] for row in rows) / 60, found["threads"]
    took = f"The {len(rows)} runs took {minutes:.1f} minutes of {threads} threads."
    return f"{table(['method', *head], lines)}\n\n{took}"


def by_position(results: Path, name: str) -> str:
    """Make a line per method: the loss by position, and that behind the training length."""
    found = evaluations.read(name, results)
    rows, step = found["rows"], found["bucket"] // 1024
    yarn = next(row["far"] for row in rows if row["method"] == "yarn")
    head = [f"{step * i}-{step * (i + 1)}k" for i in range(len(rows[0]["positions"]))]
    lines = []
    for row in sorted(rows, key=lambda row: fmean(row["far"])):
        over = mean_and_error([own - theirs for own, theirs in zip(row["far"], yarn, strict=True)])
        losses = (f"{fmean(texts):.2f}" for texts in row["positions"])
        cells = [f"`{row['method']}`", named(row["params"]), *losses]
        lines.append([*cells, f"{fmean(row['far']):.3f}", between(over, 3)])
    return table(["method", "parameters", *head, "loss", "over YaRN"], lines)


# README's columns: their methods, and the parameters at 65,536 tokens and at 16,384.
HELPS = {
    "unmodified": ("rope", "", ""),
    "YaRN": ("yarn", "factor=8", "factor=2"),
    "ReRoPE": ("rerope", "window=4096", "window=4096"),
    "Leaky ReRoPE": ("leaky_rerope", "window=4096, factor=16", "window=4096, factor=16"),
}


def helps(results: Path) -> str:
    """Make README's table: the loss at the end of long texts, and needles found."""
    read = {(row["method"], named(row["params"])): fmean(row["positions"][-1])
            for row in evaluations.read("smollm2-64k", results)["rows"]}  # fmt: skip
    losses = [read[method, far] for method, far, _ in HELPS.values()]
    needles = [needles_at(results, method, near) for method, _, near in HELPS.values()]
    least, most = min(losses), max(map(fmean, needles))
    rows = [
        ["loss on the last 8,192 of 65,536 tokens, in nats a token (less is better)",
         *(bold(f"{loss:.2f}", loss == least) for loss in losses)],
        ["needles found in texts of 16,384 tokens (a number asked for at the end)",
         *(bold(f"{sum(x):.0f} of {len(x)}", fmean(x) == most) for x in needles)],
    ]  # fmt: skip
    return table(["SmolLM2-135M-Instruct, trained to 8,192 tokens", *HELPS], rows)


def needles_at(results: Path, method: str, parameters: str, length: int = 16384) -> tuple:
    """Return the scores of SmolLM2's answers to RULER's easiest task."""
    wanted = ruler.TASKS[0], length, (method, parameters)
    found = ruler.read(results / "ruler" / "smollm2.csv")
    return next(x.scores for x in found if (x.task, x.length, x.key[3:]) == wanted)


def bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def recall(found: dict) -> str:
    """Make a line per method: the gain of a passage by distance, with its standard error."""
    head = ["method", *(f"{distance:,}" for distance in found["distances"])]
    return table(head, [[f"`{r['method']}`", *map(between, r["gains"])] for r in found["rows"]])


def ruler_shares(found: Path) -> str:
    """Make a column per length: the share of answers, of how many, Wilson's interval of 95%."""
    cells = [cell for cell in ruler.read(found) if cell.task == ruler.TASKS[0]]
    lengths = sorted({cell.length for cell in cells})
    lines = []
    for method, parameters in (ruler.names(*each) for each in ruler.METHODS[found.stem]):
        own = {x.length: ruler.share(x) for x in cells if x.key[3:] == (method, parameters)}
        if own:
            lines.append([f"`{method}`", parameters, *(own.get(n, "") for n in lengths)])
    return table(["method", "parameters", *(f"{length:,}" for length in lengths)], lines)


def ruler_tasks(folder: Path) -> str:
    """Make a line per task: the share of each model as it is, at the shortest length measured."""
    models = {found.stem: ruler.read(found) for found in sorted(folder.glob("*.csv"))}
    plain = {(name, task): [cell for cell in cells if (cell.task, cell.method) == (task, "rope")]
             for name, cells in models.items() for task in ruler.TASKS}  # fmt: skip
    shares = {each: ruler.share(min(cells)) for each, cells in plain.items() if cells}
    lines = [[task, *(shares.get((name, task), "") for name in models)] for task in ruler.TASKS]
    return table(["task", *models], lines)


def ruler_command(found: Path, only: str) -> str:
    """Give lm-eval's command for the row, and the column, that the words name: its first samples.

    Eight of 16,384 tokens take minutes of a core, all of them half an hour.
    """
    cells = [cell for cell in ruler.read(found) if cell.task == ruler.TASKS[0]]
    words = set(only.split())
    cell = next(c for c in cells if words <= {c.method, str(c.length), *c.parameters.split(", ")})
    return f"```sh\n{ruler.command(cell._replace(scores=cell.scores[:8]))}\n```"


def within(found: dict) -> str:
    """Make losses of texts within the training length, a column per length."""
    lengths = sorted({row["length"] for row in found["rows"]})
    losses: dict[str, dict[int, float]] = {}
    for row in found["rows"]:
        words = [f"{name}={value:g}" for name, value in row["params"].items()]
        losses.setdefault(f"`{' '.join([row['method'], *words])}`", {})[row["length"]] = row["loss"]
    head = ["method", *(f"{length:,} tokens" for length in lengths)]
    return table(head, [[name, *(f"{of[n]:.3f}" for n in lengths)] for name, of in losses.items()])


def real(results: Path, name: str) -> str:
    """Make every method and its parameters on a real model, the lowest loss first."""
    found = evaluations.measured(results, name)
    rows = [(method, row) for method, several in found.items() for row in several]
    rows.sort(key=lambda item: item[1].loss or 99)
    head = ["method", "parameters", "loss", "over YaRN", "recall, 15,360 back"]
    lines = [
        [f"`{method}`", named(row.parameters), cell(row.loss, ".3f"),
         between(row.over_yarn, digits=3), between(row.recall)]
        for method, row in rows
    ]  # fmt: skip
    columns = len(head) if any(line[-1] for line in lines) else len(head) - 1
    return table(head[:columns], [line[:columns] for line in lines])


def tuned(results: Path) -> str:
    """Make the changes by a fine-tune, piece by piece, with the same parameters."""
    head = ["method", "parameters"]
    for tokens in ("0-8k", "8-16k"):
        head += [f"loss, {tokens}", "tuned", "change"]
    before = evaluations.read("smollm2-16k", results)["rows"]
    after = evaluations.read("smollm2-tuned", results)["rows"]
    lines = []
    for row in sorted(after, key=lambda row: row["method"]):
        same = row["method"], row["params"]
        old = next(x for x in before if (x["method"], x["params"]) == same)
        cells = [f"`{row['method']}`", named(row["params"])]
        for part in ("near", "far"):
            change = mean_and_error([b - a for a, b in zip(old[part], row[part], strict=True)])
            cells += [f"{fmean(old[part]):.3f}", f"{fmean(row[part]):.3f}", between(change, 3)]
        lines.append([*cells, between(old["recall"]), between(row["recall"])])
    return table([*head, "recall, 15,360 back", "tuned"], lines)


# -------------------------------------------------------------------------------------------------
# Small models: bench/length_generalization.py


def with_spread(values: list[float]) -> str:
    """Write mean and standard deviation over the seeds."""
    return with_error(fmean(values), stdev(values) if len(values) > 1 else None, 3)


def as_good(values: list[float], best: list[float]) -> bool:
    """Return True if the seeds don't tell a loss from the best: all start from the same weights."""
    over = [loss - least for loss, least in zip(values, best)]
    return fmean(over) <= max(0.01, 2 * stdev(over) if len(over) > 1 else 0.0)


def length_generalization(found: dict) -> str:
    """Make the table: names link to papers, bold losses are as good as the best."""
    columns = [[*row["last"], row["all"]] for row in found["rows"]]  # the losses of all seeds each
    best = [min(column, key=fmean) for column in zip(*columns)]
    lines = []
    for row, losses in zip(found["rows"], columns):
        numbers = [f"**{with_spread(x)}**" if as_good(x, least) else with_spread(x)
                   for x, least in zip(losses, best)]  # fmt: skip
        lines.append([f"[{row['name']}]({row['paper']})", row["trained"], row["run"], *numbers])
    lengths = [f"{length:,}" for length in found["lengths"]]
    head = ["method", "trained", "at the test", *lengths, f"all of {lengths[-1]}"]
    setup, where, text = found["setup"], found["machine"], found["text"]
    return (
        f"{table(head, lines)}\n\n"
        "Nats per byte; bold: at most 0.01, or twice the standard deviation of the difference seed "
        f"by seed, over the best of its column. {setup['layers']} layers of {setup['d_model']}, "
        f"{setup['heads']} heads; L = {setup['length']}; {setup['steps']:,} steps of "
        f"{setup['batch']} x {setup['length']} bytes out of {text['train_bytes'] / 1e6:.1f} MB, "
        f"tuned for {setup['tune_steps']}; {setup['windows']} x {setup['length']} bytes scored; "
        f"{setup['seeds']} seeds, mean and standard deviation. {where['device']}, torch "
        f"{where['torch']}: the {found['trainings']} trainings took {found['seconds'] / 60:.0f} "
        "minutes of a core, with all seeds."
    )


# -------------------------------------------------------------------------------------------------
# transformers' classes: bench/models_census.py

SORTS = {
    "a frequency method": ("rope, neutral", "yarn", "dynamic_ntk"),
    "a score method": ("rerope, neutral", "rerope", "self_extend", "dual_chunk"),
}
_ALL = 'ok, layers="all"'


def census(found: dict) -> str:
    """Make a summary, the classes that are served in full, and a line for each other class."""
    built = [row for row in found["rows"] if "built" not in row]
    rotating = [r for r in built if "must have a rotary embedding" not in r.get("yarn", "")]
    served = {sort: [row["name"] for row in rotating if _serves(row, which)]
              for sort, which in SORTS.items()}  # fmt: skip
    classes = f"transformers {found['transformers']}: {len(found['rows'])} classes"
    classes += f" with rotary parameters, of which {len(built)} can be built alone and run on text."
    lines = [classes, ""]
    for sort, names in served.items():
        share = len(names) / len(rotating)
        lines.append(f"- By {sort}: {len(names)} of the {len(rotating)} that rotate ({share:.0%}).")
    both = sorted(set.intersection(*map(set, served.values())), key=str.lower)
    marked = {row["name"]: row["name"] + _mark(row) for row in built}
    lines += ["", '\\* Frequency methods with `layers="all"`. † Only']
    lines += ["forwards are compared: its own `generate` fails.", "", '<details markdown="1">']
    lines += [f"<summary>The {len(both)} classes served by both</summary>", ""]
    lines += [f"{', '.join(marked[name] for name in both)}.", "", "</details>"]
    others = [[marked[row["name"]], *(_said(row, which) for which in SORTS.values())]
              for row in built if row["name"] not in both]  # fmt: skip
    absent = [[row["name"], _reason(row["built"])] for row in found["rows"] if "built" in row]
    lines += ["", table(["the others", "frequencies", "scores"], others)]
    lines += ["", table(["not built", "why"], absent)]
    return "\n".join(lines)


def _serves(row: dict, which: tuple[str, ...]) -> bool:
    """Return True if all fields are "ok", or missing, which means the same."""
    return all(row.get(method, "ok").startswith("ok") for method in which)


def _mark(row: dict) -> str:
    frequencies = [row.get(method) == _ALL for method in ("yarn", "dynamic_ntk")]
    return "*" * any(frequencies) + "†" * ("generates" in row)


def _said(row: dict, which: tuple[str, ...]) -> str:
    reasons = [row[x] for x in which if not row.get(x, "ok").startswith("ok")]
    return _reason(reasons[0]) if reasons else "yes"


def _reason(reason: str) -> str:
    """Return the reason without the beginning of every error."""
    for words in ("is not a supported architecture: ", "extend: ", "Error: "):
        reason = reason.split(words, 1)[-1]
    return reason.strip()


# -------------------------------------------------------------------------------------------------
# Methods

# Names of rows of the measurements, if they differ from the method's.
MEASURED_AS = {
    "abf": "abf, tuned",
    "blockwise_causal": "xpos, blockwise (LEX)",
    "permuteformer_attention": "permuteformer",
}


class MethodRow(NamedTuple):
    axis: str  # "frequencies", "scores", "positions"; "permutations" in place of a rotation
    name: str  # as users write it
    what: str  # one line
    paper: str  # a link
    method: Callable


def method_rows() -> list[MethodRow]:
    """Return every method of every axis, in the order of its registry."""
    every = {
        "frequencies": methods.METHODS | methods.WRAPPERS,
        "scores": scores.SCORES,
        "permutations": {"permuteformer_attention": extrope_kernels.permuteformer_attention},
        "positions": {f"positions.{x}": getattr(positions, x) for x in positions.__all__},
    }
    return [MethodRow(axis, name, *described(x), x)
            for axis, kind in every.items() for name, x in kind.items()]  # fmt: skip


def described(method: Callable) -> tuple[str, str]:
    """Return a docstring's first line without its full stop, and the link to its source."""
    text = inspect.getdoc(method) or ""
    source = re.search(r"^(?:Paper|Source): (https://\S+)", text, re.MULTILINE)
    if source is None:
        raise ValueError(f"{method.__name__}: the docstring must hold a line 'Paper: https://...'")
    return text.splitlines()[0].removesuffix("."), source[1]


def link(paper: str) -> str:
    """Name a link: an arXiv paper by its number, anything else by its host."""
    host, path = urlsplit(paper)[1:3]
    label = Path(path).name if host == "arxiv.org" else host.removeprefix("www.")
    return f"[{label}]({paper})"


DOCS = Path(__file__).parents[1] / "docs"
API = {"frequencies": "methods", "permutations": "permuteformer"}  # pages with other names


def api_link(axis: str, method: Callable) -> str:
    """Return the link from a page of docs/ to a method in the API."""
    name = method.__name__
    path = "extrope_kernels" if hasattr(extrope_kernels, name) else method.__module__
    return f"[API](api/{API.get(axis, axis)}.md#{path}.{name})"


def pictured(row: MethodRow, folder: str = "") -> str:
    """Name a method, with a link to its picture in the gallery where it has one."""
    known = (DOCS / "gallery" / f"{row.name}.png").exists()
    return f"[`{row.name}`]({folder}gallery.md#{row.name})" if known else f"`{row.name}`"


AXES = {
    "frequencies": "frequencies: how fast each pair of dims rotates",
    "scores": "scores: which relative position a query sees of a key",
    "permutations": "permutations in place of the rotation, in linear time",
    "positions": "positions: which position a token gets in training",
}


def method_table(results: Path, only: str = "") -> str:
    """Show every method: by axis, or, a row each, their "papers" or what was "measured"."""
    rows = method_rows()
    if only == "measured":
        return _measurements(rows, results)
    if only == "papers":
        lines = [[pictured(row), row.what, link(row.paper), api_link(row.axis, row.method)]
                 for row in rows]  # fmt: skip
        return table(["method", "what it does", "paper", "call"], lines)
    linked: dict[str, list[str]] = {}
    for row in rows:
        name = pictured(row, "docs/")
        if "](" not in name:
            name = f"[{name}]({row.paper})"
        linked.setdefault(AXES[row.axis], []).append(name)
    return table(["axis", "methods"], [[axis, ", ".join(links)] for axis, links in linked.items()])


def _measurements(rows: list[MethodRow], results: Path) -> str:
    """Make a row per method with the best parameters that were tried on SmolLM2."""
    head = ["method", "small model, 8x", "SmolLM2 with", "loss over YaRN", "recall"]
    small = evaluations.read("length_generalization", results)["rows"]
    losses = {row["name"]: fmean(row["last"][-1]) for row in small}
    twice, four = (evaluations.measured(results, name) for name in ("smollm2-16k", "smollm2-32k"))
    lines = []
    for row in rows:
        loss = losses.get(MEASURED_AS.get(row.name, row.method.__name__))
        numbers = [cell(loss, ".2f"), *[""] * 4]
        if row.name in twice:
            best = evaluations.best(twice[row.name])
            numbers[1:4] = named(best.parameters), between(best.over_yarn, 3), between(best.recall)
        if row.name in four:
            numbers[4] = between(evaluations.best(four[row.name]).over_yarn, 3)
        if any(numbers):
            lines.append([f"`{row.name}`", *numbers])
    return table([*head, "over YaRN, 4x"], lines)
