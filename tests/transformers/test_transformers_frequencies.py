"""Logits under frequency methods: against transformers' own rope types, and against float64."""

from __future__ import annotations

import sys

import pytest
import torch
from support.hf_models import (
    FAMILIES,
    LAYERS,
    TRAINED,
    CountOps,
    assert_as_exact_as,
    build,
    error,
    exact,
    freqs_of,
    logits,
    pairs,
    rotary_dim,
    rotary_of,
    tokens,
    transformers,
)
from support.method_examples import example
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from extrope_kernels import methods
from extrope_kernels.integrations.transformers import extend

SEQLEN = 48
IDS = tokens(2, SEQLEN)
POSITIONS = torch.stack((torch.arange(SEQLEN), torch.arange(SEQLEN) + 21))


def _transformers_types(dim: int) -> dict[str, tuple[dict, dict]]:
    """Return per method: transformers' rope parameters, and the parameters of `extend`."""
    short, long = ([start + 0.5 * i for i in range(dim // 2)] for start in (1.0, 2.0))
    factors = {"factor": 4.0, "short_factor": short, "long_factor": long}
    length = {"original_max_position_embeddings": TRAINED}
    llama3 = {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED // 2,
    }
    partial = {"partial_rotary_factor": 0.5}
    return {
        "yarn": ({"rope_type": "yarn", "factor": 4.0, **length}, {"factor": 4.0}),
        "rope": ({"rope_type": "default"}, {}),
        "pi": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
        "dynamic_ntk": ({"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
        "longrope": ({"rope_type": "longrope", **length, **factors}, factors),
        "llama3": ({"rope_type": "llama3", **llama3}, llama3),
        "proportional": ({"rope_type": "proportional", **partial}, partial),
    }


METHODS_OF_TRANSFORMERS = list(_transformers_types(16))


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES, METHODS_OF_TRANSFORMERS))
def test_agrees_with_transformers_own_method(family, method):
    rope, parameters = _transformers_types(rotary_dim(family))[method]
    if rope["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        pytest.skip(f"transformers {transformers.__version__} has no {method}")
    theirs, model = build(family, rope), build(family)
    # A dynamic method has a length for each row here, and the longest one for all in transformers.
    rows = slice(1, 2) if method == "dynamic_ntk" else slice(None)
    ids, inputs = IDS[rows], {"position_ids": POSITIONS[rows]}
    expected = logits(theirs, ids, **inputs)
    want = logits(exact(model, freqs_of(theirs)), ids, **inputs)
    plain = logits(model, ids, **inputs)
    with extend(model, method, **parameters):
        got = logits(model, ids, **inputs)
    assert_as_exact_as(got, expected, want)
    if method != "rope":
        assert error(got, plain) > 100 * error(got, want)


OTHER_METHODS = sorted(set(methods.METHODS) - {*METHODS_OF_TRANSFORMERS, "xpos"})
# What `extend` takes from the model.
FROM_THE_MODEL = {"original_max_position_embeddings": TRAINED, "seq_len": SEQLEN}


def _with_tables_of(model, freqs):
    rotary = rotary_of(model)
    rotary.inv_freq.copy_(freqs.inv_freq)
    rotary.attention_scaling = freqs.attention_factor
    return model


@pytest.mark.parametrize(
    ("family", "method", "resonance"),
    [
        *((*each, False) for each in pairs(["llama", "phi"], OTHER_METHODS)),
        *(("llama", method, True) for method in ("yarn", "dynamic_yarn", "longrope")),
    ],
)
def test_agrees_with_float64(family, method, resonance):
    model, given = build(family), example(method, rotary_dim(family))
    parameters = {name: x for name, x in given.items() if name not in FROM_THE_MODEL}
    given |= {name: x for name, x in FROM_THE_MODEL.items() if name in given}
    freqs = methods.METHODS[method](rotary_dim(family), **given)
    plain = logits(model, IDS)
    if resonance:
        freqs = methods.resonance(freqs)
        with extend(model, method, resonance=False, **parameters):
            plain = logits(model, IDS)
    want = logits(exact(model, freqs), IDS)
    with extend(model, method, **parameters, **({"resonance": True} if resonance else {})):
        got = logits(model, IDS)
    assert_as_exact_as(got, logits(_with_tables_of(model, freqs), IDS), want)
    assert error(got, plain) > 100 * error(got, want)


def test_xpos_scales_queries_up_and_keys_down(monkeypatch):
    model = build("llama")
    freqs = methods.xpos(rotary_dim("llama"))
    with extend(model, "xpos"):
        got = logits(model, IDS)
    rounding = error(logits(model, IDS), logits(exact(model, methods.rope(16)), IDS))
    modeling = sys.modules[type(model).__module__]
    original = modeling.apply_rotary_pos_emb
    exponents = torch.arange(SEQLEN)[:, None] * freqs.log_decay.double().repeat(2)

    def apply_with_decay(q, k, cos, sin):
        q, k = original(q, k, cos, sin)
        return q * exponents.exp(), k * (-exponents).exp()

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", apply_with_decay)
    want = logits(exact(model, freqs), IDS)
    assert error(got, want) <= 2 * rounding
    monkeypatch.undo()
    assert error(want, logits(exact(model, freqs), IDS)) > 100 * rounding


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES, ["yarn", "dynamic_ntk"]))
def test_every_layer_rotates_by_the_op_and_by_no_table(family, method):
    model, ids = build(family), tokens(1, 8)
    extended_layers = 1 if family == "gemma3_text" else LAYERS
    with extend(model, method, factor=2.0), CountOps() as count:
        logits(model, ids)
        assert count.rotations == extended_layers
        # Gemma 3's sliding window layers keep their own tables: one cos and one sin.
        assert count.tables == (2 if family == "gemma3_text" else 0)
    with CountOps() as count:
        logits(model, ids)
    assert count.rotations == 0


def test_the_method_replaces_the_scaling_of_the_config():
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED // 2}
    model, plain = build("llama", scaled), build("llama")
    with extend(model, "rope"), extend(plain, "rope"):
        assert torch.equal(logits(model, IDS), logits(plain, IDS))
    # The trained length is the original one of the scaling that is replaced.
    length = {"original_max_position_embeddings": TRAINED // 2}
    with extend(model, "yarn", factor=4.0) as handle, extend(plain, "yarn", factor=4.0, **length):
        assert torch.equal(logits(model, IDS), logits(plain, IDS))
        assert handle.length == 2 * TRAINED


def test_defaults_come_from_the_config():
    model = build("llama")
    model.config.rope_parameters["rope_theta"] = 5000.0
    defaults = {"dim": 16, "base": 5000.0, "original_max_position_embeddings": TRAINED}
    for method, same, parameters in (("yarn", "yarn", defaults), ("abf", "rope", {"base": 5e5})):
        factor = {"factor": 4.0} if method == "yarn" else {}
        with extend(model, method, **factor):
            got = logits(model, IDS)
        with extend(model, same, **factor, **parameters):
            assert torch.equal(logits(model, IDS), got)


@pytest.mark.parametrize(("family", "dtype"), pairs(FAMILIES, [torch.bfloat16, torch.float16]))
def test_half_precision_is_no_worse_than_transformers(family, dtype):
    """Positions near 300: transformers rounds its tables to the dtype, the op does not."""
    model, positions = build(family), torch.arange(256, 304)[None]
    theirs = build(family, _transformers_types(rotary_dim(family))["yarn"][0])
    freqs = freqs_of(theirs)
    model, theirs = model.to(dtype), theirs.to(dtype)
    want = logits(exact(model, freqs), IDS, position_ids=positions)
    with extend(model, "yarn", factor=4.0):
        got = logits(model, IDS, position_ids=positions)
    expected = logits(theirs, IDS, position_ids=positions)

    def rms(x):
        return (x.double() - want).square().mean().sqrt().item()

    assert rms(got) <= 1.1 * rms(expected)


def test_frequencies_stay_float32_in_a_model_cast_afterwards():
    ids, positions = tokens(1, 8), torch.arange(100_000, 100_008)[None]
    before, after = build("llama").bfloat16(), build("llama")
    with extend(before, "pi", factor=4.0), extend(after, "pi", factor=4.0):
        after.bfloat16()
        got = logits(after, ids, position_ids=positions)
        assert torch.equal(got, logits(before, ids, position_ids=positions))
        assert rotary_of(after).forward.freqs[None].inv_freq.dtype == torch.float32


def test_rotations_follow_the_device_of_a_layer():
    model = build("llama")
    with extend(model, "xpos"):
        pending, _ = rotary_of(model)(torch.zeros(1), torch.arange(4)[None])
    moved = pending.to("meta", non_blocking=True)
    parts = (moved.freqs.inv_freq, moved.freqs.log_decay, moved.positions)
    assert {x.device.type for x in parts} == {"meta"}
    assert rotary_of(model).inv_freq.device.type == "cpu"
    with extend(model, "yarn", factor=4.0):
        model.to("meta")
        positions = torch.arange(4, device="meta")[None]
        pending, _ = rotary_of(model)(torch.zeros(1, device="meta"), positions)
    assert pending.freqs.inv_freq.device.type == "meta"
