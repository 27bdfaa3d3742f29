"""Packed sequences are a loop over sequences, each with frequencies and starts of its own."""

from itertools import pairwise

import pytest
import torch
from attention_oracle import attend, check, check_both, check_gradients, frequencies, make_qkv
from score_examples import (
    EXAMPLES,
    Example,
    Relative,
    blockwise_causal,
    dual_chunk,
    example,
    rerope,
    self_extend,
    string,
)
from test_attention import switched

from extrope_kernels import rope_attention, scores
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.testing import device


def block_diagonal(parts: list[Relative]) -> Relative:
    """Of sequences that do not see one another."""
    seen = [torch.where(part.seen.isnan(), torch.inf, part.seen) for part in parts]
    here = torch.block_diag(*(torch.ones_like(x) for x in seen)).bool()
    seen = torch.block_diag(*seen).masked_fill(~here, torch.inf)
    branches = []
    for several in zip(*(part.branches for part in parts)):
        masks, i, j = zip(*several)
        mask = torch.block_diag(*(x.double() for x in masks)).bool()
        branches.append((mask, torch.cat(i), torch.cat(j, 1)))
    return Relative(seen.masked_fill(seen.isinf(), torch.nan), branches)


def bounds_of(lengths) -> torch.Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32, device=device()).cumsum(0).int()


LENGTHS = ((7,), (5, 0, 17, 1, 33), (0, 0, 3), (64, 65))
MADE = {
    "rerope": EXAMPLES["rerope"],
    "leaky_rerope": EXAMPLES["leaky_rerope"],
    "self_extend": EXAMPLES["self_extend"],
    "dual_chunk": EXAMPLES["dual_chunk"],
}
# Of these only some sequences are long enough for the score's older regions; the first holds more
# keys than kernels read beside those that are seen.
UNEVEN = (70, 0, 200)
OLDER = {
    "dual_chunk": example(scores.dual_chunk, dual_chunk, chunk_size=80, local_window=30),
    "blockwise_causal": example(scores.blockwise_causal, blockwise_causal, block_size=150),
    "string": example(scores.string, string, shift=90, window=8),
    "leaky_rerope": example(scores.leaky_rerope, rerope, window=80, factor=4.0),
    "self_extend": example(scores.self_extend, self_extend, window=80, factor=4),
}


def packed(made: Example, lengths) -> Example:
    """The same score of packed sequences, whose relative positions are blocks."""
    whole = block_diagonal([made.relative(n, n) for n in lengths if n])
    return Example(made.score, lambda seqlen_q, seqlen_k: whole, made.parameters)


def run_packed(monkeypatch, lengths) -> None:
    """Let the checks, which know batches, call the op with packed tensors."""

    def attend_packed(made, q, k, v, freqs, backend=None, **options):
        for ends in (bounds_of(lengths), bounds_of(lengths).long()):
            out, lse = rope_attention(
                q[0], k[0], v[0], freqs, made.score, cu_seqlens=ends, return_lse=True,
                backend=backend, **options,
            )  # fmt: skip
        return out[None], lse[None]

    monkeypatch.setattr("attention_oracle.attend", attend_packed)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_loop_over_sequences(lengths, name, any_backend, monkeypatch):
    run_packed(monkeypatch, lengths)
    tensors = make_qkv(1, sum(lengths), None, 4, 2)
    check_both(any_backend, packed(MADE[name], lengths), tensors, with_lse=False)


@pytest.mark.parametrize("factor", [1.0, 1.2])  # as YaRN: keys have tables of their own
@pytest.mark.parametrize("name", OLDER)
def test_uneven_sequences(name, factor, any_backend, monkeypatch):
    run_packed(monkeypatch, UNEVEN)
    tensors = make_qkv(1, sum(UNEVEN), None, 2, 1, 16)
    freqs = frequencies(16, attention_factor=factor)
    check(any_backend, packed(OLDER[name], UNEVEN), tensors, freqs)
    freqs = frequencies(16, attention_factor=factor, rotary_dim=6)
    check(any_backend, packed(OLDER[name], UNEVEN), tensors, freqs, rotary_offset=8)
    if any_backend == "cpu":
        check_gradients(any_backend, packed(OLDER[name], UNEVEN), tensors, freqs)


