"""What llama.cpp makes of a configuration's rotation, by its converter's GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import methods

# By model_type, the classes for which the converter writes a tensor of factors.
_LLAMA3 = ("llama", "mistral", "mixtral", "arcee", "smollm3", "apertus", "granite", "exaone4")
_LONGROPE = ("phi3", "phimoe")


def lost_in_gguf(config: Any, layer_type: str | None) -> str | None:
    """Return what of a rotation a GGUF file does not have, in a few words; None if it has all.

    As of llama.cpp b11434, whose converter and library read less than transformers.

    config: of the language model, as transformers has standardized it.
    layer_type: the kind of layers, None if all rotate alike.
    """
    rope: Mapping[str, Any] = config.rope_parameters
    rope = rope if layer_type is None else rope[layer_type]
    kind = rope.get("rope_type", "default")
    written = {"llama3": _LLAMA3, "longrope": _LONGROPE}
    if kind in ("default", "linear"):
        return None
    if kind not in ("yarn", *written):
        return f"its frequencies, of type {kind}"
    if config.model_type not in written.get(kind, (config.model_type,)):
        return f"its frequencies: of type {kind} only {', '.join(written[kind])} have them"
    if kind == "yarn" and rope.get("truncate") is False:
        return "truncate=False: the ramp of its YaRN is rounded to whole pairs"
    if kind == "llama3":
        return None
    stated = methods.from_hf_config(config, layer_type=layer_type).attention_factor
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn":
        read = 1 + 0.1 * math.log(max(1.0, rope["factor"]))
    else:
        factor = max(1.0, config.max_position_embeddings / original)
        read = math.sqrt(1 + math.log(factor) / math.log(original))
    if math.isclose(stated, read, rel_tol=1e-6):
        return None
    return f"its attention factor {stated:.5g}: llama.cpp takes {read:.5g}"
