"""Models without their weights: on the meta device, and small random ones to try a method on."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..integrations.transformers.probe.rotary import find_rotary_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Parts of the names of sizes that do not concern attention.
_WIDTHS = ("intermediate", "ffn", "expert_dim", "shared_expert")
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "index_n_heads": 2,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),  # state spaces pad to it
}
_HANG_TOGETHER = ("num_kv_shared_layers", "is_heterogeneous")
_WORDS = 256
_LARGEST = 1 << 29  # parameters of a small model, in float32


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a configuration's language model without values: any size takes seconds."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM.from_config(config)
        return _part_for(config)(config)


def _part_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the headless class of the language model beside vision and audio towers."""
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    for each in vars(importlib.import_module(name)).values():
        if isinstance(each, type) and issubclass(each, PreTrainedModel):
            takes = inspect.signature(each.forward).parameters
            if each.config_class is type(config) and {"input_ids", "inputs_embeds"} <= set(takes):
                return each
    raise ValueError(f"transformers has no language model for {type(config).__name__}")


def small_ones(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yield small models of random weights with layers like those of `model`.

    They keep the dims of a head, the query heads per key head, and the first of the layers that
    `alike` tells apart. They have fewer heads, words, experts and dims between the layers. Models
    that cannot be built so are left out.
    """
    count = max(alike(model)) + 1
    for take_heads in (_few_narrow_heads, _few_heads, _all_heads):
        config = copy.deepcopy(model.config)
        try:
            _shrink(config)
            _take_layers(config, count)
            take_heads(config)
            meta = on_meta(config)
            if sum(parameter.numel() for parameter in meta.parameters()) > _LARGEST:
                continue
            torch.manual_seed(0)
            small = type(meta)(config).float().eval()
            _vary(small)
        except Exception:  # a foreign configuration may raise anything for other sizes
            continue
        if rotary_dims(small) == rotary_dims(model):
            yield small


@torch.no_grad()
def _vary(model: PreTrainedModel) -> None:
    """Change weights of norms: ones would hide a norm after the rotation, large ones round."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2).mul_(0.1)


def alike(model: PreTrainedModel) -> list[int]:
    """Return for each layer the first layer like it.

    Layers are alike if they have the same modules and the same entries in the configuration's
    lists. A layer that depends on others is like itself only.
    """
    config, count = model.config, model.config.num_hidden_layers
    stacks = (each for each in model.modules() if isinstance(each, nn.ModuleList))
    layers = next((each for each in stacks if len(each) == count), None)
    if layers is None or any(getattr(config, name, 0) for name in _HANG_TOGETHER):
        return list(range(count))
    lists = _of_layers(config).values()
    kinds = [_made_of(layer) + repr([each[n] for each in lists]) for n, layer in enumerate(layers)]
    return [kinds.index(kind) for kind in kinds]


def _made_of(layer: nn.Module) -> str:
    """Return a layer's modules with their sizes and switches, except the layer's number."""
    return repr(
        [
            (name, type(part), sorted((k, v) for k, v in vars(part).items() if _tells(k, v)))
            for name, part in layer.named_modules()
        ]
    )


def _tells(name: str, value: Any) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str)
    return plain and "idx" not in name and not name.startswith("_")


def _of_layers(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the lists that have an entry for each layer."""
    found = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return {name: [*each] for name, each in found.items() if len(each) == config.num_hidden_layers}


def _take_layers(config: PreTrainedConfig, count: int) -> None:
    if count < config.num_hidden_layers:
        shortened = {name: each[:count] for name, each in _of_layers(config).items()}
        for name, value in {"num_hidden_layers": count, **shortened}.items():
            setattr(config, name, value)


def rotary_dims(model: PreTrainedModel) -> list[int]:
    """Return the number of dims that each rotary embedding's frequencies rotate."""
    sites = find_rotary_modules(model, "all")
    return [site.dim(kind) for site in sites for kind in site.layer_types]


def _shrink(config: PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if name.endswith("_token_id"):
            setattr(config, name, _WORDS - 1)
        elif name.startswith("vocab_size"):
            setattr(config, name, _WORDS)
        elif name in _AT_MOST:
            setattr(config, name, min(value, _AT_MOST[name]))
        elif any(part in name for part in _WIDTHS):
            setattr(config, name, min(value, 64))


def _few_narrow_heads(config: PreTrainedConfig) -> None:
    if not getattr(config, "head_dim", None):
        raise ValueError("dims of a head come from hidden_size")
    _few_heads(config)
    config.hidden_size = 8 * config.num_attention_heads


def _few_heads(config: PreTrainedConfig) -> None:
    """Keep a group of query heads and their key head, or two heads if each has its own."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = 2 if heads == keys else heads // keys
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 2 if heads == keys else 1
    config.hidden_size = each * config.num_attention_heads


def _all_heads(config: PreTrainedConfig) -> None:
    """Keep all heads if the configuration's sizes depend on one another."""
