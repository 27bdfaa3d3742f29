"""Frequencies written as a model's configuration, which transformers, vLLM and others load."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .candidates import Candidate
from .factors import Ladder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
