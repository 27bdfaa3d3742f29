"""LongRoPE's factors for a model: where they start, how a gradient or a mutation moves them.

LongRoPE's paper keeps them rising from fast pairs to slow ones: https://arxiv.org/abs/2402.13753
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extrope_kernels import RopeFreqs
from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.search.candidates import Candidate
from extrope_kernels.integrations._shared.parameters import bind_method
from extrope_kernels.integrations.transformers.architecture import RotarySite, find_sites
from extrope_kernels.integrations.transformers.parameters import values_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STILL = 1e30  # factor of a pair that does not rotate: no float32 tells it from that
_FIRST, _MOST = 4, 0.1  # gradients before the first step; largest step of a logarithm


@dataclass(frozen=True)
class Ladder:
    """The frequencies of the layers that are extended.

    layer_type: their key in config.rope_parameters, None where all layers share one entry.
    base: rope_theta. trained: positions the model was trained on.
    plain: (pairs,) float32, those of RoPE at this base.
    """

    site: RotarySite
    layer_type: str | None
    base: float
    trained: int
    plain: Tensor

    def freqs(self, candidate: Candidate) -> RopeFreqs:
        """Return a frequency method's frequencies in this model."""
        method = "rope" if candidate.method == "plain" else candidate.method
        values = values_of(self.site, self.layer_type)
        return bind_method("search", method, candidate.params, values)[0]()

    def log_factors(self, freqs: RopeFreqs) -> Tensor:
        """Return the logarithm of what each frequency of RoPE is divided by: (pairs,) float64."""
        ratios = self.plain.double() / freqs.inv_freq.double()
        return ratios.clamp(max=_STILL).log()

    def longrope(self, log_factors: Tensor, attention_factor: float) -> Candidate:
        """Return the candidate that has these factors at every length."""
        factors = log_factors.exp().tolist()
        return Candidate(
            "longrope",
            {
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": attention_factor,
                "seq_len": self.trained,
            },
        )


def find_ladder(model: PreTrainedModel, trained: int) -> Ladder:
    """Return the frequencies to search; raises UsageError where they are none or several."""
    try:
        sites = find_sites(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    kinds = [(site, kind) for site in sites for kind in site.layer_types]
    if len(kinds) != 1:
        raise UsageError(f"{type(model).__name__} has {len(kinds)} sets of frequencies to extend")
    site, kind = kinds[0]
    parameters = site.parameters(kind)
    trained = int(parameters.get("original_max_position_embeddings") or trained)
    plain = bind_method("search", "rope", {}, values_of(site, kind))[0]().inv_freq
    return Ladder(site, kind, float(parameters["rope_theta"]), trained, plain)


def rising(values: Tensor) -> Tensor:
    """Return the nearest values that never fall, by least squares: neighbours are averaged."""
    blocks: list[tuple[float, int]] = []  # mean, count
    for value in values.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    return torch.tensor([mean for mean, count in blocks for _ in range(count)], dtype=values.dtype)


class Descent:
    """Steps down the gradient of the loss to the logarithms of the factors.

    A fast pair bears a hundredth of the step that a slow one needs. How much is told by how far
    the gradients of single texts spread: that is Fisher's information, the curvature of a
    likelihood. So a step is the mean gradient over it, a tenth at most.

    tokens: predictions that one gradient is the mean of.
    """

    def __init__(self, start: Tensor, tokens: int) -> None:
        self.log_factors = start
        self._tokens = tokens
        self._count = 0
        self._mean = torch.zeros_like(start)
        self._square = torch.zeros_like(start)

    def step(self, found: Tensor) -> None:
        """Take one text's gradient in, and go a step once there are enough to tell the spread."""
        self._count += 1
        weight = max(1 / self._count, 1 / _FIRST)
        self._mean += weight * (found - self._mean)
        self._square += max(1 / self._count, 0.1) * (found**2 - self._square)
        if self._count >= _FIRST:
            newton = self._mean / (self._tokens * self._square).clamp(min=1e-30)
            self.log_factors = rising(self.log_factors - newton.clamp(-_MOST, _MOST))


class Evolution:
    """Mutations of the best factors so far, where there is no gradient.

    A mutation moves three pairs of ten. How far adapts: twice as far after a mutation that was
    better, a fifth less after one that was not.
    """

    def __init__(self, start: Tensor, seed: int) -> None:
        self.log_factors = start
        self._random = random.Random(seed)
        self._size = 0.05

    def mutation(self) -> Tensor:
        """Return other factors to try."""
        moved = [
            self._random.gauss(0, self._size) if self._random.random() < 0.3 else 0.0
            for _ in self.log_factors
        ]
        return rising(self.log_factors + torch.tensor(moved, dtype=self.log_factors.dtype))

    def tell(self, tried: Tensor, better: bool) -> None:
        """Say whether a mutation was better than the best before it."""
        self._size *= 2.0 if better else 0.8
        if better:
            self.log_factors = tried
