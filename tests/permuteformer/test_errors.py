"""Every refusal: which argument, what was expected, what came."""

import pytest
import torch

from extrope_kernels import head_permutations, permute, permute_qk
from extrope_kernels.testing import available_backends, device, make_qk

TABLE = head_permutations(2, 64)


def call(**changes):
    q, k = make_qk(2, 5, 4, 2)
    given = dict(q=q, k=k, permutations=TABLE.to(device()))
    given.update({name: make(q, k) if callable(make) else make for name, make in changes.items()})
    return permute_qk(given.pop("q"), given.pop("k"), given.pop("permutations"), **given)


def table(make):
    return lambda q, k: make(TABLE).to(q.device)


def packed(boundaries, dtype=torch.int32):
    return dict(
        q=lambda q, k: q[0],
        k=lambda q, k: k[0],
        cu_seqlens=lambda q, k: torch.tensor(boundaries, dtype=dtype, device=q.device),
    )


BAD = {
    # what is wrong: (arguments, exception, words of the message)
    "q not a tensor": (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    "q 3-D": (dict(q=lambda q, k: q[0]), ValueError, "q must be (batch, seqlen, heads, head_dim)"),
    "q integer": (dict(q=lambda q, k: q.int()), ValueError, "q must be float32, bfloat16"),
    "q last dim strided": (
        dict(q=lambda q, k: q.transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError,
        "q must be contiguous in its last dimension",
    ),
    "k None": (dict(k=None), TypeError, "k must be a Tensor, got NoneType"),
    "k dtype": (dict(k=lambda q, k: k.half()), ValueError, "k must have q's dtype"),
    "k seqlen": (dict(k=lambda q, k: k[:, :4]), ValueError, "k must have q's shape"),
    "permutations a list": (dict(permutations=[[0]]), TypeError, "permutations must be a Tensor"),
    "permutations int32": (
        dict(permutations=table(lambda x: x.int())),
        ValueError,
        "permutations must be int64",
    ),
    "permutations 1-D": (dict(permutations=table(lambda x: x[0])), ValueError, "(heads, 64)"),
    "permutations head_dim": (
        dict(permutations=table(lambda x: x[:, :32])),
        ValueError,
        "permutations must be (heads, 64) with heads a divisor of 4, got (2, 32)",
    ),
    "permutations divisor": (
        dict(permutations=table(lambda x: x.repeat(2, 1)[:3])),
        ValueError,
        "got (3, 64)",
    ),
    "permutations of q": (
        dict(permutations=table(lambda x: x.repeat(2, 1))),
        ValueError,
        "permutations must have a row for each of the 2 k heads, got 4 rows",
    ),
    "permutations strided": (
        dict(permutations=table(lambda x: x.T.contiguous().T)),
        ValueError,
        "permutations must be contiguous in its last dimension",
    ),
    "permutations device": (
        dict(permutations=TABLE.to("meta")),
        ValueError,
        "permutations must be on q's device",
    ),
    "head_dim": (
        dict(q=lambda q, k: q.repeat(1, 1, 1, 17), k=lambda q, k: k.repeat(1, 1, 1, 17)),
        ValueError,
        "head_dim must be from 1 to 1024, got 1088",
    ),
    "positions float": (dict(positions=1.5), TypeError, "an int or None, got float"),
    "positions bool": (dict(positions=True), TypeError, "an int or None, got bool"),
    "positions float tensor": (
        dict(positions=lambda q, k: torch.ones(5, device=q.device)),
        ValueError,
        "positions must be int32 or int64, got torch.float32",
    ),
    "positions shape": (
        dict(positions=lambda q, k: torch.ones(4, device=q.device).long()),
        ValueError,
        "positions must be (5,), (2, 5) or (2,) offsets, got shape (4,)",
    ),
    "positions device": (
        dict(positions=torch.ones(5, device="meta").long()),
        ValueError,
        "positions must be on q's device",
    ),
    "positions past 64 bits": (dict(positions=2**63), ValueError, "positions must fit in int64"),
    "cu_seqlens float": (packed([0, 5], torch.float32), ValueError, "cu_seqlens must be int32"),
    "cu_seqlens short": (packed([0]), ValueError, "cu_seqlens must be int32 (sequences + 1,)"),
    "backend unknown": (dict(backend="metal"), ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("chosen", [None, *available_backends()])
@pytest.mark.parametrize("case", BAD)
def test_refusals(case, chosen):
    arguments, error, message = BAD[case]
    with pytest.raises(error) as raised:
        call(**{"backend": chosen, **arguments})
    assert str(raised.value).startswith("permute: ") and message in str(raised.value)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
@pytest.mark.parametrize("chosen", [None, *available_backends()])
@pytest.mark.parametrize(
    "row", (torch.zeros(64), torch.arange(64) + 1, torch.arange(64) - 1), ids=("twice", "64", "-1")
)
def test_rows_that_are_no_permutations(row, chosen):
    bad = torch.stack([TABLE[0], row.long()])
    with pytest.raises(ValueError, match=r"permute: permutations must hold 0 to 63 once .*, row 1"):
        call(permutations=bad, backend=chosen)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
@pytest.mark.parametrize("boundaries", ([0, 4], [1, 5], [0, 3, 2, 5], [-1, 5]))
def test_cu_seqlens_values_are_checked_where_that_costs_no_sync(boundaries):
    with pytest.raises(ValueError, match="permute: cu_seqlens must rise from 0 to"):
        call(**packed(boundaries))


def test_a_named_backend_of_another_device():
    other = "cuda" if device() == "cpu" else "cpu"
    with pytest.raises(NotImplementedError, match=f"permute: backend '{other}' runs on {other}"):
        call(backend=other)


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


def test_permute_names_its_argument():
    with pytest.raises(TypeError, match="permute: q must be a Tensor, got NoneType"):
        permute(None, TABLE)
