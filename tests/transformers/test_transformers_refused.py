"""What `extend` refuses, in words, before anything is changed."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import tiny_models
from support.hf_models import build, transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from extrope_kernels import check, methods, scores
from extrope_kernels.integrations.transformers import extend
from extrope_kernels.methods import METHODS
from extrope_kernels.scores import SCORES
from extrope_kernels.testing import attention_backends

AMONG = f"method must be one of {', '.join((*METHODS, *SCORES))}, got "
OF_RERO = "extend: rerope: no argument {}; it has window, log_n"
# Arguments that a plain Llama is given, and what is said. A method that is no text comes as it is.
ARGUMENTS = [
    ("yarm", {}, ValueError, f"extend: did you mean 'yarn'? {AMONG}'yarm'"),
    ("lex", {}, ValueError, f"extend: did you mean 'blockwise_causal'? {AMONG}'lex'"),
    ("ReRoPE", {}, ValueError, f"extend: did you mean 'rerope'? {AMONG}'ReRoPE'"),
    ("self-extend", {}, ValueError, f"extend: did you mean 'self_extend'? {AMONG}'self-extend'"),
    ("qqq", {}, ValueError, f"extend: {AMONG}'qqq'"),
    (4.0, {}, TypeError, "extend(model, 'yarn', factor=4.0), a Score or a RopeFreqs, got float"),
    (methods.rope(8), {}, ValueError, "RopeFreqs must have inv_freq (8,) for the 16 dims"),
    (methods.rope(16), {"factor": 2.0}, TypeError, "factor must be left out with a RopeFreqs"),
    (scores.rerope(4), {"length": 99}, TypeError, "length must be left out with a Score"),
    (
        "rerope",
        {},
        ValueError,
        "extend: rerope needs window=16, half of the 32 tokens that the model reaches, or length=",
    ),
    ("rerope", {"window": 4, "shift": 2}, TypeError, OF_RERO.format("shift")),
    ("rerope", {"window": 4, "resonance": True}, TypeError, OF_RERO.format("resonance")),
    ("rerope", {"window": 0}, ValueError, "rerope: window must be >= 1, got 0"),
    ("rerope", {"window": 8, "log_n": 1}, ValueError, "log_n must be None or a length > 1, got 1"),
    ("self_extend", {"window": 9, "factor": 2}, ValueError, "window must be a multiple of factor"),
    ("string", {"window": 4}, ValueError, "extend: string needs shift, which is missing"),
    ("dpe", {"window": 8, "group_sizes": [2, 2]}, ValueError, "maps of 8 pairs of dims, got 2"),
    ("yarn", {}, ValueError, "extend: yarn needs factor= or length=, got neither"),
    ("yarn", {"factor": 4.0, "resonance": 2}, TypeError, "resonance must be True or False, got 2"),
    (
        "yarn",
        {"factor": 2.0, "rope_theta": 1e6},
        TypeError,
        "yarn: no argument rope_theta; rope_theta of",
    ),
    ("yarn", {"factor": 2.0, "over": {}}, ValueError, "extend: over must be a RopeFreqs, "),
    ("yarn", {"factor": 2.0, "cache": "rotated"}, ValueError, "cache must be None or 'raw', "),
    ("yarn", {"factor": 2.0, "layers": "some"}, ValueError, "layers must be full or all, got 'so"),
    ("xpos", {"cache": "raw"}, ValueError, "extend: cache must be None for xpos, "),
    ("longrope", {}, ValueError, "extend: longrope needs short_factor and long_factor, which"),
    (
        "pi",
        {"faktor": 2},
        TypeError,
        "pi: no argument faktor (did you mean 'factor'?)",
    ),
    ("pi", {"dim": 8, "factor": 2}, ValueError, "extend: dim must be 16, the rotary dimension"),
    ("dynamic_ntk", {"factor": -1}, ValueError, "dynamic_ntk: factor must be > 0, got -1"),
    # Of a length.
    (None, {}, TypeError, "extend: method or length must be given, got neither"),
    (None, {"length": 0}, ValueError, "extend: length must be > 0, got 0"),
    (None, {"length": "16kk"}, ValueError, "extend: length must be a number of tokens, as 131072"),
    (None, {"length": "0"}, ValueError, "extend: length must be at least 1 token, got '0'"),
    (None, {"length": 1.5}, ValueError, "length must be a whole number of tokens, got 1.5"),
    (None, {"length": 99, "window": 8}, TypeError, "extend: window needs a method that has it"),
    (None, {"max_length": 9}, TypeError, "given, got max_length (did you mean 'length'?)"),
    ("leaky_rerope", {"length": 99}, ValueError, "got leaky_rerope; give its own parameters (win"),
    ("dynamic_ntk", {"length": 99}, ValueError, "(yarn), got dynamic_ntk"),
    ("Yarn", {"length": 99}, ValueError, "did you mean 'yarn'"),
    ("yarn", {"length": 99, "factor": 2.0}, ValueError, "factor or length must be given for yarn"),
]


def state(model):
    return [dict(vars(module)) for module in model.modules()]


def assert_refused(model, method, given, error, message):
    before = state(model)
    with pytest.raises(error, match=re.escape(message)) as raised:
        extend(model, method, **given)
    assert str(raised.value).startswith(("extend: ", f"{method}: "))
    for attributes, now in zip(before, state(model), strict=True):
        assert now.keys() == attributes.keys()
        assert all(now[name] is attributes[name] for name in attributes)


@pytest.mark.parametrize(("method", "given", "error", "message"), ARGUMENTS)
def test_arguments_are_refused(method, given, error, message):
    assert_refused(build("llama"), method, given, error, message)


def on_meta():
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(build("llama").config)


def tiny(name, **settings):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return tiny_models.build(name, **settings)


LLAMA4 = {"head_dim": 16, "num_key_value_heads": 2, "intermediate_size_mlp": 96}
LLAMA4 |= {"num_local_experts": 2}
SLIDING, COMPRESSED = (
    {"layer_types": [f"{kind}_attention"] * 2} for kind in ("sliding", "compressed_sparse")
)
WINDOWS = "all its layers that rotate have a sliding window or chunks"
DEEPSEEK4, FALCON = "DeepseekV4ForCausalLM", partial(tiny, "FalconForCausalLM", alibi=True)
RERO, PI = ("rerope", {"window": 8}), ("pi", {"factor": 4.0})
NEOX = partial(tiny, "GPTNeoXJapaneseForCausalLM")
MODELS = [
    (lambda: nn.Linear(2, 2), PI, "model must have a rotary embedding"),
    (partial(build, "gemma3_text", **SLIDING), PI, WINDOWS),
    (partial(build, "mistral"), RERO, f"MistralModel is not a supported architecture: {WINDOWS}"),
    (partial(build, "llama4_text", **LLAMA4), RERO, WINDOWS),
    (partial(build, "llama", head_dim=12), RERO, "head_dim must be a multiple of 8"),
    (
        lambda: build("llama", attention_dropout=0.1).train(),
        RERO,
        "must have attention_dropout 0, got",
    ),
    (NEOX, RERO, "GPTNeoXJapaneseAttention rotates and weighs keys itself"),
    (
        partial(build, "gemma3_text", use_bidirectional_attention=True),
        RERO,
        "Gemma3Attention is not causal",
    ),
    (on_meta, RERO, "LlamaModel must have its weights for rerope"),
    (partial(tiny, DEEPSEEK4, **SLIDING), RERO, WINDOWS),
    (partial(tiny, DEEPSEEK4, **COMPRESSED), RERO, "keys beside those of the tokens"),
    (FALCON, RERO, "ALiBi in place of a rotation"),
    (FALCON, PI, "ALiBi in place of a rotation"),
    (
        partial(tiny, "UnlimitedOcrForConditionalGeneration"),
        RERO,
        "ReferenceSlidingWindowLayer keeps more keys than a window",
    ),
    (partial(tiny, "BltForCausalLM"), RERO, "BltPatcher counts its own positions"),
]


@pytest.mark.parametrize(("make", "extension", "message"), MODELS)
def test_models_are_refused(make, extension, message):
    if "head_dim" in message and "cpu" not in attention_backends():
        pytest.skip("the reference takes any head_dim")
    method, given = extension
    assert_refused(make(), method, given, ValueError, message)


def plain_mean(self, hidden_states, position_embeddings, attention_mask=None, **options):
    """Call no attention that could be replaced."""
    cos, sin = position_embeddings
    return hidden_states * cos.mean() + sin.mean(), None


def mean_or_attention(self, hidden_states, position_embeddings, attention_mask=None, **options):
    """Call one that could be replaced, but never in a probe."""
    cos, sin = position_embeddings
    if hidden_states is not None:
        return hidden_states * cos.mean() + sin.mean(), None
    return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, None, None, None, None)


@pytest.mark.parametrize("forward", [plain_mean, mean_or_attention])
def test_layers_that_compute_their_attention_themselves_are_refused(forward, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    message = "LlamaAttention rotates and weighs keys itself, with nothing to replace"
    assert_refused(model, *RERO, ValueError, message)


def test_what_is_no_model_is_refused():
    must = "model must be a loaded model of transformers, got "
    load = "str; load it: AutoModelForCausalLM.from_pretrained('smollm2')"
    for given, told in (
        ("smollm2", load),
        (SimpleNamespace(model=build("llama")), "SimpleNamespace; pass its .model"),  # a pipeline
        (4.0, "float"),
    ):
        for op, call in (("extend", partial(extend, length=99)), ("check", check)):
            command = ", or on a command line: extrope check smollm2"
            end = command if op == "check" and isinstance(given, str) else ""
            with pytest.raises(TypeError, match=f"^{re.escape(f'{op}: {must}{told}{end}')}$"):
                call(given)
    with pytest.raises(TypeError, match="from_hf_config: config must be a configuration, got a mo"):
        methods.from_hf_config(build("llama"))
