"""merge_attention against attention over all keys at once, in float64."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from extrope_kernels import merge_attention
from extrope_kernels.testing import device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(q, k, v, dtype=torch.float64):
    """(..., seqlen, heads, head_dim) -> out and lse (..., heads, seqlen); no keys: 0 and -inf."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = torch.einsum("...ihd,...jhd->...hij", q, k)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None])
    return torch.einsum("...hij,...jhd->...ihd", weights, v), lse


def parts_and_whole(sizes, shape=(2, 5, 3, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    *batch, seqlen, heads, head_dim = shape

    def randn(length):
        return torch.randn(*batch, length, heads, head_dim, generator=generator).to(device())

    q, keys = randn(seqlen), [(randn(n), randn(n)) for n in sizes]
    parts = [attention(q, k, v) for k, v in keys]
    k, v = (torch.cat(x, dim=-3) for x in zip(*keys))
    return [out for out, _ in parts], [lse for _, lse in parts], attention(q, k, v)


@pytest.mark.parametrize("sizes", [(4,), (1, 6), (3, 1, 7), (0, 5), (5, 0), (2, 0, 0, 1)])
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 1, 1, 1), (7, 3, 8), (0, 3, 8), (2, 0, 3, 8)])
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_attention_over_all_keys(sizes, shape, inplace):
    outs, lses, (out, lse) = parts_and_whole(sizes, shape)
    merged, merged_lse = merge_attention(outs, lses, inplace=inplace)
    assert merged.dtype == merged_lse.dtype == torch.float64
    assert (merged is outs[0]) == (merged_lse is lses[0]) == inplace
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_set_stays_as_it_is(dtype):
    out, lse = torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 4, 3)
    merged, merged_lse = merge_attention([out], [lse])
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_takes_stacked_tensors_and_any_strides():
    outs, lses, _ = parts_and_whole((3, 4))
    expected = merge_attention(outs, lses)
    heads_first = [out.transpose(1, 2).contiguous().transpose(1, 2) for out in outs]
    column_major = [out.mT.contiguous().mT for out in outs]
    transposed = [lse.transpose(1, 2).contiguous().transpose(1, 2) for lse in lses]
    for given in (
        (torch.stack(outs), torch.stack(lses)),
        (heads_first, transposed),
        (column_major, lses),
    ):
        for got, want in zip(merge_attention(*given), expected):
            assert torch.equal(got, want)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_do_not_overflow(size):
    outs, lses, (out, lse) = parts_and_whole((3, 4))
    lses = [(x + size).float() for x in lses]
    merged, merged_lse = merge_attention([out.float() for out in outs], lses)
    # The lse itself has lost digits at this size; the weights see that loss and no more.
    spacing = torch.finfo(torch.float32).eps * abs(size)
    torch.testing.assert_close(merged.double(), out, rtol=0, atol=4 * spacing * out.abs().max())
    torch.testing.assert_close(merged_lse.double(), lse + size, rtol=0, atol=2 * spacing)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 3.0])
