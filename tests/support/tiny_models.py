"""Every rotary class of the installed transformers, tiny and random, from its own config class.

Sizes come from one table, by the names that config classes share; where a class names things
differently, `PER_CLASS` says so. Layers of every kind that a class has by default are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

HEAD_DIM = 16
TRAINED = 64  # tokens
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("n_layers", "depth", "no_rope_layer_interval"), 2),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), TRAINED),
    # Large enough for the attention to depend on positions as that of a trained model does.
    "initializer_range": 0.2,
    "head_dim": HEAD_DIM,
    # Longer than what the tests generate, shorter than what they are trained on.
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 24),
    "local_attention": 48,
    # Experts.
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "moe_hidden_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "shared_experts_intermediate_size",
            "expert_ffn_hidden_size",
            "share_expert_dim",
            "dense_intermediate_size",
        ),
        32,
    ),
    # Latent attention and indexers.
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "index_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "o_lora_rank"), 16),
    "v_head_dim": 24,
    "index_n_heads": 2,
    # Linear attention and state spaces.
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_chunk_size"), 16),
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    # Others.
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "rotary_dim"), 16),
    "patch_size": 8,
    "image_size": 32,
}
TOKEN = 100  # every special token that a class has
# By config class: settings beside those above.
PER_CLASS: dict[str, dict[str, Any]] = {
    "Apertus1p5TextConfig": {"vocab_size": 266440},  # with tokens of images and sounds
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 100},
    "BltLocalDecoderConfig": {"hidden_size_global": 64},
    "BltLocalEncoderConfig": {"hidden_size_global": 64},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "DeepseekV4Config": {"partial_rotary_factor": 0.5},
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "global_head_dim": 2 * HEAD_DIM,
    },
    "Dots3NoteVisionConfig": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "Dots3NoteAudioConfig": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/2",
    },
    "GraniteDoclingVisionConfig": {"out_hidden_size": 64},
    "Kolibri1_1Config": {
        "layer_types": ["sliding_attention", "indexed_attention"],
        "num_hidden_layers": 2,
        "index_layers": [1],
        "kv_source_layers": [0, 1],
        "index_num_heads": 2,
    },
    "LlavaOnevision15VisionConfig": {"out_hidden_size": 64},
    "MistralLarge4TextConfig": {"kv_source_layers": [0, 1], "indexer_types": ["full", "full"]},
    "MiMoV2FlashConfig": {"head_dim": 32},
    # Its unscaled frequencies are for the whole head, of which it rotates a part: YaRN by 1.
    "Mistral4Config": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 1.0,
            "original_max_position_embeddings": TRAINED,
            "max_position_embeddings": TRAINED,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        }
    },
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MuseSparkAudioConfig": {"out_hidden_size": 64},
    "PerceptionLMConfig": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"embed_dim": 192},
        }
    },
    "PaddleOCRTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    },
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": TOKEN, "audio_start_token_id": TOKEN},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": TOKEN, "audio_start_token_id": TOKEN},
    "Qwen2_5OmniAudioEncoderConfig": {"encoder_attention_heads": 4, "d_model": 64},
    "Qwen3OmniMoeAudioEncoderConfig": {"encoder_attention_heads": 4, "d_model": 64},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 1000,
    },
    "ChameleonConfig": {"vocabulary_map": {"<image>": TOKEN}},
    "DeepseekV2Config": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": TOKEN}},
    "GraniteMoeHybridConfig": {
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
        "position_embedding_type": "rope",
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "Step3p7TextConfig": {"sliding_window": 24},
    "WavTokenizerEncoderConfig": {"codebook_dim": 64},
    # time_step_min: its step with a cache has no lower limit, its chunks have.
    "Zamba2Config": {
        "time_step_min": 1e-6,
        "use_mem_rope": True,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_d_state": 16,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
    "FalconH1Config": {"mamba_d_ssm": 128},
    "FastVlmConfig": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "resnet10t",
            "hidden_size": 512,
        }
    },
    "Gemma4TextConfig": {"global_head_dim": 2 * HEAD_DIM},
    "Gemma4AssistantConfig": {"hidden_size_per_layer_input": 0},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 2 * HEAD_DIM},
}


def rotary_classes() -> dict[str, type[PreTrainedConfig]]:
    """Return the causal and image-text classes with rotary parameters, and their config classes."""
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    found: dict[str, type[PreTrainedConfig]] = {}
    for table in tables:
        for names in table.values():
            for name in [names] if isinstance(names, str) else names:
                cls = getattr(transformers, name).config_class
                if name not in found and cls is not None and _is_rotary(cls):
                    found[name] = cls
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def build(name: str, **settings: Any) -> nn.Module:
    """Return the class `name` of transformers as a tiny model in float32, the same every time."""
    cls = getattr(transformers, name)
    return random(cls, tiny_config(cls.config_class, **settings))


def random(cls: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """Return a model of the class with random weights in float32, the same every time."""
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that do nothing would hide where a model rotates
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tiny_config(cls: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """Return a config of the class with small sizes, and with these settings."""
    return cls(**_settings(cls, _default(cls)) | settings)


def _default(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    return cls(**PER_CLASS.get(cls.__name__, {}))


def _is_rotary(cls: type[PreTrainedConfig]) -> bool:
    """Say so of the language model: vision towers with a rotation are left alone."""
    try:
        config = _default(cls).get_text_config(decoder=True)
    except Exception:  # of a class that only goes with another model
        return False
    return bool(getattr(config, "rope_parameters", None))


def _settings(cls: type[PreTrainedConfig], default: PreTrainedConfig) -> dict[str, Any]:
    names = {*inspect.signature(cls).parameters}
    default.allow_global_per_layer_attribute_access = True
    found = dict(_sizes(default, names)) | _layers(default, names)
    if not hasattr(default, "pad_token_id"):  # which some models read, in transformers 5.0
        found["pad_token_id"] = 0
    if "eos_token_id" in names:
        found["eos_token_id"] = None
    if "rope_parameters" in names and getattr(default, "rope_parameters", None):
        found["rope_parameters"] = _rope(cls, default, found)
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            found[name] = {"model_type": part.model_type, **_settings(type(part), part)}
    return found | PER_CLASS.get(cls.__name__, {})


def _sizes(default: PreTrainedConfig, names: set[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        value = getattr(default, name, None)
        if name == "head_dim":
            yield name, HEAD_DIM
        if name == "num_key_value_heads":
            heads = getattr(default, "num_attention_heads", value)
            yield name, SIZES["num_attention_heads"] if value in (heads, None) else min(value, 2)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name in SIZES:
            yield name, SIZES[name]
        elif name.endswith("token_id"):
            yield name, {"pad_token_id": 0, "bos_token_id": 1}.get(name, TOKEN)


def _layers(default: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Two layers, or one of each kind, the full ones last; lists of one entry a layer follow.

    As many again that reuse keys and values, where a class has such.
    """
    layers = getattr(default, "num_hidden_layers", None)
    if "num_hidden_layers" not in names or not isinstance(layers, int):
        return {}
    found: dict[str, Any] = {"num_hidden_layers": 2}
    kinds = getattr(default, "layer_types", None)
    if "layer_types" in names and kinds:
        each = sorted(dict.fromkeys(kinds), key=lambda kind: kind == "full_attention")
        each = each if len(each) > 1 else 2 * each
        if "num_kv_shared_layers" in names:
            found["num_kv_shared_layers"] = len(each)
            each = 2 * each
        found |= {"num_hidden_layers": len(each), "layer_types": each}
    for name in names - found.keys():
        value = getattr(default, name, None)
        if isinstance(value, (list, tuple)) and len(value) == layers > 2:
            kept = [*value[: found["num_hidden_layers"] - 1], value[-1]]
            found[name] = [SIZES.get(name, each) for each in kept]
    return found


def _rope(
    cls: type[PreTrainedConfig], default: PreTrainedConfig, found: dict[str, Any]
) -> dict[str, Any]:
    """The rotary parameters unscaled, with sections that fill the smaller heads."""
    # Before transformers 5.4 they are named in the body of __init__ alone.
    known = getattr(cls, "ignore_keys_at_rope_validation", inspect.getsource(cls)) or ()

    def fitted(parameters: dict[str, Any]) -> dict[str, Any]:
        fitted = {"rope_type": "default"} | parameters
        if fitted["rope_type"] != "proportional":
            fitted["rope_type"] = "default"
        if "mrope_section" in known:
            partial = parameters.get("partial_rotary_factor") or 1.0
            pairs = int(found.get("head_dim", HEAD_DIM) * partial) // 2
            count = len(parameters.get("mrope_section") or (1, 1, 1))
            small = max(pairs // count, 1)
            fitted["mrope_section"] = [small] * (count - 1) + [pairs - (count - 1) * small]
        return fitted

    parameters = default.rope_parameters
    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind: each and fitted(each) for kind, each in parameters.items()}
    return fitted(parameters)
