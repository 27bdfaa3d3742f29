"""The ops as PyTorch sees them: opcheck, torch.compile, schemas, CUDA graphs, raw calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from append_cases import CONTIGUOUS, Step, ints
from test_rope_norm import call, norm_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    scores,
)
from extrope_kernels.ops._shared.maps import columns_of
from extrope_kernels.testing import device, make_qk

SUFFIXES = {"cpu": "", "cuda": "", "triton": "_triton"}


def op(name, backend):
    return getattr(torch.ops.extrope, name + SUFFIXES[backend])


HALF = methods.rope(6).inv_freq.to(device())
# inv_freq, positions, cu_seqlens, log_decay and axes, as many as a case has, and its options.
CASES = {
    "plain": ((HALF,), {}),
    "no_k": ((HALF,), {}),
    "positions": (
        (HALF, torch.arange(10, device=device()).view(2, 5) * 7),
        {"interleaved": True, "rotary_offset": 2, "attention_factor": 1.2},
    ),
    "packed": ((HALF, None, ints(0, 2, 5)), {"offset": 3, "inverse": True}),
    "per_head_decay": (
        (torch.rand(2, 2, 3, device=device()), None, None, methods.xpos(6).log_decay.to(device())),
        {},
    ),
    "axes": (
        (HALF, torch.arange(20, device=device()).view(2, 2, 5), None, None, ints(1, 0, 1)),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend, case):
    rope_args, options = CASES[case]
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    if case == "packed":
        q, k = q[0], k[0]
    saved = (q, None if case == "no_k" else k)
    torch.library.opcheck(op("rope_inplace", backend).default, (*saved, *rope_args), options)
    inv_freq, *rest = rope_args
    rope_args = (inv_freq.clone().requires_grad_(), *rest)
    leaves = tuple(x if x is None else x.clone().requires_grad_() for x in saved)
    torch.library.opcheck(op("rope_fwd", backend).default, (*leaves, *rope_args), options)
    for given in (saved, (None, None)):
        args = (*leaves, *given, *rope_args)
        torch.library.opcheck(op("rope_bwd", backend).default, args, options)


@pytest.mark.parametrize("together", (False, True))
def test_opcheck_norm(backend, together):
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    rope_args = (*norm_weights(2, 2, 8, together), HALF)
    for name, args in {
        "rope_norm_fwd": (q.clone().requires_grad_(), k),
        "rope_norm_bwd": (q, k, q, k),
        "rope_norm_inplace": (q.clone(), k.clone()),
    }.items():
        torch.library.opcheck(op(name, backend).default, (*args, *rope_args), {"offset": 3})


@pytest.mark.parametrize("case", ("lengths", "slots", "stored"))
def test_opcheck_append(backend, case):
    step, options = Step(norms="head", rotary_dim=16), {"rotary_offset": 8}
    tensors = [step.q, step.k, step.v, *step.caches(torch.float32), *step.weights.values()]
    tensors.append(step.freqs.inv_freq)
    if case == "lengths":
        tensors.append(ints(3, 9))
        options["attention_factor"] = 1.1
    elif case == "slots":
        tensors += [None, None, ints(*range(10)).view(2, 5), None, None, ints(*range(5))]
    else:
        tensors[0], tensors[5] = None, None
        tensors += [ints(3, 9), None, None, None, ints(1, 2)]
        options |= {**columns_of([scores.rerope(4, 2.0).stored]), "interleaved": True}
    torch.library.opcheck(op("rope_append", backend), tuple(tensors), options)


def test_append_of_tensors_without_values():
    """Fakes and meta tensors, outside of a graph; XPOS's range and places are not checked then."""
    step = Step(tokens=(5,))
    given = [step.q, step.k, step.v, *step.caches(torch.float32), ints(0, 3, 5), ints(3, 9)]

    def append(tensors, freqs):
        *tensors, boundaries, lengths = tensors
        return rope_append_kvcache(*tensors, freqs, cu_seqlens=boundaries, cache_seqlens=lengths)

    freqs = methods.xpos(32).to(device())
    assert append([x.to("meta") for x in given], freqs.to("meta")).shape == step.q.shape
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*given, freqs.inv_freq, freqs.log_decay)]
        freqs = replace(freqs, inv_freq=fakes[-2], log_decay=fakes[-1])
        assert append(fakes[:-2], freqs).shape == step.q.shape


