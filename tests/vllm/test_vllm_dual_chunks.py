"""Models that were trained with dual chunks: what they say is taken over, and their temperature."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support import score_examples
from support.attention_oracle import closed_form
from test_vllm_settings import YARN, config

from extrope_kernels import RopeFreqs, scores
from extrope_kernels.integrations.vllm.dual_chunks import adopt_dual_chunk_config
from extrope_kernels.integrations.vllm.engine import make_engine

KEY, TRAINED = "dual_chunk_attention_config", "original_max_position_embeddings"
THEIRS = {"chunk_size": 96, "local_size": 32, TRAINED: 128}
DUAL = {"method": "dual_chunk"}


def model_of(theirs=THEIRS):
    """A configuration's text; and of images with it, as vLLM's of larger models."""
    text = SimpleNamespace(
        model_type="qwen2",
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **{KEY: theirs},
    )
    return {"hf_text_config": text, "hf_config": SimpleNamespace(text_config=text)}


def test_a_model_says_its_chunks():
    made = config({"score": DUAL}, model=model_of())
    assert adopt_dual_chunk_config(made)
    settings = make_engine(made).settings
    assert settings.score == scores.dual_chunk(96, 32)
    assert settings.scale_from == 128
    assert not adopt_dual_chunk_config(made)  # a second time, as in copies
    assert make_engine(made).settings == settings


def test_what_is_given_goes_before():
    given = {"score": DUAL | {"local_window": 16, TRAINED: None}}
    made = config(given, model=model_of())
    assert adopt_dual_chunk_config(made)
    settings = make_engine(made).settings
    assert settings.score == scores.dual_chunk(96, 16) and settings.scale_from is None
    assert given == {"score": DUAL | {"local_window": 16, TRAINED: None}}


def test_other_methods_leave_vllms_part_out_as_well():
    made = config(YARN, model=model_of())
    assert not adopt_dual_chunk_config(made)
    text = made.model_config.hf_text_config
    assert not hasattr(text, KEY) and make_engine(made).settings.score is None
    assert text.original_max_position_embeddings == 128  # what yarn counts from


def test_without_it_parameters_are_missing():
    made = config({"score": DUAL}, model=model_of({}))
    assert not adopt_dual_chunk_config(made)
    with pytest.raises(ValueError, match="dual_chunk needs chunk_size and local_window"):
        make_engine(made)


def test_the_temperature_is_that_of_each_querys_position():
    """Chunks and steps of several requests, padding, buffers for good; against the formula."""
    from extrope_kernels.integrations.vllm.lengths import Lengths

    lengths, pointers = Lengths({}, 40, 4, 64, "cpu"), set()
    for queries, totals in (([1, 1, 40, 0], [5, 60, 90, 0]), ([7, 3], [7, 1000])):
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        lengths.update(starts, torch.tensor(totals, dtype=torch.int32))
        ends = [range(n - q + 1, n + 1) for q, n in zip(queries, totals, strict=True)]
        n = torch.tensor([n for each in ends for n in each]).double()
        want = (0.1 * (n / 40).log() + 1).clamp(min=1) ** 2
        scale = lengths.query_scale(None, True, len(n))
        torch.testing.assert_close(scale.double(), want, atol=0, rtol=1e-7)
        pointers.add(scale.data_ptr())
    assert len(pointers) == 1 and lengths.query_scale(None, False, 1) is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("transformers")
    from support.vllm_engines import build

    folder = tmp_path_factory.mktemp("qwen2")
    return build("Qwen2", folder, hidden_size=128, **{KEY: THEIRS}), folder


@torch.no_grad()
def dense(model, prompt):
    """Log-probabilities of a prompt by dense attention in float64, with the temperature."""
    from transformers import AttentionInterface
    from transformers.models.qwen2 import modeling_qwen2

    seqlen, freqs = len(prompt), RopeFreqs(model.model.rotary_emb.inv_freq)
    relative = score_examples.dual_chunk(seqlen, seqlen, chunk_size=96, local_window=32)
    n = torch.arange(1, seqlen + 1).double()
    scale = (0.1 * (n / 128).log() + 1).clamp(min=1) ** 2

    def attention(module, q, k, v, mask, scaling, **_):
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        return closed_form(*qkv, relative, freqs, scale=scaling, query_scale=scale)[0], None

    AttentionInterface.register("dense", attention)
    model, ids = copy.deepcopy(model).double(), torch.tensor([prompt])
    model.set_attn_implementation("dense")
    with pytest.MonkeyPatch.context() as patch:  # keys and queries as they come
        patch.setattr(modeling_qwen2, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
        logprobs = model(ids).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].float()


def difference_to(ref, got):
    return max((a.of_prompt - b).abs().max().item() for a, b in zip(got, ref, strict=True))


@pytest.fixture(scope="module")
def wanted(tiny):
    """The formulas, and transformers under `extend` without parameters, in float32."""
    from support.vllm_engines import PROMPTS, expected

    with pytest.warns(UserWarning, match="the sparse part .* is left out"):
        want = expected(tiny[0], [DUAL])
    return [dense(tiny[0], prompt) for prompt in PROMPTS], want


def test_extend_takes_them_from_the_configuration(tiny, wanted):
    from support.vllm_engines import PROMPTS, difference, expected, logits_behind, regret, tokens_of

    model, (ref, want) = tiny[0], wanted
    assert difference_to(ref, want) < 1e-4  # the logits' rounding in float32
    given = {"chunk_size": 96, "local_window": 32}
    assert difference(expected(model, [DUAL | given | {TRAINED: 128}]), want) == 0
    for other in ({TRAINED: None}, {TRAINED: 64}, {"local_window": 48}):
        assert difference(expected(model, [DUAL | other]), want) > 0.01
    for prompt, each in zip(PROMPTS, want, strict=True):  # generate's cache, against a forward
        assert regret(logits_behind(model, [DUAL], prompt, each.tokens), each.tokens) == 0
    assert tokens_of(want) != tokens_of(expected(model, []))


@torch.no_grad()
def test_the_temperature_counts_from_a_rows_first_token(tiny):
    from support.vllm_engines import PROMPTS, expected

    from extrope_kernels.integrations.transformers import extend

    model, (long, _, short, _) = tiny[0], PROMPTS
    pads = len(long) - len(short)
    ids = torch.tensor([long, [0] * pads + short])
    mask = (torch.arange(len(long)) >= torch.tensor([[0], [pads]])).long()
    (alone,) = expected(model, [DUAL], [short])
    with extend(model, **DUAL):
        logprobs = model(ids, attention_mask=mask).logits[1, pads:-1].log_softmax(-1)
    got = logprobs.gather(1, torch.tensor(short)[1:, None])[:, 0]
    torch.testing.assert_close(got, alone.of_prompt, atol=1e-4, rtol=0)


def test_engine(tiny, wanted):
    """No override and no parameters, against transformers and against the formulas."""
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    from support.vllm_engines import difference, engine, expected, generated, tokens_of

    (model, folder), (ref, want) = tiny, wanted
    with engine(folder, {"score": DUAL}, enable_prefix_caching=True) as llm:
        got = generated(llm)
    assert tokens_of(got) == tokens_of(want)
    assert difference_to(ref, got) <= 2 * difference_to(ref, want)
    assert difference(got, expected(model, [DUAL | {TRAINED: None}])) > 0.01
