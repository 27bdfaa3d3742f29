"""`axial` and what changes the frequencies of any method: Resonance, Ms-PoE."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.method_examples import DIM, EXAMPLES
from torch._subclasses.fake_tensor import FakeTensorMode

from extrope_kernels import RopeFreqs, apply_rope, methods, scores
from extrope_kernels.methods import METHODS

FREQS = methods.rope(16)


def replaced(**fields):
    return RopeFreqs(**{"inv_freq": FREQS.inv_freq, **fields})


# -------------------------------------------------------------------------------------------------
# Axial


@pytest.mark.parametrize(("dim", "axes"), [(16, 2), (80, 2), (18, 2), (4, 2), (64, 3), (6, 3)])
def test_an_axis_has_the_ladder_of_its_share_of_the_dims(dim, axes):
    pairs = dim // axes // 2
    freqs = methods.axial(dim, axes=axes, base=100.0)
    ladder = methods.rope(2 * pairs, base=100.0).inv_freq
    assert freqs.axes.dtype == torch.int32
    for axis, inv_freq in enumerate(freqs.inv_freq.view(axes, pairs)):
        assert torch.equal(inv_freq, ladder)
        assert (freqs.axes.view(axes, pairs)[axis] == axis).all()


@pytest.mark.parametrize(("dim", "axes"), [(16, 2), (64, 2), (48, 3), (12, 3)])
def test_a_shared_ladder_is_that_of_all_dims(dim, axes):
    freqs = methods.axial(dim, axes=axes, ladder="shared")
    whole = methods.rope(dim).inv_freq
    assert torch.equal(freqs.inv_freq, torch.cat([whole[axis::axes] for axis in range(axes)]))
    assert torch.equal(freqs.axes, methods.axial(dim, axes=axes).axes)


def test_one_axis_is_rope():
    for ladder in ("own", "shared"):
        freqs = methods.axial(16, axes=1, ladder=ladder)
        assert torch.equal(freqs.inv_freq, FREQS.inv_freq) and not freqs.axes.any()


# -------------------------------------------------------------------------------------------------
# Resonance


@pytest.mark.parametrize("name", METHODS)
def test_wavelengths_are_whole(name):
    freqs = METHODS[name](DIM, **EXAMPLES[name])
    whole = methods.resonance(freqs)
    assert whole.attention_factor == freqs.attention_factor
    assert whole.log_decay is freqs.log_decay and whole.axes is freqs.axes
    rotating = freqs.inv_freq > 0
    assert torch.equal(whole.inv_freq > 0, rotating)
    wavelengths = 2 * math.pi / whole.inv_freq[rotating].double()
    given = 2 * math.pi / freqs.inv_freq[rotating].double()
    # Half a token from rounding, and two float32 divisions on either side of it.
    assert ((wavelengths - given).abs() <= 0.5 + 4e-7 * given).all()
    assert ((wavelengths - wavelengths.round()).abs() <= 2e-7 * wavelengths).all()


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("dim", [16, 128])
def test_resonance_has_the_bits_of_the_authors_formula(dim, base):
    freqs = methods.yarn(dim, factor=4, original_max_position_embeddings=4096, base=base)
    rounded = torch.round(2 * math.pi / freqs.inv_freq)
    assert torch.equal(methods.resonance(freqs).inv_freq, 2 * math.pi / rounded)


def test_a_wavelength_below_a_token_becomes_one():
    fast = methods.resonance(replaced(inv_freq=torch.tensor([20.0, 7.0, 1.0, 0.0])))
    expected = torch.tensor([2 * math.pi, 2 * math.pi, 2 * math.pi / 6, 0.0])
    assert torch.equal(fast.inv_freq, expected)


# -------------------------------------------------------------------------------------------------
# Ms-PoE


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"xpos"}))
@pytest.mark.parametrize("heads", [1, 2, 7, 32])
def test_ratios_grow_evenly(name, heads):
    plain = METHODS[name](DIM, **EXAMPLES[name])
    freqs = methods.ms_poe(plain, heads=heads)
    steps = torch.arange(heads) / max(heads - 1, 1)
    expected = plain.inv_freq.double() / (1.2 + 0.6 * steps)[:, None].double()
    assert freqs.inv_freq.shape == (1, heads, DIM // 2) and freqs.inv_freq.dtype == torch.float32
    # The ratio and the division are rounded to float32.
    torch.testing.assert_close(freqs.inv_freq[0].double(), expected, rtol=3e-7, atol=0)
    assert freqs.axes is plain.axes and freqs.attention_factor == plain.attention_factor


def test_the_first_head_of_the_order_has_the_smallest_ratio():
    freqs = methods.ms_poe(FREQS, heads=4, min_ratio=1, max_ratio=4, order=[2, 0, 3, 1])
    assert torch.equal(freqs.inv_freq[0], FREQS.inv_freq / torch.tensor([2, 4, 1, 3])[:, None])


def test_heads_of_a_group_share_a_ratio():
    keys = methods.ms_poe(FREQS, heads=2, order=[1, 0])
    queries = methods.ms_poe(FREQS, heads=6, order=[1, 0], group=3)
    assert torch.equal(queries.inv_freq, keys.inv_freq.repeat_interleave(3, 1))


def test_equal_ratios_are_position_interpolation():
    freqs = methods.ms_poe(FREQS, heads=3, min_ratio=4, max_ratio=4)
    pi = methods.pi(16, factor=4).inv_freq
    assert torch.equal(freqs.inv_freq, pi.expand(1, 3, 8))


def test_frequencies_of_a_batch():
    plain = methods.dynamic_ntk(
        16, factor=2.0, seq_len=torch.tensor([5, 500]), max_position_embeddings=64
    )
    freqs = methods.ms_poe(plain, heads=3)
    assert freqs.inv_freq.shape == (2, 3, 8)
    for row, inv_freq in zip(freqs.inv_freq, plain.inv_freq):
        alone = methods.ms_poe(replaced(inv_freq=inv_freq), heads=3)
        assert torch.equal(row, alone.inv_freq[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "group": 3}, r"heads must be a multiple of group \(3\), got 4"),
        ({"heads": 4, "min_ratio": 0}, "min_ratio must be > 0, got 0"),
        ({"heads": 4, "max_ratio": 1e300}, "max_ratio must be <= 1e.37, got 1e.300"),
        ({"heads": 4, "max_ratio": 1.1}, "max_ratio must be >= 1.2, got 1.1"),
    ],
)
def test_ms_poe_errors(options, message):
    with pytest.raises(ValueError, match=f"^ms_poe: {message}"):
        methods.ms_poe(FREQS, **options)


def test_frequencies_that_cannot_be_wrapped():
    with pytest.raises(ValueError, match="ms_poe: freqs must have no log_decay"):
        methods.ms_poe(methods.xpos(16), heads=2)
    with pytest.raises(ValueError, match="ms_poe: inv_freq must be the same for all heads"):
        methods.ms_poe(methods.ms_poe(FREQS, heads=2), heads=2)


# -------------------------------------------------------------------------------------------------
# RopeFreqs itself


def test_frequencies_are_equal_by_value():
    same = replaced(inv_freq=FREQS.inv_freq.clone())
    assert same == FREQS and hash(same) == hash(FREQS) and len({same, FREQS}) == 1
    for other in (
        methods.rope(16, base=5e5),
        methods.rope(32),
        replaced(attention_factor=1.1),
        methods.xpos(16),
        replaced(axes=torch.zeros(8, dtype=torch.int32)),
        "rope",
    ):
        assert other != FREQS


def test_frequencies_print_in_a_line():
    yarn = methods.yarn(64, factor=4.0, original_max_position_embeddings=4096)
    shown = "RopeFreqs(32 pairs, wavelengths 6.28 to 1.88e+05, attention_factor 1.139)"
    assert repr(yarn) == shown
    assert repr(methods.ms_poe(FREQS, heads=4)).startswith("RopeFreqs(1 x 4 x 8 pairs, wavele")
    assert repr(yarn.to("meta")) == "RopeFreqs(32 pairs, attention_factor 1.139)"


@pytest.mark.parametrize("inv_freq", [[1.0], np.ones(1, np.float32), None, 1.0], ids=repr)
def test_frequencies_that_are_no_tensor_are_refused_when_made(inv_freq):
    message = f"RopeFreqs: inv_freq must be a Tensor, got {type(inv_freq).__name__}"
    with pytest.raises(TypeError, match=f"^{message}$"):
        RopeFreqs(inv_freq)
    with pytest.raises(TypeError, match=f"^{message}$"):
        replace(FREQS, inv_freq=inv_freq)


def test_frequencies_are_made_of_any_tensor():
    with FakeTensorMode():
        assert RopeFreqs(torch.ones(8)).kwargs == FREQS.kwargs
    made = torch.func.vmap(lambda x: RopeFreqs(x).inv_freq * 2)(torch.ones(3, 8))
    assert torch.equal(made, torch.full((3, 8), 2.0))


def test_frequencies_are_made_in_a_graph():
    @torch.compile(backend="eager", fullgraph=True)
    def rotated(x, inv_freq):
        return apply_rope(x, RopeFreqs(inv_freq), backend="reference")

    x = torch.randn(1, 5, 2, 16)
    torch.testing.assert_close(rotated(x, FREQS.inv_freq), apply_rope(x, FREQS), rtol=0, atol=1e-6)


def test_a_method_of_the_other_axis_is_answered_with_its_place():
    with pytest.raises(AttributeError, match=r"'rerope': it is in extrope_kernels.scores"):
        methods.rerope  # noqa: B018
    with pytest.raises(AttributeError, match=r"'yarn': it is in extrope_kernels.methods"):
        scores.yarn  # noqa: B018
    for axis, name, wanted in ((methods, "su", "longrope"), (scores, "rerop", "rerope")):
        with pytest.raises(AttributeError, match=rf"'{name}' \(did you mean '{wanted}'\?\)"):
            getattr(axis, name)
    with pytest.raises(AttributeError, match=r"'nonsense'$"):
        methods.nonsense  # noqa: B018
