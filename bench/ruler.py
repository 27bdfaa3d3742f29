"""RULER, offline: how often a model finds what a long text says, by method and length.

Six of RULER's thirteen tasks download nothing. lm-evaluation-harness makes their samples (always
the same: of one seed, and of the model's tokenizer), asks the model `extrope` and scores the
answers; here are the cells to measure, and a file of their scores that a run goes on from. Each
cell is what one command of lm-eval gives (`command`). New scores go to build/ruler;
--record writes all to bench/results/ruler, which bench/readme.py and bench/plots.py show.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from evaluations import named
from harness import RESULTS, kept_memory

from extrope_kernels._usage import UsageError, stay_offline
from extrope_kernels.evaluation import models, packages, report

NEEDLES = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
TASKS = (*NEEDLES, "ruler_vt", "ruler_cwe", "ruler_fwe")
# The answer is a number, or a UUID of as many tokens as that: RULER's 128 would be spent on what
# follows it.
SHORTER = dict.fromkeys(NEEDLES, 48)
Method = tuple[str | None, dict[str, Any]]
# None: the model as it is. One set of parameters for all lengths, of those that have good losses in
# docs/guide/measured.md past each model's training length.
METHODS: dict[str, tuple[Method, ...]] = {
    "smollm2": (
        (None, {}),
        ("yarn", {"factor": 2.0}),
        ("yarn", {"factor": 4.0}),
        ("yarn", {"factor": 8.0}),
        ("rerope", {"window": 4096}),
        ("leaky_rerope", {"window": 4096, "factor": 16.0}),
        ("self_extend", {"window": 2045, "factor": 5}),
        ("dual_chunk", {"chunk_size": 6144, "local_window": 1024}),
        ("string", {"shift": 8192, "window": 128}),
        ("dpe", {"window": 2048, "pairs": 32, "group_sizes": [1, 1, 2, 2, 4, 4, 4, 4]}),
    ),
    "gemma3-270m": (
        (None, {}),
        ("yarn", {"factor": 1.5}),
        ("rerope", {"window": 16384}),
        ("self_extend", {"window": 16380, "factor": 7}),
        ("dual_chunk", {"chunk_size": 24576, "local_window": 4096}),
    ),
}
FROZEN = 100  # samples of each task and length
SHORT = 1024  # tokens of samples that are not used
BUILD = Path(__file__).parents[1] / "build" / "ruler"  # --record: bench/results/ruler
AT_ONCE = 2  # samples, after which they are written down


class Cell(NamedTuple):
    """The scores of a method on the first samples of a task, each from 0 to 1.

    samples: the digest of the frozen samples of this task and length.
    """

    task: str
    length: int
    samples: str
    method: str
    parameters: str
    scores: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        return self[:-1]


# -------------------------------------------------------------------------------------------------
# Keep


def read(path: Path) -> list[Cell]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Cell(**row | {"length": int(row["length"]),
                          "scores": tuple(map(float, row["scores"].split()))})
            for row in csv.DictReader(file)
        ]  # fmt: skip


def write(path: Path, cells: Sequence[Cell]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(Cell._fields)
    for cell in sorted(cells):
        rows.writerow((*cell.key, " ".join(f"{score:g}" for score in cell.scores)))
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_atomic(path, text.getvalue().encode())


def longest(cells: Iterable[Cell]) -> dict[tuple, Cell]:
    """Return cells by key; of two of a key the longer one."""
    return {cell.key: cell for cell in sorted(cells, key=lambda each: len(each.scores))}


def keep(path: Path, cell: Cell) -> dict[tuple, Cell]:
    """Add a cell to a file that other processes write too, and return all of it by key."""
    kept = longest([*read(path), cell])
    write(path, list(kept.values()))
    return kept


def interval(cell: Cell) -> tuple[float, float]:
    """Return the interval of 95% of a cell's share by Wilson's score, which holds for few samples.

    Paper: https://doi.org/10.1080/01621459.1927.10502953
    """
    count, z = len(cell.scores), NormalDist().inv_cdf(0.975)
    share, spread = fmean(cell.scores), z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = ((share + spread / 2 + side * half) / (1 + spread) for side in (-1, 1))
    return min(share, max(0.0, low)), max(share, min(1.0, high))  # rounded, all of 8 end below 1


def share(cell: Cell) -> str:
    """Return what a table has of a cell: 80% of 10 (49-94)."""
    low, high = interval(cell)
    return f"{fmean(cell.scores):.0%} of {len(cell.scores)} ({100 * low:.0f}-{100 * high:.0f})"


# -------------------------------------------------------------------------------------------------
# Measure


def load_task(task: str, length: int, model: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Return lm-eval's task with the first of the samples that its command line makes; a digest.

    Making them takes minutes at 32,768 tokens, so they are frozen in build/ruler.
    """
    import numpy as np
    from lm_eval.tasks import TaskManager

    path = BUILD / f"{model}-{task}-{length}.json"
    # As lm-eval's command line does before it makes samples.
    random.seed(0)
    np.random.seed(1234)
    sizes = [SHORT if path.exists() else length]
    manager = TaskManager(metadata={"pretrained": str(folder), "max_seq_lengths": sizes})
    loaded = manager.load([task])
    found = loaded["tasks"][task]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        docs = list(found.test_docs())[:FROZEN]
        report.write_atomic(path, json.dumps(docs).encode())
    found.dataset = {"test": json.loads(path.read_text())}
    if task in SHORTER:
        found.set_config("generation_kwargs", {"max_gen_toks": SHORTER[task]}, update=True)
    return loaded, hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def asked(model: Any, given: Method, loaded: dict[str, Any], cell: Cell, upto: int) -> Cell:
    """Return the cell of a given method, with the scores of the samples up to a number."""
    from lm_eval import evaluate

    from extrope_kernels.evaluation.lm_eval.model import ExtropeLM

    method, parameters = given
    samples = {cell.task: list(range(len(cell.scores), upto))}
    lm = ExtropeLM(model, method=method, **parameters)
    try:
        found = evaluate(lm, loaded, samples=samples, bootstrap_iters=0, log_samples=True)
    finally:
        lm.restore()
    by_doc = sorted(found["samples"][cell.task], key=lambda sample: sample["doc_id"])
    scores = (float(sample[str(cell.length)]) for sample in by_doc)
    return cell._replace(scores=(*cell.scores, *scores))


