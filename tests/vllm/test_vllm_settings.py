"""From `additional_config` to methods, and what is refused: without vLLM."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.method_examples import example

from extrope_kernels import methods, scores
from extrope_kernels.integrations.vllm.engine import engine_of, make_engine
from extrope_kernels.integrations.vllm.query_scale import adopt_query_scale
from extrope_kernels.integrations.vllm.settings import read_settings
from extrope_kernels.integrations.vllm.warnings import near_misses, summary, warnings_for

YARN = {"method": "yarn", "factor": 4.0}
RERO = {"method": "rerope", "window": 64}
LEAKY = {"method": "leaky_rerope", "window": 64, "factor": 4.0}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}


class Values(SimpleNamespace):
    """May be referred to weakly, as a VllmConfig may."""


def config(extrope, text=(), model=(), **changes):
    """As much of a VllmConfig as is looked at."""
    text = {
        "model_type": "llama",
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    } | dict(text)
    model = {
        "hf_text_config": SimpleNamespace(**text),
        "architecture": "LlamaForCausalLM",
        "using_transformers_backend": lambda: False,
        "runner_type": "generate",
        "max_model_len": 512,
        "dtype": torch.bfloat16,
        **dict.fromkeys(("uses_mrope", "supports_multimodal_inputs"), False),
        **dict.fromkeys(("is_encoder_decoder", "is_multimodal_model", "is_mm_prefix_lm"), False),
    } | dict(model)
    parts = {
        "additional_config": {} if extrope is None else {"extrope": extrope},
        "model_config": SimpleNamespace(**model),
        "speculative_config": None,
        "kv_transfer_config": None,
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    }
    return Values(**parts | changes)


def test_nothing_asked_for():
    assert read_settings({}) is None
    assert read_settings({"other": 1}) is None
    assert read_settings(object()) is None
    assert engine_of(None) is None
    assert engine_of(config(None)) is None


def test_method_and_score():
    read = read_settings({"extrope": json.loads(json.dumps({**YARN, "score": RERO}))})
    assert (read.method, read.parameters) == ("yarn", {"factor": 4.0})
    assert read.score == scores.rerope(64) and read.log_n is None
    read = read_settings({"extrope": {"score": RERO | {"log_n": 128}}})
    assert read.method is None and read.log_n == 128


@pytest.mark.parametrize(
    ("extrope", "error", "message"),
    [
        (4, ValueError, "must have a method, a score or both, or 'auto' under 'extrope', got 4"),
        ({}, ValueError, "must have a method"),
        ({"method": None, "score": None}, ValueError, "must have a method"),
        ({"factor": 4.0}, ValueError, "must have a method"),
        ({"factor": 4.0, "score": RERO}, ValueError, "factor must come with a method"),
        ({"method": "yearn"}, ValueError, "did you mean 'yarn'. method must be .* got 'yearn'"),
        ({"method": "axial"}, ValueError, "method must be one of"),
        (
            {"method": "rerope", "window": 64},
            ValueError,
            "rerope is a score method and must come as {'score': {'method': 'rerope', 'window'",
        ),
        (
            {"score": {"method": "self_extend", "window": 65, "factor": 4}},
            ValueError,
            "self_extend: window must be a multiple of factor 4, got 65",
        ),
        (
            {"score": {"method": "self_extend"}},
            ValueError,
            "self_extend needs window and factor, which are missing",
        ),
        (
            YARN | {"score": RERO | {"resonance": True}},
            TypeError,
            "rerope: no argument resonance; it has window, log_n",
        ),
        (YARN | {"window": 4}, TypeError, "yarn: no argument window; it has factor"),
        ({"score": "rerope"}, ValueError, "score must have a method and its parameters, got 're"),
        (
            {"score": {"method": "yarn"}},
            ValueError,
            "yarn is a frequency method and must come a",
        ),
        (
            {"score": {"method": ["rerope"]}},
            ValueError,
            r"score must be one .* got \['rerope'\]",
        ),
        (
            {"score": {"method": "rerop"}},
            ValueError,
            "did you mean 'rerope'. score must be one of rerope, .* got 'rerop'",
        ),
        ({"score": RERO | {"log_n": 1}}, ValueError, "log_n must be None or a length > 1, got 1"),
        ({"score": RERO | {"log_n": "128"}}, TypeError, "log_n must be a number, got str"),
        ({"score": {"method": "rerope"}}, ValueError, "rerope needs window"),
        ({"score": RERO | {"windows": 1}}, TypeError, "rerope: no argument windows .did you mean"),
    ],
)
def test_wrong_settings(extrope, error, message):
    with pytest.raises(error, match=f"^extrope: .*{message}"):
        read_settings({"extrope": extrope})


# What a method takes from the model and the engine, whose requests have 512 tokens at most.
OF_THE_ENGINE = {
    **dict.fromkeys(("original_max_position_embeddings", "max_position_embeddings"), 128),
    "seq_len": 512,
}


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "axial"])
def test_frequencies_are_those_of_the_method_for_the_model_and_the_engines_length(method):
    given = example(method, 32)
    told = {name: OF_THE_ENGINE.get(name, x) for name, x in given.items()}
    if method == "llama3":
        told["base"] = 1e4  # the model's, not Llama 3's
    given = {name: x for name, x in given.items() if name not in OF_THE_ENGINE}
    want = methods.METHODS[method](32, **told)
    for resonance in (False, True):
        entry = {"method": method, **given, "resonance": resonance}
        (kind,) = make_engine(config(entry)).kinds.values()
        want = methods.resonance(want) if resonance else want
        assert torch.equal(kind.freqs.inv_freq, want.inv_freq)
        assert kind.freqs.attention_factor == want.attention_factor
        assert (kind.freqs.log_decay is None) == (want.log_decay is None)


def test_frequencies_are_the_models_where_no_method_is_named():
    for base in (1e4, 5e5):
        text = {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
        (kind,) = make_engine(config({"score": RERO}, text)).kinds.values()
        assert torch.equal(kind.freqs.inv_freq, methods.rope(32, base=base).inv_freq)
        (kind,) = make_engine(config({"method": "pi", "factor": 4.0}, text)).kinds.values()
        assert torch.equal(kind.freqs.inv_freq, methods.pi(32, factor=4.0, base=base).inv_freq)


def test_a_new_factor_of_yarn_leaves_its_other_parameters():
    own = {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False, "mscale": 1.0}
    own |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, **own}
    (kind,) = make_engine(config(YARN, {"rope_parameters": rope})).kinds.values()
    assert kind.freqs == methods.yarn(32, factor=4.0, **own)
    (kind,) = make_engine(
        config(YARN | {"truncate": True}, {"rope_parameters": rope})
    ).kinds.values()
    assert kind.freqs == methods.yarn(32, factor=4.0, **own | {"truncate": True})


def test_a_factor_of_queries_is_named_as_vllm_reads_it():
    """Ministral 3's: vLLM reads `llama_4_scaling` of Mistral's own files."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for more, want in (
        ({}, None),
        ({"llama_4_scaling_beta": 0.1}, {"original_max_position_embeddings": 32, "beta": 0.1}),
    ):
        made = config(YARN, {"rope_parameters": rope | more})
        adopt_query_scale(made)
        assert getattr(made.model_config.hf_text_config, "llama_4_scaling", None) == want


