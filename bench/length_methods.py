"""The attentions of length_generalization.py: in training, and in each method's test.

Everything is scaled from the training length L. FACTOR = 8 is the reach of the longest test, and
the factor of methods with a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tables import described
from torch import Tensor

import extrope_kernels as ek
from extrope_kernels import RopeFreqs, methods, positions, scores

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
    windows: int  # stretches of 8 L bytes in the test
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


FULL = Setup(128, layers=3, heads=4, length=128, batch=16, steps=800, tune_steps=80, windows=128)
QUICK = Setup(64, layers=2, heads=2, length=32, batch=8, steps=12, tune_steps=3, windows=4)

# From q, k and v (batch, seqlen, heads, head_dim), not rotated, to the output of the heads.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Makes one for a length of text; the generator is for what is drawn.
Attention = Callable[[Setup, int, torch.Generator], Attend]


# -------------------------------------------------------------------------------------------------
# Attentions


def parameters(L: int, length: int) -> dict[str, dict]:
    """Return the parameters of each frequency method, from L and the length of the text."""
    trained, factor = {"original_max_position_embeddings": L}, {"factor": FACTOR}
    return {
        "rope": {}, "abf": {}, "pi": factor, "ntk_aware": factor, "ntk_mixed": factor,
        "ntk_by_parts": factor | trained, "yarn": factor | trained,
        "llama3": factor | trained | {"base": 10000.0},
        "dynamic_ntk": {"factor": 1.0, "max_position_embeddings": L, "seq_len": length},
        "dynamic_yarn": trained | {"seq_len": length},
        "giraffe_power": {"power": 0.5},
        "giraffe_truncation": {"truncate_pos": L},
        "cope": {"clip": 5},  # of 16 pairs: the authors' 20 of 64
        "xpos": {"scale_base": L / 2},  # the paper's 512 is half of its training length
    }  # fmt: skip


def frequencies(name: str, setup: Setup, length: int) -> RopeFreqs:
    return methods.METHODS[name](setup.head_dim, **parameters(setup.length, length)[name])


def rotated(freqs: RopeFreqs, at: Tensor | None = None) -> Attend:
    """Return causal attention over q and k rotated to positions 0, 1, 2, ... or `at`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.ops.extrope.rope_fwd(
            q, k, freqs.inv_freq, at, None, freqs.log_decay, attention_factor=freqs.attention_factor
        )
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def rotate(name: str) -> Attention:
    """Return plain attention by a frequency method."""
    return lambda setup, length, draws: rotated(frequencies(name, setup, length))


def scored(options: Callable[[int], dict], name: str = "rope") -> Attention:
    """Return attention by a score method, from L to `score` and what goes with it."""
    return lambda setup, length, draws: partial(
        ek.rope_attention, freqs=frequencies(name, setup, length), **options(setup.length)
    )


def blockwise(L: int) -> dict:
    return {"score": scores.blockwise_causal(L)}


