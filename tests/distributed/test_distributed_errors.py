"""What is refused, in words, before anything is sent; with EXTROPE_CHECK=1 on all ranks alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from extrope_kernels import RopeFreqs, distributed
from extrope_kernels.testing import make_qk

FREQS = RopeFreqs(10000.0 ** -(torch.arange(8) / 8))
RIGHT = {"window": 6, "strategy": "gather"}


def attend(mesh, /, tokens=4, heads_q=4, heads_k=2, dtype=torch.float64, **options):
    q, k = make_qk(1, tokens, heads_q, heads_k, 16, dtype)
    tensors = {"q": q, "k": k, "v": k, "freqs": FREQS}
    given = {**tensors, **RIGHT, "mesh": mesh, **options}
    return distributed.rerope_attention(**given)


def refuses(mesh, error, message, options):
    """On every rank, none of which has sent anything: they may go on."""
    with pytest.raises(error, match=f"rerope_attention: {message}"):
        attend(mesh, **options)
    dist.barrier()


PACKED = {"q": torch.zeros(4, 4, 16), "k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
WRONG = {
    "strategy": ({"strategy": "tree"}, ValueError, "strategy must be one of .*, got 'tree'"),
    "balance": ({"balance": "tail"}, ValueError, "balance must be 'zigzag' or None, got 'tail'"),
    "mesh": ({"mesh": "cp"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
    "odd": ({"tokens": 3}, ValueError, "q must have an even number of tokens in zigzag, got 3"),
    "window": ({"window": 0}, ValueError, "window must be >= 1, got 0"),
    "grouped": ({"grouped": 1}, TypeError, "grouped must be a bool, got int"),
    "freqs": ({"freqs": 1}, TypeError, "freqs must be a RopeFreqs, got int"),
    "option": ({"causal": True}, TypeError, "got an unexpected keyword argument 'causal'"),
    "start": ({"q_start": 4}, TypeError, "got an unexpected keyword argument 'q_start'"),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be a bool, got int"),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be None or one of .*, got 'tpu'"),
    "no keys": (
        {"k": torch.zeros(1, 2, 2, 16).double(), "v": torch.zeros(1, 2, 2, 16).double()},
        ValueError,
        "k must have q's 4 tokens, got 2",
    ),
    "dtype": ({"k": torch.zeros(1, 4, 2, 16)}, ValueError, "k must be torch.float64"),
    "heads": (
        {"strategy": "ulysses", "heads_q": 6, "heads_k": 2},
        ValueError,
        "q's heads must be a multiple of the 4 ranks that exchange them, got 6",
    ),
    "heads of keys": (
        {"strategy": "ulysses", "heads_q": 12, "heads_k": 3},
        ValueError,
        "k's heads must be a multiple of the 4 ranks .*, got 3",
    ),
    "packed ring": (
        {**PACKED, "strategy": "ring", "cu_seqlens": torch.tensor([0, 16])},
        NotImplementedError,
        "a ring does not take cu_seqlens yet; strategy 'gather' and 'ulysses' do",
    ),
    "cu_seqlens of the rank": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "cu_seqlens must rise from 0 to the 16 tokens of all ranks, got",
    ),
    "query_scale of all": (
        {"query_scale": torch.ones(16)},
        ValueError,
        r"query_scale must be float32 \(4,\)",
    ),
    "gradient of inv_freq": (
        {"freqs": RopeFreqs(FREQS.inv_freq.clone().requires_grad_())},
        ValueError,
        "inv_freq has no gradient here",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_refuses(ranks, what):
    options, error, message = WRONG[what]
    ranks.run(refuses, 4, error=error, message=message, options=options)


def refuses_two_dimensions(mesh):
    with pytest.raises(ValueError, match="strategy must be 'gather' or 'ring' over a mesh of two"):
        attend(mesh, strategy="ulysses")


def test_ulysses_twice_is_refused(ranks):
    ranks.run(refuses_two_dimensions, (2, 2))


def all_raise(mesh, mine, error, message, others):
    """Rank 2 is given `mine` beside what is right."""
    import os

    os.environ["EXTROPE_CHECK"] = "1"
    try:
        wrong = dist.get_rank() == 2
        with pytest.raises(error if wrong else ValueError) as raised:
            attend(mesh, **(mine if wrong else {}))
        expected = message if wrong or others is None else others
        assert expected in str(raised.value), raised.value
        attend(mesh)  # all are in step still
    finally:
        del os.environ["EXTROPE_CHECK"]


SAID = "rerope_attention: rank 2 of the mesh was refused: rerope_attention: "


@pytest.mark.parametrize("size", [4, (2, 2)])
@pytest.mark.parametrize(
    ("mine", "error", "message", "others"),
    [
        ({"window": 0}, ValueError, "window must be >= 1", SAID + "window must be >= 1, got 0"),
        ({"freqs": 1}, TypeError, "freqs must be a RopeFreqs", SAID + "freqs must be a RopeFreqs"),
        ({"window": 7}, ValueError, "the score method and its options must be alike", None),
        ({"tokens": 6}, ValueError, "the shape and dtype of q must be alike on all ranks", None),
        ({"dtype": torch.float32}, ValueError, "the shape and dtype of q must be alike", None),
        ({"balance": None}, ValueError, "balance must be alike", None),
        ({"query_scale": torch.ones(4)}, ValueError, "dtype of query_scale must be alike", None),
        (
            {"freqs": RopeFreqs(FREQS.inv_freq / 2)},
            ValueError,
            "the contents of inv_freq and log_decay must be alike on all ranks",
            None,
        ),
        ({"factor": 10**400}, OverflowError, "too large", SAID[:-18] + "int too large"),
        ({"strategy": "ring"}, ValueError, "strategy must be alike", None),
        ({"strategy": "tree"}, ValueError, "strategy must be one of", SAID + "strategy must be"),
        (
            {"v": make_qk(1, 4, 4, 2, 16, torch.float64)[1].requires_grad_()},
            ValueError,
            "what requires grad must be alike on all ranks of the mesh, got [[], [], ['v'], []]",
            None,
        ),
    ],
)
def test_all_ranks_raise(ranks, size, mine, error, message, others):
    ranks.run(all_raise, size, mine=mine, error=error, message=message, others=others)


def hangs(mesh):
    if dist.get_rank() == 0:
        dist.barrier(mesh.get_group())


def test_a_hang_is_a_failure():
    """Of the tests' own processes: what waits for ever is ended."""
    alone = Ranks(seconds=3)
    try:
        with pytest.raises(TimeoutError, match="rank 0 did not answer within 3 s"):
            alone.run(hangs, 2)
        assert not alone.processes
    finally:
        alone.stop()
