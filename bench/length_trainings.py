"""How each model of length_generalization.py attends while it is trained.

All is scaled from the training length L. FACTOR = 8 is how far the longest test reaches, and what
methods with a fixed factor are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from length_model import Attend
from torch import Tensor

from extrope_kernels import (
    RopeFreqs,
    head_permutations,
    methods,
    permuteformer_attention,
    positions,
    rerope_attention,
)

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
    windows: int  # stretches of 8 L bytes that the test reads
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
    """Causal attention over q and k that the op rotates, to positions 0, 1, 2, ... or `at`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.ops.extrope.rope_fwd(
            q, k, freqs.inv_freq, at, None, freqs.log_decay, attention_factor=freqs.attention_factor
        )
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def scored(attention: Callable[..., Tensor], freqs: RopeFreqs, **options: object) -> Attend:
    """An attention of ours that rotates q and k itself."""
    return partial(attention, freqs=freqs, **options)


def randomized(setup: Setup, length: int, generator: torch.Generator) -> Attend:
    """As the authors have it: each layer draws its own positions, in training and in the test."""
    freqs, largest = methods.rope(setup.head_dim), 2 * FACTOR * setup.length

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = positions.randomized(length, largest, generator=generator)
        return rotated(freqs, at)(q, k, v)

    return attend


def permuteformer(setup: Setup) -> Attend:
    """Permutations in the place of rotations; decay and denominator as they are by default."""
    return partial(
        permuteformer_attention, permutations=head_permutations(setup.heads, setup.head_dim)
    )


def rope(setup: Setup) -> RopeFreqs:
    return methods.rope(setup.head_dim)


def xpos(setup: Setup) -> RopeFreqs:
    """The paper's 512 is half of its training length of 1,024."""
    return methods.xpos(setup.head_dim, scale_base=setup.length / 2)


def fixed(name: str, **options: object) -> Callable[[Setup], RopeFreqs]:
    """A method of frequencies for FACTOR times the training length; L stands for that length."""

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
    """The attention of a training step, and which of its (batch, length) tokens are not padding."""

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
    """Sequences of L/2 .. L tokens at random places of a row of 2 L, padded behind in memory."""
    length = setup.length
    tokens = torch.randint(length // 2, length + 1, (setup.batch,), generator=generator)
    at, _ = positions.random_padding(setup.batch, tokens, 2 * length, generator=generator)
    counted = torch.arange(length) < tokens[:, None]
    return Step(rotated(rope(setup), at[:, :length]), counted)


def inverse_leaky(quarters: int) -> Callable[[Setup, torch.Generator], Step]:
    """Su's rule of thumb for the factor, 1 / (2 * expansion); for the window it is L / 4."""

    def step(setup: Setup, _: torch.Generator) -> Step:
        window, factor = quarters * setup.length // 4, 1 / (2 * FACTOR)
        return Step(scored(rerope_attention, rope(setup), window=window, factor=factor))

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
