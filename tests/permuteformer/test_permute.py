"""Powers of permutations: the authors' vectors, distant positions, gradients, to the bit."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from vectors import load

from extrope_kernels import head_permutations, permute, permute_qk
from extrope_kernels.ops.permuteformer.permutations import cycles
from extrope_kernels.testing import DTYPES, device, make_qk

VECTORS = load("permute")


def rows(heads=2, head_dim=64):
    return head_permutations(heads, head_dim).to(device())


def power_by_squaring(permutations, power):
    """(heads, head_dim): the dims c -> pi^power(c), by repeated squaring."""
    if power < 0:
        permutations, power = permutations.argsort(-1), -power
    dims = torch.arange(permutations.shape[1], device=permutations.device)
    dims = dims.expand_as(permutations)
    while power:
        dims = permutations.gather(-1, dims) if power & 1 else dims
        permutations = permutations.gather(-1, permutations)
        power >>= 1
    return dims


def assert_same(outs, expected):
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == want.dtype and torch.equal(out, want)


def test_the_authors_permutations_and_powers():
    drawn = head_permutations(2, 8)
    assert drawn.tolist() == VECTORS["perm"] and drawn.dtype == torch.int64
    dims = torch.arange(8.0, device=device()).expand(1, 6, 2, 8)
    out = permute(dims, drawn.to(device()))
    expected = torch.tensor(VECTORS["powers_0_to_5"], device=device()).transpose(0, 1)
    assert torch.equal(out[0], expected.float())


def test_cycles_have_the_authors_lengths():
    for row, lengths in enumerate(VECTORS["cycle_lengths"]):
        found = cycles(head_permutations(2, 8))
        starts = found.index[row] == 0
        assert sorted(found.length[row][starts].tolist()) == lengths


@pytest.mark.parametrize(
    "position", (0, 1, 999_983, 10**6, 2**40, 2**62 + 1, 2**63 - 1, -1, -(10**6), -(2**63))
)
def test_a_distant_position_is_exact(position):
    table = rows(3, 72)
    x = torch.randn(1, 1, 3, 72, device=device())
    expected = x.gather(-1, power_by_squaring(table, position)[None, None])
    given = torch.tensor([position], device=device())
    out = permute(x, table, positions=given)
    assert torch.equal(out, expected)
    assert torch.equal(permute(x, table, positions=position), expected)
    back = permute(out, table, positions=given, inverse=True)
    assert torch.equal(back, x)


@pytest.mark.parametrize("head_dim", (1, 7, 72, 128, 1000))
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_reference(dtype, head_dim):
    q, k = make_qk(2, 7, 4, 2, head_dim, dtype=dtype)
    table = rows(2, head_dim)
    for options in (dict(), dict(positions=-3), dict(positions=10**6, inverse=True)):
        outs = permute_qk(q, k, table, **options)
        assert_same(outs, permute_qk(q, k, table, backend="reference", **options))


POSITIONS = {
    "none": None,
    "offset": 12345,
    "one row": torch.tensor([5, 3, 9, -2, 2**40]),
    "int32": torch.tensor([5, 3, 9, -2, 7], dtype=torch.int32),
    "by token": torch.arange(10).view(2, 5) * 1_000_003 - 77,
    "strided": torch.arange(40).view(4, 10)[::2, ::2],
    "offsets": torch.tensor([[2**50], [-4]]),
    "expanded": torch.tensor(3).expand(2, 5),
}


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name, inverse):
    positions = POSITIONS[name]
    if isinstance(positions, torch.Tensor):
        positions = positions.to(device())
    q, k = make_qk(2, 5, 6, 3)
    options = dict(positions=positions, inverse=inverse)
    outs = permute_qk(q, k, rows(3), **options)
    assert_same(outs, permute_qk(q, k, rows(3), backend="reference", **options))


@pytest.mark.parametrize("positions", ("index", "tokens", "offsets"))
def test_packed_sequences_some_empty(positions):
    lengths = (0, 3, 0, 4, 1)
    boundaries = torch.tensor([0, *lengths], device=device()).cumsum(0)
    q, k = (x[0] for x in make_qk(1, 8, 4, 2))
    given = {
        "index": None,
        "tokens": torch.randint(-99, 10**6, (8,), device=device()),
        "offsets": torch.randint(-99, 10**6, (5,), device=device()),
    }[positions]
    options = dict(positions=given)
    outs = permute_qk(q, k, rows(), cu_seqlens=boundaries, **options)
    for i, length in enumerate(lengths):
        here = slice(boundaries[i], boundaries[i] + length)
        own = {"index": None, "tokens": None if given is None else given[here]}.get(positions)
        if positions == "offsets":
            own = given[i : i + 1]
        for out, x in zip(outs, (q, k)):
            alone = permute(x[None, here], rows(), positions=own, backend="reference")
            assert torch.equal(out[here], alone[0])


@pytest.mark.parametrize("shape", ((0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64), (1, 1, 2, 64)))
def test_empty_and_one_token(shape):
    x = torch.randn(shape, device=device())
    out = permute(x, rows(), positions=3)
    assert torch.equal(out, permute(x, rows(), positions=3, backend="reference"))


def test_one_tensor_with_groups_of_heads():
    x, _ = make_qk(2, 5, 6)
    out = permute(x, rows(2), positions=9)
    each = permute(x, rows(2).repeat_interleave(3, 0), positions=9)
    assert torch.equal(out, each)


def test_a_model_sees_relative_positions_only():
    """<q_i, k_j> depends on i - j: shifting all positions changes no bit of a sum in one order."""
    q, k = make_qk(1, 9, 2, 2, dtype=torch.float64)
    scores = []
    for shift in (0, 7, 10**6):
        out_q, out_k = permute_qk(q, k, rows(), positions=shift)
        scores.append(torch.einsum("bihd,bjhd->bhij", out_q, out_k))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ("heads_first", "gaps", "unaligned", "expanded"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strided_views(layout, dtype):
    q, k = make_qk(2, 19, 4, 2, dtype=dtype)
    views = []
    for x in (q, k):
        gap = x.new_full((2, 22, x.shape[2] + 2, 80), torch.nan)
        gap[:, 1:20, 1:-1, 8:72] = x
        views.append(
            {
                "heads_first": x.transpose(1, 2).contiguous().transpose(1, 2),
                "gaps": gap[:, 1:20, 1:-1, 8:72],
                "unaligned": torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
                "expanded": x[:1, :1].expand_as(x),
            }[layout]
        )
    outs = permute_qk(*views, rows(), positions=50)
    assert_same(outs, permute_qk(*views, rows(), positions=50, backend="reference"))
    if layout == "heads_first":
        assert [x.stride() for x in outs] == [x.stride() for x in views]


def test_same_bits_with_any_number_of_threads():
    q, k = make_qk(2, 700, 6, 2)
    expected = permute_qk(q, k, rows(), positions=999, backend="reference")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs = permute_qk(q, k, rows(), positions=999)
            assert_same(outs, expected)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_signed_zero_pass_through():
    x = torch.tensor([torch.nan, -0.0, torch.inf, 1.0], device=device()).view(1, 1, 1, 4)
    table = torch.tensor([[1, 2, 3, 0]], device=device())
    out = permute(x, table, positions=1).flatten()
    assert out[0] == 0 and out[0].signbit() and out[1] == torch.inf and out[3].isnan()


@pytest.mark.skipif(device() == "cuda", reason="chooses among the CPU's kernels")
@pytest.mark.parametrize("capability", ("baseline", "avx2"))
def test_narrower_instruction_sets(run_python, capability):
    run_python(
        """
        import torch, extrope_kernels as ek
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for dim in (7, 72, 128):
                q = torch.randn(2, 9, 4, dim).to(dtype)
                table = ek.head_permutations(2, dim)
                out = ek.permute(q, table, positions=10**6)
                assert torch.equal(out, ek.permute(q, table, positions=10**6, backend="reference"))
        """,
        EXTROPE_CPU_CAPABILITY=capability,
    )


# -------------------------------------------------------------------------------------------------
# Derivatives, transforms, compilation

SMALL = head_permutations(2, 8).to(device())
CASES = {
    "plain": dict(),
    "inverse": dict(inverse=True, positions=5),
    "positions": dict(positions=torch.tensor([[5, -3, 9], [100, 7, 2**40]])),
    "offsets": dict(positions=torch.tensor([4, 40])),
    "packed": dict(cu_seqlens=torch.tensor([0, 1, 1, 3], dtype=torch.int32)),
}


def build_case(name):
    options = {
        key: value.to(device()) if isinstance(value, torch.Tensor) else value
        for key, value in CASES[name].items()
    }
    q, k = make_qk(2, 3, 4, 2, head_dim=8, dtype=torch.float64)
    if "cu_seqlens" in options:
        q, k = q[0].contiguous(), k[0].contiguous()

    def run(q, k, backend=None):
        return permute_qk(q, k, SMALL, backend=backend, **options)

    return run, [x.requires_grad_() for x in (q, k)]


@pytest.mark.parametrize("case", CASES)
def test_finite_differences_twice(case):
    run, leaves = build_case(case)
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


def test_gradients_of_a_sum_and_of_one_output():
    """The gradient of a sum is an expanded scalar; an output without a use has none."""
    run, (q, k) = build_case("plain")
    run(q, k)[0].sum().backward()
    assert torch.equal(q.grad, torch.ones_like(q)) and k.grad.count_nonzero() == 0


def test_func_grad_of_grad():
    run, (q, k) = build_case("positions")

    def slope(q, backend):
        return torch.func.grad(lambda x: run(x, k, backend)[0].pow(3).sum())(q)

    second = torch.func.grad(lambda x: slope(x, None).sum())(q)
    assert torch.equal(second, torch.func.grad(lambda x: slope(x, "reference").sum())(q))


@pytest.mark.parametrize("in_dims", ((0, 0), (1, None), (None, 2)))
@pytest.mark.parametrize("case", ("plain", "offsets", "packed"))
def test_vmap(case, in_dims):
    run, leaves = build_case(case)
    stacked = [
        x if dim is None else torch.stack([x * (i + 1) for i in range(3)], dim).detach()
        for x, dim in zip(leaves, in_dims, strict=True)
    ]
    got = torch.vmap(run, in_dims)(*stacked)
    expected = torch.vmap(lambda *x: run(*x, "reference"), in_dims)(*stacked)
    assert_same(got, expected)


@pytest.mark.parametrize("case", ("plain", "inverse", "positions", "packed"))
def test_opcheck(case):
    _, leaves = build_case(case)
    options = dict(CASES[case])
    given = options.pop("positions", None)
    at = [SMALL, None if isinstance(given, int) else given, options.pop("cu_seqlens", None)]
    at = [x if x is None else x.to(device()) for x in at]
    options["offset"] = given if isinstance(given, int) else 2**40
    torch.library.opcheck(torch.ops.extrope.permute_fwd.default, (*leaves, *at), options)
    torch.library.opcheck(torch.ops.extrope.permute_fwd.default, (leaves[0], None, *at), options)


@pytest.mark.parametrize("positions", (None, 7, "tensor"))
def test_compile_fullgraph(positions):
    if positions == "tensor":
        positions = torch.arange(5, device=device()) + 3
    q, k = (x.requires_grad_() for x in make_qk(2, 5, 4, 2, head_dim=8))

    def loss(q, k, table):
        out_q, out_k = permute_qk(q * 1.0, k * 1.0, table, positions=positions)
        return out_q.pow(2).sum() + (out_k * out_k.detach().flip(1)).sum()

    expected = torch.autograd.grad(loss(q, k, SMALL), (q, k))
    compiled = torch.compile(loss, fullgraph=True)(q, k, SMALL)
    for got, want in zip(torch.autograd.grad(compiled, (q, k)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compile_with_dynamic_lengths_does_not_recompile():
    frames = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def run(x, offset):
        return permute(x, SMALL, positions=offset) * 2

    for seqlen, offset in ((5, 3), (9, 17), (14, 1000)):
        x, _ = make_qk(2, seqlen, 2, 1, head_dim=8)
        expected = permute(x, SMALL, positions=offset, backend="reference") * 2
        assert torch.equal(run(x, offset), expected)
    assert frames.frame_count == 1


def test_nothing_on_the_device_reaches_the_host():
    """Under a fake mode a read of a value raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 7, 4, 8)
        table, offsets = torch.empty(2, 8, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        for backend in (None, "reference"):
            assert permute(x, table, positions=offsets, backend=backend).shape == x.shape
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        assert permute(x[0], table, cu_seqlens=cu_seqlens).shape == x[0].shape


@pytest.mark.parametrize("case", CASES)
def test_the_gather_of_a_gpu(case, monkeypatch):
    """Of blocks of tokens."""
    from extrope_kernels.ops.permuteformer import op

    monkeypatch.setattr(op, "_TOKENS", 2)
    run, leaves = build_case(case)
    options = dict(CASES[case])
    positions = options.pop("positions", None)
    if isinstance(positions, int):
        options["offset"], positions = positions, None
    at = [SMALL, positions, options.pop("cu_seqlens", None)]
    at = [x if x is None else x.to(device()) for x in at]
    assert_same(op._permute_by_gather(*leaves, *at, **options), run(*leaves, "reference"))


@pytest.mark.usefixtures("no_library")
def test_dispatch_needs_no_library(run_python):
    """Without a compiled library the op is a gather."""
    run_python(
        """
        import torch, extrope_kernels as ek
        x, table = torch.randn(2, 5, 3, 64), ek.head_permutations(3, 64)
        out = torch.ops.extrope.permute_fwd(x, None, table)[0]
        assert torch.equal(out, ek.permute(x, table, backend="reference"))
        ek.permuteformer_attention(x, x, x, permutations=table)
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
