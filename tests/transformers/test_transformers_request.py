"""What `extend` is asked for: methods of one's own, what a handle tells, forwards, restoring."""

from __future__ import annotations

import copy
import sys
import types
import warnings

import pytest
import torch
from support import tiny_models
from support.hf_models import TRAINED, build, logits, tokens

from extrope_kernels import extend, methods, restore, scores

IDS = tokens(2, 90)


@pytest.mark.parametrize(
    ("own", "method", "parameters"),
    [
        (scores.rerope(8), "rerope", {"window": 8}),
        (
            methods.yarn(16, factor=4.0, original_max_position_embeddings=TRAINED),
            "yarn",
            {"factor": 4.0},
        ),
    ],
)
def test_a_score_or_frequencies_of_ones_own(own, method, parameters, tmp_path):
    model = build("llama")
    with extend(model, method, **parameters):
        want = logits(model, IDS)
    plain = logits(model, IDS)
    with extend(model, own) as handle:
        assert torch.equal(logits(model, IDS), want)
        other = handle.extend(build("llama"))
        assert torch.equal(logits(other.model, IDS), want)
        with pytest.warns(UserWarning, match="of your own is not saved"):
            model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, IDS), plain)
    with extend(model, own, **({"log_n": 16} if method == "rerope" else {})):
        assert torch.equal(logits(model, IDS), want) == (method == "yarn")


def test_restore_without_a_handle():
    model = build("llama")
    plain = logits(model, IDS)
    extend(model, "yarn", factor=4.0)
    extend(model, "rerope", window=8)
    restore(model)
    restore(model)  # none is fine
    assert torch.equal(logits(model, IDS), plain)
    with extend(model, "rerope", window=8):
        twin = copy.deepcopy(model)
    restore(twin)
    assert torch.equal(logits(twin, IDS), plain)


REACHES = [
    ("rerope", {"window": 8}, "reaches any length"),
    ("rerope", {"window": TRAINED}, f"reaches {TRAINED} tokens"),
    ("yarn", {"factor": 4.0}, f"reaches {4 * TRAINED} tokens"),
    ("dynamic_ntk", {"factor": 4.0}, "reaches any length, chosen per request"),
    *((name, {}, "reach unknown") for name in ("abf", "nope", "xpos")),
    ("dual_chunk", {"chunk_size": 24, "local_window": 4}, "reach unknown"),
    ("string", {"shift": 8, "window": 4}, "reach unknown"),
    ("giraffe_power", {"power": 0.1}, "reach unknown"),
]


@pytest.mark.parametrize(("method", "parameters", "told"), REACHES)
@pytest.mark.filterwarnings("ignore:.*leaves nothing extended")
def test_a_handle_claims_no_reach_that_it_does_not_know(method, parameters, told):
    with extend(build("llama"), method, **parameters) as handle:
        assert repr(handle).endswith(f", {told}")


def test_what_is_replaced_and_what_stays():
    model = build("llama")
    extend(model, "yarn", factor=2.0)
    assert str(extend(model, "yarn", factor=4.0).applied) == (
        "yarn factor=4.0 in place of yarn factor=2.0"
    )
    assert str(extend(model, "rerope", window=8).applied).startswith("rerope window=8 over yarn")


NOTHING = [
    ("rerope", {"window": TRAINED}, "window 32 of rerope leaves nothing extended"),
    (
        "dual_chunk",
        {"chunk_size": 40, "local_window": 4},
        "chunk_size 40 of dual_chunk leaves noth",
    ),
    ("yarn", {"factor": 1.0}, "factor 1 of yarn leaves nothing extended"),
    ("leaky_rerope", {"window": 8, "factor": 1.0}, "factor 1 of leaky_rerope leaves nothing"),
]


@pytest.mark.parametrize(("method", "parameters", "message"), NOTHING)
def test_arguments_that_leave_nothing_extended(method, parameters, message):
    with pytest.warns(UserWarning, match=f"extend: {message}") as warned:
        extend(build("llama"), method, **parameters)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extend(build("llama"), "rerope", window=TRAINED - 1)


