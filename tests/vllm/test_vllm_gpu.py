"""What of the backend for GPUs shows on a CPU: what it says it takes, one call, no host reads."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import engine, expected, generated, tokens_of

import extrope_kernels.integrations.vllm as integration

LEAKY = {"method": "leaky_rerope", "window": 64, "factor": 4.0}
LEAKY_ALONE = {"score": LEAKY}
# Everything that follows a length, at once.
FOLLOWING = {
    "method": "dynamic_yarn",
    "cache": "raw",
    "score": {
        "method": "dual_chunk",
        "chunk_size": 24,
        "local_window": 8,
        "original_max_position_embeddings": 16,
    },
}
BOTH = pytest.mark.parametrize("extrope", [LEAKY_ALONE, FOLLOWING], ids=["stored", "raw"])
LAYER = SimpleNamespace(
    layer_name="model.layers.0.self_attn.attn",
    _k_scale=torch.tensor(0.5),  # of a cache in fp8
    _v_scale=torch.tensor(0.25),
)
TAKEN = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": True,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": SimpleNamespace(major=9, minor=0),
    "attn_type": "decoder",
    "has_sliding_window": True,
}


@pytest.fixture(autouse=True)
def registered():
    integration.register()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"head_size": 260}, "head_size"),
        ({"kv_cache_dtype": "fp8"}, None),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"block_size": 8}, "block_size"),
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder"}, "attention type"),
        ({"device_capability": SimpleNamespace(major=7, minor=5)}, "compute capability"),
        ({"use_dcp": True}, "DCP"),
        ({"use_non_causal": True}, "non-causal"),
    ],
)
def test_what_it_takes(changed, reason):
    from extrope_kernels.integrations.vllm.cuda import ScoreBackend

    said = ScoreBackend.validate_configuration(**TAKEN | changed)
    assert [reason in each for each in said] == ([] if reason is None else [True])


def test_one_call_for_chunks_and_steps(llama, monkeypatch):
    from extrope_kernels.integrations.vllm import attention, cpu

    monkeypatch.setattr(cpu, "HeadwiseImpl", attention.ScoreImpl)
    model, folder = llama
    with engine(folder, {"score": LEAKY}) as llm:
        assert tokens_of(generated(llm)) == tokens_of(expected(model, [LEAKY]))


@pytest.fixture
def impl(monkeypatch):
    return make_impl(monkeypatch, "auto")


def make_impl(monkeypatch, kv_cache_dtype, extrope=LEAKY_ALONE):
    """A layer's attention outside of an engine."""
    from test_vllm_settings import config

    from extrope_kernels.integrations.vllm import attention

    monkeypatch.setattr(attention, "get_current_vllm_config", lambda: config(extrope))
    made = attention.ScoreImpl(4, 32, 32**-0.5, 2, None, None, kv_cache_dtype)
    made.engine.heads.add((32, False))
    return made


def builder(extrope=LEAKY_ALONE):
    from test_vllm_settings import config

    from extrope_kernels.integrations.vllm.cuda import GraphBuilder

    made = config(
        extrope,
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=16),
    )
    return GraphBuilder(None, [], made, "cpu")


def common(lengths, queries, slots=0):
    """slots: of all tokens; what they are does not matter, unless -1."""
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
    return SimpleNamespace(
        slot_mapping=torch.full((sum(queries),), slots),
        causal=True,
        query_start_loc=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_actual_tokens=sum(queries),
        block_table_tensor=torch.arange(32, dtype=torch.int32).view(8, 4)[: len(lengths)],
    )


def test_a_graph_reads_the_same_tensor_in_every_forward():
    made = builder()
    first = made.build(0, common([5, 9, 0], [1, 1, 0], slots=-1))
    assert first.past.tolist() == [4, 8, 0] and first.cu_seqlens.tolist() == [0, 0, 0, 0]
    second = made.build(0, common([6, 10, 0], [1, 1, 0]))
    assert first.past.data_ptr() == second.past.data_ptr()
    assert first.cu_seqlens.data_ptr() == second.cu_seqlens.data_ptr()
    assert first.past.tolist() == [5, 9, 0] and first.cu_seqlens.tolist() == [0, 1, 2, 2]


