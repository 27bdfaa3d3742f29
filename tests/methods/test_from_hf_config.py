"""`from_hf_config` on configurations of both formats, as objects and as plain mappings."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from extrope_kernels import _rope_types, methods
from extrope_kernels.methods import from_hf_config

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONGROPE = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
NESTED = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "no_rotation": None,
}

# rope parameters, and the call that they stand for
ROPE_TYPES = {
    "default": ({}, methods.rope(16)),
    "linear": ({"factor": 3.0}, methods.pi(16, factor=3.0)),
    "dynamic": (
        {"factor": 2.0},
        methods.dynamic_ntk(16, factor=2.0, seq_len=9000, max_position_embeddings=4096),
    ),
    "yarn": (YARN, methods.yarn(16, **YARN)),
    "longrope": (
        {**LONGROPE, "original_max_position_embeddings": 1024},
        methods.longrope(
            16,
            **LONGROPE,
            original_max_position_embeddings=1024,
            seq_len=9000,
            max_position_embeddings=4096,
        ),
    ),
    "llama3": (LLAMA3, methods.llama3(16, base=10000.0, **LLAMA3)),
    "proportional": (
        {"partial_rotary_factor": 0.25, "factor": 2.0},
        methods.proportional(16, partial_rotary_factor=0.25, factor=2.0),
    ),
}
FORMATS = {
    "rope_parameters": lambda name, p: {"rope_parameters": {"rope_type": name, **p}},
    "rope_scaling": lambda name, p: {"rope_scaling": {"rope_type": name, **p}},
    "rope_scaling, type": lambda name, p: {"rope_scaling": {"type": name, **p}},
}
OBJECTS = {"dict": dict, "namespace": lambda config: SimpleNamespace(**config)}


def assert_same(freqs, expected):
    assert torch.equal(freqs.inv_freq.view(torch.int32), expected.inv_freq.view(torch.int32))
    assert freqs.attention_factor == expected.attention_factor


@pytest.mark.parametrize("name", ROPE_TYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_rope_types(name, form, kind):
    parameters, expected = ROPE_TYPES[name]
    config = OBJECTS[kind]({**SIZES, **FORMATS[form](name, parameters)})
    assert_same(from_hf_config(config, 9000), expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SIZES, methods.rope(16)),
        ({**SIZES, "rope_scaling": None, "rope_theta": 5e5}, methods.rope(16, base=5e5)),
        ({**SIZES, "rope_parameters": {"rope_theta": 5e5}}, methods.rope(16, base=5e5)),
        ({**SIZES, "head_dim": 32}, methods.rope(32)),
        ({**SIZES, "head_dim": None}, methods.rope(16)),
        ({**SIZES, "qk_rope_head_dim": 64}, methods.rope(64)),
        ({**SIZES, "head_dim": 32, "partial_rotary_factor": 0.25}, methods.rope(8)),
        (
            {**SIZES, "partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 0.5}},
            methods.rope(8),
        ),
        (
            {**SIZES, "rope_scaling": {"type": "yarn", "factor": None, **YARN, "beta_fast": None}},
            methods.yarn(16, **YARN),
        ),
        (
            {**SIZES, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512}},
            methods.yarn(16, factor=8.0, original_max_position_embeddings=512),
        ),
        (
            {**SIZES, "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            methods.yarn(16, factor=2.0, original_max_position_embeddings=4096, truncate=False),
        ),
        (
            {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 2e4},
            methods.rope(4, base=2e4),
        ),
        (
            {**SIZES, "rotary_dim": 8, "rope_parameters": {"partial_rotary_factor": 0.5}},
            methods.rope(8),
        ),
        (
            {
                **SIZES,
                "original_max_position_embeddings": 2048,
                "rope_scaling": {"type": "su", **LONGROPE},
            },
            methods.longrope(
                16, **LONGROPE, original_max_position_embeddings=2048, seq_len=1, factor=2.0
            ),
        ),
    ],
)
def test_where_values_are_read(config, expected):
    assert_same(from_hf_config(config), expected)


def test_seq_len_tensor():
    config = {**SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert from_hf_config(config, torch.tensor([5, 5000])).inv_freq.shape == (2, 8)


def test_without_seq_len_the_trained_length_holds():
    dynamic = {**SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert_same(from_hf_config(dynamic), methods.rope(16))
    short = {**SIZES, "rope_scaling": {"type": "longrope", "factor": 1.0, **LONGROPE}}
    assert_same(from_hf_config(short), from_hf_config(short, 4096))


def test_nested_per_layer_type():
    config = {**SIZES, "rope_parameters": NESTED}
    full = from_hf_config(config, layer_type="full_attention")
    assert_same(full, methods.yarn(16, base=1e6, **YARN))
    assert_same(from_hf_config(config, layer_type="sliding_attention"), methods.rope(16))


def test_a_single_layer_type_needs_no_name():
    config = {**SIZES, "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "nope": None}}
    assert_same(from_hf_config(config), methods.rope(16, base=5e5))


def test_axes():
    sections = {"mrope_section": [4, 2, 2]}
    old = {**SIZES, "rope_scaling": {"type": "mrope", **sections}}
    assert from_hf_config(old).axes.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    turns = {**SIZES, "rope_scaling": {"rope_type": "yarn", **YARN, **sections}}
    turns["rope_scaling"]["mrope_interleaved"] = True
    assert from_hf_config(turns).axes.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert_same(from_hf_config(turns), methods.yarn(16, **YARN))
    patches = {**SIZES, "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}}
    assert_same(from_hf_config(patches), methods.axial(16, base=100.0))
    assert from_hf_config(patches).axes.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert from_hf_config(SIZES).axes is None
    # HunYuan VL's sections cut through pairs, so that no frequency has one axis.
    assert from_hf_config({**old, "model_type": "hunyuan_vl_text"}).axes is None


def test_hunyuan_has_an_alpha():
    config = {**SIZES, "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}}
    config = {**config, "rope_theta": 500.0}
    assert_same(from_hf_config(config, 9000), methods.ntk_aware(16, factor=1000.0, base=500.0))


def test_old_gemma_3_has_a_local_base():
    config = {
        **SIZES,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    full = from_hf_config(config, layer_type="full_attention")
    assert_same(full, methods.pi(16, factor=8.0, base=1e6))
    assert_same(from_hf_config(config, layer_type="sliding_attention"), methods.rope(16))


def test_old_olmo_3_scales_its_full_layers_alone():
    config = {**SIZES, "model_type": "olmo3", "rope_theta": 5e5}
    config["rope_scaling"] = {"rope_type": "yarn", **YARN}
    full = from_hf_config(config, layer_type="full_attention")
    assert_same(full, methods.yarn(16, base=5e5, **YARN))
    sliding = from_hf_config(config, layer_type="sliding_attention")
    assert_same(sliding, methods.rope(16, base=5e5))


def test_gemma_4_has_heads_of_two_sizes():
    config = {**SIZES, "head_dim": 16, "global_head_dim": 32, "rope_parameters": NESTED}
    full = from_hf_config(config, layer_type="full_attention")
    assert_same(full, methods.yarn(32, base=1e6, **YARN))
    assert_same(from_hf_config(config, layer_type="sliding_attention"), methods.rope(16))


def test_a_saved_gemma_4_has_sizes_by_layer():
    config = {**SIZES, "head_dim": 16, "rope_parameters": NESTED}
    config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config["per_layer_config"] = {"1": {"head_dim": 32}, "03": {"head_dim": 32, "other": 1}}
    full = from_hf_config(config, layer_type="full_attention")
    assert_same(full, methods.yarn(32, base=1e6, **YARN))
    assert_same(from_hf_config(config, layer_type="sliding_attention"), methods.rope(16))
    del config["per_layer_config"]["1"]
    with pytest.raises(ValueError, match="layers of type 'full_attention' must have one head_dim"):
        from_hf_config(config, layer_type="full_attention")


ERRORS = [
    ({"rope_parameters": NESTED}, None, "layer_type must be one of 'full_attention', 'sliding_"),
    ({"rope_parameters": NESTED}, "no_rotation", "layer_type must be one of .* got 'no_rotation'"),
    ({"rope_scaling": {"rope_type": "conic"}}, None, "rope_type must be one of .* got 'conic'"),
    (
        {"head_dim": 18, "rope_scaling": {"rope_type": "axial"}},
        None,
        "head_dim must be a multiple of 4 for two axes, got 18",
    ),
    ({"head_dim": 42, "partial_rotary_factor": 0.5}, None, r"even, .* got 42 \* 0.5 = 21"),
    ({"patch_size": 14}, None, "rope_parameters must be given for a model of images"),
    ({"model_type": "gemma4_vision"}, None, "gemma4_vision cannot be read: it pairs dims within"),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}},
        None,
        r"with_sections: sections must add up to 8 frequencies, got \[2, 3, 4\]",
    ),
    (
        {
            "model_type": "ernie4_5_vl_moe_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 4, 2]},
        },
        None,
        "the first two of mrope_section must be equal, got",
    ),
    ({"rope_scaling": {"type": "linear"}}, None, "factor must be given for 'linear', got None"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, None, "pi: factor must be > 0, got 0"),
    ({"rope_scaling": {"type": "longrope"}}, None, "short_factor must be given for 'longrope'"),
    ({"partial_rotary_factor": 2}, None, "partial_rotary_factor must be <= 1, got 2"),
    ({"partial_rotary_factor": -1}, None, "partial_rotary_factor must be >= 0, got -1"),
    ({"head_dim": 15}, None, r"must be even, so that dims pair up, got 15 \* 1 = 15"),
    ({"rope_theta": 0}, None, "rope: base must be > 1, got 0"),
    ({"rotary_dim": 8}, None, "rotary_dim can be read by the class of the model alone: pass tr"),
    (
        {"model_type": "dbrx", "attn_config": {"rope_theta": 5e5}},
        None,
        "attn_config can be read by the class of dbrx alone",
    ),
    ({"num_attention_heads": None}, None, "config must have head_dim, or hidden_size and"),
    (
        {"max_position_embeddings": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        None,
        "max_position_embeddings must be given for 'dynamic', got None",
    ),
]


@pytest.mark.parametrize(("changes", "layer_type", "message"), ERRORS)
def test_errors(changes, layer_type, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config({**SIZES, **changes}, layer_type=layer_type)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="rope_parameters must be a mapping, got 'yarn'"):
        from_hf_config({**SIZES, "rope_parameters": "yarn"})
    with pytest.raises(TypeError, match="seq_len must be a number, got '5'"):
        from_hf_config(SIZES, "5")


@pytest.mark.parametrize("name", _rope_types.ROPE_TYPES)
def test_a_rope_type_has_a_method_that_takes_its_keys(name):
    of_type = _rope_types.rope_type(name)
    takes = inspect.signature(methods.METHODS[of_type.method]).parameters
    assert set(of_type.keys) <= set(takes)
    assert of_type.by_length == ("seq_len" in takes)
    assert (of_type.scaling is None) == ("factor" not in of_type.keys)
