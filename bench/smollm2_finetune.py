"""Fine-tune SmolLM2-135M to 16,384 tokens with pieces of 4,096, and measure it again.

apt-get download debian-reference-common debian-reference-en jargon-text, dpkg-deb -x and zcat them,
as in bench/model_runs.py, then
OMP_NUM_THREADS=1 python bench/smollm2_finetune.py {yarn,rerope} debian-reference.txt jargon.txt

It trains on the first text, and measures on Python's reference and on the second one, as
bench/model_runs.py measures the untuned model. YaRN meets far distances by PoSE's positions; ReRoPE
needs none: with a window of 2,048 its largest distance fits into a piece of 4,096. Weights are
float32, matrix products and attention bfloat16, one piece a step. Every 20 steps are kept in
build/smollm2-finetune, and a stopped run continues from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import model_runs
import torch
from torch import Tensor
from tqdm import tqdm

from extrope_kernels import positions
from extrope_kernels.evaluation import models, texts
from extrope_kernels.integrations.transformers import extend

FOLDER = Path(__file__).parent.parent / "build" / "smollm2-finetune"
PIECE, TARGET = 4096, 16384
STEPS, WARM_UP, PEAK, KEEP = 200, 10, 2e-5, 20


class Tuning(NamedTuple):
    """A method's training: its parameters, and the positions of a piece (None: 0, 1, 2, ...)."""

    params: dict[str, Any]
    positions: Callable[[torch.Generator], Tensor] | None = None


def skipped(draws: torch.Generator) -> Tensor:
    return positions.pose(1, PIECE, PIECE, TARGET, generator=draws)[0]


TUNINGS = {"yarn": Tuning({"factor": 2.0}, skipped), "rerope": Tuning({"window": 2048})}


def rate(step: int) -> float:
    """Return the rate: a linear warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def load() -> tuple[Any, Any]:
    """Load the float32 model and its tokenizer."""
    files = models.find_model(models.SMOLLM2)
    return models.load_model(files, "float32", "cpu"), models.load_tokenizer(files)


class Trainer:
    """The model, its optimizer and the losses so far, kept in one file."""

    def __init__(self, method: str, text: str) -> None:
        self.method, self.tuning, self.file = method, TUNINGS[method], FOLDER / f"{method}.pt"
        self.model, self.tokenizer = load()
        self.text = texts.read_text(self.tokenizer, text)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.losses: list[float] = []
        self.seconds = 0.0
        if self.file.exists():
            kept = torch.load(self.file)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.losses, self.seconds = kept["losses"], kept["seconds"]

    def keep(self) -> None:
        unfinished = self.file.with_suffix(".unfinished")
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**kept, "losses": self.losses, "seconds": self.seconds}, unfinished)
        unfinished.replace(self.file)

    def step(self) -> float:
        """Train on one piece; its draws depend on the step only, so that a run can continue."""
        step, began = len(self.losses), time.process_time()
        draws = torch.Generator().manual_seed(step)
        start = int(torch.randint(len(self.text.ids) - PIECE, (), generator=draws))
        ids = self.text.ids[start : start + PIECE][None]
        options: dict[str, Tensor] = {}
        if self.tuning.positions is not None:
            # Without a mask transformers takes a gap for the border of two sequences.
            options["position_ids"] = self.tuning.positions(draws)
            options["attention_mask"] = torch.ones_like(ids)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.process_time() - began
        self.losses.append(loss.item())
        return self.losses[-1]

    def train(self) -> None:
        progress = tqdm(total=STEPS, initial=len(self.losses), unit="step")
        with progress, extend(self.model.train(), self.method, **self.tuning.params):
            while len(self.losses) < STEPS:
                progress.set_postfix(loss=f"{self.step():.3f}")
                progress.update()
                if len(self.losses) % KEEP == 0:
                    self.keep()


def tune(method: str, text: str, folder: Path) -> dict[str, Any]:
    """Train and save; return a line about it."""
    trainer = Trainer(method, text)
    trainer.train()
    # No longer extended: `eval` extends it.
    trainer.model.save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)
    about = {"params": trainer.tuning.params, "text": trainer.text.about(), "steps": STEPS,
             "piece": PIECE, "rate": PEAK}  # fmt: skip
    return {**about, "seconds": trainer.seconds, "losses": trainer.losses}


def measure(method: str, model: Path, text: str) -> int:
    """Measure the tuned model as bench/model_runs.py does the untuned one."""
    for task, trials in (("loss", 2), ("recall", 1)):
        run = model_runs.Run(task, "smollm2-tuned", str(TARGET), trials, model=str(model))
        given = {method: TUNINGS[method].params}
        out = FOLDER / "measured" / method
        if code := model_runs.measure(run, ["pydocs", text], given, out):
            return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=TUNINGS)
    parser.add_argument("text", help="to train on")
    parser.add_argument("held_out", help="to measure on")
    given = parser.parse_args()
    models.quiet()
    model = FOLDER / given.method
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        about = tune(given.method, given.text, model)
        model.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    return measure(given.method, model, given.held_out)


if __name__ == "__main__":
    sys.exit(main())
