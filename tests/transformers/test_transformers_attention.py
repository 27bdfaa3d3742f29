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
from extrope_kernels.integrations.transformers.attention import read_rows

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


HOLE = MASK.clone()
HOLE[1, 9] = 0
PACKED = torch.cat((torch.arange(12), torch.arange(17)))[None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["left", "right", "packed"])
def test_rows_with_padding_and_packed_rows_are_one_call(kind, family):
    """Each sequence as if it came alone, by one call a layer of the op for packed sequences."""
    model, twin, inputs = build(family), build(family).double(), {"attention_mask": MASK}
    places = [(0, slice(5, None)), (1, slice(None))]
    if kind == "right":
        inputs, places[0] = {"attention_mask": MASK.flip(1)}, (0, slice(0, -5))
    elif kind == "packed":
        inputs = {"position_ids": PACKED}
        places = [(row, part) for row in (0, 1) for part in (slice(0, 12), slice(12, None))]
    alone = [PROMPT[row : row + 1, part] for row, part in places]
    theirs = torch.cat([logits(model, each) for each in alone], 1)
    want = torch.cat([logits(twin, each) for each in alone], 1)
    model.set_attn_implementation("extrope")
    with CountOps() as count:
        got = logits(model, PROMPT, **inputs)
    assert count.of(*OURS) == 2 and count.of(*THEIRS) == 0
    got = torch.cat([got[row : row + 1, part] for row, part in places], 1)
    assert_as_exact_as(got, theirs, want)


def test_padding_sees_little():
    """The cost of a prompt's padding is linear: nobody reads what it sees."""
    numbers = torch.ones(2, 1, 1, 300, dtype=torch.int32)
    numbers[0, ..., :200] = 0
    new = torch.empty(2, 4, 300, 8)
    rows = read_rows(numbers, new, new, {})
    assert rows.cu_seqlens.diff().tolist() == [64, 64, 64, 8, 100, 300]


@pytest.mark.parametrize("kind", ["left", "packed"])
def test_gradients_of_rows_with_padding_and_packed_rows(kind):
    inputs = {"attention_mask": MASK} if kind == "left" else {"position_ids": PACKED}
    model = build("llama").double()
    found = []
    for name in ("sdpa", "extrope"):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(PROMPT, use_cache=False, **inputs).logits
        out[MASK.bool()].log_softmax(-1)[:, 0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_a_finished_mask_of_pairs_is_read():
    model, pairs = build("llama").double(), torch.ones(29, 29, dtype=torch.bool).tril()
    padded = pairs & MASK[:, None].bool()
    packed = pairs & torch.block_diag(torch.ones(12, 12), torch.ones(17, 17)).bool()
    added = torch.zeros(29, 29).masked_fill(~packed, torch.finfo(torch.float32).min)
    for mask, inputs in (
        (padded[:, None], {"attention_mask": MASK}),
        (packed[None, None], {"position_ids": PACKED}),
        (added[None, None], {"position_ids": PACKED}),
    ):
        inputs = {"position_ids": torch.arange(29)[None], **inputs}
        given = {**inputs, "attention_mask": mask}
        model.set_attn_implementation("sdpa")
        want = logits(model, PROMPT, **inputs)
        model.set_attn_implementation("extrope")
        with CountOps() as count:
            got = logits(model, PROMPT, **given)
        assert count.of(*THEIRS) == 0
        torch.testing.assert_close(got[0, 5:], want[0, 5:])
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["hole", "sees later ones", "dropout"])
def test_what_is_not_causal_rows_is_left_to_torch(kind, family):
    model = build(family, attention_dropout=0.1 if kind == "dropout" else 0.0).double()
    inputs = {}
    if kind == "hole":
        inputs["attention_mask"] = HOLE
    elif kind == "sees later ones":
        mask = torch.ones(29, 29, dtype=torch.bool).tril(1)[None, None]
        inputs["attention_mask"] = mask
        if family == "gemma3_text":
            inputs["attention_mask"] = {"full_attention": mask, "sliding_attention": mask}
    want, got = [], []
    for name, found in (("sdpa", want), ("extrope", got)):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        model.train(kind == "dropout")
        with CountOps() as count:
            found.append(logits(model, PROMPT, **inputs)[HOLE.bool()])  # of the tokens
    assert not count.of(*OURS)
    torch.testing.assert_close(got, want)


def test_sinks_and_caps_are_never_dropped():
    model = build("gemma2")
    model.set_attn_implementation("extrope")
    with pytest.raises(ValueError, match="extrope: a layer with sinks or a soft"):
        logits(model, PROMPT, attention_mask=HOLE)


def test_a_compiled_step_asserts_what_it_cannot_look_at():
    torch._dynamo.reset()
    model, hole = build("llama", num_hidden_layers=1), HOLE
    want = [run(model, mask).argmax(-1) for mask in (MASK, hole)]
    model.set_attn_implementation("extrope")
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(run(model, MASK, **settings).argmax(-1), want[0])
    assert torch.equal(run(model, hole).argmax(-1), want[1])
    with pytest.raises(RuntimeError, match="a row's keys must lie in one piece"):
        run(model, hole, **settings)
