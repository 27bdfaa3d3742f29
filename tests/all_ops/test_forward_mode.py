"""Forward-mode derivatives, which no kernel has, are refused: none is lost in silence."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp

from extrope_kernels import (
    apply_rope,
    apply_rope_qk,
    head_permutations,
    methods,
    permute,
    permuteformer_attention,
    rope_attention,
    scores,
)

FREQS = methods.rope(8)
PERMUTATIONS = head_permutations(2, 8)
CALLS = {
    "apply_rope": lambda x: apply_rope(x, FREQS),
    "apply_rope_qk": lambda x: apply_rope_qk(x, x, FREQS, q_norm_weight=torch.ones(8))[0],
    "rope_attention": lambda x: rope_attention(x, x, x, FREQS, scores.rerope(2)),
    "permute": lambda x: permute(x, PERMUTATIONS),
    "permuteformer_attention": lambda x: permuteformer_attention(
        x, x, x, permutations=PERMUTATIONS
    ),
}
REFUSED = r"^\w+: has no forward-mode derivatives .*; use reverse mode"


def dual(call, x):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, x.cos()))


TRANSFORMS = {
    "jvp": lambda call, x: jvp(call, (x,), (x.cos(),)),
    "jacfwd": lambda call, x: jacfwd(call)(x),
    "hessian": lambda call, x: hessian(lambda x: (call(x) ** 3).sum())(x),
    "dual": dual,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_forward_mode_is_refused(name, transform):
    with pytest.raises(NotImplementedError, match=REFUSED):
        TRANSFORMS[transform](CALLS[name], torch.randn(1, 3, 2, 8))


def test_the_reference_of_attention_has_them():
    """It is PyTorch's operations alone; frequencies have theirs by a detour."""

    def call(x, inv_freq):
        freqs = replace(FREQS, inv_freq=inv_freq)
        return rope_attention(x, x, x, freqs, scores.rerope(2), backend="reference")

    given = torch.randn(1, 4, 2, 8, dtype=torch.float64), FREQS.inv_freq.double()
    for n in range(2):
        forward, reverse = (of(call, argnums=n)(*given) for of in (jacfwd, jacrev))
        torch.testing.assert_close(forward, reverse)
        assert forward.abs().max() > 0.1


def test_what_has_no_tangent_goes_on():
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    with forward_ad.dual_level():
        assert torch.equal(apply_rope(x, FREQS), apply_rope(x.detach(), FREQS))
