"""The fused step's options that change numbers, and places that come together."""

from __future__ import annotations

import pytest
import torch
from append_cases import CONTIGUOUS, FILLER, Step, ints

from extrope_kernels import RopeFreqs, apply_rope, methods, rope_append_kvcache
from extrope_kernels.testing import device

SLOTS = [(b, t, b, n + t) for b, n in enumerate((3, 9)) for t in range(5)]
POSITIONS = torch.stack([torch.arange(3, 8), torch.arange(9, 14)]).to(device())


@pytest.mark.parametrize("norms", ("head", "all"))
def test_epsilon_of_the_norms(backend, norms):
    step = Step(norms=norms, call={**CONTIGUOUS, "norm_eps": 0.5})
    step.check(backend, step.expected(SLOTS, POSITIONS))


@pytest.mark.parametrize("without", ("q_norm_weight", "k_norm_weight"))
def test_one_norm(backend, without):
    step = Step(norms="head", call=CONTIGUOUS)
    step.weights[without] = None
    step.check(backend, step.expected(SLOTS, POSITIONS))


def test_an_origin_of_the_decay(backend):
    log_decay = 20 * methods.xpos(32).log_decay.to(device())
    step = Step(call=CONTIGUOUS)
    step.freqs = RopeFreqs(step.freqs.inv_freq, log_decay=log_decay, decay_origin=7.5)
    step.check(backend, step.expected(SLOTS, POSITIONS))


def test_frequencies_of_each_head(backend):
    step = Step(call=CONTIGUOUS)
    freqs = methods.ms_poe(methods.rope(32), heads=2).to(device())
    caches = step.caches(torch.float32)
    rope_append_kvcache(None, step.k, step.v, *caches, freqs, backend=backend, **CONTIGUOUS)
    call = {"positions": POSITIONS, "backend": "reference"}
    expected = apply_rope(step.k.double(), freqs, **call).float()
    for batch, token, block, place in SLOTS:
        torch.testing.assert_close(caches[0][block, place], expected[batch, token])
    assert (caches[0] == FILLER).all(-1).sum() == (2 * 23 - len(SLOTS)) * 2


def test_slots_of_any_stride(backend):
    slots = ints(*range(20, 10, -1), dtype=torch.int64).view(5, 2).T
    step = Step(call={"slot_mapping": slots, "positions": POSITIONS})
    written = [(b, t, n // 23, n % 23) for b in (0, 1) for t, n in enumerate(slots[b].tolist())]
    step.check(backend, step.expected(written, POSITIONS))


def test_packed_sequences_in_pages_behind_padding(backend):
    """Each with frequencies of its own; one token belongs to none."""
    table = ints(5, 2, 7, 1, 0, 6).view(2, 3)
    call = {"cu_seqlens": ints(0, 2, 6), "cache_seqlens": ints(3, 6), "block_table": table}
    call["cache_leftpad"] = ints(1, 4)
    step = Step(blocks=(8, 4), tokens=(7,), call=call)
    inv_freq = step.freqs.inv_freq
    step.freqs = RopeFreqs(torch.stack([inv_freq, inv_freq / 3]))
    slots = [(b, n) for b, ns in ((0, (3, 4)), (1, (6, 7, 8, 9))) for n in ns]
    caches = step.caches(torch.float32)
    q = rope_append_kvcache(step.q, step.k, step.v, *caches, step.freqs, backend=backend, **call)
    kept = torch.ones(8, 4, dtype=torch.bool, device=device())
    for token, (b, n) in enumerate(slots):
        at = int(table[b, n // 4]), n % 4
        kept[at] = False
        freqs = RopeFreqs(step.freqs.inv_freq[b])
        where = {"positions": n - (1, 4)[b], "backend": "reference"}
        for got, x in ((caches[0][at], step.k[token]), (q[token], step.q[token])):
            expected = apply_rope(x[None, None].double(), freqs, **where)
            torch.testing.assert_close(got, expected[0, 0].float())
        assert torch.equal(caches[1][at], step.v[token])
    assert all((x[kept] == FILLER).all() for x in caches)
