"""merge_attention and the ops under it, PyTorch's and Triton's, against one softmax in float64."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from extrope_kernels import merge_attention
from extrope_kernels.ops.attention import merge as formula
from extrope_kernels.testing import attention_backends, device

BACKENDS = ["torch", *(["triton"] if "triton" in attention_backends() else [])]
F16, B16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CASES = [
    *((1, F32, F32), (3, F16, F32), (5, F32, F32), (5, B16, F32)),
    *((2, F64, F64), (3, F64, F32), (2, B16, F64), (1, B16, F32)),
]
SHAPES = [
    (2, 5, 3, 8),
    (1, 1, 1, 1),
    (7, 3, 20),
    (2, 9, 2, 33),
    (0, 3, 8),
    (2, 3, 0, 8),
    (1, 3, 2, 0),
]
each_backend = pytest.mark.parametrize("implementation", BACKENDS)
each_case = pytest.mark.parametrize(("count", "dtype", "lse_dtype"), CASES)
# On a CPU the function takes no op: both have derivatives of their own.
each_function = pytest.mark.parametrize("merge", [merge_attention, torch.ops.extrope.merge_fwd])


def ops_of(backend):
    """What merge_fwd and merge_inplace are on a CPU, or on a GPU."""
    if backend == "torch":
        return formula.merge_fwd, formula.merge_inplace
    from extrope_kernels.ops.attention.triton import merge

    return merge.merge_fwd, merge.merge_inplace


# -------------------------------------------------------------------------------------------------
# Sets of keys, and their union


def attention(q, k, v):
    """(..., seqlen, heads, head_dim) -> out and lse (..., heads, seqlen); no keys: 0 and -inf."""
    q, k, v = (x.double() for x in (q, k, v))
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


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_do_not_overflow(size):
    outs, lses, (out, lse) = parts_and_whole((3, 4))
    lses = [(x + size).float() for x in lses]
    merged, merged_lse = merge_attention([out.float() for out in outs], lses)
    # The lse itself has lost digits at this size; the weights see that loss and no more.
    spacing = torch.finfo(torch.float32).eps * abs(size)
    torch.testing.assert_close(merged.double(), out, rtol=0, atol=4 * spacing * out.abs().max())
    torch.testing.assert_close(merged_lse.double(), lse + size, rtol=0, atol=2 * spacing)


# -------------------------------------------------------------------------------------------------
# Every dtype, shape and stride, against the definition


def some_sets(count, shape, dtype=F32, lse_dtype=F32, garbage=torch.nan):
    """A third of the rows have no keys in a set, and hold garbage there."""
    outs = [torch.randn(shape).to(device(), dtype) for _ in range(count)]
    *batch, seqlen, heads, _ = shape
    lses = [(3 * torch.randn(*batch, heads, seqlen)).to(device(), lse_dtype) for _ in range(count)]
    for out, lse in zip(outs, lses):
        absent = torch.rand(lse.shape, device=lse.device) < 1 / 3
        lse[absent] = -torch.inf
        out.transpose(-2, -3)[absent] = garbage
    return outs, lses


def exactly(outs, lses):
    """Of the definition: each softmax times its share of the joint one."""
    outs, lses = torch.stack(outs).double(), torch.stack(lses).double()
    largest = lses.amax(0).nan_to_num(neginf=0.0)
    sums = torch.exp(lses - largest)
    lse = largest + torch.log(sums.sum(0))
    shares = (sums / sums.sum(0)).nan_to_num(0.0).transpose(-1, -2)[..., None]
    return (shares * outs.where(shares > 0, 0.0)).sum(0), lse


def assert_rounded_once(found, exact, wide, backend="torch"):
    """Float32 arithmetic, or that of `wide`, and one rounding to found's dtype.

    Of each element: as many roundings as float32 takes for shares, products and sums of values up
    to the largest here. The interpreter of Triton cuts bfloat16 where it should round.
    """
    assert found.shape == exact.shape
    if found.numel() == 0:
        return
    assert torch.equal(found.isfinite(), exact.isfinite())
    found, exact, own = found[exact.isfinite()].double(), exact[exact.isfinite()], found.dtype
    cut = 2 if own == B16 and backend == "triton" else 1
    info = torch.finfo(own)
    rounding = (exact.abs() * info.eps / 2).clamp(min=info.tiny * info.eps / 2) * cut
    arithmetic = 16 * torch.finfo(wide).eps * exact.abs().amax().clamp(min=1.0) if len(exact) else 0
    assert ((found - exact).abs() <= 1.01 * rounding + arithmetic).all()


def wide_of(*dtypes):
    return F64 if F64 in dtypes else F32


@each_case
@each_backend
def test_out_of_place(implementation, count, dtype, lse_dtype):
    for shape in SHAPES:
        outs, lses = some_sets(count, shape, dtype, lse_dtype)
        before = [x.clone() for x in (*outs, *lses)]
        out, lse = ops_of(implementation)[0](outs, lses)
        exact, exact_lse = exactly(outs, lses)
        assert (out.dtype, lse.dtype) == (dtype, lse_dtype) and lse.is_contiguous()
        assert_rounded_once(out, exact, wide_of(dtype, lse_dtype), implementation)
        assert_rounded_once(lse, exact_lse, wide_of(dtype, lse_dtype))
        for x, y in zip((*outs, *lses), before):
            assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))


@each_case
@each_backend
def test_in_place(implementation, count, dtype, lse_dtype):
    """Into views, over float32 too; rows without keys in any set keep what they held."""
    garbage = torch.nan if implementation == "triton" else 3.0
    for shape in SHAPES:
        outs, lses = some_sets(count, shape, dtype, lse_dtype, garbage)
        *batch, seqlen, heads, dim = shape
        for own in {dtype, wide_of(dtype)}:
            around = torch.full((*batch, seqlen + 4, heads, dim), 5.0, dtype=own, device=device())
            lse_around = torch.full(
                (*batch, heads, seqlen + 3), 5.0, dtype=lse_dtype, device=device()
            )
            out, lse = around[..., 2 : 2 + seqlen, :, :], lse_around[..., 1 : 1 + seqlen]
            out.copy_(outs[0]), lse.copy_(lses[0])
            exact, exact_lse = exactly([out.clone(), *outs[1:]], lses)
            kept = (exact_lse == -torch.inf).transpose(-1, -2)[..., None]
            exact = torch.where(kept, out.double(), exact)
            ops_of(implementation)[1](out, lse, outs[1:], lses[1:])
            wide = wide_of(own, lse_dtype)
            assert_rounded_once(out.nan_to_num(5.0), exact.nan_to_num(5.0), wide, implementation)
            assert_rounded_once(lse, exact_lse, wide)
            for rest in (around[..., :2, :, :], around[..., 2 + seqlen :, :, :]):
                assert (rest == 5.0).all()
            for rest in (lse_around[..., :1], lse_around[..., 1 + seqlen :]):
                assert (rest == 5.0).all()


@each_backend
def test_any_strides(implementation):
    outs, lses = some_sets(4, (2, 5, 3, 8))
    wide = outs[1].new_full((2, 5, 3, 24), torch.nan)
    wide[..., 3:11] = outs[1]
    outs[1] = wide[..., 3:11]
    outs[0], outs[3] = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (outs[0], outs[3]))
    outs[2] = torch.randn(8, device=device()).expand(2, 5, 3, 8)
    lses[0] = lses[0].transpose(1, 2).contiguous().transpose(1, 2)
    lses[1] = lses[1].repeat_interleave(2, -1)[..., ::2]
    lses[2] = torch.zeros(3, 1, device=device()).expand(2, 3, 5)
    out, lse = ops_of(implementation)[0](outs, lses)
    for found, exact in zip((out, lse), exactly(outs, lses)):
        assert_rounded_once(found, exact, F32)
    assert implementation == "torch" or out.stride() == torch.empty_like(outs[0]).stride()


def test_dims_of_any_stride():
    outs, lses, whole = parts_and_whole((3, 4))
    column_major = [out.mT.contiguous().mT for out in outs]
    torch.testing.assert_close(merge_attention(column_major, lses), whole)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_log_sum_exps_that_are_no_numbers_spoil_their_rows_alone(implementation, value):
    outs, lses = some_sets(3, (2, 5, 3, 8), garbage=1.0)
    lses[0][1, 2, 3] = value
    out, lse = ops_of(implementation)[0](outs, lses)
    spoilt = out.isnan().any(-1)
    assert spoilt[1, 3, 2] and spoilt.sum() == 1 and out[1, 3, 2].isnan().all()
    assert torch.equal(lse[1, 2, 3].nan_to_num(7.0), torch.tensor(value).nan_to_num(7.0).to(lse))


# -------------------------------------------------------------------------------------------------
# Derivatives, transforms, graphs


@each_function
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 3.0])
def test_rows_without_keys_do_not_count(merge, garbage):
    """The first row has no keys in set 1, the second none in set 0, the third none at all."""
    outs, lses, _ = parts_and_whole((3, 4), (5, 2, 8))
    absent = ((1, 0), (0, 1), (0, 2), (1, 2))
    for which, row in absent:
        outs[which][row], lses[which][:, row] = garbage, -torch.inf
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = merge(outs, lses)
    assert torch.equal(out[0], outs[0][0]) and torch.equal(out[1], outs[1][1])
    assert torch.equal(lse[:, 0], lses[0][:, 0]) and torch.equal(lse[:, 1], lses[1][:, 1])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad(out.sum() + finite.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    for which, row in absent:
        assert (grads[which][row] == 0).all() and (grads[2 + which][:, row] == 0).all()


@each_function
@pytest.mark.parametrize("results", [slice(None), slice(1), slice(1, 2)], ids=str)
@pytest.mark.parametrize("without_keys", [False, True])
def test_derivatives(merge, without_keys, results):
    outs, lses, _ = parts_and_whole((3, 4), (2, 2, 3))
    if without_keys:
        lses[1][:, 0] = -torch.inf
    leaves = [x.requires_grad_() for x in outs]
    # -inf cannot be perturbed: finite differences go through a shift of what is finite.
    leaves += [torch.zeros_like(x).requires_grad_() for x in lses]

    def merged(*leaves):
        shifts = leaves[len(outs) :]
        shifted = [torch.where(x == -torch.inf, x, x + s) for x, s in zip(lses, shifts)]
        return merge(leaves[: len(outs)], shifted)[results]

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradgradcheck(merged, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", (F32, B16))
def test_gradients_of_the_op_are_those_of_the_formula(dtype):
    """Of some tensors alone."""
    outs, lses = some_sets(3, (2, 5, 3, 8), dtype)
    empty = (torch.stack(lses) == -torch.inf).all(0)
    leaves = [outs[0].requires_grad_(), lses[2].requires_grad_()]
    douts = torch.randn_like(outs[0]), torch.randn_like(lses[0])
    found = []
    for merge in (formula.merge_fwd, torch.ops.extrope.merge_fwd):
        out, lse = merge(outs, lses)
        found.append(torch.autograd.grad((out, lse.masked_fill(empty, 0.0)), leaves, douts))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want)


def test_opcheck():
    """Of ops that no call on a CPU runs."""
    outs, lses = some_sets(2, (2, 5, 3, 8), garbage=1.0)
    fwd, inplace = (getattr(torch.ops.extrope, f"merge_{n}").default for n in ("fwd", "inplace"))
    torch.library.opcheck(inplace, (outs[0].clone(), lses[0].clone(), outs[1:], lses[1:]))
    for x in (*outs, *lses):
        x.requires_grad_()
    torch.library.opcheck(fwd, (outs, lses))


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


# -------------------------------------------------------------------------------------------------
# Refusals beside those of tests/all_ops/test_wrong_arguments.py


def test_refuses_in_place():
    out, lses = torch.zeros(2, 5, 3, 8), torch.zeros(2, 2, 3, 5)
    with pytest.raises(ValueError, match="merge_attention: inplace=True is for inference, got te"):
        merge_attention([out.clone().requires_grad_(), out], lses, inplace=True)
    with pytest.raises(RuntimeError, match="merge_attention: inplace=True is for inference"):
        torch.ops.extrope.merge_inplace(out.clone().requires_grad_(), lses[0], [], [])
    expanded = out[:1].expand(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"merge_attention: outs\[0\] and lses\[0\] must not be"):
        merge_attention([expanded, out], lses, inplace=True)
    with pytest.raises(ValueError, match=r"merge_attention: outs\[1\] must be bfloat16"):
        merge_attention([out.bfloat16(), out], lses, inplace=True)


@pytest.mark.parametrize("shared", ["outs[1]", "lses[1]"])
@pytest.mark.parametrize("token", [0, 1])
def test_in_place_reads_nothing_that_it_writes(shared, token):
    """Neither results that lie over outs[0] and lses[0] nor such that begin a token later."""
    rows, lses = torch.zeros(1, 3, 2, 8, device=device()), torch.zeros(1, 2, 3, device=device())
    outs, lses = [rows[:, :2], rows[:, 2:].repeat(1, 2, 1, 1)], [lses[..., :2], lses[..., :2] + 1]
    if shared == "outs[1]":
        outs[1] = rows[:, token : token + 2]
    else:
        lses[1] = lses[0]._base[..., token : token + 2]
    for merge in (
        lambda: merge_attention(outs, lses, inplace=True),
        lambda: torch.ops.extrope.merge_inplace(outs[0], lses[0], outs[1:], lses[1:]),
    ):
        with pytest.raises(ValueError, match=f"merge_attention: {re.escape(shared[:4])}.* share"):
            merge()
    assert not rows.any()


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_takes_rows():
    out, lse = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"merge_attention: outs\[1\] must be contiguous in its"):
        ops_of("triton")[0]([out, out.mT.contiguous().mT], [lse, lse])


def test_in_place_on_a_gpu_is_the_kernel_if_rows_are_contiguous(monkeypatch):
    """Other strides, and compiled code, go by PyTorch. Told without a GPU."""
    went = []
    ways = SimpleNamespace(merge_inplace=lambda *given: went.append("kernel"))
    monkeypatch.setattr(formula, "_by_triton", lambda *given: True)
    monkeypatch.setattr(formula, "ops", ways)
    monkeypatch.setattr(formula, "merge_inplace", lambda *given: went.append("PyTorch"))
    rows, lse = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)
    for out in (rows, rows.transpose(-1, -2).contiguous().transpose(-1, -2), rows[..., :1]):
        merge_attention([out, out.clone()], [lse, lse.clone()], inplace=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    merge_attention([rows, rows.clone()], [lse, lse.clone()], inplace=True)
    assert went == ["kernel", "PyTorch", "kernel", "PyTorch"]
