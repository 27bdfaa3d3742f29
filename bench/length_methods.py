"""The attentions of length_generalization.py: in training, and in each method's test.

Everything is scaled from the training length L. FACTOR = 8 is the reach of the longest test, and
the factor of methods with a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    head_permutations,
    methods,
    permuteformer_attention,
    positions,
    rope_attention,
    scores,
)

# From q, k and v (batch, seqlen, heads, head_dim), not rotated, to the output of the heads.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FACTOR = 8


@dataclass(frozen=True)
class Setup:
    """Sizes of the model, of its training and of the test."""

    d_model: int
    layers: int
    heads: int
    length: int  # L, of training
    batch: int  # sequences of L bytes a step; a tuning step has batch / 8 of 8 L
    steps: int
    tune_steps: int
    learning_rate: float
    windows: int  # stretches of 8 L bytes in the test
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


FULL = Setup(
    d_model=128, layers=3, heads=4, length=128, batch=16, steps=800, tune_steps=80,
    learning_rate=3e-3, windows=128,
)  # fmt: skip
QUICK = Setup(
    d_model=64, layers=2, heads=2, length=32, batch=8, steps=12, tune_steps=3,
    learning_rate=3e-3, windows=4,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Attentions


def rotated(freqs: RopeFreqs, at: Tensor | None = None) -> Attend:
    """Return causal attention over q and k rotated to positions 0, 1, 2, ... or `at`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.ops.extrope.rope_fwd(
            q, k, freqs.inv_freq, at, None, freqs.log_decay, attention_factor=freqs.attention_factor
        )
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def scored(score: scores.Score, freqs: RopeFreqs, **options: object) -> Attend:
    """Return attention by a score method, which rotates q and k itself."""
    return partial(rope_attention, freqs=freqs, score=score, **options)


def randomized(setup: Setup, length: int, generator: torch.Generator) -> Attend:
    """Draw positions in each layer, in training and in the test, as the authors do."""
    freqs, largest = methods.rope(setup.head_dim), 2 * FACTOR * setup.length

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = positions.randomized(length, largest, generator=generator)
        return rotated(freqs, at)(q, k, v)

    return attend


def permuteformer(setup: Setup) -> Attend:
    """Permute in place of rotating; decay and denominator by default."""
    return partial(
        permuteformer_attention, permutations=head_permutations(setup.heads, setup.head_dim)
    )


def rope(setup: Setup) -> RopeFreqs:
    return methods.rope(setup.head_dim)


def xpos(setup: Setup) -> RopeFreqs:
    """Return XPOS with scale_base L/2: the paper's 512 is half of its training length."""
    return methods.xpos(setup.head_dim, scale_base=setup.length / 2)


def fixed(name: str, **options: object) -> Callable[[Setup], RopeFreqs]:
    """Return a frequency method for FACTOR times the training length; L stands for that length."""

    def make(setup: Setup) -> RopeFreqs:
        given = {key: setup.length if x == "L" else x for key, x in options.items()}
        return methods.METHODS[name](setup.head_dim, **given)

    return make


pi = fixed("pi", factor=FACTOR)
ntk_aware = fixed("ntk_aware", factor=FACTOR)
ntk_mixed = fixed("ntk_mixed", factor=FACTOR)
ntk_by_parts = fixed("ntk_by_parts", factor=FACTOR, original_max_position_embeddings="L")
yarn = fixed("yarn", factor=FACTOR, original_max_position_embeddings="L")
llama3 = fixed("llama3", factor=FACTOR, original_max_position_embeddings="L", base=10000.0)
giraffe_power = fixed("giraffe_power", power=0.5)
giraffe_truncation = fixed("giraffe_truncation", truncate_pos="L")
abf = fixed("abf")
cope = fixed("cope", clip=5)  # of 16 pairs: the authors' 20 of 64


# -------------------------------------------------------------------------------------------------
# Trainings


class Step(NamedTuple):
    """The attention of a training step, and the mask of (batch, length) tokens without padding."""

    attend: Attend
    counted: Tensor | None = None


@dataclass(frozen=True)
class Training:
    about: str
    step: Callable[[Setup, torch.Generator], Step]
    starts_from: str | None = None  # weights to tune, at 8 L, instead of training anew at L
    tunings: int = 1  # times the steps of a tuning


def plain(freqs: Callable[[Setup], RopeFreqs]) -> Callable[[Setup, torch.Generator], Step]:
    return lambda setup, _: Step(rotated(freqs(setup)))


def shape_step(setup: Setup, generator: torch.Generator) -> Step:
    at = positions.shape(setup.batch, setup.length, FACTOR * setup.length, generator=generator)
    return Step(rotated(rope(setup), at))