def test_a_method_for_one_axis_of_mrope():
    of_time = YARN | {"by_axis": [0]}
    sections = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    rope = {"rope_type": "default", "rope_theta": 1e4} | sections
    (kind,) = make_engine(config(of_time, {"rope_parameters": rope})).kinds.values()
    over = methods.with_sections(methods.rope(32), [6, 5, 5], interleaved=True)
    yarn = methods.yarn(32, factor=4.0, original_max_position_embeddings=128)
    assert torch.equal(kind.freqs.inv_freq, methods.by_axis(yarn, [0], over=over).inv_freq)
    assert kind.freqs.attention_factor == yarn.attention_factor
    with pytest.raises(ValueError, match=r"^extrope: by_axis must be left out .* got \[0\]"):
        make_engine(config(of_time))


def test_made_in_whatever_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        (kind,) = make_engine(config(YARN)).kinds.values()
    finally:
        torch.set_default_dtype(torch.float32)
    (want,) = make_engine(config(YARN)).kinds.values()
    assert torch.equal(kind.freqs.inv_freq, want.freqs.inv_freq)


def test_kinds_of_layers():
    types = ["sliding_attention", "full_attention"]
    engine = make_engine(config(YARN, {"rope_parameters": TWO_BASES, "layer_types": types}))
    sliding, full = (engine.kinds[engine.kind_of(i)] for i in (0, 1))
    assert not sliding.extended and full.extended
    assert torch.equal(sliding.freqs.inv_freq, methods.rope(32, base=1e4).inv_freq)
    assert engine.of_rotary(1e4, 32) is sliding and engine.of_rotary(1e6, 32) is full
    with pytest.raises(ValueError, match=r"^extrope: rotary layers .* base 500 and 32 dims"):
        engine.of_rotary(500.0, 32)


