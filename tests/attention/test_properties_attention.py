"""Generated calls, without and with a cache, against definitions; parts merged to the whole."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from support import attention_oracle as oracle
from support import decode_oracle
from support import rounding as rounding_of
from support.attention_cases import INF, caches, cases
from support.generated import LOW, backends, generated, seeds
from test_merge import parts_and_whole

from extrope_kernels import merge_attention
from extrope_kernels.testing import assert_within_budget, attention_backends

BACKENDS = backends([name for name in attention_backends() if name != "flash_attn"])


@generated(examples=80, case=cases(), backend=BACKENDS)
def test_forward(case, backend):
    before = [x.clone() for x in case.tensors]
    oracle.check(backend, case.example, case.tensors, case.freqs, case.error, **case.options)
    assert all(torch.equal(x, y) for x, y in zip(case.tensors, before))


@generated(examples=80, case=cases((torch.float32, torch.float16)), backend=BACKENDS)
def test_gradients(case, backend):
    given = case.example, case.tensors, case.freqs
    oracle.check_gradients(backend, *given, False, case.error, **case.options)


@generated(examples=60, case=caches(), backend=BACKENDS)
def test_cache(case, backend):
    inputs = decode_oracle.make(case)
    noise = rounding_of.of_cache(case, inputs, *decode_oracle.dequantized(inputs))
    decode_oracle.check(case, backend, inputs, noise)


@generated(
    examples=60,
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    shape=st.tuples(*[st.integers(0, 4)] * 3, st.sampled_from((1, 3, 8))),
    packed=st.booleans(),
    dtype=st.sampled_from(LOW),
    seed=seeds(),
)
def test_merge(sizes, shape, packed, dtype, seed):
    """Attention over parts of the keys, merged, is attention over all of them."""
    outs, lses, (out, lse) = parts_and_whole(sizes, shape[packed:], seed)
    before = [x.clone() for x in (*outs, *lses)]
    merged, merged_lse = merge_attention(outs, lses)
    assert all(torch.equal(x, y) for x, y in zip(before, (*outs, *lses)))
    copies = [[x.clone() for x in sets] for sets in (outs, lses)]
    over = merge_attention(*copies, inplace=True)
    assert over[0] is copies[0][0] and over[1] is copies[1][0]
    torch.testing.assert_close(over, (merged, merged_lse))
    if not packed:
        stacked = merge_attention(torch.stack(outs), torch.stack(lses))
        torch.testing.assert_close(stacked, (merged, merged_lse))
    seen = lse > -INF
    assert torch.equal(merged_lse > -INF, seen)
    torch.testing.assert_close(merged_lse[seen], lse[seen])
    per_row = seen.transpose(-1, -2)
    torch.testing.assert_close(merged[per_row], out[per_row])
    assert not merged[~per_row].any()
    low = merge_attention([x.nan_to_num().to(dtype) for x in outs], [x.float() for x in lses])
    exact = merge_attention([x.nan_to_num().to(dtype).double() for x in outs],
                            [x.float().double() for x in lses])  # fmt: skip
    assert_within_budget("out", low[0], exact[0].to(dtype), exact[0])
