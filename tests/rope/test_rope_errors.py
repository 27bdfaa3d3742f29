"""Every refusal of the rotation's ops: which argument, what was expected, what came."""

from dataclasses import replace

import pytest
import torch
from append_cases import CONTIGUOUS, FILLER, Step, ints
from rope_oracle import INTERPRETED

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    scores,
)
from extrope_kernels.testing import device, make_qk

FREQS = methods.rope(64).to(device())
SECTIONS = methods.with_sections(FREQS, (16, 8, 8))
META = "meta"


def freqs(*shape, dtype=torch.float32, **rest):
    return {"freqs": RopeFreqs(torch.ones(shape, dtype=dtype, device=device()), **rest)}


def decay(*shape, origin=0.0, **how):
    log_decay = torch.ones(shape, device=device(), **how)
    return freqs(32, log_decay=log_decay, decay_origin=origin)


def positions(*shape, **how):
    return {"positions": torch.ones(shape, **{"device": device(), **how})}


def packed(boundaries, dtype=torch.int32, tokens=5):
    """q and k of the first sequence, packed."""

    def cut(x):
        return x[0, :tokens]

    return {"q": cut, "k": cut, "cu_seqlens": torch.tensor(boundaries, dtype=dtype).to(device())}


def axes(given, *shape):
    given = given.to(device()) if isinstance(given, torch.Tensor) else given
    return {
        "freqs": replace(SECTIONS, axes=given),
        "positions": torch.zeros(shape, dtype=torch.int64, device=device()),
    }


def weight(name, *shape, **how):
    return {f"{name}_norm_weight": torch.ones(shape, device=device(), **how)}


def call(**changes):
    """apply_rope_qk; a function makes an argument from the one that would do."""
    q, k = make_qk(2, 5, 4, 2)
    given = {"q": q, "k": k, "freqs": FREQS}
    for name, x in changes.items():
        given[name] = x(given[name]) if callable(x) else x
    return apply_rope_qk(given.pop("q"), given.pop("k"), given.pop("freqs"), **given)