def test_decay_is_centred():
    (kind,) = make_engine(config({"method": "xpos"})).kinds.values()
    assert kind.freqs.decay_origin == 256
    (kind,) = make_engine(config({"method": "xpos", "decay_origin": 5.0})).kinds.values()
    assert kind.freqs.decay_origin == 5


RERO_ALONE = {"score": RERO}
BOTH = (YARN, RERO_ALONE)
DPE = {"method": "dpe", "window": 64, "group_sizes": [2, 4]}
IN_SOME_LAYERS = {
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    "rope_scaling_layers": [1],
    "num_hidden_layers": 2,
}
SEEING = {"uses_mrope": True, "supports_multimodal_inputs": True}
OTHER_BACKEND = {"using_transformers_backend": lambda: True}
SAME_BASE = {kind: TWO_BASES["full_attention"] for kind in TWO_BASES}


def parallel(**changes):
    none = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    return {"parallel_config": SimpleNamespace(**none | changes)}


def of_text(**values):
    return {"text": values}


def of_model(**values):
    return {"model": values}


@pytest.mark.parametrize(
    ("extrope", "given", "message"),
    [
        *((x, {"model": OTHER_BACKEND}, "one of vLLM's own") for x in BOTH),
        *((x, of_text(index_topk=8), "must not be sparse, .* table: index_topk") for x in BOTH),
        *((x, of_model(is_encoder_decoder=True), "must be a decoder") for x in BOTH),
        (
            YARN,
            of_model(is_multimodal_model=True) | parallel(enable_elastic_ep=True),
            "elastic expert parallelism must be off",
        ),
        (YARN, of_model(runner_type="pooling"), "must be a decoder that generates"),
        (YARN, of_text(rope_parameters=None), "must rotate, got LlamaForCausalLM"),
        (YARN, of_text(rope_parameters={"use_fope": True}), "that a plugin can replace, got fope"),
        (
            YARN,
            {"speculative_config": SimpleNamespace(method="eagle")},
            "drafts must come without a model .* got eagle",
        ),
        (
            RERO_ALONE,
            {"cache_config": SimpleNamespace(cache_dtype="fp8_e5m2")},
            "kv_cache_dtype must be auto or fp8 .* got fp8_e5m2",
        ),
        (RERO_ALONE, of_model(**SEEING), "one position .* text alone has one: --language-model"),
        (RERO_ALONE, of_text(kv_lora_rank=512), "keys must be cached whole .* latent attention"),
        (RERO_ALONE, parallel(decode_context_parallel_size=2), "context parallelism"),
        (RERO_ALONE, of_text(num_kv_shared_layers=2), "KV sharing"),
        (RERO_ALONE, of_model(rswa_window=128), "the prompt and a window"),
        (RERO_ALONE, of_text(is_causal=False), "must be causal"),
        (RERO_ALONE, of_text(no_rope_layers=[1, 0]), "all layers must rotate .* no_rope_layers"),
        (RERO_ALONE, of_text(position_layers=["rope", "nope"]), "rotate .* position_layers"),
        (RERO_ALONE, of_text(**IN_SOME_LAYERS), "rotate alike .* rope_scaling_layers alone"),
        (RERO_ALONE, of_text(model_type="cohere2"), r"all layers must rotate .*\(cohere2\)"),
        (RERO_ALONE, of_text(model_type="hunyuan_v1_dense"), "normed after the rotation"),
        (RERO_ALONE, of_text(model_type="dory"), "normed after the rotation"),
        ({"method": "xpos", "score": RERO}, {}, "must have no decay"),
        (
            {"method": "xpos", "score": {"method": "blockwise_causal", "block_size": 10000}},
            of_model(dtype=torch.float16),
            "blockwise_causal must restart positions after at most 4533 .* got 5000",
        ),
        (
            {"method": "xpos"},
            {"cache_config": SimpleNamespace(cache_dtype="fp8")},
            "kv_cache_dtype must be auto or of 16 bits for the decay of xpos, got fp8",
        ),
        ({"score": DPE}, {}, "dpe must have maps of 16 pairs of dims, got 2"),
        ({"method": "xpos"}, of_model(dtype=torch.float16, max_model_len=9999), "at most"),
        ({"method": "yarn"}, {}, "yarn needs factor, which is missing"),
        (YARN | {"factor": -1}, {}, "yarn: factor must be > 0"),
        (
            {"method": "longrope"},
            {},
            "longrope needs short_factor and long_factor, which are missing",
        ),
        (
            RERO_ALONE,
            {"cache_config": SimpleNamespace(cache_dtype="auto", sliding_window=64)},
            "some layers must have no sliding window .* all of whose layers have one",
        ),
        (YARN | {"dim": 16}, {}, "dim must be 32"),
        (YARN, of_text(rope_parameters=TWO_BASES), "layer_types must name"),
        (
            YARN,
            of_text(rope_parameters=SAME_BASE, layer_types=["full_attention"]),
            "share vLLM's rotary layer",
        ),
    ],
)
def test_refused(extrope, given, message):
    with pytest.raises(ValueError, match=f"^extrope: .*{message}"):
        make_engine(config(extrope, **given))


