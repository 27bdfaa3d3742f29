"""Methods over the frequencies that a model was trained with, and what a configuration trained."""

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from support.method_examples import DIM, EXAMPLES

from extrope_kernels import methods
from extrope_kernels.methods import METHODS, RopeFreqs

LENGTH = "original_max_position_embeddings"
SCALING = [
    name for name, method in METHODS.items() if "over" in inspect.signature(method).parameters
]
BASES = {"llama3": 500000.0}
# Of the models' own files, shortened; the sizes of heads too.
GEMMA_3 = {
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
LLAMA_3_1 = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        LENGTH: 8192,
    },
}
PHI_3 = {
    "head_dim": 96,
    "max_position_embeddings": 131072,
    LENGTH: 4096,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * n for n in range(48)],
        "long_factor": [1.0 + 1.3 * n for n in range(48)],
    },
}
QWEN_3 = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, LENGTH: 32768},
}
PROPORTIONAL = {
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
}


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def yarn_by_wavelength(trained, factor, length, base):
    """YaRN's ramp, linear in the logarithm of a pair's rotations inside `length`: float64."""
    theta = trained.double()
    pairs = len(theta)

    def index(rotations):  # of the pair of plain RoPE that makes so many
        return pairs * torch.log(length / (2 * math.pi * rotations)) / math.log(base)

    low = index(torch.tensor(32.0).double()).floor().clamp(min=0)
    high = index(torch.tensor(1.0).double()).ceil().clamp(max=2 * pairs - 1)
    interpolated = ((index(length * theta / (2 * math.pi)) - low) / (high - low)).clamp(0, 1)
    return theta * (1 - interpolated) + theta / factor * interpolated


@pytest.mark.parametrize("name", SCALING)
def test_over_plain_rope_the_bits_do_not_change(name):
    plain = METHODS[name](DIM, **EXAMPLES[name])
    over = methods.rope(DIM, base=BASES.get(name, 10000.0))
    freqs = METHODS[name](DIM, **EXAMPLES[name], over=over)
    assert same_bits(freqs.inv_freq, plain.inv_freq)
    assert freqs.attention_factor == plain.attention_factor


def test_every_method_that_scales_takes_over():
    assert set(SCALING) == {
        *("pi", "ntk_aware", "dynamic_ntk", "ntk_by_parts", "ntk_mixed", "yarn", "dynamic_yarn"),
        *("giraffe_power", "llama3", "mrrope"),
    }


