"""Norms before the rotation, left to the op: which models', what it changes, when it must not."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.hf_models import (
    CountOps,
    assert_as_exact_as,
    build,
    generate,
    gradients,
    logits,
    pairs,
    tokens,
)
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import (
    ALL_ATTENTION_FUNCTIONS,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from extrope_kernels.integrations.transformers import extend
from extrope_kernels.integrations.transformers.patch import frequencies, scores
from extrope_kernels.integrations.transformers.patch.hooks import Patches
from extrope_kernels.integrations.transformers.patch.norms import DeferredNorm

MODELS = {
    "qwen3": {},  # weights after a rounding
    "gemma3_text": {},  # 1 + weight, and a rotation of its own for sliding layers
    "olmo2": {"num_key_value_heads": 2},  # all heads of a token together
}
IDS = tokens(1, 20)


def normed(family: str, **sizes) -> nn.Module:
    """A model whose norms have learned something."""
    model = build(family, **MODELS.get(family, {}), **sizes)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data += torch.rand(weight.shape, generator=generator)
    return model


def deferred(model: nn.Module) -> list[str]:
    """The norms that have been replaced."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(vars(module).get("forward"), DeferredNorm)
    ]


def own_and_exact(model):
    """The model's logits, and those of its twin in float64."""
    return logits(model, IDS), logits(copy.deepcopy(model).double(), IDS)


METHODS = {
    "rerope": {"window": 8},  # keys are stored as they come
    "self_extend": {"window": 8, "factor": 2},  # and here as the method places them
    "rope": {"base": 10000.0},
}


@pytest.mark.parametrize(("family", "method"), pairs(MODELS, METHODS))
def test_the_op_norms(family, method, monkeypatch):
    parameters = METHODS[method]
    model, ids = normed(family), tokens(2, 40)
    layers, plain = model.config.num_hidden_layers, logits(model, ids)
    twin = copy.deepcopy(model).double()
    with monkeypatch.context() as patch:
        for room in (frequencies, scores):
            patch.setattr(room, "tried_patches", lambda *_: Patches())
        with extend(model, method, **parameters):
            assert not deferred(model)
            own, text = logits(model, ids), generate(model, ids[:1, :20], max_new_tokens=6)
        with extend(twin, method, **parameters):
            exact, exact_text = logits(twin, ids), generate(twin, ids[:1, :20], max_new_tokens=6)
    with extend(model, method, **parameters):
        # A sliding layer's tables are the model's own.
        ours = layers - (family == "gemma3_text")
        assert len(deferred(model)) == 2 * ours
        with CountOps() as count:
            assert_as_exact_as(logits(model, ids), own, exact)
        assert count.of("extrope.rope_norm_fwd") == ours
        assert_as_exact_as(generate(model, ids[:1, :20], max_new_tokens=6), text, exact_text)
    assert not deferred(model) and torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(
    ("method", "parameters"), [("rope", {"base": 10000.0}), ("rerope", {"window": 8})]
)
def test_training(method, parameters):
    model, grads = normed("qwen3"), {}
    for name in ("exact", "own", "ours"):
        model = model.double() if name == "exact" else model.float()
        with extend(model, method, **parameters), contextlib.ExitStack() as stack:
            if name != "ours":  # a norm with a hook is left to the model
                for module in deferred(model):
                    hook = model.get_submodule(module).register_forward_hook(lambda *_: None)
                    stack.callback(hook.remove)
            grads[name] = gradients(model, IDS)
    for name, x in grads["ours"].items():
        assert_as_exact_as(x, grads["own"][name], grads["exact"][name])


@pytest.mark.parametrize("family", MODELS)
def test_16_bits_lose_no_more_than_the_models_own(family):
    """The op rounds once where the model rounds up to three times."""
    model, ids = normed(family).bfloat16(), tokens(2, 40)
    exact = logits(copy.deepcopy(model).float(), ids)
    own = (logits(model, ids) - exact).pow(2).mean().sqrt().item()
    with extend(model, "rope", base=10000.0):
        assert deferred(model)
        ours = (logits(model, ids) - exact).pow(2).mean().sqrt().item()
    assert ours <= 1.1 * own  # of 5,000 logits, whose errors spread by more than the norms' share


