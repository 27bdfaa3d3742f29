"""Score methods on models: logits and gradients against dense attention by definition."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager

import attention_oracle as oracle
import pytest
import torch
from hf_models import (
    ATTENDING,
    assert_as_exact_as,
    build,
    error,
    exact,
    freqs_of,
    logits,
    one_thread,  # noqa: F401
    rotary_of,
    tokens,
)

from extrope_kernels import RopeFreqs
from extrope_kernels.integrations.transformers import extend
from extrope_kernels.integrations.transformers.attention import PASS
from extrope_kernels.integrations.transformers.passes import Passes

SEQLEN = 44  # more than four chunks, and no multiple of anything below
IDS = tokens(2, SEQLEN)
METHODS = {
    "rerope": {"window": 7},
    "leaky_rerope": {"window": 7, "factor": 3.5},
    "self_extend": {"window": 9, "factor": 3},
    "dual_chunk": {"chunk_size": 13, "local_window": 3},
}


def relative_positions(method, seqlen, parameters):
    """The relative positions of a method by definition."""
    parameters = {key: value for key, value in parameters.items() if key != "log_n"}
    if method == "dual_chunk":
        return oracle.dual_chunk(seqlen, seqlen, **parameters)
    return oracle.rerope(seqlen, seqlen, grouped=method == "self_extend", **parameters)


@contextmanager
def dense(model, method, formula, parameters):
    """Let the model attend by `formula` of the oracle; layers with a sliding window as ever."""
    modeling = sys.modules[type(model).__module__]
    interleaved = "Cohere" in type(model).__name__
    freqs, rotary = freqs_of(model), rotary_of(model)
    local = RopeFreqs(getattr(rotary, "sliding_attention_inv_freq", freqs.inv_freq))

    def attend(module, q, k, v, mask, scaling, sliding_window=None, **_):
        relative = relative_positions(method, q.shape[2], parameters)
        options = {"scale": scaling, "interleaved": interleaved, "log_n": parameters.get("log_n")}
        layer_freqs = freqs
        if sliding_window is not None:
            relative = oracle.rerope(q.shape[2], q.shape[2], window=1000)
            relative.seen[relative.seen >= sliding_window] = torch.nan
            near = [(mask & ~relative.seen.isnan(), *at) for mask, *at in relative.branches]
            relative = oracle.Relative(relative.seen, near)
            layer_freqs = local
            del options["log_n"]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return formula(q, k, v, relative, layer_freqs, **options)[0].to(v.dtype), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
        patch.setattr(modeling, "eager_attention_forward", attend)
        model.set_attn_implementation("eager")
        yield model


def dense_logits(model, method, formula, parameters):
    with dense(copy.deepcopy(model), method, formula, parameters) as patched:
        return logits(patched, IDS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ATTENDING)
def test_logits_are_those_of_dense_attention(family, method):
    model = build(family, **ATTENDING[family])
    parameters = METHODS[method] | ({"log_n": 16} if family in ("qwen2", "cohere") else {})
    plain = logits(model, IDS)
    want = dense_logits(model.double(), method, oracle.closed_form, parameters)
    model.float()
    expected = dense_logits(model, method, oracle.plain_formula, parameters)
    with extend(model, method, **parameters):
        got = logits(model, IDS)
    assert_as_exact_as(got, expected, want)
    assert error(got, plain) > 1000 * error(got, want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt_neox"])
def test_gradients_are_those_of_dense_attention(family, method):
    model, parameters = build(family, **ATTENDING[family]), METHODS[method] | {"log_n": 16}
    with dense(copy.deepcopy(model).double(), method, oracle.closed_form, parameters) as patched:
        want = gradients(patched)
    with dense(copy.deepcopy(model), method, oracle.plain_formula, parameters) as patched:
        expected = gradients(patched)
    with extend(model.train(), method, **parameters):
        got = gradients(model)
    assert got.keys() == want.keys()
    for name, exact_one in want.items():
        ulp = torch.finfo(torch.float32).eps * exact_one.abs().max().item()
        assert rms(got[name] - exact_one) <= 2 * rms(expected[name] - exact_one) + ulp, name


def rms(x):
    return x.square().mean().sqrt().item()


def gradients(model):
    """Return the gradient of the mean next-token loss to every weight."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_checkpointing(family, use_reentrant):
    """Two forwards before the backward: layers are recomputed by their own forward's positions."""
    model = build(family, **ATTENDING[family]).train()
    mask = torch.ones_like(IDS[:, :30])
    mask[1, :11] = 0

    def both():
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss = loss + model(input_ids=IDS[:, :30], attention_mask=mask, labels=IDS[:, :30]).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with extend(model, "leaky_rerope", window=7, factor=3.5):
        want = both()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        got = both()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ATTENDING)
