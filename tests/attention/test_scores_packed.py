"""Packed sequences of which only some are long enough for a score method's older regions."""

import pytest
import torch
from attention_gradients import check
from attention_oracle import both_orders, check_outputs, closed_form, frequencies, make_qkv
from score_examples import EXAMPLES, Relative

from extrope_kernels.testing import device

# The first sequence holds more keys than kernels read beside those that are seen.
LENGTHS = (70, 0, 200)
CASES = {
    "dual_chunk": {"chunk_size": 80, "local_window": 30},
    "blockwise_causal": {"block_size": 150},
    "string": {"shift": 90, "window": 8},
    "leaky_rerope": {"window": 80, "factor": 4.0},
}


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


def packed(name, factor):
    """The attention of a batch of one as that of packed sequences; what it is; frequencies."""
    example, parameters = EXAMPLES[name], CASES[name]
    relative = block_diagonal([example.relative(n, n, **parameters) for n in LENGTHS if n])
    cu_seqlens = torch.tensor((0, *LENGTHS), device=device()).cumsum(0)
    freqs = frequencies(16, attention_factor=factor)

    def attention(q, k, v, backend):
        out, lse = example.attention(
            q[0], k[0], v[0], freqs, cu_seqlens=cu_seqlens, return_lse=True, backend=backend,
            **parameters,
        )  # fmt: skip
        return out[None], lse[None]

    return attention, relative, freqs


@pytest.mark.parametrize("factor", [1.0, 1.2])  # as YaRN: keys have tables of their own
@pytest.mark.parametrize("name", CASES)
def test_outputs(name, factor, any_backend):
    attention, relative, freqs = packed(name, factor)
    tensors = make_qkv(1, sum(LENGTHS), None, 2, 1, 16)
    wanted = closed_form(*tensors, relative, freqs)
    plain = both_orders(*tensors, relative, freqs, wanted)
    check_outputs(any_backend, tensors[0], attention(*tensors, any_backend), plain, wanted)


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, factor):
    attention, relative, freqs = packed(name, factor)
    tensors = make_qkv(1, sum(LENGTHS), None, 2, 1, 16)
    check(lambda *x: attention(*x, "cpu"), relative, tensors, freqs, with_lse=True)


def test_starts_of_a_batch():
    """The same of a batch whose rows are pieces of longer sequences."""
    q, (k, v) = torch.randn(2, 100, 2, 16), torch.randn(2, 2, 600, 2, 16)
    starts = {"q_start": torch.tensor([0, 500], dtype=torch.int32), "k_start": 0}
    attention, freqs = EXAMPLES["blockwise_causal"].attention, frequencies(16)
    batch = attention(q, k, v, freqs, block_size=256, backend="cpu", **starts)
    for row, start in enumerate((0, 500)):
        one = [x[row : row + 1] for x in (q, k, v)]
        alone = attention(*one, freqs, block_size=256, backend="cpu", q_start=start, k_start=0)
        torch.testing.assert_close(batch[row : row + 1], alone)