BAD = {
    "q not a tensor": ({"q": [1.0]}, "q must be a Tensor, got list"),
    "q 3-D": ({"q": lambda q: q[0]}, "q must be (batch, seqlen, heads, head_dim)"),
    "q int": ({"q": torch.Tensor.int}, "q must be float32, bfloat16, float16 or float64"),
    "q complex": ({"q": lambda q: q.to(torch.complex64)}, "got torch.complex64"),
    "q strided": ({"q": lambda q: q.mT.contiguous().mT}, "q must be contiguous in its last dim"),
    "k None": ({"k": None}, "k must be a Tensor, got NoneType"),
    "k dtype": ({"k": torch.Tensor.half}, "k must have q's dtype torch.float32, got torch.float16"),
    "k batch": ({"k": lambda k: k[:1]}, "k must have q's shape"),
    "k seqlen": ({"k": lambda k: k[:, :4]}, "k must have q's shape"),
    "k head_dim": ({"k": lambda k: k[..., :32]}, "k must have q's shape"),
    "k 3-D": ({"k": lambda k: k[0]}, "k must be (batch, seqlen, heads, head_dim)"),
    "freqs": ({"freqs": torch.ones(32)}, "freqs must be a RopeFreqs, got Tensor"),
    "inv_freq None": ({"freqs": RopeFreqs(None)}, "inv_freq must be a Tensor, got NoneType"),
    "inv_freq half": (freqs(32, dtype=torch.half), "inv_freq must be float32 or float64"),
    "inv_freq 0-d": (freqs(), "inv_freq must be (rotary_dim/2,)"),
    "inv_freq empty": (freqs(0), "between 1 and head_dim/2 = 32 frequencies"),
    "inv_freq long": (freqs(33), "got 33"),
    "inv_freq rows": (freqs(3, 32), "got (3, 32)"),
    "inv_freq per head, 2-D": (freqs(4, 32), "got (4, 32)"),
    "inv_freq heads": (freqs(1, 3, 32), "got (1, 3, 32)"),
    "inv_freq 4-D": (freqs(1, 1, 1, 32), "got (1, 1, 1, 32)"),
    "inv_freq strided": (
        {"freqs": RopeFreqs(torch.ones(64, device=device())[::2])},
        "inv_freq must be contiguous",
    ),
    "inv_freq of q's heads": (freqs(1, 4, 32), "as many k heads as q heads (4), got 2"),
    "inv_freq device": (
        {"freqs": RopeFreqs(torch.ones(32, device=META))},
        "inv_freq must be on q's device",
    ),
    "factor 0": (freqs(32, attention_factor=0.0), "attention_factor must be > 0"),
    "factor nan": (freqs(32, attention_factor=float("nan")), "attention_factor must be > 0"),
    "factor inf": (freqs(32, attention_factor=float("inf")), "> 0 and finite, got inf"),
    "factor huge": (freqs(32, attention_factor=10**400), "attention_factor must be finite"),
    "factor bool": (freqs(32, attention_factor=True), "factor must be a number, got bool"),
    "factor learned": (
        freqs(32, attention_factor=torch.ones((), requires_grad=True)),
        "attention_factor must be a number, got Tensor",
    ),
    "origin nan": (decay(32, origin=float("nan")), "decay_origin must be finite, got nan"),
    "origin learned": (
        decay(32, origin=torch.zeros(())),
        "decay_origin must be a number, got Tensor",
    ),
    "log_decay length": (decay(31), "log_decay must be contiguous float32 (32,)"),
    "log_decay dtype": (
        decay(32, dtype=torch.double),
        "log_decay must be contiguous float32 (32,)",
    ),
    "positions float": (
        {"positions": 1.5},
        "positions must be a Tensor, an int or None, got float",
    ),
    "positions bool": ({"positions": True}, "positions must be a Tensor, an int or None, got bool"),
    "positions list": ({"positions": [1]}, "positions must be a Tensor, an int or None, got list"),
    "positions dtype": (
        positions(5, dtype=torch.half),
        "positions must be int32, int64, float32 or float64, got torch.float16",
    ),
    "positions shape": (
        positions(4),
        "positions must be (5,), (2, 5), (2,) offsets or, with axes, (axes, 2, 5), got shape (4,)",
    ),
    "positions 3-D": (positions(1, 2, 5), "positions must be (5,), (2, 5)"),
    "positions sparse": (
        {"positions": torch.arange(5, device=device()).to_sparse()},
        "positions must be a dense tensor, got torch.sparse_coo",
    ),
    "positions device": (positions(5, device=META), "positions must be on q's device"),
    "cu_seqlens float": (packed([0, 5], torch.float32), "cu_seqlens must be int32"),
    "cu_seqlens short": (packed([0]), "cu_seqlens must be int32 (sequences + 1,)"),
    "cu_seqlens 2-D": (packed([[0, 5]]), "cu_seqlens must be int32 (sequences + 1,)"),
    "cu_seqlens a list, XPOS": (
        {**packed([0, 5]), "cu_seqlens": [0, 5], "freqs": methods.xpos(64).to(device())},
        "cu_seqlens must be a Tensor, got list",
    ),
    "cu_seqlens, 4-D q": (
        {"cu_seqlens": packed([0, 5])["cu_seqlens"]},
        "q must be (total, heads, head_dim) with cu_seqlens",
    ),
    "axes missing": (axes(None, 3, 2, 5), "offsets or, with axes, (axes, 2, 5), got shape"),
    "axes a list": (axes([0] * 32, 3, 2, 5), "axes must be a Tensor, got list"),
    "axes int64": (axes(torch.zeros(32).long(), 3, 2, 5), "axes must be contiguous int32 (32,)"),
    "axes length": (axes(torch.zeros(31).int(), 3, 2, 5), "axes must be contiguous int32 (32,)"),
    "axes strided": (axes(torch.zeros(64).int()[::2], 3, 2, 5), "axes must be contiguous int32"),
    "axes 2-D": (axes(torch.zeros(1, 32).int(), 3, 2, 5), "axes must be contiguous int32 (32,)"),
    "axes without rows": (axes(torch.zeros(32).int(), 0, 2, 5), "positions must be (5,)"),
    "axes batch": (axes(torch.zeros(32).int(), 3, 3, 5), "got shape (3, 3, 5)"),
    "axes seqlen": (axes(torch.zeros(32).int(), 3, 2, 4), "got shape (3, 2, 4)"),
    "q_norm_weight": (weight("q", 7), "q_norm_weight must be (64,)"),
    "k_norm_weight": (weight("k", 2, 64), "k_norm_weight must be (64,)"),
    "norm weight's dtype": (weight("q", 64, dtype=torch.int64), "q_norm_weight must be float32"),
    "norm weight's strides": (
        {"q_norm_weight": torch.ones(128, device=device())[::2]},
        "q_norm_weight must be contiguous",
    ),
    "norm weight a float": ({"k_norm_weight": 1.0}, "k_norm_weight must be a Tensor, got float"),
    "norm_eps": ({"norm_eps": -1.0}, "norm_eps must be >= 0, got -1.0"),
    "norm_eps a str": ({"norm_eps": "small"}, "norm_eps must be a number, got str"),
    "norm_eps huge": ({"norm_eps": 10**400}, "norm_eps must be finite"),
    "backend": ({"backend": "metal"}, "backend must be None or one of"),
    "flag": ({"interleaved": 1}, "interleaved must be a bool, got int"),
}


