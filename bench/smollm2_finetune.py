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
import time
from pathlib import Path
from typing import Any

import model_runs
import torch
from torch import Tensor
from tqdm import tqdm

from extrope_kernels import positions
from extrope_kernels.evaluation import models, packages, texts
from extrope_kernels.integrations.transformers import extend

FOLDER = Path(__file__).parent.parent / "build" / "smollm2-finetune"
PIECE, TARGET = 4096, 16384
STEPS, WARM_UP, PEAK, KEEP = 200, 10, 2e-5, 20


TUNINGS: dict[str, dict[str, Any]] = {"yarn": {"factor": 2.0}, "rerope": {"window": 2048}}


def rate(step: int) -> float:
    """Return the rate: a linear warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def tune(method: str, text: str, folder: Path) -> dict[str, Any]:
    """Train, keep every 20 steps in a file, and save the model; return what is told about it."""
    files = models.find_model(packages.SMOLLM2)
    model, tokenizer = models.load_model(files, "float32", "cpu"), models.load_tokenizer(files)
    read = texts.read_text(tokenizer, text)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    losses: list[float] = []
    seconds, kept = 0.0, FOLDER / f"{method}.pt"
    if kept.exists():
        before = torch.load(kept)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        losses, seconds = before["losses"], before["seconds"]
    progress = tqdm(range(len(losses), STEPS), initial=len(losses), total=STEPS, unit="step")
    with extend(model.train(), method, **TUNINGS[method]):
        for step in progress:
            began = time.process_time()
            loss = loss_of_piece(model, read.ids, method, torch.Generator().manual_seed(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.process_time() - began
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if len(losses) % KEEP == 0:
                unfinished = kept.with_suffix(".unfinished")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "losses": losses, "seconds": seconds}, unfinished)
                unfinished.replace(kept)
    # No longer extended: `eval` extends it.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"params": TUNINGS[method], "text": read.about(), "steps": STEPS, "piece": PIECE}
    return {**about, "rate": PEAK, "seconds": seconds, "losses": losses}


def loss_of_piece(model: Any, text: Tensor, method: str, draws: torch.Generator) -> Tensor:
    """Return the loss of a piece; its draws depend on the step only, so that a run can continue."""
    start = int(torch.randint(len(text) - PIECE, (), generator=draws))
    ids, options = text[start : start + PIECE][None], {}
    if method == "yarn":
        # Without a mask transformers takes a gap for the border of two sequences.
        at, _ = positions.pose(1, PIECE, PIECE, TARGET, generator=draws)
        options = {"position_ids": at, "attention_mask": torch.ones_like(ids)}
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids, labels=ids, use_cache=False, **options).loss


def main() -> None:
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
    for task, trials in (("loss", 2), ("recall", 1)):
        run = model_runs.Run(task, "smollm2-tuned", TARGET, trials, model=str(model))
        params = {given.method: TUNINGS[given.method]}
        model_runs.measure(
            run, ["pydocs", given.held_out], params, FOLDER / "measured" / model.name
        )


if __name__ == "__main__":
    main()
