"""Engines of vLLM under `extrope`: all sorts of models, caches, processes, refusals."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import (
    LENGTH,
    PROMPTS,
    SIZES,
    TRAINED,
    build,
    difference,
    engine,
    expected,
    generated,
    rms,
    save_tokenizer,
    tokens_of,
)

from extrope_kernels.integrations.vllm.plugin import LOGGER

RERO = {"method": "rerope", "window": 64}
YARN = {"method": "yarn", "factor": 4.0}
LEAKY = {"method": "leaky_rerope", "window": 64, "factor": 4.0}
TWO_KINDS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 24,
}
GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
TWO_BASES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    }
}
MODELS = {
    "Gemma3": TWO_KINDS | GEMMA | TWO_BASES,
    "Gemma2": TWO_KINDS | GEMMA | {"attn_logit_softcapping": 5.0},
    "Qwen3": {},  # norms of queries and keys
    "Cohere": {"tie_word_embeddings": True},  # pairs side by side
    "StableLm": {"partial_rotary_factor": 0.5, "hidden_size": 128},  # half of a head
}


@pytest.mark.parametrize(
    ("name", "methods"),
    [*((name, [YARN]) for name in MODELS), *((name, [YARN, LEAKY]) for name in MODELS)],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} methods",
)
def test_model(tmp_path, name, methods):
    equals_transformers(build(name, tmp_path, **MODELS[name]), tmp_path, methods)


def test_sinks(tmp_path):
    """All experts work on every token, since a choice among them is not continuous."""
    rotation = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
    rotation |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 32}
    given = TWO_KINDS | {"num_local_experts": 4, "num_experts_per_tok": 4}
    model = build("GptOss", tmp_path, **given, rope_parameters=rotation)
    model.set_experts_implementation("eager")  # which knows float64
    equals_transformers(model, tmp_path, [LEAKY])


def equals_transformers(model, folder, methods, extrope=None):
    model.set_attn_implementation("eager")  # which knows caps
    plain, want = expected(model, []), expected(model, methods)
    ref = expected(copy.deepcopy(model).double(), methods)
    *frequencies, last = methods
    if extrope is None:
        extrope = last if last is YARN else {**(frequencies or [{}])[0], "score": last}
    with engine(folder, extrope) as llm:
        got = generated(llm)
    assert tokens_of(got) == tokens_of(want)
    # The largest of 547 float32 errors, 4 and 11 units in the last place, differs by chance.
    assert rms(got, ref) <= 2 * rms(want, ref)
    assert difference(got, plain) > 0.01


def runner_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def modules(llm):
    """The rotary layer and the attention of a model's first layer."""
    attention = runner_of(llm).get_model().model.layers[0].self_attn
    return attention.rotary_emb, attention.attn


def test_engines_without_configuration_are_vllms(llama):
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    model, folder = llama
    within = [prompt for prompt in PROMPTS if len(prompt) < TRAINED - 16]
    want = expected(model, [], within)
    with engine(folder, None) as llm:
        rotary, attention = modules(llm)
        assert type(rotary) is RotaryEmbedding and hasattr(rotary, "cos_sin_cache")
        assert type(attention.impl) is CPUAttentionBackendImpl
        assert tokens_of(generated(llm, within)) == tokens_of(want)
        # A control: vLLM's own table ends where ours has no end.
        assert not difference(generated(llm), expected(model, [])) < 1


def test_encoders_without_configuration_are_vllms(tmp_path):
    """Each token of BERT sees all others, by a builder that vLLM derives from its backend's."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = SIZES | {"num_attention_heads": 2, "max_position_embeddings": LENGTH}
    model = BertModel(BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    options = {"runner": "pooling", "skip_tokenizer_init": False, "max_num_batched_tokens": LENGTH}
    with engine(tmp_path, None, **options) as llm:
        outs = llm.embed([{"prompt_token_ids": p} for p in PROMPTS], use_tqdm=False)
    got = torch.tensor([out.outputs.embedding for out in outs])
    want, ref = (embeddings(each) for each in (model, copy.deepcopy(model).double()))
    assert (got - ref).abs().max() <= 4 * (want - ref).abs().max()  # its products are its own


@torch.no_grad()
def embeddings(model):
    """(prompts, hidden_size): what BERT's first token is in the end, to length 1."""
    firsts = [model(torch.tensor([prompt])).last_hidden_state[0, 0] for prompt in PROMPTS]
    return torch.nn.functional.normalize(torch.stack(firsts), dim=-1)


