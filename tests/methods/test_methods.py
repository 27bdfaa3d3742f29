"""The registry, `RopeFreqs`, published values bit for bit, and methods that equal another."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from support.method_examples import DIM, EXAMPLES
from support.vectors import load

from extrope_kernels import methods
from extrope_kernels.methods import METHODS, RopeFreqs

DATA = load("method")
VECTORS = {vector["id"]: vector for vector in DATA["vectors"]}


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def ulps(a, b):
    """Largest distance in units in the last place between float32 tensors of one sign."""
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


def test_examples_cover_the_registry():
    assert set(EXAMPLES) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_registry(name):
    function = METHODS[name]
    assert getattr(methods, name) is function
    dim, *others = inspect.signature(function).parameters.values()
    assert dim.name == "dim"
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)
    freqs = function(DIM, **EXAMPLES[name])
    assert isinstance(freqs, RopeFreqs)
    assert freqs.inv_freq.shape == (DIM // 2,) and freqs.inv_freq.dtype == torch.float32
    assert type(freqs.attention_factor) is float


@pytest.mark.parametrize("name", METHODS)
def test_tables_do_not_depend_on_the_surroundings(name):
    expected = METHODS[name](DIM, **EXAMPLES[name])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            freqs = METHODS[name](DIM, **EXAMPLES[name])
    finally:
        torch.set_default_dtype(torch.float32)
    assert freqs.inv_freq.device.type == "cpu"
    assert same_bits(freqs.inv_freq, expected.inv_freq)


def test_rope_freqs_to_moves_every_tensor():
    freqs = methods.xpos(16).to("meta")
    assert freqs.inv_freq.device.type == freqs.log_decay.device.type == "meta"
    assert methods.yarn(16, **EXAMPLES["yarn"]).to("cpu").attention_factor > 1
    assert methods.axial(16).to("meta").axes.device.type == "meta"
    assert methods.rope(16).to("meta").log_decay is None


def processor():
    """Its maker and the instructions that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    return next(makers, "unknown"), torch.backends.cpu.get_cpu_capability()


MAKER, CAPABILITY = processor()


def allowed_ulps(vector):
    exact_on = vector.get("exact_on", (f"{MAKER} AVX512", f"{MAKER} AVX2"))
    if f"{MAKER} {CAPABILITY}" in exact_on:
        return vector.get("max_ulp", 0)
    return max(vector.get("ulp_elsewhere", 1), vector.get("max_ulp", 0))


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name):
    vector = VECTORS[name]
    arguments = dict(vector["arguments"])
    if vector.get("seq_len_is_tensor"):
        arguments["seq_len"] = torch.tensor(arguments["seq_len"])
    freqs = METHODS[vector["method"]](vector["dim"], **arguments)
    bits = torch.tensor([int(word, 16) for word in vector["inv_freq"].split()], dtype=torch.int32)
    assert freqs.inv_freq.dtype == torch.float32
    assert ulps(freqs.inv_freq, bits.view(torch.float32)) <= allowed_ulps(vector)
    assert freqs.attention_factor == vector.get("attention_factor", 1.0)
    assert freqs.log_decay is None


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"xpos"}))
def test_every_method_has_a_vector(method):
    assert any(vector["method"] == method for vector in VECTORS.values())


@pytest.mark.parametrize("dim", DATA["xpos_zeta"])
def test_xpos_decay(dim):
    zeta = torch.tensor(DATA["xpos_zeta"][dim], dtype=torch.float64)
    expected = (zeta.log() / 512).float()
    freqs = methods.xpos(int(dim))
    assert ulps(freqs.log_decay, expected) == 0
    assert ulps(freqs.inv_freq, METHODS["rope"](int(dim)).inv_freq) == 0
    assert freqs.attention_factor == 1.0


def at(name, **settings):
    return METHODS[name](128, **settings)