def test_a_window_that_nothing_exceeds_gives_the_plain_model(family, method):
    model = build(family, **ATTENDING[family])
    plain, want = logits(model, IDS), logits(exact(model, freqs_of(model)), IDS)
    parameters = {"window": 48, "factor": 4}
    if method == "dual_chunk":
        parameters = {"chunk_size": 2 * SEQLEN, "local_window": SEQLEN}
    if method == "rerope":
        del parameters["factor"]
    with extend(model, method, **parameters):
        assert_as_exact_as(logits(model, IDS), plain, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_keeps_the_frequencies_of_its_config(method):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = build("llama", yarn)
    assert freqs_of(model).attention_factor != 1.0
    want = dense_logits(model.double(), method, oracle.closed_form, METHODS[method])
    expected = dense_logits(model.float(), method, oracle.plain_formula, METHODS[method])
    with extend(model, method, **METHODS[method]):
        got = logits(model, IDS)
    assert_as_exact_as(got, expected, want)
    # The same frequencies from an extension before it.
    plain = build("llama")
    with extend(plain, "yarn", factor=4.0), extend(plain, method, **METHODS[method]):
        assert_as_exact_as(logits(plain, IDS), expected, want)
        assert error(logits(plain, IDS), got) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_padding_on_either_side_changes_no_token(method):
    model, mask = build("llama").double(), torch.ones_like(IDS)
    mask[0, :11] = mask[1, -5:] = 0
    with extend(model, method, **METHODS[method]):
        got = logits(model, IDS, attention_mask=mask)
        torch.testing.assert_close(got[:1, 11:], logits(model, IDS[:1, 11:]))
        torch.testing.assert_close(got[1:, :-5], logits(model, IDS[1:, :-5]))
        mask[0] = 0
        assert logits(model, IDS, attention_mask=mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_no_worse_than_dense_attention(method, dtype):
    model = build("llama")
    freqs = rotary_of(model).inv_freq.clone()
    model.to(dtype)
    twin = copy.deepcopy(model)
    for each in (model, twin):  # the cast rounds them, and each side would undo that in its way
        rotary_of(each).inv_freq = freqs
    want = dense_logits(twin.double(), method, oracle.closed_form, METHODS[method])
    expected = dense_logits(model, method, oracle.plain_formula, METHODS[method])
    with extend(model, method, **METHODS[method]):
        got = logits(model, IDS)
    assert rms(got - want) <= 1.1 * rms(expected - want)


def test_frequencies_that_a_cast_has_rounded_come_from_the_config():
    model, cast = build("llama"), build("llama").bfloat16()
    with extend(model, "rerope", window=7), extend(cast, "rerope", window=7):
        inner = [rotary_of(m).forward.inner.freqs[None].inv_freq for m in (model, cast)]
    assert torch.equal(*inner)


def test_rotations_follow_the_device_of_a_layer():
    model = build("llama")
    with extend(model, "leaky_rerope", window=7, factor=3.5):
        rotation, _ = rotary_of(model)(torch.zeros(1), torch.arange(4)[None])
        _, arguments = Passes(model.model, rotary_of(model).forward, None, True).before_forward(
            model.model, (IDS,), {}
        )
    moved = rotation.to("meta", non_blocking=True)
    places = {x.device.type for x in (moved.stored, moved.positions, moved.freqs.inv_freq)}
    assert places == {"meta"}
    assert arguments[PASS].to("meta").freqs.inv_freq.device.type == "meta"


def test_autocast_leaves_queries_wider_than_values():
    model = build("qwen3")
    with extend(model, "rerope", window=7), torch.autocast("cpu", torch.bfloat16):
        got = logits(model, IDS)
    with extend(model, "rerope", window=7):
        assert error(got, logits(model, IDS)) < 0.5


def test_compiles_without_a_graph_break():
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with extend(model, "leaky_rerope", window=7, factor=3.5):
        want = gradients(model)
        model.zero_grad()
        compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[name])
