"""A configuration with the frequencies that a search found, for programs without `extend`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...integrations._shared.parameters import bind_method
from ...integrations.transformers.find import RotarySite, find_sites
from ...integrations.transformers.frequencies import values_of
from .. import UsageError
from ..models import unscaled_length
from .candidates import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STILL = 1e30  # factor of a pair that does not rotate; in float32 there is no difference
# Types that every loader of configurations knows; other frequencies are written as factors.
_EVERYWHERE = ("pi", "ntk_aware", "yarn", "llama3")


def find_site(model: PreTrainedModel) -> RotarySite:
    """Return the rotation to extend; raises UsageError if the model has none or several."""
    try:
        sites = find_sites(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    kinds = [kind for site in sites for kind in site.layer_types]
    if len(kinds) != 1:
        raise UsageError(f"{type(model).__name__} has {len(kinds)} sets of frequencies to extend")
    return sites[0]


def write_config(
    model: PreTrainedModel, site: RotarySite, candidate: Candidate, length: int, folder: Path
) -> None:
    """Write the config.json, without weights, of the model extended by a frequency method."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # it describes the GGUF file, not the loaded weights
    if candidate.method == "plain":
        config.save_pretrained(folder)
        return
    trained = unscaled_length(model)
    named = _named(site, candidate, max(1.0, length / trained))
    with torch.device("meta"):
        shell = type(model)(config)
    with named.extending(shell) as handle:
        handle.save_pretrained(folder, length=max(length, trained), state_dict={})


def _named(site: RotarySite, candidate: Candidate, factor: float) -> Candidate:
    """Return a candidate with these frequencies and a type that configurations have.

    A model that comes with LongRoPE may take no other type (Phi-3). Short and long texts get the
    same factors, since keys that were cached at one length must fit at another.
    """
    (kind,) = site.layer_types
    parameters = site.parameters(kind)
    if candidate.method in _EVERYWHERE and parameters.get("rope_type") != "longrope":
        base = float(parameters["rope_theta"])
        return Candidate(candidate.method, {"base": base} | candidate.params)
    values = values_of(site, kind)
    plain = bind_method("search", "rope", {}, values)[0]()
    freqs = bind_method("search", candidate.method, candidate.params, values)[0]()
    ratios = plain.inv_freq.double() / freqs.inv_freq.double()
    factors = ratios.clamp(max=_STILL).tolist()
    params = {"short_factor": factors, "long_factor": factors, "factor": factor}
    return Candidate("longrope", params | {"attention_factor": freqs.attention_factor})
