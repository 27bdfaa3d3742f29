"""The ops as PyTorch sees them: opcheck, torch.compile, schemas, CUDA graphs, raw calls."""

from __future__ import annotations

import pytest
import torch
from append_cases import CONTIGUOUS, Step, ints
from test_rope_norm import by_autograd, call, norm_weights

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    scores,
)
from extrope_kernels.testing import device, make_qk

SUFFIXES = {"cpu": "", "cuda": "", "triton": "_triton"}


def op(name, backend):
    return getattr(torch.ops.extrope, name + SUFFIXES[backend])


def sample(case, requires_grad=False, dtype=torch.float32):
    """(q, k, inv_freq, positions, cu_seqlens, log_decay) and options of a call."""
    q, k = make_qk(2, 5, 2, 2, head_dim=8, dtype=dtype)
    inv_freq = methods.rope(6).inv_freq.to(device())
    rope_args, options = [inv_freq], {}
    if case == "no_k":
        k = None
    elif case == "positions":
        rope_args = [inv_freq, torch.randint(0, 99, (2, 5), device=device())]
        options = dict(interleaved=True, attention_factor=1.2)
    elif case == "packed":
        q, k = q[0].contiguous(), k[0].contiguous()
        rope_args = [inv_freq, None, torch.tensor([0, 2, 5], dtype=torch.int32, device=device())]
        options = dict(offset=3, inverse=True)
    elif case == "axes":
        axes = torch.tensor([1, 0, 1], dtype=torch.int32, device=device())
        rope_args = [inv_freq, torch.randint(0, 99, (2, 2, 5), device=device()), None, None, axes]
    elif case == "per_head_decay":
        rope_args = [
            torch.rand(2, 2, 3, device=device()),
            None,
            None,
            methods.xpos(6).log_decay.to(device()),
        ]
    if requires_grad:
        for x in (q, k, rope_args[0]):
            if x is not None:
                x.requires_grad_()
    return q, k, rope_args, options


CASES = ("plain", "no_k", "positions", "packed", "per_head_decay", "axes")


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("case", CASES)
def test_opcheck_fwd(backend, case, requires_grad):
    q, k, rope_args, options = sample(case, requires_grad)
    torch.library.opcheck(op("rope_fwd", backend).default, (q, k, *rope_args), options)


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("with_inputs", (False, True))
@pytest.mark.parametrize("case", CASES)
def test_opcheck_bwd(backend, case, with_inputs, requires_grad):
    q, k, rope_args, options = sample(case, requires_grad)
    saved = (q, k) if with_inputs else (None, None)
    grads = [
        None if x is None else torch.randn_like(x).requires_grad_(requires_grad) for x in (q, k)
    ]
    torch.library.opcheck(op("rope_bwd", backend).default, (*grads, *saved, *rope_args), options)


@pytest.mark.parametrize("case", CASES)
def test_opcheck_inplace(backend, case):
    q, k, rope_args, options = sample(case)
    torch.library.opcheck(op("rope_inplace", backend).default, (q, k, *rope_args), options)


def test_inplace_schema_says_that_it_mutates(backend):
    arguments = op("rope_inplace", backend).default._schema.arguments
    written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["q", "k"]


@pytest.mark.parametrize("case", CASES)
def test_raw_op_is_differentiable(backend, case):
    q, k, rope_args, options = sample(case, requires_grad=True)
    outs = op("rope_fwd", backend)(q, k, *rope_args, **options)
    sum(out.pow(2).sum() for out in outs).backward()
    amplitude = options.get("attention_factor", 1.0)
    if case != "per_head_decay":  # norms are kept, so half the gradient of the square is x
        torch.testing.assert_close(q.grad[..., :6], 2 * amplitude**2 * q.detach()[..., :6])
    assert (k is None or k.grad is not None) and rope_args[0].grad is not None


def test_raw_op_without_k_returns_an_empty_tensor(backend):
    q, _, rope_args, _ = sample("no_k")
    assert op("rope_fwd", backend)(q, None, *rope_args)[1].numel() == 0


# -------------------------------------------------------------------------------------------------
# torch.compile
def forward_and_backward(q, k, inv_freq, positions, backend):
    out_q, out_k = apply_rope_qk(
        q * 1.0, k * 1.0, RopeFreqs(inv_freq, 1.1), positions=positions, backend=backend
    )
    return (out_q.pow(2).sum() + (out_k * out_k.detach().flip(1)).sum()) / 2


@pytest.mark.parametrize("positions", (None, 7, "tensor"))
def test_compile_fullgraph(backend, positions):
    if positions == "tensor":
        positions = torch.arange(5, device=device()) + 3
    q, k, (inv_freq,), _ = sample("plain", requires_grad=True)
    compiled = torch.compile(forward_and_backward, fullgraph=True)
    eager = torch.autograd.grad(
        forward_and_backward(q, k, inv_freq, positions, backend), (q, k, inv_freq)
    )
    loss = compiled(q, k, inv_freq, positions, backend)
    graph = torch.autograd.grad(loss, (q, k, inv_freq))
    for got, want in zip(graph, eager):
        torch.testing.assert_close(got, want)


