"""The ops as PyTorch sees them, beside tests/all_ops/test_registration.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.append_cases import Step, ints
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from extrope_kernels import (
    apply_rope,
    methods,
    rope_append_kvcache,
)
from extrope_kernels.testing import device, make_qk


def test_schemas_are_as_they_were():
    """Graphs that were exported name them, and compiled libraries read them by order."""
    tensors = (
        "Tensor inv_freq, Tensor? positions=None, Tensor? cu_seqlens=None, "
        "Tensor? log_decay=None, Tensor? axes=None"
    )
    options = (
        "float attention_factor=1., SymInt? offset=None, bool interleaved=False, "
        "int? rotary_offset=None, bool inverse=False, float decay_origin=0."
    )
    norm = "Tensor? q_norm_weight, Tensor? k_norm_weight"
    wanted = {
        "rope_fwd": f"(Tensor q, Tensor? k, {tensors}, *, {options}) -> (Tensor, Tensor)",
        "rope_norm_inplace": (
            f"(Tensor(a!) q, Tensor(b!)? k, {norm}, {tensors}, *, float norm_eps="
            f"9.9999999999999995e-07, {options}) -> ()"
        ),
    }
    for name, schema in wanted.items():
        assert str(getattr(torch.ops.extrope, name).default._schema) == f"extrope::{name}{schema}"


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
def test_compile_with_dynamic_lengths_does_not_recompile(backend):
    from torch._dynamo.testing import CompileCounter

    frames = CompileCounter()
    freqs = methods.rope(8).to(device())

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def rotate(q, offset):
        return apply_rope(q, freqs, positions=offset, backend=backend) * 2

    for seqlen, offset in ((5, 3), (9, 17), (14, 1000)):
        q, _ = make_qk(2, seqlen, 2, 1, head_dim=8)
        expected = apply_rope(q, freqs, positions=offset, backend=backend) * 2
        torch.testing.assert_close(rotate(q, offset), expected)
    assert frames.frame_count == 1


@pytest.mark.thorough
def test_inductor_in_place(backend):
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
            (ops.permute_fwd, (q, k, ek.head_permutations(2, 8)), {}),
            (ops.attention_fwd, (q, k, k, inv_freq, *none), options),
            (
                ops.decode,
                (q, *caches, None, None, inv_freq, *none[:5], used, *none[:4]),
                options,
            ),
            (ops.rope_append, (q, k, k, *caches, inv_freq, empty), {}),
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
