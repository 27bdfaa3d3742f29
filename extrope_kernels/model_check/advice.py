"""Advice for a length: a method to try first, the reason, and a line for each engine."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import methods
from ..integrations._shared.choice import Choice, choose_method, images_refused
from ..integrations._shared.saved import SAVED
from ..scores import SCORES
from .facts import Facts
from .source import Source, with_one_axis

PAGE = "docs/guide/measured.md"
_ENGINES = ("transformers", "vLLM", "SGLang", "LMDeploy", "llama.cpp")
_BY_KIND = "cannot be told, as far as known, to scale the full layers alone"
# Why no configuration of such a model yields YaRN's frequencies, by its rope_type.
_LEFT_OUT = {
    "longrope": "left out: a model with LongRoPE may load no other type; extend serves it",
    "proportional": "left out: no other rope_type rotates a part of a head as proportional does",
}
_TRAINED_UNDER = (
    "left out: no rope_parameters scale the {} that the model was trained with; extend does"
)
_OF_IMAGES = (
    "; with images or video YaRN's factor is to be smaller: Qwen advises 2 to 3 where text takes 4"
)
# The rope_parameters that YaRN replaces.
_SCALING = ("factor", "rope_type", "type", "alpha")


@dataclass(frozen=True)
class Advice:
    """A method to try at a length; `first` is None if nothing is needed.

    why: sentences. rope_parameters: for a configuration. lines: by engine, the command or code for
    the method, or that it has none.
    """

    length: int
    first: str | None
    why: str
    rope_parameters: Mapping[str, Any]
    lines: Mapping[str, str]


def advise(model: str, source: Source, facts: Facts, length: int) -> Advice:
    """Advise on `length` tokens: as the folder was saved, or as `extend(model, length=)` does."""
    saved = source.saved
    if saved is not None and not saved.in_config and saved.reaches(length):
        lines = {
            "extend": f"extend_from_saved(model, {model!r})",
            "vLLM, our plugin": f"vllm serve {shlex.quote(model)} --max-model-len {length}",
        }
        return Advice(length, str(saved), f"as the folder was saved ({SAVED})", {}, lines)
    why = None
    if length <= facts.reach:
        why = f"{length:,} tokens are within the {facts.reach:,} that the model is made for"
    elif facts.scores.layers == "all":
        why = "no layer that rotates sees past its window or chunk; its distances are all trained"
    if why is not None:
        return Advice(length, None, why, {}, {})
    first = _choose(source, facts, length)
    factor = length / facts.length.trained
    more = "; more than its factor for far details" if first.method == "yarn" else ""
    why = f"{first.reason}{more} ({PAGE})"
    if any(each.sections for each in facts.rotations):
        why += _OF_IMAGES
    given = "".join(f", {name}={value!r}" for name, value in first.parameters.items())
    served = "MODEL" if source.gguf or Path(model).is_file() else shlex.quote(model)
    lines = {
        "extend": f'extend(model, "{first.method}"{given})',
        "vLLM, our plugin": f"vllm serve {served} --max-model-len {length} "
        """--additional-config '{"extrope": "auto"}'""",
    }
    numbers = (
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in first.parameters.items()
    )
    name = " ".join([first.method, *numbers])
    if left_out := _left_out(source, facts):
        return Advice(length, name, why, {}, lines | dict.fromkeys(_ENGINES, left_out))
    parameters = _rope_parameters(source, facts, factor)
    note = f"  # yarn: no {first.method} here" if first.method in SCORES else ""
    for engine, line in _lines(served, source, facts, length, factor).items():
        lines[engine] = line + note * ("$ROPE" in line or "--rope" in line)
    if not _is_built(source, parameters, facts.full_kind):
        cls = type(source.config).__name__
        lines["transformers"] = f"left out: transformers builds no YaRN of this {cls}, extend does"
    return Advice(length, name, why, parameters, lines)


def _choose(source: Source, facts: Facts, length: int) -> Choice:
    """Return the method to try first."""
    chunks = source.stated.get("dual_chunk_attention_config")
    refused = facts.scores.refused
    if refused is None and source.whole is not source.config:
        rope = source.config.rope_parameters
        kinds = [rope]
        if source.reads_by_kind:
            kinds += [each for each in rope.values() if isinstance(each, Mapping)]
        refused = images_refused(kinds, source.sees_both_ways())
    chosen = choose_method(
        length,
        facts.length.trained,
        facts.reach,
        refused=refused,
        chunks=isinstance(chunks, Mapping) and {"chunk_size", "local_size"} <= set(chunks),
    )
    assert chosen is not None  # `advise` has answered for lengths that the model reaches
    return chosen


def _rope_parameters(source: Source, facts: Facts, factor: float) -> dict[str, Any]:
    """Return config.rope_parameters with YaRN for the layers that see all tokens."""
    old = facts.rope_parameters
    passed_over = _SCALING if facts.full_kind else (*_SCALING, *methods.stray(source.config, False))
    kept = {k: v for k, v in old.items() if v is not None and k not in passed_over}
    kept |= {"original_max_position_embeddings": facts.length.trained}
    new = {"rope_type": "yarn", "factor": factor, **kept}
    if facts.full_kind is None:
        return new
    own = source.config.rope_parameters
    kinds = {k: v for k, v in own.items() if v is None or isinstance(v, Mapping)}
    return {**kinds, facts.full_kind: new}


def _left_out(source: Source, facts: Facts) -> str | None:
    """Return why no rope_parameters with YaRN are known, or None."""
    several = any(isinstance(each, Mapping) for each in facts.rope_parameters.values())
    if several and source.reads_by_kind:
        return "left out: none of its kinds of layers is known to be the one that sees all tokens"
    rope_type = facts.rope_parameters.get("rope_type", "default")
    if rope_type in _LEFT_OUT:
        return _LEFT_OUT[rope_type]
    config = with_one_axis(source.config, source.reads_by_kind)
    over = methods.trained(config, layer_type=facts.full_kind).inv_freq
    base = facts.rope_parameters.get("rope_theta") or 10000.0
    plain = torch.equal(over, methods.rope(2 * len(over), base=base).inv_freq)
    return None if plain else _TRAINED_UNDER.format(rope_type)


def _is_built(source: Source, parameters: Mapping[str, Any], kind: str | None) -> bool:
    """Return True if transformers builds YaRN of the configuration with these rope_parameters.

    Phi-3's class knows LongRoPE alone; others need a head_dim, which some files lack (Mixtral).
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {**source.config.to_dict(), "rope_parameters": copy.deepcopy(parameters)}
    try:
        config = type(source.config).from_dict(given)
        ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), layer_type=kind)
    except Exception:  # each class has its own rules, and its own errors
        return False
    return True