@pytest.mark.parametrize("named", (None, "reference", "triton"))
@pytest.mark.parametrize("case", BAD)
def test_refusals(case, named):
    if named == "triton":
        pytest.importorskip("triton")
    arguments, message = BAD[case]
    arguments = {"backend": named, **arguments}
    of_a_type = "Tensor, " in message or "be a number" in message or "got int" in message
    error = TypeError if of_a_type or "must be a RopeFreqs" in message else ValueError
    with pytest.raises(error) as raised:
        call(**arguments)
    assert str(raised.value).startswith("rope: ") and message in str(raised.value)


@pytest.mark.parametrize(
    "boundaries, tokens",
    [(ends, 5) for ends in ([0, 4], [1, 5], [0, 3, 2, 5], [0, 9, 5], [-1, 5])]
    + [(ends, 0) for ends in ([1, 0], [0, -5, 0], [0, 2**30])],
)
@pytest.mark.parametrize("norm", [{}, weight("q", 64)], ids=["", "norm"])
def test_cu_seqlens_values_are_checked_where_that_costs_no_sync(boundaries, tokens, norm):
    """On a CPU the boundaries are in reach; on a GPU reading them would stall it."""
    if device() != "cpu":
        pytest.skip("device tensors are not read")
    with pytest.raises(ValueError, match="rope: cu_seqlens must rise from 0 to"):
        call(**packed(boundaries, tokens=tokens), **norm)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
def test_boundaries_past_int32_do_not_wrap():
    with pytest.raises(ValueError, match="rope: cu_seqlens must rise from 0 to"):
        call(**packed([0, 2**32 + 5], torch.int64))


@pytest.mark.parametrize("largest", (-1, 3))
def test_an_axis_out_of_range(backend, largest):
    """On a CPU the axes are in reach; elsewhere they are clamped, as reading them would stall."""
    x, _ = make_qk()
    axes = SECTIONS.axes.clone()
    axes[5] = largest
    options = {"positions": torch.randint(0, 99, (3, 2, 13), device=device()), "backend": backend}
    if backend == "cpu":
        with pytest.raises(ValueError, match=f"rope: axes must be from 0 to 2 .* got {largest}"):
            apply_rope(x, replace(SECTIONS, axes=axes), **options)
        return
    out = apply_rope(x, replace(SECTIONS, axes=axes), **options)
    near = replace(SECTIONS, axes=axes.clamp(0, 2))
    assert torch.equal(out, apply_rope(x, near, **options))


@pytest.mark.parametrize("name", ("positions", "log_decay"))
def test_what_has_no_gradient_says_so(backend, name):
    q, _ = make_qk()
    leaf = torch.ones(13 if name == "positions" else 32, device=device(), requires_grad=True)
    given = replace(FREQS, log_decay=leaf if name == "log_decay" else None)
    at = leaf if name == "positions" else None
    with pytest.raises(ValueError, match=f"rope: {name} must not require grad"):
        apply_rope(q.requires_grad_(), given, positions=at, backend=backend)


