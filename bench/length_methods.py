"""The rows of length_generalization.py: whose weights each method takes, and how it attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import length_trainings as training
import torch
from length_model import Attend
from length_trainings import FACTOR, Setup, rope, rotated, scored, xpos

from extrope_kernels import (
    RopeFreqs,
    blockwise_causal_attention,
    dual_chunk_attention,
    methods,
    rerope_attention,
    string_attention,
)

AT_TEST = "frequencies, changed at the test"
SCORES = "scores, changed at the test"
OWN = "a training of its own"
TUNED = "frequencies, tuned at 8x"


@dataclass(frozen=True)
class Method:
    """`attention` makes what attends at a length; the generator is for what the test draws."""

    name: str
    family: str  # one of these four, each a panel of the plot
    paper: str
    trained: str  # a key of TRAININGS
    run: str
    attention: Callable[[Setup, int, torch.Generator], Attend]


def using(freqs: Callable[[Setup], RopeFreqs]) -> Callable[..., Attend]:
    return lambda setup, length, generator: rotated(freqs(setup))


def dynamic_ntk(s: Setup, length: int, _: torch.Generator) -> Attend:
    options = {"factor": 1.0, "max_position_embeddings": s.length}
    return rotated(methods.dynamic_ntk(s.head_dim, seq_len=length, **options))


def dynamic_yarn(s: Setup, length: int, _: torch.Generator) -> Attend:
    options = {"original_max_position_embeddings": s.length}
    return rotated(methods.dynamic_yarn(s.head_dim, seq_len=length, **options))


def rerope(s: Setup, length: int, _: torch.Generator) -> Attend:
    return scored(rerope_attention, rope(s), window=s.length // 2)


def rerope_log_n(s: Setup, length: int, _: torch.Generator) -> Attend:
    return scored(rerope_attention, rope(s), window=s.length // 2, log_n=s.length)


def leaky_rerope(s: Setup, length: int, _: torch.Generator) -> Attend:
    return scored(rerope_attention, rope(s), window=s.length // 2, factor=2 * FACTOR)


def self_extend(s: Setup, length: int, _: torch.Generator) -> Attend:
    options = {"window": s.length // 2, "factor": s.length // 4, "grouped": True}
    return scored(rerope_attention, rope(s), **options)


def dual_chunk(s: Setup, length: int, _: torch.Generator) -> Attend:
    options = {"chunk_size": 3 * s.length // 4, "local_window": s.length // 8}
    return scored(dual_chunk_attention, rope(s), **options)


def string(s: Setup, length: int, _: torch.Generator) -> Attend:
    """No shift brings texts past twice L into what was trained; this is the best for up to that."""
    options = {"shift": s.length, "window": s.length // 8}
    return scored(string_attention, rope(s), **options)


def blockwise(freqs: Callable[[Setup], RopeFreqs]) -> Callable[..., Attend]:
    return lambda s, length, generator: scored(
        blockwise_causal_attention, freqs(s), block_size=s.length
    )


ARXIV, KEXUE = "https://arxiv.org/abs/", "https://kexue.fm/archives/"
REDDIT = "https://www.reddit.com/r/LocalLLaMA/comments/"
PAPERS = {
    "rope": f"{ARXIV}2104.09864",
    "pi": f"{ARXIV}2306.15595",
    "ntk_aware": f"{REDDIT}14lz7j5/",
    "dynamic_ntk": f"{REDDIT}14mrgpr/",
    "ntk_mixed": f"{KEXUE}9706",
    "ntk_by_parts": "https://github.com/jquesnelle/yarn/pull/1",
    "yarn": f"{ARXIV}2309.00071",
    "llama3": f"{ARXIV}2407.21783",
    "giraffe": f"{ARXIV}2308.10882",
    "rerope": f"{KEXUE}9708",
    "inverse_leaky": f"{KEXUE}9728",
    "self_extend": f"{ARXIV}2401.01325",
    "dual_chunk": f"{ARXIV}2402.17463",
    "lex": f"{ARXIV}2212.10554",
    "permuteformer": f"{ARXIV}2109.02377",
    "randomized": f"{ARXIV}2305.16843",
    "shape": f"{ARXIV}2109.05644",
    "random_padding": f"{ARXIV}2305.04859",
    "abf": f"{ARXIV}2309.16039",
    "cope": f"{ARXIV}2602.05258",
    "string": f"{ARXIV}2410.18745",
}


def _rows(family: str, *rows: tuple[str, str, str, str, Callable[..., Attend]]) -> list[Method]:
    """Methods of (name, paper, trained, run, attention)."""
    return [Method(name, family, PAPERS[paper], *rest) for name, paper, *rest in rows]


def _tuned(name: str, paper: str) -> tuple[str, str, str, str, Callable[..., Attend]]:
    return (f"{name}, tuned", paper, f"{name}_tuned", "same", using(getattr(training, name)))


_LIST = [
    *_rows(
        AT_TEST,
        ("rope", "rope", "rope", "same", using(rope)),
        ("pi", "pi", "rope", "factor 8", using(training.pi)),
        ("ntk_aware", "ntk_aware", "rope", "factor 8", using(training.ntk_aware)),
        ("ntk_mixed", "ntk_mixed", "rope", "factor 8", using(training.ntk_mixed)),
        ("ntk_by_parts", "ntk_by_parts", "rope", "factor 8", using(training.ntk_by_parts)),
        ("yarn", "yarn", "rope", "factor 8", using(training.yarn)),
        ("llama3", "llama3", "rope", "factor 8", using(training.llama3)),
        ("dynamic_ntk", "dynamic_ntk", "rope", "factor length / L", dynamic_ntk),
        ("dynamic_yarn", "yarn", "rope", "factor length / L", dynamic_yarn),
        ("giraffe_power", "giraffe", "rope", "power 0.5", using(training.giraffe_power)),
        ("giraffe_truncation", "giraffe", "rope", "cut at L", using(training.giraffe_truncation)),
        ("cope", "cope", "rope", "5 of 16 pairs", using(training.cope)),
    ),
    *_rows(
        SCORES,
        ("rerope", "rerope", "rope", "window L/2", rerope),
        ("rerope, log-n", "rerope", "rope", "window L/2, log-n on q", rerope_log_n),
        ("leaky_rerope", "rerope", "rope", "window L/2, factor 16", leaky_rerope),
        ("self_extend", "self_extend", "rope", "window L/2, groups of L/4", self_extend),
        ("dual_chunk", "dual_chunk", "rope", "chunk 3L/4, local window L/8", dual_chunk),
        ("string", "string", "rope", "shift L, window L/8", string),
        ("rope, blockwise", "lex", "rope", "block L", blockwise(rope)),
    ),
    *_rows(
        OWN,
        ("xpos", "lex", "xpos", "same", using(xpos)),
        ("xpos, blockwise (LEX)", "lex", "xpos", "block L", blockwise(xpos)),
        ("inverse_leaky", "inverse_leaky", "inverse_leaky", "plain RoPE", using(rope)),
        ("inverse_leaky, wide", "inverse_leaky", "inverse_leaky_wide", "plain RoPE", using(rope)),
        ("permuteformer", "permuteformer", "permuteformer", "same",
         lambda s, length, generator: training.permuteformer(s)),
        ("randomized", "randomized", "randomized", "drawn of 16 L", training.randomized),
        ("shape", "shape", "shape", "plain RoPE", using(rope)),
        ("random_padding", "random_padding", "random_padding", "plain RoPE", using(rope)),
        ("abf", "abf", "abf", "same", using(training.abf)),
    ),
    *_rows(
        TUNED,
        _tuned("rope", "rope"),
        _tuned("pi", "pi"),
        ("pi, tuned longer", "pi", "pi_tuned_longer", "same", using(training.pi)),
        _tuned("yarn", "yarn"),
        _tuned("abf", "abf"),
        _tuned("giraffe_power", "giraffe"),
        _tuned("giraffe_truncation", "giraffe"),
    ),
]  # fmt: skip
METHODS = {method.name: method for method in _LIST}
