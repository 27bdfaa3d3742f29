"""Train small models on short texts, read longer ones: python bench/length_generalization.py

A causal transformer over bytes is trained on the sources of Python's standard library. The methods
of length_methods.py then read unseen texts of 1, 2, 4 and 8 times the training length L. All
lengths are scored on the same bytes, the last L of each 8 L: a longer text only adds bytes before
them, so a method that can use them has a loss that falls from left to right. Everything is repeated
with several seeds (--seeds) of weights, batches and drawn positions.

Trainings run two at a time, each on one thread: several times faster beside other load. Parts are
kept in build/length_generalization, and a stopped run continues from there. --quick is for tests:
its models learn nothing, and the results and the picture of docs/ stay.
"""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU everywhere, with the same draws

import argparse
import hashlib
import math
import re
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import tables
import torch
import torch.nn.functional as F
from evaluations import FOLDER
from harness import RESULTS, machine, write
from length_methods import FACTOR, FULL, METHODS, QUICK, TRAININGS, Attend, Method, Setup
from plots import draw_lengths
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
NAME = "length_generalization"
VOCABULARY = 256  # bytes
WORKERS = 2  # processes, each on one thread


# -------------------------------------------------------------------------------------------------
# The text


@cache
def read_text() -> tuple[Tensor, Tensor]:
    """Read the bytes of the standard library's modules, with every tenth kept from training."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::10]
    parts = ([path for path in files if path not in held_out], held_out)
    texts = (b"".join(path.read_bytes() for path in part) for part in parts)
    train, test = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train, test


@cache
def digest() -> str:
    """Hash both texts: results on other texts are not taken for these."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in read_text())).hexdigest()


