"""What is refused, in words, before anything is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from extrope_kernels import RopeFreqs, distributed, methods, scores
from extrope_kernels.testing import make_qk

FREQS = RopeFreqs(10000.0 ** -(torch.arange(8) / 8))
SCORE = scores.rerope(6)


def attend(mesh, /, tokens=4, heads_q=4, heads_k=2, **options):
    q, k = make_qk(1, tokens, heads_q, heads_k, 16, torch.float64)
    tensors = {"q": q, "k": k, "v": k, "freqs": FREQS, "score": SCORE}
    return distributed.rope_attention(**{**tensors, "mesh": mesh, **options})


PACKED = {"q": torch.zeros(4, 4, 16), "k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
TWO_KEYS = torch.zeros(1, 2, 2, 16).double()
FAR = torch.zeros(1, 2000, 1, 16).half()
WITH_GRADIENT = RopeFreqs(FREQS.inv_freq.clone().requires_grad_())
REFUSED = [
    ({"strategy": "tree"}, ValueError, "strategy must be one of .*, got 'tree'"),
    ({"balance": "tail"}, ValueError, "balance must be 'zigzag' or None, got 'tail'"),
    ({"mesh": "cp"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
    ({"tokens": 3}, ValueError, "q must have an even number of tokens in zigzag, got 3"),
    ({"freqs": 1}, TypeError, r"freqs must be a RopeFreqs, as methods.rope\(head_dim\) makes one"),
    ({"return_lse": 1}, TypeError, "return_lse must be a bool, got int"),
    ({"backend": "tpu"}, ValueError, "backend must be None or one of .*, got 'tpu'"),
    ({"k": TWO_KEYS, "v": TWO_KEYS}, ValueError, "k must have q's 4 tokens, got 2"),
    ({"k": torch.zeros(1, 4, 2, 16)}, ValueError, "k must be float64"),
    (
        {"strategy": "ulysses", "heads_q": 6},
        ValueError,
        "q's heads must be a multiple of the 4 ranks that exchange them, got 6",
    ),
    (
        {"strategy": "ulysses", "heads_q": 12, "heads_k": 3},
        ValueError,
        "k's heads must be a multiple of the 4 ranks .*, got 3",
    ),
    (
        {**PACKED, "strategy": "ring", "cu_seqlens": torch.tensor([0, 16])},
        NotImplementedError,
        "strategy must be 'gather' or 'ulysses' with cu_seqlens, got 'ring'",
    ),
    (
        {**PACKED, "cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "cu_seqlens must rise from 0 to the 16 tokens of all ranks, got",
    ),
    ({"query_scale": torch.ones(16)}, ValueError, r"query_scale must be \(seqlen_q 4,\) or"),
    ({"freqs": WITH_GRADIENT}, ValueError, "inv_freq must not require grad over ranks"),
    # A rank's 2,000 tokens are near enough to 0; the last of all ranks are not.
    (
        {"q": FAR, "k": FAR, "v": FAR, "freqs": methods.xpos(16), "score": scores.rerope(7500)},
        ValueError,
        "keys must be within 4532 positions of 0 for XPOS in torch.float16, got one at 7999",
    ),
]


def refuses(mesh):
    """On every rank, none of which has sent anything: they may go on."""
    for options, error, message in REFUSED:
        with pytest.raises(error, match=f"^rerope: {message}"):
            attend(mesh, **options)
    dist.barrier()
    with pytest.raises(TypeError, match="'causal'"):
        attend(mesh, causal=True)
    rows = torch.zeros(1, 4, 4, 20)
    for strategy in ("gather", "ring", "ulysses"):  # a kernel's refusal, on every rank alike
        with pytest.raises(ValueError, match=r"^rerope: head_dim must be a multiple"):
            attend(mesh, q=rows, k=rows, v=rows, strategy=strategy)
    with torch.no_grad():  # learned frequencies, when nothing is learned
        assert attend(mesh, freqs=WITH_GRADIENT).shape == (1, 4, 4, 16)


def refuses_a_grid(mesh):
    with pytest.raises(ValueError, match=r"^rope_attention: mesh must have 1 dimension, got 2"):
        attend(mesh, score=None)


def test_refuses(ranks):
    ranks.run(refuses, 4)
    ranks.run(refuses_a_grid, (2, 2))
