"""The methods, called by hand, against the functions of the installed transformers, bit for bit."""

import pytest
import torch

from extrope_kernels import methods

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

MAX_LENGTH = 4096


def llama_config(dim, base=10000.0, **rope_parameters):
    return transformers.LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_theta": base, **rope_parameters},
    )


def theirs(dim, base, rope_type, seq_len=None, **rope_parameters):
    config = llama_config(dim, base, rope_type=rope_type, **rope_parameters)
    if rope_type not in rope_utils.ROPE_INIT_FUNCTIONS:
        pytest.skip(f"transformers {transformers.__version__} has no {rope_type}")
    return rope_utils.ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)


def assert_same(freqs, expected):
    inv_freq, attention_factor = expected
    assert torch.equal(freqs.inv_freq.view(torch.int32), inv_freq.view(torch.int32))
    assert freqs.attention_factor == attention_factor


each_dim = pytest.mark.parametrize("dim", [4, 16, 80, 128])
each_base = pytest.mark.parametrize("base", [10000.0, 150000.0, 1e6])


@each_dim
@each_base
def test_rope(dim, base):
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    expected = embedding.compute_default_rope_parameters(llama_config(dim, base))
    assert_same(methods.rope(dim, base=base), expected)


@each_dim
@each_base
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 8.0])
def test_pi(dim, base, factor):
    expected = theirs(dim, base, "linear", factor=factor)
    assert_same(methods.pi(dim, factor=factor, base=base), expected)


@each_dim
@each_base
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("seq_len", [7, MAX_LENGTH, MAX_LENGTH + 1, 3 * MAX_LENGTH, 100_001])
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_dynamic_ntk(dim, base, factor, seq_len, kind):
    seq_len = kind(seq_len)
    freqs = methods.dynamic_ntk(
        dim, factor=factor, seq_len=seq_len, max_position_embeddings=MAX_LENGTH, base=base
    )
    assert_same(freqs, theirs(dim, base, "dynamic", seq_len, factor=factor))


YARN_SETTINGS = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"truncate": False},
    {"attention_factor": 1.25},
    {"mscale": 0.707},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 1.0, "mscale_all_dim": 0.0},
]


@each_dim
@each_base
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 16.0])
@pytest.mark.parametrize("settings", YARN_SETTINGS, ids=str)
def test_yarn(dim, base, factor, settings):
    settings = {"factor": factor, "original_max_position_embeddings": 1024, **settings}
    assert_same(methods.yarn(dim, base=base, **settings), theirs(dim, base, "yarn", **settings))


@each_dim
@each_base
@pytest.mark.parametrize("seq_len", [1, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", [int, torch.tensor])
@pytest.mark.parametrize(
    "settings", [{}, {"factor": 32.0}, {"factor": 0.5}, {"attention_factor": 1.5}], ids=str
)
def test_longrope(dim, base, seq_len, kind, settings):
    settings = {
        "short_factor": [1 + i / dim for i in range(dim // 2)],
        "long_factor": [1 + 3.3 * i for i in range(dim // 2)],
        "original_max_position_embeddings": 1024,
        **settings,
    }
    freqs = methods.longrope(
        dim, seq_len=kind(seq_len), max_position_embeddings=MAX_LENGTH, base=base, **settings
    )
    assert_same(freqs, theirs(dim, base, "longrope", seq_len, **settings))


@each_dim
@each_base
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("ends", [(1.0, 4.0), (0.5, 32.0)])
def test_llama3(dim, base, factor, ends):
    settings = {
        "factor": factor,
        "low_freq_factor": ends[0],
        "high_freq_factor": ends[1],
        "original_max_position_embeddings": 1024,
    }
    assert_same(methods.llama3(dim, base=base, **settings), theirs(dim, base, "llama3", **settings))


@each_dim
@each_base
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_proportional(dim, base, share, factor):
    settings = {"partial_rotary_factor": share, "factor": factor}
    freqs = methods.proportional(dim, base=base, **settings)
    assert_same(freqs, theirs(dim, base, "proportional", **settings))


def test_a_fresh_length_agrees_with_the_stateful_module():
    # A module keeps the base of a longer input for the shorter ones after it, hence a fresh one.
    config = llama_config(16, rope_type="dynamic", factor=2.0)
    config.max_position_embeddings = 32
    for length in (16, 32, 40, 48, 31, 33):
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        module(torch.zeros(1), torch.arange(length)[None])
        freqs = methods.dynamic_ntk(
            16, factor=2.0, seq_len=torch.tensor(length), max_position_embeddings=32
        )
        assert torch.equal(freqs.inv_freq, module.inv_freq)
