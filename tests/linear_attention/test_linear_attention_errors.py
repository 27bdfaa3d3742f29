"""What permuteformer_attention and permuteformer_step refuse, and the ops as PyTorch sees them."""

from __future__ import annotations

import pytest
import torch
from test_linear_attention import make

from extrope_kernels import _ext, permuteformer_attention, permuteformer_step
from extrope_kernels.testing import device

OPS = torch.ops.extrope
(Q, K, V), PERMUTATIONS = make(2, 6, dim=8, value_dim=8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32, device=device())
DECAY = torch.tensor([0.5, 0.9], device=device())

CASES = [
    ({"q": "text"}, TypeError, "q must be a Tensor, got str"),
    ({"q": Q[0]}, ValueError, r"q must be \(batch, seqlen, heads, head_dim\), got shape \(6, 4"),
    ({"q": Q.int()}, ValueError, "q must be float32, .*, got torch.int32"),
    ({"q": Q.transpose(1, 3)}, ValueError, "q must be contiguous in its last dimension"),
    ({"k": K.double()}, ValueError, "k must be torch.float32 on .* like q, got torch.float64"),
    (
        {"k": K[..., :4]},
        ValueError,
        r"k must have q's shape .* but for the heads, got \(2, 6, 2, 4",
    ),
    ({"v": V[:, :5]}, ValueError, r"v must have k's shape .* but for head_dim, got \(2, 5, 2, 8\)"),
    ({"q": Q[:, :, :3]}, ValueError, "k's heads must divide q's 3 heads, got 2"),
    ({"decay": 0.9}, TypeError, "decay must be a Tensor, got float"),
    ({"decay": DECAY[:1]}, ValueError, r"decay must be \(2,\), .*, or \(4,\), of q, got \(1,\)"),
    ({"decay": DECAY.half()}, ValueError, "decay must be float32 or float64 on"),
    ({"decay": DECAY * 2}, ValueError, r"decay must lie in \(0, 1\], got \[1.0, 1.7"),
    ({"backend": "cudnn"}, ValueError, "backend must be None or one of .*, got 'cudnn'"),
]


def call(function, changes):
    arguments = {"q": Q, "k": K, "v": V, "permutations": PERMUTATIONS, **changes}
    qkv = [arguments.pop(name) for name in "qkv"]
    return function(*qkv, **arguments)


@pytest.mark.parametrize("function", [permuteformer_attention, permuteformer_step])
@pytest.mark.parametrize("changes, error, message", CASES)
def test_arguments(function, changes, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        call(function, changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"decay": DECAY, "causal": False}, ValueError, "decay must be None with causal=False"),
        ({"cu_seqlens": CU}, ValueError, r"q must be \(total, heads, head_dim\) with cu_seqlens"),
    ],
)
def test_attention_alone(changes, error, message):
    with pytest.raises(error, match=f"^permuteformer_attention: {message}"):
        call(permuteformer_attention, changes)


def test_permutations_are_checked_by_their_own_op():
    with pytest.raises(ValueError, match=r"^permute: permutations must be"):
        call(permuteformer_attention, {"permutations": PERMUTATIONS[:, :4]})


def test_states():
    _, state = call(permuteformer_step, {})
    for changes, error, message in (
        ({"state": state}, ValueError, "positions must be given with a state, got None"),
        ({"state": 3}, TypeError, "state must be None or a PermuteFormerState, got int"),
        (
            {"state": (state.kv[:1], state.k), "positions": 6},
            ValueError,
            r"state.kv must be torch.float32 \(2, 2, 8, 8\) on .*, got .* \(1, 2, 8, 8\)",
        ),
    ):
        with pytest.raises(error, match=f"^permuteformer_step: {message}"):
            call(permuteformer_step, changes)


def test_dims_of_the_fused_kernels():
    qkv, permutations = make(1, 3, dim=264, value_dim=8)
    with pytest.raises(ValueError, match=r"linear_attn: head_dim must be at most 256 .*, got 264"):
        permuteformer_attention(*qkv, permutations=permutations)
    permuteformer_attention(*qkv, permutations=permutations, backend="reference")


@pytest.mark.parametrize("function", [permuteformer_attention, permuteformer_step])
def test_triton_has_no_float64(function):
    """Its sums are float32. What a device chooses takes float64, and so gives way to PyTorch."""
    double = {name: x.double() for name, x in zip("qkv", (Q, K, V))}
    with pytest.raises(ValueError, match=r"linear_attn: backend='triton' .*got torch.float64"):
        call(function, {**double, "backend": "triton"})
    call(function, double)


def test_double_backward_points_to_the_reference():
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    out = permuteformer_attention(*leaves, permutations=PERMUTATIONS)
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear_attn: .*backend='reference'"):
        torch.autograd.grad(dq.sum(), leaves[1])


@pytest.mark.parametrize("case", range(3))
def test_opcheck(case):
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    packed = [x.detach()[0] for x in (q, k, v)]
    args, options = [
        ((q, k, v, DECAY), {}),
        ((q, k, v), {"causal": False, "normalize": False}),
        ((*packed, DECAY, CU), {}),
    ][case]
    torch.library.opcheck(OPS.linear_attn_fwd.default, args, options)


def test_opcheck_of_backward_and_step():
    out, den = OPS.linear_attn_fwd(Q, K, V, DECAY)
    torch.library.opcheck(OPS.linear_attn_bwd.default, (out, Q, K, V, out, den, DECAY))
    _, kv, key_sum = OPS.linear_attn_step(Q, K, V, None, None, DECAY)
    torch.library.opcheck(OPS.linear_attn_step.default, (Q, K, V, kv, key_sum, DECAY))


def test_compile_is_one_graph():
    def loss(q, k, v):
        return permuteformer_attention(q, k, v, permutations=PERMUTATIONS).square().sum()

    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def scan(gate=None, state=None):
    """The op below, whose arguments decide what a kernel reads: called by itself it must hold."""
    _ext.load("cpu")
    numbers, decay = (None,) * 4, torch.full((2,), 0.9)
    flags = (0, 2, True, True, False, True, False, True)
    return OPS.linear_scan(Q, K, V, *numbers, gate, decay, None, state, None, None, None, *flags)


@pytest.mark.skipif(device() != "cpu", reason="an op of the CPU library")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state": torch.zeros(2, 2, 8, 8)}, "state and sum come together"),
        (
            {"gate": torch.zeros(1, 1, 4, 8)},
            r"gate must have .* \(2, 6, 4, 8\), but v's dim 8, got \(1, 1, 4, 8\)",
        ),
        ({"gate": torch.zeros(2, 6, 4, 8).half()}, "gate must have q's dtype"),
    ],
)
def test_a_scan_by_itself(changes, message):
    with pytest.raises(RuntimeError, match=f"^linear_attn: {message}"):
        scan(**changes)
