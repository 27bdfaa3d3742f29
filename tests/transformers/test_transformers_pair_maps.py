"""`extend` with scores whose maps differ by pair of dims."""

import pytest
import torch
from support.hf_models import CACHE, assert_same, build, generate, logits, rotary_dim, tokens

from extrope_kernels.integrations.transformers import extend

IDS = tokens(2, 44, seed=2)
FAMILIES = ("llama", "cohere", "gpt_neox")  # pairs apart, together, and of a part of the dims


def sizes(family: str) -> list[int]:
    return [1 + 3 * n % 5 for n in range(rotary_dim(family) // 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_groups_are_self_extend(family):
    model = build(family)
    with extend(model, "self_extend", window=8, factor=4):
        want = logits(model, IDS)
    with extend(model, "dpe", window=8, group_sizes=[4] * len(sizes(family))):
        torch.testing.assert_close(logits(model, IDS), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_gives_the_same(family):
    model = build(family)
    plain = logits(model, IDS)
    with extend(model, "dpe", window=8, group_sizes=sizes(family)):
        whole = logits(model, IDS)
        past = model(IDS[:, :30], use_cache=True)[CACHE]
        with torch.no_grad():
            rest = model(IDS[:, 30:], **{CACHE: past}).logits
        cached = generate(model, IDS, max_new_tokens=6)
        fresh = generate(model, IDS, max_new_tokens=6, use_cache=False)
    torch.testing.assert_close(rest, whole[:, 30:], rtol=1e-4, atol=1e-5)
    assert_same(cached, fresh)
    assert (whole - plain).abs().max() > 1e-3
    assert_same(logits(model, IDS), plain)


def test_maps_follow_a_model_to_its_device():
    model = build("llama")
    with extend(model, "dpe", window=8, group_sizes=sizes("llama")):
        model.to("meta")  # stands for a GPU
        x, layer = torch.zeros(2, 20, 64, device="meta"), model.model.layers[0].self_attn
        tables = model.model.rotary_emb(x, torch.arange(20, device="meta")[None])
        assert layer(x, tables, None)[0].shape == x.shape