def test_compile_with_dynamic_lengths_does_not_recompile(backend):
    frames = torch._dynamo.testing.CompileCounter()
    freqs = methods.rope(8).to(device())

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def rotate(q, offset):
        return apply_rope(q, freqs, positions=offset, backend=backend) * 2

    for seqlen, offset in ((5, 3), (9, 17), (14, 1000)):
        q, _ = make_qk(2, seqlen, 2, 1, head_dim=8)
        expected = apply_rope(q, freqs, positions=offset, backend=backend) * 2
        torch.testing.assert_close(rotate(q, offset), expected)
    assert frames.frame_count == 1


def test_compile_inplace(backend):
    freqs = methods.rope(8).to(device())

    @torch.compile(fullgraph=True)
    def rotate(q):
        x = q * 2
        apply_rope(x, freqs, positions=5, inplace=True, backend=backend)
        return x + 1

    q, _ = make_qk(2, 5, 2, 1, head_dim=8)
    torch.testing.assert_close(rotate(q), apply_rope(q * 2, freqs, positions=5) + 1)


def test_compile_keeps_the_memory_layout_of_views(backend):
    freqs = methods.rope(8).to(device())
    q, _ = make_qk(2, 5, 3, 1, head_dim=8)
    heads_first = q.transpose(1, 2).contiguous()

    @torch.compile(fullgraph=True)
    def rotate(x):
        return apply_rope(x.transpose(1, 2), freqs, backend=backend).transpose(1, 2)

    torch.testing.assert_close(rotate(heads_first).transpose(1, 2), apply_rope(q, freqs))


