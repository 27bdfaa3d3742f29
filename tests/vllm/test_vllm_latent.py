"""Latent attention (DeepSeek): frequencies, and the softmax scale that follows them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_vllm_settings import config

from extrope_kernels import methods
from extrope_kernels.integrations.vllm.engine import make_engine
from extrope_kernels.integrations.vllm.latent import adopt_scaling

ORIGINAL = "original_max_position_embeddings"
FILE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    ORIGINAL: 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"method": "yarn", "factor": 16.0}
BY_PARTS = {"method": "ntk_by_parts", "factor": 16.0}


def adopted(extrope, rope, **text):
    """The rope_parameters from which vLLM builds its layers, and the engine."""
    made = config(
        extrope, {"kv_lora_rank": 512, "qk_rope_head_dim": 32, "rope_parameters": rope} | text
    )
    adopt_scaling(made)
    adopt_scaling(made)  # a second time, as in copies
    return made.model_config.hf_text_config.rope_parameters, make_engine(made)


def test_yarn_takes_the_models_mscales_and_the_new_factor():
    for name in ("deepseek_yarn", "yarn"):  # the first is vLLM's own, written while it builds
        rope, engine = adopted(YARN, FILE | {"rope_type": name})
        assert rope == FILE | {"rope_type": "deepseek_yarn", "factor": 16.0}
        (kind,) = engine.kinds.values()
        own = {name: FILE[name] for name in ("mscale", "mscale_all_dim", ORIGINAL)}
        want = methods.yarn(32, factor=16.0, **own)
        assert torch.equal(kind.freqs.inv_freq, want.inv_freq)
        assert kind.freqs.attention_factor == want.attention_factor < 1.2


def test_the_entry_goes_before_the_model():
    rope, _ = adopted(YARN | {"mscale_all_dim": 1.0, ORIGINAL: 16}, FILE)
    assert (rope["mscale_all_dim"], rope["mscale"], rope[ORIGINAL]) == (1.0, 1.0, 16)


def test_other_methods_bring_their_own_amplitude():
    rope, engine = adopted(BY_PARTS, FILE | {"llama_4_scaling_beta": 0.1})
    assert rope == PLAIN | {ORIGINAL: 32, "llama_4_scaling_beta": 0.1}
    (kind,) = engine.kinds.values()
    want = methods.ntk_by_parts(32, factor=16.0, **{ORIGINAL: 32})
    assert torch.equal(kind.freqs.inv_freq, want.inv_freq)


def test_a_scaling_of_the_training_stays_below():
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 4.0, ORIGINAL: 32}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    rope, engine = adopted(YARN, longrope)
    assert rope == longrope
    (kind,) = engine.kinds.values()
    over = methods.longrope(32, seq_len=128, max_position_embeddings=128, **factors)
    want = methods.yarn(32, factor=16.0, over=over, **{ORIGINAL: 128})
    assert torch.equal(kind.freqs.inv_freq, want.inv_freq)
    with pytest.raises(ValueError, match=r"^extrope: mscale_all_dim must be 0 for yarn of Llama"):
        adopted(YARN | {"mscale_all_dim": 1.0}, longrope)


def test_a_temperature_that_follows_the_length_is_refused():
    with pytest.raises(ValueError, match=r"^extrope: mscale_all_dim must be 0 for dynamic_yarn"):
        adopted({"method": "dynamic_yarn"}, FILE)
    rope, _ = adopted({"method": "dynamic_yarn"}, PLAIN)
    assert rope == PLAIN


def test_keys_cached_whole_leave_the_configuration_alone():
    rope, _ = adopted(YARN, FILE, kv_lora_rank=None)
    assert rope == FILE


SIZES = {
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64},  # vLLM's CPU kernel knows these alone
    **{"qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 64, "num_key_value_heads": 4},
    # All experts work on every token, since a choice among them is not continuous.
    **{"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]},
    **{"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 32, "n_shared_experts": 1},
}
# As the checkpoints' files say. transformers always does so, vLLM's default is a softmax.
OF_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    ("name", "rope", "method"),
    [
        ("DeepseekV3", FILE, YARN),
        ("DeepseekV3", FILE, BY_PARTS),
        ("DeepseekV2", PLAIN, YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}),
        ("Glm4MoeLite", PLAIN, YARN),
    ],
)
def test_an_engine_equals_transformers(tmp_path, name, rope, method):
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    from support.vllm_engines import build, difference, engine, expected, generated, tokens_of

    given = SIZES | (OF_V3 if name == "DeepseekV3" else {})
    model = build(name, tmp_path, **given, head_dim=64, rope_parameters=rope)
    model.set_experts_implementation("eager")  # which knows float64
    want, ref = (expected(m, [method]) for m in (model, copy.deepcopy(model).double()))
    with engine(tmp_path, method, attention_backend="CPU_MLA") as llm:  # AMX takes no float32
        got = generated(llm)
    assert tokens_of(got) == tokens_of(want)
    assert difference(got, ref) <= 2 * difference(want, ref)
    assert difference(got, expected(model, [])) > 0.1