def random_padding_step(setup: Setup, generator: torch.Generator) -> Step:
    """Place sequences of L/2 .. L tokens at random in a row of 2 L, padded at the end in memory."""
    length = setup.length
    tokens = torch.randint(length // 2, length + 1, (setup.batch,), generator=generator)
    at, _ = positions.random_padding(setup.batch, tokens, 2 * length, generator=generator)
    counted = torch.arange(length) < tokens[:, None]
    return Step(rotated(rope(setup), at[:, :length]), counted)


def inverse_leaky(quarters: int) -> Callable[[Setup, torch.Generator], Step]:
    """Use Su's rule of thumb: a factor of 1 / (2 * expansion) and a window of L / 4."""

    def step(setup: Setup, _: torch.Generator) -> Step:
        window, factor = quarters * setup.length // 4, 1 / (2 * FACTOR)
        return Step(scored(scores.rerope(window, factor), rope(setup)))

    return step


def tuned(name: str, freqs: Callable[[Setup], RopeFreqs], tunings: int = 1) -> Training:
    longer = f" for {tunings} times the steps" if tunings > 1 else ""
    about = f"rope, then tuned at 8x with {name}{longer}"
    return Training(about, plain(freqs), "rope", tunings)


TRAININGS = {
    "rope": Training("rope", plain(rope)),
    "xpos": Training("own: scale_base L/2", plain(xpos)),
    "inverse_leaky": Training("own: leaky, window L/4, factor 1/16", inverse_leaky(1)),
    "inverse_leaky_wide": Training("own: leaky, window 3L/4, factor 1/16", inverse_leaky(3)),
    "randomized": Training(
        "own: drawn of 16 L",
        lambda setup, generator: Step(randomized(setup, setup.length, generator)),
    ),
    "permuteformer": Training("own", lambda setup, _: Step(permuteformer(setup))),
    "shape": Training("own: shifts below 8 L", shape_step),
    "random_padding": Training("own: L/2 .. L tokens in 2 L", random_padding_step),
    "abf": Training("own: base 500,000", plain(abf)),
    "rope_tuned": tuned("rope", rope),
    "pi_tuned": tuned("pi", pi),
    "pi_tuned_longer": tuned("pi", pi, tunings=10),
    "yarn_tuned": tuned("yarn", yarn),
    "abf_tuned": tuned("abf", abf),
    "giraffe_power_tuned": tuned("giraffe_power", giraffe_power),
    "giraffe_truncation_tuned": tuned("giraffe_truncation", giraffe_truncation),
}


# -------------------------------------------------------------------------------------------------
# Methods

AT_TEST = "frequencies, changed at the test"
SCORES = "scores, changed at the test"
OWN = "a training of its own"
TUNED = "frequencies, tuned at 8x"


@dataclass(frozen=True)
class Method:
    """A method; `attention` makes the attention for a length, with a generator for its draws."""

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


def by_score(make: Callable[[int], scores.Score], **options) -> Callable[..., Attend]:
    """Return plain RoPE with the score method that `make` returns for L."""
    return lambda s, length, generator: scored(make(s.length), rope(s), **options)


def log_n(s: Setup, length: int, _: torch.Generator) -> Attend:
    return scored(scores.rerope(s.length // 2), rope(s), log_n=s.length)


def blockwise(freqs: Callable[[Setup], RopeFreqs]) -> Callable[..., Attend]:
    return lambda s, length, _: scored(scores.blockwise_causal(s.length), freqs(s))


rerope = by_score(lambda n: scores.rerope(n // 2))
leaky_rerope = by_score(lambda n: scores.leaky_rerope(n // 2, 2 * FACTOR))
self_extend = by_score(lambda n: scores.self_extend(n // 2, n // 4))
dual_chunk = by_score(lambda n: scores.dual_chunk(3 * n // 4, n // 8))
# No shift brings texts past twice L into the trained range; this one is best up to that.
string = by_score(lambda n: scores.string(n, n // 8))

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
    """Make methods of (name, paper, trained, run, attention)."""
    return [Method(name, family, PAPERS[paper], *rest) for name, paper, *rest in rows]


def _tuned(
    name: str, paper: str, freqs: Callable[[Setup], RopeFreqs]
) -> tuple[str, str, str, str, Callable[..., Attend]]:
    return (f"{name}, tuned", paper, f"{name}_tuned", "same", using(freqs))


_LIST = [
    *_rows(
        AT_TEST,
        ("rope", "rope", "rope", "same", using(rope)),
        ("pi", "pi", "rope", "factor 8", using(pi)),
        ("ntk_aware", "ntk_aware", "rope", "factor 8", using(ntk_aware)),
        ("ntk_mixed", "ntk_mixed", "rope", "factor 8", using(ntk_mixed)),
        ("ntk_by_parts", "ntk_by_parts", "rope", "factor 8", using(ntk_by_parts)),
        ("yarn", "yarn", "rope", "factor 8", using(yarn)),
        ("llama3", "llama3", "rope", "factor 8", using(llama3)),
        ("dynamic_ntk", "dynamic_ntk", "rope", "factor length / L", dynamic_ntk),
        ("dynamic_yarn", "yarn", "rope", "factor length / L", dynamic_yarn),
        ("giraffe_power", "giraffe", "rope", "power 0.5", using(giraffe_power)),
        ("giraffe_truncation", "giraffe", "rope", "cut at L", using(giraffe_truncation)),
        ("cope", "cope", "rope", "5 of 16 pairs", using(cope)),
    ),
    *_rows(
        SCORES,
        ("rerope", "rerope", "rope", "window L/2", rerope),
        ("rerope, log-n", "rerope", "rope", "window L/2, log-n on q", log_n),
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
         lambda s, length, generator: permuteformer(s)),
        ("randomized", "randomized", "randomized", "drawn of 16 L", randomized),
        ("shape", "shape", "shape", "plain RoPE", using(rope)),
        ("random_padding", "random_padding", "random_padding", "plain RoPE", using(rope)),
        ("abf", "abf", "abf", "same", using(abf)),
    ),
    *_rows(
        TUNED,
        _tuned("rope", "rope", rope),
        _tuned("pi", "pi", pi),
        ("pi, tuned longer", "pi", "pi_tuned_longer", "same", using(pi)),
        _tuned("yarn", "yarn", yarn),
        _tuned("abf", "abf", abf),
        _tuned("giraffe_power", "giraffe", giraffe_power),
        _tuned("giraffe_truncation", "giraffe", giraffe_truncation),
    ),
]  # fmt: skip
METHODS = {method.name: method for method in _LIST}
