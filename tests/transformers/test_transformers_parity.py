"""Logits of extended models: against transformers' own rope types, and against float64."""

from __future__ import annotations

import sys

import pytest
import torch
from hf_models import (
    FAMILIES,
    LAYERS,
    TRAINED,
    CountRotations,
    assert_as_exact_as,
    build,
    error,
    exact,
    freqs_of,
    logits,
    one_thread,  # noqa: F401
    rotary_dim,
    rotary_of,
    tokens,
    transformers,
)
from method_examples import example
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from extrope_kernels import methods
from extrope_kernels.integrations.transformers import extend

SEQLEN = 48
POSITIONS = torch.stack((torch.arange(SEQLEN), torch.arange(SEQLEN) + 21))


def _factors(dim: int, start: float) -> list[float]:
    return [start + 0.5 * i for i in range(dim // 2)]


def _transformers_types(dim: int) -> dict[str, tuple[dict, dict]]:
    """Return per method: transformers' rope parameters, and the parameters of `extend`."""
    factors = {"short_factor": _factors(dim, 1.0), "long_factor": _factors(dim, 2.0)}
    llama3 = {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED // 2,
    }
    return {
        "rope": ({"rope_type": "default"}, {}),
        "pi": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
        "dynamic_ntk": ({"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
        "yarn": (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
            {"factor": 4.0},
        ),
        "longrope": (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": TRAINED,
                **factors,
            },
            {"factor": 4.0, **factors},
        ),
        "llama3": ({"rope_type": "llama3", **llama3}, llama3),
        "proportional": (
            {"rope_type": "proportional", "partial_rotary_factor": 0.5},
            {"partial_rotary_factor": 0.5},
        ),
    }


METHODS_OF_TRANSFORMERS = list(_transformers_types(16))
# transformers makes proportional frequencies for whole heads, which these families do not rotate.
PARTIAL = {family for family in FAMILIES if "partial" in FAMILIES[family]}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in FAMILIES
        for method in METHODS_OF_TRANSFORMERS
        if method != "proportional" or family not in PARTIAL
    ],
)
def test_agrees_with_transformers_own_method(family, method):
    rope, parameters = _transformers_types(rotary_dim(family))[method]
    if rope["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        pytest.skip(f"transformers {transformers.__version__} has no {method}")
    theirs, model = build(family, rope), build(family)
    ids, inputs = tokens(2, SEQLEN), {"position_ids": POSITIONS}
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


@pytest.mark.parametrize("method", OTHER_METHODS)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_agrees_with_float64(family, method):
    model = build(family)
    given = example(method, rotary_dim(family))
    parameters = {name: x for name, x in given.items() if name not in FROM_THE_MODEL}
    ids = tokens(2, SEQLEN)
    plain = logits(model, ids)
    given |= {name: x for name, x in FROM_THE_MODEL.items() if name in given}
    freqs = methods.METHODS[method](rotary_dim(family), **given)
    want = logits(exact(model, freqs), ids)
    with extend(model, method, **parameters):
        got = logits(model, ids)
    theirs = _with_tables_of(model, freqs)
    assert_as_exact_as(got, logits(theirs, ids), want)
    assert error(got, plain) > 100 * error(got, want)


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn", "longrope"])
def test_resonance_goes_round_any_method(method):
    model, ids = build("llama"), tokens(2, SEQLEN)
    given = example(method, rotary_dim("llama"))
    given |= {name: x for name, x in FROM_THE_MODEL.items() if name in given}
    freqs = methods.METHODS[method](rotary_dim("llama"), **given)
    want = logits(exact(model, methods.resonance(freqs)), ids)
    parameters = {name: x for name, x in given.items() if name not in FROM_THE_MODEL}
    with extend(model, method, resonance=False, **parameters):
        plain = logits(model, ids)
    with extend(model, method, resonance=True, **parameters):
        got = logits(model, ids)
    theirs = _with_tables_of(model, methods.resonance(freqs))
    assert_as_exact_as(got, logits(theirs, ids), want)
    assert error(got, plain) > 100 * error(got, want)


def test_resonance_is_of_frequencies_and_true_or_false():
    model = build("llama")
    with pytest.raises(TypeError, match=r"^extend: resonance must be True or False, got 2$"):
        extend(model, "yarn", factor=4.0, resonance=2)
    with pytest.raises(TypeError, match="among window, factor, log_n, got resonance"):
        extend(model, "rerope", window=8, resonance=True)


def _with_tables_of(model, freqs):
    rotary = rotary_of(model)
    rotary.inv_freq.copy_(freqs.inv_freq)
    rotary.attention_scaling = freqs.attention_factor
    return model


def test_xpos_scales_queries_up_and_keys_down(monkeypatch):
    model = build("llama")
    freqs = methods.xpos(rotary_dim("llama"))
    ids = tokens(2, SEQLEN)
    with extend(model, "xpos"):
        got = logits(model, ids)
    rounding = error(logits(model, ids), logits(exact(model, methods.rope(16)), ids))
    modeling = sys.modules[type(model).__module__]
    original = modeling.apply_rotary_pos_emb
    exponents = torch.arange(SEQLEN)[:, None] * freqs.log_decay.double().repeat(2)

    def apply_with_decay(q, k, cos, sin):
        q, k = original(q, k, cos, sin)
        return q * exponents.exp(), k * (-exponents).exp()

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", apply_with_decay)
    want = logits(exact(model, freqs), ids)
    assert error(got, want) <= 2 * rounding
    monkeypatch.undo()
    assert error(want, logits(exact(model, freqs), ids)) > 100 * rounding


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_rotates_by_the_op_and_by_no_table(family, method):
    model, ids = build(family), tokens(1, 8)
    extended_layers = 1 if family == "gemma3_text" else LAYERS
    with extend(model, method, factor=2.0), CountRotations() as count:
        logits(model, ids)
        assert count.rotations == extended_layers
        # Gemma 3's sliding window layers keep their own tables: one cos and one sin.
        assert count.tables == (2 if family == "gemma3_text" else 0)
    with CountRotations() as count:
        logits(model, ids)
    assert count.rotations == 0


def test_the_method_replaces_the_scaling_of_the_config():
    scaled = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    scaled["original_max_position_embeddings"] = TRAINED // 2
    model, plain, ids = build("llama", scaled), build("llama"), tokens(1, SEQLEN)
    with extend(model, "rope"), extend(plain, "rope"):
        assert torch.equal(logits(model, ids), logits(plain, ids))
    # The trained length is the original one of the scaling that is replaced.
    length = {"original_max_position_embeddings": TRAINED // 2}
    with extend(model, "yarn", factor=4.0), extend(plain, "yarn", factor=4.0, **length):
        assert torch.equal(logits(model, ids), logits(plain, ids))


def test_a_given_seq_len_fixes_a_dynamic_method():
    model, ids = build("llama"), tokens(1, 8)
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=128):
        got = logits(model, ids)
    freqs = methods.dynamic_ntk(16, factor=2.0, seq_len=128, max_position_embeddings=TRAINED)
    want = logits(exact(model, freqs), ids)
    assert_as_exact_as(got, logits(_with_tables_of(model, freqs), ids), want)


# Gemma 2's own eager attention gives NaN in float64 where a row sees nothing but padding.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_left_padding_with_an_attention_mask(family):
    rope, parameters = _transformers_types(rotary_dim(family))["yarn"]
    theirs, model = build(family, rope), build(family)
    ids = tokens(2, SEQLEN)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    expected = logits(theirs, ids, **inputs)
    want = logits(exact(model, freqs_of(theirs)), ids, **inputs)
    with extend(model, "yarn", **parameters):
        got = logits(model, ids, **inputs)
    real = mask.bool()
    assert_as_exact_as(got[real], expected[real], want[real])
