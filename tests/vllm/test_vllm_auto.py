"""`{"extrope": "auto"}`: the method by max_model_len, and why."""

from __future__ import annotations

import pytest
from test_vllm_settings import SEEING, YARN, config

from extrope_kernels.integrations.vllm.auto import choose_entry
from extrope_kernels.integrations.vllm.engine import make_engine

RERO = {"method": "rerope", "window": 64}
ORIGINAL = "original_max_position_embeddings"
OF_FILE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: 32}
CHUNKS = {"dual_chunk_attention_config": {"chunk_size": 96, "local_size": 32}}
# Without the chunks it reaches its training alone, whatever max_position_embeddings says.
OF_1M = {"dual_chunk_attention_config": {"chunk_size": 48, "local_size": 16, ORIGINAL: 64}}


def accepts(made):
    return None


@pytest.mark.parametrize(
    ("length", "text", "model", "entry", "why"),
    [
        (512, {}, {}, {"score": RERO}, "exact within its window, half of 128 tokens"),
        (512, {}, SEEING, YARN, "no score method: tokens must have one position"),
        (512, {"kv_lora_rank": 8}, {}, YARN, "no score method: keys must be cached whole"),
        (512, {"rope_parameters": OF_FILE}, {}, {"score": RERO}, "half of 128 tokens"),
        (512, CHUNKS, {}, {"score": {"method": "dual_chunk"}}, "as it was trained"),
        (128, OF_1M, {}, {"score": {"method": "dual_chunk"}}, "as it was trained"),
    ],
)
def test_the_method_that_measured_best_for_a_length(length, text, model, entry, why):
    made = config("auto", text, {"max_model_len": length} | model)
    given = made.additional_config
    said = choose_entry(made, accepts)
    assert made.additional_config == {"extrope": entry} and given == {"extrope": "auto"}
    assert said.startswith(f"auto for max_model_len {length} is {entry}: ") and why in said
    assert choose_entry(made, accepts) is None  # a second time, as in copies


@pytest.mark.parametrize(
    ("length", "text"), [(128, {}), (96, {"rope_parameters": OF_FILE})], ids=str
)
def test_a_model_that_reaches_the_length_stays_as_it_is(length, text):
    made = config("auto", text, {"max_model_len": length})
    said = choose_entry(made, accepts)
    assert said == f"auto for max_model_len {length} leaves the model, which reaches 128, as it is"
    assert made.additional_config == {}


def test_a_platform_without_our_attention_gets_yarn():
    def refuses(made):
        raise ValueError("extrope: it must run on CPUs or NVIDIA GPUs, got tpu")

    made = config("auto")
    assert "no score method: it must run on CPUs or NVIDIA GPUs" in choose_entry(made, refuses)
    assert make_engine(made).settings.method == "yarn"


def test_other_entries_stay():
    for extrope in (None, YARN):
        made = config(extrope)
        before = made.additional_config
        assert choose_entry(made, accepts) is None and made.additional_config is before


def test_a_model_that_no_entry_can_serve_is_refused():
    with pytest.raises(ValueError, match=r"^extrope: the model must rotate, got Llama"):
        choose_entry(config("auto", {"rope_parameters": None}), accepts)


def test_an_engine_says_what_was_chosen(llama, monkeypatch):
    from support.vllm_engines import LENGTH, engine, expected, generated, tokens_of

    from extrope_kernels.integrations.vllm.plugin import LOGGER

    (model, folder), said = llama, []
    monkeypatch.setattr(LOGGER, "info", lambda line, *values: said.append(line % values))
    with engine(folder, "auto") as llm:
        assert tokens_of(generated(llm)) == tokens_of(expected(model, [RERO]))
    chosen, loaded = said
    assert chosen.startswith(f"extrope: auto for max_model_len {LENGTH} is {{'score': {RERO}}}: ")
    assert loaded.startswith("extrope: rerope window=64 (trained length 128")