def test_frequencies_alone_need_less():
    for text, model in (
        ({"num_kv_shared_layers": 2}, {}),
        ({"no_rope_layers": [1, 0]}, {}),
        ({"model_type": "cohere2"}, {}),
        ({"kv_lora_rank": 512}, {}),
        ({}, SEEING),
    ):
        assert make_engine(config(YARN, text, model)).settings.score is None


def test_text_alone_has_one_position_where_images_have_several():
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    made = config(RERO_ALONE, {"rope_parameters": sections}, {"uses_mrope": True})
    (kind,) = make_engine(made).kinds.values()
    assert kind.freqs.axes is None
    assert torch.equal(kind.freqs.inv_freq, methods.rope(32, base=1e4).inv_freq)


def test_a_scaling_in_all_layers_is_no_matter():
    for extrope, changed in (
        (YARN | RERO_ALONE, {}),
        (RERO_ALONE, {"rope_scaling_layers": [0, 1]}),
        (RERO_ALONE, {"rope_parameters": {"rope_theta": 1e4}}),
    ):
        assert make_engine(config(extrope, IN_SOME_LAYERS | changed)).settings.attends


@pytest.mark.parametrize("extrope", BOTH)
def test_models_that_see_have_towers(extrope):
    assert make_engine(config(extrope, {}, {"is_multimodal_model": True})).has_towers
    assert not make_engine(config(extrope)).has_towers


def warnings_of(made):
    return list(warnings_for(made, read_settings(made.additional_config)))


NUMBERS = "(trained length 128, base 10000, max_model_len 512)"


def test_the_summary_of_an_engine():
    types = ["sliding_attention", "full_attention"]
    both = {**YARN, "resonance": True, "score": RERO | {"log_n": 128}}
    for extrope, text, want in (
        ({"method": "rope", "score": None}, {}, f"rope {NUMBERS}"),
        (both, {}, f"rerope window=64 log_n=128 over yarn factor=4.0 resonance=True {NUMBERS}"),
        (
            YARN | {"original_max_position_embeddings": 64},
            {"rope_parameters": TWO_BASES, "layer_types": types},
            "yarn factor=4.0 original_max_position_embeddings=64 "
            "(trained length 64, base 1000000, max_model_len 512)",
        ),
        (
            RERO_ALONE,
            {"max_position_embeddings": None},
            "rerope window=64 (trained length unknown, base 10000, max_model_len 512)",
        ),
    ):
        made = config(extrope, text)
        assert summary(read_settings(made.additional_config), made) == want