def test_rows_without_keys_do_not_count(garbage):
    """The first row has no keys in set 1, the second none in set 0, the third none at all."""
    outs, lses, _ = parts_and_whole((3, 4), (5, 2, 8))
    absent = ((1, 0), (0, 1), (0, 2), (1, 2))
    for which, row in absent:
        outs[which][row], lses[which][:, row] = garbage, -torch.inf
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out[0], outs[0][0]) and torch.equal(out[1], outs[1][1])
    assert torch.equal(lse[:, 0], lses[0][:, 0]) and torch.equal(lse[:, 1], lses[1][:, 1])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad(out.sum() + finite.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    for which, row in absent:
        assert (grads[which][row] == 0).all() and (grads[2 + which][:, row] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_place_rounds_nothing_on_the_way(dtype):
    """Into views, as a ring does, one after the other, in float32."""
    outs, lses, _ = parts_and_whole((3, 6, 2), (2, 17, 3, 16))
    outs, lses = [out.to(dtype) for out in outs], [lse.float() for lse in lses]
    exact, exact_lse = merge_attention([out.double() for out in outs], [x.double() for x in lses])
    out, lse = torch.zeros(2, 30, 3, 16), torch.zeros(2, 3, 30)
    so_far, lse_so_far = out[:, 4:21], lse[..., 4:21]
    so_far.copy_(outs[0])
    lse_so_far.copy_(lses[0])
    for part in zip(outs[1:], lses[1:]):
        merge_attention(*zip((so_far, lse_so_far), part), inplace=True)
    torch.testing.assert_close(so_far.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse_so_far.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert (out[:, :4] == 0).all() and (lse[..., 21:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_place_of_16_bits_rounds_once(dtype):
    outs, lses, _ = parts_and_whole((3, 6, 2, 4), (2, 17, 3, 16))
    outs, lses = [out.to(dtype) for out in outs], [lse.float() for lse in lses]
    exact, _ = merge_attention([out.double() for out in outs], [x.double() for x in lses])
    merged, _ = merge_attention(outs, lses, inplace=True)
    half = 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(merged.double(), exact, rtol=half, atol=1e-6)


@pytest.mark.parametrize("without_keys", [False, True])
def test_derivatives(without_keys):
    outs, lses, _ = parts_and_whole((3, 4), (2, 2, 3))
    if without_keys:
        lses[1][:, 0] = -torch.inf
    leaves = [x.requires_grad_() for x in outs]
    # -inf cannot be perturbed: finite differences go through a shift of what is finite.
    leaves += [torch.zeros_like(x).requires_grad_() for x in lses]

    def merged(*leaves):
        shifts = leaves[len(outs) :]
        shifted = [torch.where(x == -torch.inf, x, x + s) for x, s in zip(lses, shifts)]
        return merge_attention(leaves[: len(outs)], shifted)

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradgradcheck(merged, leaves)


def test_transforms():
    """vmap over any of the tensors, forward mode, and nested."""
    outs, lses, _ = parts_and_whole((3, 4))
    several = torch.stack([outs[0] * n for n in (1, 2, 3)])

    def merged(x):
        return merge_attention([x, outs[1]], lses)[0]

    for got, x in zip(vmap(merged)(several), several):
        torch.testing.assert_close(got, merged(x))
    of_one = vmap(grad(lambda x: merged(x).pow(2).sum()))(several)
    for got, x in zip(of_one, several):
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(merged(leaf).pow(2).sum(), leaf)[0])
    small = outs[0][:1, :1]

    def first(x):
        return merge_attention([x, small], [y[:1, :, :1] for y in lses])[0]

    torch.testing.assert_close(jacfwd(first)(small), jacrev(first)(small))


def test_compiles_without_a_break():
    outs, lses, _ = parts_and_whole((3, 4))
    outs, lses = [x.float().requires_grad_() for x in outs], [x.float() for x in lses]
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(outs, lses), merge_attention(outs, lses)):
        torch.testing.assert_close(got, want)
    compiled(outs, lses)[0].sum().backward()
    assert all(out.grad.isfinite().all() for out in outs)


OUT, LSE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs must hold at least one tensor"),
        ([OUT, OUT], [LSE], ValueError, "lses must hold one tensor for each of the 2 outs"),
        (OUT[0, 0, 0, 0], [LSE], ValueError, "outs must be stacked tensors"),
        (3, [LSE], TypeError, "outs must be a sequence of Tensors"),
        ([OUT], [1.0], TypeError, "lses must be a sequence of Tensors"),
        ([OUT[0, 0]], [LSE], ValueError, "outs must be .batch, seqlen"),
        ([OUT.long()], [LSE], ValueError, "outs must be float32, bfloat16, float16 or float64"),
        ([OUT.to(torch.float8_e4m3fn)], [LSE], ValueError, "outs must be float32, bfloat16"),
        ([OUT], [LSE.half()], ValueError, "lses must be float32 or float64"),
        ([OUT, OUT[:, :4]], [LSE, LSE], ValueError, r"outs\[1\] must have shape"),
        ([OUT, OUT.half()], [LSE, LSE], ValueError, r"outs\[1\] must be torch.float32"),
        ([OUT, OUT], [LSE, LSE.double()], ValueError, r"lses\[1\] must be torch.float32"),
        ([OUT], [LSE.mT], ValueError, r"lses\[0\] must have shape \(2, 3, 5\)"),
        ([OUT, OUT], [LSE, LSE.to("meta")], ValueError, r"lses\[1\] must be on cpu"),
    ],
)
def test_refuses(outs, lses, error, message):
    with pytest.raises(error, match=f"merge_attention: {message}"):
        merge_attention(outs, lses)


def test_refuses_in_place():
    with pytest.raises(ValueError, match="merge_attention: inplace=True is for inference, got te"):
        merge_attention([OUT.clone().requires_grad_(), OUT], [LSE, LSE], inplace=True)
    expanded = OUT[:1].expand(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"merge_attention: outs\[0\] and lses\[0\] must not be"):
        merge_attention([expanded, OUT], [LSE, LSE], inplace=True)
    with pytest.raises(TypeError, match="merge_attention: inplace must be a bool, got int"):
        merge_attention([OUT], [LSE], inplace=1)
    with pytest.raises(ValueError, match=r"merge_attention: outs\[1\] must be torch.bfloat16"):
        merge_attention([OUT.bfloat16(), OUT], [LSE, LSE], inplace=True)