@pytest.mark.parametrize("switch", ["sinks", "sliding_window", "all"])
def test_softmax_options(switch, any_backend):
    """With log_n, a start and frequencies of each of them: as the sequences one by one."""
    lengths, made = (17, 0, 1, 30), EXAMPLES["self_extend"]
    total, bounds = sum(lengths), bounds_of(lengths)
    tensors = [x[0] for x in make_qkv(1, total)]
    options = switched(switch, 1, total)
    scale = options.pop("query_scale", None)
    if scale is not None:
        scale = options["query_scale"] = scale.reshape(-1)
    rows = torch.linspace(0.5, 1.5, len(lengths), device=device())[:, None]
    inv_freq = frequencies(32).inv_freq * rows
    starts = torch.tensor((0, 4, 9, 2), dtype=torch.int32, device=device())
    of_all = options | {"q_start": starts, "k_start": starts, "cu_seqlens": bounds}
    out, lse = attend(made, *tensors, RopeFreqs(inv_freq), any_backend, **of_all)
    for n, (begin, end) in enumerate(pairwise(bounds.tolist())):
        own = options | {"q_start": int(starts[n]), "k_start": int(starts[n])}
        if scale is not None:
            own["query_scale"] = scale[begin:end]
        one = [x[None, begin:end] for x in tensors]
        want, want_lse = attend(made, *one, RopeFreqs(inv_freq[n]), any_backend, **own)
        torch.testing.assert_close(out[begin:end], want[0])
        torch.testing.assert_close(lse[:, begin:end], want_lse[0])


def test_one_token_behind_an_empty_sequence(any_backend):
    """Has frequencies and starts of its own sequence, not those of the first."""
    tensors = [x[0] for x in make_qkv(1, 1, None, 2, 1)]
    inv_freq = frequencies(32).inv_freq * torch.tensor([[1.0], [0.5]], device=device())
    starts = [torch.tensor(at, dtype=torch.int32, device=device()) for at in ((3, 40), (3, 37))]
    both = {"cu_seqlens": bounds_of((0, 1)), "q_start": starts[0], "k_start": starts[1]}
    _, found = attend(EXAMPLES["rerope"], *tensors, RopeFreqs(inv_freq), any_backend, **both)
    alone, freqs = [x[None] for x in tensors], RopeFreqs(inv_freq[1])
    _, want = attend(EXAMPLES["rerope"], *alone, freqs, any_backend, q_start=40, k_start=37)
    torch.testing.assert_close(found, want[0])


def test_a_batch_of_pieces_of_longer_sequences():
    q, (k, v) = torch.randn(2, 100, 2, 16), torch.randn(2, 2, 600, 2, 16)
    made, freqs = (
        example(scores.blockwise_causal, blockwise_causal, block_size=256),
        frequencies(16),
    )
    starts = torch.tensor([0, 500], dtype=torch.int32)
    batch, _ = attend(made, q, k, v, freqs, "cpu", q_start=starts, k_start=0)
    for row, start in enumerate((0, 500)):
        one = [x[row : row + 1] for x in (q, k, v)]
        alone, _ = attend(made, *one, freqs, "cpu", q_start=start, k_start=0)
        torch.testing.assert_close(batch[row : row + 1], alone)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(name):
    """In the reference; in kernels, where values share a tile, it may not."""
    tensors = dict(zip("qkv", (x[0] for x in make_qkv(1, 30, None, 2, 1))))
    tensors[name][4] = torch.nan
    tensors = [x.requires_grad_() for x in tensors.values()]
    options = {"cu_seqlens": bounds_of((10, 20))}
    out, _ = attend(EXAMPLES["rerope"], *tensors, frequencies(32), "reference", **options)
    assert out[:10].isnan().any() and out[10:].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert grad[10:].isfinite().all()