OVERRIDE = {"max_position_embeddings": 16384}
EXPLICIT = {"original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("extrope", "overrides", "text", "said"),
    [
        (YARN, OVERRIDE, {}, "original_max_position_embeddings"),
        (YARN, {"text_config": OVERRIDE}, {}, "original_max_position_embeddings"),
        ({"method": "dynamic_yarn"}, OVERRIDE, {}, "original_max_position_embeddings"),
        ({"method": "llama3", "factor": 8.0}, OVERRIDE, {}, "original_max_position_embeddings"),
        ({"method": "dynamic_ntk", "factor": 2.0}, OVERRIDE, {}, "max_position_embeddings"),
        (YARN, OVERRIDE | EXPLICIT, EXPLICIT, None),
        (YARN | EXPLICIT, OVERRIDE, {}, None),
        ({"method": "pi", "factor": 4.0}, OVERRIDE, {}, None),
        (RERO_ALONE, OVERRIDE, {}, None),
        (YARN, {}, {}, None),
        (YARN, lambda config: config, {}, None),
    ],
)
def test_an_override_of_the_trained_length_is_told(extrope, overrides, text, said):
    made = config(extrope, OVERRIDE | text, {"hf_overrides": overrides})
    found = warnings_of(made)
    assert len(found) == (said is not None)
    for line in found:
        assert line.startswith("hf_overrides makes max_position_embeddings 16384, which ")
        assert f"or give {said} beside" in line


@pytest.mark.parametrize("key", ["extrop", "extorpe", "Extrope", "extrope_kernels", "exrope"])
def test_a_key_that_nobody_reads_is_told(key):
    assert list(near_misses({key: YARN})) == [
        f"additional_config has {key!r}, which nobody reads; methods go under 'extrope'"
    ]


def test_other_keys_are_others_business():
    for additional in ({"extra": 1, "rope": 2}, {"extrope": None, "extrope_note": 1}, object()):
        assert not list(near_misses(additional))


@pytest.mark.parametrize(
    ("extrope", "reaches"),
    [
        (YARN, "512 tokens that yarn"),
        (YARN | {"original_max_position_embeddings": 64}, "256 tokens that yarn"),
        ({"score": LEAKY}, "320 tokens that leaky_rerope"),
        (YARN | {"score": LEAKY}, "1,856 tokens that leaky_rerope"),
        ({"score": RERO}, None),
        ({"method": "dynamic_yarn"}, None),
        ({"method": "dynamic_yarn", "cache": "raw", "score": LEAKY}, None),
        ({"method": "rope"}, None),
    ],
)
def test_a_length_past_the_reach_is_told(extrope, reaches):
    reach = 10**9 if reaches is None else int(reaches.split()[0].replace(",", ""))
    assert warnings_of(config(extrope, model={"max_model_len": reach})) == []
    if reaches is not None:
        assert warnings_of(config(extrope, model={"max_model_len": reach + 1})) == [
            f"max_model_len {reach + 1:,} goes past the {reaches} reaches"
        ]


def test_kinds_of_layers_reach_as_far_as_those_without_a_window():
    text = {"rope_parameters": TWO_BASES, "layer_types": list(TWO_BASES)}
    made = config(YARN, text, {"max_model_len": 513})
    assert warnings_of(made) == ["max_model_len 513 goes past the 512 tokens that yarn reaches"]


def test_a_window_that_nothing_leaves_is_told():
    trained = {"score": RERO | {"window": 128}}
    assert warnings_of(config(trained, model={"max_model_len": 129})) == [
        "max_model_len 129 goes past the 128 tokens that rerope reaches"
    ]
    chunks = {"method": "dual_chunk", "chunk_size": 640, "local_window": 64}
    for score, name in ((RERO | {"window": 640}, "window"), (chunks, "chunk_size")):
        long = {"max_position_embeddings": 1024}
        of = score["method"]
        assert warnings_of(config({"score": score}, long, {"max_model_len": 640})) == [
            f"{name} 640 of {of} leaves nothing extended: max_model_len is 640"
        ]
        assert warnings_of(config({"score": score}, long, {"max_model_len": 641})) == []


def test_a_factor_that_shortens_is_told():
    (line,) = warnings_of(config(YARN | {"factor": 0.5}))
    assert line == "factor 0.5 of yarn is below 1: it shortens what a model reads"
    assert warnings_of(config({"method": "dynamic_ntk", "factor": 0.5})) == []