def test_frequencies_of_no_heads(backend):
    x = torch.empty(2, 5, 0, 8, device=device())
    given = RopeFreqs(torch.empty(1, 0, 4, device=device()))
    with pytest.raises(ValueError, match=r"inv_freq must be .* got \(1, 0, 4\)"):
        apply_rope(x, given, backend=backend)
    assert apply_rope(x, RopeFreqs(FREQS.inv_freq[:4]), backend=backend).shape == x.shape


def test_a_named_backend_of_another_device():
    other = "cuda" if device() == "cpu" else "cpu"
    runs_on = f"rope: backend '{other}' runs on {other} tensors"
    with pytest.raises(NotImplementedError, match=runs_on):
        call(backend=other)


@pytest.mark.skipif(device() != "cpu", reason="a GPU says it in PyTorch's words")
@pytest.mark.parametrize("norm", [{}, weight("q", 64)], ids=["", "norm"])
def test_out_of_memory_says_how_much_for_what(norm):
    x = torch.zeros(64).expand(2**20, 2**20, 8, 64)
    size = rf"cannot allocate {2**49 * 4} bytes for a result of shape \(1048576, 1048576, 8, 64\)"
    with pytest.raises(RuntimeError, match=f"^rope: {size}$"):
        apply_rope_qk(x, x, FREQS, backend="cpu", **norm)


# -------------------------------------------------------------------------------------------------
# In place


def test_inplace_refuses_what_autograd_needs(backend):
    q, _ = make_qk()
    with pytest.raises(ValueError, match="rope: inplace=True is for inference"):
        apply_rope(q.requires_grad_(), FREQS, inplace=True, backend=backend)
    with torch.no_grad():
        apply_rope(q, FREQS, inplace=True, backend=backend)


QKV = torch.zeros(2, 6, 5, 64, device=device())
OWN = "inplace=True needs q and k of their own"
SHARING = {
    "one tensor": (QKV, QKV, OWN),
    "a view of it": (QKV, QKV[:], OWN),
    "a common head": (QKV[:, :, :3], QKV[:, :, 2:4], OWN),
    "common tokens": (QKV[:, :4], QKV[:, 2:], OWN),
    "dense in part": (*(QKV[0, :, :4].clone().view(1, 6, 4, 64),) * 2, OWN),
    "expanded": (QKV[:, :, :1].expand(2, 6, 3, 64), QKV[:, :, 1:], "q must not be expanded"),
    "shapes": (QKV[:, :, 1:], QKV[:1, :, :1], "k must have q's shape"),
    "slices of a projection": (QKV[:, :, :3], QKV[:, :, 3:], None),
    "tokens": (QKV[:, :3], QKV[:, 3:], None),
    "alternate heads": (QKV[:, :, 0::2], QKV[:, :, 1::2], None),
}


@pytest.mark.parametrize("name", SHARING)
def test_inplace_and_memory_that_is_shared(backend, name):
    q, k, refusal = SHARING[name]
    options = {"inplace": True, "backend": backend, "positions": 1}
    if refusal is None:
        apply_rope_qk(q, k, FREQS, **options)
        return
    QKV.fill_(1.0)
    for which in (backend, "reference"):
        with pytest.raises(ValueError, match=f"rope: {refusal}"):
            apply_rope_qk(q, k, FREQS, **options | {"backend": which})
    assert (QKV == 1).all()


# -------------------------------------------------------------------------------------------------
# The ops themselves


def test_raw_bwd_wants_inputs_that_fit():
    q, k = make_qk(2, 5, 4, 2)
    for saved in ((q[:, :4], k), (q, None), (q.half(), k)):
        with pytest.raises((RuntimeError, ValueError), match=r"rope: (q|k) must"):
            torch.ops.extrope.rope_bwd(q, k, *saved, FREQS.inv_freq)


