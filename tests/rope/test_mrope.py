"""mRoPE: one rotation whose frequencies take their positions from several axes."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from support.vectors import load

from extrope_kernels import apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import device, make_qk

VECTORS = load("mrope")


# The position_ids of 3 tokens of text, an image of 2 x 3 tokens, and 2 tokens of text.
IMAGE = (
    (0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7),
    (0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7),
    (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7),
)


EPS = torch.finfo(torch.float32).eps


def draw(*shape, largest=100_000):
    return torch.randint(0, largest, shape, device=device())


def frequencies(**changes):
    freqs = methods.yarn(64, factor=4.0, original_max_position_embeddings=4096)
    freqs = methods.with_sections(freqs, (16, 8, 8))
    return replace(freqs, **changes).to(device())


# -------------------------------------------------------------------------------------------------
# What models compute
def sections_of(vector):
    dim, base = vector["params"]["head_dim"], vector["params"]["base"]
    interleaved = vector["id"] == "mrope_qwen3vl_interleaved"
    freqs = methods.rope(dim, base=base)
    return methods.with_sections(
        freqs, vector["params"]["mrope_section"], interleaved=interleaved
    ).to(device())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_axes_of_the_published_models(vector):
    axes = ["thw".index(letter) for letter in vector["axis_of_each_frequency"]]
    assert sections_of(vector).axes.tolist() == axes


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_vectors(backend, vector):
    """Rotating (1, 0) gives the cosine and the sine."""
    positions = torch.tensor(vector["positions_thw"], device=device())[:, None]
    freqs = sections_of(vector)
    half, seqlen = len(freqs.axes), positions.shape[-1]
    one = torch.ones(1, seqlen, 1, 2 * half, device=device())
    one[..., half:] = 0
    out = apply_rope(one, freqs, positions=positions, backend=backend)[0, :, 0]
    cos, sin = (
        torch.tensor(vector[name], device=device()).view(seqlen, 2, half)[:, 0]
        for name in ("cos", "sin")
    )
    # Theirs round the angle, which is 6 at most, to float32.
    torch.testing.assert_close(out, torch.cat((cos, sin), -1), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(
    "model, name, rotary, sections",
    (
        ("qwen2_vl", "Qwen2VL", "Qwen2VLRotaryEmbedding", [16, 24, 24]),
        ("qwen3_vl", "Qwen3VL", "Qwen3VLTextRotaryEmbedding", [24, 20, 20]),
    ),
)
def test_transformers(backend, model, name, rotary, sections):
    pytest.importorskip("transformers")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    config_class = getattr(configuration, f"{name}TextConfig")
    rotary_class = getattr(modeling, rotary)
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = config_class(
        hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters
    )
    rotary = rotary_class(config).to(device())
    positions = torch.tensor(IMAGE, device=device())[:, None].expand(3, 2, -1)
    q, k = make_qk(2, len(IMAGE[0]), 2, 1, head_dim=128)
    cos, sin = rotary(q, positions)
    # Before transformers 5.19 some take the tables of all axes, and the sections.
    of_axes = getattr(modeling, "apply_multimodal_rotary_pos_emb", None)
    if of_axes is None:
        theirs = modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    else:
        theirs = of_axes(q, k, cos, sin, sections, unsqueeze_dim=2)
    freqs = methods.with_sections(
        methods.rope(128, base=1e6), sections, interleaved=model == "qwen3_vl"
    )
    ours = apply_rope_qk(q, k, freqs.to(device()), positions=positions, backend=backend)
    for x, y, given in zip(ours, theirs, (q, k)):
        # Their angles, 7 at most, are rounded to float32; then two products and a sum.
        torch.testing.assert_close(x, y, rtol=0, atol=8 * EPS * given.abs().max().item())


# -------------------------------------------------------------------------------------------------
# Text: the same position on every axis
def run(freqs, positions, backend):
    """The rotated q and k and the gradients of q, k and inv_freq."""
    q, k = (x.requires_grad_() for x in make_qk())
    inv_freq = freqs.inv_freq.detach().clone().requires_grad_()
    freqs = replace(freqs, inv_freq=inv_freq)
    outs = apply_rope_qk(q, k, freqs, positions=positions, backend=backend)
    weights = make_qk(seed=1)
    return *outs, *torch.autograd.grad(outs, (q, k, inv_freq), weights)


@pytest.mark.parametrize("decay", (False, True))
def test_text_is_plain_rope_bit_for_bit(backend, decay):
    freqs = methods.xpos(64) if decay else methods.rope(64)
    freqs = methods.with_sections(freqs, (16, 8, 8)).to(device())
    positions = draw(2, 13, largest=1000)
    plain = run(replace(freqs, axes=None), positions, backend)
    for given in (positions, positions.expand(3, 2, 13)):
        for x, y in zip(run(freqs, given, backend), plain):
            assert torch.equal(x, y)


# -------------------------------------------------------------------------------------------------
# Gradients, graphs and vmap


def test_vmap_over_positions(backend):
    q, _ = make_qk()
    positions = draw(4, 3, 2, 13)
    got = torch.vmap(lambda p: apply_rope(q, frequencies(), positions=p, backend=backend))(
        positions
    )
    for out, given in zip(got, positions):
        assert torch.equal(out, apply_rope(q, frequencies(), positions=given, backend=backend))


# -------------------------------------------------------------------------------------------------
# Sections


def test_sections():
    freqs = methods.yarn(128, factor=4.0, original_max_position_embeddings=32768)
    split = methods.with_sections(freqs, [16, 24, 24])
    assert split.axes.dtype == torch.int32
    assert split.axes.tolist() == [0] * 16 + [1] * 24 + [2] * 24
    assert split.inv_freq is freqs.inv_freq and split.attention_factor == freqs.attention_factor
    rounds = methods.with_sections(freqs, [24, 20, 20], interleaved=True)
    assert rounds.axes.tolist() == [0, 1, 2] * 20 + [0] * 4
    assert methods.with_sections(freqs, [32, 32], interleaved=True).axes.tolist() == [0, 1] * 32
    assert split.to("meta").axes.device.type == "meta"


def test_the_first_axis_takes_what_is_left_of_turns():
    with pytest.raises(ValueError, match=r"with_sections: .*axis 1 must have at most 11 of 32"):
        methods.with_sections(methods.rope(64), [8, 12, 12], interleaved=True)
