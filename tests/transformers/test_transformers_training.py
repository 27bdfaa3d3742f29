"""Extended models in training, in other dtypes, on other devices and under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import (
    FAMILIES,
    LAYERS,
    CountRotations,
    build,
    error,
    exact,
    freqs_of,
    gradients,
    logits,
    one_thread,  # noqa: F401
    rotary_of,
    tokens,
)

from extrope_kernels import methods
from extrope_kernels.integrations.transformers import extend

IDS = tokens(2, 48)
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_transformers(family):
    theirs, model = build(family, LINEAR), build(family)
    expected = gradients(theirs, IDS, use_cache=False)
    want = gradients(exact(model, freqs_of(theirs)), IDS, use_cache=False)
    with extend(model, "pi", factor=4.0):
        got = gradients(model, IDS, use_cache=False)
    assert got.keys() == want.keys()
    largest = max(error(expected[name], want[name]) for name in want)
    for name in want:
        ulp = torch.finfo(torch.float32).eps * want[name].abs().max().item()
        assert error(got[name], want[name]) <= 2 * largest + ulp, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_gradient_checkpointing(method, use_reentrant):
    model = build("llama").train()
    with extend(model, method, factor=4.0):
        want = gradients(model, IDS, use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with CountRotations() as count:
            got = gradients(model, IDS, use_cache=False)
    assert count.rotations == 2 * LAYERS  # forward and recomputed
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_no_worse_than_transformers(family, dtype):
    """Positions near 300: transformers rounds its tables to the dtype, the op does not."""
    model, positions = build(family), torch.arange(256, 304)[None]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    theirs = build(family, rope)
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


def test_shifting_all_positions_changes_nothing():
    model, ids = build("llama"), tokens(1, 32)
    positions = torch.arange(32)[None]
    with extend(model, "yarn", factor=4.0):
        near = logits(model, ids, position_ids=positions)
        far = logits(model, ids, position_ids=positions + 1_000_000)
    rounding = error(near, logits(exact(model, yarn()), ids))
    assert error(far, near) <= 4 * rounding


def yarn():
    return methods.yarn(16, factor=4.0, original_max_position_embeddings=32)


def test_pending_rotations_follow_the_device_of_a_layer():
    rotary = rotary_of(build("llama"))
    model = build("llama")
    with extend(model, "xpos"):
        pending, _ = rotary_of(model)(torch.zeros(1), torch.arange(4)[None])
    moved = pending.to("meta", non_blocking=True)
    assert {moved.freqs.inv_freq.device.type, moved.freqs.log_decay.device.type} == {"meta"}
    assert moved.positions.device.type == "meta"
    assert rotary.inv_freq.device.type == "cpu"


def test_a_model_moved_after_extend_moves_its_frequencies():
    model = build("llama")
    with extend(model, "yarn", factor=4.0):
        model.to("meta")
        positions = torch.arange(4, device="meta")[None]
        pending, _ = rotary_of(model)(torch.zeros(1, device="meta"), positions)
    assert pending.freqs.inv_freq.device.type == "meta"
    assert rotary_of(model).inv_freq.device.type == "meta"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_compiles_without_a_graph_break(family):
    model = build(family, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(IDS, use_cache=False).logits.detach()
    with extend(model, "yarn", factor=4.0):
        want = gradients(model, IDS, use_cache=False)
        model.zero_grad()
        out = compiled(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        torch.testing.assert_close(out.logits.detach(), logits(model, IDS))
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want[name])
        assert error(out.logits, plain) > 0.01
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits.detach(), plain)


def test_compiles_a_method_that_depends_on_the_length():
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), extend(model, "dynamic_ntk", factor=4.0):
        for ids in (IDS, IDS[:, :8]):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits(model, ids))


def test_inference_mode_first_and_training_after():
    model = build("llama")
    twin = copy.deepcopy(model)
    with extend(model, "dynamic_ntk", factor=4.0), extend(twin, "dynamic_ntk", factor=4.0):
        with torch.inference_mode():
            model(IDS)
        got, want = gradients(model, IDS, use_cache=False), gradients(twin, IDS, use_cache=False)
    for name in want:
        assert torch.equal(got[name], want[name]), name
