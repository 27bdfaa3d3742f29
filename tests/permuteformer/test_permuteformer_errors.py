"""Every refusal: which function and argument, what was expected, what came."""

import pytest
import torch
from test_permuteformer import make

from extrope_kernels import (
    _ext,
    head_permutations,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from extrope_kernels.testing import device, make_qk

TABLE = head_permutations(2, 64).to(device())


def call(**changes):
    """permute_qk; a function makes an argument from the one that would do."""
    q, k = make_qk(2, 5, 4, 2)
    given = {"q": q, "k": k, "permutations": TABLE}
    for name, x in changes.items():
        given[name] = x(given[name]) if callable(x) else x
    return permute_qk(given.pop("q"), given.pop("k"), given.pop("permutations"), **given)


def packed(boundaries, dtype=torch.int32):
    """q and k of the first sequence, packed."""
    cu_seqlens = torch.tensor(boundaries, dtype=dtype, device=device())
    return {"q": lambda q: q[0], "k": lambda k: k[0], "cu_seqlens": cu_seqlens}


def table(change):
    return {"permutations": change}


def positions(*shape, **how):
    return {"positions": torch.ones(shape, **{"device": device(), **how})}


BAD = {
    "q a list": ({"q": [1.0]}, "q must be a Tensor, got list"),
    "q 3-D": ({"q": lambda q: q[0]}, "q must be (batch, seqlen, heads, head_dim)"),
    "q integer": ({"q": torch.Tensor.int}, "q must be float32, bfloat16"),
    "q strided": ({"q": lambda q: q.mT.contiguous().mT}, "q must be contiguous in its last dim"),
    "k None": ({"k": None}, "k must be a Tensor, got NoneType"),
    "k dtype": ({"k": torch.Tensor.half}, "k must have q's dtype"),
    "k seqlen": ({"k": lambda k: k[:, :4]}, "k must have q's shape"),
    "table a list": (table([[0]]), "permutations must be a Tensor, got list"),
    "table int32": (table(torch.Tensor.int), "permutations must be int64"),
    "table 1-D": (table(lambda x: x[0]), "(heads, 64)"),
    "table head_dim": (table(lambda x: x[:, :32]), "with heads a divisor of 4, got (2, 32)"),
    "table divisor": (table(lambda x: x.repeat(2, 1)[:3]), "got (3, 64)"),
    "table of q": (table(lambda x: x.repeat(2, 1)), "for each of the 2 k heads, got 4 rows"),
    "table strided": (table(lambda x: x.T.contiguous().T), "permutations must be contiguous in"),
    "table device": (table(TABLE.to("meta")), "permutations must be on q's device"),
    "head_dim": (
        {name: lambda x: x.repeat(1, 1, 1, 17) for name in "qk"},
        "head_dim must be from 1 to 1024, got 1088",
    ),
    "positions float": ({"positions": 1.5}, "positions must be a Tensor, an int or None, got"),
    "positions bool": ({"positions": True}, "positions must be a Tensor, an int or None, got"),
    "positions dtype": (positions(5), "positions must be int32 or int64, got torch.float32"),
    "positions shape": (
        positions(4, dtype=torch.int64),
        "positions must be (5,), (2, 5) or (2,) offsets, got shape (4,)",
    ),
    "positions device": (
        positions(5, dtype=torch.int64, device="meta"),
        "positions must be on q's device",
    ),
    "positions past 64 bits": ({"positions": 2**63}, "positions must fit in int64"),
    "cu_seqlens float": (packed([0, 5], torch.float32), "cu_seqlens must be int32"),
    "cu_seqlens short": (packed([0]), "cu_seqlens must be int32 (sequences + 1,)"),
    "backend": ({"backend": "metal"}, "backend must be None or one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_permute(case):
    arguments, message = BAD[case]
    with pytest.raises(TypeError if "must be a Tensor, " in message else ValueError) as raised:
        call(**arguments)
    assert str(raised.value).startswith("permute: ") and message in str(raised.value)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
@pytest.mark.parametrize(
    "row", (torch.zeros(64), torch.arange(64) + 1, torch.arange(64) - 1), ids=("twice", "64", "-1")
)
def test_rows_that_are_no_permutations(row):
    bad = torch.stack([TABLE[0], row.long()])
    message = "permute: permutations must hold 0 to 63 once .*, row 1"
    with pytest.raises(ValueError, match=message):
        call(permutations=bad)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.extrope.permute_fwd(*make_qk(2, 5, 4, 2), bad)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
@pytest.mark.parametrize("boundaries", ([0, 4], [1, 5], [0, 3, 2, 5], [-1, 5]))
def test_cu_seqlens_values_are_checked_where_that_costs_no_sync(boundaries):
    with pytest.raises(ValueError, match="permute: cu_seqlens must rise from 0 to"):
        call(**packed(boundaries))
    with pytest.raises(ValueError, match="permuteformer_attention: cu_seqlens must rise from 0 to"):
        q, k, v = (x[0, :5] for x in (Q, K, V))
        cu_seqlens = torch.tensor(boundaries)
        permuteformer_attention(q, k, v, permutations=PERMUTATIONS, cu_seqlens=cu_seqlens)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
def test_boundaries_past_int32_do_not_wrap():
    past = torch.tensor([0, 2**32 + 5])
    with pytest.raises(ValueError, match="permute: cu_seqlens must rise from 0 to"):
        call(**packed([0, 2**32 + 5], torch.int64))
    with pytest.raises(ValueError, match="permuteformer_attention: cu_seqlens must rise"):
        q, k, v = (x[0, :5] for x in (Q, K, V))
        permuteformer_attention(q, k, v, permutations=PERMUTATIONS, cu_seqlens=past)


def test_a_backend_that_cannot_run():
    named, why = ("fla", "cannot run here") if device() == "cpu" else ("cpu", "runs on cpu tensors")
    with pytest.raises(NotImplementedError, match=f"permuteformer_step: backend '{named}' {why}"):
        call_attention(permuteformer_step, {"backend": named})
    with pytest.raises(ValueError, match="permute: backend must be None or one of"):
        call(backend="fla")


def test_raw_op_checks_too():
    q, k = make_qk(2, 5, 4, 2)
    for args in ((q[0], None, TABLE), (q, k[:1], TABLE), (q, k, TABLE.float())):
        args = [x if x is None else x.to(device()) for x in args]
        with pytest.raises((RuntimeError, ValueError), match="permute: "):
            torch.ops.extrope.permute_fwd(*args)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((0, 8), ValueError, "heads must be 1 to 65536, got 0"),
        ((2, -1), ValueError, "head_dim must be 1 to 65536, got -1"),
        ((2.0, 8), TypeError, "heads must be an int, got float"),
    ),
)
def test_head_permutations(arguments, error, message):
    with pytest.raises(error, match=f"head_permutations: {message}"):
        head_permutations(*arguments)


# -------------------------------------------------------------------------------------------------
# Attention

(Q, K, V), PERMUTATIONS = make(2, 6, dim=8, value_dim=8)
DECAY = torch.tensor([0.5, 0.9], device=device())

CASES = [
    ({"q": "text"}, TypeError, "q must be a Tensor, got str"),
    ({"q": Q[0]}, ValueError, r"q must be \(batch, seqlen, heads, head_dim\), got shape \(6, 4"),
    ({"q": Q.int()}, ValueError, "q must be float32, .*, got torch.int32"),
    ({"q": Q.transpose(1, 3)}, ValueError, "q must be contiguous in its last dimension"),
    ({"k": K.double()}, ValueError, "k must be torch.float32 on .* like q, got torch.float64"),
    ({"k": K[..., :4]}, ValueError, r"k must have q's shape .*heads, got \(2, 6, 2, 4"),
    ({"v": V[:, :5]}, ValueError, r"v must have k's shape .* but for head_dim, got \(2, 5, 2, 8\)"),
    ({"q": Q[:, :, :3]}, ValueError, "k's heads must divide q's 3 heads, got 2"),
    ({"decay": 0.9}, TypeError, "decay must be a Tensor, got float"),
    ({"decay": DECAY[:1]}, ValueError, r"decay must be \(2,\), .*, or \(4,\), of q, got \(1,\)"),
    ({"decay": DECAY.half()}, ValueError, "decay must be float32 or float64 on"),
    ({"decay": DECAY * 2}, ValueError, r"decay must lie in \(0, 1\], got \[1.0, 1.7"),
    (
        {"decay": torch.nn.Parameter(DECAY * 2, requires_grad=False)},
        ValueError,
        r"decay must lie in \(0, 1\], got \[1.0, 1.7",
    ),
    ({"decay": torch.nn.Parameter(DECAY)}, ValueError, "decay must not require grad"),
    ({"permutations": PERMUTATIONS[:, :4]}, ValueError, "permutations must be"),
    ({"positions": 1.5}, TypeError, "positions must be a Tensor, an int or None, got float"),
    ({"backend": "cudnn"}, ValueError, "backend must be None or one of .*, got 'cudnn'"),
]


def call_attention(function, changes):
    arguments = {"q": Q, "k": K, "v": V, "permutations": PERMUTATIONS, **changes}
    qkv = [arguments.pop(name) for name in "qkv"]
    return function(*qkv, **arguments)


@pytest.mark.parametrize("function", [permuteformer_attention, permuteformer_step])
@pytest.mark.parametrize("changes, error, message", CASES)
def test_attention(function, changes, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        call_attention(function, changes)


def test_attention_alone():
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=device())
    for changes, message in (
        ({"decay": DECAY, "causal": False}, "decay must be None with causal=False"),
        ({"cu_seqlens": cu_seqlens}, r"q must be \(total, heads, head_dim\) with cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=f"^permuteformer_attention: {message}"):
            call_attention(permuteformer_attention, changes)


def test_raw_attention_has_no_gradient_of_decay():
    leaf = DECAY.clone().requires_grad_()
    with pytest.raises(ValueError, match="permuteformer: decay must not require grad"):
        torch.ops.extrope.permuteformer_fwd(Q, K, V, PERMUTATIONS, None, leaf)


def test_states():
    _, state = call_attention(permuteformer_step, {})
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
