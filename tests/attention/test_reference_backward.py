"""The reference's own backward against the derivative that autograd takes of its forward."""

import pytest
import torch

from extrope_kernels import scores
from extrope_kernels.methods import rope
from extrope_kernels.ops._shared.attention_call import AttentionCall, score_options
from extrope_kernels.ops.attention import reference


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


SOFTMAX = {"softcap": 0.5, "sliding_window": 5, "log_n": 3.0, "softmax_scale": 0.7}
CALLS = {
    "plain": {},
    **{name: {name: value} for name, value in SOFTMAX.items()},
    "sinks": {"sinks": doubles(4)},
    "query_scale": {"query_scale": torch.rand(2, 9) + 0.5},
    "rows without keys": {"q_start": ints(0, 7), "k_start": ints(6, 0), "softcap": 0.5},
    "all": {**SOFTMAX, "sinks": doubles(4), "q_start": ints(0, 7), "k_start": ints(6, 0)},
}


def check(call, q, k, v):
    qkv = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.forward(*qkv, call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).where(lse.isfinite(), 0.0)
    expected = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    given = [x.detach() for x in (q, k, v, out, lse)]
    for got, want in zip(reference.backward(dout, dlse, *given, call), expected):
        torch.testing.assert_close(got, want)
    for got in reference.backward(dout, None, *given, call):
        assert got.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "score", (scores.rerope(3, 2.0), scores.dual_chunk(5, 1)), ids=lambda score: score.name
)
def test_batch(name, score):
    options = score_options(score) | CALLS[name]
    call = AttentionCall(rope(8).inv_freq, attention_factor=1.2, **options)
    check(call, doubles(2, 9, 4, 8), doubles(2, 11, 2, 8), doubles(2, 11, 2, 6))


@pytest.mark.parametrize("name", ("plain", *SOFTMAX, "sinks"))
def test_packed(name):
    options = score_options(scores.rerope(3, 2.0)) | CALLS[name]
    call = AttentionCall(rope(8).inv_freq, ints(0, 4, 4, 11), **options)
    check(call, doubles(11, 4, 8), doubles(11, 2, 8), doubles(11, 2, 6))
