"""Factors of a model's frequencies: moves down a gradient, and a configuration with them.

Factors rise from fast pairs to slow ones, as in LongRoPE's paper: https://arxiv.org/abs/2402.13753
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import RopeFreqs
from ...integrations._shared.parameters import bind_method
from ...integrations.transformers import extend
from ...integrations.transformers.find import RotarySite, find_sites
from ...integrations.transformers.frequencies import values_of
from .. import UsageError
from ..forward import forward_replaced
from ..models import decoder_layers
from .candidates import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STILL = 1e30  # factor of a pair that does not rotate; in float32 there is no difference
_MOST = 0.1  # largest step of a logarithm


@dataclass(frozen=True)
class Ladder:
    """The frequencies of the extended layers.

    layer_type: the layers' key in config.rope_parameters; None if all layers share one entry.
    base: rope_theta.
    trained: positions that the model was trained on, without its own scaling.
    scaled: positions that it reads with its own scaling; score methods keep that, and start there.
    plain: RoPE's frequencies at this base, (pairs,) float32.
    """

    site: RotarySite
    layer_type: str | None
    base: float
    trained: int
    scaled: int
    plain: Tensor

    def freqs(self, candidate: Candidate) -> RopeFreqs:
        """Return a frequency method's frequencies for this model."""
        method = "rope" if candidate.method == "plain" else candidate.method
        values = values_of(self.site, self.layer_type)
        return bind_method("search", method, candidate.params, values)[0]()

    def log_factors(self, freqs: RopeFreqs) -> Tensor:
        """Return logarithms of the divisors of RoPE's frequencies: (pairs,) float64."""
        ratios = self.plain.double() / freqs.inv_freq.double()
        return ratios.clamp(max=_STILL).log()

    def factors(self, amplitude: float, length: int) -> PerPair:
        """Return LongRoPE with the same factors at every length; 1 is RoPE."""
        rest = {"attention_factor": amplitude, "seq_len": self.trained}
        names = ("short_factor", "long_factor")
        return PerPair("longrope", names, rest, self.plain * length, rises=True)

    def divisors(self, leaky: Candidate, length: int) -> PerPair:
        """Return far frequencies with divisors; one divisor for all pairs is Leaky ReRoPE."""
        rest = {name: value for name, value in leaky.params.items() if name != "factor"}
        angles = self.plain * (length - leaky.params["window"]) / leaky.params["factor"]
        return PerPair("far_frequencies", ("divisors",), rest, angles)


def find_ladder(model: PreTrainedModel, trained: int) -> Ladder:
    """Return the frequencies to search; raises UsageError if the model has none or several."""
    try:
        sites = find_sites(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    kinds = [(site, kind) for site in sites for kind in site.layer_types]
    if len(kinds) != 1:
        raise UsageError(f"{type(model).__name__} has {len(kinds)} sets of frequencies to extend")
    site, kind = kinds[0]
    parameters = site.parameters(kind)
    before = int(parameters.get("original_max_position_embeddings") or trained)
    plain = bind_method("search", "rope", {}, values_of(site, kind))[0]().inv_freq
    return Ladder(site, kind, float(parameters["rope_theta"]), before, trained, plain)


def rising(values: Tensor) -> Tensor:
    """Return the nearest values that never fall, by least squares: averages of neighbours."""
    blocks: list[tuple[float, int]] = []  # mean, count
    for value in values.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    return torch.tensor([mean for mean, count in blocks for _ in range(count)], dtype=values.dtype)


class NoGradient(Exception):
    """An error: the model's loss has no gradient to the frequencies."""


@dataclass(frozen=True)
class PerPair:
    """A method with a number for each pair of dims; a gradient moves the numbers' logarithms.

    names: the parameters that hold the numbers. rest: the others.
    angles: rotation of each pair over the farthest distance, in radians: (pairs,)
    rises: True if numbers may not fall from fast pairs to slow ones.
    """

    method: str
    names: tuple[str, ...]
    rest: dict[str, Any]
    angles: Tensor
    rises: bool = False

    def candidate(self, logs: Tensor) -> Candidate:
        """Return the method with the numbers of these logarithms: (pairs,)."""
        return Candidate(self.method, self._params(logs.exp().tolist()))

    def downhill(self, logs: Tensor, gradients: Tensor, size: float) -> Tensor:
        """Return logarithms one step down the gradients: (pairs,).

        A number moves by a tenth at most, and a pair's angle at the farthest distance by a radian
        at most: fast pairs bear a thousandth of the step that slow ones need. Within these limits,
        a pair moves as far as the gradients of single pieces agree.

        gradients: (pieces, pairs). size: the step's size; 1 goes to the limits.
        """
        farthest = (1 / self.angles.to(logs.dtype)).clamp(max=_MOST)
        agreement = gradients.mean(0) / gradients.square().mean(0).sqrt().clamp(min=1e-30)
        found = logs - size * farthest * agreement
        return rising(found) if self.rises else found

    def gradient(
        self, model: PreTrainedModel, logs: Tensor, loss: Callable[[], Tensor]
    ) -> tuple[float, Tensor]:
        """Return the model's loss with these numbers, and its gradient to the logarithms.

        loss: returns the model's loss in its state at the time of the call.

        Raises NoGradient if none reaches them: a model's own rotary embedding may record none.
        """
        logs = logs.detach().clone().requires_grad_()
        with extend(model, self.method, **self._params(logs.exp())), _checkpointed(model):
            value = loss()
            if not value.requires_grad:
                raise NoGradient
            (found,) = torch.autograd.grad(value, logs)
        return value.item(), found

    def _params(self, numbers: Any) -> dict[str, Any]:
        return dict.fromkeys(self.names, numbers) | self.rest


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Keep only the tensors between layers for the backward, which computes the rest again."""
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(forward_replaced(layer, _recomputed(layer.forward)))
        yield


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


# Types that every loader of configurations knows; other frequencies are written as factors.
_EVERYWHERE = ("pi", "ntk_aware", "yarn", "llama3")


def write_config(
    model: PreTrainedModel, ladder: Ladder, candidate: Candidate, length: int, folder: Path
) -> None:
    """Write the config.json, without weights, of the model extended by a frequency method."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # it describes the GGUF file, not the loaded weights
    if candidate.method == "plain":
        config.save_pretrained(folder)
        return
    named = _named(ladder, candidate, length)
    with torch.device("meta"):
        shell = type(model)(config)
    with named.extending(shell) as handle:
        handle.save_pretrained(folder, length=max(length, ladder.trained), state_dict={})


def _named(ladder: Ladder, candidate: Candidate, length: int) -> Candidate:
    """Return a candidate with these frequencies and a type that configurations have.

    A model that comes with LongRoPE may take no other type (Phi-3). Short and long texts get the
    same factors, since keys that were cached at one length must fit at another.
    """
    own = ladder.site.parameters(ladder.layer_type).get("rope_type")
    if candidate.method in _EVERYWHERE and own != "longrope":
        return Candidate(candidate.method, {"base": ladder.base} | candidate.params)
    freqs = ladder.freqs(candidate)
    factors = ladder.factors(freqs.attention_factor, length)
    params = factors.candidate(ladder.log_factors(freqs)).params
    del params["seq_len"]
    return Candidate("longrope", params | {"factor": max(1.0, length / ladder.trained)})
