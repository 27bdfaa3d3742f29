"""Layers that call their attention, take their masks or rotate in ways of their own."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hf_models import (
    generate,
    gradients,
    logits,
    one_thread,  # noqa: F401
    since,
    tokens,
    transformers,
)

from extrope_kernels.integrations.transformers import extend, extension, trial
from extrope_kernels.integrations.transformers.attend import Attending, Heads, SdpaCall
from extrope_kernels.integrations.transformers.find import find_sites
from extrope_kernels.integrations.transformers.rows import Rows
from extrope_kernels.methods import rope
from extrope_kernels.scores import rerope

# By PyTorch's function, by a method, with a mask among several, with its own rotary embedding, and
# with a state beside the attention.
NAMES = (
    "FalconForCausalLM",
    "GPTNeoXJapaneseForCausalLM",
    "ZayaForCausalLM",
    "MoshiForCausalLM",
    "FalconH1ForCausalLM",
)
IDS = tokens(2, 20).clamp(max=99)
PADS = 7
SDPA = torch.nn.functional.scaled_dot_product_attention


def _build(name, **settings):
    if name == "MoshiForCausalLM":
        since("5.21", "Moshi's layers hand nothing to their attention")
    if name in ("FalconH1ForCausalLM", "Qwen3NextForCausalLM"):
        since("5.5", "hybrid models have caches that are no Cache")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return tiny_models.build(name, **settings)


def _assert_close(got, want):
    """But for the roundings of a float32 model: none is off by more than 1e-4 of the largest."""
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_generate_what_they_do_alone(name):
    model = _build(name)
    plain = logits(model, IDS)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :PADS] = mask[1, :PADS] = 0
    with extend(model, "rerope", window=64):
        _assert_close(logits(model, IDS), plain)
    with extend(model, "rerope", window=6):
        got = generate(model, ids, attention_mask=mask, max_new_tokens=3)
        slots = torch.arange(ids.shape[1])[None]
        by_slots = logits(model, ids, attention_mask=mask, position_ids=slots)
        _assert_close(by_slots[:, -1], got[:, 0])
        for row, pads in enumerate((0, PADS)):
            alone = ids[row : row + 1, pads:]
            want = generate(model, alone, max_new_tokens=3)
            _assert_close(got[row : row + 1], want)
            chosen = torch.cat((alone, want[:, :-1].argmax(-1)), 1)
            _assert_close(logits(model, chosen)[:, -3:], want)
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "FalconH1ForCausalLM"])
def test_padding_of_a_hybrid_with_a_static_cache(name):
    """What is padding is read from the mask's last columns by layers without keys."""
    model, ids, mask = _build(name), IDS.clone(), torch.ones_like(IDS)
    ids[1, :PADS] = mask[1, :PADS] = 0
    with extend(model, "rerope", window=6):
        want, got = (
            generate(model, ids, attention_mask=mask, max_new_tokens=4, cache_implementation=cache)
            for cache in ("dynamic", "static")
        )
    _assert_close(got, want)


def test_heads_of_two_sizes():
    """Those of full layers are wider than those of layers with a window."""
    model = _build("Gemma4ForCausalLM")
    plain = logits(model, IDS)
    with extend(model, "rerope", window=64, layers="all"):
        _assert_close(logits(model, IDS), plain)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_chunks_stay_chunks(settings):
    model = _build("Llama4ForCausalLM", attention_chunk_size=6)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :PADS] = mask[1, :PADS] = 0
    inputs = {"attention_mask": mask, "max_new_tokens": 9, **settings}
    want = generate(model, ids, **inputs)
    prompts = logits(model, ids, attention_mask=mask)
    with extend(model, "rerope", window=64, layers="all"):
        _assert_close(generate(model, ids, **inputs), want)
        got = logits(model, ids, attention_mask=mask)
    for row, pads in enumerate((0, PADS)):
        _assert_close(got[row, pads:], prompts[row, pads:])
    with extend(model, "rerope", window=3, layers="all"):
        got = generate(model, ids, **inputs)
        _assert_close(got[1:], generate(model, ids[1:, PADS:], max_new_tokens=9, **settings))
        chosen = torch.cat((ids[:1], got[:1, :-1].argmax(-1)), 1)
        _assert_close(logits(model, chosen)[:, -9:], got[:1])
    assert not torch.allclose(got, want, atol=1e-2)


def test_a_model_without_the_chunks_it_names_keeps_its_layers_as_they_are(monkeypatch):
    model = _build("Llama4ForCausalLM")
    monkeypatch.setattr(trial, "sees_chunks", lambda mask, size: False)
    with pytest.raises(ValueError, match="all its layers that rotate have a sliding window or ch"):
        extend(model, "rerope", window=3, layers="all")


@pytest.mark.parametrize("name", ["FalconForCausalLM", "GPTNeoXJapaneseForCausalLM"])
def test_gradients_are_those_of_the_plain_layers(name):
    model = _build(name)
    want = gradients(model, IDS)
    with extend(model, "rerope", window=64):
        for name, got in gradients(model, IDS).items():
            _assert_close(got, want[name])


def test_layers_that_rotate_by_themselves_are_computed_anew_for_their_gradients():
    model = _build("MoshiForCausalLM").train()
    with extend(model, "rerope", window=6):
        want = gradients(model, IDS)
        model.gradient_checkpointing_enable()
        for name, got in gradients(model, IDS, use_cache=False).items():
            _assert_close(got, want[name])


def test_dropout_of_a_module_is_refused_as_that_of_a_number_is():
    model = _build("GPTNeoXJapaneseForCausalLM").train()
    with pytest.raises(
        ValueError, match=r"attention_dropout 0, got 0\.1 in GPTNeoXJapaneseAttention"
    ):
        extend(model, "rerope", window=6)


