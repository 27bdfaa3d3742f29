"""Frequencies of a model: factors, how a gradient moves them, a configuration that has them.

LongRoPE's paper keeps them rising from fast pairs to slow ones: https://arxiv.org/abs/2402.13753
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import RopeFreqs
from ...integrations._shared.parameters import bind_method
from ...integrations.transformers.find import RotarySite, find_sites
from ...integrations.transformers.frequencies import values_of
from .. import UsageError
from .candidates import Candidate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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


class Descent:
    """Steps down the gradient of the loss to the logarithms of the factors.

    In a step a factor moves by a tenth at most, and no pair rotates by more than a radian at the
    farthest distance: fast pairs bear a thousandth of what slow ones need. Within that, a pair
    goes as far as the gradients of single texts agree. After a step that is not better the next
    is a quarter as far.

    angles: (pairs,) by which each pair rotates over the whole length, in radians.
    """

    def __init__(self, start: Tensor, angles: Tensor) -> None:
        self.log_factors = start
        self._farthest = (1 / angles.to(start.dtype)).clamp(max=_MOST)
        self._size = 1.0

    def step(self, gradients: Tensor) -> Tensor:
        """Return the factors to try: (pairs,). gradients: (texts, pairs)"""
        agreement = gradients.mean(0) / gradients.square().mean(0).sqrt().clamp(min=1e-30)
        return rising(self.log_factors - self._size * self._farthest * agreement)

    def tell(self, tried: Tensor, better: bool) -> None:
        """Say whether a step was better than where it started."""
        self._size = min(1.0, 2 * self._size) if better else self._size / 4
        if better:
            self.log_factors = tried


def write_config(
    model: PreTrainedModel, ladder: Ladder, candidate: Candidate, length: int, folder: Path
) -> Path:
    """Write config.json of the model as a frequency method extends it, and return its path."""
    config = copy.deepcopy(model.config)
    if candidate.method != "plain":  # whose own scaling may depend on max_position_embeddings
        _extend(config, ladder, candidate, length)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of the GGUF file, not of what its weights are now
    config.save_pretrained(folder)
    return folder / "config.json"


def _extend(config: PretrainedConfig, ladder: Ladder, candidate: Candidate, length: int) -> None:
    text = config.get_text_config()
    changed = rope_parameters(ladder, candidate, length)
    kept = {
        name: value
        for name, value in ladder.site.parameters(ladder.layer_type).items()
        if name == "partial_rotary_factor"
    }
    if ladder.layer_type is None:
        text.rope_parameters = kept | changed
    else:
        text.rope_parameters = {**text.rope_parameters, ladder.layer_type: kept | changed}
    text.max_position_embeddings = max(length, ladder.trained)


def rope_parameters(ladder: Ladder, candidate: Candidate, length: int) -> dict[str, Any]:
    """Return the entries of config.rope_parameters that yield a candidate's frequencies.

    By their own type where every loader has it; else as longrope, whose factors per pair can be any
    method's. They are the same for short texts and long ones, as keys that were cached at one
    length have to fit at another. A model that comes with LongRoPE may take no other type (Phi-3).
    """
    method, given = candidate.method, candidate.params
    kept = {"rope_theta": ladder.base}
    if ladder.site.parameters(ladder.layer_type).get("rope_type") == "longrope":
        method = "longrope"
    if method == "pi":
        return {"rope_type": "linear", **kept, "factor": given["factor"]}
    if method == "ntk_aware":
        dim = 2 * len(ladder.plain)
        theta = ladder.base * given["factor"] ** (dim / (dim - 2))
        return {"rope_type": "default", "rope_theta": theta}
    kept["original_max_position_embeddings"] = ladder.trained
    if method == "yarn":
        return {"rope_type": "yarn", **kept, **given}
    if method == "llama3":
        ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return {"rope_type": "llama3", **kept, **ends, **given}
    return {"rope_type": "longrope", **kept, **_longrope(ladder, candidate, length)}


def _longrope(ladder: Ladder, candidate: Candidate, length: int) -> dict[str, Any]:
    freqs = ladder.freqs(candidate)
    if candidate.method == "longrope":
        factors = candidate.params["long_factor"]
    else:
        factors = ladder.log_factors(freqs).exp().tolist()
    factor = max(1.0, length / ladder.trained)
    amplitude = freqs.attention_factor
    entries = {
        "short_factor": factors,
        "long_factor": factors,
        "factor": factor,
        "attention_factor": amplitude,
    }
    usual = math.sqrt(1 + math.log(factor) / math.log(ladder.trained))
    if not math.isclose(amplitude, usual, rel_tol=1e-6):
        # vLLM, which does not read attention_factor, has it by these names.
        entries |= {"short_mscale": amplitude, "long_mscale": amplitude}
    return entries
