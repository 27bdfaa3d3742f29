"""PermuteFormer over flash-linear-attention, or over a stand-in of its function.

Without a GPU its kernels run as compiled PTX executed on the CPU, where both are there:

    PYTHONPATH=../shared TRITON_INTERPRET=0 EXTROPE_TRITON_CHIP=80 \
        python -m pytest -p fla.ops.simple_gla -p support.ptx.plugin -p no:xdist \\
        tests/permuteformer/test_fla.py
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import types

import pytest
import torch
from test_permuteformer import make

from extrope_kernels import permuteformer_attention
from extrope_kernels.ops.permuteformer import fla, reference, scans
from extrope_kernels.ops.permuteformer.permutations import Powers
from extrope_kernels.testing import device

REAL = importlib.util.find_spec("fla") is not None and (
    device() == "cuda" or "EXTROPE_TRITON_CHIP" in os.environ
)
# Of the largest value: products are of TF32 or bfloat16, each of three operands rounded once.
NEAR = {torch.float32: 3 * 2**-11 if REAL else 1e-5, torch.bfloat16: 3 * 2**-8}
NEAR[torch.float16] = NEAR[torch.float32] + 2**-11


def chunk_simple_gla(
    q,
    k,
    v,
    g=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    **kwargs,
):
    """The function of fla.ops.simple_gla 0.6.0, a token at a time: its signature, its states."""
    assert g is None and scale == 1.0 and not state_v_first and not kwargs
    assert (
        q.shape == k.shape
        and q.shape[:3] == v.shape[:3]
        and all(x.is_contiguous() and x.shape[-1] % 2 == 0 for x in (q, k, v))
    )
    decay = torch.ones(q.shape[2]) if g_gamma is None else g_gamma.exp()
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cu_seqlens is None or (cu_seqlens.dtype == torch.int64 and initial_state is None)
    rows, states = [], []
    for begin, end in itertools.pairwise(bounds):
        state = torch.zeros(q.shape[0], *q.shape[2:], v.shape[-1])
        state = state if initial_state is None else initial_state.float()
        for t in range(begin, end):
            outer = k[:, t, :, :, None].float() * v[:, t, :, None].float()
            state = decay[:, None, None] * state + outer
            rows.append(torch.einsum("bhd,bhdf->bhf", q[:, t].float(), state))
        states.append(state)
    out = torch.stack(rows, 1).to(v.dtype) if rows else torch.empty_like(v)
    return out, torch.cat(states) if output_final_state else None


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """fla's function, with the first configuration that its tuners list, or the stand-in."""
    if not REAL:
        module = types.ModuleType("fla.ops.simple_gla")
        module.chunk_simple_gla = chunk_simple_gla
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    elif device() == "cpu":
        import gc

        import fla.ops.simple_gla  # noqa: F401
        from triton.runtime.autotuner import Autotuner

        for tuner in (x for x in gc.get_objects() if isinstance(x, Autotuner)):
            monkeypatch.setattr(tuner, "configs", tuner.configs[-1:])


CASES = {
    "plain": {},
    "no denominator": {"normalize": False},
    "no decay": {"decay": None},
    "a decay for each head of q": {"decay": torch.tensor([0.5, 0.9, 0.99, 1.0])},
    "both ways": {"causal": False, "decay": None},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 37, 70], dtype=torch.int32)},
    "packed, both ways": {
        "cu_seqlens": torch.tensor([0, 5, 5, 37, 70], dtype=torch.int32),
        "causal": False,
        "decay": None,
    },
}


def sample(case, dtype):
    """q, k, v, powers and a call of it; dims are not multiples of eight."""
    qkv, permutations = make(1, 70, dim=20, value_dim=17, dtype=dtype)
    options = {"decay": torch.tensor([0.9, 0.99])} | CASES[case]
    options = {n: x.to(device()) if torch.is_tensor(x) else x for n, x in options.items()}
    heads = 2 if options["decay"] is None else len(options["decay"])
    if "cu_seqlens" in options:
        qkv = [x[0] for x in qkv]
    return (
        qkv,
        Powers(permutations, None, options.get("cu_seqlens"), 5),
        scans.Call(heads, **options),
    )


def assert_near(name, found, exact, dtype, size=None):
    """size: the sums of absolute terms, where exact is one of terms of either sign."""
    assert found.shape == exact.shape, name
    error = (found.double() - exact).abs().max() / (exact if size is None else size).abs().max()
    assert error <= NEAR[dtype], f"{name}: {error} of the largest, {NEAR[dtype]} is allowed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", NEAR)
def test_forward_and_backward(dtype, case):
    qkv, powers, call = sample(case, dtype)
    found = fla.forward(*qkv, powers, call)
    wide = [x.double().requires_grad_() for x in qkv]
    exact = reference.forward(*wide, powers, call)
    assert_near("out", found.out, exact.out.detach(), dtype)
    if call.normalize:
        assert_near("den", found.den, exact.den.detach(), dtype)
    dout = torch.randn_like(found.out)
    kept = (found.out, found.den) if call.normalize else (None, None)
    grads = fla.backward(dout, *qkv, *kept, powers, call)
    wanted = torch.autograd.grad(exact.out, wide, dout.double())
    q, k, v = (x.detach() for x in wide)
    absolute = -reference.forward(q, k, v.abs(), powers, call).out, exact.den.detach()
    absolute = absolute if call.normalize else (None, None)
    sizes = reference.backward(dout.double().abs(), q, k, v.abs(), *absolute, powers, call)
    for name, grad, want, size in zip(("dq", "dk", "dv"), grads, wanted, sizes):
        assert grad.dtype == dtype and grad.is_contiguous()
        assert_near(name, grad, want, dtype, size)


@pytest.mark.parametrize("heads", [2, 4])
def test_states(heads):
    """Cut in two, with a state between them: the rows and the state of the whole."""
    (q, k, v), permutations = make(2, 50, dim=20, value_dim=17)
    decay = torch.linspace(0.8, 1, heads).to(device())
    whole = scans.Call(heads, decay, keep_state=True)
    exact = reference.forward(*(x.double() for x in (q, k, v)), Powers(permutations), whole)
    cut, state, rows = 33, (None, None), []
    for part in (slice(0, cut), slice(cut, 50)):
        call = scans.Call(heads, decay, None, True, True, *state, keep_state=True)
        powers = Powers(permutations, offset=part.start)
        out, _, *state = fla.forward(q[:, part], k[:, part], v[:, part], powers, call)
        rows.append(out)
    assert_near("out", torch.cat(rows, 1), exact.out, torch.float32)
    assert_near("kv", state[0], exact.kv, torch.float32)
    assert_near("key_sum", state[1], exact.key_sum, torch.float32)


@pytest.mark.skipif(device() != "cuda", reason="needs a GPU")
@pytest.mark.skipif(not REAL, reason="needs flash-linear-attention")
def test_it_is_what_a_gpu_runs():
    (q, k, v), permutations = make(1, 70)
    found = permuteformer_attention(q, k, v, permutations=permutations)
    named = permuteformer_attention(q, k, v, permutations=permutations, backend="fla")
    assert torch.equal(found, named)
