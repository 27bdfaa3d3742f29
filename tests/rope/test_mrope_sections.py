"""mRoPE: `with_sections`, and every refusal of sections, axes and positions by axis."""

from dataclasses import replace

import pytest
import torch

from extrope_kernels import apply_rope, methods
from extrope_kernels.testing import device, make_qk

FREQS = methods.with_sections(methods.rope(64), (16, 8, 8)).to(device())


def draw(*shape):
    return torch.randint(0, 100_000, shape, device=device())


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


@pytest.mark.parametrize(
    "sections, options, error, message",
    (
        ([16, 24], {}, ValueError, "sections must add up to 32 frequencies, got [16, 24]"),
        ([8, 12, 12], {"interleaved": True}, ValueError, "axis 1 has at most 11 of 32"),
        ([0, 16, 16], {}, ValueError, "sections[0] must be > 0"),
        ([], {}, TypeError, "sections must be a list of ints"),
        (32, {}, TypeError, "sections must be a list of ints"),
        ([32], {"interleaved": 1}, TypeError, "interleaved must be a bool"),
    ),
)
def test_sections_refusals(sections, options, error, message):
    with pytest.raises(error) as raised:
        methods.with_sections(methods.rope(64), sections, **options)
    assert str(raised.value).startswith("with_sections: ") and message in str(raised.value)


def test_sections_want_freqs():
    with pytest.raises(TypeError, match="with_sections: freqs must be a RopeFreqs, got Tensor"):
        methods.with_sections(torch.ones(32), [32])


BAD = {
    # what is wrong: (axes, the shape of positions, exception, words of the message)
    "no axes": (None, (3, 2, 13), ValueError, "offsets or, with axes, (axes, 2, 13), got shape"),
    "a list": ([0] * 32, (3, 2, 13), TypeError, "axes must be a Tensor, got list"),
    "int64": (
        torch.zeros(32).long(),
        (3, 2, 13),
        ValueError,
        "axes must be contiguous int32 (32,)",
    ),
    "length": (
        torch.zeros(31).int(),
        (3, 2, 13),
        ValueError,
        "axes must be contiguous int32 (32,)",
    ),
    "strided": (
        torch.zeros(64).int()[::2],
        (3, 2, 13),
        ValueError,
        "axes must be contiguous int32",
    ),
    "2-D": (
        torch.zeros(1, 32).int(),
        (3, 2, 13),
        ValueError,
        "axes must be contiguous int32 (32,)",
    ),
    "no rows": (torch.zeros(32).int(), (0, 2, 13), ValueError, "positions must be (13,)"),
    "batch": (torch.zeros(32).int(), (3, 3, 13), ValueError, "got shape (3, 3, 13)"),
    "seqlen": (torch.zeros(32).int(), (3, 2, 12), ValueError, "got shape (3, 2, 12)"),
    "no batch": (torch.zeros(32).int(), (3, 13), ValueError, "got shape (3, 13)"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(backend, case):
    axes, shape, error, message = BAD[case]
    axes = axes.to(device()) if isinstance(axes, torch.Tensor) else axes
    for chosen in (None, backend, "reference"):
        with pytest.raises(error) as raised:
            q, _ = make_qk()
            freqs = replace(FREQS, axes=axes)
            apply_rope(q, freqs, positions=draw(*shape), backend=chosen)
        assert str(raised.value).startswith("rope: ") and message in str(raised.value)


@pytest.mark.parametrize("largest", (-1, 3))
def test_an_axis_out_of_range(backend, largest):
    """On a CPU the axes are in reach; elsewhere they are clamped, as reading them would stall."""
    q, _ = make_qk()
    axes = FREQS.axes.clone()
    axes[5] = largest
    positions = draw(3, 2, 13)
    if backend == "cpu":
        with pytest.raises(ValueError, match=f"rope: axes must be from 0 to 2 .* got {largest}"):
            apply_rope(q, replace(FREQS, axes=axes), positions=positions, backend=backend)
        return
    out = apply_rope(q, replace(FREQS, axes=axes), positions=positions, backend=backend)
    near = replace(FREQS, axes=axes.clamp(0, 2))
    assert torch.equal(out, apply_rope(q, near, positions=positions, backend=backend))
