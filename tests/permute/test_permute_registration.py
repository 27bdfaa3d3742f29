"""The op as PyTorch sees it: opcheck, torch.compile, fakes, CUDA graphs, raw calls."""

import pytest
import torch

from extrope_kernels import head_permutations, permute, permute_qk
from extrope_kernels.testing import device, make_qk

TABLE = head_permutations(2, 8).to(device())


def op(backend):
    suffix = "_triton" if backend == "triton" else ""
    return getattr(torch.ops.extrope, f"permute_fwd{suffix}").default


def sample(case, requires_grad=False):
    """(q, k, permutations, positions, cu_seqlens) and options of a call."""
    q, k = make_qk(2, 5, 4, 2, head_dim=8)
    more, options = [TABLE], {}
    if case == "no_k":
        k = None
    elif case == "positions":
        more, options = [TABLE, torch.randint(-99, 99, (2, 5), device=device())], {"offset": 2**40}
    elif case == "packed":
        q, k = q[0].contiguous(), k[0].contiguous()
        more = [TABLE, None, torch.tensor([0, 2, 5], dtype=torch.int32, device=device())]
        options = {"inverse": True}
    for x in (q, k):
        if x is not None:
            x.requires_grad_(requires_grad)
    return (q, k, *more), options


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("case", ("plain", "no_k", "positions", "packed"))
def test_opcheck(permute_backend, case, requires_grad):
    args, options = sample(case, requires_grad)
    torch.library.opcheck(op(permute_backend), args, options)


def test_raw_op_is_differentiable_and_k_may_be_none(permute_backend):
    (q, *more), _ = sample("no_k", requires_grad=True)
    out, none = op(permute_backend)(q, *more)
    out.pow(2).sum().backward()
    assert none.numel() == 0 and torch.equal(q.grad, 2 * q)


@pytest.mark.parametrize("positions", (None, 7, "tensor"))
def test_compile_fullgraph(permute_backend, positions):
    if positions == "tensor":
        positions = torch.arange(5, device=device()) + 3
    q, k = (x.requires_grad_() for x in make_qk(2, 5, 4, 2, head_dim=8))

    def loss(q, k, table):
        out_q, out_k = permute_qk(
            q * 1.0, k * 1.0, table, positions=positions, backend=permute_backend
        )
        return out_q.pow(2).sum() + (out_k * out_k.detach().flip(1)).sum()

    expected = torch.autograd.grad(loss(q, k, TABLE), (q, k))
    compiled = torch.compile(loss, fullgraph=True)(q, k, TABLE)
    for got, want in zip(torch.autograd.grad(compiled, (q, k)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compile_with_dynamic_lengths_does_not_recompile(permute_backend):
    frames = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def run(x, offset):
        return permute(x, TABLE, positions=offset, backend=permute_backend) * 2

    for seqlen, offset in ((5, 3), (9, 17), (14, 1000)):
        x, _ = make_qk(2, seqlen, 2, 1, head_dim=8)
        expected = permute(x, TABLE, positions=offset, backend="reference") * 2
        assert torch.equal(run(x, offset), expected)
    assert frames.frame_count == 1


def test_nothing_on_the_device_reaches_the_host():
    """Under a fake mode a read of a value raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 7, 4, 8)
        table, offsets = torch.empty(2, 8, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        for backend in (None, "reference"):
            out = permute(x, table, positions=offsets, backend=backend)
            assert out.shape == x.shape
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        assert permute(x[0], table, cu_seqlens=cu_seqlens).shape == x[0].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(permute_backend):
    args, options = sample("positions")
    op(permute_backend)(*args, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = op(permute_backend)(*args, **options)
    args[0].copy_(torch.randn_like(args[0]))
    graph.replay()
    for got, want in zip(outs, op(permute_backend)(*args, **options), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("no_library")
def test_dispatch_needs_no_library(run_python):
    """Without a compiled library the op runs on the reference."""
    run_python(
        """
        import torch, extrope_kernels as ek
        x, table = torch.randn(2, 5, 3, 64), ek.head_permutations(3, 64)
        out = torch.ops.extrope.permute_fwd(x, None, table)[0]
        assert torch.equal(out, ek.permute(x, table, backend="reference"))
        try:
            ek.permute(x, table, backend="cpu")
        except NotImplementedError as error:
            assert "permute: backend 'cpu' cannot run here" in str(error)
        else:
            raise AssertionError("a named backend fell back")
        """,
        EXTROPE_JIT="0",
        EXTROPE_CACHE_DIR="/nonexistent",
    )
