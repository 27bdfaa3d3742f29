"""extend(cache="raw"): every forward rotates cached keys, by the frequencies of its length."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import CACHE, TRAINED, build, tokens
from transformers import DynamicCache

from extrope_kernels.integrations.transformers import extend, extend_from_saved

STEPS = ((0, 20), (20, 21), (21, 40), (40, 41), (41, 42), (42, 70))
METHODS = {
    "dynamic_ntk": {"factor": 2.0},
    "dynamic_yarn": {},
    "yarn": {"factor": 4.0},
    "rerope": {"window": 9},
    "self_extend": {"window": 8, "factor": 4},
}


def llama(layers: int) -> torch.nn.Module:
    return build("llama", num_hidden_layers=layers).double()


def by_steps(model, ids, steps=STEPS):
    """Yield the logits of each step, and the step."""
    cache = DynamicCache(config=model.config)
    for begin, end in steps:
        yield model(ids[:, begin:end], **{CACHE: cache}).logits, begin, end


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_as_without_a_cache(method):
    """Of one layer, whose keys depend on tokens alone; or where frequencies are the same."""
    model, ids = llama(1 if "dynamic" in method else 2), tokens(1, 70)
    with extend(model, method, cache="raw", **METHODS[method]):
        for got, begin, end in by_steps(model, ids):
            want = model(ids[:, :end], use_cache=False).logits[:, begin:]
            torch.testing.assert_close(got, want)


@torch.no_grad()
@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn"])
def test_short_requests_are_the_plain_model(method):
    """The bits of RoPE by the same ops, and the tokens of the model without them."""
    model, ids = llama(2), tokens(1, 10)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    with extend(model, "rope", cache="raw"):
        steps = [logits for logits, *_ in by_steps(model, tokens(1, TRAINED), ((0, 20), (20, 32)))]
    with extend(model, method, cache="raw", **METHODS[method]):
        for got, want in zip(
            by_steps(model, tokens(1, TRAINED), ((0, 20), (20, 32))), steps, strict=True
        ):
            assert torch.equal(got[0], want)
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), plain)


@torch.no_grad()
def test_a_later_step_is_not_frozen():
    """Without raw keys, what was cached first decides."""
    model, ids = llama(1), tokens(1, 70)
    with extend(model, "dynamic_ntk", factor=2.0, cache="raw"):
        *_, (raw, _, _) = by_steps(model, ids)
    with extend(model, "dynamic_ntk", factor=2.0):
        *_, (frozen, _, _) = by_steps(model, ids)
    assert (raw - frozen).abs().max() > 1e-3


@torch.no_grad()
def test_it_is_saved_and_restored(tmp_path):
    model, ids = llama(2), tokens(1, 40)
    plain = model(ids).logits
    handle = extend(model, "dynamic_yarn", cache="raw")
    want = model(ids).logits
    handle.save_pretrained(tmp_path)
    handle.restore()
    assert torch.equal(model(ids).logits, plain)
    handle = extend_from_saved(model, tmp_path)
    assert torch.equal(model(ids).logits, want)
    handle.restore()
    assert torch.equal(model(ids).logits, plain)


def test_a_raw_cache_comes_first():
    model = llama(1)
    after = pytest.raises(ValueError, match="must come before dynamic_yarn")
    with extend(model, "dynamic_yarn", cache="raw"), after:
        extend(model, "rerope", window=9)


def test_windows_that_share_a_changing_rotation_are_refused():
    """Their keys would keep the frequencies of the length at which they were cached."""
    model, ids = build("gemma2"), tokens(1, 40)
    plain = model(ids).logits
    with pytest.raises(ValueError, match="it has a window, so it caches keys as they were rotated"):
        extend(model, "dynamic_ntk", factor=2.0, cache="raw")
    assert torch.equal(model(ids).logits, plain)
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=64, cache="raw"):
        *_, (got, begin, _) = by_steps(model, ids, ((0, 20), (20, 21), (21, 40)))
        torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, begin:])
