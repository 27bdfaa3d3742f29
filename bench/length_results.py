"""What the seeds of length_generalization.py came to, as its JSON file has it."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Protocol

from harness import machine
from length_methods import METHODS
from length_trainings import TRAININGS, Setup


class Run(Protocol):
    """A seed's trainings and readings."""

    @property
    def setup(self) -> Setup: ...
    def read(self, name: str) -> list[dict]: ...
    def trained(self, name: str) -> dict: ...


def over_seeds(runs: list[Run], name: str) -> list[dict]:
    """A method's losses at each length: one a seed; by L bytes on the way there, their mean."""
    lengths = []
    for reads in zip(*(run.read(name) for run in runs)):
        seeds = {key: [read[key] for read in reads] for key in ("last", "mean")}
        buckets = [statistics.fmean(x) for x in zip(*(read["buckets"] for read in reads))]
        lengths.append({"length": reads[0]["length"], **seeds, "buckets": buckets})
    return lengths


def trained(runs: list[Run], name: str) -> dict:
    """The loss as it fell, a mean over the seeds, and the seconds of all."""
    records = [run.trained(name)["record"] for run in runs]
    return {
        "about": TRAININGS[name].about,
        **{key: records[0][key] for key in ("steps", "every")},
        "curve": [statistics.fmean(x) for x in zip(*(record["curve"] for record in records))],
        "seconds": {
            clock: sum(record["seconds"][clock] for record in records) for clock in ("wall", "cpu")
        },
    }


def collect(runs: list[Run], text: dict) -> dict:
    """The content of the JSON file; text: what it says of what was read."""
    setup = asdict(runs[0].setup)
    del setup["seed"]
    rows = []
    for name, method in METHODS.items():
        about = {key: getattr(method, key) for key in ("family", "paper", "run")}
        about["trained"] = TRAININGS[method.trained].about
        rows.append({"name": name, **about, "lengths": over_seeds(runs, name)})
    return {
        "machine": machine(),
        "text": text,
        "setup": {**setup, "seeds": len(runs)},
        "trainings": {name: trained(runs, name) for name in TRAININGS},
        "rows": rows,
    }
