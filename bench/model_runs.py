"""Measure methods on SmolLM2 and Gemma 3 past their lengths; a stopped run continues.

apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb . \\
    && zcat usr/share/doc/jargon-text/jargon.txt.gz > jargon.txt
OMP_NUM_THREADS=1 python bench/model_runs.py {loss,recall,long,far,short,gemma} jargon.txt

Every measurement goes to build/model_runs; --record keeps a row of each in bench/results/models,
which bench/readme.py shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import evaluations
from harness import kept_memory

from extrope_kernels._usage import stay_offline
from extrope_kernels.evaluation import evaluate

BUILD = Path(__file__).parents[1] / "build" / "model_runs"
TRAINED = 8192

# For each method first `eval`'s parameters, or its required ones; then some that may be better.
METHODS: dict[str, list[dict[str, Any]]] = {
    "yarn": [{}, {"factor": 3.0}, {"resonance": True}],
    "rope": [{}],
    "rerope": [{}, *({"window": w} for w in (2048, 1024, 3072, 6144))]
    + [{"window": w, "log_n": TRAINED} for w in (2048, 4096)],
    "self_extend": [{}, {"window": 4096, "factor": 4}],
    "dual_chunk": [{}, {"chunk_size": 4096}],
    "leaky_rerope": [{}, {"window": 2048}, {"window": 2048, "factor": 4.0}],
    "ntk_by_parts": [{}, {"factor": 3.0}],
    "llama3": [{}, {"factor": 3.0}],
    "ntk_aware": [{}, {"factor": 3.0}, {"factor": 4.0}],
    "ntk_mixed": [{}, {"factor": 3.0}],
    "abf": [{}, {"base": 300_000.0}],
    "dynamic_yarn": [{}],
    "dynamic_ntk": [{}, {"factor": 3.0}],
    "pi": [{}],
    "cope": [{}, {"clip": 10}],
    "giraffe_power": [{"power": 0.1}, {"power": 0.5}, {"power": 1.0}],
    "giraffe_truncation": [{"truncate_pos": TRAINED}],
    "proportional": [{"partial_rotary_factor": 0.75}],
    "xpos": [{}],
    "string": [{}, {"shift": TRAINED}],
    "blockwise_causal": [{}],
}

# At four times the length `eval` gives a factor of 4.
LONG = {method: sets[:1] for method, sets in METHODS.items()} | {
    "yarn": [{}, {"resonance": True}],
    "rerope": [{}, {"window": 2048}],
    "self_extend": [{}, {"window": 4096, "factor": 8}],
    "leaky_rerope": [{}, {"window": 2048}, {"window": 2048, "factor": 8.0}],
    "abf": [{}, {"base": 1_000_000.0}],
    "giraffe_power": [{"power": 0.1}, {"power": 0.5}, {"power": 1.0}],
}


# Methods whose far keys have groups of each pair of dims.
OF_PAIRS: dict[str, list[dict[str, Any]]] = {
    "dpe": [{"window": 2048, "pairs": 32, "group_sizes": [1, 1, 2, 2, 4, 4, 4, 4]}],
}


def first(*methods: str) -> dict[str, list[dict[str, Any]]]:
    """Return `eval`'s parameters of these methods."""
    return {method: METHODS[method][:1] for method in methods}


class Run(NamedTuple):
    """An evaluation: its task, lengths, and the name of its file of results."""

    task: str
    name: str
    lengths: int | tuple[int, ...]
    trials: int
    methods: dict[str, list[dict[str, Any]]] = METHODS
    bucket: int = 2048
    model: str = "smollm2"
    kept: str = ""  # the kind of rows, if not the task's


RUNS = {
    "loss": Run("loss", "smollm2-16k", 16384, trials=2),
    "recall": Run("recall", "smollm2-16k", 16384, trials=1),
    "pairs": Run("loss", "smollm2-16k", 16384, trials=2, methods=OF_PAIRS),
    "pairs-recall": Run("recall", "smollm2-16k", 16384, trials=1, methods=OF_PAIRS),
    "long": Run("loss", "smollm2-32k", 32768, trials=1, methods=LONG),
    # Eight times the trained length: some minutes a text with AMX, half an hour without.
    "far": Run(
        "loss", "smollm2-64k", 65536, trials=1, bucket=8192, kept="by_position",
        methods=first("rope", "rerope", "leaky_rerope", "self_extend", "dual_chunk")
        | {"yarn": [{}, {"factor": 16.0}]},
    ),
    "short": Run(
        "loss", "short", (1024, 2048, 4096, 8192), trials=2, bucket=8192, kept="short",
        methods=first("rope", "rerope", "leaky_rerope", "dual_chunk")
        | {"yarn": [{"factor": 2.0}, {"factor": 4.0}]},
    ),
    # Trained to 32,768; 16,384 is half of it.
    "gemma": Run(
        "loss", "gemma3-270m-48k", 49152, trials=1, model="gemma3-270m",
        methods=first("yarn", "rope", "dual_chunk")
        | {"rerope": [{"window": 16384}], "self_extend": [{"window": 16384}]},
    ),
}  # fmt: skip


def measure(
    run: Run, texts: list[str], given: dict[str, dict[str, Any]], out: Path, record: bool
) -> None:
    """Evaluate methods with their given parameters; record: keep the results."""
    stay_offline()
    with kept_memory():  # fresh pages take a third of the time in bfloat16
        evaluate(
            run.model, given, run.lengths, task=run.task, text=texts, bucket=run.bucket,
            trials=run.trials, dtype="bfloat16", out=out, table=sys.stdout,
        )  # fmt: skip
    if record:
        evaluations.keep(out / f"{run.task}.json", run.name, run.kept or run.task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("text", help="of the Jargon File")
    parser.add_argument("--record", action="store_true", help="keep rows in bench/results/models")
    given = parser.parse_args()
    run = RUNS[given.run]
    texts = ["pydocs"] if given.run == "short" else ["pydocs", given.text]
    for index in range(max(map(len, run.methods.values()))):  # one set of parameters each
        params = {method: sets[index] for method, sets in run.methods.items() if sets[index:]}
        measure(run, texts, params, BUILD / run.name, given.record)


if __name__ == "__main__":
    main()
