"""The ops under merge_attention, PyTorch's operations and Triton's kernel, against float64."""

import pytest
import torch

from extrope_kernels.ops.attention import merge as formula
from extrope_kernels.testing import attention_backends, device

BACKENDS = ["torch", *(["triton"] if "triton" in attention_backends() else [])]
F16, B16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CASES = [
    *((1, F32, F32), (2, B16, F32), (3, F16, F32), (5, F32, F32), (5, B16, F32)),
    *((2, F64, F64), (3, F64, F32), (2, B16, F64), (2, F16, F64), (1, B16, F32)),
]
SHAPES = [
    (2, 5, 3, 8),
    (1, 1, 1, 1),
    (7, 3, 20),
    (2, 17, 2, 33),
    (0, 3, 8),
    (2, 3, 0, 8),
    (1, 3, 2, 0),
]
each_backend = pytest.mark.parametrize("implementation", BACKENDS)
each_case = pytest.mark.parametrize(("count", "dtype", "lse_dtype"), CASES)


def ops_of(backend):
    """What merge_fwd and merge_inplace are on a CPU, or on a GPU."""
    if backend == "torch":
        return formula.merge_fwd, formula.merge_inplace
    from extrope_kernels.ops.attention.triton import merge

    return merge.merge_fwd, merge.merge_inplace


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
@pytest.mark.parametrize("implementation", BACKENDS[1:])
def test_in_place(implementation, count, dtype, lse_dtype):
    """Into views, over float32 too; rows without keys in any set keep what they held."""
    for shape in SHAPES:
        outs, lses = some_sets(count, shape, dtype, lse_dtype)
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
            assert (lse_around[..., :1] == 5.0).all() and (
                lse_around[..., 1 + seqlen :] == 5.0
            ).all()


@each_backend
def test_any_strides(implementation):
    outs, lses = some_sets(4, (2, 5, 3, 8))
    wide = outs[1].new_full((2, 5, 3, 24), torch.nan)
    wide[..., 3:11] = outs[1]
    outs[1] = wide[..., 3:11]
    outs[0], outs[3] = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (outs[0], outs[3]))
    outs[2] = outs[2][:1, :1, :1].expand(2, 5, 3, 8)
    lses[0] = lses[0].transpose(1, 2).contiguous().transpose(1, 2)
    lses[1] = lses[1].repeat_interleave(2, -1)[..., ::2]
    lses[2] = torch.zeros(3, 1, device=device()).expand(2, 3, 5)
    outs[2] = torch.randn(8, device=device()).expand(2, 5, 3, 8)
    out, lse = ops_of(implementation)[0](outs, lses)
    for found, exact in zip((out, lse), exactly(outs, lses)):
        assert_rounded_once(found, exact, F32)
    assert implementation == "torch" or out.stride() == torch.empty_like(outs[0]).stride()


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_log_sum_exps_that_are_no_numbers_spoil_their_rows_alone(implementation, value):
    outs, lses = some_sets(3, (2, 5, 3, 8), garbage=1.0)
    lses[0][1, 2, 3] = value
    out, lse = ops_of(implementation)[0](outs, lses)
    spoilt = out.isnan().any(-1)
    assert spoilt[1, 3, 2] and spoilt.sum() == 1 and out[1, 3, 2].isnan().all()
    assert torch.equal(lse[1, 2, 3].nan_to_num(7.0), torch.tensor(value).nan_to_num(7.0).to(lse))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    outs, lses = some_sets(2, (2, 5, 3, 8), garbage=1.0)
    fwd, inplace = (getattr(torch.ops.extrope, f"merge_{n}").default for n in ("fwd", "inplace"))
    torch.library.opcheck(inplace, (outs[0].clone(), lses[0].clone(), outs[1:], lses[1:]))
    for x in (*outs, *lses):
        x.requires_grad_(requires_grad)
    torch.library.opcheck(fwd, (outs, lses))


@pytest.mark.parametrize("which", ["both", "out", "lse"])
def test_derivatives_of_the_op(which):
    """Packed; by finite differences of a function without rows that have no keys."""
    outs = [torch.randn(3, 2, 2, dtype=F64, device=device()) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=F64, device=device()) for _ in range(3)]
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    results = {"both": slice(None), "out": slice(1), "lse": slice(1, 2)}[which]

    def merged(*leaves):
        return torch.ops.extrope.merge_fwd(leaves[:3], leaves[3:])[results]

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradgradcheck(merged, leaves)


@pytest.mark.parametrize("dtype", (F32, B16))
def test_gradients_of_the_op_are_those_of_the_formula(dtype):
    """Of some tensors alone; 0 in rows without keys."""
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
        assert got.isfinite().all()


def test_the_ops_refuse():
    out, lse = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match="merge_attention: inplace=True is for inference"):
        torch.ops.extrope.merge_inplace(out.clone().requires_grad_(), lse, [], [])
    if "triton" in BACKENDS:
        with pytest.raises(
            ValueError, match=r"merge_attention: outs\[1\] must be contiguous in its"
        ):
            ops_of("triton")[0]([out, out.mT.contiguous().mT], [lse, lse])
