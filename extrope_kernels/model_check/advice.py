"""Advice for a length: a method to try first, the reason, and a line for each engine."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..evaluation.options import method_params
from ..evaluation.packages import PACKAGES
from ..evaluation.report import name_of
from ..integrations._shared.choice import choose_method
from ..integrations._shared.parameters import trained_in
from ..integrations.vllm.auto import choose_entry
from ..integrations.vllm.dual_chunks import adopt_dual_chunk_config
from ..integrations.vllm.engine import make_engine
from ..integrations.vllm.latent import adopt_scaling
from ..integrations.vllm.settings import AUTO, NAME
from ..scores import SCORES
from .facts import Facts
from .source import Source

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


@dataclass(frozen=True)
class Candidate:
    """A method and its parameters for `extend`."""

    method: str
    params: dict[str, Any]

    @property
    def name(self) -> str:
        return name_of(self.method, self.params)

    @property
    def call(self) -> str:
        """The line of Python that extends a model by this candidate."""
        given = "".join(f", {name}={value!r}" for name, value in self.params.items())
        return f'extend(model, "{self.method}"{given})'


def advise(model: str, source: Source, facts: Facts, length: int) -> Advice:
    """Advise on `length` tokens."""
    trained, reach = facts.length.trained, facts.reach
    why = None
    if length <= reach:
        why = f"{length:,} tokens are within the {reach:,} that the model is made for"
    elif facts.scores.layers == "all":
        why = "no layer that rotates sees past its window or chunk; its distances are all trained"
    if why is not None:
        return Advice(length, None, why, {}, {})
    yarn = _candidate("yarn", length, reach, trained)
    first, why = _choose(source, facts, length, yarn)
    served = "MODEL" if model in PACKAGES or Path(model).is_file() else shlex.quote(model)
    lines = {"extend": first.call, "vLLM, our plugin": _plugin_line(served, source, length, first)}
    if left_out := _left_out(source, facts.rope_parameters):
        return Advice(length, first.name, why, {}, lines | dict.fromkeys(_ENGINES, left_out))
    parameters = _rope_parameters(source, facts, yarn)
    note = f"  # yarn: no {first.method} here" if first.method in SCORES else ""
    for engine, line in _lines(served, source, facts, length, yarn).items():
        lines[engine] = line + note * ("$ROPE" in line or "--rope" in line)
    if not _is_built(source, parameters, facts.full_kind):
        name = type(source.config).__name__
        lines["transformers"] = f"left out: transformers builds no YaRN of this {name}, extend does"
    return Advice(length, first.name, why, parameters, lines)


def _choose(source: Source, facts: Facts, length: int, yarn: Candidate) -> tuple[Candidate, str]:
    """Return the method to try first, and why."""
    trained, reach = facts.length.trained, facts.reach
    chunks = source.stated.get("dual_chunk_attention_config")
    refused = "see below" if facts.scores.layers is None else None
    if source.whole is not source.config and _axes(facts):  # as in `extend(model, length=)`
        refused = "tokens of images have several positions"
    chosen = choose_method(
        length,
        trained,
        reach,
        refused=refused,
        chunks=isinstance(chunks, Mapping) and {"chunk_size", "local_size"} <= set(chunks),
    )
    assert chosen is not None  # `advise` has answered for lengths that the model reaches
    if chosen.method == "yarn":
        why = f"{chosen.reason}; more than its factor for far details ({PAGE})"
        return yarn, why + _of_images(facts)
    first = Candidate(chosen.method, dict(chosen.parameters))
    return first, f"{chosen.reason} ({PAGE}){_of_images(facts)}"


def _axes(facts: Facts) -> bool:
    return any(each.sections for each in facts.rotations)


def _of_images(facts: Facts) -> str:
    """Return what is known of YaRN for tokens with several positions (mRoPE)."""
    if not _axes(facts):
        return ""
    return (
        "; with images or video YaRN's factor is to be smaller: Qwen advises 2 to 3 where text "
        "takes 4"
    )


def _candidate(method: str, length: int, reach: int, trained: int) -> Candidate:
    return Candidate(method, method_params(method, length, reach, trained))


def _rope_parameters(source: Source, facts: Facts, yarn: Candidate) -> dict[str, Any]:
    """Return config.rope_parameters with YaRN for the layers that see all tokens."""
    old = facts.rope_parameters
    kept = {k: v for k, v in old.items() if v is not None and k not in _SCALING}
    kept |= {"original_max_position_embeddings": facts.length.trained}
    new = {"rope_type": "yarn", **yarn.params, **kept}
    if facts.full_kind is None:
        return new
    return {**source.config.rope_parameters, facts.full_kind: new}


def _left_out(source: Source, rope_parameters: Mapping[str, Any]) -> str | None:
    """Return why no rope_parameters with YaRN are known, or None."""
    if any(isinstance(each, Mapping) for each in rope_parameters.values()):
        return "left out: none of its kinds of layers is known to be the one that sees all tokens"
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type not in _LEFT_OUT and trained_in(source.config, None, rope_parameters, 2):
        return _TRAINED_UNDER.format(rope_type)
    return _LEFT_OUT.get(rope_type)


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


def _lines(
    model: str, source: Source, facts: Facts, length: int, yarn: Candidate
) -> dict[str, str]:
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
        f"--rope-scale {yarn.params['factor']:g} --yarn-orig-ctx {facts.length.trained}",
    )
    told = dict(zip(_ENGINES, lines, strict=True))
    return told | dict.fromkeys(("LMDeploy", "llama.cpp"), _BY_KIND) if several else told


def _plugin_line(model: str, source: Source, length: int, first: Candidate) -> str:
    """Return vLLM's line with what our plugin makes of "auto" for such an engine."""
    config = _engine_config(source, length)
    try:
        said = choose_entry(config, lambda _: None) or ""
        chosen = json.dumps(config.additional_config)
        if NAME in config.additional_config:  # as the plugin goes on
            adopt_dual_chunk_config(config)
            adopt_scaling(config)
            make_engine(config)
    except (TypeError, ValueError) as error:
        return f"refused: {str(error).removeprefix(f'{NAME}: ')}"
    line = f"vllm serve {model} --max-model-len {length}"
    if NAME not in config.additional_config:  # vLLM heeds a scaling that transformers ignores
        return line
    _, refused, reason = said.partition("no score method: ")
    note = f"  # no {first.method} here: {reason}" if refused and first.method in SCORES else ""
    return f"{line} --additional-config '{chosen}'{note}"


class _Unset(SimpleNamespace):
    """A configuration without settings: every attribute is None."""

    def __getattr__(self, name: str) -> None:
        return None


def _engine_config(source: Source, length: int) -> Any:
    """Return the parts of vLLM's configuration that the plugin reads, with "auto"."""
    text, sees = copy.copy(source.config), source.config is not source.whole
    several = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
    model = _Unset(
        hf_text_config=text,
        hf_config=text,
        is_multimodal_model=sees,
        supports_multimodal_inputs=sees,
        uses_mrope=several,
        architecture=(source.whole.architectures or [type(text).__name__])[0],
        using_transformers_backend=lambda: False,
        runner_type="generate",
        max_model_len=length,
        dtype=torch.bfloat16,
    )
    parallel = _Unset(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    cache = _Unset(cache_dtype="auto")
    return SimpleNamespace(
        additional_config={NAME: AUTO},
        model_config=model,
        parallel_config=parallel,
        cache_config=cache,
        speculative_config=None,
    )
