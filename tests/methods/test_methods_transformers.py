"""The methods, called by hand, against the functions of the installed transformers, bit for bit."""

from itertools import product

import pytest
import torch

from extrope_kernels import methods

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

MAX_LENGTH = 4096
DIMS, BASES = (4, 80, 128), (10000.0, 1e6)
TRAINED = {"original_max_position_embeddings": 1024}
LENGTHS = {
    "dynamic_ntk": (7, MAX_LENGTH, MAX_LENGTH + 1, 3 * MAX_LENGTH, 100_001),
    "longrope": (1, 1024, 1025, 5000),
}


def settings_of_yarn():
    for factor in (0.5, 1.0, 3.0, 16.0):
        for settings in (
            {},
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"truncate": False},
            {"attention_factor": 1.25},
            {"mscale": 0.707},
            {"mscale": 1.0, "mscale_all_dim": 0.5},
            {"mscale": 1.0, "mscale_all_dim": 0.0},
        ):
            yield {"factor": factor, **TRAINED, **settings}


# method: (transformers' name, the settings that both take)
METHODS = {
    "pi": ("linear", [{"factor": factor} for factor in (1.0, 2.0, 3.0, 8.0)]),
    "dynamic_ntk": ("dynamic", [{"factor": factor} for factor in (1.0, 2.0, 3.5)]),
    "yarn": ("yarn", list(settings_of_yarn())),
    "longrope": (
        "longrope",
        [{}, {"factor": 32.0}, {"factor": 0.5}, {"attention_factor": 1.5}],
    ),
    "llama3": (
        "llama3",
        [
            {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, **TRAINED}
            for factor, (low, high) in product((1.0, 8.0, 32.0), ((1.0, 4.0), (0.5, 32.0)))
        ],
    ),
    "proportional": (
        "proportional",
        [
            {"partial_rotary_factor": share, "factor": factor}
            for share, factor in product((0.0, 0.25, 0.3, 0.75, 1.0), (1.0, 3.0))
        ],
    ),
}


def llama_config(dim, base=10000.0, **rope_parameters):
    return transformers.LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_theta": base, **rope_parameters},
    )


def assert_same(freqs, expected):
    inv_freq, attention_factor = expected
    assert torch.equal(freqs.inv_freq.view(torch.int32), inv_freq.view(torch.int32))
    assert freqs.attention_factor == attention_factor


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("base", BASES)
def test_rope(dim, base):
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    expected = embedding.compute_default_rope_parameters(llama_config(dim, base))
    assert_same(methods.rope(dim, base=base), expected)


@pytest.mark.parametrize(
    "name, settings", [(name, x) for name, (_, all_of) in METHODS.items() for x in all_of], ids=str
)
@pytest.mark.parametrize("base", BASES)
def test_method(name, settings, base):
    """With a length as a number and as a tensor, where the method has one."""
    rope_type = METHODS[name][0]
    if rope_type not in rope_utils.ROPE_INIT_FUNCTIONS:
        pytest.skip(f"transformers {transformers.__version__} has no {rope_type}")
    for dim, length in product(DIMS, LENGTHS.get(name, (None,))):
        given, ours = dict(settings), {}
        if name == "longrope":
            given |= {"short_factor": [1 + i / dim for i in range(dim // 2)], **TRAINED}
            given["long_factor"] = [1 + 3.3 * i for i in range(dim // 2)]
        if length is not None:
            ours["max_position_embeddings"] = MAX_LENGTH
        config = llama_config(dim, base, rope_type=rope_type, **given)
        for seq_len in (None,) if length is None else (length, torch.tensor(length)):
            ours |= {} if length is None else {"seq_len": seq_len}
            expected = rope_utils.ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)
            assert_same(getattr(methods, name)(dim, base=base, **given, **ours), expected)


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
