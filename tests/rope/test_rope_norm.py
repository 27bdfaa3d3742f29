"""RMSNorm before the rotation: against float64, and against what transformers' models do."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.rope_cases import NORMS, Case, check, check_gradients
from support.truncation import truncation

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods
from extrope_kernels.ops.rope.norm import rope_norm_bwd, rope_norm_inplace
from extrope_kernels.testing import DTYPES, assert_within_budget, device, make_qk

EPS = 1e-6


def norm_weights(heads_q, heads_k, head_dim, together=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    sizes = [n * head_dim if together else head_dim for n in (heads_q, heads_k)]
    return [(torch.rand(n, generator=generator) + 0.5).to(device(), dtype) for n in sizes]


def call(tensors, freqs, backend, **options):
    q, k, q_weight, k_weight = tensors
    return apply_rope_qk(
        q, k, freqs, q_norm_weight=q_weight, k_norm_weight=k_weight, backend=backend, **options
    )


def check_both(q, k, weights, freqs, backend, **options):
    """Results and gradients."""
    case = Case(q, k, freqs, options, dict(zip(NORMS, weights)))
    check(case, backend)
    check_gradients(case, backend)


@pytest.mark.parametrize("together", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim, rotary_dim, first, interleaved",
    ((128, 128, 0, False), (72, 72, 0, True), (80, 20, 0, False), (9, 8, 1, True)),
)
def test_against_float64(backend, head_dim, rotary_dim, first, interleaved, dtype, together):
    q, k = make_qk(2, 7, 3, 2, head_dim, dtype)
    weights = norm_weights(3, 2, head_dim, together)
    freqs = RopeFreqs(methods.rope(rotary_dim).inv_freq.to(device()), attention_factor=1.1)
    by = {"interleaved": interleaved, "rotary_offset": first}
    check_both(q, k, weights, freqs, backend, positions=1003, norm_eps=EPS, **by)


@pytest.mark.parametrize("together", (False, True))
@pytest.mark.parametrize("batch, seqlen, heads_q, heads_k", ((1, 131, 4, 4), (3, 1, 17, 1)))
def test_many_heads_and_tokens(backend, batch, seqlen, heads_q, heads_k, together):
    if backend == "triton" and device() == "cpu":
        seqlen = min(seqlen, 35)
    q, k = make_qk(batch, seqlen, heads_q, heads_k, head_dim=16)
    freqs = methods.rope(16).to(device())
    check_both(q, k, norm_weights(heads_q, heads_k, 16, together), freqs, backend)


@pytest.mark.skipif(device() != "cpu", reason="the interpreter would take minutes")
def test_gradients_of_weights_over_many_rows():
    """Not one running sum over all: its error would be several times PyTorch's."""
    q, k = make_qk(1, 256, 32, 32, head_dim=64)
    weights, freqs = norm_weights(32, 32, 64), methods.rope(64).to(device())
    douts = torch.randn(2, *q.shape, generator=torch.Generator().manual_seed(3))

    def gradients(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, *weights)]
        rotated = call(leaves, freqs, backend)
        return torch.stack(torch.autograd.grad(rotated, leaves[2:], [x.to(dtype) for x in douts]))

    exact = gradients(torch.float64, "reference")
    own, same = (gradients(torch.float32, at) - exact for at in ("cpu", "reference"))
    assert own.norm() <= 2 * same.norm()


@pytest.mark.parametrize("together", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("sizes", ((2, 21, 3, 2, 80), (1, 3, 8, 4, 48)))
def test_in_place(backend, sizes, interleaved, together):
    """Few tokens spread their heads over programs, each of which may need all of them."""
    q, k = make_qk(*sizes)
    freqs, weights = methods.rope(48).to(device()), norm_weights(*sizes[2:], together)
    expected = call([q, k, *weights], freqs, backend, interleaved=interleaved)
    results = call([q, k, *weights], freqs, backend, interleaved=interleaved, inplace=True)
    assert results[0] is q and results[1] is k
    assert all(torch.equal(x, y) for x, y in zip(results, expected))


@pytest.mark.parametrize("together", (False, True))
def test_the_reference_writes_in_place_and_has_the_gradients_of_autograd(together):
    """It is what runs without a library."""
    q, k = make_qk(2, 5, 3, 2, head_dim=16, dtype=torch.float64)
    weights = [x.double() for x in norm_weights(3, 2, 16, together)]
    inv_freq = methods.rope(8).inv_freq.to(device())
    leaves = [x.clone().requires_grad_() for x in (q, k, *weights)]
    outs = []
    for x, weight in zip(leaves[:2], leaves[2:]):
        rows = x.flatten(-2) if together else x
        normed = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        outs.append(apply_rope(normed.view(x.shape), RopeFreqs(inv_freq), backend="reference"))
    douts = [torch.randn_like(x) for x in outs]
    want = torch.autograd.grad(outs, leaves, douts)
    got = rope_norm_bwd(*douts, q, k, *weights, inv_freq)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    assert rope_norm_inplace(q, k, *weights, inv_freq) is None
    for x, y in zip((q, k), outs):
        torch.testing.assert_close(x, y.detach())


@pytest.mark.parametrize("together", (False, True))
def test_what_is_not_finite_is_as_in_pytorch(backend, together):
    q, k = make_qk(1, 6, 2, 2, head_dim=16)
    q[0, 1, 0, 3], q[0, 2, 1, 15], q[0, 3, 0, 0] = torch.nan, torch.inf, 1e30
    q[0, 4] = 0
    freqs, weights = methods.rope(8).to(device()), norm_weights(2, 2, 16, together)
    got = call([q, k, *weights], freqs, backend)
    expected = call([q, k, *weights], freqs, "reference")
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, equal_nan=True)