def test_a_norm_that_something_else_replaces_norms():
    """As kernelize and Liger do to a model's modules."""
    model = normed("qwen3")
    own = own_and_exact(model)
    norm = model.model.layers[0].self_attn.q_norm
    with extend(model, "rope", base=10000.0):
        ours, norm.forward = norm.forward, lambda x: type(norm).forward(norm, x)
        assert_as_exact_as(logits(model, IDS), *own)
        norm.forward = ours


@pytest.mark.parametrize(
    ("method", "parameters"), [("rope", {"base": 10000.0}), ("rerope", {"window": 8})]
)
def test_a_copy_in_a_norms_place_norms(method, parameters):
    """PEFT's modules_to_save trains a copy."""
    model = normed("qwen3")

    def train_a_copy():
        layer = model.model.layers[0].self_attn
        layer.q_norm = copy.deepcopy(layer.q_norm)
        layer.q_norm.weight.data *= 1.5

    with extend(model, method, **parameters):
        train_a_copy()
        got = logits(model, IDS)
    model = normed("qwen3")
    train_a_copy()
    with extend(model, method, **parameters):
        own = logits(model, IDS)
    with extend(model.double(), method, **parameters):
        assert_as_exact_as(got, own, logits(model, IDS))


def test_norms_with_weights_for_each_head_stay():
    """Of Command R+: a mean is subtracted, and heads have weights of their own."""
    model = build("cohere", num_key_value_heads=2, use_qk_norm=True)
    own = own_and_exact(model)
    with extend(model, "rope", base=10000.0):
        assert not deferred(model)
        assert_as_exact_as(logits(model, IDS), *own)


def test_norms_follow_what_moves_a_layers_arguments():
    """As accelerate's hooks do, where a model spans several devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = normed("qwen3")
    own = own_and_exact(model)
    with extend(model, "rope", base=10000.0):
        for layer in model.model.layers:
            hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook("cpu"))
        assert deferred(model)
        assert_as_exact_as(logits(model, IDS), *own)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("rope", {"base": 10000.0}), ("dynamic_ntk", {"factor": 2.0}), ("rerope", {"window": 8})],
)
def test_parts_called_by_themselves_after_an_error(method, parameters):
    model, x, at = normed("qwen3"), torch.ones(1, 3, 24), torch.arange(3)[None]
    parts = (
        lambda: model.model.layers[0].self_attn.q_norm(x),
        lambda: model.model.rotary_emb(x, at),
    )
    want = parts[0]()

    def fail(*args):
        raise RuntimeError("out of memory")

    with extend(model, method, **parameters):
        failing = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            logits(model, IDS)
        failing.remove()
        got, (rotation, _) = (part() for part in parts)
        assert type(rotation).__name__ == "Rotation"
    assert torch.equal(got, want)


def test_what_acts_on_a_norm_is_left_to():
    """A hook sees what it saw before, whether it comes before the extension or after."""
    model, seen = normed("qwen3"), []
    norm = model.model.layers[0].self_attn.q_norm
    own = logits(model, IDS)
    with extend(model, "rope", base=10000.0):
        handle = norm.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        logits(model, IDS)
        loudness = seen[0].pow(2).mean(-1).sqrt()  # that of its weights, as it was normed
        torch.testing.assert_close(loudness.mean(), norm.weight.mean(), rtol=0.1, atol=0)
        handle.remove()
    handle = norm.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = own_and_exact(model)
    with extend(model, "rope", base=10000.0):
        assert len(deferred(model)) == 2 * (model.config.num_hidden_layers - 1)
        assert_as_exact_as(logits(model, IDS), *doubled)
    handle.remove()
    assert torch.equal(logits(model, IDS), own)


def louder_after_its_norm(
    self, hidden_states, position_embeddings, attention_mask=None, cache=None, **options
):
    """Qwen3's attention, but for a factor that a norm after it would take away."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q = 1.5 * self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    cos, sin = position_embeddings
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    name = self.config._attn_implementation
    attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def test_a_norm_that_is_not_right_before_the_rotation_stays(monkeypatch):
    model = build("qwen3", attn_implementation="eager")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", louder_after_its_norm)
    own = own_and_exact(model)
    with extend(model, "rope", base=10000.0):
        assert not deferred(model)
        assert_as_exact_as(logits(model, IDS), *own)
