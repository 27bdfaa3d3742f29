"""Factors of a model's frequencies: how a gradient moves them, a configuration that has them.

LongRoPE's paper keeps them rising from fast pairs to slow ones: https://arxiv.org/abs/2402.13753
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

_STILL = 1e30  # factor of a pair that does not rotate: no float32 tells it from that
_MOST = 0.1  # largest step of a logarithm


@dataclass(frozen=True)
class Ladder:
    """The frequencies of the layers that are extended.

    layer_type: their key in config.rope_parameters, None where all layers share one entry.
    base: rope_theta. trained: positions the model was trained on, before any scaling of its own.
    scaled: those that it reads with that, where score methods begin, which keep it.
    plain: (pairs,) float32, those of RoPE at this base.
    """

    site: RotarySite
    layer_type: str | None
    base: float
    trained: int
    scaled: int
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

    def factors(self, amplitude: float, length: int) -> PerPair:
        """Return LongRoPE by its factors, the same at every length; 1 is RoPE."""
        rest = {"attention_factor": amplitude, "seq_len": self.trained}
        names = ("short_factor", "long_factor")
        return PerPair("longrope", names, rest, self.plain * length, rises=True)

    def divisors(self, leaky: Candidate, length: int) -> PerPair:
        """Return far frequencies by their divisors; its factor for all is Leaky ReRoPE."""
        rest = {name: value for name, value in leaky.params.items() if name != "factor"}
        angles = self.plain * (length - leaky.params["window"]) / leaky.params["factor"]
        return PerPair("far_frequencies", ("divisors",), rest, angles)


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
    before = int(parameters.get("original_max_position_embeddings") or trained)
    plain = bind_method("search", "rope", {}, values_of(site, kind))[0]().inv_freq
    return Ladder(site, kind, float(parameters["rope_theta"]), before, trained, plain)


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


class NoGradient(Exception):
    """The loss of this model does not say how it depends on the frequencies."""


@dataclass(frozen=True)
class PerPair:
    """A method that takes a number for each pair of dims, whose logarithms a gradient moves.

    names: the parameters that hold the numbers. rest: the others.
    angles: (pairs,) by which each pair rotates over the farthest distance, in radians.
    rises: whether numbers may not fall from fast pairs to slow ones.
    """

    method: str
    names: tuple[str, ...]
    rest: dict[str, Any]
    angles: Tensor
    rises: bool = False

    def candidate(self, logs: Tensor) -> Candidate:
        """Return the method with these numbers: (pairs,) logarithms."""
        return Candidate(self.method, self._params(logs.exp().tolist()))

    def downhill(self, logs: Tensor, gradients: Tensor, size: float) -> Tensor:
        """Return logarithms a step down the gradients: (pairs,).

        A number moves by a tenth at most, and no pair rotates by more than a radian at the farthest
        distance: fast pairs bear a thousandth of what slow ones need. Within that, a pair goes as
        far as the gradients of single pieces agree.

        gradients: (pieces, pairs). size: of the step, 1 for all of that.
        """
        farthest = (1 / self.angles.to(logs.dtype)).clamp(max=_MOST)
        agreement = gradients.mean(0) / gradients.square().mean(0).sqrt().clamp(min=1e-30)
        found = logs - size * farthest * agreement
        return rising(found) if self.rises else found

    def gradient(
        self, model: PreTrainedModel, logs: Tensor, loss: Callable[[], Tensor]
    ) -> tuple[float, Tensor]:
        """Return the loss of the model with these numbers, and its gradient to the logarithms.

        loss: of the model as it is when called.

        Raises NoGradient where none reaches them: a model's own rotary embedding may record none.
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
    """Keep only what goes from layer to layer until the backward, which computes the rest again."""
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(forward_replaced(layer, _recomputed(layer.forward)))
        yield


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


# Types that every loader of configurations has; other frequencies are written as factors.
_EVERYWHERE = ("pi", "ntk_aware", "yarn", "llama3")


def write_config(
    model: PreTrainedModel, ladder: Ladder, candidate: Candidate, length: int, folder: Path
) -> None:
    """Write config.json of the model as a frequency method extends it, without its weights."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of the GGUF file, not of what its weights are now
    if candidate.method == "plain":
        config.save_pretrained(folder)
        return
    named = _named(ladder, candidate, length)
    with torch.device("meta"):
        shell = type(model)(config)
    with named.extending(shell) as handle:
        handle.save_pretrained(folder, length=max(length, ladder.trained), state_dict={})


def _named(ladder: Ladder, candidate: Candidate, length: int) -> Candidate:
    """Return a candidate of these frequencies that a configuration has a name for.

    A model that comes with LongRoPE may take no other type (Phi-3). Its factors are the same for
    short texts and long ones, as keys that were cached at one length have to fit at another.
    """
    own = ladder.site.parameters(ladder.layer_type).get("rope_type")
    if candidate.method in _EVERYWHERE and own != "longrope":
        return Candidate(candidate.method, {"base": ladder.base} | candidate.params)
    freqs = ladder.freqs(candidate)
    factors = ladder.factors(freqs.attention_factor, length)
    params = factors.candidate(ladder.log_factors(freqs)).params
    del params["seq_len"]
    return Candidate("longrope", params | {"factor": max(1.0, length / ladder.trained)})
