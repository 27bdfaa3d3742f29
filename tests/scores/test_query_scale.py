"""Temperatures of queries: formulas in float64, and transformers' own functions to the bit."""

import math

import pytest
import torch

from extrope_kernels import methods, rope_attention
from extrope_kernels.scores import query_scale, rerope

LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 8191, 8192, 8193, 16383, 16384, 1_000_003)
POSITIONS = torch.tensor([0, *LENGTHS])


@pytest.mark.parametrize("length", [2, 8, 8192, 1.5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_log_n(length, dtype):
    scale = query_scale.log_n(POSITIONS.to(dtype), length)
    expected = [max(1.0, math.log(p + 1) / math.log(length)) for p in POSITIONS.tolist()]
    assert scale.dtype == torch.float32 and scale.shape == POSITIONS.shape
    # A logarithm and a division, rounded once each (torch's logarithm to two units).
    torch.testing.assert_close(scale.double(), torch.tensor(expected).double(), rtol=3e-7, atol=0)
    assert (scale[length > POSITIONS + 1] == 1).all()


@pytest.mark.parametrize("settings", [(), (8, 0.5), (1, 1.0)])  # (): both have their defaults
def test_llama4_is_what_its_layers_multiply_queries_by(settings):
    transformers = pytest.importorskip("transformers")
    modeling = transformers.models.llama4.modeling_llama4
    config = transformers.Llama4TextConfig(
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=1,
        no_rope_layers=[0],
        attn_temperature_tuning=True,
        **dict(zip(("floor_scale", "attn_scale"), settings, strict=False)),
    )
    config._attn_implementation = "recorded"
    seen = []

    def record(module, q, k, v, mask, **options):
        seen.append(q)
        return torch.zeros(1, q.shape[2], 1, 8), None

    transformers.AttentionInterface.register("recorded", record)
    attention = modeling.Llama4TextAttention(config, 0)
    torch.nn.init.eye_(attention.q_proj.weight)
    length = 40_000
    positions = {"cache_position": torch.arange(length)}  # which newer versions do not read
    with torch.no_grad():
        attention(torch.ones(1, length, 8), None, None, **positions)
    scale = query_scale.llama4(torch.arange(length), *settings)
    assert scale.dtype == torch.float32
    assert torch.equal(seen[0][0, 0, :, 0], scale)


@pytest.mark.parametrize("model", ["ministral3", "mistral4"])
@pytest.mark.parametrize("length", [8, 16384])
@pytest.mark.parametrize("beta", [0.0, None, 1.0])  # None: the default
def test_ministral3_has_the_bits_of_transformers(model, length, beta):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name = "get_llama_4_attn_scale"
    theirs = getattr(modeling, name, None) or getattr(modeling, f"_{name}")  # before 5.4
    positions = torch.stack((POSITIONS, POSITIONS + 5))
    expected = theirs(positions, 0.1 if beta is None else beta, length)
    scale = query_scale.ministral3(positions, length, *(() if beta is None else (beta,)))
    assert scale.dtype == torch.float32 and scale.shape == positions.shape
    assert torch.equal(scale, expected.view_as(scale))


@pytest.mark.parametrize("length", [1, 8, 8192])
def test_qwen_1m(length):
    """Once on keys and once on the scale of the softmax, as vLLM 0.9 had it."""
    scale = query_scale.qwen_1m(POSITIONS, length)
    n = [p + 1 for p in POSITIONS.tolist()]
    expected = [max(1.0, 0.1 * math.log(each / length) + 1.0) ** 2 for each in n]
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), torch.tensor(expected).double(), rtol=1e-7, atol=0)
    assert (scale[length >= POSITIONS + 1] == 1).all()


def test_float64_holds_positions_past_float32():
    far = 2**24 + 1
    scale = query_scale.log_n(torch.tensor(far), 8, torch.float64)
    assert math.isclose(scale.item(), math.log(far + 1) / math.log(8), rel_tol=1e-15)


def test_positions_before_the_first_have_its_factor():
    """Padding on the left: a logarithm of zero would spoil its rows, and layers after it."""
    for name, options in CALLS.items():
        scale = getattr(query_scale, name)(**options | {"positions": torch.tensor([-9000, -2, -1])})
        assert (scale == 1).all(), name


def test_log_n_is_what_attention_means_by_it():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 2, 16)
    options = {"freqs": methods.rope(16), "score": rerope(8), "backend": "reference"}
    got = rope_attention(q, k, v, **options, query_scale=query_scale.log_n(torch.arange(40), 8))
    assert torch.equal(got, rope_attention(q, k, v, **options, log_n=8))


CALLS = {
    "log_n": {"positions": POSITIONS, "length": 64},
    "llama4": {"positions": POSITIONS, "floor_scale": 64.0, "attn_scale": 0.1},
    "ministral3": {"positions": POSITIONS, "original_max_position_embeddings": 64, "beta": 0.1},
    "qwen_1m": {"positions": POSITIONS, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes(name):
    options = CALLS[name]
    for shape in ((), (0,), (3, 5), (2, 1, 3)):
        positions = torch.full(shape, 1000)
        assert getattr(query_scale, name)(**options | {"positions": positions}).shape == shape
