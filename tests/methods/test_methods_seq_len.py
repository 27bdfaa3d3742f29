"""Methods that depend on the length: a tensor gives one row a sequence, without a host sync."""

import inspect

import pytest
import torch
from support.method_examples import example
from torch._subclasses.fake_tensor import FakeTensorMode

from extrope_kernels import methods
from extrope_kernels.methods import METHODS

LENGTHS = [1, 63, 64, 65, 255, 256, 257, 1000, 4097]  # about the trained lengths of the examples
OF_LENGTH = [name for name in METHODS if "seq_len" in inspect.signature(METHODS[name]).parameters]
VARIANTS = {
    **{name: {} for name in OF_LENGTH},
    "dynamic_yarn": {"attention_factor": 1.25},
    "dynamic_yarn, later": {"max_position_embeddings": 512},
    "dynamic_yarn, finetuned": {"max_position_embeddings": 512, "finetuned": True},
    "dynamic_yarn, rotations": {"ramp": "rotations"},
    "dynamic_yarn, thirds": {"ramp": "rotations", "original_max_position_embeddings": 48},
}
# By how many units in the last place a tensor's row may differ from the int's, if at all: the base
# is rounded to float32 on the way in dynamic_ntk, as in transformers.
ULPS = {"dynamic_ntk": 4}
each_method = pytest.mark.parametrize("name", VARIANTS)


def freqs_at(name, dim, seq_len):
    method = name.split(",")[0]
    given = {**example(method, dim), **VARIANTS[method], **VARIANTS[name], "seq_len": seq_len}
    return METHODS[method](dim, **given)


def bits(x):
    return x.view(torch.int32)


@each_method
def test_rows_do_not_depend_on_the_surroundings(name):
    expected = freqs_at(name, 16, torch.tensor(LENGTHS)).inv_freq
    torch.set_default_dtype(torch.float64)
    try:
        found = freqs_at(name, 16, torch.tensor(LENGTHS)).inv_freq
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(bits(found), bits(expected))


@each_method
@pytest.mark.parametrize("dim", [16, 128])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_row_for_every_sequence(name, dim, dtype):
    freqs = freqs_at(name, dim, torch.tensor(LENGTHS, dtype=dtype))
    one_by_one = [freqs_at(name, dim, torch.tensor(n, dtype=dtype)).inv_freq for n in LENGTHS]
    by_int = [freqs_at(name, dim, n) for n in LENGTHS]
    assert freqs.inv_freq.shape == (len(LENGTHS), dim // 2)
    assert freqs.inv_freq.dtype == torch.float32
    assert torch.equal(bits(freqs.inv_freq), bits(torch.stack(one_by_one)))
    by_int_rows = torch.stack([freqs.inv_freq for freqs in by_int])
    assert (bits(freqs.inv_freq) - bits(by_int_rows)).abs().max() <= ULPS.get(name, 0)
    assert {freqs.attention_factor} == {freqs.attention_factor for freqs in by_int}


@pytest.mark.parametrize("factor", [1.3, 2.6])  # 1.3 - 0.3 is not 1 in float32
def test_dynamic_ntk_within_the_trained_length_is_plain_rope_to_the_bit(factor):
    given = {"factor": factor, "max_position_embeddings": 4096, "seq_len": torch.tensor([1, 4096])}
    rows = methods.dynamic_ntk(64, **given).inv_freq
    assert torch.equal(bits(rows), bits(methods.rope(64).inv_freq.expand(2, -1)))


@each_method
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,)])
def test_values_are_never_read(name, device, shape):
    # Under FakeTensorMode there are no values to read: looking at one raises.
    with FakeTensorMode():
        seq_len = torch.empty(shape, dtype=torch.int64, device=device)
        inv_freq = freqs_at(name, 16, seq_len).inv_freq
    assert inv_freq.shape == (*shape, 8)
    assert inv_freq.device.type == device


@each_method
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda seq_len: freqs_at(name, 16, seq_len).inv_freq, backend="eager", fullgraph=True
    )
    seq_len = torch.tensor([5, 100])
    assert torch.equal(compiled(seq_len), freqs_at(name, 16, seq_len).inv_freq)


@pytest.mark.parametrize("name", OF_LENGTH)
def test_a_symbolic_length_compiles(name):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: freqs_at(name, 16, x.shape[0]).inv_freq,
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    for length in (20, 100):
        assert torch.equal(compiled(torch.ones(length)), freqs_at(name, 16, length).inv_freq)


def test_dynamic_yarn_cannot_vary_its_amplitude_by_sequence():
    given = {**example("dynamic_yarn"), "seq_len": torch.tensor([5, 100])}
    with pytest.raises(ValueError, match="dynamic_yarn: attention_factor must be given when"):
        METHODS["dynamic_yarn"](16, **given)
    with pytest.raises(ValueError, match="dynamic_yarn: attention_factor must be > 0, got 0"):
        METHODS["dynamic_yarn"](16, **given, attention_factor=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_lengths_in_few_bits(dtype):
    """The trained length is past what they count to."""
    short, long = [1.0] * 4, [2.0] * 4
    options = {"original_max_position_embeddings": 2048, "short_factor": short}
    for method, given in (
        (methods.longrope, {**options, "long_factor": long, "factor": 2.0}),
        (methods.dynamic_ntk, {"factor": 2.0, "max_position_embeddings": 2048}),
    ):
        got, want = (
            method(8, **given, seq_len=torch.tensor([5], dtype=each)).inv_freq
            for each in (dtype, torch.int64)
        )
        assert torch.equal(got, want), method.__name__


def test_a_fresh_length_agrees_with_the_module_of_transformers():
    # A module keeps the base of a longer input for the shorter ones after it, hence a fresh one.
    transformers = pytest.importorskip("transformers")
    rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=1,
        max_position_embeddings=32,
        rope_parameters=rope_parameters,
    )
    for length in (16, 32, 40, 48, 31, 33):
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        module(torch.zeros(1), torch.arange(length)[None])
        given = {"factor": 2.0, "max_position_embeddings": 32, "seq_len": torch.tensor(length)}
        assert torch.equal(methods.dynamic_ntk(16, **given).inv_freq, module.inv_freq)
