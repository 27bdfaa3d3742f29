"""Every published or authors' frequency vector, bit for bit."""

from pathlib import Path

import pytest
import torch
from vectors import load

from extrope_kernels.methods import METHODS, xpos

DATA = load("method")
VECTORS = {vector["id"]: vector for vector in DATA["vectors"]}


def processor():
    """Its maker and the instructions that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    return next(makers, "unknown"), torch.backends.cpu.get_cpu_capability()


MAKER, CAPABILITY = processor()


def ulps(a, b):
    """Largest distance in units in the last place between float32 tensors of one sign."""
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


def allowed_ulps(vector):
    exact_on = vector.get("exact_on", (f"{MAKER} AVX512", f"{MAKER} AVX2"))
    if f"{MAKER} {CAPABILITY}" in exact_on:
        return vector.get("max_ulp", 0)
    return max(1, vector.get("max_ulp", 0))


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
    freqs = xpos(int(dim))
    assert ulps(freqs.log_decay, expected) == 0
    assert ulps(freqs.inv_freq, METHODS["rope"](int(dim)).inv_freq) == 0
    assert freqs.attention_factor == 1.0