def _lines(model: str, source: Source, facts: Facts, length: int, factor: float) -> dict[str, str]:
    """Return each engine's line for YaRN; $ROPE stands for the rope_parameters."""
    inner, several = source.config is not source.whole, facts.full_kind is not None

    def override(key: str, more: str = "") -> str:
        entry = f'{{\\"{key}\\": $ROPE{more}}}'
        return f'"{{\\"text_config\\": {entry}}}"' if inner else f'"{entry}"'

    where = "config.json, text_config:" if inner else "config.json:"
    former = ' in place of "rope_scaling"' if source.stated.get("rope_scaling") else ""
    # With it vLLM would build the rotary layer of a backend that it no longer has.
    chunks = ', \\"dual_chunk_attention_config\\": null'
    chunks *= "dual_chunk_attention_config" in source.stated
    by_sglang = override("rope_parameters" if inner or several else "rope_scaling")
    lines = (
        f'{where} "rope_parameters": $ROPE{former}, "max_position_embeddings": {length}',
        f"vllm serve {model} --max-model-len {length} --hf-overrides "
        + override("rope_parameters", chunks),
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 python -m sglang.launch_server "
        f"--model-path {model} --context-length {length} --json-model-override-args {by_sglang}",
        f"lmdeploy serve api_server {model} --session-len {length} "
        f"--hf-overrides {override('rope_scaling')}",
        f"llama-server -m MODEL.gguf -c {length} --rope-scaling yarn "
        f"--rope-scale {factor:g} --yarn-orig-ctx {facts.length.trained}",
    )
    told = dict(zip(_ENGINES, lines, strict=True))
    return told | dict.fromkeys(("LMDeploy", "llama.cpp"), _BY_KIND) if several else told