def stretches(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return the bytes from each start on: (starts, length + 1) int64."""
    return text[starts[:, None] + torch.arange(length + 1)].long()


# -------------------------------------------------------------------------------------------------
# The model, in plain PyTorch; positions enter only through `attend`


class Block(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads, linear = heads, partial(nn.Linear, bias=False)
        self.norm_1, self.norm_2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv, self.out = linear(d_model, 3 * d_model), linear(d_model, d_model)
        wider = linear(d_model, 4 * d_model), nn.GELU(), linear(4 * d_model, d_model)
        self.mlp = nn.Sequential(*wider)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        x = x + self.out(attend(*qkv.unbind(2)).flatten(2))  # (B, T, C)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    def __init__(self, d_model: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(d_model)
        for matrix in (x for x in self.parameters() if x.dim() > 1):
            nn.init.normal_(matrix, std=0.02)
        for block in self.blocks:  # the residual stream keeps its size however deep the model
            for last in (block.out, block.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, attend)
        return F.linear(self.norm(x), self.embed.weight)  # (B, T, 256): the embedding is shared


def loss_of(model: Transformer, tokens: Tensor, attend: Attend) -> Tensor:
    """Return nats for each byte but the first of tokens (batch, seqlen + 1): (batch, seqlen)."""
    logits = model(tokens[:, :-1], attend)
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


# -------------------------------------------------------------------------------------------------
# Training


def rate(step: int, steps: int) -> float:
    """Return the rate: a short warm-up, then half a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


def train_model(name: str, setup: Setup, text: Tensor, weights: dict | None) -> dict:
    """Return weights, the last loss, and the time. All trainings see the same batches."""
    training = TRAININGS[name]
    batch, length, steps, lr = setup.batch, setup.length, setup.steps, setup.learning_rate
    if training.starts_from:
        batch, length = max(1, batch // FACTOR), FACTOR * length
        steps, lr = training.tunings * setup.tune_steps, lr / 3
    torch.manual_seed(setup.seed)
    model = Transformer(setup.d_model, setup.layers, setup.heads)
    if weights:
        model.load_state_dict(weights)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]  # of the norms, without weight decay
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    batches, draws = (torch.Generator().manual_seed(setup.seed + i) for i in (1, 2))
    losses, begin = [], time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        attend = training.attention(setup, length, draws)
        starts = torch.randint(len(text) - length, (batch,), generator=batches)
        loss = loss_of(model, stretches(text, starts, length), attend)
        loss = loss[getattr(attend, "counted", ...)].mean()  # random_padding counts a part
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - begin
    last = fmean(losses[-max(1, steps // 30) :])
    return {"weights": model.state_dict(), "loss": last, "seconds": seconds}


# -------------------------------------------------------------------------------------------------
# The test


@torch.no_grad()
def read_lengths(method: Method, setup: Setup, text: Tensor, weights: dict) -> list[dict]:
    """Return the loss at each length: of the last L bytes, and of all."""
    model = Transformer(setup.d_model, setup.layers, setup.heads)
    model.load_state_dict(weights)
    longest = FACTOR * setup.length
    starts = torch.linspace(0, len(text) - longest - 1, setup.windows).long()
    tokens = stretches(text, starts, longest)
    results = []
    for length in (setup.length * 2**i for i in range(4)):
        attend = method.attention(setup, length, torch.Generator().manual_seed(setup.seed))
        parts = tokens[:, -(length + 1) :].split(max(1, 8 * setup.length // length))
        losses = torch.cat([loss_of(model, part, attend) for part in parts]).double()
        last, mean = (x.mean().item() for x in (losses[:, -setup.length :], losses))
        results.append({"length": length, "last": last, "mean": mean})
    return results


# -------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Run:
    """A seed's trainings and readings, each kept in a file under a hash of all its inputs."""

    setup: Setup
    folder: Path

    def result(self, kind: str, name: str) -> Any:
        """Train or read, unless it is kept."""
        path, (train, test) = self.path(kind, name), read_text()
        if not path.exists():
            before = METHODS[name].trained if kind == "read" else TRAININGS[name].starts_from
            weights = self.result("trained", before)["weights"] if before else None
            if kind == "read":
                made = read_lengths(METHODS[name], self.setup, test, weights)
            else:
                made = train_model(name, self.setup, train, weights)
            unfinished = path.with_suffix(".unfinished")  # a file is whole or not there
            torch.save(made, unfinished)
            unfinished.replace(path)
        return torch.load(path)

    def path(self, kind: str, name: str) -> Path:
        """Return the file of a training or a reading."""
        about = lineage(name if kind == "trained" else METHODS[name].trained)
        if kind == "read":
            about = (METHODS[name].run, *about)
        depends = repr((self.setup, digest(), kind, name, about))
        stem = re.sub(r"\W+", "_", f"{kind} {name} {self.setup.seed}")
        return self.folder / f"{stem}-{hashlib.sha256(depends.encode()).hexdigest()[:12]}.pt"


def lineage(name: str) -> tuple[str, ...]:
    """Return a training's description, after those it starts from."""
    training = TRAININGS[name]
    return (*(lineage(training.starts_from) if training.starts_from else ()), training.about)


def do(run: Run, kind: str, name: str) -> str:
    """Train or read, in a worker; return a line about the result."""
    found = run.result(kind, name)
    if kind == "read":
        said = " ".join(f"{read['last']:.3f}" for read in found)
    else:
        said = "loss {loss:.3f}, {seconds:.0f} s of a core".format(**found)
    return f"{kind} {name}, seed {run.setup.seed}: {said}"


def work(runs: list[Run]) -> None:
    """Do all that is missing: trainings, then those that tune their weights, then readings."""
    tuned = [name for name in TRAININGS if TRAININGS[name].starts_from]
    anew = [name for name in TRAININGS if name not in tuned]
    waves = [
        [(run, kind, name) for run in runs for name in wave if not run.path(kind, name).exists()]
        for kind, wave in (("trained", anew), ("trained", tuned), ("read", METHODS))
    ]
    # A fork finds torch imported. No thread of torch's has started here by then.
    pool = ProcessPoolExecutor(WORKERS, get_context("fork"), torch.set_num_threads, (1,))
    with pool, tqdm(total=sum(map(len, waves)), unit="job") as progress:
        for wave in waves:
            for done in as_completed([pool.submit(do, *job) for job in wave]):
                progress.write(done.result())
                progress.update()


def collect(runs: list[Run]) -> dict:
    """Collect the JSON file's content: the losses of every method, by length and seed."""
    train, test = map(len, read_text())
    setup = asdict(runs[0].setup) | {"seeds": len(runs)}
    del setup["seed"]
    rows = []
    for name, method in METHODS.items():
        reads = [run.result("read", name) for run in runs]
        last = [[read["last"] for read in of_length] for of_length in zip(*reads)]
        own = {"name": name, "family": method.family, "paper": method.paper}
        own |= {"trained": TRAININGS[method.trained].about, "run": method.run}
        rows.append({**own, "last": last, "all": [read[-1]["mean"] for read in reads]})
    return {
        "machine": machine(),
        "text": {"train_bytes": train, "test_bytes": test, "sha256": digest()},
        "setup": setup,
        "trainings": len(TRAININGS),
        "seconds": sum(run.result("trained", x)["seconds"] for run in runs for x in TRAININGS),
        "lengths": [read["length"] for read in reads[0]],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps")
    parser.add_argument("--seeds", type=int, default=3, help="of each training")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / NAME, help="keeps all parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.build.mkdir(parents=True, exist_ok=True)
    setup = QUICK if args.quick else FULL
    runs = [Run(replace(setup, seed=seed), args.build) for seed in range(args.seeds)]
    work(runs)
    results = collect(runs)
    table, figure = (args.build,) * 2 if args.quick else (RESULTS / FOLDER, ROOT / "docs")
    write(table / f"{NAME}.json", results)
    draw_lengths(results, figure / f"{NAME}.png")
    print(tables.length_generalization(results))


if __name__ == "__main__":
    main()