@pytest.mark.parametrize("name", ["rope_inplace", "rope_norm_inplace"])
def test_raw_inplace_and_autograd(name):
    """It refuses what a graph needs, and what autograd has saved may not be used after it."""
    weights = (torch.ones(64, device=device()), None) if "norm" in name else ()
    op = getattr(torch.ops.extrope, name)
    leaf = torch.randn(1, 5, 3, 64, device=device(), requires_grad=True)
    for x in (leaf, leaf * 1):
        with pytest.raises(RuntimeError, match="rope: inplace=True is for inference"):
            op(x, None, *weights, FREQS.inv_freq)
    saved = torch.randn(1, 5, 3, 64, device=device())
    out = leaf * saved
    op(saved, None, *weights, FREQS.inv_freq)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises((RuntimeError, ValueError), match="expanded"):
        op(saved[:, :, :1].expand(1, 5, 3, 64), None, *weights, FREQS.inv_freq)


# -------------------------------------------------------------------------------------------------
# The fused step: what values show is refused on a CPU, before anything is written

PAGED = Step(blocks=(12, 4))
FIVE, TEN = ints(*range(5)), ints(*range(10)).view(2, 5)
PACKED = Step(tokens=(5,))
VALUES = {
    "past the end": (Step(), {"cache_seqlens": ints(3, 19)}, "cache_seqlens"),
    "negative": (Step(), {"cache_seqlens": ints(3, -1)}, "cache_seqlens"),
    "no slots": (Step(), {"positions": FIVE}, "cache_seqlens or slot_mapping"),
    "slot": (Step(), {**CONTIGUOUS, "slot_mapping": TEN + 37}, "slot_mapping"),
    "slot below -1": (Step(), {**CONTIGUOUS, "slot_mapping": TEN - 2}, "slot_mapping"),
    "no positions": (Step(), {"slot_mapping": TEN}, "positions"),
    "page": (
        PAGED,
        {"cache_seqlens": 3, "block_table": ints(1, 12, 3, 4).view(2, 2)},
        "block_table",
    ),
    "two places": (
        PAGED,
        {"slot_mapping": TEN, "block_table": ints(1, 2).view(2, 1)},
        "block_table and slot_mapping",
    ),
    "offsets": (Step(), {**CONTIGUOUS, "positions": ints(3, 4)}, "positions"),
    "fractions": (
        Step(),
        {**CONTIGUOUS, "positions": FIVE + 0.5, "score": scores.rerope(4, 2.0)},
        "positions",
    ),
    "padding": (Step(), {**CONTIGUOUS, "cache_leftpad": ints(-1, 0)}, "cache_leftpad"),
    "packed": (PACKED, {"cache_seqlens": 3}, "cu_seqlens or slot_mapping"),
    "boundaries": (PACKED, {"cache_seqlens": 3, "cu_seqlens": ints(0, 4, 6)}, "cu_seqlens"),
    "boundaries from 1": (PACKED, {"cache_seqlens": 3, "cu_seqlens": ints(1, 4, 5)}, "cu_seqlens"),
}


@pytest.mark.skipif(not INTERPRETED, reason="values on a GPU are not looked at")
@pytest.mark.parametrize("name", VALUES)
def test_append_refuses_before_anything_is_written(name):
    step, call, named = VALUES[name]
    caches = step.caches(torch.float32)
    for which in (None, "reference"):
        given = {"freqs": step.freqs, **call, "backend": which}
        with pytest.raises(ValueError, match=rf"^rope_append_kvcache: .*{named}"):
            rope_append_kvcache(step.q, step.k, step.v, *caches, **given)
    assert all((x == FILLER).all() for x in caches)


