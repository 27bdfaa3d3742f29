"""Models that were trained with dual chunks: what they say is taken over, and their temperature."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_vllm_settings import YARN, config

from extrope_kernels import scores
from extrope_kernels.integrations.vllm.dual_chunks import take_over
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
    assert take_over(made)
    settings = make_engine(made).settings
    assert settings.score == scores.dual_chunk(96, 32)
    assert settings.scale_from == 128
    assert not take_over(made)  # a second time, as in copies
    assert make_engine(made).settings == settings


def test_what_is_given_goes_before():
    given = {"score": DUAL | {"local_window": 16, TRAINED: None}}
    made = config(given, model=model_of())
    assert take_over(made)
    settings = make_engine(made).settings
    assert settings.score == scores.dual_chunk(96, 16) and settings.scale_from is None
    assert given == {"score": DUAL | {"local_window": 16, TRAINED: None}}


def test_other_methods_leave_vllms_part_out_as_well():
    made = config(YARN, model=model_of())
    assert not take_over(made)
    text = made.model_config.hf_text_config
    assert not hasattr(text, KEY) and make_engine(made).settings.score is None
    assert text.original_max_position_embeddings == 128  # what yarn counts from


def test_without_it_parameters_are_missing():
    made = config({"score": DUAL}, model=model_of({}))
    assert not take_over(made)
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