@pytest.mark.parametrize(
    ("kinds", "layers", "reason"),
    [
        (["sliding_attention"] * 2, "all", "DeepseekV4Attention rotates its values too"),
        (["compressed_sparse_attention"] * 2, "full", "keys beside those of the tokens"),
    ],
)
def test_values_that_rotate_and_keys_without_a_place_are_refused(kinds, layers, reason):
    model = _build("DeepseekV4ForCausalLM", layer_types=kinds)
    with pytest.raises(ValueError, match=f"^extend: DeepseekV4Model is not a .*{reason}"):
        extend(model, "rerope", window=6, layers=layers)


def test_layers_with_alibi_have_no_rotation_to_place():
    model = _build("FalconForCausalLM", alibi=True)
    with pytest.raises(ValueError, match=r"FalconModel is not .* none of its layers rotates"):
        extend(model, "rerope", window=6)
    with pytest.raises(ValueError, match=r"FalconModel is not .* ALiBi in place of a rotation"):
        extend(model, "pi", factor=4.0)


def test_kinds_of_layers_with_a_window_are_known_by_a_part_of_their_name():
    model = _build("ZayaForCausalLM")
    (full,), (all_layers,) = (find_sites(model, layers) for layers in ("full", "all"))
    assert "hybrid_sliding" not in full.layer_types
    assert set(full.layer_types) < set(all_layers.layer_types) or len(all_layers.layer_types) == 1


def test_an_indexer_with_a_rotation_of_its_own_keeps_tables():
    model = _build("Qwen4ExpForCausalLM")
    plain = logits(model, IDS)
    with extend(model, "rope"):
        _assert_close(logits(model, IDS), plain)


def test_a_rehearsal_that_fails_changes_nothing(monkeypatch):
    model = _build("LlamaForCausalLM")
    plain = logits(model, IDS)

    def fail(owner):
        raise KeyError("sliding_attention")

    monkeypatch.setattr(extension, "run_on_trial", fail)
    with pytest.raises(ValueError, match=r"takes tables alone .'sliding_attention'"):
        extend(model, "rerope", window=6)
    monkeypatch.undo()
    assert torch.equal(logits(model, IDS), plain)
    extend(model, "rerope", window=6).restore()


def test_masks_by_other_names_are_not_guessed_at():
    model = _build("ZayaForCausalLM")
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with extend(model, "rerope", window=6):
        want = logits(model, IDS)
        masks = dict.fromkeys(("hybrid", "hybrid_sliding", "conv"))
        assert torch.equal(logits(model, IDS, attention_mask=masks), want)
        with pytest.raises(ValueError, match="by the name of full_attention, got hybrid and"):
            logits(model, IDS, attention_mask={**masks, "hybrid": mask})


def _attending(seqlen):
    rows = Rows(3, seqlen, ((0, 1, 0),), torch.arange(3, 3 + seqlen)[None], None)
    tables = torch.arange(2.0 * seqlen).view(1, seqlen, 2)
    attending = Attending(rerope(window=4), None, rope(4), rows, rows.positions, False)
    return attending.changed(stored=(tables, tables))


def test_the_attention_is_sliced_to_the_last_tokens_as_tables_are():
    whole = _attending(5)
    part = whole[:, slice(-2, None), :]
    assert (part.rows.past, part.rows.new, part.rows.total) == (6, 2, 8)
    assert part.positions.tolist() == [[6, 7]]
    assert all(torch.equal(table, whole.stored[0][:, -2:]) for table in part.stored)
    for index in (slice(0, 2), slice(None, None, 2)):
        with pytest.raises(ValueError, match="tables must be sliced to the last tokens"):
            whole[:, index, :]


def test_a_cache_must_hold_the_keys_of_a_chunk():
    q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 3, 8)  # tokens 3 and 4, keys from 2 on
    layer = torch.nn.Linear(1, 1)
    out = _attending(2).of(Heads(0, 4, False, 1, chunk_size=3)).attend(layer, q, k, k, {})
    assert out.shape == (1, 2, 1, 8)
    with pytest.raises(ValueError, match="all keys of a chunk of 4, got those from 2 on"):
        _attending(2).of(Heads(0, 4, False, 1, chunk_size=4)).attend(layer, q, k, k, {})


def test_pytorchs_function_is_asked_for_nothing_else_beside_a_mask():
    q = torch.zeros(1, 2, 3, 8)
    mask = SdpaCall().mask(torch.nn.Linear(1, 1), _attending(3))
    with pytest.raises(ValueError, match="is_causal must be False beside a mask"):
        SDPA(q, q, q, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match=r"attention_dropout 0, got 0\.1 in Linear"):
        SDPA(q, q, q, attn_mask=mask, dropout_p=0.1)
    with pytest.raises(TypeError):
        q + mask


def test_a_mask_for_pytorchs_function_may_be_cut():
    """Falcon's layers cut it to the keys that there are, before transformers 5.2."""

    class Values:
        def attend(self, layer, q, k, v, options):
            return v.transpose(1, 2)

    mask = SdpaCall().mask(torch.nn.Identity(), Values())[:, :, :, :3]
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(SDPA(x, x, x, mask), x)


def test_an_attention_that_fails_on_trial_is_refused(monkeypatch):
    """Evolla's has no grouped heads, in transformers 5.0."""

    def fails(*args, **options):
        raise RuntimeError("sizes must match")

    model = tiny_models.build("LlamaForCausalLM")
    modeling = transformers.models.llama.modeling_llama
    monkeypatch.setattr(modeling, "eager_attention_forward", fails)
    with pytest.raises(ValueError, match=r"LlamaAttention: .* cannot be tried out \(sizes must m"):
        extend(model, "rerope", window=6)