STEP, (CACHE, OTHER) = Step(), Step().caches(torch.float32)
SCALES = torch.ones(2, device=device())
FP8 = {"k_cache": CACHE.to(torch.float8_e4m3fn), "v_cache": CACHE.to(torch.float8_e4m3fn)}
APPEND = {
    "v tokens": ({"v": STEP.v[:, :4]}, "v must have k's tokens and heads"),
    "v dtype": ({"v": STEP.v.half()}, "v must be torch.float32 on"),
    "q dtype": ({"q": STEP.q.half()}, "k must have q's dtype torch.float16"),
    "q dims": ({"q": STEP.q[..., :16]}, "k must have q's shape"),
    "k strides": ({"k": STEP.k.mT.contiguous().mT}, "k must be contiguous in its last dimension"),
    "heads": ({"k_cache": CACHE[:, :, :1]}, "k_cache must have the heads and head_dim that are"),
    "dtype": ({"v_cache": CACHE.half()}, "v_cache must be torch.float32"),
    "expanded": ({"k_cache": CACHE[:1].expand(2, -1, -1, -1)}, "k_cache must not be expanded"),
    "one cache": ({"v_cache": CACHE}, "k_cache and v_cache must be two tensors"),
    "slots": ({"v_cache": OTHER[:, :22]}, "v_cache must have k_cache's blocks and slots"),
    "batch": ({"k_cache": CACHE[:1], "v_cache": OTHER[:1]}, "k_cache must be .batch, max_len"),
    "lengths": ({"cache_seqlens": ints(3, 9, dtype=torch.int64)}, "cache_seqlens must be int32"),
    "some lengths": ({"cache_seqlens": ints(3)}, "cache_seqlens must be int32 .2,. on"),
    "padding": ({"cache_leftpad": ints(3)}, "cache_leftpad must be int32 .2,. on"),
    "table": ({"block_table": ints(0, 1)}, "block_table must be int32 .2, max_blocks. on"),
    "page size": (
        {"block_table": TEN[:, :2], "k_cache": CACHE[:, :0], "v_cache": OTHER[:, :0]},
        "k_cache must have a block_size >= 1, got 0",
    ),
    "slot_mapping": ({"slot_mapping": FIVE}, "slot_mapping must be int32 or int64 .2, 5"),
    "no q": ({"q": None, "q_norm_weight": SCALES}, "q_norm_weight needs a q, got None"),
    "scales": ({"k_scale": SCALES, "v_scale": SCALES}, "k_scale and v_scale are for caches in"),
    "scale": (
        {**FP8, "k_scale": SCALES, "v_scale": -SCALES},
        "v_scale must be positive numbers",
    ),
    "norm_eps": ({"norm_eps": 10**400}, "norm_eps must be finite"),
    "factor": (freqs(16, attention_factor=10**400), "attention_factor must be finite"),
    "origin": (
        {"freqs": replace(methods.xpos(32).to(device()), decay_origin=float("nan"))},
        "decay_origin must be finite, got nan",
    ),
}


@pytest.mark.parametrize("name", APPEND)
def test_append_refuses_what_has_no_meaning(name):
    changes, message = APPEND[name]
    given = {"q": STEP.q, "k": STEP.k, "v": STEP.v, "k_cache": CACHE, "v_cache": OTHER}
    given |= {"freqs": STEP.freqs, **CONTIGUOUS, **changes}
    for which in (None, "reference"):
        with pytest.raises(ValueError, match=f"^rope_append_kvcache: {message}"):
            rope_append_kvcache(**given, backend=which)
    assert (CACHE == FILLER).all()


@pytest.mark.parametrize("given", [None, STEP.freqs], ids=["unread", "read"])
def test_append_refuses_positions_that_are_no_tensor(given):
    arguments = {**CONTIGUOUS, "freqs": given, "positions": 3}
    with pytest.raises(TypeError, match=r"^rope_append_kvcache: positions must be a Tensor"):
        rope_append_kvcache(STEP.q, STEP.k, STEP.v, CACHE, OTHER, **arguments)


def test_append_has_no_gradient(backend):
    step = Step(norms="head")
    tensors = [step.q.requires_grad_(), step.k, step.v, *step.caches(torch.float32)]
    with pytest.raises(ValueError, match="rope_append_kvcache: q must not require grad"):
        rope_append_kvcache(*tensors, None, cache_seqlens=3, backend=backend)
    weights = {"k_norm_weight": step.weights["k_norm_weight"].requires_grad_()}  # a model's own
    for which in (backend, "reference"):
        call = {"cache_seqlens": 3, "backend": which, **weights}
        out = rope_append_kvcache(tensors[0].detach(), *tensors[1:], None, **call)
        assert not any(x.requires_grad for x in (out, *tensors[3:]))


def test_append_by_triton_needs_dims_to_pair():
    k, cache = torch.zeros(1, 2, 2, 1, device=device()), torch.zeros(2, 1, 8, 2, 1, device=device())
    with pytest.raises(NotImplementedError, match=r"a head_dim of at least 2, .* got 1 and 1"):
        rope_append_kvcache(k, k, k, *cache, None, cache_seqlens=0, backend="triton")