def inverse_leaky(L: int, quarters: int = 1) -> dict:
    """Use Su's rule of thumb: a factor of 1 / (2 * expansion) and a window of L / 4."""
    return {"score": scores.leaky_rerope(quarters * L // 4, 1 / (2 * FACTOR))}


def permuteformer(setup: Setup, length: int, draws: torch.Generator) -> Attend:
    """Permute in place of rotating; decay and denominator by default."""
    permutations = ek.head_permutations(setup.heads, setup.head_dim)
    return partial(ek.permuteformer_attention, permutations=permutations)


def randomized(setup: Setup, length: int, draws: torch.Generator) -> Attend:
    """Draw positions in each layer, in training and in the test, as the authors do."""
    freqs, largest = methods.rope(setup.head_dim), 2 * FACTOR * setup.length

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = positions.randomized(length, largest, generator=draws)
        return rotated(freqs, at)(q, k, v)

    return attend


def shape(setup: Setup, length: int, draws: torch.Generator) -> Attend:
    at = positions.shape(setup.batch, length, FACTOR * length, generator=draws)
    return rotated(methods.rope(setup.head_dim), at)


def random_padding(setup: Setup, length: int, draws: torch.Generator) -> Attend:
    """Place sequences of L/2 .. L tokens at random in a row of 2 L, padded at the end in memory.

    Its `counted` is the mask of (batch, length) tokens without padding.
    """
    tokens = torch.randint(length // 2, length + 1, (setup.batch,), generator=draws)
    at, _ = positions.random_padding(setup.batch, tokens, 2 * length, generator=draws)
    attend = rotated(methods.rope(setup.head_dim), at[:, :length])
    attend.counted = torch.arange(length) < tokens[:, None]
    return attend


# -------------------------------------------------------------------------------------------------
# Trainings


@dataclass(frozen=True)
class Training:
    about: str
    attention: Attention
    starts_from: str | None = None  # weights to tune, at 8 L, instead of training anew at L
    tunings: int = 1  # times the steps of a tuning


def tuned(name: str, tunings: int = 1) -> Training:
    longer = f" for {tunings} times the steps" if tunings > 1 else ""
    about = f"rope, then tuned at 8x with {name}{longer}"
    return Training(about, rotate(name), "rope", tunings)


TUNED = ("rope", "pi", "yarn", "abf", "giraffe_power", "giraffe_truncation")
TRAININGS = {
    "rope": Training("rope", rotate("rope")),
    "xpos": Training("own: scale_base L/2", rotate("xpos")),
    "inverse_leaky": Training("own: leaky, window L/4, factor 1/16", scored(inverse_leaky)),
    "inverse_leaky_wide": Training(
        "own: leaky, window 3L/4, factor 1/16", scored(partial(inverse_leaky, quarters=3))
    ),
    "randomized": Training("own: drawn of 16 L", randomized),
    "permuteformer": Training("own", permuteformer),
    "shape": Training("own: shifts below 8 L", shape),
    "random_padding": Training("own: L/2 .. L tokens in 2 L", random_padding),
    "abf": Training("own: base 500,000", rotate("abf")),
    **{f"{name}_tuned": tuned(name) for name in TUNED},
    "pi_tuned_longer": tuned("pi", tunings=10),
}


# -------------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class Method:
    """A method as it is tested."""

    name: str
    family: str  # a panel of the plot
    trained: str  # a key of TRAININGS
    run: str
    attention: Attention

    @property
    def paper(self) -> str:
        """Return the source of the method that the name begins with."""
        first = self.name.split(",")[0]
        if first == "inverse_leaky":
            return "https://kexue.fm/archives/9728"
        own = {"rope, blockwise": scores.blockwise_causal}
        own["permuteformer"] = ek.permuteformer_attention
        known = own | methods.METHODS | scores.SCORES | vars(positions)
        return described(known.get(self.name) or known[first])[1]


def _at_test(run: str, *names: str) -> list[tuple]:
    """Return frequency methods over plain RoPE's weights."""
    return [(name, "rope", run, rotate(name)) for name in names]


def _tuned(*names: str) -> list[tuple]:
    return [(f"{name}, tuned", f"{name}_tuned", "same", rotate(name)) for name in names]


FAMILIES: dict[str, list[tuple]] = {
    "frequencies, changed at the test": [
        *_at_test("same", "rope"),
        *_at_test("factor 8", "pi", "ntk_aware", "ntk_mixed", "ntk_by_parts", "yarn", "llama3"),
        *_at_test("factor length / L", "dynamic_ntk", "dynamic_yarn"),
        *_at_test("power 0.5", "giraffe_power"),
        *_at_test("cut at L", "giraffe_truncation"),
        *_at_test("5 of 16 pairs", "cope"),
    ],
    "scores, changed at the test": [
        ("rerope", "rope", "window L/2", scored(lambda L: {"score": scores.rerope(L // 2)})),
        ("rerope, log-n", "rope", "window L/2, log-n on q",
         scored(lambda L: {"score": scores.rerope(L // 2), "log_n": L})),
        ("leaky_rerope", "rope", "window L/2, factor 16",
         scored(lambda L: {"score": scores.leaky_rerope(L // 2, 2 * FACTOR)})),
        ("self_extend", "rope", "window L/2, groups of L/4",
         scored(lambda L: {"score": scores.self_extend(L // 2, L // 4)})),
        ("dual_chunk", "rope", "chunk 3L/4, local window L/8",
         scored(lambda L: {"score": scores.dual_chunk(3 * L // 4, L // 8)})),
        # No shift brings texts past twice L into the trained range; this one is best up to that.
        ("string", "rope", "shift L, window L/8",
         scored(lambda L: {"score": scores.string(L, L // 8)})),
        ("rope, blockwise", "rope", "block L", scored(blockwise)),
    ],
    "a training of its own": [
        ("xpos", "xpos", "same", rotate("xpos")),
        ("xpos, blockwise (LEX)", "xpos", "block L", scored(blockwise, "xpos")),
        ("inverse_leaky", "inverse_leaky", "plain RoPE", rotate("rope")),
        ("inverse_leaky, wide", "inverse_leaky_wide", "plain RoPE", rotate("rope")),
        ("permuteformer", "permuteformer", "same", permuteformer),
        ("randomized", "randomized", "drawn of 16 L", randomized),
        ("shape", "shape", "plain RoPE", rotate("rope")),
        ("random_padding", "random_padding", "plain RoPE", rotate("rope")),
        ("abf", "abf", "same", rotate("abf")),
    ],
    "frequencies, tuned at 8x": [
        *_tuned(*TUNED[:2]),
        ("pi, tuned longer", "pi_tuned_longer", "same", rotate("pi")),
        *_tuned(*TUNED[2:]),
    ],
}  # fmt: skip
METHODS = {
    name: Method(name, family, *rest) for family, rows in FAMILIES.items() for name, *rest in rows
}