ROPE = methods.rope(128)
SHORT = {"original_max_position_embeddings": 256}
YARN = at("yarn", factor=4, **SHORT)
ONES = {"short_factor": [1] * 64, "long_factor": [1] * 64}
EXACT_REDUCTIONS = {
    "pi at factor 1": (at("pi", factor=1), ROPE),
    "ntk_aware at factor 1": (at("ntk_aware", factor=1), ROPE),
    "llama3 at factor 1": (
        at("llama3", factor=1, original_max_position_embeddings=8192), at("rope", base=500000)
    ),
    "giraffe_power at power 0": (at("giraffe_power", power=0), ROPE),
    "giraffe_power at power 0 with a factor": (
        at("giraffe_power", power=0, factor=3), at("pi", factor=3)
    ),
    "giraffe_truncation far away": (at("giraffe_truncation", truncate_pos=10**6), ROPE),
    "proportional at 1": (at("proportional", partial_rotary_factor=1), ROPE),
    "proportional at 1 with a factor": (
        at("proportional", partial_rotary_factor=1, factor=3), at("pi", factor=3)
    ),
    "longrope with ones": (at("longrope", **ONES, **SHORT, seq_len=999, factor=1), ROPE),
    "cope with nothing to fade": (at("cope", clip=0), ROPE),
    "abf": (at("abf"), at("rope", base=500000.0)),
    "dynamic_ntk within the trained length": (
        at("dynamic_ntk", factor=3, seq_len=5, max_position_embeddings=2048), ROPE
    ),
    "dynamic_ntk at factor 1": (
        at("dynamic_ntk", factor=1, seq_len=8192, max_position_embeddings=2048),
        at("ntk_aware", factor=4),
    ),
    "dynamic_yarn within the trained length": (at("dynamic_yarn", seq_len=256, **SHORT), ROPE),
    "dynamic_yarn beyond the trained length": (at("dynamic_yarn", seq_len=1024, **SHORT), YARN),
    "dynamic_yarn fine-tuned": (
        at("dynamic_yarn", seq_len=9, max_position_embeddings=1024, finetuned=True, **SHORT), YARN
    ),
    "ntk_by_parts, the paper's": (
        at("ntk_by_parts", factor=4, variant="paper", **SHORT),
        at("yarn", factor=4, attention_factor=1.0, **SHORT),
    ),
    "ntk_by_parts without its fast part where all pairs rotate often": (
        at("ntk_by_parts", factor=4, extrapolation_factor=0,
           original_max_position_embeddings=100_000),
        at("ntk_aware", factor=4),
    ),
    "yarn, truncate does not concern the rotations ramp": (
        at("yarn", factor=4, ramp="rotations", truncate=False, **SHORT),
        at("yarn", factor=4, ramp="rotations", **SHORT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT_REDUCTIONS)
def test_exact_reduction(name):
    freqs, expected = EXACT_REDUCTIONS[name]
    assert same_bits(freqs.inv_freq, expected.inv_freq)
    assert freqs.attention_factor == expected.attention_factor


BLENDED = {
    "yarn": methods.yarn(128, factor=1, original_max_position_embeddings=4096),
    "yarn, rotations": methods.yarn(
        128, factor=1, original_max_position_embeddings=4096, ramp="rotations"
    ),
    "ntk_by_parts": methods.ntk_by_parts(128, factor=1, original_max_position_embeddings=4096),
    "ntk_by_parts, paper": methods.ntk_by_parts(
        128, factor=1, original_max_position_embeddings=4096, variant="paper"
    ),
    "ntk_mixed": methods.ntk_mixed(128, factor=1),
}


@pytest.mark.parametrize("name", BLENDED)
def test_factor_1_is_rope_but_for_rounding(name):
    assert ulps(BLENDED[name].inv_freq, methods.rope(128).inv_freq) <= 1
    assert BLENDED[name].attention_factor == 1.0


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_ntk_mixed_at_exponent_0_is_pi(factor):
    # ln, exp and the negative power each round once.
    mixed = methods.ntk_mixed(128, factor=factor, exponent=0).inv_freq
    assert ulps(mixed, methods.pi(128, factor=factor).inv_freq) <= 3


def test_ntk_aware_keeps_the_first_pair_and_slows_the_last():
    plain, slowed = methods.rope(128).inv_freq, methods.ntk_aware(128, factor=8).inv_freq
    assert slowed[0] == plain[0]
    assert (plain[-1] / slowed[-1]).item() == pytest.approx(8, rel=1e-6)


def test_xpos_decay_vanishes_with_gamma():
    freqs = methods.xpos(128, gamma=1e30)
    assert torch.equal(freqs.log_decay, torch.zeros(64))
    assert same_bits(freqs.inv_freq, methods.rope(128).inv_freq)
    assert torch.all(methods.xpos(128).log_decay.diff() > 0)


def test_yarn_ramps_agree_at_their_ends_only():
    # The paper's values divided by the code's, d = 128, L = 4096, s = 16.
    settings = {"factor": 16, "original_max_position_embeddings": 4096}
    code = methods.yarn(128, **settings).inv_freq
    paper = methods.yarn(128, ramp="rotations", **settings).inv_freq
    assert ulps(code[:20], paper[:20]) <= 1 and ulps(code[46:], paper[46:]) <= 1
    ratios = {24: 0.766, 27: 0.585, 30: 0.462, 33: 0.382, 36: 0.338, 38: 0.329, 42: 0.382}
    for pair, ratio in ratios.items():
        assert (paper[pair] / code[pair]).item() == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "amplitude"),
    [(1.0, 1.0, 1.0), (0.707, 0.707, 1.0), (1.0, 0.5, 1.1557220), (0.5, None, 1.3688879)],
)
def test_yarn_amplitude(mscale, mscale_all_dim, amplitude):
    freqs = methods.yarn(
        64,
        factor=40,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    assert freqs.attention_factor == pytest.approx(amplitude, rel=1e-7)


def test_dynamic_yarn_amplitude_follows_the_length():
    settings = {"original_max_position_embeddings": 64, "max_position_embeddings": 128}
    amplitudes = [
        methods.dynamic_yarn(16, seq_len=n, **settings).attention_factor for n in (9, 128, 129)
    ]
    assert amplitudes == [1.0, 1.0, 0.1 * math.log(129 / 64) + 1.0]


@pytest.mark.parametrize(("dim", "clip"), [(128, 20), (16, 20), (64, 5), (64, 1), (8, 4)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_cope_fades_with_the_bits_of_the_authors_formula(dim, clip, base):
    table = methods.rope(dim, base=base).inv_freq
    faded = min(clip, dim // 2)
    angles = torch.linspace(0.0, torch.pi, steps=faded, dtype=torch.float32)
    fade = 0.5 * (1.0 + torch.cos(angles))
    expected = torch.cat((table[:-faded], table[-faded:] * fade))
    inv_freq = methods.cope(dim, base=base, clip=clip).inv_freq
    assert same_bits(inv_freq, expected)
    assert inv_freq[-faded] == table[-faded] and (faded == 1 or inv_freq[-1] == 0)


@pytest.mark.parametrize(("truncate_pos", "counts"), [(2048, (41, 14, 9)), (4096, (46, 14, 4))])
def test_giraffe_truncation_counts(truncate_pos, counts):
    inv_freq = methods.giraffe_truncation(128, truncate_pos=truncate_pos).inv_freq
    cutoff = 2 * math.pi / truncate_pos
    slow, zero = (inv_freq == torch.tensor(cutoff / 16)).sum().item(), (inv_freq == 0).sum().item()
    assert (64 - slow - zero, slow, zero) == counts
