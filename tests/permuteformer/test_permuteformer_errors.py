"""What PermuteFormer's functions refuse beside one wrong argument.

Single wrong arguments are in tests/all_ops/test_wrong_arguments.py.
"""

import pytest
import torch
from test_permuteformer import make

from extrope_kernels import (
    _ext,
    head_permutations,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from extrope_kernels.testing import device, make_qk

(Q, K, V), PERMUTATIONS = make(2, 6, dim=8, value_dim=8)
DECAY = torch.tensor([0.5, 0.9], device=device())
TABLE = head_permutations(2, 64).to(device())


def call_attention(function, changes):
    arguments = {"q": Q, "k": K, "v": V, "permutations": PERMUTATIONS, **changes}
    qkv = [arguments.pop(name) for name in "qkv"]
    return function(*qkv, **arguments)


def test_more_dims_than_are_permuted():
    x, rows = torch.zeros(1, 1, 2, 1088, device=device()), head_permutations(2, 1088).to(device())
    with pytest.raises(ValueError, match="permute: head_dim must be from 1 to 1024, got 1088"):
        permute(x, rows)


def test_a_backend_that_cannot_run():
    named, why = ("fla", "cannot run here") if device() == "cpu" else ("cpu", "runs on cpu tensors")
    with pytest.raises(NotImplementedError, match=f"permuteformer_step: backend '{named}' {why}"):
        call_attention(permuteformer_step, {"backend": named})
    with pytest.raises(ValueError, match="permute: backend must be None or one of"):
        permute_qk(*make_qk(2, 5, 4, 2), TABLE, backend="fla")


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
def test_the_raw_op_checks_too():
    q, k = make_qk(2, 5, 4, 2)
    once = torch.arange(64)
    rows = [torch.stack([TABLE[0], row]) for row in (once * 0, once + 1, once - 1)]
    for args in ((q[0], None, TABLE), (q, k[:1], TABLE), (q, k, TABLE.float())):
        with pytest.raises((RuntimeError, ValueError), match="permute: "):
            torch.ops.extrope.permute_fwd(*args)
    for wrong in rows:
        with pytest.raises(RuntimeError, match=r"permutations must hold 0 to 63 once .*, row 1"):
            torch.ops.extrope.permute_fwd(q, k, wrong)


def test_attention_alone():
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=device())
    for changes, message in (
        ({"decay": DECAY, "causal": False}, "decay must be None with causal=False"),
        ({"cu_seqlens": cu_seqlens}, r"q must be \(total, heads_q, head_dim\) with cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=f"^permuteformer_attention: {message}"):
            call_attention(permuteformer_attention, changes)


def test_raw_attention_has_no_gradient_of_decay():
    leaf = DECAY.clone().requires_grad_()
    with pytest.raises(ValueError, match="permuteformer: decay must not require grad"):
        torch.ops.extrope.permuteformer_fwd(Q, K, V, PERMUTATIONS, None, leaf)


def test_the_raw_backward_needs_what_was_normalized():
    out, den = torch.ops.extrope.permuteformer_fwd(Q, K, V, PERMUTATIONS)
    for given in ((out, None), (None, den), (None, None)):
        for device_of in (Q.device, "meta"):
            args = [
                x if x is None else x.to(device_of) for x in (out, Q, K, V, *given, PERMUTATIONS)
            ]
            with pytest.raises(ValueError, match="permuteformer: out and den must be given with"):
                torch.ops.extrope.permuteformer_bwd(*args)
    torch.ops.extrope.permuteformer_bwd(out, Q, K, V, None, None, PERMUTATIONS, normalize=False)


def test_states():
    _, state = call_attention(permuteformer_step, {})
    for changes, error, message in (
        ({"state": state}, ValueError, "positions must be given with a state, got None"),
        ({"state": 3}, TypeError, "state must be None or a PermuteFormerState, got int"),
        (
            {"state": (state.kv[:1], state.k), "positions": 6},
            ValueError,
            r"state.kv must be \(batch 2, heads 2, .* to go with k, got \(1, 2, 8, 8\)",
        ),
    ):
        with pytest.raises(error, match=f"^permuteformer_step: {message}"):
            call_attention(permuteformer_step, changes)


def test_dims_of_the_fused_kernels():
    qkv, permutations = make(1, 3, dim=264, value_dim=8)
    with pytest.raises(ValueError, match=r"permuteformer: head_dim must be at most 256 .*got 264"):
        permuteformer_attention(*qkv, permutations=permutations)
    permuteformer_attention(*qkv, permutations=permutations, backend="reference")
    qkv, permutations = make(1, 3, dim=8, value_dim=256)
    with pytest.raises(ValueError, match=r"permuteformer_step: v's .* less than 256 .*got 256"):
        permuteformer_step(qkv[0].requires_grad_(), *qkv[1:], permutations=permutations)


def scan(gate=None, state=None):
    """The op below, whose arguments decide what a kernel reads: called by itself it must hold."""
    _ext.load("cpu")
    numbers, decay = (None,) * 4, torch.full((2,), 0.9)
    flags = (0, 2, True, True, False, True, False, True)
    more = (gate, decay, None, state, None, None, None)
    return torch.ops.extrope.linear_scan(Q, K, V, *numbers, *more, *flags)


@pytest.mark.skipif(device() != "cpu", reason="an op of the CPU library")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state": torch.zeros(2, 2, 8, 8)}, "state and sum come together"),
        ({"gate": torch.zeros(1, 1, 4, 8)}, r"gate must have .* but v's dim 8, got \(1, 1, 4, 8\)"),
        ({"gate": torch.zeros(2, 6, 4, 8).half()}, "gate must have q's dtype"),
    ],
)
def test_a_scan_by_itself(changes, message):
    with pytest.raises(RuntimeError, match=f"^linear_attn: {message}"):
        scan(**changes)