def names(method: str | None, parameters: dict[str, Any]) -> tuple[str, str]:
    return method or "rope", named(parameters)


def missing(kept: dict, wanted: Sequence[Cell], samples: int) -> Iterator[tuple[Cell, int]]:
    """Return cells, as they are when their turn comes, and how many samples they are to have.

    All cells go on together, so that methods are compared on the same samples whenever it ends.
    """
    for upto in range(AT_ONCE, samples + AT_ONCE, AT_ONCE):
        for cell in wanted:
            so_far = kept.get(cell.key, cell)
            if len(so_far.scores) < min(upto, samples):
                yield so_far, min(upto, samples)


def check_samples(cell: Cell, kept: Iterable[Cell]) -> None:
    """Raise UsageError if scores were kept of other samples: methods are compared on the same."""
    for each in kept:
        if each.key[:2] == cell.key[:2] and each.samples != cell.samples:
            raise UsageError(
                f"samples of {cell.task}, {cell.length:,} tokens, are {cell.samples} here, and "
                f"{each.samples} in the results; move these, or bring their {BUILD}"
            )


def run(given: argparse.Namespace) -> None:
    """Measure what is missing, a task and a length after the other; each step is kept."""
    stay_offline()
    files, device = models.prepared(given.model, None)
    model = models.load_model(files, "bfloat16", device)
    known = {names(*each): each for each in METHODS[given.model]}
    methods = {name: each for name, each in known.items()
               if any(" ".join(name).startswith(label) for label in given.methods)}  # fmt: skip
    if not methods:
        raise UsageError(f"--methods must begin rows of {[' '.join(name) for name in known]}")
    recorded = RESULTS / "ruler" / f"{given.model}.csv"
    path = recorded if given.record else BUILD / recorded.name
    for length, task in product(given.lengths, given.tasks):
        loaded, made = load_task(task, length, given.model, files.folder)
        wanted = [Cell(task, length, made, *own) for own in methods]
        kept = longest([*read(recorded), *read(BUILD / recorded.name)])
        check_samples(wanted[0], kept.values())
        if given.record:
            write(recorded, list(kept.values()))
        steps = sum(1 for _ in missing(kept, wanted, given.samples))
        with report.Display(sys.stdout, steps) as display:
            for cell, upto in missing(kept, wanted, given.samples):
                display.begin(f"{task} {length:,} {cell.method} {cell.parameters}", 1)
                cell = asked(model, methods[cell.key[3:]], loaded, cell, upto)
                kept |= keep(path, cell)
                display.tick()
                row = f"{task} {length:>6} {cell.method:<12} {cell.parameters:<22} {share(cell)}"
                display.line(row)


def command(cell: Cell, model: str = packages.SMOLLM2) -> str:
    """Return lm-eval's command for a cell: the same samples, and the same scores."""
    method, parameters = next(x for x in METHODS[model] if names(*x) == cell.key[3:])
    given = {"pretrained": "$MODEL", "dtype": "bfloat16", "attn_implementation": "extrope"}
    if method is not None:
        given |= {"method": method, **parameters}
    shorter = f" --gen_kwargs max_gen_toks={SHORTER[cell.task]}" if cell.task in SHORTER else ""
    find = f"from extrope_kernels.evaluation.models import unpacked; print(unpacked('{model}'))"
    lines = (
        f'MODEL=$(python -c "{find}") \\\n&& python -m extrope_kernels.evaluation.lm_eval run '
        "--model extrope --device cpu",
        f'--model_args "{",".join(f"{name}={value}" for name, value in given.items())}"',
        f"--tasks {cell.task} --metadata 'max_seq_lengths=[{cell.length}]'{shorter} "
        f"--limit {len(cell.scores)}",
    )
    return " \\\n    ".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(packages.PACKAGES), default=packages.SMOLLM2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS[:1])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument(
        "--methods", nargs="+", default=[""], metavar="METHOD",
        help="those whose rows begin so: rerope, 'yarn factor=8' (default all)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=50, help="of each cell (default 50)")
    parser.add_argument("--record", action="store_true", help="write to bench/results/ruler")
    given = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        parser.error("lm-eval is not installed; run: pip install 'lm-eval[hf,ruler]'")
    if not 0 < given.samples <= FROZEN:
        parser.error(f"--samples must be from 1 to {FROZEN}, got {given.samples}")
    try:
        with kept_memory():  # fresh pages take a third of the time
            run(given)
    except UsageError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