@pytest.mark.parametrize("name", SCALING)
def test_amplitude_and_axes_stay_those_of_the_training(name):
    axes = torch.zeros(DIM // 2, dtype=torch.int32)
    over = RopeFreqs(methods.pi(DIM, factor=8).inv_freq, 1.25, axes=axes)
    freqs = METHODS[name](DIM, **EXAMPLES[name], over=over)
    plain = METHODS[name](DIM, **EXAMPLES[name])
    assert freqs.attention_factor == 1.25 * plain.attention_factor
    assert freqs.axes is axes


@pytest.mark.parametrize("name", SCALING)
def test_pairs_that_do_not_rotate_stay_so(name):
    over = methods.proportional(DIM, partial_rotary_factor=0.5)
    freqs = METHODS[name](DIM, **EXAMPLES[name], over=over)
    assert freqs.inv_freq[DIM // 4 :].eq(0).all()
    assert freqs.inv_freq[: DIM // 4].gt(0).all()


@pytest.mark.parametrize(
    ("name", "divided"),
    [
        ("pi", lambda i: 4.0),
        ("ntk_aware", lambda i: 4 ** (2 * i / (DIM - 2))),
        ("ntk_mixed", lambda i: 4 ** (((i + 1) / (DIM / 2)) ** 0.625)),
        ("giraffe_power", lambda i: (1 - 2 * i / DIM) ** -0.5),
    ],
)
def test_methods_by_index_divide_each_pair_of_the_training_alike(name, divided):
    over = methods.pi(DIM, factor=8)
    freqs = METHODS[name](DIM, **EXAMPLES[name], over=over)
    expected = over.inv_freq.double() / torch.tensor([divided(i) for i in range(DIM // 2)])
    torch.testing.assert_close(freqs.inv_freq.double(), expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("ramp", ["index", "rotations"])
@pytest.mark.parametrize(
    ("config", "layer_type", "base"),
    [(GEMMA_3, "full_attention", 1e6), (LLAMA_3_1, None, 500000.0), (PHI_3, None, 10000.0)],
    ids=["gemma3", "llama3.1", "phi3"],
)
def test_yarn_keeps_the_fast_pairs_of_the_training_and_slows_its_slow_ones(
    config, layer_type, base, ramp
):
    over = methods.trained(config, layer_type=layer_type)
    length = methods.lengths(config, layer_type).trained
    assert length == 131072
    dim = config["head_dim"]
    settings = {"factor": 2.0, LENGTH: length, "base": base, "ramp": ramp}
    freqs = methods.yarn(dim, **settings, over=over)
    rotations = length * over.inv_freq.double() / (2 * math.pi)
    # truncate widens the ramp by index to whole pairs of plain RoPE
    step = base ** (2 / dim)
    fast, slow = rotations >= 32 * step, rotations <= 1 / step
    assert fast.any() and slow.any()
    torch.testing.assert_close(freqs.inv_freq[fast], over.inv_freq[fast], rtol=2.5e-7, atol=0)
    torch.testing.assert_close(freqs.inv_freq[slow], over.inv_freq[slow] / 2, rtol=2.5e-7, atol=0)
    if ramp == "index":
        expected = yarn_by_wavelength(over.inv_freq, 2.0, length, base)
        torch.testing.assert_close(freqs.inv_freq.double(), expected, rtol=2e-6, atol=0)


def test_gemma_3_was_trained_at_an_eighth_of_plain_rope_in_its_full_layers():
    full = methods.trained(GEMMA_3, layer_type="full_attention")
    assert same_bits(full.inv_freq, methods.pi(256, factor=8, base=1e6).inv_freq)
    window = methods.trained(GEMMA_3, layer_type="sliding_attention")
    assert same_bits(window.inv_freq, methods.rope(256).inv_freq)


def test_longrope_was_trained_to_the_end_with_its_long_set():
    over = methods.trained(PHI_3)
    assert same_bits(over.inv_freq, methods.from_hf_config(PHI_3, seq_len=131072).inv_freq)
    assert over.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic"])
def test_a_scaling_that_names_its_original_length_is_replaced(rope_type):
    config = {**QWEN_3, "rope_scaling": {**QWEN_3["rope_scaling"], "rope_type": rope_type}}
    freqs = methods.trained(config)
    assert same_bits(freqs.inv_freq, methods.rope(128, base=1e6).inv_freq)
    assert freqs.attention_factor == 1.0
    assert methods.lengths(config).trained == 32768


def test_a_linear_scaling_that_names_its_original_length_is_replaced():
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = {**QWEN_3, "rope_scaling": scaling, LENGTH: 32768}
    expected = methods.rope(128, base=1e6)
    assert same_bits(methods.trained(config).inv_freq, expected.inv_freq)
    assert methods.lengths(config).trained == 32768


def test_an_alpha_of_hunyuan_is_a_trained_base():
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    config = {"head_dim": 128, "max_position_embeddings": 32768, "rope_scaling": scaling}
    expected = methods.ntk_aware(128, factor=1000.0)
    assert same_bits(methods.trained(config).inv_freq, expected.inv_freq)
    assert methods.lengths(config).trained == 32768


def test_proportional_frequencies_are_trained_ones():
    expected = methods.proportional(64, partial_rotary_factor=0.25, base=1e6)
    assert same_bits(methods.trained(PROPORTIONAL).inv_freq, expected.inv_freq)


@pytest.mark.parametrize("name", ["dynamic_ntk", "dynamic_yarn"])
def test_lengths_in_a_tensor_scale_the_training_too(name):
    over = methods.pi(DIM, factor=8)
    settings = {**EXAMPLES[name], "over": over}
    if name == "dynamic_yarn":
        settings["attention_factor"] = 1.0
    lengths = [10, 100, 1000]
    batch = METHODS[name](DIM, **{**settings, "seq_len": torch.tensor(lengths)}).inv_freq
    for row, length in zip(batch, lengths):
        one = METHODS[name](DIM, **{**settings, "seq_len": length}).inv_freq
        torch.testing.assert_close(row, one, rtol=1e-6, atol=0)
    torch.testing.assert_close(batch[0], over.inv_freq, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", SCALING)
def test_over_must_fit(name):
    def refused(over):
        return METHODS[name](DIM, **EXAMPLES[name], over=over)

    with pytest.raises(TypeError, match=f"{name}: over must be a RopeFreqs, got Tensor"):
        refused(torch.ones(DIM // 2))
    message = f"{name}: over must hold dim/2 = {DIM // 2} frequencies without log_decay, got (4,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        refused(methods.rope(8))
    with pytest.raises(ValueError, match=re.escape("got (8,) with log_decay (XPOS)")):
        refused(methods.xpos(DIM))


QWEN_1M = {
    "max_position_embeddings": 1010000,
    "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192, LENGTH: 262144},
}
IN_SCALING, LONGEST = f"{LENGTH} in rope_scaling", "max_position_embeddings"
PLAIN = {LONGEST: 4096}
HUNYUAN = {LONGEST: 32768, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}
LENGTHS = {  # trained, unscaled, reach, origin
    "plain": (PLAIN, (4096, 4096, 4096, LONGEST)),
    "Gemma 3": (GEMMA_3, (131072, 131072, 131072, LONGEST)),
    "Llama 3.1": (LLAMA_3_1, (131072, 8192, 131072, LONGEST)),
    "Phi-3": (PHI_3, (131072, 4096, 131072, LONGEST)),
    "Qwen3, reaching its longest": (QWEN_3, (32768, 32768, 131072, IN_SCALING)),
    "Qwen3, its card": ({**QWEN_3, LONGEST: 40960}, (32768, 32768, 131072, IN_SCALING)),
    "Qwen3, longer": ({**QWEN_3, LONGEST: 262144}, (32768, 32768, 262144, IN_SCALING)),
    "Qwen2.5-1M": (QWEN_1M, (262144, 262144, 262144, f"{LENGTH} in dual_chunk_attention_config")),
    "HunYuan": (HUNYUAN, (32768, 32768, 32768, LONGEST)),
    "dynamic": (
        {LONGEST: 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        (4096, 4096, 4096, LONGEST),
    ),
    "linear after the training": (
        {**PLAIN, LENGTH: 1024, "rope_scaling": {"type": "linear", "factor": 4.0}},
        (1024, 1024, 4096, LENGTH),
    ),
    "a length without a scaling": ({**PLAIN, LENGTH: 8192}, (4096, 4096, 4096, LONGEST)),
    "proportional": (PROPORTIONAL, (8192, 8192, 8192, LONGEST)),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name):
    config, expected = LENGTHS[name]
    assert methods.lengths(config) == expected
    assert methods.lengths(SimpleNamespace(**config)) == expected


def test_lengths_of_a_layer_type():
    yarn = {"rope_type": "yarn", "factor": 4.0, LENGTH: 1024}
    kinds = {"sliding_attention": {"rope_type": "default"}, "full_attention": yarn}
    config = {**PLAIN, "rope_parameters": kinds}
    assert methods.lengths(config)[:3] == (1024, 1024, 4096)
    assert methods.lengths(config, "sliding_attention")[:3] == (4096, 4096, 4096)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "lengths: max_position_embeddings must be given, got None"),
        ({LONGEST: 0}, "lengths: max_position_embeddings must be > 0, got 0"),
        ({LONGEST: 64, LENGTH: 1.5}, f"lengths: {LENGTH} must be a whole number"),
    ],
)
def test_lengths_that_are_none(config, said):
    with pytest.raises(ValueError, match=said):
        methods.lengths(config)