def test_rerope_by_a_length_takes_half_the_trained_one():
    model = build("llama")
    with extend(model, "rerope", length=4 * TRAINED) as handle:
        assert handle.applied.parameters == {"window": TRAINED // 2}


def test_a_handle_is_no_model():
    handle = extend(build("llama"), "yarn", factor=4.0)
    for name, message in (
        ("generate", "a handle of extend has no generate: generate with the model"),
        ("device", "a handle of extend has no device: use the model's device"),
        ("nonsense", "'Extension' object has no attribute 'nonsense'"),
    ):
        with pytest.raises(AttributeError, match=message):
            getattr(handle, name)
    with pytest.raises(TypeError, match="a handle of extend cannot be called: call the model, whi"):
        handle(IDS)


FORWARDS = {"rerope": {"window": 8}, "yarn": {"factor": 4.0}, "raw": {"factor": 4.0}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_forwards_of_the_model(family):
    model, count = build(family), []
    model.base_model.register_forward_pre_hook(lambda *_: count.append(1))
    for method, most in (("rerope", 2), ("raw", 3), ("yarn", 0)):
        count.clear()
        named = ("yarn", {"cache": "raw"}) if method == "raw" else (method, {})
        with extend(model, named[0], **named[1], **FORWARDS[method]):
            assert len(count) == most, method


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "llama"])
def test_a_score_method_keeps_frequencies_that_follow_the_length(name):
    if name == "llama":
        model = build(name, {"rope_type": "dynamic", "factor": 4.0})
    else:
        model = tiny_models.build(name)
        pairs = model.model.rotary_emb.inv_freq.numel()
        stated = {"short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs}
        model.config.rope_parameters |= {"rope_type": "longrope", **stated}
        model.config.original_max_position_embeddings = TRAINED
        model = type(model)(model.config).eval()
    ids = IDS[:1, : 2 * TRAINED]
    plain = logits(model, ids)
    with extend(model, "rerope", window=1000) as handle:  # past all distances here
        torch.testing.assert_close(logits(model, ids), plain, rtol=1e-4, atol=1e-4)
        assert " over " in repr(handle)
    assert torch.equal(logits(model, ids), plain)


def test_a_second_request_on_a_cache_warns_once():
    model, options = build("llama"), {"do_sample": False, "return_dict_in_generate": True}
    text = tokens(1, 140)

    def turn(ids, cache=None):
        return model.generate(
            ids, max_new_tokens=4, past_key_values=cache, min_new_tokens=4, **options
        )

    with extend(model, "dynamic_ntk", factor=4.0):
        for last in (40, 120):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                first = turn(text[:, :20])  # 24 tokens, of 32 trained
                second = turn(
                    torch.cat((first.sequences, text[:, 24:last]), 1), first.past_key_values
                )
                turn(torch.cat((second.sequences, text[:, :9]), 1), second.past_key_values)
            told = [str(x.message) for x in heard if "a cache that is used again" in str(x.message)]
            assert len(told) == (last == 40)


TRAINER = """
class DPOTrainer:
    def __init__(self, model, reference, precompute=False):
        self.model, self.ref_model, self.precompute_ref_logps = model, reference, precompute

    def evaluate(self, ids):
        return self.model(ids)
"""


def test_trainers_of_trl_are_looked_for_outside_a_training_too(monkeypatch):
    trl = types.ModuleType("trl.trainer.dpo_trainer")
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))
    exec(TRAINER, vars(trl))
    model = build("llama").eval()
    message = "extend: ref_model of DPOTrainer is the plain model, this one is extended"
    with extend(model, "yarn", factor=4.0) as handle, torch.no_grad():
        model(IDS)
        with pytest.warns(UserWarning, match=message):
            trl.DPOTrainer(model, build("llama")).evaluate(IDS)
    with extend(model, "yarn", factor=4.0) as handle, torch.no_grad():
        trainer = trl.DPOTrainer(model, build("llama"), precompute=True)
        handle.extend(trainer.ref_model)
        with pytest.warns(UserWarning, match="DPOTrainer keeps precomputed reference log-prob"):
            trainer.evaluate(IDS)
    with extend(model, "yarn", factor=4.0), warnings.catch_warnings():
        warnings.simplefilter("error")
        trl.DPOTrainer(model, None).evaluate(IDS)  # of adapters: there is no second model
