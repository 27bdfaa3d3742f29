"""Every refusal: which argument, what was expected, what came, and nothing written."""

import pytest
import torch

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import available_backends, device, make_qk

FREQS = methods.rope(64)


def call(**changes):
    q, k = make_qk(2, 5, 4, 2)
    given = dict(q=q, k=k, freqs=FREQS.to(device()))
    given.update({name: make(q, k) if callable(make) else make for name, make in changes.items()})
    return apply_rope_qk(given.pop("q"), given.pop("k"), given.pop("freqs"), **given)


def freqs(inv_freq, **rest):
    return lambda q, k: RopeFreqs(inv_freq.to(q.device), **rest)


def packed(boundaries, dtype=torch.int32):
    return dict(
        q=lambda q, k: q[0],
        k=lambda q, k: k[0],
        cu_seqlens=lambda q, k: torch.tensor(boundaries, dtype=dtype, device=q.device),
    )


BAD = {
    # what is wrong: (arguments, exception, words of the message)
    "q not a tensor": (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    "q three dimensions": (
        dict(q=lambda q, k: q[0]),
        ValueError,
        "q must be (batch, seqlen, heads, head_dim)",
    ),
    "q integer": (
        dict(q=lambda q, k: q.int()),
        ValueError,
        "q must be float32, bfloat16, float16 or float64",
    ),
    "q complex": (dict(q=lambda q, k: q.to(torch.complex64)), ValueError, "got torch.complex64"),
    "q last dim strided": (
        dict(q=lambda q, k: q.transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError,
        "q must be contiguous in its last dimension",
    ),
    "k dtype": (
        dict(k=lambda q, k: k.half()),
        ValueError,
        "k must have q's dtype torch.float32, got torch.float16",
    ),
    "k batch": (dict(k=lambda q, k: k[:1]), ValueError, "k must have q's shape"),
    "k seqlen": (dict(k=lambda q, k: k[:, :4]), ValueError, "k must have q's shape"),
    "k head_dim": (dict(k=lambda q, k: k[..., :32]), ValueError, "k must have q's shape"),
    "k dimensions": (
        dict(k=lambda q, k: k[0]),
        ValueError,
        "k must be (batch, seqlen, heads, head_dim)",
    ),
    "freqs a tensor": (
        dict(freqs=torch.ones(32)),
        TypeError,
        "freqs must be a RopeFreqs, got Tensor",
    ),
    "inv_freq None": (
        dict(freqs=RopeFreqs(None)),
        TypeError,
        "inv_freq must be a Tensor, got NoneType",
    ),
    "inv_freq half": (
        dict(freqs=freqs(torch.ones(32).half())),
        ValueError,
        "inv_freq must be float32 or float64",
    ),
    "inv_freq 0-d": (
        dict(freqs=freqs(torch.tensor(1.0))),
        ValueError,
        "inv_freq must be (rotary_dim/2,)",
    ),
    "inv_freq empty": (
        dict(freqs=freqs(torch.ones(0))),
        ValueError,
        "between 1 and head_dim/2 = 32 frequencies",
    ),
    "inv_freq too long": (dict(freqs=freqs(torch.ones(33))), ValueError, "got 33"),
    "inv_freq rows": (dict(freqs=freqs(torch.ones(3, 32))), ValueError, "got (3, 32)"),
    "inv_freq per head, 2-D": (dict(freqs=freqs(torch.ones(4, 32))), ValueError, "got (4, 32)"),
    "inv_freq heads": (dict(freqs=freqs(torch.ones(1, 3, 32))), ValueError, "got (1, 3, 32)"),
    "inv_freq 4-D": (dict(freqs=freqs(torch.ones(1, 1, 1, 32))), ValueError, "got (1, 1, 1, 32)"),
    "inv_freq strided": (
        dict(freqs=freqs(torch.ones(64)[::2])),
        ValueError,
        "inv_freq must be contiguous",
    ),
    "inv_freq per head of k": (
        dict(freqs=freqs(torch.ones(1, 4, 32))),
        ValueError,
        "as many k heads as q heads (4), got 2",
    ),
    "inv_freq device": (
        dict(freqs=RopeFreqs(torch.ones(32, device="meta"))),
        ValueError,
        "inv_freq must be on q's device",
    ),
    "attention_factor 0": (
        dict(freqs=freqs(torch.ones(32), attention_factor=0.0)),
        ValueError,
        "attention_factor must be > 0",
    ),
    "attention_factor nan": (
        dict(freqs=freqs(torch.ones(32), attention_factor=float("nan"))),
        ValueError,
        "attention_factor must be > 0",
    ),
    "log_decay length": (
        dict(freqs=freqs(torch.ones(32), log_decay=torch.ones(31))),
        ValueError,
        "log_decay must be contiguous float32 (32,)",
    ),
    "log_decay dtype": (
        dict(freqs=freqs(torch.ones(32), log_decay=torch.ones(32).double())),
        ValueError,
        "log_decay must be contiguous float32 (32,)",
    ),
    "positions float": (
        dict(positions=1.5),
        TypeError,
        "positions must be a Tensor, an int or None, got float",
    ),
    "positions bool": (
        dict(positions=True),
        TypeError,
        "positions must be a Tensor, an int or None, got bool",
    ),
    "positions list": (
        dict(positions=[1, 2]),
        TypeError,
        "positions must be a Tensor, an int or None, got list",
    ),
    "positions dtype": (
        dict(positions=lambda q, k: torch.ones(5, device=q.device).half()),
        ValueError,
        "positions must be int32, int64, float32 or float64, got torch.float16",
    ),
    "positions shape": (
        dict(positions=lambda q, k: torch.ones(4, device=q.device)),
        ValueError,
        "positions must be (5,), (2, 5), (2,) offsets or, with axes, (axes, 2, 5), got shape (4,)",
    ),
    "positions 3-D": (
        dict(positions=lambda q, k: torch.ones(1, 2, 5, device=q.device)),
        ValueError,
        "positions must be (5,), (2, 5)",
    ),
    "positions device": (
        dict(positions=torch.ones(5, device="meta")),
        ValueError,
        "positions must be on q's device",
    ),
    "cu_seqlens float": (packed([0, 5], torch.float32), ValueError, "cu_seqlens must be int32"),
    "cu_seqlens short": (packed([0]), ValueError, "cu_seqlens must be int32 (sequences + 1,)"),
    "cu_seqlens 2-D": (packed([[0, 5]]), ValueError, "cu_seqlens must be int32 (sequences + 1,)"),
    "cu_seqlens with 4-D q": (
        dict(cu_seqlens=lambda q, k: torch.tensor([0, 5], dtype=torch.int32, device=q.device)),
        ValueError,
        "q must be (total, heads, head_dim) with cu_seqlens",
    ),
    "backend unknown": (dict(backend="metal"), ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("chosen", [None, *available_backends()])
@pytest.mark.parametrize("case", BAD)
def test_refusals(case, chosen):
    arguments, error, message = BAD[case]
    with pytest.raises(error) as raised:
        call(**{"backend": chosen, **arguments})
    assert str(raised.value).startswith("rope: ") and message in str(raised.value)


@pytest.mark.parametrize("boundaries", ([0, 4], [1, 5], [0, 3, 2, 5], [0, 9, 5], [-1, 5]))
def test_cu_seqlens_values_are_checked_where_that_costs_no_sync(boundaries):
    """On a CPU the boundaries are in reach; on a GPU reading them would stall it."""
    if device() != "cpu":
        pytest.skip("device tensors are not read")
    with pytest.raises(ValueError, match="rope: cu_seqlens must rise from 0 to"):
        call(**packed(boundaries))


def test_nothing_is_written_on_refusal(backend):
    q, k = make_qk(2, 5, 4, 2)
    before = q.clone()
    with pytest.raises(ValueError):
        apply_rope_qk(q, k[:1], FREQS.to(device()), inplace=True, backend=backend)
    assert torch.equal(q, before)


def test_inplace_refuses_what_autograd_needs(backend):
    q, _ = make_qk()
    with pytest.raises(ValueError, match="rope: inplace=True is for inference"):
        apply_rope(q.requires_grad_(), FREQS.to(device()), inplace=True, backend=backend)
    with torch.no_grad():
        apply_rope(q, FREQS.to(device()), inplace=True, backend=backend)


def test_inplace_refuses_expanded_tensors(backend):
    q, _ = make_qk(1, 5, 1)
    with pytest.raises(ValueError, match="rope: q must not be expanded"):
        apply_rope(q.expand(1, 5, 3, 64), FREQS.to(device()), inplace=True, backend=backend)


@pytest.mark.parametrize("name", ("positions", "log_decay"))
def test_what_has_no_gradient_says_so(backend, name):
    q, _ = make_qk()
    leaf = torch.ones(13 if name == "positions" else 32, device=device(), requires_grad=True)
    freqs = RopeFreqs(FREQS.inv_freq.to(device()), 1.0, leaf if name == "log_decay" else None)
    positions = leaf if name == "positions" else None
    with pytest.raises(ValueError, match=f"rope: {name} is not differentiable"):
        apply_rope(q.requires_grad_(), freqs, positions=positions, backend=backend)


def test_a_named_backend_of_another_device():
    other = "cuda" if device() == "cpu" else "cpu"
    with pytest.raises(
        NotImplementedError, match=f"rope: backend '{other}' runs on {other} tensors"
    ):
        call(backend=other)


RAW = {
    "q 3-D": (lambda q, k: (q[0], None, FREQS.inv_freq), "q must be"),
    "k shape": (lambda q, k: (q, k[:1], FREQS.inv_freq), "k must have q's shape"),
    "inv_freq rows": (lambda q, k: (q, None, torch.ones(3, 32)), "inv_freq must be"),
    "positions shape": (lambda q, k: (q, None, FREQS.inv_freq, torch.ones(4)), "positions must be"),
}


@pytest.mark.parametrize("name", ("rope_fwd", "rope_inplace"))
@pytest.mark.parametrize("case", RAW)
def test_raw_ops_check_too(case, name):
    build, message = RAW[case]
    q, k = make_qk(2, 5, 4, 2)
    arguments = [x.to(device()) if isinstance(x, torch.Tensor) else x for x in build(q, k)]
    with pytest.raises((RuntimeError, ValueError), match=f"rope: {message}"):
        getattr(torch.ops.extrope, name)(*arguments)


def test_raw_inplace_refuses_expanded_tensors():
    q, _ = make_qk(1, 5, 1)
    with pytest.raises((RuntimeError, ValueError), match="expanded"):
        torch.ops.extrope.rope_inplace(q.expand(1, 5, 3, 64), None, FREQS.inv_freq.to(device()))


def test_raw_bwd_wants_inputs_that_fit():
    q, k = make_qk(2, 5, 4, 2)
    inv_freq = FREQS.inv_freq.to(device())
    for saved in ((q[:, :4], k), (q, None), (q.half(), k)):
        with pytest.raises((RuntimeError, ValueError), match=r"rope: (q|k) must"):
            torch.ops.extrope.rope_bwd(q, k, *saved, inv_freq)


@pytest.mark.parametrize("name", ["rope_inplace", "rope_norm_inplace"])
def test_raw_inplace_and_autograd(name):
    """It refuses what a graph needs, and what autograd has saved may not be used after it."""
    weights = (torch.ones(64, device=device()), None) if "norm" in name else ()
    op = getattr(torch.ops.extrope, name)
    leaf = torch.randn(1, 5, 3, 64, device=device(), requires_grad=True)
    for x in (leaf, leaf * 1):
        with pytest.raises(RuntimeError, match="rope: inplace=True is for inference"):
            op(x, None, *weights, FREQS.inv_freq.to(device()))
    saved = torch.randn(1, 5, 3, 64, device=device())
    out = leaf * saved
    op(saved, None, *weights, FREQS.inv_freq.to(device()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inplace_refuses_one_tensor_for_both(backend):
    q = torch.randn(1, 5, 3, 64, device=device())
    with pytest.raises(ValueError, match="rope: inplace=True needs q and k of their own"):
        apply_rope_qk(q, q, FREQS.to(device()), inplace=True, backend=backend)
