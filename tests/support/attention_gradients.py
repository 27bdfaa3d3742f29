"""Compares gradients of an attention with those of the closed form in float64."""

from __future__ import annotations

import math

import torch
from attention_oracle import closed_form, plain_formula, rounding_noise, worse
from score_examples import rerope

from extrope_kernels import rerope_attention
from extrope_kernels.testing import assert_within_budget

INF = math.inf
FLOAT = torch.float32


def gradients(function, tensors, dout, dlse=None):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse).masked_fill(lse == -INF, 0.0).sum()
    return torch.autograd.grad(loss, leaves)


def check(fused, relative, tensors, freqs, with_lse=False, **known):
    """Compare dq, dk and dv with those of the closed form, within the error budget."""
    dout = tensors[0].new_empty(*tensors[0].shape[:-1], tensors[2].shape[-1]).normal_()
    dlse = torch.randn(closed_form(*tensors, relative, freqs, **known)[1].shape)
    dlse = dlse.to(dout.device) if with_lse else None
    found = gradients(fused, tensors, dout, dlse)
    compare(found, tensors, relative, freqs, dout, dlse, **known)


def compare(found, tensors, relative, freqs, dout, dlse=None, **known):
    exact, plain = budget(tensors, relative, freqs, dout, dlse, **known)
    _, lse = closed_form(*tensors, relative, freqs, **known)
    gain = 1.0
    if known.get("log_n"):
        gain = max(1.0, math.log(tensors[1].shape[1]) / math.log(known["log_n"]))
    scale = (known.get("scale") or tensors[0].shape[-1] ** -0.5) * freqs.attention_factor**2 * gain
    for name, got, same_dtype, want in zip(("dq", "dk", "dv"), found, plain, exact):
        noise = rounding_noise(name, want, lse, dout, *tensors, scale)
        assert_within_budget(
            name, got, same_dtype, want, noise=noise if got.dtype == FLOAT else 0.0
        )


def budget(tensors, relative, freqs, dout, dlse=None, **known):
    """The gradients in float64, and those of the plain formula in the tensors' own dtype."""
    exact = gradients(
        lambda *x: closed_form(*x, relative, freqs, **known),
        [x.double() for x in tensors], dout.double(), dlse,
    )  # fmt: skip

    def plain(scale_first):
        return gradients(
            lambda *x: plain_formula(*x, relative, freqs, **known, scale_first=scale_first),
            tensors, dout, dlse,
        )  # fmt: skip

    return exact, worse(exact, plain(False), plain(True))


def check_rerope(backend, tensors, freqs, window, factor=INF, grouped=False, with_lse=False, **o):
    known = {"scale": o.get("softmax_scale"), "log_n": o.get("log_n")}
    known["interleaved"] = o.get("interleaved", False)

    def fused(*x):
        return rerope_attention(
            *x, freqs, window=window, factor=factor, grouped=grouped, backend=backend,
            return_lse=True, **o,
        )  # fmt: skip

    seqlens = tensors[0].shape[1], tensors[1].shape[1]
    check(fused, rerope(*seqlens, window, factor, grouped), tensors, freqs, with_lse, **known)