def test_xpos_of_positions_without_values():
    """A symbolic trace has a number for every item, but not its value."""
    x, positions = torch.randn(1, 5, 2, 16, device=device()), torch.arange(5, device=device())

    def rotate(x, positions):
        return apply_rope(x, methods.xpos(16).to(device()), positions=positions)

    traced = make_fx(rotate, tracing_mode="symbolic")(x, positions)
    assert torch.equal(traced(x, positions + 2), rotate(x, positions + 2))


# -------------------------------------------------------------------------------------------------
# torch.compile
def forward_and_backward(q, k, inv_freq, positions, backend):
    options = {"positions": positions, "rotary_offset": 2, "backend": backend}
    out_q, out_k = apply_rope_qk(q * 1.0, k * 1.0, RopeFreqs(inv_freq, 1.1), **options)
    return (out_q.pow(2).sum() + (out_k * out_k.detach().flip(1)).sum()) / 2


@pytest.mark.parametrize("positions", (None, 7, "tensor"))
def test_compile_fullgraph(backend, positions):
    if positions == "tensor":
        positions = torch.arange(5, device=device()) + 3
    q, k = (x.requires_grad_() for x in make_qk(2, 5, 2, 2, head_dim=8))
    inv_freq = HALF.clone().requires_grad_()
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


@pytest.mark.usefixtures("no_library")
def test_without_a_library(run_python):
    """The reference runs, its results have the strides that graphs count on, no name falls back."""
    run_python(
        """
        import torch, extrope_kernels as ek
        from extrope_kernels import scores
        from extrope_kernels.ops.attention import AttentionCall
        ops, inv_freq = torch.ops.extrope, ek.methods.rope(8).inv_freq
        q = torch.randn(2, 4, 5, 8).transpose(1, 2)
        k = torch.randn(2, 2, 5, 8).transpose(1, 2)
        options = AttentionCall(inv_freq, score=scores.rerope(3)).options
        none = (None,) * 7
        used = torch.full((2,), 5, dtype=torch.int32)
        empty, caches = used * 0, (torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8))
        calls = [
            (ops.rope_fwd, (q, k, inv_freq), {}),
            (ops.rope_bwd, (q, k, q, k, inv_freq), {}),
            (ops.rope_norm_fwd, (q, k, torch.ones(8), None, inv_freq), {}),
            (ops.rope_norm_bwd, (q, k, q, k, torch.ones(8), None, inv_freq), {}),
            (ops.rope_cos_sin, (q, k, torch.ones(1, 5, 4), torch.ones(1, 5, 4)), {}),
            (ops.permute_fwd, (q, k, ek.head_permutations(2, 8)), {}),
            (ops.attention_fwd, (q, k, k, inv_freq, *none), options),
            (
                ops.decode,
                (q, *caches, None, None, inv_freq, *none[:5], used, *none[:4]),
                options,
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
        freqs, x = ek.methods.rope(8), q.clone()
        out = ek.apply_rope(q, freqs, backend="reference")
        assert torch.equal(ek.apply_rope(q, freqs), out)
        ek.apply_rope(x, freqs, inplace=True)
        assert torch.equal(x, out)
        ek.permuteformer_attention(q, q, q, permutations=ek.head_permutations(4, 8))
        for name, call in (
            ("rope", lambda: ek.apply_rope(q, freqs, backend="cpu")),
            ("permute", lambda: ek.permute(q, ek.head_permutations(4, 8), backend="cpu")),
        ):
            try:
                call()
            except NotImplementedError as error:
                assert f"{name}: backend 'cpu' cannot run here" in str(error)
            else:
                raise AssertionError("a named backend fell back")
        """,
        EXTROPE_JIT="0",
        EXTROPE_CACHE_DIR="/nonexistent",
    )


def test_compile_norm(backend):
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    freqs = methods.rope(8).to(device())
    leaves = [x.requires_grad_() for x in (q, k, *norm_weights(2, 2, 8))]

    def loss(*x):
        return sum(out.pow(3).sum() for out in call(x, freqs, backend))

    graph = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for got, want in zip(graph, torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(got, want)


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
