"""`extend` with scores whose maps differ by pair of dims, and by head."""

import pytest
import torch
from hf_models import CACHE, assert_same, build, generate, logits, rotary_dim, tokens

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


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_gives_the_same(family, by_head):
    model = build(family)
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    groups = [[n + h for n in sizes(family)] for h in range(heads)] if by_head else sizes(family)
    plain = logits(model, IDS)
    with extend(model, "dpe", window=8, group_sizes=groups):
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
        assert logits(model, IDS.to("meta")).shape[:2] == IDS.shape


def test_another_score_refuses_the_cache():
    """The same regions with other groups keep keys elsewhere."""
    model = build("llama")
    with extend(model, "dpe", window=8, group_sizes=sizes("llama")):
        past = model(IDS[:, :30], use_cache=True)[CACHE]
    others = sizes("llama")[::-1]
    with (
        extend(model, "dpe", window=8, group_sizes=others),
        pytest.raises(ValueError, match="extend: cache must have been filled under dpe"),
    ):
        model(IDS[:, 30:], **{CACHE: past})


def test_divisors_are_learned():
    """Their gradient is the slope between two values of each."""
    model = build("gpt_neox").double()  # other families' norms round to float32
    pairs = len(sizes("gpt_neox"))
    divisors = torch.linspace(1.5, 4.0, pairs, dtype=torch.float64)

    def loss(d):
        with extend(model, "far_frequencies", window=8, divisors=d):
            return model(input_ids=IDS, use_cache=False).logits.square().mean()

    learned = divisors.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(learned), learned)
    for pair in (0, pairs - 1):
        step = torch.zeros(pairs, dtype=torch.float64)
        step[pair] = 1e-5
        with torch.no_grad():
            slope = (loss(divisors + step) - loss(divisors - step)) / 2e-5
        torch.testing.assert_close(found[pair], slope, rtol=1e-5, atol=1e-9)
