"""Every score method through its public function: out and lse as its definition says."""

import pytest
import torch
from attention_oracle import both_orders, check_outputs, closed_form, frequencies, make_qkv
from score_examples import EXAMPLES

SHAPES = [
    {},
    {"batch": 2, "seqlen_q": 1},
    {"seqlen_q": 7, "seqlen_k": 41, "heads_q": 6, "heads_k": 3},
    {"seqlen_q": 67, "heads_q": 4, "heads_k": 4, "head_dim": 40, "dtype": torch.float16},
    {"seqlen_q": 130, "heads_q": 3, "head_dim": 64, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_score_method(name, shape, any_backend):
    example = EXAMPLES[name]
    q, k, v = make_qkv(**SHAPES[shape])
    freqs = frequencies(q.shape[-1], rotary_dim=q.shape[-1] // 2, attention_factor=1.2)
    relative = example.relative(q.shape[1], k.shape[1], **example.parameters)
    wanted = closed_form(q, k, v, relative, freqs)
    plain = both_orders(q, k, v, relative, freqs, wanted)
    found = example.attention(
        q, k, v, freqs, **example.parameters, return_lse=True, backend=any_backend
    )
    check_outputs(any_backend, q, found, plain, wanted)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_in_float64(name):
    """The derivatives of the reference, which float64 runs."""
    example = EXAMPLES[name]
    leaves = [x.double().requires_grad_() for x in make_qkv(1, 11, None, 2, 1, 2)]
    freqs = frequencies(2)

    def attend(q, k, v):
        return example.attention(q, k, v, freqs, **example.parameters)

    assert torch.autograd.gradcheck(attend, leaves)