@BOTH
def test_nothing_is_read_on_the_host(monkeypatch, extrope):
    """Tensors without values go through: whoever looked at one would raise."""
    impl, made = make_impl(monkeypatch, "auto", extrope), builder(extrope)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = made.build(0, common([5, 9, 40, 0], [1, 1, 40, 0]))
        q, k, v = (torch.empty(48, heads, 32) for heads in (4, 2, 2))  # 6 of them padding
        out = torch.empty(48, 4, 32)
        cache = torch.empty(32, 2, 16, 64)
        assert impl.forward(LAYER, q, k, v, cache, batch, out) is out


@BOTH
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_pages_as_vllm_lays_them_out(monkeypatch, name, extrope):
    """Heads before slots, keys beside values, padded rows and tokens; Triton interpreted."""
    impl = make_impl(monkeypatch, "auto", extrope)
    if name == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    batch = builder(extrope).build(0, common([5, 60, 40, 0], [1, 1, 40, 0]))
    packed = torch.randn(48, 8, 32)  # a projection of q, k and v together
    q, k, v = packed.split([4, 2, 2], 1)
    cache = torch.randn(32, 2, 16, 64)
    results = []
    for each in (None, name):
        impl.options["backend"] = each
        mine, out = cache.clone(), torch.zeros(48, 4, 32)
        impl.forward(LAYER, q, k, v, mine, batch, out)
        results.append((mine, out[: batch.num_actual_tokens]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [None, "reference", "triton"])
def test_pages_in_fp8(monkeypatch, name):
    """Bytes, as vLLM allocates them, by the layer's scales; untouched where nothing comes."""
    if name == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    queries = [1, 1, 40]
    batch = builder().build(0, common([5, 60, 40], queries))
    q, k, v = (torch.randn(sum(queries), heads, 32) for heads in (4, 2, 2))
    wide, narrow = (make_impl(monkeypatch, dtype) for dtype in ("auto", "fp8"))
    narrow.options["backend"] = name
    scales = torch.tensor([0.5, 0.25]).repeat_interleave(32)  # of keys, of values
    cache = (torch.randn(32, 2, 16, 64) / scales).to(torch.float8_e4m3fn)
    exact, mine = cache.float() * scales, cache.view(torch.uint8)
    results = []
    for each, pages in ((wide, exact), (narrow, mine)):
        results.append(torch.zeros(len(q), 4, 32))
        each.forward(LAYER, q, k, v, pages, batch, results[-1])
    read = mine.view(torch.float8_e4m3fn).float() * scales
    # Half a unit of the last of 4 bits, or of the smallest number.
    assert ((read - exact).abs() <= exact.abs() / 16 + scales * 2**-10).all()
    assert not torch.equal(read, exact)
    # One token sees rows that were in the cache, and itself; the keys of all others are rounded.
    errors = (results[0] - results[1]).norm(dim=-1) / results[0].norm(dim=-1)
    assert 0 < errors.mean() < 1 / 16


@pytest.mark.parametrize("name", ["fp8_e5m2", "turboquant_k8v4", "octave_k3v3"])
def test_other_caches_of_a_layer_are_refused(monkeypatch, name):
    with pytest.raises(ValueError, match="does not support this layer's kv_cache_dtype"):
        make_impl(monkeypatch, name)


@pytest.mark.parametrize("name", [None, "reference", "triton"])
@pytest.mark.parametrize("kind", ["ScoreImpl", "HeadwiseImpl"])
def test_without_slots_nothing_is_written(impl, kind, name):
    """vLLM's dummy runs: pages that may be a request's, and slots of -1."""
    from extrope_kernels.integrations.vllm.cpu import HeadwiseImpl

    if name == "triton":
        pytest.importorskip("triton")
    if kind == "HeadwiseImpl":
        impl.__class__ = HeadwiseImpl
    impl.options["backend"] = name
    q, k, v = (torch.randn(44, heads, 32) for heads in (4, 2, 2))
    cache, out = torch.randn(32, 2, 16, 64), torch.ones(44, 4, 32)
    before = cache.clone()
    lengths, queries = [5, 60, 40], [1, 3, 40]
    impl.forward(LAYER, q, k, v, cache, builder().build(0, common(lengths, queries, -1)), out)
    assert torch.equal(cache, before) and not out.any()
    impl.forward(LAYER, q, k, v, cache, builder().build(0, common(lengths, queries)), out)
    assert not torch.equal(cache, before) and out.any(-1).all()


def forward(impl, **options):
    q, k, v = (torch.empty(1, heads, 32) for heads in (4, 2, 2))
    impl.forward(LAYER, q, k, v, torch.empty(32, 2, 16, 64), None, torch.empty(1, 4, 32), **options)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_layers_whose_batch_is_another_are_refused(platform):
    """As vLLM makes those that see later tokens, or tokens of nobody's."""
    from test_vllm_settings import config
    from vllm.model_executor.layers.attention import encoder_only_attention

    backend = importlib.import_module(f"{integration.__name__}.{platform}").ScoreBackend
    derived = encoder_only_attention.create_encoder_only_attention_backend(backend)
    with pytest.raises(ValueError, match=r"^extrope: .* made by EncoderOnlyAttentionBuilder"):
        derived.get_builder_cls()(None, [], config({"score": LEAKY}), "cpu")


@pytest.mark.parametrize("name", ["output_scale", "output_block_scale"])
def test_quantized_outputs_are_refused(impl, name):
    with pytest.raises(NotImplementedError, match=r"^extrope: outputs must not be quantized"):
        forward(impl, **{name: torch.ones(1)})


@pytest.mark.parametrize("heads", [{(64, False)}, {(32, False), (32, True)}, set()], ids=str)
def test_heads_that_nothing_rotates_are_refused(impl, heads):
    impl.engine.heads.clear()
    impl.engine.heads.update(heads)
    message = r"^extrope: the model must rotate heads of 32 by vLLM's rotary layer, got layers for"
    with pytest.raises(ValueError, match=message):
        forward(impl)


def test_layer_types_that_are_not_the_layers_are_refused(impl):
    """The first layer has no sliding window here, but has one by layer_types."""
    from test_vllm_settings import TWO_BASES, config

    from extrope_kernels.integrations.vllm.engine import make_engine

    text = {"rope_parameters": TWO_BASES, "layer_types": ["sliding_attention", "full_attention"]}
    impl.engine = make_engine(config({"score": LEAKY}, text))
    impl.engine.heads.add((32, False))
    with pytest.raises(ValueError, match=r"^extrope: layer_types must say .* got others for model"):
        forward(impl)


def model_of(*impls):
    model = torch.nn.ModuleList(torch.nn.Module() for _ in impls)
    for layer, impl in zip(model, impls, strict=True):
        layer.impl = impl
    return model


def test_models_all_of_whose_layers_have_a_window_are_refused(impl):
    from extrope_kernels.integrations.vllm.attention import attend_for

    model = model_of(impl, impl)
    attend_for(model, impl.engine, whole=True)
    impl.sliding_window = 16
    attend_for(model, impl.engine, whole=False)  # other layers may be on other ranks
    with pytest.raises(ValueError, match=r"^extrope: some layers must have no sliding window"):
        attend_for(model, impl.engine, whole=True)


def test_models_that_attend_by_another_backend_as_well_are_refused(impl):
    """A model may name the backend of some of its layers; without ours nobody rotates for them."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from extrope_kernels.integrations.vllm.attention import attend_for

    other = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    with pytest.raises(ValueError, match=r"^extrope: .* got CPUAttentionBackendImpl"):
        attend_for(model_of(impl, other), impl.engine, whole=True)


def test_layers_without_keys_of_their_own_are_refused(impl):
    """As loops over one layer's cache call it; in the run that measures memory already."""
    q, cache = torch.empty(1, 4, 32), torch.empty(32, 2, 16, 64)
    with pytest.raises(ValueError, match=r"^extrope: a layer must have keys .* for model.layers.0"):
        impl.forward(LAYER, q, None, None, cache, None, torch.empty(1, 4, 32))