def test_engines_in_turn_have_their_own_methods_and_say_so(llama, monkeypatch):
    model, folder = llama
    said = []
    monkeypatch.setattr(LOGGER, "info", lambda line, *values: said.append(line % values))
    for methods, extrope in (
        ([YARN], YARN),
        ([RERO], {"score": RERO}),
        ([YARN], YARN),
        ([YARN, LEAKY], {**YARN, "score": LEAKY}),
    ):
        with engine(folder, extrope) as llm:
            assert tokens_of(generated(llm)) == tokens_of(expected(model, methods))
    numbers = f"(trained length {TRAINED}, base 10000, max_model_len {LENGTH})"
    assert said == [
        f"extrope: yarn factor=4.0 {numbers}",
        f"extrope: rerope window=64 {numbers}",
        f"extrope: yarn factor=4.0 {numbers}",
        f"extrope: leaky_rerope window=64 factor=4.0 over yarn factor=4.0 {numbers}",
    ]


def test_frequencies_outlast_a_sleep(llama):
    """Of level 2, by which vLLM drops all of a model and restores its buffers alone."""
    model, folder = llama
    with engine(folder, YARN) as llm:
        rotary, _ = modules(llm)
        buffers = dict(runner_of(llm).get_model().named_buffers())
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        rotary.freqs.inv_freq.zero_()
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
        assert tokens_of(generated(llm)) == tokens_of(expected(model, [YARN]))


@pytest.mark.parametrize("extrope", [YARN, {"score": RERO}], ids=["yarn", "rerope"])
def test_rotary_layers_of_another_plugin_are_refused(llama, extrope, monkeypatch):
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # once a process: ours has to be there when theirs is gone
    theirs = type("Theirs", (RotaryEmbedding,), {})
    monkeypatch.setitem(op_registry_oot, "RotaryEmbedding", theirs)
    message = "extrope: the model must rotate by vLLM's rotary layer, got Theirs"
    with pytest.raises(ValueError, match=message), engine(llama[1], extrope):
        pass


def test_spawned_processes(llama, monkeypatch):
    model, folder = llama
    want = expected(model, [YARN, RERO])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(folder, {**YARN, "score": RERO}) as llm:
        assert tokens_of(generated(llm)) == tokens_of(want)


