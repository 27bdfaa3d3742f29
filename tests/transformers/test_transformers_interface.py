"""`model.set_attn_implementation("extrope")`: our attention in any model, extended or not."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.hf_models import (
    SCORE_PARAMETERS,
    CountOps,
    assert_as_exact_as,
    assert_same,
    build,
    error,
    generate,
    gradients,
    logits,
    tokens,
    transformers,
)

from extrope_kernels.integrations.transformers import extend, register_interface

register_interface()
NEW = 4
STATIC = {"cache_implementation": "static"}
PROMPT = tokens(2, 29)
MASK = torch.ones_like(PROMPT)
MASK[0, :5] = 0
FAMILIES = ["llama", "gemma2", "gemma3_text"]  # gemma2: soft caps; both Gemmas: a sliding window
OURS = ("extrope.attention_fwd", "extrope.decode")
THEIRS = ("aten.scaled_dot_product", "aten._scaled_dot_product")
EXTENSIONS = [
    ("llama", "yarn", {"factor": 4.0}),
    ("llama", "rerope", {"window": 16, "log_n": 16}),
    ("gemma3_text", "leaky_rerope", SCORE_PARAMETERS["leaky_rerope"]),
]


EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "num_key_value_heads": 2, "use_sliding_window": True},
}


def run(model, mask, **settings):
    return generate(model, PROMPT, attention_mask=mask, max_new_tokens=NEW, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("cache", "padded"),
    [({}, False), ({}, True), ({"use_cache": False}, True), (STATIC, True)],
)
def test_a_plain_model_gives_what_it_gave(family, cache, padded):
    model, mask = build(family), MASK if padded else None
    theirs = run(model, mask, **cache)
    twin, ids = build(family).double(), torch.cat((PROMPT, theirs.argmax(-1)[:, :-1]), 1)
    rows = (ids[0, 5:] if padded else ids[0], ids[1])
    want = torch.cat([logits(twin, row[None])[:, -NEW:] for row in rows])
    model.set_attn_implementation("extrope")
    with CountOps() as count:
        ours = run(model, mask, **cache)
    assert count.of(*OURS) == 2 * NEW and count.of(*THEIRS) == 0
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert_as_exact_as(ours, theirs, want)


@pytest.mark.parametrize(("family", "method", "parameters"), EXTENSIONS)
def test_an_extended_model_gives_what_the_extension_gives(family, method, parameters):
    model = build(family).double()
    plain = run(model, MASK)
    with extend(model, method, **parameters):
        want = run(model, MASK)
        model.set_attn_implementation("extrope")
        assert_same(run(model, MASK), want)
        assert_same(run(model, MASK, use_cache=False), want)
    assert_same(run(model, MASK), plain)
    with extend(model, method, **parameters):
        assert_same(run(model, MASK), want)


@pytest.mark.parametrize(("family", "sizes"), [("gemma3_text", {}), ("qwen2_moe", EXPERTS)])
def test_a_prompt_has_no_mask_of_all_pairs(family, sizes):
    """Qwen2 MoE's layers leave their window to the mask that is not made here."""
    ids = tokens(1, 400)
    model, wide, twin = (
        build(family, sliding_window=window, **sizes) for window in (24, ids.numel(), 24)
    )
    if family == "qwen2_moe":
        twin.set_experts_implementation("eager")  # others have no float64
    theirs, want = logits(model, ids), logits(twin.double(), ids)
    assert error(logits(wide, ids), want) > 0.1
    model.set_attn_implementation("extrope")
    with CountOps() as count:
        assert_as_exact_as(logits(model, ids), theirs, want)
    assert count.elements < ids.numel() ** 2


def test_a_window_that_only_the_mask_knows():
    """Phimoe's layers pass none to their attention."""
    model = tiny_models.build("PhimoeForCausalLM", sliding_window=8)
    twin = tiny_models.build("PhimoeForCausalLM", sliding_window=8)
    twin.set_experts_implementation("eager")  # others have no float64
    theirs, want = logits(model, PROMPT), logits(twin.double(), PROMPT)
    model.set_attn_implementation("extrope")
    assert_as_exact_as(logits(model, PROMPT), theirs, want)


def test_gradients_are_those_of_torch():
    model = build("llama").double()
    want = gradients(model, PROMPT)
    model.set_attn_implementation("extrope")
    for name, got in gradients(model, PROMPT).items():
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["packed", "padded on the right", "dropout"])
def test_what_is_not_causal_rows_is_left_to_torch(kind, family):
    model = build(family, attention_dropout=0.1 if kind == "dropout" else 0.0).double()
    inputs = {}
    if kind == "packed":
        inputs["position_ids"] = torch.cat((torch.arange(12), torch.arange(17)))[None]
    elif kind == "padded on the right":
        inputs["attention_mask"] = MASK.flip(1)
    want, got = [], []
    for name, found in (("sdpa", want), ("extrope", got)):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        model.train(kind == "dropout")
        with CountOps() as count:
            found.append(logits(model, PROMPT, **inputs))
    assert not count.of(*OURS)
    torch.testing.assert_close(got, want)


def test_sinks_and_caps_are_never_dropped():
    model = build("gemma2")
    model.set_attn_implementation("extrope")
    with pytest.raises(ValueError, match="extrope: a layer with sinks or a soft"):
        logits(model, PROMPT, attention_mask=MASK.flip(1))


def test_a_compiled_step_asserts_what_it_cannot_look_at():
    torch._dynamo.reset()
    model, hole = build("llama", num_hidden_layers=1), MASK.clone()
    hole[1, 9] = 0
    want = [run(model, mask).argmax(-1) for mask in (MASK, hole)]
    model.set_attn_implementation("extrope")
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(run(model, MASK, **settings).argmax(-1), want[0])
    assert torch.equal(run(model, hole).argmax(-1), want[1])
    with pytest.raises(RuntimeError, match="a row's keys must lie in one piece"):
        run(model, hole, **settings)