# -------------------------------------------------------------------------------------------------
# No host sync
def test_lengths_on_the_device_never_reach_the_host(backend):
    """Under a fake mode a read of a value raises: methods and the op only pass tensors along."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(3, 7, 4, 64)
        lengths = torch.empty(3, dtype=torch.int64)
        for method, options in (
            (methods.dynamic_ntk, dict(factor=2.0, max_position_embeddings=16)),
            (
                methods.longrope,
                dict(
                    short_factor=[1.0] * 32,
                    long_factor=[2.0] * 32,
                    original_max_position_embeddings=16,
                    factor=4.0,
                ),
            ),
        ):
            freqs = method(64, seq_len=lengths, **options)
            out = torch.ops.extrope.rope_fwd(
                q, None, freqs.inv_freq, lengths, attention_factor=freqs.attention_factor
            )
            assert out[0].shape == q.shape
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        assert torch.ops.extrope.rope_fwd(q[0], None, freqs.inv_freq[0], None, cu_seqlens)[0].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(backend):
    q, k, rope_args, options = sample("positions")
    graph = torch.cuda.CUDAGraph()
    op("rope_fwd", backend)(q, k, *rope_args, **options)
    with torch.cuda.graph(graph):
        outs = op("rope_fwd", backend)(q, k, *rope_args, **options)
    q.copy_(torch.randn_like(q))
    graph.replay()
    for got, want in zip(outs, op("rope_fwd", backend)(q, k, *rope_args, **options)):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("no_library")
def test_dispatch_needs_no_library(run_python):
    """Without a compiled library the op runs on the reference."""
    run_python(
        """
        import torch, extrope_kernels as ek
        q = torch.randn(2, 5, 3, 64)
        freqs = ek.methods.rope(64)
        out = torch.ops.extrope.rope_fwd(q, q, freqs.inv_freq)[0]
        assert torch.equal(out, ek.apply_rope(q, freqs, backend="reference"))
        x = q.clone()
        torch.ops.extrope.rope_inplace(x, None, freqs.inv_freq)
        assert torch.equal(x, out)
        try:
            ek.apply_rope(q, freqs, backend="cpu")
        except NotImplementedError as error:
            assert "rope: backend 'cpu' cannot run here" in str(error)
        else:
            raise AssertionError("a named backend fell back")
        """,
        EXTROPE_JIT="0",
        EXTROPE_CACHE_DIR="/nonexistent",
    )


@pytest.mark.usefixtures("no_library")
def test_without_a_library_results_have_the_strides_that_graphs_count_on(run_python):
    run_python(
        """
        import torch, extrope_kernels as ek
        from extrope_kernels import scores
        from extrope_kernels.ops.attention import AttentionCall
        ops, inv_freq = torch.ops.extrope, ek.methods.rope(8).inv_freq
        q = torch.randn(2, 4, 5, 8).transpose(1, 2)
        k = torch.randn(2, 2, 5, 8).transpose(1, 2)
        numbers = AttentionCall(inv_freq, score=scores.rerope(3)).numbers
        none = (None,) * 6
        used = torch.full((2,), 5, dtype=torch.int32)
        empty, caches = used * 0, (torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8))
        calls = [
            (ops.rope_fwd, (q, k, inv_freq), {}),
            (ops.rope_bwd, (q, k, q, k, inv_freq), {}),
            (ops.rope_norm_fwd, (q, k, torch.ones(8), None, inv_freq), {}),
            (ops.rope_norm_bwd, (q, k, q, k, torch.ones(8), None, inv_freq), {}),
            (ops.rope_cos_sin, (q, k, torch.ones(1, 5, 4), torch.ones(1, 5, 4)), {}),
            (ops.permute_fwd, (q, k, ek.head_permutations(2, 8)), {}),
            (ops.attention_fwd, (q, k, k, inv_freq, *none), {"numbers": numbers}),
            (
                ops.decode,
                (q, *caches, None, None, inv_freq, *none[:4], used, *none[:4]),
                {"numbers": numbers},
            ),
            (ops.rope_append, (q, k, k, *caches, None, None, inv_freq, empty), {}),
        ]
        for op, args, options in calls:
            found = op(*args, **options)
            fake = op(*(x if x is None else x.to("meta") for x in args), **options)
            single = isinstance(found, torch.Tensor)
            for x, like in zip(*([found], [fake]) if single else (found, fake)):
                assert (x.shape, x.dtype) == (like.shape, like.dtype), op
                assert x.stride() == like.stride(), (op, x.stride(), like.stride())
        """,
        EXTROPE_JIT="0",
        EXTROPE_CACHE_DIR="/nonexistent",
    )


# -------------------------------------------------------------------------------------------------
# With a norm


@pytest.mark.parametrize("together", (False, True))
def test_opcheck_norm(backend, together):
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    weights, inv_freq = norm_weights(2, 2, 8, together), methods.rope(6).inv_freq.to(device())
    for name, args in {
        "rope_norm_fwd": (q.requires_grad_(), k, *weights, inv_freq),
        "rope_norm_bwd": (q.detach(), k, q.detach(), k, *weights, inv_freq),
        "rope_norm_inplace": (q.detach().clone(), k.clone(), *weights, inv_freq),
    }.items():
        torch.library.opcheck(op(name, backend).default, args, {"offset": 3})


def test_compile_norm(backend):
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    freqs = methods.rope(8).to(device())
    leaves = [x.requires_grad_() for x in (q, k, *norm_weights(2, 2, 8))]

    def loss(*x):
        return sum(out.pow(3).sum() for out in call(x, freqs, backend))

    graph = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for got, want in zip(graph, torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(got, want)


def test_same_bits_with_any_number_of_threads():
    q, k = make_qk(1, 700, 3, 2)
    weights, freqs = norm_weights(3, 2, 64), methods.rope(64).to(device())
    douts = [torch.randn_like(x) for x in (q, k)]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(by_autograd([q, k, *weights], freqs, None, douts))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


# -------------------------------------------------------------------------------------------------
# The fused step


def op_arguments(case: str) -> tuple[list, dict]:
    """The op's positional arguments, and its options."""
    step = Step(norms="head")
    tensors = [step.q, step.k, step.v, *step.caches(torch.float32), *step.weights.values()]
    if case == "lengths":
        return [*tensors, step.freqs.inv_freq, ints(3, 9)], {"attention_factor": 1.1}
    if case == "slots":
        slots, positions = ints(*range(10)).view(2, 5), ints(*range(5))
        return [*tensors, step.freqs.inv_freq, None, None, slots, None, None, positions], {}
    tensors[0], tensors[5] = None, None
    stored = {"stored": [float(n) for n in scores.rerope(4, 2.0).stored], "interleaved": True}
    return [*tensors, step.freqs.inv_freq, ints(3, 9), None, None, None, ints(1, 2)], stored


@pytest.mark.parametrize("case", ("lengths", "slots", "stored"))
def test_opcheck_append(backend, case):
    tensors, options = op_arguments(case)
    torch.library.opcheck(op("rope_append", backend), tuple(tensors), options)


def test_compile_append(backend):
    step = Step(norms="head", call=CONTIGUOUS)

    def run(q, k, v, k_cache, v_cache, lengths):
        call = {"cache_seqlens": lengths, **step.weights, "backend": backend}
        return rope_append_kvcache(q * 2, k, v, k_cache, v_cache, step.freqs, **call)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        caches = step.caches(torch.float32)
        out = function(step.q, step.k, step.v, *caches, CONTIGUOUS["cache_seqlens"])
        results.append([out, *caches])
    for x, y in zip(*results):
        assert torch.equal(x, y)