# -------------------------------------------------------------------------------------------------
# transformers
MODELS = {"qwen3": "Qwen3", "gemma3": "Gemma3", "olmo2": "Olmo2"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("model", MODELS)
def test_as_transformers_norm_and_rotate(backend, model, dtype):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    q, k = make_qk(2, 9, 4, 2, 64, dtype)
    sizes = [n * 64 if model == "olmo2" else 64 for n in (4, 2)]
    norms = [getattr(module, f"{MODELS[model]}RMSNorm")(n, eps=EPS).to(device()) for n in sizes]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, std=0.5)
    freqs = methods.rope(64).to(device())

    def theirs(dtype):
        rows = [x.to(dtype) for x in (q, k)]
        if model == "olmo2":
            normed = [n.to(dtype)(x.flatten(-2)).view_as(x) for n, x in zip(norms, rows)]
        else:
            normed = [n.to(dtype)(x) for n, x in zip(norms, rows)]
        angles = torch.arange(9, device=device())[:, None].double() * freqs.inv_freq.double()
        cos, sin = (
            f(torch.cat((angles, angles), -1))[None].to(dtype) for f in (torch.cos, torch.sin)
        )
        heads_first = [x.transpose(1, 2) for x in normed]
        return [x.transpose(1, 2) for x in module.apply_rotary_pos_emb(*heads_first, cos, sin)]

    with torch.no_grad():
        same = theirs(dtype)
        weights = [(1 + n.weight.float()) if model == "gemma3" else n.weight for n in norms]
        got = call([q, k, *weights], freqs, backend, norm_eps=EPS)
        exact = exactly(q, k, weights, freqs)
    for name, *values in zip("qk", got, same, exact):
        assert_within_budget(name, *values, truncation(backend, dtype))


def exactly(q, k, weights, freqs):
    wide = [x.double() for x in (q, k, *weights)]
    return call(wide, freqs, "reference", norm_eps=EPS)


# -------------------------------------------------------------------------------------------------
# Derivatives, transforms, graphs
@pytest.mark.parametrize("together", (False, True))
@pytest.mark.parametrize("inverse", (False, True))
def test_finite_differences(backend, inverse, together):
    q, k = make_qk(2, 3, 2, 2, head_dim=8, dtype=torch.float64)
    weights = norm_weights(2, 2, 8, together, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, *weights)]
    freqs = RopeFreqs(methods.rope(6).inv_freq.to(device()), attention_factor=1.3)
    assert torch.autograd.gradcheck(
        lambda *x: call(x, freqs, backend, positions=7, inverse=inverse), leaves, fast_mode=True
    )


def test_other_derivatives_are_refused(backend):
    q, k = make_qk(1, 3, 2, 2, head_dim=8)
    weights, freqs = norm_weights(2, 2, 8), methods.rope(8).to(device())
    learned = RopeFreqs(freqs.inv_freq.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="inv_freq must not require grad"):
        call([q, k, *weights], learned, backend)
    q.requires_grad_()
    out = call([q, k, *weights], freqs, backend)[0]
    (grad,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_func_grad_and_vmap(backend):
    q, k = make_qk(3, 5, 2, 2, head_dim=8, dtype=torch.float64)
    weights, freqs = norm_weights(2, 2, 8, dtype=torch.float64), methods.rope(8).to(device())

    def loss(weight, q, backend):
        outs = call([q[None], k[:1], weight, weights[1]], freqs, backend)
        return outs[0].pow(3).sum()

    for in_dims in ((None, 0), (0, 0)):
        weight = (
            weights[0] if in_dims[0] is None else torch.stack([weights[0] * n for n in (1, 2, 3)])
        )
        got = torch.vmap(torch.func.grad(lambda *x: loss(*x, backend)), in_dims)(weight, q)
        want = torch.vmap(torch.func.grad(lambda *x: loss(*x, "reference")), in_dims)(weight, q)
        torch.testing.assert_close(got, want)