def test_cached_prefixes_beside_a_sliding_window(tmp_path):
    """Every other layer has one; test_vllm_methods.py has caches of every method without."""
    model = build("Gemma2", tmp_path, **MODELS["Gemma2"])
    model.set_attn_implementation("eager")
    longer = [PROMPTS[0] + PROMPTS[1], PROMPTS[0] + PROMPTS[3]]
    plain, want = (expected(model, methods, longer) for methods in ([], [LEAKY]))
    ref = expected(copy.deepcopy(model).double(), [LEAKY], longer)
    with engine(tmp_path, {"score": LEAKY}, enable_prefix_caching=True) as llm:
        generated(llm, PROMPTS, logprobs=False)
        got = generated(llm, longer, logprobs=False)
    assert all(each.cached >= len(PROMPTS[0]) // 32 * 32 for each in got)
    assert tokens_of(got) == tokens_of(want)
    # The new tokens are few, so their largest error is held against that over the prompts as well.
    theirs = max(difference(want, ref, of) for of in ("of_prompt", "of_new"))
    assert difference(got, ref, "of_new") <= 2 * theirs
    assert difference(got, plain, "of_new") > 0.01


def test_keys_on_a_disk(llama, tmp_path, monkeypatch):
    """The second time they are read; that they are of one method only the user can know."""
    model, folder = llama
    warned = []
    monkeypatch.setattr(LOGGER, "warning", lambda line, *values: warned.append(line % values))
    store = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    options = {"max_num_batched_tokens": LENGTH, "kv_transfer_config": store}
    options["max_model_len"] = 320  # as far as it reaches, past which there is another warning
    want = tokens_of(expected(model, [LEAKY]))
    with engine(folder, {"score": LEAKY}, **options) as llm:
        assert tokens_of(generated(llm, logprobs=False)) == want
        assert any(tmp_path.iterdir())
        again = generated(llm, logprobs=False)
    assert tokens_of(again) == want and again[0].cached >= 288
    (line,) = warned
    assert "kv_transfer_config stores or sends must stay" in line


def test_dummy_runs_write_nothing(llama):
    """As an idle rank makes them, among blocks that hold prefixes of requests to come."""
    with engine(llama[1], {"score": LEAKY}, enable_prefix_caching=True) as llm:
        generated(llm, PROMPTS)
        runner = runner_of(llm)
        caches = [cache.clone() for cache in runner.kv_caches]
        assert all(cache.any() for cache in caches)
        for table in runner.input_batch.block_table.block_tables:
            table.block_table.np[:] = 1  # of a request that has left
        runner._dummy_run(4, force_attention=True)
        for before, after in zip(caches, runner.kv_caches, strict=True):
            assert torch.equal(before, after)


def test_preemption(llama, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    model, folder = llama
    prompts = [PROMPTS[0][: 90 + n] for n in range(4)]
    want = expected(model, [LEAKY], prompts)
    preempted, preempt = [], Scheduler._preempt_request

    def noted(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    # One block is vLLM's own; the others hold four prompts of 3 blocks, not what comes behind.
    with engine(
        folder,
        {"score": LEAKY},
        num_gpu_blocks_override=14,
        max_num_batched_tokens=512,
        max_model_len=TRAINED,
    ) as llm:
        got = generated(llm, prompts, logprobs=False)
    assert preempted
    assert tokens_of(got) == tokens_of(want)


def configured(folder, additional, **options):
    """An engine's configuration, without the engine."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"max_model_len": LENGTH, "skip_tokenizer_init": True} | options
    return EngineArgs(
        model=str(folder), additional_config=additional, **options
    ).create_engine_config()


def test_a_method_makes_a_model_longer_by_itself(llama, monkeypatch):
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    from vllm import envs

    envs.enable_envs_cache()  # as an engine before leaves it
    made = configured(llama[1], {"extrope": YARN})
    assert made.model_config.max_model_len == LENGTH > TRAINED
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ
    with pytest.raises(Exception, match="greater than the derived max_model_len"):
        configured(llama[1], {})


def test_what_is_likely_not_meant_is_told(llama, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda line, *values: said.append(line % values))
    longer = {"max_position_embeddings": LENGTH}
    configured(llama[1], {"extrope": YARN}, hf_overrides=longer)
    configured(llama[1], {"extrope": YARN | {"factor": 0.5}})
    with pytest.raises(Exception, match="greater than the derived max_model_len"):
        configured(llama[1], {"extorpe": YARN})
    override, factor, key = said
    assert override.startswith(f"extrope: hf_overrides makes max_position_embeddings {LENGTH}")
    assert factor.startswith("extrope: factor 0.5 of yarn is below 1")
    assert key.startswith("extrope: additional_config has 'extorpe'")


def test_a_model_all_of_whose_layers_have_a_window_is_refused_by_its_configuration(tmp_path):
    build("Mistral", tmp_path, sliding_window=64)
    message = "extrope: some layers must have no sliding window for a score method, got a model"
    with pytest.raises(Exception, match=message):
        configured(tmp_path, {"extrope": {"score": RERO}})
    assert configured(tmp_path, {"extrope": YARN}).cache_config.sliding_window == 64


@pytest.mark.parametrize(
    ("extrope", "options", "message"),
    [
        (YARN, {"model_impl": "transformers"}, "one of vLLM's own"),
        ({"method": "xpos"}, {"max_model_len": 1 << 20}, "max_model_len must be at most 72521"),
    ],
)
def test_refused_before_weights_are_loaded(llama, extrope, options, message):
    with (
        pytest.raises(Exception, match=f"extrope: .*{message}"),
        engine(llama[1], extrope, **options),
    ):
        pass
